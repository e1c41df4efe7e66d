"""Adapters of mpx (mixed-precision-for-jax): DynamicLossScaling, and the train step of its README."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import mpx
import optax
from subject import Subject, batch

from jaxmp.testing import ScalerAdapter, StepAdapter, scaler_laws, step_laws


def scaling(period: int = 2000) -> mpx.DynamicLossScaling:
    """Creates the loss scaling of the README: initially the largest float16, and at least 1."""
    return mpx.DynamicLossScaling(
        loss_scaling=jnp.float32(mpx.FLOAT16_MAX), min_loss_scaling=jnp.float32(1), period=period
    )


def scaler() -> ScalerAdapter:
    """Returns an adapter of its three methods; fields that are not arrays are static, as under `eqx.filter_jit`."""
    _, static = eqx.partition(scaling(), eqx.is_array)
    whole = lambda arrays: eqx.combine(arrays, static)  # noqa: E731
    return ScalerAdapter(
        init=lambda: eqx.filter(scaling(), eqx.is_array),
        scale=lambda state, loss: whole(state).scale(loss),
        unscale=lambda state, grads: whole(state).unscale(grads),
        adjust=lambda state, finite: eqx.filter(whole(state).adjust(finite), eqx.is_array),
        min_scale=1,  # and no growth_interval: at first the scale is at its cap
    )


def step() -> StepAdapter:
    """Returns an adapter of a step with `filter_value_and_grad` and `optimizer_update`, on a linear layer.

    The scale starts at 2**10 and grows every 4 steps.
    """
    tx = optax.sgd(0.1, momentum=0.9)
    whole = lambda: eqx.nn.Linear(4, 3, key=jax.random.key(0))  # noqa: E731
    first = mpx.DynamicLossScaling(jnp.float32(2.0**10), jnp.float32(1), period=4)
    _, static = eqx.partition((whole(), first), eqx.is_array)

    def init():
        arrays = eqx.filter((whole(), first), eqx.is_array)
        return {"model": arrays[0], "opt_state": tx.init(arrays[0]), "loss_scaling": arrays[1]}

    def loss_fn(model, batch):
        out = jax.vmap(model)(batch["x"])
        return mpx.force_full_precision(lambda a, b: jnp.mean((a - b) ** 2), jnp.float32)(out, batch["y"])

    @jax.jit
    def train_step(state, batch):
        model, scaling = eqx.combine((state["model"], state["loss_scaling"]), static)
        _, scaling, finite, grads = mpx.filter_value_and_grad(loss_fn, scaling)(model, batch)
        model, opt_state = mpx.optimizer_update(model, tx, state["opt_state"], grads, finite)
        arrays = eqx.filter((model, scaling), eqx.is_array)
        return {"model": arrays[0], "opt_state": opt_state, "loss_scaling": arrays[1]}

    return StepAdapter(
        init,
        train_step,
        batch(),
        kept=lambda state: {"model": state["model"], "opt_state": state["opt_state"]},
        loss_scale=lambda state: state["loss_scaling"].loss_scaling,
    )


def subjects() -> list[Subject]:
    """Returns the scaler and the step."""
    packages = ("mixed-precision-for-jax",)
    return [
        Subject("mpx, DynamicLossScaling", packages, scaler_laws(scaler())),
        Subject("mpx, filter_value_and_grad and optimizer_update", packages, step_laws(step())),
    ]
