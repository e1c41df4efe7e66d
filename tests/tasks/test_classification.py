from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.errors import InputError
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import make_loss
from jaxmp.tasks.multilabel import MultiLabel
from jaxmp.tasks.weighted import Weighted
from jaxmp.training.batch import EXAMPLE_INDEX
from jaxmp.training.metrics import compute, merge

WEIGHTS = np.array([1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 1.0, 3.0], np.float32)


def example(classes=3, rows=8):
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(rows, 4)), "label": rng.integers(0, classes, rows), "weight": WEIGHTS[:rows]}
    return rng.normal(size=(rows, classes)), {name: jnp.asarray(x) for name, x in batch.items()}


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_make_a_weighted_mean_of_the_loss_and_leave_the_accuracy(smoothing):
    logits, batch = example()
    of_class = np.array([0.5, 3.0, 0.0])
    task = Classification(class_weights=tuple(of_class), label_smoothing=smoothing)
    loss, metrics = task(jnp.asarray(logits, jnp.float32), batch)
    labels = np.asarray(batch["label"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -(1 - smoothing) * log_p[np.arange(8), labels] - smoothing * log_p.mean(-1)
    weight = WEIGHTS * of_class[labels]
    assert float(loss.compute()) == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-6)
    right = (logits.argmax(-1) == labels) * WEIGHTS
    assert float(metrics["accuracy"].compute()) == pytest.approx(right.sum() / WEIGHTS.sum(), rel=1e-6)


class Net(nn.Module):
    """Its logits are its inputs."""

    @nn.compact
    def __call__(self, x):
        return x[:, :3] * self.param("scale", nn.initializers.ones, ())


def mixed(batch, key=0, *, alpha=0.4, train=True, **fields):
    loss_fn = make_loss(Net(), Classification(mixup=alpha, **fields), "float32", train=train)
    total, (weight, metrics, _) = jax.jit(loss_fn)({"scale": jnp.float32(1)}, {}, batch, jax.random.key(key))
    return float(total), float(weight), metrics["accuracy"]


@pytest.mark.slow
def test_mixup_mixes_inputs_and_losses_of_neighbours_by_a_share_drawn_from_beta():
    _, batch = example()
    task = Classification(mixup=0.4)
    changed = task.change(batch, jax.random.key(0), train=True)
    share = np.asarray(changed["share of the row itself"], np.float64)
    assert (share[::2] == share[1::2]).all() and len(set(share)) == 4 and (share > 0).all() and (share < 1).all()
    x, other = np.asarray(batch["image"], np.float64), np.arange(8) ^ 1
    inputs = share[:, None] * x + (1 - share[:, None]) * x[other]
    np.testing.assert_allclose(changed["image"], inputs, rtol=1e-5, atol=1e-6)
    logits, labels = inputs[:, :3], np.asarray(batch["label"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = share[:, None] * np.eye(3)[labels] + (1 - share[:, None]) * np.eye(3)[labels[other]]
    loss, _ = task(jnp.asarray(logits, jnp.float32), changed)
    expected = -(WEIGHTS * (one_hot * log_p).sum(-1)).sum() / WEIGHTS.sum()
    assert float(loss.compute()) == pytest.approx(expected, rel=1e-5)
    assert float(loss.weight) == pytest.approx(WEIGHTS.sum(), rel=1e-6)
    keys = jax.random.split(jax.random.key(1), 2000)
    shares = jax.vmap(lambda key: task.change(batch, key, train=True)["share of the row itself"][0])(keys)
    # Of Beta(a, a): the mean is 1/2, the variance 1 / (4 (2a + 1)).
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(shares.var()) == pytest.approx(1 / (4 * 1.8), abs=0.012)


@pytest.mark.slow
def test_mixup_does_not_depend_on_how_a_batch_is_split_and_evaluation_mixes_nothing():
    _, batch = example()
    whole, weight, accuracy = mixed(batch)
    halves = [
        mixed({**{name: x[rows] for name, x in batch.items()}, EXAMPLE_INDEX: jnp.arange(8)[rows]})
        for rows in (slice(0, 4), slice(4, 8))
    ]
    assert sum(half[0] for half in halves) == pytest.approx(whole, rel=1e-6)
    assert sum(half[1] for half in halves) == pytest.approx(weight, rel=1e-6)
    assert float(sum(half[2].total for half in halves)) == pytest.approx(float(accuracy.total), rel=1e-6)
    assert mixed(batch, key=1)[0] != whole
    assert mixed(batch, train=False)[0] == mixed(batch, alpha=0.0)[0] != whole


@pytest.mark.slow
def test_of_several_labels_all_metrics_are_those_of_their_definitions_over_any_batches():
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(8, 5)), rng.integers(0, 2, (8, 5))
    truth[2] = logits[2] > 0
    task = MultiLabel()

    def measured(rows):
        batch = {"labels": jnp.asarray(truth[rows]), "weight": jnp.asarray(WEIGHTS[rows])}
        loss, metrics = jax.jit(task)(jnp.asarray(logits[rows], jnp.float32), batch)
        return {"loss": loss, **metrics}

    found = compute(merge(measured(slice(0, 3)), measured(slice(3, 8))))
    weight, predicted = WEIGHTS[:, None] / WEIGHTS.sum(), logits > 0
    losses = np.log1p(np.exp(logits)) - truth * logits
    true_positives = (WEIGHTS[:, None] * (predicted & (truth == 1))).sum()
    positives = (WEIGHTS[:, None] * predicted).sum() + (WEIGHTS[:, None] * truth).sum()
    expected = {
        "loss": (weight * losses).sum() / 5,
        "accuracy": (weight * (predicted == truth)).sum() / 5,
        "exact_match": (weight[:, 0] * (predicted == truth).all(1)).sum(),
        "f1": 2 * true_positives / positives,
    }
    assert found == pytest.approx(expected, rel=1e-6) and 0 < expected["exact_match"] < 1
    gradient = jax.grad(lambda x: task(x, {"labels": jnp.asarray(truth), "weight": jnp.asarray(WEIGHTS)})[0].total)
    assert not np.asarray(gradient(jnp.asarray(logits, jnp.float32)))[5].any()


LOGITS = jax.ShapeDtypeStruct((4, 3), jnp.float32)


@pytest.mark.parametrize(
    ("check", "names"),
    [
        (lambda: Classification(mixup=-1.0), "mixup=-1.0: expected 0 or more"),
        (lambda: Classification(mixup=math.inf), "mixup=inf: expected 0 or more"),
        (lambda: Classification(class_weights=np.array([math.inf, 1])), "class_weights=(inf, 1.0): expected numbers"),
        (lambda: Classification(class_weights=np.zeros(2)), "class_weights=(0.0, 0.0): expected numbers of at least 0"),
        (lambda: Weighted(Classification(), classes=(0, 0)), "Weighted.classes = (0.0, 0.0): expected finite weights"),
        (
            lambda: Classification(class_weights=(1.0, -1.0)),
            "class_weights=(1.0, -1.0): expected numbers of at least 0",
        ),
        (
            lambda: Classification(class_weights=(1.0, 2.0)).check(LOGITS, {"label": jnp.zeros(4, jnp.int32)}),
            "2 weights; expected one for each of the model's 3 outputs",
        ),
        (
            lambda: Classification(mixup=0.1).change({"weight": jnp.ones(3)}, jax.random.key(0), train=True),
            "a device has 3 rows of a microbatch; expected an even number",
        ),
        (
            lambda: Classification(("x",), mixup=0.1).change(
                {"weight": jnp.ones(2), "x": jnp.ones((2, 3), jnp.int32)}, jax.random.key(0), train=True
            ),
            "task.mixup mixes 'x', which is int32; expected floats",
        ),
        (lambda: MultiLabel("x"), "expected a tuple, ('x',)"),
        (lambda: MultiLabel().check(LOGITS, {"labels": jnp.zeros(4, jnp.int32)}), "'labels' is int32[4] beside logits"),
        (lambda: MultiLabel().check((), {"labels": jnp.zeros(4)}), "outputs are of type tuple"),
        (
            lambda: MultiLabel().check_rows(LOGITS, {"labels": np.array([[0, 2]])}, "test"),
            "a label is 2; expected 0 or 1",
        ),
        (
            lambda: MultiLabel().check_rows(LOGITS, {"labels": np.array([[0, 0.3, 1]])}, "test"),
            "a label is 0.3; expected 0 or 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(check, names):
    with pytest.raises(InputError) as error:
        check()
    assert names in str(error.value)


def test_the_loss_of_one_label_is_optax_own():
    logits, batch = example()
    loss, _ = Classification()(jnp.asarray(logits, jnp.float32), batch)
    each = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits, jnp.float32), batch["label"])
    assert float(loss.total) == float(jnp.sum(each * WEIGHTS))
