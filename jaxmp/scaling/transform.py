"""`loss_scaling`: an optimizer as one transaction under a loss scale, and the readers of what it keeps.

    tx = loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), DynamicScaler())
    opt_state = tx.init(params)
    grads = jax.grad(lambda p: scale_loss(loss_fn(p), opt_state))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)

On a step whose gradients or loss are not finite, nothing that `inner` keeps changes (moments, counts, schedules), and
the updates change no parameter. All state is in `opt_state`, so it is checkpointed with it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp.scaling.scalers import DynamicScaler, Scaler
from jaxmp.trees import has_gradient, strongly_typed, tree_where, upcast

OVERWRITTEN = "_overwrite_with_gradient"
"""Flax's name for what is no parameter but stands among them: fp8 scales and histories, whose "gradient" is their next
value, and as such neither scaled nor an optimizer's business"""

SMALL = 2**14
"""numbers in a gradient leaf up to which it is searched for inf and NaN together with others of its shape"""
TOGETHER = 16
"""most leaves that are searched together: a kernel takes only so many"""


class LossScalingState(NamedTuple):
    """The state of `loss_scaling`, a part of the optimizer state."""

    inner_state: Any
    """the state of the inner optimizer"""
    scaler: Any
    """the state of the scaler; its `scale` is the one that the next loss is multiplied by"""
    skipped: jax.Array
    """steps skipped so far, int32"""
    consecutive_skips: jax.Array
    """steps skipped in a row up to now, int32; 0 after a step that was applied"""
    skipped_scale: jax.Array
    """the loss scale of the last skipped step, float32; of the first step, if none was skipped"""


def loss_scaling(
    inner: optax.GradientTransformation, scaler: Scaler | None = None
) -> optax.GradientTransformationExtraArgs:
    """`inner` under a loss scale: takes scaled gradients, unscales, checks, and updates all or nothing.

    `inner` sees unscaled gradients and parameters in float32 (or wider, where they are), whatever dtype they came in,
    so that its state never changes dtype; put everything that changes gradients into it: clipping, weight decay,
    accumulation (`optax.MultiSteps`), schedules. Leaves that have no gradient (integers, bools, PRNG keys, float0, fp8,
    and fp8 metadata under Flax's `_overwrite_with_gradient`) are hidden from it, and their updates are zero.

    `update(scaled_grads, state, params=None, value=None, overflowed=None, **extra)` returns float32 updates (on a
    skipped step: -0.0, the number whose addition changes nothing) and the new state. `value` is the unscaled loss;
    given, it has to be finite too, and it goes on to `inner`, like every other extra argument. `overflowed` tells, of
    finite gradients, that a part was left out of them for not being finite: the step is applied, and the scaler reacts
    as to an overflow.

    With `optax.MultiSteps` as `inner`, a microbatch that overflows is left out and another one takes its place; the
    scale may change within a window, since each microbatch is unscaled by its own.

    Args:
      inner: any optax transformation.
      scaler: how the scale reacts; `DynamicScaler()` by default.

    Source: the order of operations is Micikevicius et al. 2018, section 3.2.
    """
    scaler = DynamicScaler() if scaler is None else scaler
    if not isinstance(inner, optax.GradientTransformation):  # optax.MultiSteps has init and update, and is none
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LossScalingState:
        inner_state = jax.tree.map(strongly_typed, inner.init(inner_view(params)))
        if find_state(inner_state) is not None:
            raise ValueError("loss_scaling inside loss_scaling: gradients would be unscaled twice; use one")
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
        finite = all_finite(grads)
        if value is not None:
            finite &= jnp.all(jnp.isfinite(value))
            extra["value"] = value
        scale_fits = finite if overflowed is None else finite & ~overflowed
        grad_max = jnp.where(scale_fits, largest_magnitude(grads).astype(jnp.float32), jnp.inf)  # computed where used
        # The scale of this step, not the one that `scaler.update` returns; a power of two, so 1/S is exact.
        unscale = 1 / state.scaler.scale
        grads = jax.tree.map(lambda g: g * unscale.astype(g.dtype), grads)
        inner_params = None if params is None else inner_view(params)
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


def scale_loss(loss: jax.Array, opt_state: Any) -> jax.Array:
    """float32 `loss * S`; the float32 loss itself where `opt_state` holds no scaler. Differentiate this."""
    loss = jnp.asarray(loss, jnp.float32)
    state = find_state(opt_state)
    return loss if state is None else loss * state.scaler.scale


def loss_scale(opt_state: Any) -> jax.Array:
    """The scale of the next loss, float32 scalar; 1 where `opt_state` holds no scaler."""
    state = find_state(opt_state)
    return jnp.float32(1) if state is None else state.scaler.scale


def last_step_finite(opt_state: Any) -> jax.Array:
    """Whether the last step was applied, bool scalar; True where `opt_state` holds no scaler, or before any step."""
    return consecutive_skips(opt_state) == 0


def skipped_steps(opt_state: Any) -> jax.Array:
    """Steps skipped so far, int32 scalar."""
    state = find_state(opt_state)
    return jnp.int32(0) if state is None else state.skipped


def consecutive_skips(opt_state: Any) -> jax.Array:
    """Steps skipped in a row up to now, int32 scalar."""
    state = find_state(opt_state)
    return jnp.int32(0) if state is None else state.consecutive_skips


def find_state(opt_state: Any) -> LossScalingState | None:
    """The `LossScalingState` wherever it is nested in `opt_state`, or None.

    Raises: ValueError where there are several, since then no one scale belongs to the loss.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, LossScalingState))
    found = [leaf for leaf in leaves if isinstance(leaf, LossScalingState)]
    if len(found) > 1:
        raise ValueError(f"opt_state holds {len(found)} loss scalers; a loss has one scale: use one loss_scaling")
    return found[0] if found else None


def _is_trained(path: Any, x: Any) -> bool:
    """Whether a leaf is a parameter: what Flax overwrites by its gradient holds scales and histories."""
    return has_gradient(x) and not any(getattr(key, "key", getattr(key, "name", None)) == OVERWRITTEN for key in path)


def inner_view(tree: Any) -> Any:
    """What the inner optimizer sees of a tree: float32 or wider; a scalar 0 in the place of a leaf without a gradient.

    A scalar rather than a hole: masks and labels that the user made for the whole tree still fit it.
    """

    def view(path: Any, x: Any) -> jax.Array:
        return upcast(x) if _is_trained(path, x) else jnp.zeros((), jnp.float32)

    return jax.tree_util.tree_map_with_path(view, tree)


def _outer_update(path: Any, update: jax.Array, grad: Any, like: Any, finite: jax.Array) -> Any:
    if _is_trained(path, grad):
        nothing = complex(-0.0, -0.0) if jnp.iscomplexobj(update) else -0.0
        return jnp.where(finite, update, jnp.asarray(nothing, update.dtype))
    # float0, the gradient of an integer, cannot be added to one: zeros like the parameter can. To a key nothing can be.
    dtype = jnp.result_type(like)
    if dtype == jax.dtypes.float0 or jnp.issubdtype(dtype, jax.dtypes.extended):
        return grad
    return jnp.full_like(like, -0.0) if jnp.issubdtype(dtype, jnp.inexact) else jnp.zeros_like(like)


def all_finite(grads: Any) -> jax.Array:
    """Whether no value of any leaf is infinite or NaN, bool scalar.

    Not by the largest magnitude: of 2**12 float32 and more, XLA:CPU's maximum takes no notice of a NaN (jaxlib 0.10 to
    0.12).
    """
    groups = [[g] for g in jax.tree.leaves(grads) if g.size > SMALL]
    by_shape: dict[Any, list[jax.Array]] = {}
    for g in jax.tree.leaves(grads):
        if g.size <= SMALL:
            by_shape.setdefault(g.shape, []).append(g)
    # Small leaves of one shape together, since a reduction of each would be a kernel of each.
    groups += [of[i : i + TOGETHER] for of in by_shape.values() for i in range(0, len(of), TOGETHER)]
    found = [jnp.all(functools.reduce(jnp.logical_and, map(jnp.isfinite, group))) for group in groups]
    return jnp.all(jnp.stack(found)) if found else jnp.bool_(True)


def largest_magnitude(grads: Any) -> jax.Array:
    """The largest |g| of all leaves, float32 or wider scalar; 0 for an empty tree. Of finite ones: see `all_finite`."""
    largest = [jnp.max(jnp.abs(g), initial=0.0) for g in jax.tree.leaves(grads)]
    return jnp.max(jnp.stack(largest)) if largest else jnp.float32(0)
