"""What is refused before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.dataset import Dataset
from jaxmp.data.source import Columns
from jaxmp.data.splits import random_split
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.vae import VAE
from jaxmp.runs.checks import check, check_targets
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.variational import EvidenceBound

SCRIPT = """
import flax.linen as nn
import numpy as np

import jaxmp

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)

def load(split):
    return {"x": np.zeros((40, 3), np.float32), "label": np.arange(40) % 2}

experiment = jaxmp.Experiment(
    model=Net(),
    data=jaxmp.Arrays(load, batch_size=10, images=(), device_limit=0, workers=1),
    task=jaxmp.Classification(inputs=("x",)),
    loop=jaxmp.Loop(steps=2),
)
"""


def run(folder, end):
    (folder / "script.py").write_text(SCRIPT + end)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_workers_from_a_script_without_a_guard_are_one_message(tmp_path):
    done = run(tmp_path, "jaxmp.fit(experiment)\n")
    assert done.returncode and done.stdout == ""
    assert done.stderr.count("Traceback") == 1 and "data.workers = 1: " in done.stderr.splitlines()[-1]
    assert (
        f"script.py, line {len(SCRIPT.splitlines()) + 1}: " in done.stderr
        and 'if __name__ == "__main__":' in done.stderr
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_workers_from_a_script_with_a_guard_train(tmp_path):
    done = run(tmp_path, 'if __name__ == "__main__":\n    jaxmp.fit(experiment)\n')
    assert done.returncode == 0, done.stderr


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def from_one(split):
    return {"x": np.zeros((40, 3), np.float32), "label": 1 + np.arange(40) % 2}


def from_zero(key, row):
    return {**row, "label": row["label"] - 1}


def on_the_host(rows):
    return {**rows, "label": rows["label"] - 1}


def larger(key, row):
    return {**row, "x": row["x"] + 1, "label": row["label"] + 0}


@dataclasses.dataclass(frozen=True)
class Streamed(Dataset):
    least: int = 0

    def source(self, split):
        columns = Columns(from_one(split))
        return Rows(columns, self.least - 1)


@dataclasses.dataclass(frozen=True)
class Rows:
    columns: Columns  # no mapping of columns: any attribute may have this name
    shift: int

    def __len__(self):
        return len(self.columns)

    def __getitem__(self, indices):
        rows = self.columns[indices]
        return {**rows, "label": rows["label"] + self.shift}


@dataclasses.dataclass(frozen=True)
class Mapped(Dataset):
    """Columns that are memory-mapped, which a random split reads when they are indexed."""

    least: int = 0

    def source(self, split):
        rows = from_one(split)
        rows["label"] += self.least - 1
        return Columns({name: column.view(np.memmap) for name, column in rows.items()}) if split == "train" else None


@pytest.mark.parametrize(
    ("data", "takes"),
    [
        (Arrays(from_one), False),
        (Arrays(from_one, transforms=(from_zero,)), True),
        (Arrays(from_one, transforms=(larger,)), False),
        (Arrays(from_one, host_transforms=(on_the_host,)), True),
        (Arrays(from_one, host_transforms=(on_the_host, on_the_host)), False),
        (Streamed(), True),
        (Streamed(least=1), False),
        (random_split(Mapped(), validation=4), True),
        (random_split(Mapped(least=-1), validation=4), False),
    ],
)
def test_labels_are_checked_as_the_task_sees_them(data, takes):
    data = dataclasses.replace(data, batch_size=10)
    experiment = Experiment(Net(), data, Classification(inputs=("x",)), precision="float32", loop=Loop(steps=2))
    with contextlib.nullcontext() if takes else pytest.raises(InputError, match="'label' of the train split: labels"):
        check(Trainer(experiment))


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_images_to_reconstruct_are_checked_after_they_are_normalised(mean):
    images = np.arange(160, dtype=np.uint8).reshape(10, 4, 4, 1)
    data = Arrays(lambda split: {"image": images}, mean=(mean,), batch_size=5)
    trainer = Trainer(Experiment(VAE((4, 4, 1), (3,), 2), data, EvidenceBound(), precision="float32"))
    with contextlib.nullcontext() if not mean else pytest.raises(InputError, match=r"values run from -0\.5 to 0\.12"):
        check_targets(trainer, "train")
