"""What is refused before the first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
