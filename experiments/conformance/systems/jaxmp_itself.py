"""Adapters of jaxmp: its dynamic scaler inside `loss_scaling`, its train step, and a policy on a Flax model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from subject import Subject, batch

from jaxmp.scaling.scalers import DynamicScaler
from jaxmp.scaling.transform import loss_scaling, scale_loss
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.testing import ScalerAdapter, StepAdapter, policy_laws, scaler_laws, step_laws
from jaxmp.training.state import TrainState
from jaxmp.training.step import make_train_step


class Net(nn.Module):
    """A dense layer, BatchNorm and a head."""

    @nn.compact
    def __call__(self, x, *, train=False):
        """Returns logits (rows, 3)."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        return nn.Dense(3, name="head")(x)


def scaler() -> ScalerAdapter:
    """Returns an adapter of `DynamicScaler` with its defaults, inside an optimizer."""
    claims = DynamicScaler()
    tx = loss_scaling(optax.identity(), claims)
    return ScalerAdapter(
        init=lambda: tx.init({}),
        scale=lambda state, loss: scale_loss(loss, state),
        unscale=lambda state, grads: tx.update(grads, state, grads)[0],
        adjust=lambda state, finite: tx.update(jnp.where(finite, 1.0, jnp.inf), state)[1],
        growth_interval=claims.growth_interval,
        min_scale=claims.min_scale,
        max_scale=claims.max_scale,
    )


def step() -> StepAdapter:
    """Returns an adapter of a mixed_float16 step with clipping, decay and a schedule; the scale grows every 3 steps."""
    model, task, rows = Net(), Classification(), batch()
    rows = {"image": rows["x"], "label": rows["y"].argmax(1), "weight": jnp.ones(8)}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda n: 0.1 / (1 + n)))
    tx = loss_scaling(inner, DynamicScaler(growth_interval=3))

    @jax.jit
    def init():
        params, model_state = init_model(model, task, rows, jax.random.key(1))
        return TrainState.create(params, tx, key=jax.random.key(2), model_state=model_state, ema=False)

    train_step = make_train_step(make_loss(model, task, "mixed_float16"), tx)
    return StepAdapter(init, jax.jit(train_step), rows, loss=lambda out: out[1]["loss"].total)


def subjects() -> list[Subject]:
    """Returns the scaler, the step and a policy."""
    packages = ("jaxmp",)
    return [
        Subject("jaxmp, DynamicScaler", packages, scaler_laws(scaler())),
        Subject("jaxmp, train step in mixed_float16", packages, step_laws(step())),
        Subject(
            "jaxmp, policy head=float32; mixed_float16",
            packages,
            policy_laws(Net(), "head=float32; mixed_float16", batch()["x"]),
        ),
    ]
