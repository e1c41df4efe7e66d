"""Adapters of jmp's DynamicLossScale as in its documentation and in Haiku's ImageNet example, and of that example's
step.

The step is that of https://github.com/google-deepmind/dm-haiku/blob/main/examples/imagenet/train.py with a small model;
its lines on mixed precision were written from a description, and not compared with the current file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import optax
from subject import Subject, batch

from jaxmp.testing import ScalerAdapter, StepAdapter, replicated, scaler_laws, step_laws


def scaler(init: Callable[[], Any], **claims: float) -> ScalerAdapter:
    """Returns an adapter of the three methods of jmp's loss scale."""
    return ScalerAdapter(
        init=init,
        scale=lambda state, loss: state.scale(loss),
        unscale=lambda state, grads: state.unscale(grads),
        adjust=lambda state, finite: state.adjust(finite),
        **claims,
    )


class Normalised(hk.Module):
    """BatchNorm and a linear layer."""

    def __call__(self, x):
        """Returns outputs (rows, 3)."""
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
        return hk.Linear(3)(x)


def haiku_example() -> StepAdapter:
    """Returns an adapter of Haiku's mixed float16 step with `--mp_scale_type=Dynamic --mp_skip_nonfinite`."""
    policy = jmp.get_policy("params=float32,compute=float16,output=float32")
    hk.mixed_precision.set_policy(Normalised, policy)
    hk.mixed_precision.set_policy(hk.BatchNorm, policy.with_output_dtype(jnp.float16))
    forward = hk.transform_with_state(lambda x: Normalised()(x))
    forward = hk.without_apply_rng(forward)
    tx = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def init():
        params, state = forward.init(jax.random.key(0), batch()["x"])
        loss_scale = jmp.DynamicLossScale(2.0**15, period=4)
        return {"params": params, "state": state, "opt_state": tx.init(params), "loss_scale": loss_scale}

    def train_step(train_state, batch):
        params, state, opt_state, loss_scale = (train_state[k] for k in ("params", "state", "opt_state", "loss_scale"))

        def loss_fn(params):
            out, new_state = forward.apply(params, state, batch["x"])
            return loss_scale.scale(jnp.mean((out - batch["y"]) ** 2)), new_state

        grads, new_state = jax.grad(loss_fn, has_aux=True)(params)
        grads = loss_scale.unscale(policy.cast_to_compute(grads))
        grads = policy.cast_to_param(jax.lax.pmean(grads, axis_name="i"))
        updates, new_opt_state = tx.update(grads, opt_state)
        new_params = optax.apply_updates(params, updates)
        grads_finite = jmp.all_finite(grads)
        new = jmp.select_tree(grads_finite, (new_params, new_state, new_opt_state), (params, state, opt_state))
        new_params, new_state, new_opt_state = new
        loss_scale = loss_scale.adjust(grads_finite)
        return {"params": new_params, "state": new_state, "opt_state": new_opt_state, "loss_scale": loss_scale}

    def kept(state):
        return {k: v for k, v in state.items() if k != "loss_scale"}

    # As in the example, statistics are not averaged over replicas; the example averages them when it evaluates.
    adapter = StepAdapter(init, train_step, batch(), kept, loss_scale=lambda state: state["loss_scale"].loss_scale)
    return replicated(adapter, "i", replicas=2)


def subjects() -> list[Subject]:
    """Returns the scaler in three ways, and Haiku's step."""
    packages = ("jmp",)
    floor = 2.0**-14
    return [
        Subject(
            "jmp, DynamicLossScale(jnp.float32(2**15))",
            packages,
            scaler_laws(scaler(lambda: jmp.DynamicLossScale(jnp.float32(2.0**15)), growth_interval=2000, min_scale=1)),
        ),
        Subject(
            "jmp, with min_loss_scale=2**-14",
            packages,
            scaler_laws(
                scaler(
                    lambda: jmp.DynamicLossScale(jnp.float32(2.0**15), min_loss_scale=jnp.float32(floor)),
                    min_scale=floor,
                )
            ),
        ),
        Subject(
            "jmp, DynamicLossScale(2.0**15), as in Haiku's example",
            packages,
            scaler_laws(scaler(lambda: jmp.DynamicLossScale(2.0**15))),
        ),
        Subject(
            "jmp in Haiku's ImageNet step, 2 replicas",
            ("jmp", "dm-haiku"),
            step_laws(haiku_example()),
            {"replicas_agree": "the example keeps batch statistics of each replica, by design"},
        ),
    ]
