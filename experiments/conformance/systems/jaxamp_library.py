"""Adapters of jaxamp: `dynamic_scale_value_and_grad` as a scaler, and the train step of its README.

The step computes in float32: `jaxamp.amp` 0.0.4 does not run on JAX 0.10, whose `get_bind_params` returns one value.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import jaxamp
import optax
from jaxamp import _dynamic_scaler
from subject import Subject, batch

from jaxmp.testing import ScalerAdapter, StepAdapter, from_value_and_grad, scaler_laws, step_laws


def scaler() -> ScalerAdapter:
    """Returns an adapter with one attempt per step: the laws inject gradients, which a lower scale does not change."""

    def value_and_grad(state, loss_fn, params):
        function = jaxamp.dynamic_scale_value_and_grad(loss_fn, redo_on_nan=0, filter=False)
        state, (loss, grads) = function(params, dynamic_scaler_state=state)
        return loss, grads, state

    adapter = from_value_and_grad(jaxamp.DynamicScalerState, value_and_grad)
    return dataclasses.replace(adapter, scale=lambda state, loss: _dynamic_scaler.default_scale_fn(loss, state))


def step() -> StepAdapter:
    """Returns an adapter of the README's `train_step`, with a patience of 3.

    A step makes up to ten attempts with ever lower scales, and then applies what the last one gave.
    """
    tx = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def init():
        params = {"b": jnp.zeros(3), "w": jnp.full((4, 3), 0.5, jnp.float32)}
        scaler = jaxamp.DynamicScalerState(patience=jnp.int32(3), scaler=jnp.float32(2.0**10))
        return {"params": params, "opt_state": tx.init(params), "scaler": scaler}

    def loss_fn(params, batch):
        return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)

    @jax.jit
    def train_step(state, batch):
        grad_fn = jaxamp.dynamic_scale_value_and_grad(loss_fn)
        scaler, (_, grads) = grad_fn(state["params"], batch, dynamic_scaler_state=state["scaler"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state, "scaler": scaler}

    return StepAdapter(
        init,
        train_step,
        batch(),
        kept=lambda state: {"params": state["params"], "opt_state": state["opt_state"]},
        loss_scale=lambda state: state["scaler"].scaler,
    )


def subjects() -> list[Subject]:
    """Returns the scaler and a step."""
    not_asked = {"leaves_without_gradient_stay": "jax.grad, inside it, takes no such leaves"}
    return [
        Subject("jaxamp, dynamic_scale_value_and_grad", ("jaxamp",), scaler_laws(scaler()), not_asked),
        Subject("jaxamp, README's train_step in float32", ("jaxamp",), step_laws(step())),
    ]
