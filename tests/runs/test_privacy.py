"""What a private run says that its weights tell of single rows."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxmp.commands.dry_run import dry_run
from jaxmp.data.arrays import Arrays
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.training.accountant import epsilon
from jaxmp.training.optimizers import DPSGD, SGD

pytestmark = pytest.mark.slow


def load(split, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((64, 6)).astype(np.float32)
    return {"image": images, "label": (images[:, 0] > 0).astype(np.int32)}


def other(split):
    return load(split, 1)


def private(steps, noise=1.1, load=load, **fields):
    data = Arrays(load, batch_size=32, images=())
    optimizer = DPSGD(0.1, clip_norm=0.5, noise_multiplier=noise)
    loop = Loop(steps=steps, eval_every=5)
    return Experiment(
        **({"model": MLP(features=(4,), classes=2), "data": data, "optimizer": optimizer, "loop": loop} | fields)
    )


def spent(path, split="validation"):
    """Epsilon by step, of the lines of a split."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["epsilon"] for line in lines if line["split"] == split}


def test_a_run_says_its_epsilon_with_that_of_the_runs_before_it(tmp_path):
    pytest.importorskip("dp_accounting")
    first, said = private(10), []

    def run(experiment, **how):
        return fit(experiment, workdir=tmp_path, progress="none", log=said.append, **how)

    def of(experiment, steps):
        return Trainer(experiment).private_steps(steps)

    one = run(first)
    expected = {step: epsilon([of(first, step)], 1e-5) for step in (5, 10)}
    assert spent(one.path) == expected and spent(one.path, "test") == {10: expected[10]}
    assert (one.summary["epsilon"], one.summary["delta"]) == (expected[10], 1e-5)
    assert f"epsilon {expected[10]:.4g}, delta 1e-05 after all steps; poisson batches of " in dry_run(first)

    louder = private(20, noise=2.0)
    both = epsilon([of(first, 10), dataclasses.replace(of(louder, 10), first=10)], 1e-5)
    gone_on = run(louder, continue_from=one.path)
    assert math.isclose(gone_on.summary["epsilon"], both) and expected[10] < both
    assert spent(gone_on.path)[5] == expected[5]  # the parent's line
    # Read back, as a session that goes on does, from config.json.
    again = run(private(30, noise=2.0), continue_from=gone_on.path)
    assert again.summary["epsilon"] > both and len(Run(again.path).config["privacy"]["before"]) == 2

    weights = run(private(10, noise=3.0), init_from=one.path)
    assert weights.summary["epsilon"] > expected[10]
    assert "for public" not in " ".join(said)
    elsewhere = run(private(10, load=other), init_from=one.path)
    assert math.isclose(elsewhere.summary["epsilon"], expected[10]) and "for public" in said[-1] + " ".join(said)
    public = run(private(5, optimizer=SGD(0.1)))
    assert "epsilon" not in public.summary
    assert run(private(10), init_from=public.path).summary["epsilon"] == math.inf
