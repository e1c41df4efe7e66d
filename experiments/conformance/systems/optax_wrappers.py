"""Adapters of optax's apply_if_finite and MultiSteps, in a float32 step that leaves overflow handling to them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from subject import Subject, batch

from jaxmp.testing import StepAdapter, step_laws

WRAPPERS = optax.ApplyIfFiniteState, optax.MultiStepsState


def without_attempts(state: Any) -> Any:
    """Returns the state without the counters of attempts of the wrappers."""

    def strip(x: Any) -> Any:
        if isinstance(x, optax.ApplyIfFiniteState):
            return x.inner_state
        return x._replace(mini_step=0) if isinstance(x, optax.MultiStepsState) else x

    return jax.tree.map(strip, state, is_leaf=lambda x: isinstance(x, WRAPPERS))


def step(tx: Any, microbatches: int = 1) -> StepAdapter:
    """Returns an adapter of a least squares step with the given optimizer."""

    def init():
        params = {"b": jnp.zeros(3), "w": jnp.full((4, 3), 0.5, jnp.float32)}
        return {"params": params, "opt_state": tx.init(params)}

    @jax.jit
    def train_step(state, batch):
        def loss(params):
            return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(state["params"]), state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    return StepAdapter(init, train_step, batch(), without_attempts, microbatches=microbatches)


def subjects() -> list[Subject]:
    """Returns apply_if_finite alone, and inside a chain; MultiSteps."""
    guarded, packages = optax.apply_if_finite, ("optax",)
    decayed = optax.chain(guarded(optax.sgd(0.1), 10), optax.add_decayed_weights(-1e-2))
    scheduled = optax.chain(guarded(optax.sgd(1.0), 10), optax.scale_by_schedule(lambda n: 0.1 / (1 + n)))
    all_inside = guarded(optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(lambda n: 0.1 / (1 + n))), 10)
    return [
        Subject("optax, apply_if_finite around all, 10 errors", packages, step_laws(step(all_inside))),
        Subject("optax, apply_if_finite, 3 errors", packages, step_laws(step(guarded(optax.sgd(0.1), 3)))),
        Subject("optax, weight decay after apply_if_finite", packages, step_laws(step(decayed))),
        Subject("optax, schedule after apply_if_finite", packages, step_laws(step(scheduled))),
        Subject("optax, MultiSteps", packages, step_laws(step(optax.MultiSteps(optax.sgd(0.1), 2), 2))),
    ]
