"""`TrainState`: everything that persists between two steps, as one pytree of arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.precision.rounding import apply_updates, init_compensation
from jaxmp.scaling.transform import skipped_steps
from jaxmp.trees import has_gradient, strongly_typed, tree_where, upcast

ROUNDING_KEY = 2**31 - 1
"""what the key of a step is folded with for stochastic rounding"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a training run. Arrays only: the model and the optimizer are functions beside it."""

    step: jax.Array
    """attempted steps, skipped ones included; int32 scalar"""
    params: Any
    """parameters, in the policy's parameter dtype (float32: master weights)"""
    model_state: Any
    """the model's other collections, such as batch statistics; {} where there are none"""
    opt_state: Any
    """optimizer state, loss scale and skip counters included"""
    key: jax.Array
    """typed PRNG key of the run; step n draws from `fold_in(key, n)`"""
    ema: Any = None
    """exponential moving average of the parameters, in float32 or wider, or None"""
    compensation: Any = None
    """what Kahan summation has yet to add to parameters in half precision, or None"""

    @classmethod
    def create(
        cls,
        params: Any,
        tx: optax.GradientTransformation,
        *,
        key: jax.Array,
        model_state: Any = None,
        ema: bool = False,
        rounding: str = "nearest",
    ) -> TrainState:
        """A state before the first step. Its leaves are copies: no two share a buffer, so all can be donated.

        None is weakly typed, so that the step compiles once (trap T7).

        Args:
          params: the parameters.
          tx: the optimizer.
          key: typed PRNG key of the run.
          model_state: the model's other collections.
          ema: whether to keep a moving average of the parameters.
          rounding: how updates will be added, see `jaxmp.apply_updates`; `kahan` keeps a compensation.
        """
        state = cls(
            step=jnp.int32(0),
            params=params,
            model_state={} if model_state is None else model_state,
            opt_state=tx.init(params),
            key=key,
            ema=jax.tree.map(upcast, params) if ema else None,
            compensation=init_compensation(params) if rounding == "kahan" else None,
        )
        return jax.tree.map(lambda x: jnp.copy(strongly_typed(x)), state)

    def commit(
        self,
        finite: jax.Array,
        *,
        updates: Any,
        model_state: Any,
        opt_state: Any,
        ema_decay: float | None = None,
        rounding: str = "nearest",
    ) -> TrainState:
        """The state after a step: everything new where `finite`, else all as it was, to the bit, but for the count.

        Args:
          finite: bool scalar, the same on every replica.
          updates: what to add to the parameters.
          model_state, opt_state: the new ones; `opt_state` has decided for itself what to keep (see `loss_scaling`).
          ema_decay: decay of the moving average; at first less, min(decay, (1 + n) / (10 + n)) after n applied steps,
            so that the initial weights are forgotten (TensorFlow's `ExponentialMovingAverage(num_updates=n)`).
          rounding: how updates are added to parameters in half precision, see `jaxmp.apply_updates`.
        """
        params, compensation = self._add(updates, rounding)
        params = tree_where(finite, params, self.params)
        ema = self.ema
        if ema is not None and ema_decay is not None:
            applied = (self.step - skipped_steps(self.opt_state)).astype(jnp.float32)
            decay = jnp.minimum(jnp.float32(ema_decay), (1 + applied) / (10 + applied))
            ema = tree_where(finite, jax.tree.map(lambda e, p: _average(e, p, decay), ema, params), ema)
        return TrainState(
            step=self.step + 1,
            params=params,
            model_state=tree_where(finite, model_state, self.model_state),
            opt_state=opt_state,
            key=self.key,
            ema=ema,
            compensation=tree_where(finite, compensation, self.compensation),
        )

    def _add(self, updates: Any, rounding: str) -> tuple[Any, Any]:
        if rounding == "kahan":
            return apply_updates(self.params, updates, "kahan", compensation=self.compensation)
        if rounding == "stochastic":
            # A stream of its own beside the model's; of the run's key, so that all replicas round alike.
            key = jax.random.fold_in(jax.random.fold_in(self.key, self.step), ROUNDING_KEY)
            return apply_updates(self.params, updates, "stochastic", key=key), None
        return apply_updates(self.params, updates), None


def _average(average: jax.Array, param: jax.Array, decay: jax.Array) -> jax.Array:
    return average + (1 - decay) * (upcast(param) - average) if has_gradient(param) else param
