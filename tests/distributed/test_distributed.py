"""Two real processes on the loopback, each with virtual CPU devices of its own: `jaxmp train --distributed`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxmp.cli import main
from jaxmp.data.pipeline import Batches
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.checkpoint import Checkpoints
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer

TIMING = {"wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second"}

# Batch statistics, dropout, augmentation, a moving average, a ragged last batch. No bias before the normalisation: its
# gradient is rounding noise, of which Adam makes whole steps.
CONFIG = """
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from jaxmp import Adam, Augment, CosineDecay, Experiment, Loop
from jaxmp.data.images import Images
from jaxmp.data.source import Columns


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(64, use_bias=False)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(2)(nn.Dropout(0.2, deterministic=not train)(x))


class Noted(Columns):
    def __getitem__(self, rows):
        with Path(__file__).with_name(f"rows{jax.process_index()}").open("a") as file:
            print(*rows, file=file)
        return super().__getitem__(rows)


@dataclass(frozen=True)
class Noise(Images):
    def source(self, split):
        rng = np.random.default_rng(len(split))
        columns = {"image": rng.integers(0, 256, (100, 8, 8, 1)).astype(np.uint8), "label": rng.integers(0, 2, 100)}
        return (Noted if split == "train" else Columns)(columns)


def get_config():
    return Experiment(
        model=Net(),
        data=Noise(batch_size=16, eval_batch_size=40, augment=Augment(flip=True)),
        optimizer=Adam(1e-3, schedule=CosineDecay()),
        precision="float32",
        loop=Loop(steps=10, log_every=1, eval_every=5, ema_decay=0.9),
    )
"""
JAXMP = (sys.executable, "-m", "jaxmp")
STREAMED = ("--data.device-limit", "0")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "noise.py").write_text(CONFIG)
    return tmp_path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, command, devices, **environment):
    """A process with so many virtual devices; its output goes to files, which nobody has to read while it runs."""
    number = len(list(folder.glob("*.stdout")))
    tests = Path(__file__).parents[1]
    with (folder / f"{number}.stdout").open("wb") as out, (folder / f"{number}.stderr").open("wb") as err:
        process = subprocess.Popen(
            command,
            env={
                **os.environ,
                "PYTHONPATH": f"{tests.parent}:{tests / 'training'}",  # for TRANSFORMER
                "JAX_PLATFORMS": "cpu",
                # As in conftest.py: compiled in half the time.
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
                **environment,
            },
            cwd=folder,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    process.said = lambda: (folder / f"{number}.stdout").read_text()
    process.complained = lambda: (folder / f"{number}.stderr").read_text()
    return process


@contextlib.contextmanager
def job(folder, *arguments, command=(*JAXMP, "train", "noise.py"), processes=2, devices=2):
    """A process for each index; none of them, nor of their children, is left behind."""
    there = ("--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--process-count", str(processes))
    started = []
    try:
        for index in range(processes):
            own = (*command, *arguments, *there, "--process-index", str(index))
            started.append(start(folder, own, devices))
        yield started
    finally:
        end(*started)


def end(*processes):
    """Kills what still runs, with all that it has started."""
    for process in processes:
        if process.poll() is None:
            for pid in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(timeout=30)


def children(pid):
    """The processes that one has started: the second field after the name in /proc/PID/stat is the parent's number."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, fields = stat.read_text().rpartition(") ")
            if int(fields.split()[1]) == pid:
                found.append(int(name.split()[0]))
    return found


def descendants(pid):
    return [each for child in children(pid) for each in (*descendants(child), child)]


def codes(processes, timeout=600):
    deadline = time.monotonic() + timeout
    return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]


def done(processes, code=0):
    assert codes(processes) == [code] * len(processes), [process.complained() for process in processes]


def lines(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


def until(condition, timeout=600):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_losses_agree(found, expected, tolerance, steps=None):
    found, expected = ([line for line in each if line["step"] <= (steps or line["step"])] for each in (found, expected))
    assert [(line["split"], line["step"]) for line in found] == [(line["split"], line["step"]) for line in expected]
    np.testing.assert_allclose(*([line["loss"] for line in each] for each in (found, expected)), rtol=tolerance)


@pytest.mark.slow
def test_two_processes_train_as_one_device_does_and_one_of_them_writes(folder):
    with job(folder, *STREAMED) as (first, second):
        done([first, second])
    assert second.said() == second.complained() == first.complained() == ""
    assert first.said().splitlines()[-1].startswith("run ")
    run = Run(folder / "runs")
    assert [line["step"] for line in run.metrics if line["split"] == "train"] == [*range(1, 11)]
    assert len(list(run.path.glob("events*"))) == 1
    assert len(run.config["devices"]) == 4

    batches = Batches(examples=100, batch_size=16, seed=0)
    of_first, of_second = (rows_read(folder / f"rows{index}") for index in (0, 1))
    assert of_first == sorted(tuple(batches.rows(step)[0][:8]) for step in range(10))
    assert of_second == sorted(tuple(batches.rows(step)[0][8:]) for step in range(10))

    with contextlib.chdir(folder):
        assert main(["train", "noise.py", *STREAMED, "--workdir", "alone"]) == 0
    assert_losses_agree(lines(run.path), lines(Run(folder / "alone").path), 2e-6)


def rows_read(path):
    """The rows of each batch. Left out: single rows, read for shapes, and all rows, for the fingerprint."""
    batches = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    return sorted(rows for rows in batches if 1 < len(rows) < 100)


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_exit_code_2(folder, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with contextlib.chdir(folder):
        assert main(["train", "noise.py", "--distributed"]) == 2
        assert main(["train", "noise.py", "--process-count", "2"]) == 2
    said, complained = capfd.readouterr()
    nothing_found, option = complained.splitlines()
    assert not said
    assert "--coordinator HOST:PORT --process-count N --process-index I" in nothing_found
    assert "--process-count 2: only with --distributed" in option


TRANSFORMER = """
import dataclasses

from jaxmp import Loop
from test_sharding import TRANSFORMER


def get_config():
    return dataclasses.replace(TRANSFORMER, loop=Loop(steps=50, log_every=1, eval_every=50))
"""


LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"

# What a node has that these scripts run on. Slurm tells each task of a step what JAX looks for.
COMMANDS = {
    "jaxmp": 'exec "$PYTHON" -m jaxmp "$@"',
    "srun": """
        [[ $1 == --kill-on-bad-exit=0 ]] && shift
        export SLURM_STEP_NODELIST=localhost,elsewhere SLURM_NTASKS=2
        for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
        for task in "${tasks[@]}"; do wait "$task" || code=$?; done
        exit ${code:-0}""",
    "scontrol": 'echo "$@" > requeued',
}


def launched(folder, *command, devices=4):
    """One of the scripts, with the commands that it wants to find."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, script in COMMANDS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "1",
        "JAX_COORDINATOR_PORT": str(free_port()),  # by default it is made from the number of the job
    }
    return start(folder, command, devices, **environment)


def kubernetes_command(arguments, port):
    """What the containers of the Job run, on this machine."""
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    [container] = pod["containers"]
    program, *command = container["command"]
    assert program == "jaxmp"
    count = command[command.index("--process-count") + 1]
    assert int(count) == job["spec"]["completions"] == job["spec"]["parallelism"]
    coordinator = f"{job['metadata']['name']}-0.{pod['subdomain']}:8476"
    here = {"/runs": "runs", coordinator: f"127.0.0.1:{port}"}
    assert here.keys() <= set(command)
    assert [entry["name"] for entry in container["env"]] == ["INDEX"]
    command = [*JAXMP, *(here.get(word, word) for word in command), *arguments]
    return [[word.replace("$(INDEX)", str(index)) for word in command] for index in range(int(count))]


DIGITS = ("--precision", "float32", "--loop.steps", "60", "--loop.log-every", "1", "--loop.save-every", "10")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Digits on two processes of four devices."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pods = [start(folder, command, devices=4) for command in kubernetes_command(DIGITS, free_port())]
    try:
        done(pods)
    finally:
        end(*pods)
    return Run(folder / "runs")


@pytest.mark.slow
@pytest.mark.xdist_group("undisturbed")
def test_two_processes_of_four_devices_have_the_losses_of_one_device(undisturbed, folder):
    """The other numbers of devices, in one process, are test_sharding.py's."""
    alone = start(folder, (*JAXMP, "train", "digits_mlp", *DIGITS), devices=1)
    try:
        done([alone])
    finally:
        end(alone)
    alone = Run(folder / "runs")
    assert [len(run.config["devices"]) for run in (undisturbed, alone)] == [8, 1]
    assert_losses_agree(lines(undisturbed.path), lines(alone.path), 2e-6, steps=10)
    assert_losses_agree(lines(undisturbed.path), lines(alone.path), 2e-5, steps=50)


@pytest.mark.slow
def test_so_they_have_with_a_transformer_in_shards_and_microbatches(folder):
    (folder / "transformer.py").write_text(TRANSFORMER)
    sharded = ("--parallel.shard", "zero1", "--loop.accumulate-steps", "2")
    two = launched(folder, LAUNCH / "local.sh", "2", "transformer.py", *sharded, *STREAMED)
    alone = start(folder, (*JAXMP, "train", "transformer.py", *sharded[2:], "--workdir", "alone"), devices=1)
    try:
        done([two, alone])
    finally:
        end(two, alone)
    found, expected = (lines(Run(folder / workdir).path) for workdir in ("runs", "alone"))
    assert_losses_agree(found, expected, 2e-6, steps=10)
    assert_losses_agree(found, expected, 2e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("undisturbed")
def test_a_stopped_and_a_killed_job_end_as_an_undisturbed_one(undisturbed, folder):
    """A signal to one process stops all after the same step; SIGKILL to one ends the others, with a message."""
    two = launched(folder, LAUNCH / "slurm.sh", "digits_mlp", *DIGITS)
    try:
        until_step(folder, 15, two)
        [srun] = children(two.pid)
        second = children(srun)[1]
        [child] = children(second)
        os.kill(second, signal.SIGTERM)
        time.sleep(0.3)  # Slurm signals every process of a step; this one may be on its way out
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        done([two], 75)
    finally:
        end(two)
    assert (folder / "requeued").exists()
    [message] = [line for line in two.said().splitlines() if line.startswith(("stopped", "resuming"))]
    assert message.startswith("stopped at step ")

    again = {"command": (*JAXMP, "train", "digits_mlp", *DIGITS), "devices": 4}
    with job(folder, **again) as (first, second):
        until_step(folder, 30, first, second)
        [child] = children(second.pid)
        os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        done([first, second], 1)
        assert time.monotonic() - killed < 120
    assert lines(Run(folder / "runs").path)[-1]["step"] < 60
    [message] = first.complained().splitlines()
    assert "process 1 does not answer" in message and "the same command on all machines" in message
    [message] = second.complained().splitlines()
    assert "was killed by SIGKILL" in message and "the same command on all machines" in message

    with job(folder, **again) as processes:
        done(processes)
    disturbed = Run(folder / "runs")
    assert lines(disturbed.path) == lines(undisturbed.path)
    assert bits(disturbed.state()) == bits(undisturbed.state())


def until_step(folder, step, *processes):
    def reached():
        assert all(process.poll() is None for process in processes), [process.complained() for process in processes]
        metrics = list((folder / "runs").glob("*/*/metrics.jsonl"))
        return metrics and any(f'"step": {n}' in metrics[0].read_text() for n in range(step, step + 50))

    until(reached)


# Restores from one folder and saves into the next; the first of a chain trains.
RELAY = """
import sys
from pathlib import Path

import jax
import tyro

from jaxmp.commands import train
from jaxmp.distributed import processes
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.checkpoint import Checkpoints
from jaxmp.runs.fit import steps

first, shard, *arguments = sys.argv[1:]
options = tyro.cli(train.Options, args=arguments)
if options.distributed:
    processes.join(options.coordinator, options.process_count, options.process_index, options.start_timeout)
experiment = ConfigFile.find("noise.py").experiment(["--parallel.shard", shard])
trainer, number = Trainer(experiment), int(first)
if number:
    source = Checkpoints(Path(f"saved{number - 1}"))
    _, tree = source.restore({"state": trainer.init(), "metrics": trainer.no_metrics})
    source.close()
else:
    *_, last = steps(experiment)
    tree = {"state": last.state, "metrics": last.metrics}
devices = trainer.devices
tree = {"state": devices.put_state(tree["state"]), "metrics": devices.put(tree["metrics"])}
kernel = tree["state"].params["Dense_0"]["kernel"]
assert kernel.is_fully_replicated == (shard != "fsdp") and len(kernel.sharding.device_set) == 8
target = Checkpoints(Path(f"saved{number}"))
target.save(number, tree)
target.close()
"""


@pytest.mark.slow
def test_what_fsdp_saves_on_any_processes_is_restored_to_the_bit_on_others(folder):
    (folder / "relay.py").write_text(RELAY)
    done([start(folder, (sys.executable, "relay.py", "0", "fsdp"), devices=8)])
    with job(folder, command=(sys.executable, "relay.py", "1", "fsdp"), devices=4) as processes:
        done(processes)
    done([start(folder, (sys.executable, "relay.py", "2", "fsdp"), devices=8)])

    trainer = Trainer(ConfigFile.find(str(folder / "noise.py")).experiment())
    found = []
    for number in range(3):
        checkpoints = Checkpoints(folder / f"saved{number}")
        _, tree = checkpoints.restore({"state": trainer.init(), "metrics": trainer.no_metrics})
        checkpoints.close()
        found.append(bits(tree))
    assert tree["state"].step == 10
    assert found == [found[0]] * 3


HOOKED = """
import sys
from pathlib import Path

from jaxmp.distributed.processes import join

join(sys.argv[3], 2, int(sys.argv[-1]), 60)

import jax
import jax.numpy as jnp
import jaxmp
from noise import get_config

index = jax.process_index()


def note(seen: jaxmp.StepInfo | jaxmp.Evaluated):
    total = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(seen.state.params))  # computed by all together
    with Path(f"hooks{index}").open("a") as file:
        print(type(seen).__name__, seen.step, total, file=file)


def fail(info: jaxmp.StepInfo):
    if index == 1 and info.step == 4:
        raise OSError("no space on this machine")


def stop(info: jaxmp.StepInfo):
    return jaxmp.Stop("enough") if info.step == (5 if index == 1 else 7) else None


try:
    jaxmp.fit(get_config(), workdir="runs", hooks=(note, fail))
except jaxmp.RunFailed as error:
    Path(f"failed{index}").write_text(str(error))
jaxmp.fit(get_config(), workdir="runs", hooks=(note, stop))
"""


@pytest.mark.slow
def test_hooks_are_called_by_each_process_and_one_that_fails_in_any_ends_the_run_in_all(folder):
    (folder / "hooked.py").write_text(HOOKED)
    with job(folder, command=(sys.executable, "hooked.py")) as both:
        done(both)
    of_first, of_second = ((folder / f"hooks{index}").read_text().splitlines() for index in (0, 1))
    assert of_first == of_second
    steps = [int(line.split()[1]) for line in of_first if line.startswith("StepInfo")]
    assert steps == [1, 2, 3, 4, 5, 6, 7], "the second fit goes on after step 4, and ends where the first process says"
    assert [line.split()[:2] for line in of_first if line.startswith("Evaluated")] == [
        ["Evaluated", step] for step in ("5", "7", "7")
    ]
    failed = [(folder / f"failed{index}").read_text() for index in (0, 1)]
    assert (
        failed[0] == failed[1]
        and "fail raised OSError: no space on this machine, in process 1, after step 4" in failed[0]
    )
    summary = Run(folder / "runs").summary
    assert summary["steps"] == 7 and summary["stopped_because"].startswith("enough (hook ")
