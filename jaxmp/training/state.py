"""`TrainState`: everything that persists from one step to the next, as one pytree of arrays."""

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
"""folded into the key of a step to get the key of stochastic rounding"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a training run. It holds only arrays; the model and the optimizer are separate functions."""

    step: jax.Array
    """number of attempted steps, including skipped ones; int32 scalar"""
    params: Any
    """parameters, in the parameter dtype of the policy (float32: master weights)"""
    model_state: Any
    """other variables of the model, such as batch statistics; {} if there are none"""
    opt_state: Any
    """optimizer state, including loss scale and skip counters"""
    key: jax.Array
    """typed PRNG key of the run; step n uses `fold_in(key, n)`"""
    ema: Any = None
    """exponential moving average of the parameters, float32 or wider; None if none is kept"""
    compensation: Any = None
    """Kahan compensation of half-precision parameters, see `jaxmp.apply_updates`; None without Kahan summation"""

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
        """Creates the state before the first step.

        All leaves are copies: no two share a buffer, so that all can be donated. None of them is weakly typed, so that
        the step compiles only once (trap T7).

        Args:
          params: the parameters, any pytree.
          tx: the optimizer.
          key: typed PRNG key of the run, such as `jax.random.key(0)`.
          model_state: other variables of the model, such as batch statistics.
          ema: whether to keep a moving average of the parameters.
          rounding: how updates will be added, see `jaxmp.apply_updates`; `kahan` adds a compensation to the state.
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
        """Returns the state after a step.

        If `finite` is false, parameters, model state, moving average and compensation keep their values to the bit.
        `step` is always incremented, and `opt_state` is always replaced.

        Args:
          finite: whether the step is applied, bool scalar, the same on every replica.
          updates: updates to add to the parameters, as returned by the optimizer.
          model_state: the new model state.
          opt_state: the new optimizer state; `loss_scaling` has already kept the old values in it on a skipped step.
          ema_decay: decay of the moving average. After n applied steps it is min(ema_decay, (1 + n) / (10 + n)), so
            that the initial weights are forgotten sooner (as TensorFlow's `ExponentialMovingAverage(num_updates=n)`).
          rounding: how updates are added to half-precision parameters, see `jaxmp.apply_updates`.
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
            # Another stream than the model's; from the key of the run, so that all replicas round alike.
            key = jax.random.fold_in(jax.random.fold_in(self.key, self.step), ROUNDING_KEY)
            return apply_updates(self.params, updates, "stochastic", key=key), None
        return apply_updates(self.params, updates), None


def _average(average: jax.Array, param: jax.Array, decay: jax.Array) -> jax.Array:
    return average + (1 - decay) * (upcast(param) - average) if has_gradient(param) else param
