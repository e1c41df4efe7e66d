"""Optax transformations and functions as optimizer and task: resumed, gone on with and compared like jaxmp's own."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.training.optimizers import Adam

pytestmark = pytest.mark.slow


def line(split):
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.array([[1.0], [-2.0], [0.5]], np.float32)}


def squared(outputs, batch):
    return jnp.sum((outputs - batch["y"]) ** 2, axis=-1)


def decayed(steps):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0.0, steps)))


OPTIMIZERS = {
    "transformation": optax.contrib.muon(1e-2),
    "function of steps": decayed,
    "schedule": Adam(1e-2, schedule=optax.warmup_cosine_decay_schedule(0.0, 1.0, 5, 12)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_killed_run_of_any_optax_optimizer_goes_on_to_the_same_bits(name, tmp_path):
    loop = Loop(steps=12, log_every=4, eval_every=6, save_every=6)
    experiment = Experiment(MLP((4,), 1), Arrays(line, batch_size=8), squared, OPTIMIZERS[name], loop=loop)
    whole = fit(experiment, workdir=tmp_path / "whole").path
    shutil.copytree(whole, copy := tmp_path / "cut" / "experiment" / whole.name)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "12")
    fit(experiment, workdir=tmp_path / "cut")
    states = [Run(path, experiment).state() for path in (whole, copy)]
    leaves = [jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key))) for state in states]
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*leaves, strict=True))
    said = []
    longer = dataclasses.replace(experiment, loop=dataclasses.replace(loop, steps=16))
    on = fit(longer, workdir=tmp_path / "on", continue_from=whole, log=said.append)
    assert on.summary["steps"] == 16 and np.isfinite(on.summary["test"]["loss"])
