"""`loss_scaling`: wraps an optimizer in loss scaling, and functions that read its state from `opt_state`.

    tx = loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), DynamicScaler())
    opt_state = tx.init(params)
    grads = jax.grad(lambda p: scale_loss(loss_fn(p), opt_state))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)

A step whose gradients or loss are not finite is skipped: the state of the inner optimizer (moments, counts, schedules)
does not change, and adding the updates does not change the parameters. All state is in `opt_state`, and is checkpointed
with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from jaxmp.errors import InputError
from jaxmp.scaling.scalers import DynamicScaler, Scaler
from jaxmp.trees import has_gradient, strongly_typed, tree_where, upcast

OVERWRITTEN = "_overwrite_with_gradient"
"""Flax's name for fp8 scales and histories, which are stored among the parameters. Their "gradient" is their next
value, so it is neither unscaled nor passed to an optimizer."""

TOGETHER = 16
"""The largest number of gradient leaves that are checked for inf and NaN together: a kernel takes so many operands."""


class LossScalingState(NamedTuple):
    """The optimizer state of `loss_scaling`."""

    inner_state: Any
    """state of the inner optimizer"""
    scaler: Any
    """state of the scaler; its `scale` multiplies the loss of the next step"""
    skipped: jax.Array
    """number of steps skipped so far, int32 scalar"""
    consecutive_skips: jax.Array
    """number of steps skipped in a row up to now, int32 scalar; 0 after a step that was applied"""
    skipped_scale: jax.Array
    """the loss scale of the last skipped step, float32 scalar; of the first step if none was skipped"""


def loss_scaling(
    inner: optax.GradientTransformation, scaler: Scaler | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer in loss scaling: unscales gradients, checks that they are finite, and skips the step if not.

    `inner` receives unscaled gradients and parameters in float32 (float64 stays float64), whatever their dtypes, so
    that its state never changes dtype. Everything that changes gradients belongs inside `inner`: clipping, weight
    decay, accumulation (`optax.MultiSteps`), schedules. Leaves without a gradient (integers, bools, PRNG keys, float0,
    fp8, and fp8 metadata under Flax's `_overwrite_with_gradient`) are replaced by a scalar 0 for `inner`, and their
    updates are zero.

    A gradient that `inner` does not read, such as that of a leaf frozen by `optax.set_to_zero`, has no say: even if it
    is not finite, the step is applied (trap T26).

    The returned transformation has `update(scaled_grads, state, params=None, value=None, overflowed=None, **extra)`,
    which returns the updates and the new state. The updates are float32; on a skipped step they are -0.0, since adding
    -0.0 changes no number. Its optional arguments are:

    - `value`: the unscaled loss. If it is not finite, the step is skipped. It is passed on to `inner`, like all extra
      arguments.
    - `overflowed`: bool scalar; true if a part that was not finite has been left out of the gradients, such as a
      microbatch. If the gradients are finite, the step is applied, but the scaler reacts as to an overflow.

    With `optax.MultiSteps` as `inner`, a microbatch that overflows is skipped and the next one takes its place. The
    scale may change between the microbatches of a step, since each is unscaled by the scale it was computed with.

    Args:
      inner: any optax transformation.
      scaler: how the scale reacts to overflows; `DynamicScaler()` by default.

    Returns:
      An optax transformation; its state is a `LossScalingState`.

    Raises:
      InputError: `inner` is no optax transformation, or `scaler` no Scaler; in `init`, `inner` already contains a
        `loss_scaling`.

    Source: the order of operations is Micikevicius et al. 2018, section 3.2.
    """
    scaler = DynamicScaler() if scaler is None else scaler
    if isinstance(scaler, type) or not all(callable(getattr(scaler, name, None)) for name in ("init", "update")):
        raise InputError(f"loss_scaling: scaler = {scaler!r:.60}: expected a Scaler, such as DynamicScaler()")
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise InputError(f"loss_scaling: {inner!r:.60}: expected an optax transformation, such as optax.adam(1e-3)")
    if not isinstance(inner, optax.GradientTransformation):  # optax.MultiSteps has init and update, and is none
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LossScalingState:
        inner_state = jax.tree.map(strongly_typed, inner.init(inner_view(params)))
        if find_state(inner_state) is not None:
            raise InputError("loss_scaling inside loss_scaling: gradients would be unscaled twice; use one")
        scaler_state = scaler.init()
        return LossScalingState(
            inner_state=inner_state,
            scaler=scaler_state,
            skipped=jnp.array(0, jnp.int32),
            consecutive_skips=jnp.array(0, jnp.int32),
            skipped_scale=jnp.copy(scaler_state.scale),
        )

    def update(
        scaled_grads: Any,
        state: LossScalingState,
        params: Any = None,
        *,
        value: Any = None,
        overflowed: Any = None,
        **extra: Any,
    ) -> tuple[Any, LossScalingState]:
        grads = inner_view(scaled_grads)
        inner_params = None if params is None else inner_view(params)
        if value is not None:
            extra["value"] = value
        read = read_leaves(lambda g: inner.update(g, state.inner_state, inner_params, **extra), grads)
        finite = all_finite(read)
        if value is not None:
            finite &= jnp.all(jnp.isfinite(value))
        scale_fits = finite if overflowed is None else finite & ~overflowed
        grad_max = jnp.where(scale_fits, largest_magnitude(read).astype(jnp.float32), jnp.inf)  # computed where used
        # The scale of this step, not the one that `scaler.update` returns; a power of two, so 1/S is exact.
        unscale = 1 / state.scaler.scale
        grads = jax.tree.map(lambda g: g * unscale.astype(g.dtype), grads)
        updates, inner_state = inner.update(grads, state.inner_state, inner_params, **extra)

        like = scaled_grads if params is None else params
        updates = jax.tree_util.tree_map_with_path(
            lambda path, u, g, x: _outer_update(path, u, g, x, finite), updates, scaled_grads, like
        )
        return updates, LossScalingState(
            inner_state=tree_where(finite, inner_state, state.inner_state),
            scaler=scaler.update(state.scaler, scale_fits, grad_max),
            skipped=state.skipped + (~finite).astype(jnp.int32),
            consecutive_skips=jnp.where(finite, 0, state.consecutive_skips + 1),
            skipped_scale=jnp.where(finite, state.skipped_scale, state.scaler.scale),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def read_leaves(function: Callable[[Any], Any], tree: Any) -> list[jax.Array]:
    """Returns the leaves of `tree` on whose values the result of `function(tree)` may depend.

    All of them if `function` cannot be traced.
    """
    leaves = jax.tree.leaves(tree)
    try:
        jaxpr = jax.make_jaxpr(function)(tree).jaxpr
    except Exception:  # one that works with concrete numbers only
        return leaves
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [leaf for leaf, is_used in zip(leaves, used, strict=True) if is_used]


def scale_loss(loss: jax.Array, opt_state: Any) -> jax.Array:
    """Multiplies the loss by the loss scale in `opt_state`; differentiate the result.

    Args:
      loss: the loss, scalar of any float dtype.
      opt_state: an optimizer state with a `LossScalingState` anywhere in it. Without one, the loss is not scaled.

    Returns:
      The scaled loss, float32.

    Raises:
      InputError: `opt_state` is that of several objectives; expected the state of one.
    """
    loss = jnp.asarray(loss, jnp.float32)
    state = find_state(opt_state)
    return loss if state is None else loss * state.scaler.scale


def loss_scale(opt_state: Any) -> jax.Array:
    """Returns the loss scale of the next step, float32 scalar; 1 if `opt_state` holds no scaler.

    Raises:
      InputError: `opt_state` is that of several objectives, which have a scale each: expected `opt_state[name]`.
    """
    state = find_state(opt_state)
    return jnp.float32(1) if state is None else state.scaler.scale


def last_step_finite(opt_state: Any) -> jax.Array:
    """Returns whether the last step was applied, bool scalar; True before the first step or without a scaler.

    Of several objectives: whether the last attempt of each was applied.
    """
    return consecutive_skips(opt_state) == 0


def skipped_steps(opt_state: Any) -> jax.Array:
    """Returns the number of steps skipped so far, int32 scalar; 0 if `opt_state` holds no scaler.

    Of several objectives: the sum over them.
    """
    states = _states(opt_state)
    return sum((state.skipped for state in states[1:]), states[0].skipped) if states else jnp.int32(0)


def consecutive_skips(opt_state: Any) -> jax.Array:
    """Returns the number of steps skipped in a row up to now, int32 scalar; 0 if `opt_state` holds no scaler.

    Of several objectives: the largest, each counted over its own attempts.
    """
    in_a_row = [state.consecutive_skips for state in _states(opt_state)]
    return functools.reduce(jnp.maximum, in_a_row) if in_a_row else jnp.int32(0)


def has_objectives(opt_state: Any) -> bool:
    """Whether `opt_state` is that of several objectives: a dict by name of states with one loss scaler each."""
    if not isinstance(opt_state, dict) or len(opt_state) < 2:
        return False
    return all(isinstance(state, LossScalingState) for state in opt_state.values())


def _states(opt_state: Any) -> list[LossScalingState]:
    """The state of each objective; or the one state of the single objective, if there is one."""
    if has_objectives(opt_state):
        return [*opt_state.values()]
    state = find_state(opt_state)
    return [] if state is None else [state]


def find_state(opt_state: Any) -> LossScalingState | None:
    """Finds the `LossScalingState` anywhere inside `opt_state`; returns None if there is none.

    Raises:
      InputError: `opt_state` holds several of them, so that the loss has no single scale.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, LossScalingState))
    found = [leaf for leaf in leaves if isinstance(leaf, LossScalingState)]
    if has_objectives(opt_state):
        names = ", ".join(map(repr, opt_state))
        raise InputError(
            f"opt_state holds the states of several objectives: {names}; expected that of one, opt_state[name]"
        )
    if len(found) > 1:
        raise InputError(f"opt_state holds {len(found)} loss scalers; a loss has one scale: use one loss_scaling")
    return found[0] if found else None


def _is_trained(path: Any, x: Any) -> bool:
    """Whether a leaf is a trained parameter, rather than fp8 metadata that Flax overwrites with its gradient."""
    return has_gradient(x) and not any(getattr(key, "key", getattr(key, "name", None)) == OVERWRITTEN for key in path)


def inner_view(tree: Any) -> Any:
    """Converts a tree of gradients or parameters to what the inner optimizer receives.

    Leaves are cast to float32 (float64 stays float64); a leaf without a gradient becomes a scalar 0. The structure
    stays the same, so that masks and labels for the whole tree still fit.
    """

    def view(path: Any, x: Any) -> jax.Array:
        return upcast(x) if _is_trained(path, x) else jnp.zeros((), jnp.float32)

    return jax.tree_util.tree_map_with_path(view, tree)


def _outer_update(path: Any, update: jax.Array, grad: Any, like: Any, finite: jax.Array) -> Any:
    if _is_trained(path, grad):
        nothing = complex(-0.0, -0.0) if jnp.iscomplexobj(update) else -0.0
        return jnp.where(finite, update, jnp.asarray(nothing, update.dtype))
    # A float0 gradient cannot be added to its integer parameter, but zeros can. Nothing can be added to a PRNG key.
    dtype = jnp.result_type(like)
    if dtype == jax.dtypes.float0 or jnp.issubdtype(dtype, jax.dtypes.extended):
        return grad
    return jnp.full_like(like, -0.0) if jnp.issubdtype(dtype, jnp.inexact) else jnp.zeros_like(like)


def all_finite(grads: Any) -> jax.Array:
    """Returns whether every element of every leaf is finite, bool scalar.

    Checking the largest magnitude would not be enough: XLA:CPU's maximum over 2**12 or more float32 elements ignores
    NaN (jaxlib 0.10 to 0.12; trap T18).
    """
    alike: dict[Any, list[jax.Array]] = {}
    for g in jax.tree.leaves(grads):
        alike.setdefault((g.shape, getattr(jax.typeof(g), "sharding", None)), []).append(g)
    # Leaves of one shape are checked together, since each reduction is a kernel of its own, or two.
    groups = [of[i : i + TOGETHER] for of in alike.values() for i in range(0, len(of), TOGETHER)]
    found = [_all(functools.reduce(jnp.logical_and, map(jnp.isfinite, group))) for group in groups]
    return jnp.all(jnp.stack(found)) if found else jnp.bool_(True)


def _all(x: jax.Array) -> jax.Array:
    """`jnp.all(x)`, of a matrix by columns first: six to eight times as fast on a CPU, where XLA vectorises only that.

    Then by another reduction, the dual, which XLA does not merge with the first into one over both dimensions.
    """
    return ~jnp.any(~jnp.all(x, axis=0)) if x.ndim == 2 else jnp.all(x)


def largest_magnitude(grads: Any) -> jax.Array:
    """Returns the largest magnitude of all leaves, scalar, float32 or wider; 0 for an empty tree.

    Meaningful only if all values are finite: XLA:CPU's maximum ignores NaN (see `all_finite`).
    """
    largest = [jnp.max(jnp.abs(g), initial=0.0) for g in jax.tree.leaves(grads)]
    return jnp.max(jnp.stack(largest)) if largest else jnp.float32(0)
