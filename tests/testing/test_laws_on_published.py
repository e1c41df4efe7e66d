"""The laws find the defects of published loss scalers and steps by themselves (numerics.md, B1 to B17).

jmp, Flax and optax are the installed ones; of the others what matters is written out in a few lines.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

from jaxmp.testing import ScalerAdapter, StepAdapter, from_value_and_grad, replicated, scaler_laws, step_laws

pytestmark = pytest.mark.slow


def jmp_scaler(make):
    return ScalerAdapter(
        init=make,
        scale=lambda state, loss: state.scale(loss),
        unscale=lambda state, grads: state.unscale(grads),
        adjust=lambda state, finite: state.adjust(finite),
    )


def flax_scaler(make=DynamicScale):
    def value_and_grad(state, loss_fn, params):
        state, _, loss, grads = state.value_and_grad(loss_fn)(params)
        return loss, grads, state

    return from_value_and_grad(make, value_and_grad)


class Written(NamedTuple):
    """The state of the scalers that are written out."""

    scale: jax.Array
    good: jax.Array


def written_out(adjust, first=2.0**15, unscale_with_new=False):
    """A library with one function for all: scales, differentiates, adjusts, unscales."""

    def value_and_grad(state, loss_fn, params):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p) * state.scale)(params)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        new = adjust(state, finite)
        by = new.scale if unscale_with_new else state.scale
        return loss / by, jax.tree.map(lambda g: g.astype(jnp.float32) / by, grads), new

    return from_value_and_grad(lambda: Written(jnp.float32(first), jnp.int32(0)), value_and_grad)


def mpx_adjust(state, finite, period=4):
    """mpx/_loss_scaling.py: jmp's rule with a cap at the largest float16."""
    grown = jnp.minimum(state.scale * 2, 65504)
    new = jnp.where(finite, jnp.where(state.good == period - 1, grown, state.scale), jnp.maximum(state.scale / 2, 1))
    return Written(new, ((state.good + 1) % period) * finite)


def jaxamp_adjust(state, finite, patience=4):
    """jaxamp/__init__.py, `dynamic_scale_grad`: grows without a cap."""
    grow = finite & (state.good >= patience)
    new = jnp.where(finite, jnp.where(grow, state.scale * 2, state.scale), jnp.maximum(state.scale / 2, 1))
    return Written(new, jnp.where(finite & ~grow, state.good + 1, 0))


def keras_adjust(state, finite, growth_steps=4):
    """keras/src/optimizers/loss_scale_optimizer.py: doubles without a cap, halves without a floor."""
    grow = finite & (state.good + 1 == growth_steps)
    new = jnp.where(finite, jnp.where(grow, state.scale * 2, state.scale), state.scale / 2)
    return Written(new, jnp.where(finite & ~grow, state.good + 1, 0))


floor = functools.partial(jmp.DynamicLossScale, jnp.float32(2.0**15), min_loss_scale=jnp.float32(2.0**-14))
SCALERS: dict[str, tuple[Any, str, str]] = {
    "b1 jmp": (jmp_scaler(floor), "same_in_jit_and_scan", "after 16 overflows the scale is 0.5, but in jit it is 1"),
    "b2 jmp": (jmp_scaler(lambda: jmp.DynamicLossScale(jnp.float16(2**15))), "types_stay", "adjust raised TypeError"),
    "b3 jmp": (
        jmp_scaler(lambda: jmp.DynamicLossScale(2.0**15)),
        "unscales_in_float32",
        "a float16 gradient of 0.000976562 under the scale 32768 became float16 0; true: 2.98023e-08",
    ),
    "b4 jmp": (jmp_scaler(floor), "leaves_without_gradient_stay", "leaf ['x'] was int32[]"),
    "b7 mpx": (
        written_out(mpx_adjust, first=8.0, unscale_with_new=True),
        "unscaling_is_exact",
        "on the growth step (4 finite steps), under the scale 8: a gradient of 1, scaled to 8, came back as 0.5",
    ),
    "b9 mpx": (written_out(mpx_adjust), "power_of_two", "the scale is 65504, no power of two"),
    "b10 jaxamp": (written_out(jaxamp_adjust), "power_of_two", "finite steps the scale is"),
    "b10 keras": (written_out(keras_adjust), "power_of_two", "overflows the scale is"),
    "b11 flax": (flax_scaler(), "types_stay", "leaf .scale is float32[], and was float32[], weakly typed"),
    "b11 flax, the loss": (flax_scaler(), "loss_in_float32", "a float16 loss of 1 under the scale 65536 became"),
    "b12 flax": (flax_scaler(), "fp8_leaves_stay", "leaf ['x'] was float8_e4m3fn[2]"),
}


def assert_broken(result, words):
    assert result.verdict == "broken"
    assert words in result.words


@pytest.mark.parametrize("name", SCALERS)
def test_a_defect_of_a_published_scaler_is_found(name):
    adapter, law, words = SCALERS[name]
    assert_broken(scaler_laws(adapter)[law], words)


# --- steps


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))


def rows():
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(8, 4)).astype(np.float32), "y": random.normal(size=(8, 3)).astype(np.float32)}


class FlaxState(TrainState):
    batch_stats: Any
    dynamic_scale: DynamicScale


def imagenet_example(axis_name=None, pmean=None):
    """flax/examples/imagenet/train.py, `train_step`, for a small model and squared errors."""
    model = Normalised()

    def init():
        variables = model.init(jax.random.key(0), rows()["x"])
        return FlaxState.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=optax.sgd(0.1, momentum=0.9),
            batch_stats=variables["batch_stats"],
            dynamic_scale=DynamicScale(scale=jnp.float32(2.0**10), fin_steps=jnp.int32(0)),
        )

    def train_step(state, batch):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, new = state.apply_fn(variables, batch["x"], mutable=["batch_stats"])
            return jnp.mean((out - batch["y"]) ** 2), new

        grad_fn = state.dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name=axis_name)
        dynamic_scale, is_fin, (_, new), grads = grad_fn(state.params)
        if pmean:
            grads = jax.lax.pmean(grads, pmean)
        state_ = state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])
        select = functools.partial(jnp.where, is_fin)
        return state_.replace(
            opt_state=jax.tree.map(select, state_.opt_state, state.opt_state),
            params=jax.tree.map(select, state_.params, state.params),
            dynamic_scale=dynamic_scale,
        )

    compiled = train_step if axis_name or pmean else jax.jit(train_step)
    return StepAdapter(init, compiled, rows(), kept=everything, loss_scale=lambda state: state.dynamic_scale.scale)


def everything(state):
    return {"params": state.params, "opt_state": state.opt_state, "statistics": state.batch_stats, "step": state.step}


def without_statistics(state):
    return {"params": state.params, "opt_state": state.opt_state}


def with_optimizer(tx, microbatches=1):
    """A step that leaves all care to its optax optimizer."""

    def init():
        params = {"b": jnp.zeros(3), "w": jnp.full((4, 3), 0.5)}
        return {"params": params, "opt_state": tx.init(params)}

    @jax.jit
    def step(state, batch):
        loss = lambda p: jnp.mean((batch["x"] @ p["w"] + p["b"] - batch["y"]) ** 2)  # noqa: E731
        updates, opt_state = tx.update(jax.grad(loss)(state["params"]), state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def kept(state):
        # What the wrappers count attempts by is not to be kept.
        def strip(x):
            if isinstance(x, optax.ApplyIfFiniteState):
                return x.inner_state
            return x._replace(mini_step=0) if isinstance(x, optax.MultiStepsState) else x

        wrappers = optax.ApplyIfFiniteState, optax.MultiStepsState
        return jax.tree.map(strip, state, is_leaf=lambda x: isinstance(x, wrappers))

    return StepAdapter(init, step, rows(), kept=kept, microbatches=microbatches)


def levanter_skip():
    """levanter/optim/skipstep.py: what is skipped is multiplied by zero."""

    def update(updates, state, params=None):
        finite = jnp.isfinite(optax.tree.norm(updates))
        return jax.tree.map(lambda u: u * finite, updates), state

    return optax.chain(optax.GradientTransformation(lambda p: (), update), optax.sgd(0.1))


if_finite = optax.apply_if_finite
STEPS: dict[str, tuple[Any, str, str]] = {
    "b13 flax counts": (imagenet_example(), "bad_gradient_is_skipped", "leaf ['st"),
    "b13 flax statistics": (imagenet_example(), "bad_batch_is_skipped", "leaf ['statistics']"),
    "b15 optax": (with_optimizer(optax.MultiSteps(optax.sgd(0.1), 2), 2), "bad_gradient_is_skipped", "acc_grads"),
    "b16 decay": (
        with_optimizer(optax.chain(if_finite(optax.sgd(0.1), 10), optax.add_decayed_weights(-1e-2))),
        "bad_gradient_is_skipped",
        "leaf ['params']['w'] has",
    ),
    "b16 schedule": (
        with_optimizer(optax.chain(if_finite(optax.sgd(1.0), 10), optax.scale_by_schedule(lambda n: 0.1 / (1 + n)))),
        "bad_gradient_is_skipped",
        "count",
    ),
    "apply_if_finite": (
        with_optimizer(if_finite(optax.sgd(0.1), 3)),
        "bad_gradient_is_skipped",
        "after 4 times a step with",
    ),
    "b17 levanter": (with_optimizer(levanter_skip()), "bad_gradient_is_skipped", "has nan"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_defect_of_a_published_step_is_found(name):
    adapter, law, words = STEPS[name]
    assert_broken(step_laws(adapter)[law], words)


def test_replicas_that_flag_for_themselves_are_found_b14():
    """Flax's DynamicScale without axis_name, as one writes it who reduces the gradients oneself."""
    import dataclasses

    alone = dataclasses.replace(imagenet_example(pmean="batch"), kept=without_statistics)
    assert_broken(step_laws(replicated(alone, "batch"))["replicas_agree"], "between replicas 0 and")
