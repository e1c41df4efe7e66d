"""`kill -9` at random moments: a run that is started again each time ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.runs.run import Run

TIMING = {"wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second"}

# Batch statistics, dropout, augmentation, a moving average, a schedule, overflows on the way, and nearly always a
# checkpoint that is being written.
CONFIG = """
import flax.linen as nn
import numpy as np

from jaxmp import Adam, Arrays, Augment, CosineDecay, Experiment, Loop, Scaling


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(2)(nn.Dropout(0.2, deterministic=not train)(x))


def load(split):
    rng = np.random.default_rng(len(split))
    return {"image": rng.integers(0, 256, (100, 6, 6, 1)).astype(np.uint8), "label": rng.integers(0, 2, 100)}


def get_config():
    return Experiment(
        model=Net(),
        data=Arrays(load, batch_size=16, augment=Augment(flip=True)),
        optimizer=Adam(1e-2, schedule=CosineDecay()),
        scaler=Scaling(init_scale=2.0**24, growth_interval=16),
        loop=Loop(steps=600, log_every=7, eval_every=50, save_every=10, ema_decay=0.9),
    )
"""


def start(folder, workdir):
    command = [sys.executable, "-m", "jaxmp", "train", str(folder / "noise.py"), "--workdir", str(folder / workdir)]
    package = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": package},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process):
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def size(workdir):
    return sum(path.stat().st_size for path in workdir.glob("*/*/metrics.jsonl"))


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_bits_and_lines_of_an_undisturbed_one(tmp_path, kills=10):
    (tmp_path / "noise.py").write_text(CONFIG)
    undisturbed = start(tmp_path, "whole")
    while undisturbed.poll() is None and not size(tmp_path / "whole"):
        time.sleep(0.01)
    began = time.monotonic()
    end(undisturbed)
    training = time.monotonic() - began

    rng, killed_in_training = random.Random(kills), 0
    for kill in range(1, kills + 1):
        process = start(tmp_path, "killed")
        before, deadline = size(tmp_path / "killed"), time.monotonic() + 120
        while kill % 3 and size(tmp_path / "killed") <= before and process.poll() is None:  # every third: any moment
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, training / kills if kill % 3 else 5))
        killed_in_training += process.poll() is None and size(tmp_path / "killed") > before
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    end(start(tmp_path, "killed"))
    assert killed_in_training >= kills // 2

    whole, killed = (Run(tmp_path / workdir) for workdir in ("whole", "killed"))
    assert lines(killed.path) == lines(whole.path)
    assert bits(killed.state()) == bits(whole.state())
    assert {**killed.summary, "wall_seconds": 0} == {**whole.summary, "wall_seconds": 0}
    assert whole.summary["skipped_steps"] > 0
