from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import tyro  # noqa: F401  it reads builtins when imported, where a doctest may have left an array as `_`

# What one test compiles, others and the processes that they start need not compile again (half of the suite's time).
# JAX does not write these files in one piece; who finds half of one warns, which is ignored, and compiles.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="jaxmp-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Virtual devices share the cores: on a busy machine one of eight may keep the others waiting for longer than XLA bears.
WAIT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {WAIT}".strip()

# Compiling takes longer than hypothesis' deadline, and a rule that holds today should be tested with the same examples
# tomorrow.
hypothesis.settings.register_profile("jaxmp", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxmp")


def leave_variants_to_the_slow_suite(items):
    """The quick suite runs the first and last variant of a test marked `few_variants`, the slow suite the others."""
    variants = {}
    for item in items:
        if item.get_closest_marker("few_variants"):
            variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one_test in variants.values():
        for item in of_one_test[1:-1]:
            item.add_marker(pytest.mark.slow)


# --- experiments without their data


@pytest.fixture(scope="session")
def made_up():
    """`(experiment, rows) -> experiment` over random rows of the shape of its data, in batches of 8."""
    return with_made_up_rows


def with_made_up_rows(experiment, rows):
    """The experiment over `rows` made-up rows, without a warm-up and microbatches that so few have no room for."""
    import numpy as np  # with jaxmp's data, which import JAX, not above: see `pytest_runtest_setup`

    from jaxmp.data.arrays import Arrays
    from jaxmp.data.audio import JoinedRecordings, Recordings
    from jaxmp.data.image_folder import ImageFolder
    from jaxmp.data.task_sequence import PermutedTasks
    from jaxmp.data.text import TextDataset, TextWindows
    from jaxmp.data.tokenizer import Bytes

    data, optimizer = experiment.data, experiment.optimizer
    if hasattr(optimizer, "schedule") and hasattr(optimizer.schedule, "warmup_steps"):
        optimizer = dataclasses.replace(optimizer, schedule=dataclasses.replace(optimizer.schedule, warmup_steps=0))
    if hasattr(optimizer, "sampling"):
        # Poisson batches of 8 from few rows would be empty: a batch has no room for what may be drawn.
        optimizer = dataclasses.replace(optimizer, sampling="shuffled")
    loop = dataclasses.replace(experiment.loop, accumulate_steps=1)
    experiment = dataclasses.replace(experiment, optimizer=optimizer, loop=loop)

    def texts(split):
        rng = np.random.default_rng(0)
        if isinstance(data, TextWindows):
            return {data.column: [rng.bytes(rows * data.length + 1)]}
        room = data.length - 2  # beside the special tokens
        lengths = rng.integers(room // 2 + 1, room + 1, rows)  # two of them do not fit into one row
        return {data.column: [rng.bytes(length) for length in lengths], "label": rng.integers(0, 2, rows)}

    if isinstance(data, PermutedTasks):
        load = {"image": np.random.default_rng(0).integers(0, 256, (rows, 28, 28, 1)).astype(np.uint8)}
        load["label"] = np.random.default_rng(1).integers(0, 10, rows)
        return dataclasses.replace(
            experiment, data=dataclasses.replace(data, rows=Arrays(lambda split: load), batch_size=8)
        )
    if isinstance(data, TextDataset):
        tokenizer = data.tokenizer if isinstance(data.tokenizer, Bytes) else Bytes(special=True)
        data = dataclasses.replace(data, rows=Arrays(texts), tokenizer=tokenizer, batch_size=8)
        return dataclasses.replace(experiment, data=data)

    def load(split):
        rng = np.random.default_rng(0)
        if isinstance(data, Recordings):
            frames = rng.integers(15, 25, rows).astype(np.int32)  # twice the labels that there may be, and more
            features = rng.standard_normal((rows, 24, data.features.bands)).astype(np.float32)
            features = np.where(np.arange(24)[:, None] < frames[:, None, None], features, 0)
            if not isinstance(data, JoinedRecordings):
                return {"features": features, "frames": frames, "label": rng.integers(0, 10, rows)}
            labels = rng.integers(0, 10, (rows, data.most)).astype(np.int32)
            counts = np.arange(data.most) < rng.integers(data.least, data.most + 1, rows)[:, None]
            return {"features": features, "frames": frames, "labels": np.where(counts, labels, -1)}
        if isinstance(data, ImageFolder):
            image = rng.integers(0, 256, (rows, *data.size, data.channels)).astype(np.uint8)
            return {"image": image, "label": rng.integers(0, 1000, rows)}
        shape = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[data.name]
        image = rng.integers(0, 256, (rows, *shape)).astype(np.uint8)
        return {"image": image, "label": rng.integers(0, 10, rows)}

    names = [field.name for field in dataclasses.fields(Arrays)[:-1]]
    fields = {name: getattr(data, name) for name in names if hasattr(data, name)}
    if isinstance(data, Recordings):
        fields["transforms"] = (*data.transforms, fields.pop("augment"))
    if isinstance(data, ImageFolder):
        fields["transforms"] = (*data.transforms, data.crop)
    return dataclasses.replace(experiment, data=Arrays(**{**fields, "load": load, "batch_size": 8}))


# --- eight devices
#
# Tests marked `eight_devices` run on eight virtual CPU devices, which would slow down all others. The first of them
# starts one process, pytest again, that runs all of them that were selected. Each then passes or fails as it did there.

EIGHT_DEVICES = "eight devices"
"""the group of pytest-xdist, so that one worker starts that process once"""

REPORTS = "JAXMP_TESTS_ON_EIGHT_DEVICES"
"""set in that process: the file that takes a line of JSON for each test that has ended"""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups, and before -m selects
def pytest_collection_modifyitems(session, items):
    leave_variants_to_the_slow_suite(items)
    for item in items:
        if item.get_closest_marker("full_size"):  # a variant of a slow test, say
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
        if item.get_closest_marker("eight_devices") and REPORTS not in os.environ:
            item.add_marker(pytest.mark.xdist_group(EIGHT_DEVICES))
            item.setup = lambda: None  # its fixtures are made in the other process
            item.runtest = functools.partial(repeat_outcome, session, item)
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


LONGEST = ("tests/test_readme.py", "tests/test_configs.py")
"""the files whose tests take minutes: they come first, so that no worker is left with one when the others have ended"""


def name_in_group(item):
    """The id of a test without its group."""
    return item.nodeid.removesuffix(f"@{EIGHT_DEVICES}")


def repeat_outcome(session, item):
    """Passes, fails or skips as `item` did on eight devices."""
    names = tuple(name_in_group(each) for each in session.items if each.get_closest_marker("eight_devices"))
    found, output = run_on_eight_devices(session.config.rootpath, names)
    outcome, text = found.get(name_in_group(item), ("failed", f"the process ended before this test did\n{output}"))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)


@functools.cache
def run_on_eight_devices(root, names):
    """({name: (outcome, text)}, what the process printed)."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "NPROC": "32",  # threads: with one a device, those that wait in a collective can leave none to work
        # Without LLVM's optimisations compiling takes half the time; XLA's own passes, and so the collectives, stay.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0",
    }
    for worker in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(worker, None)
    found, output = {}, ""
    with tempfile.TemporaryDirectory() as folder:
        environment[REPORTS] = str(Path(folder) / "reports")
        for _ in range(2):  # on a busy machine XLA's CPU client was seen to hang in the dispatch of a copy
            rest = [name for name in names if name not in found]
            # The directory of pytest's own temporary files must not be that of the process that waits.
            options = ["-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp"]
            command = [sys.executable, "-m", "pytest", *options, *rest]
            try:
                done = subprocess.run(
                    command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200, check=False
                )
            except subprocess.TimeoutExpired:
                output, hung = "it did not end within 20 minutes", True
            else:
                output, hung = done.stdout + done.stderr, False
            reports = Path(environment[REPORTS])
            for line in reports.read_text().splitlines() if reports.exists() else []:
                name, outcome, text = json.loads(line)
                if found.get(name, ("passed",))[0] == "passed":
                    found[name] = outcome, text
            if not hung:
                break
    return found, output


def pytest_runtest_setup(item):
    if REPORTS in os.environ:
        import jax  # not above, where JAX would not see what is set there

        assert jax.device_count() == 8


def pytest_runtest_logreport(report):
    if REPORTS in os.environ and (report.when == "call" or not report.passed):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with Path(os.environ[REPORTS]).open("a") as file:
            print(json.dumps((report.nodeid, report.outcome, text)), file=file)
