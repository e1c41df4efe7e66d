"""What a private run says that its weights tell of single rows."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

import jaxmp
from jaxmp.commands.dry_run import dry_run
from jaxmp.commands.fast_dev_run import shortened
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP
from jaxmp.runs.fit import fit
from jaxmp.runs.privacy import may_share_rows
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.training.accountant import epsilon
from jaxmp.training.optimizers import DPSGD, SGD
from jaxmp.training.schedules import CosineDecay


def load(split, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((64, 6)).astype(np.float32)
    return {"image": images, "label": (images[:, 0] > 0).astype(np.int32)}


def smaller(split):
    return {name: column[:50] for name, column in load(split).items()}


def other(split):
    columns = load(split, 1)
    return columns | {"image": columns["image"].reshape(64, 2, 3)}


def private(steps, noise=1.1, load=load, **fields):
    data = Arrays(load, batch_size=32, images=())
    optimizer = DPSGD(0.1, clip_norm=0.5, noise_multiplier=noise)
    loop = Loop(steps=steps, eval_every=5, log_every=2)
    return Experiment(
        **({"model": MLP(features=(4,), classes=2), "data": data, "optimizer": optimizer, "loop": loop} | fields)
    )


def spent(path, split="validation"):
    """Epsilon by step, of the lines of a split."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["epsilon"] for line in lines if line["split"] == split}


def test_a_fast_dev_run_of_a_private_experiment_is_private_with_the_schedule_of_the_whole_run():
    whole = private(10, optimizer=DPSGD(0.1, clip_norm=0.5, schedule=CosineDecay(warmup_steps=8)))
    shorter = shortened(whole)
    trainer = Trainer(shorter)
    assert trainer.is_private and trainer.steps < 8
    assert shorter.optimizer.privacy(8) == whole.optimizer.privacy(8)
    rates = [float(of.optimizer.rate(steps)(2)) for of, steps in ((shorter, trainer.steps), (whole, 10))]
    assert rates[0] == rates[1]


@pytest.mark.slow
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
    drawn = Trainer(first).batches.expected_rows
    timed = [line for line in Run(one.path).metrics if "examples_per_second" in line]
    assert timed and drawn < 32
    assert all(math.isclose(line["examples_per_second"], line["steps_per_second"] * drawn) for line in timed)
    assert f"epsilon {expected[10]:.4g}, delta 1e-05 after all steps; poisson batches of " in dry_run(first)
    assert "of its own steps; those of the run that it begins with come on top; " in dry_run(first, str(one.path))

    louder = private(20, noise=2.0)
    both = epsilon([of(first, 10), dataclasses.replace(of(louder, 10), first=10)], 1e-5)
    gone_on = run(louder, continue_from=one.path)
    assert math.isclose(gone_on.summary["epsilon"], both) and expected[10] < both
    assert spent(gone_on.path)[5] == expected[5]  # the parent's line
    # Read back, as a session that goes on does, from config.json.
    again = run(private(30, noise=2.0), continue_from=gone_on.path)
    assert again.summary["epsilon"] > both and len(Run(again.path).config["privacy"]["before"]) == 2

    weights = run(private(10, noise=3.0, seed=1), init_from=one.path)
    assert weights.summary["epsilon"] > expected[10]
    part = run(private(10, load=smaller, seed=1), init_from=one.path)
    assert part.summary["epsilon"] > expected[10] and "for public" not in " ".join(said)
    elsewhere = run(private(10, load=other, seed=1), init_from=one.path)
    alone = epsilon([of(private(10, load=other), 10)], 1e-5)
    assert math.isclose(elsewhere.summary["epsilon"], alone) and "for public" in " ".join(said)
    assert Run(elsewhere.path).config["privacy"]["taken_for_public"] == str(one.path)
    # What that run took for public are rows of this one.
    again = run(private(10, seed=2), init_from=elsewhere.path)
    assert math.isclose(again.summary["epsilon"], epsilon([of(first, 10)] * 2, 1e-5))

    for seed, whose in ((1, "its own"), (0, "that of a run before it")):
        with pytest.raises(InputError, match=f"with seed {seed}, which was {whose}, the noise and the batches would"):
            run(private(10, noise=4.0, seed=seed), init_from=weights.path)
    with pytest.raises(InputError, match="a private step leaves out the rows that overflow, see dropped_examples"):
        jaxmp.blame(Run(one.path, first), 1)

    not_private = run(private(5, optimizer=SGD(0.1)))
    assert "epsilon" not in not_private.summary
    for rows in (load, smaller):
        assert run(private(10, load=rows), init_from=not_private.path).summary["epsilon"] == math.inf


def nowhere_finite(split):
    columns = load(split)
    return columns | {"image": np.full_like(columns["image"], np.nan)}


@pytest.mark.slow
def test_a_private_run_that_fails_names_no_command_that_refuses_it(tmp_path):
    pytest.importorskip("dp_accounting")
    with pytest.raises(RunFailed, match=r"The state is saved in \S+$"):
        fit(private(10, load=nowhere_finite), workdir=tmp_path, progress="none", log=lambda text: None)


@pytest.mark.parametrize(
    ("columns", "shared"),
    [
        ({"image": ("uint8", 28, 28, 1), "label": ("int64",)}, True),
        ({"image": ("uint8", 28, 28, 1)}, True),
        ({"image": ("uint8", 28, 28, 1), "label": ("int8",)}, True),
        ({"image": ("uint8", 32, 32, 3), "label": ("int64",)}, False),
        ({"image": ("float32", 28, 28, 1), "label": ("int64",)}, False),
        ({"text": ("text",), "label": ("int64",)}, False),
    ],
)
def test_rows_of_columns_of_one_kind_may_be_shared(columns, shared):
    def rows(columns, count):
        kinds = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, *shape) in columns.items()}
        return {"train": {"rows": count, "columns": kinds}}

    mine = rows({"image": ("uint8", 28, 28, 1), "label": ("int64",)}, 55_000)
    assert may_share_rows({"rows": rows(columns, 60_000)}, mine) == shared
    assert may_share_rows({}, mine)
