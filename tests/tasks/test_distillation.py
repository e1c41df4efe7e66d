"""Distillation: a student learns from labels and from a teacher, which is a run."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.teacher import Teacher
from jaxmp.tasks.distillation import Distillation

LOGITS = np.float32(np.random.RandomState(0).standard_normal((2, 5, 3)) * 4)
BATCH = {"label": np.array([0, 2, 1, 1, 0]), "weight": np.float32([1, 1, 0, 1, 1])}


def constant(batch):
    return jnp.asarray(LOGITS[1], jnp.float16)


@pytest.mark.slow
def test_the_loss_is_that_of_the_paper_in_float64():
    task = Distillation(teacher=constant, temperature=2.0, teacher_weight=0.75)
    loss, metrics = task(jnp.asarray(LOGITS[0], jnp.float16), BATCH)
    student, teacher = (np.float64(x.astype(np.float16)) for x in LOGITS)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    hard = -log_softmax(student)[np.arange(5), BATCH["label"]]
    p = log_softmax(teacher / 2)
    soft = (np.exp(p) * (p - log_softmax(student / 2))).sum(-1)
    expected = ((0.25 * hard + 0.75 * 4 * soft) * BATCH["weight"]).sum()
    np.testing.assert_allclose(loss.total, expected, rtol=1e-6)
    assert float(loss.weight) == 4
    same = (student.argmax(-1) == teacher.argmax(-1)) * BATCH["weight"]
    assert float(metrics["agreement"].total) == same.sum()
    np.testing.assert_allclose(metrics["cross_entropy"].total, (hard * BATCH["weight"]).sum(), rtol=1e-6)


def test_a_row_of_weight_0_counts_for_nothing_be_it_nan():
    empty = np.flatnonzero(np.asarray(BATCH["weight"]) == 0)
    assert len(empty)
    task, logits = Distillation(teacher=constant), jnp.asarray(LOGITS[0])
    assert float(task(logits.at[empty].set(jnp.nan), BATCH)[0].total) == float(task(logits, BATCH)[0].total)


def test_no_gradient_goes_into_the_teacher_and_at_weight_0_it_is_not_called():
    def loss(scale):
        task = Distillation(teacher=lambda batch: scale * LOGITS[1])
        return task(jnp.asarray(LOGITS[0]), BATCH)[0].total

    assert jax.grad(loss)(1.0) == 0

    def never(batch):
        raise AssertionError

    _, metrics = Distillation(teacher=never, teacher_weight=0.0)(jnp.asarray(LOGITS[0]), BATCH)
    assert set(metrics) == {"accuracy"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"teacher=None: expected a function of a batch, such as Teacher\('RUN'\)"),
        ({"teacher": constant, "temperature": 0.0}, r"temperature=0.0: expected a positive number"),
        ({"teacher": constant, "class_weights": (1.0, 2.0, 1.0)}, "a teacher has no labels to weigh; expected none"),
        ({"teacher": constant, "teacher_weight": 1.5}, "expected 0 <= teacher_weight <= 1"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Distillation(**values)


TEACHER = """
from jaxmp import Adam, Arrays, Classification, Experiment, Loop
from jaxmp.models.mlp import MLP
import numpy as np


def load(split):
    x = np.random.default_rng(len(split)).normal(size=(64, 8)).astype(np.float32)
    return {"image": x, "label": (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)}


def get_config():
    return Experiment(
        model=MLP(features=(32,), classes=3),
        data=Arrays(load, batch_size=32, images=()),
        optimizer=Adam(1e-2),
        precision="mixed_bfloat16",
        loop=Loop(steps=20, ema_decay=0.9),
    )
"""


def trained(text, tmp_path):
    """The run of a config file with this text, its experiment, and how it was trained."""
    (tmp_path / "teacher.py").write_text(text)
    config, how = (
        ConfigFile.find(str(tmp_path / "teacher.py")),
        {"workdir": tmp_path / "runs", "log": lambda text: None},
    )
    return fit(config.experiment(), name="teacher", origin=config.origin([]), **how).path, config.experiment(), how


@pytest.mark.slow
def test_a_teacher_is_a_run_of_its_own_policy_and_part_of_the_identity(tmp_path):
    run, base, how = trained(TEACHER, tmp_path)
    student = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, features=(4,)),
        task=Distillation(teacher=Teacher(str(run), "last")),
        precision="float32",
    )
    rows = base.data.source("test")[np.arange(8)]
    outputs = jax.jit(Teacher(str(run), "last"))(rows)
    np.testing.assert_allclose(outputs, Run(run).apply(rows), atol=2.0**-7)  # bfloat16, and another program (T6)
    state = Run(run).state()
    assert np.abs(outputs - Run(run).apply(rows, dataclasses.replace(state, ema=None))).max() > 2.0**-6  # averaged

    first = fit(student, name="student", **how)
    assert 0 <= first.summary["test"]["agreement"] <= 1
    again = Run(first.path, student).evaluate("test")
    assert again["agreement"] == pytest.approx(first.summary["test"]["agreement"], abs=1e-6)
    shutil.move(run, tmp_path / "moved")
    moved = dataclasses.replace(student, task=Distillation(teacher=Teacher(str(tmp_path / "moved"), "last")))
    assert moved.hash == student.hash and not fit(moved, name="student", **how).trained
    other = dataclasses.replace(moved, task=Distillation(teacher=Teacher(str(tmp_path / "moved"), "20")))
    assert other.hash == student.hash  # the same step by its number
    with pytest.raises(InputError, match=r"teacher: run .*runs/teacher/.*train it first, or give another --task.teach"):
        _ = dataclasses.replace(student, task=Distillation(teacher=Teacher(str(run)))).hash
    scaled = dataclasses.replace(moved, data=dataclasses.replace(moved.data, mean=(0.5,)))
    with pytest.raises(InputError, match=r"data.mean = \(0.5,\): the teacher .* was trained with \(0.0,\); expected"):
        fit(scaled, name="student", **how)
    other = dataclasses.replace(moved, model=dataclasses.replace(moved.model, classes=4))
    with pytest.raises(InputError, match=r"the teacher's outputs are \[32, 3\] beside logits of \[32, 4\]"):
        fit(other, name="student", **how)


DRAWS = """
import flax.linen as nn
import jax
import numpy as np
from jaxmp import Arrays, Experiment, Loop


class Draws(nn.Module):
    @nn.compact
    def __call__(self, x):
        key = self.variable("key", "own", lambda: jax.random.key(1))
        return nn.Dense(2)(x + jax.random.normal(key.value, x.shape))


def load(split):
    return {"image": np.ones((8, 3), np.float32), "label": np.zeros(8, np.int64)}


def get_config():
    return Experiment(model=Draws(), data=Arrays(load, batch_size=8, images=()), loop=Loop(steps=1))
"""


@pytest.mark.slow
def test_a_teacher_may_keep_a_key_in_its_model_state(tmp_path):
    run, base, _ = trained(DRAWS, tmp_path)
    rows = base.data.source("test")[np.arange(8)]
    np.testing.assert_allclose(jax.jit(Teacher(str(run), "last"))(rows), Run(run).apply(rows), rtol=1e-5)
