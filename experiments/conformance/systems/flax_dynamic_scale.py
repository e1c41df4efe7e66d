"""Adapters of Flax's DynamicScale: alone, and in the step of Flax's ImageNet example, with and without `axis_name`.

The step follows https://github.com/google/flax/blob/main/examples/imagenet/train.py with a small model.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from subject import Subject, batch

from jaxmp.testing import ScalerAdapter, StepAdapter, from_value_and_grad, replicated, scaler_laws, step_laws


class Normalised(nn.Module):
    """BatchNorm and a dense layer in float16."""

    @nn.compact
    def __call__(self, x):
        """Returns outputs (rows, 3)."""
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=jnp.float16)(x)
        return nn.Dense(3, dtype=jnp.float16)(x)


class State(TrainState):
    """The train state of the example."""

    batch_stats: Any
    dynamic_scale: DynamicScale


def scaler() -> ScalerAdapter:
    """Returns an adapter of `DynamicScale()`, with its defaults."""

    def value_and_grad(state, loss_fn, params):
        state, _, loss, grads = state.value_and_grad(loss_fn)(params)
        return loss, grads, state

    return from_value_and_grad(DynamicScale, value_and_grad, growth_interval=2000)


def step(axis_name: str | None = None, pmean: str | None = None) -> StepAdapter:
    """Returns an adapter of the example's `train_step`; the scale grows every fourth step.

    Args:
      axis_name: axis over which DynamicScale averages the gradients.
      pmean: axis over which the step itself averages the gradients.
    """
    model = Normalised()

    def init():
        variables = model.init(jax.random.key(0), batch()["x"])
        return State.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=optax.sgd(0.1, momentum=0.9),
            batch_stats=variables["batch_stats"],
            dynamic_scale=DynamicScale(growth_interval=4),
        )

    def train_step(state, batch):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, new = state.apply_fn(variables, batch["x"], mutable=["batch_stats"])
            return jnp.mean((out.astype(jnp.float32) - batch["y"]) ** 2), new

        grad_fn = state.dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name=axis_name)
        dynamic_scale, is_fin, (_, new), grads = grad_fn(state.params)
        if pmean:
            grads = jax.lax.pmean(grads, pmean)
        new_state = state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])
        select = functools.partial(jnp.where, is_fin)
        return new_state.replace(
            opt_state=jax.tree.map(select, new_state.opt_state, state.opt_state),
            params=jax.tree.map(select, new_state.params, state.params),
            dynamic_scale=dynamic_scale,
        )

    def kept(state):
        kept = {"params": state.params, "opt_state": state.opt_state}
        if axis_name or pmean:  # what else the step does not keep is shown on one device
            return kept
        return kept | {"batch_stats": state.batch_stats, "step": state.step}

    compiled = train_step if axis_name or pmean else jax.jit(train_step)
    adapter = StepAdapter(init, compiled, batch(), kept, loss_scale=lambda state: state.dynamic_scale.scale)
    axis = axis_name or pmean
    return replicated(adapter, axis) if axis else adapter


def subjects() -> list[Subject]:
    """Returns the scaler, and the step on one device and on four replicas."""
    packages = ("flax",)
    integers = {"leaves_without_gradient_stay": "jax.value_and_grad, inside it, takes no such leaves"}
    statistics = {"replicas_agree": "the example averages batch statistics over replicas only when it evaluates"}
    return [
        Subject("flax, DynamicScale()", packages, scaler_laws(scaler()), integers),
        Subject("flax, ImageNet step, one device", packages, step_laws(step())),
        Subject("flax, ImageNet step, axis_name, 4 replicas", packages, step_laws(step("batch")), statistics),
        Subject("flax, ImageNet step, own pmean, 4 replicas", packages, step_laws(step(pmean="batch"))),
    ]
