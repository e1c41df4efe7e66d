"""Going on with a run: under other settings in its own folder, and from its state or weights in another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.cli import main
from jaxmp.data.arrays import Arrays
from jaxmp.data.splits import RandomSplit
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import HASHED, field_kinds
from jaxmp.experiment.reachable import PYTHON
from jaxmp.experiment.settings import Loop
from jaxmp.runs.checkpoint import _write_manifest
from jaxmp.runs.fit import Fitted, fit
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.going_on import Parent, log_neighbours, refuse_other_code
from jaxmp.runs.records import Records
from jaxmp.runs.replay import Past
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.scalers import Scaling
from jaxmp.tasks.classification import Classification
from jaxmp.training.optimizers import LAMB, SGD, Adam, AdamW, Lion
from jaxmp.training.pruning import Pruning
from jaxmp.training.schedules import CosineDecay
from jaxmp.trees import by_path

pytestmark = pytest.mark.xdist_group("going on")  # one worker: the fixtures train

TIMING = {"wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second"}


class Small(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
        return nn.Dense(2)(hidden)


def rows(split):
    rng = np.random.default_rng(len(split))
    label = rng.integers(0, 2, 40)
    return {"x": (rng.normal(size=(40, 3)) + label[:, None]).astype(np.float32), "label": label}


def other_rows(split):
    return rows(split)


def pictures(split):
    columns = rows(split)
    x = columns["x"][:, :, None, None]
    return {"x": x, "y": x[:, :2], "label": columns["label"], "other": 1 - columns["label"]}


def other_pictures(split):
    return pictures(split)


def same(rows):
    return rows


def as_it_is(key, row):
    return row


BASE = Experiment(
    model=Small(),
    data=Arrays(rows, batch_size=10, images=()),  # 4 steps an epoch
    task=Classification(inputs=("x",)),
    optimizer=Adam(1e-2),
    precision="float32",
    loop=Loop(steps=8, log_every=4, save_every=4),
)


def changed(experiment: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(experiment, **{name: changed(getattr(experiment, name), rest, value) if rest else value})


def leaves(state):
    raw = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(state)
    ]
    return [np.asarray(x) for x in raw]


def bits(run: Fitted, experiment: Experiment) -> list[bytes]:
    return [leaf.tobytes() for leaf in leaves(Run(run.path, experiment).state())]


def before(path: Path, step: int, experiment: Experiment) -> Any:
    """The state that a step of a run began with, taken again."""
    past = Past(Run(path, experiment), lambda message: None)
    try:
        return past.before(step)
    finally:
        past.feed.close()


def lines(path, *splits):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name not in TIMING}
        for record in records
        if not splits or record["split"] in splits
    ]


def config(path):
    return json.loads((path / "config.json").read_text())


class Overflows(NamedTuple):
    scale: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class OverflowsInSteps5To7:
    def init(self):
        return Overflows(jnp.float32(1), jnp.int32(0))

    def update(self, state, finite, grad_max):
        updates = state.updates + 1
        return Overflows(jnp.where((updates >= 4) & (updates < 7), jnp.inf, 1).astype(jnp.float32), updates)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of BASE."""
    return fit(BASE, workdir=tmp_path_factory.mktemp("runs"), name="small")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it in `tmp_path`."""
    shutil.copytree(finished.path, tmp_path / "small" / finished.path.name)
    return tmp_path


def cut_back(workdir, finished, step):
    """Makes the run look as if it had been killed after `step`."""
    path = workdir / "small" / finished.path.name
    (path / "summary.json").unlink()
    for checkpoint in (path / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return path


# In the same folder.

OPERATES = [
    ("loop.max_minutes", 600.5),
    ("loop.log_every", 3),
    ("loop.save_every", 2),
    ("loop.keep", 3),
    ("loop.max_consecutive_skips", 3),
    ("loop.steps_per_dispatch", 1),
    ("loop.ranges_every", 2),
    ("loop.watch", ("gradient_norm", "update_norm", "zero_losses")),
    ("loop.wandb", True),
    ("data.workers", 1),
    ("data.device_limit", 0),
]
ROUNDS = [
    ("parallel.mode", "pmap"),
    ("parallel.shard", "zero1"),
    ("parallel.remat", ("@Dense",)),
    ("parallel.remat_policy", "dots_saveable"),
    ("data.eval_batch_size", 7),
]


def slow_but(first, cases):
    return [pytest.param(*case, marks=() if case[0] in first else pytest.mark.slow, id=case[0]) for case in cases]


def test_every_field_has_a_value_here_that_it_is_tried_with():
    """A new field of an experiment has to be entered in one of the tables."""
    with_pictures = [("loop.log_images", 2), ("loop.log_samples", 2)]  # in test_watch.py and test_samples.py
    tried = {"operates": OPERATES + with_pictures, "rounds": ROUNDS, "apart": [("seed", 1)]}
    for kind, cases in tried.items():
        assert {path for path, of in field_kinds(PICTURED).items() if of == kind} == {path for path, _ in cases}
    decides = {path for path, of in field_kinds(PICTURED).items() if of in HASHED}
    parts = {path for path in decides if any(other.startswith(f"{path}.") for other in field_kinds(PICTURED))}
    assert decides - parts - {"model.parent", "model.name"} == set(DECIDES_OR_CHOOSES)


@pytest.fixture
def sent_to_wandb(monkeypatch):
    """What is logged to a module that stands in for wandb."""
    logged: list[dict[str, Any]] = []
    run = types.SimpleNamespace(define_metric=lambda *args, **kwargs: None, log=logged.append, finish=lambda: None)
    errors = types.SimpleNamespace(Error=RuntimeError)
    fake = types.SimpleNamespace(
        init=lambda **kwargs: run, Settings=lambda **kwargs: None, errors=errors, Histogram=str
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return logged


@pytest.mark.parametrize(("path", "value"), slow_but(("loop.keep", "loop.wandb"), OPERATES))
def test_another_operating_value_goes_on_in_the_same_folder_to_the_same_bits(
    copied, finished, path, value, sent_to_wandb
):
    run = cut_back(copied, finished, 4)
    said: list[str] = []
    other = changed(BASE, path, value)
    again = fit(other, workdir=copied, name="small", log=said.append)
    assert again.path == run and bits(again, other) == bits(finished, BASE)
    assert again.summary["test"] == finished.summary["test"]
    assert any(f"going on with {path} = {json.dumps(value)}" in line and "no bit" in line for line in said)
    (session,) = config(run)["sessions"]
    assert session["step"] == 4 and session["changed"][path]["is"] == json.loads(json.dumps(value))
    written = [(line["step"], f"{line['split']}/loss", line["loss"]) for line in lines(run) if "loss" in line]
    sent = [(line["step"], name, of) for line in sent_to_wandb for name, of in line.items() if name.endswith("/loss")]
    assert sent == (written if path == "loop.wandb" else [])  # the lines before it was switched on are the first
    assert {line["session"] for line in sent_to_wandb} <= {1}


@pytest.mark.parametrize(("path", "value"), slow_but(("data.eval_batch_size",), ROUNDS))
def test_another_rounding_value_goes_on_in_the_same_folder_within_rounding(copied, finished, path, value):
    run = cut_back(copied, finished, 4)
    said: list[str] = []
    other = changed(BASE, path, value)
    if path == "parallel.remat_policy":  # without effect where nothing is recomputed
        other = changed(other, "parallel.remat", ("@Dense",))
    again = fit(other, workdir=copied, name="small", log=said.append)
    assert again.path == run
    for mine, theirs in zip(leaves(Run(run, other).state()), leaves(Run(finished.path, BASE).state()), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    for name, of in again.summary["test"].items():
        assert of == pytest.approx(finished.summary["test"][name], rel=1e-5)
    assert any(f"going on with {path} = " in line and "last digits" in line for line in said)
    (session,) = config(run)["sessions"]
    assert session["step"] == 4 and path in session["changed"]


def content(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "value"), [*OPERATES, *ROUNDS], ids=[path for path, _ in [*OPERATES, *ROUNDS]])
def test_a_finished_run_says_that_another_value_has_no_effect(copied, finished, path, value, sent_to_wandb):
    said: list[str] = []
    before = content(copied)
    again = fit(changed(BASE, path, value), workdir=copied, name="small", log=said.append)
    assert not again.trained and again.path == copied / "small" / finished.path.name
    assert again.summary == finished.summary and content(copied) == before and not sent_to_wandb
    assert len(said) == 1 and said[0].startswith(f"{path} = ") and "no effect" in said[0]


def test_a_finished_run_is_read_on_any_number_of_devices(copied, finished):
    path = copied / "small" / finished.path.name
    recorded = config(path)
    (path / "config.json").write_text(json.dumps(recorded | {"devices": ["cpu"] * 3}))
    said: list[str] = []
    assert not fit(BASE, workdir=copied, name="small", log=said.append).trained
    assert said == ["devices = 1 (was 3) has no effect: the run is finished"]


ON_TWO_DEVICES = """
import json
import sys
import jax
from jaxmp.cli import main

if __name__ == "__main__":
    assert jax.device_count() == 2
    for arguments in json.loads(sys.argv[1]):
        print("exit code", main(arguments))
"""


@pytest.mark.slow
def test_on_another_number_of_devices_a_run_goes_on_in_its_folder_within_rounding(tmp_path):
    file, script = tmp_path / "net.py", tmp_path / "two.py"
    file.write_text(PROGRAM)
    script.write_text(ON_TWO_DEVICES)
    command = ["train", str(file), "--loop.steps", "8", "--loop.save-every", "4", "--workdir"]
    finished = tmp_path / "finished"
    assert main([*command, str(finished)]) == 0
    summary, state = RunFolder.find(finished).read_summary(), leaves(Run(finished).state())
    halves = {"plain": [], "zero1": ["--parallel.shard", "zero1"], "fsdp": ["--parallel.shard", "fsdp"]}
    for name in halves:
        half = RunFolder.find(shutil.copytree(finished, tmp_path / name))
        (half.path / "summary.json").unlink()
        shutil.rmtree(half.path / "checkpoints/8")

    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    commands = [[*command, str(finished)], *([*command, str(tmp_path / name), *halves[name]] for name in halves)]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("exit code 0\n")
    assert len(said) == 5, done.stdout + done.stderr
    assert "devices = 2 (was 1) has no effect: the run is finished" in said[0]
    assert RunFolder.find(finished).read_summary() == summary
    for name, printed in zip(halves, said[1:], strict=False):
        assert "this run goes on on 2 devices, after 1: sums are rounded in another order" in printed
        (path,) = (tmp_path / name / "net").iterdir()
        assert config(path)["sessions"][0]["changed"]["devices"] == {"was": 1, "is": 2}
        for mine, theirs in zip(leaves(Run(path).state()), state, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_value_of_the_session_before_is_what_the_next_is_compared_with(copied, finished):
    run = cut_back(copied, finished, 4)
    for value, step in ((3, 4), (3, None), (2, 4)):
        said: list[str] = []
        fit(changed(BASE, "loop.keep", value), workdir=copied, name="small", log=said.append)
        assert any("loop.keep" in line for line in said) == (step is not None)
        cut_back(copied, finished, 4)
    assert [session["changed"]["loop.keep"] for session in config(run)["sessions"]] == [
        {"was": 2, "is": 3},
        {"was": 3, "is": 2},
    ]


PICTURED = dataclasses.replace(
    BASE,
    data=Arrays(pictures, batch_size=10, images=("x",)),
    pruning=Pruning(keep=("Dense_0",)),  # which has no groups of four inputs
)
GOES_ON, OTHER_ROWS, OTHER_LEAVES = (
    "goes on from its step 4",
    "go over other rows",
    "Dense_0/kernel: float32[3, 4] there",
)

DECIDES_OR_CHOOSES: dict[str, tuple[Any, str]] = {
    "model.width": (5, OTHER_LEAVES),
    "data.batch_size": (20, OTHER_ROWS),
    "data.load": (other_pictures, OTHER_ROWS),
    "data.host_transforms": ((same,), GOES_ON),
    "data.transforms": ((as_it_is,), GOES_ON),
    "data.cuts": ((RandomSplit(),), OTHER_ROWS),
    "data.images": ((), GOES_ON),
    "data.mean": ((0.5,), GOES_ON),
    "data.std": ((0.5,), GOES_ON),
    "data.augment.rotation": (3.0, GOES_ON),
    "data.augment.scale": (0.5, GOES_ON),
    "data.augment.crop_padding": (1, GOES_ON),
    "data.augment.flip": (True, GOES_ON),
    "data.augment.cutout": (1, GOES_ON),
    "task.inputs": (("y",), OTHER_LEAVES),
    "task.target": ("other", GOES_ON),
    "task.label_smoothing": (0.1, GOES_ON),
    "task.class_weights": ((1.0, 2.0), GOES_ON),
    "task.mixup": (0.5, GOES_ON),
    "optimizer.learning_rate": (0.5, GOES_ON),
    "optimizer.schedule.warmup_steps": (1, GOES_ON),
    "optimizer.clip_norm": (1.0, GOES_ON),
    "optimizer.weight_decay": (0.1, GOES_ON),
    "optimizer.decay": (("**/bias",), GOES_ON),
    "optimizer.b1": (0.5, GOES_ON),
    "optimizer.b2": (0.9, GOES_ON),
    "optimizer.eps": (1e-3, GOES_ON),
    "optimizer.state_format": ("mu=e4m3:block4", "mu/Dense_0/bias/blocks/elements: nothing there, uint8[4] here"),
    "trains": (("Dense_1/**",), OTHER_LEAVES),
    "lora.rank": (1, "Dense_0/lora_b/kernel: nothing there, float32[1, 4] here"),
    "lora.alpha": (2.0, GOES_ON),
    "lora.where": (("Dense_0",), GOES_ON),
    "pruning.sparsity": (0.5, GOES_ON),
    "pruning.structure": ("2:4", GOES_ON),
    "pruning.scope": ("global", GOES_ON),
    "pruning.where": (("**",), GOES_ON),
    "pruning.keep": (("**/bias",), GOES_ON),
    "pruning.begin": (0.25, GOES_ON),
    "pruning.end": (0.75, GOES_ON),
    "pruning.rounds": (3, GOES_ON),
    "precision": ("mixed_float16", GOES_ON),
    "scaler.kind": ("dynamic", GOES_ON),
    "scaler.init_scale": (2.0, GOES_ON),
    "scaler.growth_factor": (4.0, GOES_ON),
    "scaler.backoff_factor": (0.25, GOES_ON),
    "scaler.growth_interval": (5, GOES_ON),
    "scaler.hysteresis": (2, GOES_ON),
    "scaler.min_scale": (0.5, GOES_ON),
    "scaler.max_scale": (2.0**20, GOES_ON),
    "loop.epochs": (3, GOES_ON),
    "loop.steps": (4, "it stands at step 4, and this run has 4 steps"),
    "loop.limit_batches": (2, OTHER_ROWS),
    "loop.overfit_batches": (2, OTHER_ROWS),
    "loop.eval_every": (2, GOES_ON),
    "loop.monitor": ("loss", GOES_ON),
    "loop.mode": ("min", GOES_ON),
    "loop.patience": (3, GOES_ON),
    "loop.accumulate_steps": (2, GOES_ON),
    "loop.accumulate_overflow": ("microbatch", GOES_ON),
    "loop.batch_norm": ("replica", GOES_ON),
    "loop.ema_decay": (0.9, GOES_ON),
}
"""another value of each field that decides or chooses, and what is said that --continue does"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of PICTURED that stands at step 4."""
    run = fit(PICTURED, workdir=tmp_path_factory.mktemp("runs"), name="small").path
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints/8")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", DECIDES_OR_CHOOSES)
def test_another_deciding_or_choosing_value_is_another_run_that_says_what_continue_does(stopped, path):
    value, does = DECIDES_OR_CHOOSES[path]
    trainer = Trainer(changed(PICTURED, path, value))
    folder = RunFolder.of(trainer.experiment, stopped.parent.parent, "small")
    assert folder.path.parent == stopped.parent and folder.path != stopped
    said: list[str] = []
    log_neighbours(folder, trainer, trainer.state_spec, trainer.fingerprints(), None, said.append)
    (word,) = said
    assert word.startswith(f"a new run: it differs from {stopped} in {path} = ") and "alone" in word and does in word
    if does == GOES_ON:
        parent = Parent.find(stopped, "continue")
        parent.check(trainer, trainer.fingerprints())
        assert parent.carry_over(trainer, trainer.init(), said.append).states  # and so it does
    else:
        assert "it cannot be gone on with: --continue" in word


def test_a_new_run_says_from_which_other_it_differs_in_one_field_alone(copied, finished):
    said: list[str] = []
    other = fit(changed(BASE, "loop.steps", 9), workdir=copied, name="small", log=said.append)
    assert other.path.parent == copied / "small" and other.path.name != finished.path.name
    (word,) = (line for line in said if "differs from" in line)
    assert "loop.steps = 9 (was 8) alone" in word
    assert f"--continue {copied / 'small' / finished.path.name} goes on from its step 8" in word


def test_a_run_that_differs_in_two_fields_says_nothing_of_the_other(copied):
    said: list[str] = []
    two = changed(changed(BASE, "loop.steps", 2), "loop.patience", 3)
    fit(two, workdir=copied, name="small", log=said.append)
    assert not any("differs" in line for line in said)


# What is recorded.


@pytest.mark.slow
def test_the_best_weights_are_evaluated_on_the_test_split_as_well(tmp_path):
    experiment = changed(changed(BASE, "loop.eval_every", 1), "optimizer.learning_rate", 1.0)
    said: list[str] = []
    fitted = fit(experiment, workdir=tmp_path, log=said.append)
    best = fitted.summary["best"]
    run = Run(fitted.path, experiment)
    assert best["step"] < fitted.summary["steps"] and best["test"] != fitted.summary["test"]
    assert best["test"] == run.evaluate("test", run.state("best"))
    assert any(f"the best weights, of step {best['step']}, on the test split: accuracy" in line for line in said)
    assert [line["step"] for line in lines(fitted.path, "test")] == [8]


@pytest.mark.slow
def test_a_row_of_skips_of_just_the_limit_is_not_overlooked(tmp_path):
    """The run is checked after steps 3, 4, 6 and 8: two skips are seen after step 6, and none after step 8."""
    loop = Loop(steps=8, eval_every=8, max_consecutive_skips=3)
    experiment = dataclasses.replace(BASE, scaler=OverflowsInSteps5To7(), loop=loop)
    with pytest.raises(RunFailed, match="3 steps in a row were skipped, before step 8"):
        fit(experiment, workdir=tmp_path)
    more = changed(experiment, "loop.max_consecutive_skips", 4)
    assert fit(more, workdir=tmp_path / "4").summary["skipped_steps"] == 3


def test_a_run_that_fails_where_an_evaluation_is_due_makes_it_and_goes_on_as_if_it_had_not_failed(
    copied, finished, monkeypatch
):
    run, write = cut_back(copied, finished, 4), Records.write
    with monkeypatch.context() as failing, pytest.raises(RunFailed, match="it diverged"):
        failing.setattr(Records, "write", lambda self, line: write(self, line)._replace(problem="it diverged"))
        fit(BASE, workdir=copied, name="small")
    assert [line["step"] for line in lines(run, "validation")] == [4, 8]
    again = fit(BASE, workdir=copied, name="small")
    assert lines(run) == lines(finished.path) and again.summary["best"] == finished.summary["best"]


# From another run.


def test_a_run_continued_to_twice_its_length_is_that_of_twice_the_length_at_once(copied, finished, tmp_path):
    longer = changed(BASE, "loop.steps", 16)
    said: list[str] = []
    there = copied / "small" / finished.path.name
    gone_on = fit(longer, workdir=copied, name="small", continue_from=there, log=said.append)
    at_once = fit(longer, workdir=tmp_path / "at_once")
    assert bits(gone_on, longer) == bits(at_once, longer)
    assert lines(gone_on.path) == lines(at_once.path)
    assert gone_on.summary["best"] == at_once.summary["best"]
    assert gone_on.path not in (there, at_once.path) and gone_on.path.name != f"{longer.hash}-s0"
    assert any(f"going on from step 8 of {there}" in line for line in said)
    assert any("the learning rate at its end was 0.01, and is 0.01 now" in line for line in said)
    again = fit(longer, workdir=copied, name="small", continue_from=f"{there}@8")
    assert not again.trained and again.path == gone_on.path
    assert Run(gone_on.path, longer).experiment is longer
    assert lines(there) == lines(finished.path)  # the parent stays as it was
    states = [leaves(before(path, 10, longer)) for path in (gone_on.path, at_once.path)]
    assert [leaf.tobytes() for leaf in states[0]] == [leaf.tobytes() for leaf in states[1]]
    with pytest.raises(InputError, match=rf"--step 8: expected .*, 9 to 16; up to step 8 they are those of {there}"):
        before(gone_on.path, 8, longer)


WHOLE = """
import flax.linen as nn
import numpy as np
from jaxmp import Adam, Arrays, Classification, Experiment, Loop, Scaling


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))


def load(split):
    label = np.arange(45) % 2
    x = np.random.default_rng(len(split)).normal(size=(45, 3)) + label[:, None]
    return {"x": x.astype(np.float32), "label": label}


def get_config():
    data = Arrays(load, batch_size=10, images=())
    loop = Loop(epochs=10, log_every=3, ema_decay=0.9)
    task, scaler = Classification(inputs=("x",)), Scaling(init_scale=2.0**17, growth_interval=7)
    return Experiment(Net(), data, task, Adam(1e-2, clip_norm=1.0), "mixed_float16", scaler, loop=loop)
"""


@pytest.mark.slow
def test_ten_epochs_continued_to_twenty_are_twenty_at_once(tmp_path, capsys):
    """Batch statistics, dropout, a moving average, a loss scale that moves, half a batch at the end of an epoch."""
    (tmp_path / "net.py").write_text(WHOLE)

    def train(workdir, *options):
        code = main(["train", str(tmp_path / "net.py"), "--workdir", str(tmp_path / workdir), *options])
        return code, capsys.readouterr()

    assert train("runs")[0] == 0
    ten = RunFolder.find(tmp_path / "runs").path
    code, said = train("runs", "--loop.epochs", "20", "--continue", str(ten))
    assert code == 0 and "going on from step 50" in said.out and "is 0.01 now" in said.out and "fresh" not in said.out
    assert train("at_once", "--loop.epochs", "20")[0] == 0
    (gone_on,) = (path for path in ten.parent.iterdir() if path != ten)
    at_once = RunFolder.find(tmp_path / "at_once").path
    assert lines(gone_on) == lines(at_once)
    states = [Run(path).state() for path in (gone_on, at_once)]
    assert [leaf.tobytes() for leaf in leaves(states[0])] == [leaf.tobytes() for leaf in leaves(states[1])]
    first, second = (RunFolder(path).read_summary() for path in (gone_on, at_once))
    assert {**first, "wall_seconds": 0} == {**second, "wall_seconds": 0} and first["skipped_steps"] > 5
    for options, message in ((("--loop.epochs", "10"), "nothing is left to do"), (("--seed", "1"), "other rows")):
        code, said = train("runs", "--continue", str(ten), *options)
        assert code == 2 and message in said.err
    assert len(list(ten.parent.iterdir())) == 2


@pytest.mark.slow
def test_a_run_is_continued_from_any_step_and_by_what_was_continued(parent, tmp_path):
    longer = changed(BASE, "loop.steps", 16)
    at_once = fit(longer, workdir=tmp_path / "at_once")
    from_4 = fit(longer, workdir=parent.parent.parent, name="small", continue_from=f"{parent}@4")
    by_12, _ = go_on(parent, LONGER)
    by_16, _ = go_on(by_12.path, longer)
    from_8, _ = go_on(parent, longer)
    for run in (from_4, from_8, by_16):
        assert bits(run, longer) == bits(at_once, longer) and lines(run.path) == lines(at_once.path)
    assert len({run.path for run in (from_4, from_8, by_12, by_16)}) == 4


@pytest.fixture
def parent(copied, finished):
    return copied / "small" / finished.path.name


def go_on(parent, experiment, **how):
    said: list[str] = []
    fitted = fit(experiment, workdir=parent.parent.parent, name="small", continue_from=parent, log=said.append, **how)
    return fitted, "\n".join(said)


def with_accuracy(run, step, accuracy):
    """Writes another validation accuracy into the line of a step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if (record["step"], record["split"]) == (step, "validation"):
            record["accuracy"] = accuracy
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


LONGER = changed(BASE, "loop.steps", 12)


@pytest.mark.slow
def test_a_run_continued_and_killed_goes_on_to_the_same_bits(parent):
    whole, _ = go_on(parent, LONGER)
    expected, written = bits(whole, LONGER), lines(whole.path)
    (whole.path / "summary.json").unlink()
    shutil.rmtree(whole.path / "checkpoints")  # killed before the first state was carried over
    again, _ = go_on(parent, LONGER)
    assert bits(again, LONGER) == expected and lines(again.path) == written


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.batch_size", 20, r"data.batch_size = 20 \(was 10\).*other rows; --init-from"),
        ("data.load", other_rows, "data.load = .*other rows"),
        ("seed", 3, "seed = 3.*other rows"),
        ("loop.steps", 8, "stands at step 8, and this run has 8 steps: nothing is left to do"),
        ("loop.patience", 1, "1 evaluations in a row were no better.*nothing to do"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_before_anything_is_written(parent, path, value, message):
    worse = changed(LONGER, "loop.mode", "max") if path != "loop.patience" else LONGER
    if path == "loop.patience":
        with_accuracy(parent, 4, 0.99)
    with pytest.raises(InputError, match=message):
        go_on(parent, changed(worse, path, value))
    assert [run for run in parent.parent.iterdir() if run != parent] == []


def test_every_leaf_that_differs_is_named(parent):
    with pytest.raises(InputError) as refused:
        go_on(parent, changed(LONGER, "model", Small(width=5)))
    for leaf in ("state/params/Dense_0/kernel: float32[3, 4] there, float32[3, 5] here", "state/params/Dense_1/kernel"):
        assert leaf in str(refused.value)


@pytest.mark.slow
def test_from_float16_to_bfloat16_and_back_the_loss_scale_begins_fresh(parent):
    half, said = go_on(parent, changed(LONGER, "precision", "mixed_float16"))
    assert "fresh: the loss scale" in said and half.summary["loss_scale"] == 2.0**15
    bf16, said = go_on(half.path, changed(changed(LONGER, "precision", "mixed_bfloat16"), "loop.steps", 16))
    assert "fresh: the loss scale" in said and bf16.summary["loss_scale"] == 1
    back, said = go_on(bf16.path, changed(changed(LONGER, "precision", "mixed_float16"), "loop.steps", 20))
    assert "fresh: the loss scale" in said and back.summary["loss_scale"] == 2.0**15 and back.summary["steps"] == 20


@pytest.mark.slow
def test_an_equal_scaler_keeps_its_state(tmp_path):
    scaled = dataclasses.replace(BASE, precision="mixed_float16", scaler=Scaling(growth_interval=3))
    first = fit(scaled, workdir=tmp_path, name="small")
    assert first.summary["loss_scale"] == 2.0**17
    more, said = go_on(first.path, changed(scaled, "loop.steps", 9))
    assert more.summary["loss_scale"] == 2.0**18 and "fresh" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("path", "value"), [("optimizer.clip_norm", 1.0), ("optimizer.weight_decay", 0.1)])
def test_clipping_and_decay_can_be_added(parent, path, value):
    fitted, said = go_on(parent, changed(LONGER, path, value))
    assert fitted.summary["steps"] == 12 and "fresh" not in said


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, LAMB, Lion])
def test_an_optimizers_state_has_one_layout_by_class(kind):
    params = {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    options = [{}, {"clip_norm": 1.0}, {"weight_decay": 0.0}, {"weight_decay": 0.1}, {"schedule": CosineDecay()}]
    layouts = {tuple(by_path(kind(**how).make(10).init(params))) for how in options}
    assert len(layouts) == 1


@pytest.mark.slow
def test_a_new_moving_average_starts_from_the_weights(parent):
    averaged = changed(changed(BASE, "loop.steps", 9), "loop.ema_decay", 0.9)
    before = Run(parent, BASE).state()
    fitted, said = go_on(parent, averaged)
    state = Run(fitted.path, averaged).state()
    assert "the moving average of the weights" in said
    decay = min(0.9, (1 + 8) / (10 + 8))
    for was, now, ema in zip(*map(jax.tree.leaves, (before.params, state.params, state.ema)), strict=True):
        np.testing.assert_allclose(ema, was + (1 - decay) * (now - was), rtol=1e-5)


def test_evaluations_that_its_own_loop_would_not_have_made_count_for_neither_best_nor_patience(parent):
    with_accuracy(parent, 4, 0.99)
    fitted, _ = go_on(parent, dataclasses.replace(LONGER, loop=Loop(steps=12, eval_every=8, patience=1)))
    assert fitted.summary["best"]["step"] in (8, 12)
    assert [line["step"] for line in lines(fitted.path, "validation")] == [4, 8, 12]


@pytest.mark.parametrize(
    ("path", "value", "since"),
    [
        ("data.mean", (0.5,), 8),
        ("data.std", (0.5,), 8),
        ("data.transforms", (as_it_is,), 8),
        ("data.host_transforms", (same,), 8),
        ("data.augment.flip", True, 0),
        ("data.eval_batch_size", 7, 0),
        ("task.label_smoothing", 0.1, 8),
        ("pruning.sparsity", 0.5, 8),
    ],
)
def test_the_best_begins_anew_where_evaluations_measured_something_else(finished, path, value, since):
    assert Parent.find(finished.path, "continue").best_since(Trainer(changed(LONGER, path, value))) == since


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value", "best"),
    [
        ("loop.monitor", "loss", {8, 12}),
        ("loop.mode", "min", {12}),
        ("task.label_smoothing", 0.1, {12}),
        ("optimizer.clip_norm", 1.0, {4}),
    ],
)
def test_another_task_monitor_or_mode_begins_the_best_anew(parent, path, value, best):
    with_accuracy(parent, 4, 0.01 if path == "loop.mode" else 0.99)
    fitted, _ = go_on(parent, changed(LONGER, path, value))
    assert fitted.summary["best"]["step"] in best


@pytest.mark.slow
def test_another_number_of_rows_is_refused(tmp_path):
    np.save(tmp_path / "rows.npy", 40)

    def experiment(**loop):
        data = Arrays(Loaded(tmp_path / "rows.npy"), batch_size=10, images=())
        return dataclasses.replace(BASE, data=data, loop=dataclasses.replace(BASE.loop, **loop))

    first = fit(experiment(), workdir=tmp_path, name="small")
    np.save(tmp_path / "rows.npy", 30)
    with pytest.raises(InputError, match=r"--continue .*train has 30 rows \(was 40\).*--init-from"):
        go_on(first.path, experiment(steps=12))
    assert fit(experiment(steps=12), workdir=tmp_path, name="small", init_from=first.path).trained


@pytest.mark.slow
def test_an_edited_model_is_not_continued_but_its_weights_are_taken(tmp_path, capsys):
    file = tmp_path / "net.py"
    file.write_text(PROGRAM)
    command = ["train", str(file), "--workdir", str(tmp_path / "runs"), "--loop.steps"]
    assert main([*command, "2"]) == 0
    run = str(RunFolder.find(tmp_path / "runs").path)
    file.write_text(PROGRAM.replace("nn.relu", "nn.tanh"))
    assert main([*command, "4", "--continue", run]) == 2
    assert "jaxmp_configs.net.Net.__call__ has changed since" in capsys.readouterr().err
    assert main([*command, "4", "--init-from", run]) == 0
    file.write_text(PROGRAM.replace("Adam()", "Adam(1e-4, clip_norm=2.0)"))  # what is changed
    recorded = config(Path(run))
    recorded["made_by"]["flax"] = {"version": "0.1"}
    (Path(run) / "config.json").write_text(json.dumps(recorded))
    assert main([*command, "4", "--continue", run]) == 0
    assert "that run began with other versions: flax " in capsys.readouterr().out


@pytest.mark.slow
def test_a_parent_that_stopped_early_is_gone_on_with(copied, tmp_path):
    early = dataclasses.replace(BASE, optimizer=Adam(0.0), loop=Loop(steps=40, patience=2))
    stopped = fit(early, workdir=tmp_path, name="small")
    assert stopped.summary["stopped_early"] and stopped.summary["steps"] == 12
    fitted, _ = go_on(stopped.path, changed(changed(early, "loop.patience", None), "loop.steps", 16))
    assert fitted.summary["steps"] == 16


@pytest.mark.slow
def test_the_two_learning_rates_are_said(tmp_path):
    cosine = dataclasses.replace(BASE, optimizer=Adam(1e-2, schedule=CosineDecay()))
    first = fit(cosine, workdir=tmp_path, name="small")
    _, said = go_on(first.path, changed(cosine, "loop.steps", 16))
    rate = [float(CosineDecay().make(1e-2, steps)(at)) for steps, at in ((8, 7), (16, 8))]
    assert f"the learning rate at its end was {rate[0]:.3g}, and is {rate[1]:.3g} now" in said


@pytest.mark.slow
def test_the_best_weights_of_the_parent_go_with_it(parent):
    with_accuracy(parent, 4, 0.99)
    checkpoints = RunFolder(parent).checkpoints(best_of="accuracy")
    manifest = parent / "checkpoints/4/manifest.json"
    content = json.loads(manifest.read_text())
    content.pop("crc32")
    content["metrics"]["accuracy"] = 0.99
    _write_manifest(manifest, content)
    checkpoints.close()
    fitted, _ = go_on(parent, LONGER)
    assert fitted.summary["best"]["step"] == 4 and fitted.summary["best"]["test"] is not None
    assert 4 in Run(fitted.path, LONGER).checkpoint_steps()


def test_a_parent_whose_best_checkpoint_is_damaged_is_gone_on_with_without_it(parent):
    with_accuracy(parent, 4, 0.99)
    (parent / "checkpoints/4/manifest.json").write_text("{}")
    said: list[str] = []
    trainer = Trainer(LONGER)
    carried = Parent.find(parent, "continue").carry_over(trainer, trainer.init(), said.append)
    assert [step for step, *_ in carried.states] == [8]
    (word,) = (line for line in said if line.startswith(f"the best weights of {parent}, of step 4, are not taken over"))
    assert "is damaged" in word


# Weights alone.


class Deeper(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(4, name="Dense_0")(x)))


def begin_with(parent, experiment, source=None, **how):
    said: list[str] = []
    workdir = parent.parent.parent
    fitted = fit(experiment, workdir=workdir, name="small", init_from=source or parent, log=said.append, **how)
    return fitted, "\n".join(said)


TINY_RATE = dataclasses.replace(BASE, optimizer=Adam(0.0), loop=Loop(steps=1), seed=5)
"""trains nothing, so that the weights at the end are those at the start"""


def test_a_step_taken_again_begins_with_the_weights_that_the_run_began_with(parent, tmp_path):
    fitted, _ = begin_with(parent, TINY_RATE)
    expected = [leaf.tobytes() for leaf in leaves(Run(parent, BASE).state().params)]
    assert [leaf.tobytes() for leaf in leaves(before(fitted.path, 1, TINY_RATE).params)] == expected
    there = (tmp_path / "small").rename(tmp_path / "moved")  # both runs
    moved = there / fitted.path.name
    assert [leaf.tobytes() for leaf in leaves(before(moved, 1, TINY_RATE).params)] == expected
    shutil.rmtree(there / parent.name / "checkpoints/8")
    with pytest.raises(
        InputError, match=rf"began with the weights of step 8 of {parent}, where there is no .*bring that run back"
    ):
        before(moved, 1, TINY_RATE)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(parent):
    fitted, said = begin_with(parent, TINY_RATE)
    mine, theirs = Run(fitted.path, TINY_RATE).state(), Run(parent, BASE).state()
    assert [leaf.tobytes() for leaf in leaves(mine.params)] == [leaf.tobytes() for leaf in leaves(theirs.params)]
    assert int(mine.step) == 1 and "weights of step 8" in said
    assert fitted.path.name != f"{TINY_RATE.hash}-s5"
    again, _ = begin_with(parent, TINY_RATE, f"{parent}@8")
    assert not again.trained and again.path == fitted.path
    other, _ = begin_with(parent, TINY_RATE, f"{parent}@4")
    assert other.path != fitted.path


@pytest.mark.slow
def test_a_new_head_starts_fresh_where_init_only_leaves_it_out(parent):
    deeper = changed(TINY_RATE, "model", Deeper())
    with pytest.raises(InputError) as refused:
        begin_with(parent, deeper)
    assert "head/kernel: nothing there, float32[4, 5] here" in str(refused.value)
    assert "Dense_1/bias: float32[2] there, nothing here" in str(refused.value)
    with pytest.raises(InputError, match=r"--init-only Dnse_0: no such weight.*did you mean"):
        begin_with(parent, deeper, init_only=("Dnse_0",))
    fitted, said = begin_with(parent, deeper, init_only=("Dense_0",))
    mine, theirs = Run(fitted.path, deeper).state(), Run(parent, BASE).state()
    np.testing.assert_array_equal(mine.params["Dense_0"]["kernel"], theirs.params["Dense_0"]["kernel"])
    np.testing.assert_array_equal(mine.params["head"]["kernel"], Trainer(deeper).init().params["head"]["kernel"])
    assert "2 of 4 leaves" in said


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"continue_from": "RUN", "init_from": "RUN"}, "expected one of the two"),
        ({"init_only": ("Dense_0",)}, "only with --init-from"),
        ({"continue_from": "RUN@best"}, "expected RUN or RUN@STEP"),
        ({"init_from": "RUN@bst"}, "expected last, best or the number of a step; did you mean 'best'"),
        ({"init_from": "RUN@7"}, "no checkpoint of step 7; there are 4, 8"),
    ],
)
def test_what_names_no_state_is_refused(parent, how, message):
    how = {name: of.replace("RUN", str(parent)) if isinstance(of, str) else of for name, of in how.items()}
    with pytest.raises(InputError, match=message):
        fit(LONGER, workdir=parent.parent.parent, **how)


# Other code, other data.


NOW = {"net.f": {"bytecode": "1", "python": PYTHON}, "net.K": {"value": 1}, "flax": {"version": "2"}}


@pytest.mark.parametrize(
    ("was", "finished", "message"),
    [
        ({"net.f": {"bytecode": "0", "python": "3.9"}}, False, None),
        (
            {"net.f": {"bytecode": "0", "python": PYTHON}},
            True,
            r"net\.f has changed since .* the code that it began with",
        ),
        ({"net.f": {"syntax": "0"}, "net.K": {"value": 2}}, False, r"net\.K, net\.f has changed since"),
        ({"net.g": {"syntax": "0"}}, False, r"net\.g \(not reached any more\)"),
        ({"flax": {"version": "1"}}, False, r"flax 2 \(was 1\): .* install that version"),
        ({"flax": {"version": "1"}}, True, None),
    ],
)
def test_what_a_run_was_made_by_and_is_not_any_more_is_named(was, finished, message, tmp_path):
    if finished:
        (tmp_path / "summary.json").write_text("{}")
    said: list[str] = []
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        refuse_other_code(RunFolder(tmp_path), {"made_by": NOW | was}, NOW, said.append)
    unknown = was.get("net.f", {}).get("python") == "3.9"
    assert bool(said) == unknown and all("net.f: kept as bytecode of another version of Python" in of for of in said)


PROGRAM = """
import flax.linen as nn
import numpy as np
from jaxmp import Adam, Arrays, Classification, Experiment, Loop

SHIFT = 1.0


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


def load(split):
    x = np.random.default_rng(len(split)).normal(size=(20, 3)).astype(np.float32) + SHIFT
    return {"x": x, "label": (x[:, 0] > 1).astype(int)}


def get_config():
    data = Arrays(load, batch_size=10, images=())
    return Experiment(Net(), data, Classification(inputs=("x",)), Adam(), "float32", loop=Loop(steps=2))
"""


@pytest.mark.slow
def test_fit_and_the_command_line_refuse_other_code_by_the_same_rule(tmp_path, capsys):
    """The functions have the same names, and the finished run is of the first."""
    file = tmp_path / "net.py"
    file.write_text(PROGRAM)
    command = ["train", str(file), "--workdir", str(tmp_path / "runs")]

    def from_python():
        return fit(ConfigFile.find(str(file)).experiment(), workdir=tmp_path / "python")

    assert main(command) == 0 and from_python().trained
    file.write_text(PROGRAM.replace("class Net", "# a comment\nclass Net"))
    assert main(command) == 0 and not from_python().trained
    file.write_text(PROGRAM.replace("nn.relu", "nn.tanh").replace("SHIFT = 1.0", "SHIFT = 2.0"))
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err
    with pytest.raises(InputError) as refused:
        from_python()
    for text in (message, str(refused.value)):
        assert "Net.__call__" in text and "SHIFT" in text and "the code that it began with" in text


def test_other_data_is_refused_and_named(tmp_path):
    def loaded():  # an Arrays loads a split once
        return dataclasses.replace(BASE, data=Arrays(Loaded(tmp_path / "rows.npy"), batch_size=10, images=()))

    np.save(tmp_path / "rows.npy", 40)
    stopped = fit(loaded(), workdir=tmp_path, name="small")
    (stopped.path / "summary.json").unlink()
    np.save(tmp_path / "rows.npy", 39)
    with pytest.raises(InputError, match=r"train has 39 rows \(was 40\).*the data that it began with"):
        fit(loaded(), workdir=tmp_path, name="small")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Loads as many rows as a file says."""

    path: Any

    def __call__(self, split):
        return {name: column[: int(np.load(self.path))] for name, column in rows(split).items()}
