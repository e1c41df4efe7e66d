"""A function of (outputs, batch) is a task, and weights of rows or classes go with any task."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import identity_hash
from jaxmp.models.mlp import MLP
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.function import FunctionTask, as_task
from jaxmp.tasks.regression import Regression
from jaxmp.tasks.weighted import Weighted, class_weights
from jaxmp.training.metrics import Mean

BATCH = {
    "x": jnp.arange(6.0).reshape(3, 2),
    "y": jnp.array([[1.0], [2.0], [4.0]]),
    "label": jnp.array([0, 1, 1]),
    "worth": jnp.array([1.0, 3.0, jnp.nan]),
    "weight": jnp.array([1.0, 1.0, 0.0]),
}
OUTPUTS = jnp.array([[1.5], [4.0], [jnp.nan]])


def squared(outputs, batch):
    return jnp.sum((outputs - batch["y"]) ** 2, axis=-1)


def with_metric(outputs, batch):
    return Mean.of(squared(outputs, batch), batch["weight"]), {"error": jnp.abs(outputs - batch["y"])[:, 0]}


def test_a_function_is_a_task_of_the_loss_of_each_row():
    loss, metrics = FunctionTask(squared)(OUTPUTS, BATCH)
    assert float(loss.compute()) == pytest.approx((0.25 + 4) / 2) and metrics == {}
    loss, metrics = FunctionTask(with_metric)(OUTPUTS.astype(jnp.bfloat16), BATCH)
    assert float(loss.compute()) == pytest.approx((0.25 + 4) / 2)
    assert float(metrics["error"].compute()) == pytest.approx(1.25)
    # 300 squared is no number of float16 (trap T5): the function is given its outputs in float32.
    one = {"y": jnp.zeros((1, 1)), "weight": jnp.ones(1)}
    loss, _ = FunctionTask(lambda outputs, batch: (outputs**2)[:, 0])(jnp.full((1, 1), 300, jnp.float16), one)
    assert float(loss.compute()) == 90000


def load(split):
    return {"x": np.ones((8, 2), np.float32), "y": np.ones((8, 1), np.float32)}


def test_an_experiment_takes_a_function_and_its_name_is_in_the_hash():
    experiments = [
        Experiment(MLP((2,), 1), Arrays(load, batch_size=4), task)
        for task in (squared, with_metric, functools.partial(squared), FunctionTask(squared, ("x", "x")))
    ]
    assert len({identity_hash(each) for each in experiments}) == 4
    assert experiments[0].task == as_task(squared)


@pytest.mark.slow
def test_make_loss_and_the_trainer_take_a_function():
    experiment = Experiment(MLP((2,), 1), Arrays(load, batch_size=4), with_metric)
    assert set(Trainer(experiment).metric_specs) == {"loss", "error"}
    loss_fn = jaxmp.make_loss(MLP((2,), 1), squared, "float32")
    total, (weight, _, _) = loss_fn(Trainer(experiment).init().params, {}, BATCH, jax.random.key(0))
    assert weight == 2 and np.isfinite(total)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs, batch: jnp.mean(outputs), r"shape \(\) as the loss, which would count the rows that fill"),
        (lambda outputs, batch: outputs, r"shape \(3, 1\) as the loss; expected one number a row, \(3,\)"),
        (lambda outputs, batch: 3.0, "returned a float as the loss"),
        (lambda outputs, batch: (squared(outputs, batch), {"error": outputs}), r"shape \(3, 1\) as error"),
    ],
)
def test_what_is_no_loss_of_each_row_is_refused(function, message):
    with pytest.raises(InputError, match=message):
        FunctionTask(function)(OUTPUTS, BATCH)


def test_weights_of_rows_weigh_the_loss_and_leave_the_other_metrics():
    plain, weighted = Regression(), Weighted(Regression(), column="worth")
    loss, metrics = weighted(OUTPUTS, BATCH)
    assert float(loss.compute()) == pytest.approx((1 * 0.25 + 3 * 4) / 4) and float(loss.weight) == 4
    assert float(metrics["absolute_error"].compute()) == float(plain(OUTPUTS, BATCH)[1]["absolute_error"].compute())
    assert (weighted.inputs, weighted.target, weighted.metrics) == (plain.inputs, plain.target, plain.metrics)
    assert dataclasses.replace(weighted, column="y").column == "y"


@pytest.mark.slow
def test_class_weights_are_those_of_torch_and_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0, 1, 1, 2, 2, 2, 2])
    ours = class_weights(labels)
    np.testing.assert_allclose(ours, compute_class_weight("balanced", classes=np.arange(3), y=labels))
    logits = np.random.default_rng(0).normal(size=(7, 3))
    batch = {"label": jnp.asarray(labels), "weight": jnp.ones(7)}
    loss, _ = Weighted(Classification(), classes=ours)(jnp.asarray(logits, jnp.float32), batch)
    shifted = logits - logits.max(1, keepdims=True)
    each = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(7), labels]
    weight = np.array(ours)[labels]
    assert float(loss.compute()) == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weighted(Regression()), "expected one of the two"),
        (lambda: Weighted(Regression(), "w", (1.0,)), "expected one of the two"),
        (lambda: Weighted(Regression(), classes=(1.0, -1.0)), "finite weights of 0 or more"),
        (lambda: Weighted(squared, classes=(1.0,)), "has no target"),
        (
            lambda: Weighted(Classification(mixup=0.2), classes=(1.0, 2.0)),
            r"task.mixup = 0.2 mixes the losses of two rows.*expected 0, or .*Classification\(class_weights=",
        ),
        (lambda: Weighted(Regression(), "wroth").check(OUTPUTS, BATCH), "did you mean 'worth'"),
        (lambda: Weighted(Regression(), "x").check(OUTPUTS, BATCH), r"shape \(3, 2\); expected a weight for each row"),
        (
            lambda: Weighted(squared, "w").check_rows(None, {"w": np.array([1, -2.0])}, "train"),
            "row 1 has the weight -2",
        ),
        (lambda: Weighted(squared, "w").check_rows(None, {"w": np.zeros(2)}, "train"), "all weights in 'w' are 0"),
        (
            lambda: Weighted(Classification(), classes=(1.0, 1.0)).check_rows(
                jnp.zeros((3, 3)), {"label": np.array([0, 2])}, "test"
            ),
            "test: a label is 2, and Weighted.classes has 2 weights",
        ),
        (lambda: class_weights([0, 2]), "class 1 has no rows"),
        (lambda: class_weights([0.5]), "expected integers"),
    ],
)
def test_bad_weights_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
