"""Gradient accumulation: microbatches, one after the other, give the step of the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import InputError
from jaxmp.experiment.settings import Parallel
from jaxmp.scaling.scalers import DynamicScaler, StaticScaler
from jaxmp.scaling.transform import loss_scaling
from jaxmp.training.metrics import Mean, compute
from jaxmp.training.state import TrainState
from jaxmp.training.step import make_train_step

ROWS, RATE = 12, 0.125
LARGE = np.float32(2.0**80)  # squared, no float32


def loss_fn(params, model_state, batch, key):
    """Squared errors of a linear model, a count of calls as the model's state, and an integer parameter."""
    error = batch["x"] @ params["w"] - batch["y"]
    loss = Mean.of(error**2, batch["weight"])
    return loss.total, (
        loss.weight,
        {"error": Mean.of(jnp.abs(error), batch["weight"])},
        {"calls": model_state["calls"] + 1},
    )


def batch(weights=(1.0,) * ROWS):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 3)).astype(np.float32), rng.normal(size=ROWS).astype(np.float32)
    return {"x": x, "y": y, "weight": np.array(weights, np.float32)}


def gradient(rows, w=(0.5, -1.0, 2.0)):
    """Of the mean loss over `rows` of a batch, in float64."""
    x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
    return 2 * ((x @ np.array(w) - y) * weight) @ x / weight.sum()


def stepped(rows, k, overflow="window", scale=2.0**15, scaler=None):
    """(state before, state after, metrics) of one step of SGD in `k` microbatches."""
    tx = loss_scaling(optax.sgd(RATE), DynamicScaler(init_scale=scale) if scaler is None else scaler)
    params = {"w": jnp.array([0.5, -1.0, 2.0]), "n": jnp.arange(2)}
    state = TrainState.create(params, tx, key=jax.random.key(0), model_state={"calls": jnp.int32(0)})
    step = make_train_step(loss_fn, tx, accumulate_steps=k, accumulate_overflow=overflow)
    after, metrics = jax.jit(step)(state, rows)
    return state, after, compute(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["window", "microbatch"])
@pytest.mark.parametrize("weights", [(1,) * 12, (1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0), (1,) * 3 + (0,) * 9])
def test_microbatches_give_the_update_and_the_metrics_of_one_batch(overflow, weights):
    """Masked, ragged, and with microbatches in which nothing counts."""
    rows = batch(weights)
    one, whole = stepped(rows, 1)[1:]
    for k in (2, 4):
        before, after, metrics = stepped(rows, k, overflow)
        np.testing.assert_allclose(after.params["w"], before.params["w"] - RATE * gradient(rows), rtol=1e-6)
        np.testing.assert_allclose(after.params["w"], one.params["w"], rtol=1e-6)
        assert metrics == pytest.approx(whole, rel=1e-6)
        assert after.model_state["calls"] == k and np.array_equal(after.params["n"], [0, 1])
        assert jaxmp.loss_scale(after.opt_state) == 2.0**15


def test_a_batch_in_which_nothing_counts_changes_no_weight():
    before, after, _ = stepped(batch((0,) * 12), 4, "microbatch")
    assert np.array_equal(after.params["w"], before.params["w"]) and jaxmp.skipped_steps(after.opt_state) == 0


def test_the_sum_does_not_depend_on_the_scale_to_the_bit():
    weights = [stepped(batch(), 4, scaler=StaticScaler(2.0**n))[1].params["w"].tobytes() for n in (0, 10, 24)]
    assert len(set(weights)) == 1


def test_an_overflow_in_one_microbatch_drops_the_window():
    rows = batch()
    rows["x"][4] = LARGE
    before, after, _ = stepped(rows, 4, "window")
    assert after.params["w"].tobytes() == before.params["w"].tobytes()
    assert after.model_state["calls"] == 0 and jaxmp.skipped_steps(after.opt_state) == 1
    assert jaxmp.loss_scale(after.opt_state) == 2.0**14


def test_an_overflow_in_one_microbatch_drops_only_that_one():
    rows = batch((1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1))
    rows["x"][5] = LARGE
    kept = jax.tree.map(lambda x: np.concatenate([x[:3], x[6:]]), rows)
    before, after, metrics = stepped(rows, 4, "microbatch")
    np.testing.assert_allclose(after.params["w"], before.params["w"] - RATE * gradient(kept), rtol=1e-6)
    error = np.abs(kept["x"] @ np.array([0.5, -1, 2]) - kept["y"])
    np.testing.assert_allclose(metrics["loss"], np.average(error**2, weights=kept["weight"]), rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], np.average(error, weights=kept["weight"]), rtol=1e-6)
    assert after.model_state["calls"] == 3 and jaxmp.skipped_steps(after.opt_state) == 0
    assert jaxmp.loss_scale(after.opt_state) == 2.0**14  # or the scale would grow until every microbatch overflows


def test_where_every_microbatch_that_counts_overflows_the_step_is_skipped():
    rows = batch((1,) * 9 + (0,) * 3)
    rows["x"][[0, 3, 6]] = LARGE
    before, after, _ = stepped(rows, 4, "microbatch")
    assert after.params["w"].tobytes() == before.params["w"].tobytes()
    assert jaxmp.skipped_steps(after.opt_state) == 1 and jaxmp.loss_scale(after.opt_state) == 2.0**14


def test_a_nan_loss_is_no_overflow_to_drop():
    rows = batch()
    rows["y"][0] = np.nan
    _, after, metrics = stepped(rows, 4, "microbatch")
    assert np.isnan(metrics["loss"]) and jaxmp.skipped_steps(after.opt_state) == 1


def test_a_batch_that_does_not_divide_into_microbatches_is_refused_with_the_nearest_size():
    with pytest.raises(InputError, match=r"3 microbatches \(loop.accumulate_steps\); the nearest that does: 9 or 12"):
        Parallel().make(10, 3)
