"""`TrainState`: everything that persists from one step to the next, as one pytree of arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.errors import InputError
from jaxmp.html.elements import Elements
from jaxmp.precision.rounding import apply_updates, init_compensation
from jaxmp.scaling.transform import LossScalingState, skipped_steps
from jaxmp.text_table import table
from jaxmp.training.objective import (
    Objective,
    Objectives,
    check_objectives,
    fill,
    restrict,
    trained_by_any,
    trained_view,
)
from jaxmp.training.pruning import masked, masks_of
from jaxmp.trees import by_path, has_gradient, strongly_typed, tree_where, upcast

ROUNDING_KEY = 2**31 - 1
"""folded into the key of a step to get the key of stochastic rounding"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState:
    """The state of a training run. It holds only arrays; the model and the optimizer are separate functions."""

    step: jax.Array
    """number of attempted steps, including skipped ones; int32 scalar"""
    params: Any
    """parameters, in the parameter dtype of the policy (float32: master weights)"""
    model_state: Any
    """other variables of the model, such as batch statistics; {} if there are none"""
    opt_state: Any
    """optimizer state, including loss scale and skip counters; of several objectives, a dict of such states by name"""
    key: jax.Array
    """typed PRNG key of the run; step n uses `fold_in(key, n)`"""
    ema: Any = None
    """exponential moving average of the parameters, float32 or wider; None if none is kept, and in place of each leaf
    that no objective averages"""
    compensation: Any = None
    """Kahan compensation of half-precision parameters, see `jaxmp.apply_updates`; None without Kahan summation, and in
    place of each leaf that no objective trains"""

    @classmethod
    def create(
        cls,
        params: Any,
        tx: optax.GradientTransformation | Objective | Objectives,
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
          tx: the optimizer; or an `Objective`, or several by name, which keep optimizer state,
            compensation and average only of what they train.
          key: typed PRNG key of the run, such as `jax.random.key(0)`.
          model_state: other variables of the model, such as batch statistics.
          ema: whether to keep a moving average of the parameters; an `Objective` with an `ema_decay` keeps one too.
          rounding: how updates will be added, see `jaxmp.apply_updates`; `kahan` adds a compensation to the state.

        Raises:
          InputError: a pattern in what an objective trains matches no parameter; one of several objectives has a `tx`
            that is not made by `loss_scaling`, so that its skipped steps could not be told.
        """
        if not isinstance(tx, Objective | Mapping):
            opt_state, trained, averaged = tx.init(params), params, params if ema else None
        else:
            several = not isinstance(tx, Objective)
            objectives: Objectives = tx if not isinstance(tx, Objective) else {"": tx}
            if several:
                check_objectives(objectives)
            states = {name: of.tx.init(trained_view(params, of.trains)) for name, of in objectives.items()}
            unscaled = [name for name, state in states.items() if not isinstance(state, LossScalingState)]
            if several and unscaled:
                raise InputError(f"objective {unscaled[0]!r}: expected a tx made by loss_scaling(optimizer, scaler)")
            opt_state = states if several else states[""]
            trained = trained_by_any(params, [of.trains for of in objectives.values()])
            with_average = [of.trains for of in objectives.values() if ema or of.ema_decay is not None]
            averaged = trained_by_any(params, with_average) if with_average else None
        state = cls(
            step=jnp.int32(0),
            params=params,
            model_state={} if model_state is None else model_state,
            opt_state=opt_state,
            key=key,
            ema=None if averaged is None else jax.tree.map(upcast, averaged),
            compensation=init_compensation(trained) if rounding == "kahan" else None,
        )
        return jax.tree.map(lambda x: jnp.copy(strongly_typed(x)), state)

    def __repr__(self) -> str:
        """Shows the shape and dtype of each leaf by path; no values."""
        rows = [(path, f"{leaf.dtype}{list(leaf.shape)}") for path, leaf in self._leaves()]
        return "\n".join([self._title(), table(rows, indent=2)])

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        rows = [(path, str(leaf.dtype), " x ".join(map(str, leaf.shape)) or "one") for path, leaf in self._leaves()]
        found = Elements()
        found.paragraph(self._title())
        found.table(("leaf", "dtype", "shape"), rows)
        return found.cell()

    def _title(self) -> str:
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(self.params) if hasattr(x, "shape"))
        return f"TrainState of {count:,} parameters"

    def _leaves(self) -> list[tuple[str, Any]]:
        fields = [{field.name: getattr(self, field.name)} for field in dataclasses.fields(self)]
        return [(path, leaf) for of in fields for path, leaf in by_path(of).items() if hasattr(leaf, "shape")]

    @property
    def averaged_params(self) -> Any:
        """The weights to evaluate: the moving average, and the parameters themselves where none is kept."""
        return self.params if self.ema is None else fill(self.ema, self.params)

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
          updates: updates to add to the parameters, as returned by the optimizer; None where nothing is trained.
          model_state: the new model state.
          opt_state: the new optimizer state; `loss_scaling` has already kept the old values in it on a skipped step.
          ema_decay: decay of the moving average. After n applied steps it is min(ema_decay, (1 + n) / (10 + n)), so
            that the initial weights are forgotten sooner (as TensorFlow's `ExponentialMovingAverage(num_updates=n)`).
          rounding: how updates are added to half-precision parameters, see `jaxmp.apply_updates`.
        """
        state = self._apply(
            finite,
            updates=updates,
            model_state=model_state,
            masks=masks_of(opt_state),
            applied=lambda: self.step - skipped_steps(self.opt_state),
            key=lambda: jax.random.fold_in(self.key, self.step),
            ema_decay=ema_decay,
            rounding=rounding,
        )
        return dataclasses.replace(state, step=self.step + 1, opt_state=opt_state)

    def commit_objective(
        self,
        name: str,
        finite: jax.Array,
        *,
        updates: Any,
        model_state: Any,
        opt_state: Any,
        attempts: jax.Array,
        key: jax.Array,
        ema_decay: float | None = None,
        rounding: str = "nearest",
    ) -> TrainState:
        """Returns the state after one of several objectives; `step` is not incremented. For the rest see `commit`.

        Args:
          name: of the objective.
          finite: whether its step is applied; otherwise what it trains and the model state keep their values.
          updates: updates of what it trains, and None elsewhere.
          model_state: the model state that it leaves.
          opt_state: its own new optimizer state.
          attempts: how often it ran before, int32 scalar.
          key: its key of this step.
          ema_decay: decay of the moving average of what it trains.
          rounding: see `jaxmp.apply_updates`.
        """
        state = self._apply(
            finite,
            updates=updates,
            model_state=model_state,
            masks=self._joined_masks({**self.opt_state, name: opt_state}, updates),
            applied=lambda: attempts - skipped_steps(self.opt_state[name]),
            key=lambda: key,
            ema_decay=ema_decay,
            rounding=rounding,
        )
        return dataclasses.replace(state, opt_state={**self.opt_state, name: opt_state})

    def _joined_masks(self, opt_states: Mapping[str, Any], updates: Any) -> Any:
        """The masks of several objectives, of what one with these `updates` trains; None if there are none.

        What one of them pruned, another that trains it too must not bring back.
        """
        masks = [found for found in map(masks_of, opt_states.values()) if found is not None]

        def joined(_: Any, update: Any, *own: Any) -> Any:
            known = [] if update is None else [mask for mask in own if mask is not None]
            return functools.reduce(jnp.logical_and, known) if known else None

        return jax.tree.map(joined, self.params, updates, *masks) if masks else None

    def _apply(
        self,
        finite: jax.Array,
        *,
        updates: Any,
        model_state: Any,
        masks: Any,
        applied: Callable[[], jax.Array],
        key: Callable[[], jax.Array],
        ema_decay: float | None,
        rounding: str,
    ) -> TrainState:
        """The state with the updates added; `applied` gives the number of steps applied before, `key` that of the step.

        Both are called only where they are needed. Where `masks` prunes a weight, its parameter, average and
        compensation are zero: the update alone leaves what the compensation adds, and the average what it remembers.
        """
        compensation = self.compensation
        if rounding == "kahan":
            own = restrict(compensation, updates)
            params, own = apply_updates(self.params, updates, "kahan", compensation=own)
            compensation = fill(own, compensation)
        elif rounding == "stochastic":
            # Another stream than the model's; from the key of the run, so that all replicas round alike.
            rounding_key = jax.random.fold_in(key(), ROUNDING_KEY)
            params = apply_updates(self.params, updates, "stochastic", key=rounding_key)
        else:
            params = apply_updates(self.params, updates)
        params = masked(tree_where(finite, params, self.params), masks)
        ema = self.ema
        if ema is not None and ema_decay is not None:
            count = applied().astype(jnp.float32)
            decay = jnp.minimum(jnp.float32(ema_decay), (1 + count) / (10 + count))
            before = restrict(ema, updates)
            after = jax.tree.map(lambda e, p: _average(e, p, decay), before, restrict(params, before))
            ema = fill(masked(tree_where(finite, after, before), masks), ema)
        return dataclasses.replace(
            self,
            params=params,
            model_state=tree_where(finite, model_state, self.model_state),
            ema=ema,
            compensation=masked(tree_where(finite, compensation, self.compensation), masks),
        )


def _average(average: jax.Array, param: jax.Array, decay: jax.Array) -> jax.Array:
    return average + (1 - decay) * (upcast(param) - average) if has_gradient(param) else param
