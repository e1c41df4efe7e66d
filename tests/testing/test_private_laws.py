"""The laws of a private step hold of jaxmp's, under each precision, and find deliberate faults in a written-out one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.models.mlp import MLP
from jaxmp.scaling.float32_math import global_norm
from jaxmp.testing import PrivateClaim, StepAdapter, replicated, step_laws

ROWS, CLIP, NOISE, SCALE = 8, 0.25, 1.5, 2.0**8
tree_map = jax.tree.map


def batch():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((ROWS, 16)), jnp.float32)
    return {"image": images, "label": jnp.asarray(rng.integers(0, 4, ROWS)), "weight": jnp.ones(ROWS)}


def recorded():
    """Keeps the gradient that it is given."""
    return optax.GradientTransformation(
        lambda params: tree_map(jnp.zeros_like, params), lambda g, state, params: (g, g)
    )


def claim(read):
    return PrivateClaim(CLIP, NOISE, ROWS, gradient=lambda before, out: read(out))


def jaxmps(precision, **how):
    model = MLP(features=(24,), classes=4, dropout=0.2)
    params = model.init(jax.random.key(0), batch()["image"])["params"]
    scaler = jaxmp.StaticScaler(SCALE)
    tx = jaxmp.loss_scaling(optax.chain(recorded(), optax.sgd(0.1, 0.9)), scaler)
    loss = jaxmp.make_loss(model, jaxmp.Classification(), precision)
    objective = jaxmp.Objective(loss, tx, private=jaxmp.Privacy(CLIP, NOISE, ROWS))
    step = jaxmp.make_train_step(objective, **how)
    init = lambda: jaxmp.TrainState.create(params, objective, key=jax.random.key(1))  # noqa: E731
    return StepAdapter(init, jax.jit(step), batch(), private=claim(lambda out: out[0].opt_state.inner_state[0]))


LONG = pytest.mark.full_size


@pytest.mark.parametrize(
    ("precision", "how"),
    [
        pytest.param("float32", {}, marks=LONG),
        pytest.param("mixed_bfloat16", {}, marks=LONG),
        pytest.param("mixed_float16", {}, marks=LONG),
        ("mixed_float16", {"accumulate_steps": 4}),
        pytest.param("float16", {}, marks=LONG),
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_laws_hold_of_the_private_step(precision, how):
    laws = step_laws(jaxmps(precision, **how))
    assert not laws.broken, str(laws)
    assert {"row_is_bounded", "long_row_counts_by_clip_norm", "noise_is_as_claimed"} <= set(laws.laws)


def written_out(fault=None, dtype=jnp.float16, axis=None):
    """DP-SGD for a linear model in half, written out, with one fault."""

    def loss(params, row):
        half = tree_map(lambda p: p.astype(dtype), params)
        logits = (row["image"].astype(dtype) @ half["kernel"] + half["bias"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, row["label"]) * row["weight"]

    def init():
        zeros = {"kernel": jnp.zeros((16, 4)), "bias": jnp.zeros(4)}
        rng = np.random.default_rng(1)
        params = {"kernel": jnp.asarray(rng.standard_normal((16, 4)), jnp.float32) / 4, "bias": jnp.zeros(4)}
        return {"params": params, "last": zeros, "step": jnp.int32(0), "scale": jnp.float32(SCALE)}

    def clipped(grads, scale):
        if fault != "scaled gradients clipped":
            grads = tree_map(lambda g: g / scale, grads)
        finite = jnp.isfinite(global_norm(grads))
        factor = jnp.minimum(1, CLIP / global_norm(grads))
        if fault == "each parameter clipped by itself":
            grads = tree_map(lambda g: g * jnp.minimum(1, CLIP / global_norm(g)), grads)
        elif fault != "clipped after the sum":
            grads = tree_map(lambda g: g * factor, grads)
        if fault != "a bad row stops the step":
            grads = tree_map(lambda g: jnp.where(finite, g, 0), grads)
        return tree_map(lambda g: g / scale, grads) if fault == "scaled gradients clipped" else grads

    def noise(key, tree):
        leaves, structure = jax.tree.flatten(tree)
        keys = [key] * len(leaves) if fault == "one noise for all parameters" else jax.random.split(key, len(leaves))
        of = jnp.float16 if fault == "noise in half" else jnp.float32
        drawn = [CLIP * NOISE * jax.random.normal(k, x.shape, of) for k, x in zip(keys, leaves, strict=True)]
        if fault == "uniform noise":
            drawn = [
                CLIP * NOISE * 3**0.5 * jax.random.uniform(k, x.shape, minval=-1.0)
                for k, x in zip(keys, leaves, strict=True)
            ]
        if fault == "noise that knows the scale":
            drawn = [x / SCALE for x in drawn]
        return jax.tree.unflatten(structure, [x.astype(jnp.float32) for x in drawn])

    def step(state, batch):
        scaled = jax.vmap(jax.grad(lambda p, row: loss(p, row) * state["scale"]), (None, 0))
        sums = tree_map(
            lambda g: g.sum(0), jax.vmap(clipped, (0, None))(scaled(state["params"], batch), state["scale"])
        )
        key = jax.random.fold_in(jax.random.key(0), 0 if fault == "the same noise in each step" else state["step"])
        if fault == "noise added on each replica":
            key = key if axis is None else jax.random.fold_in(key, jax.lax.axis_index(axis))
            sums = tree_map(jnp.add, sums, noise(key, sums))
        if axis is not None:
            sums = jax.lax.psum(sums, axis)
        if fault == "clipped after the sum":
            factor = jnp.minimum(1, CLIP * ROWS / global_norm(sums))
            sums = tree_map(lambda g: g * factor, sums)
        if fault != "noise added on each replica" and fault != "no noise":
            sums = tree_map(jnp.add, sums, noise(key, sums))
        mean = tree_map(lambda g: g / ROWS, sums)
        finite = jnp.isfinite(global_norm(mean))
        mean = tree_map(lambda g, old: jnp.where(finite, g, old), mean, state["last"])
        params = tree_map(lambda p, g: jnp.where(finite, p - 0.1 * g, p), state["params"], mean)
        return {"params": params, "last": mean, "step": state["step"] + 1, "scale": state["scale"]}

    if axis is None:
        return StepAdapter(init, jax.jit(step), batch(), private=claim(lambda out: out["last"]), **KEPT)
    one = StepAdapter(init, step, batch(), private=claim(lambda out: tree_map(lambda x: x[0], out["last"])), **KEPT)
    return replicated(one, axis)


KEPT = {"kept": lambda state: (state["params"], state["last"]), "loss_scale": lambda state: state["scale"]}

FAULTS = {
    "scaled gradients clipped": "long_row_counts_by_clip_norm",
    "clipped after the sum": "row_is_bounded",
    "each parameter clipped by itself": "row_is_bounded",
    "a bad row stops the step": "row_is_bounded",
    "no noise": "noise_is_as_claimed",
    "noise in half": "noise_is_as_claimed",
    "noise that knows the scale": "noise_is_as_claimed",
    "uniform noise": "noise_is_as_claimed",
    "the same noise in each step": "noise_is_as_claimed",
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, pytest.param("data", marks=LONG)])
def test_the_written_out_step_obeys_the_laws(axis):
    laws = step_laws(written_out(axis=axis))
    assert not laws.broken, str(laws)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["noise added on each replica", pytest.param("clipped after the sum", marks=LONG)])
def test_a_fault_of_private_replicas_is_found(fault):
    law = "noise_is_as_claimed" if "noise" in fault else "row_is_bounded"
    assert step_laws(written_out(fault, axis="data"))[law].verdict == "broken"


IN_SLOW = ("scaled gradients clipped", "clipped after the sum", "noise in half", "a bad row stops the step")
"""the faults that the slow suite looks for; the others are for `-m full_size`"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault if fault in IN_SLOW else pytest.param(fault, marks=LONG) for fault in FAULTS])
def test_a_fault_in_a_private_step_is_found(fault):
    assert step_laws(written_out(fault))[FAULTS[fault]].verdict == "broken"
