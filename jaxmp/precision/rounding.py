"""`apply_updates`: parameters kept in half precision, trained without float32 master weights.

An update below half a unit in the last place is lost when it is rounded to nearest: 1.0 in bfloat16 plus 1e-3, however
often, is 1.0. Stochastic rounding keeps it on average, Kahan summation keeps what is lost for the next step:

    params = apply_updates(params, updates, "stochastic", key=key)

    compensation = init_compensation(params)                                   # once; a part of what is checkpointed
    params, compensation = apply_updates(params, updates, "kahan", compensation=compensation)
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError, nearest
from jaxmp.precision.formats import quantize
from jaxmp.trees import HALF, has_gradient

# Also for float16, whose smallest numbers are too large to hold what it loses itself: same memory, more range.
COMPENSATION_DTYPE = jnp.bfloat16
"""dtype of Kahan compensations"""

ROUNDINGS = ("nearest", "stochastic", "kahan")
"""the ways of `apply_updates`"""


@overload
def apply_updates(
    params: Any, updates: Any, rounding: Literal["nearest", "stochastic"] = ..., *, key: jax.Array | None = ...
) -> Any: ...
@overload
def apply_updates(
    params: Any, updates: Any, rounding: Literal["kahan"], *, key: jax.Array | None = ..., compensation: Any
) -> tuple[Any, Any]: ...
def apply_updates(
    params: Any, updates: Any, rounding: str = "nearest", *, key: jax.Array | None = None, compensation: Any = None
) -> Any:
    """`params + updates` in the dtypes of `params`; what is in half precision is summed in float32 and rounded once.

    An update of -0.0, which is what a skipped step hands out, leaves its parameter and its compensation as they are,
    to the bit. Leaves without a gradient (integers, bools, PRNG keys, float0, fp8) are not touched. Float32 and wider
    leaves are summed as they are, whatever the rounding. A sum beyond the largest number is infinite.

    Args:
      params: any pytree.
      updates: a pytree of the same structure, with updates in any dtype that may be added.
      rounding: `nearest`, ties to even; `stochastic`, to one of the two neighbours, such that the mean is the float32
        sum; or `kahan`: to nearest, and what that loses is kept in the compensation and added in the next step. It is
        kept in bfloat16, so that a step may still lose 2^-10 of a unit in the last place.
      key: PRNG key of stochastic rounding, another one in each step, the same on each replica; each leaf draws from
        a key of its own.
      compensation: the compensation of the step before, from `init_compensation` at first.

    Returns:
      The new parameters; with `kahan`, the pair of these and the new compensation.

    >>> one, update = jnp.bfloat16(1), jnp.float32(1e-3)
    >>> apply_updates(one, update)
    Array(1, dtype=bfloat16)
    >>> apply_updates(one, update, "kahan", compensation=init_compensation(one))
    (Array(1, dtype=bfloat16), Array(0.000999451, dtype=bfloat16))

    Source: Zamirai et al. 2020, Revisiting BFloat16 Training (stochastic rounding and Kahan summation of updates).
    Raises: InputError for an unknown rounding, or where the key or the compensation that it needs is missing.
    """
    if rounding not in ROUNDINGS:
        raise InputError(
            f"apply_updates: rounding={rounding!r}; expected one of {', '.join(ROUNDINGS)}"
            f"{nearest(str(rounding), ROUNDINGS)}"
        )
    if (compensation is not None) != (rounding == "kahan"):
        raise InputError(
            f"apply_updates: rounding={rounding!r} {'without' if compensation is None else 'with'} a compensation; "
            "expected one with kahan, from init_compensation(params), and none otherwise"
        )
    if rounding == "stochastic":
        if key is None:
            raise InputError(
                "apply_updates: rounding='stochastic' without a key; expected key=, a PRNG key for this step"
            )
        leaf = itertools.count()
        return jax.tree.map(lambda p, u: _add_stochastic(p, u, jax.random.fold_in(key, next(leaf))), params, updates)
    if rounding == "nearest":
        return jax.tree.map(_add_nearest, params, updates)
    pairs = jax.tree.map(_add_kahan, params, updates, compensation)
    if not jax.tree.leaves(params):  # nothing to tell a pair by
        return params, compensation
    return jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), pairs)


def init_compensation(params: Any) -> Any:
    """Kahan compensations of zero: one of the same shape, in bfloat16, for each leaf of `params` in half precision.

    Every other leaf gets a scalar 0, so that the structure is that of `params`.
    """
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, COMPENSATION_DTYPE) if _is_half(x) else jnp.zeros((), COMPENSATION_DTYPE), params
    )


def _add_nearest(param: Any, update: Any) -> Any:
    if not has_gradient(param):
        return param
    param = jnp.asarray(param)
    total = _wide(param) + _wide(update) if _is_half(param) else param + update
    return _unless_skipped(update, _rounded(total, param.dtype), param)


def _add_stochastic(param: Any, update: Any, key: jax.Array) -> Any:
    if not _is_half(param):
        return _add_nearest(param, update)
    total = quantize(_wide(param) + _wide(update), param.dtype.name, rounding="stochastic", key=key)
    return _unless_skipped(update, total.astype(param.dtype), param)


def _add_kahan(param: Any, update: Any, compensation: jax.Array) -> tuple[Any, jax.Array]:
    if not _is_half(param):
        return _add_nearest(param, update), compensation
    due = _wide(update) + _wide(compensation)
    new = _rounded(_wide(param) + due, param.dtype)
    lost = _rounded(due - (_wide(new) - _wide(param)), COMPENSATION_DTYPE)
    return _unless_skipped(update, new, param), _unless_skipped(update, lost, compensation)


def _rounded(total: jax.Array, dtype: Any) -> jax.Array:
    """`total` in `dtype`, to nearest. To half by integers: what was rounded off could else be folded away (trap T6)."""
    if dtype in HALF and total.dtype == jnp.float32:
        total = quantize(total, jnp.dtype(dtype).name)
    return total.astype(dtype)


def _unless_skipped(update: Any, new: jax.Array, old: Any) -> jax.Array:
    """`new`, but `old` where the update is -0.0. Adding would not do: it flushes subnormals, and rounds anew."""
    update = jnp.asarray(update)
    parts = (update.real, update.imag) if jnp.iscomplexobj(update) else (update,)
    return jnp.where(functools.reduce(jnp.logical_and, [(x == 0) & jnp.signbit(x) for x in parts]), old, new)


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _is_half(x: Any) -> bool:
    return hasattr(x, "dtype") and x.dtype in HALF
