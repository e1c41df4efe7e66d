"""`apply_updates`: adds updates to half-precision parameters, for training without float32 master weights.

Rounding to nearest loses every update below half a unit in the last place: adding 1e-3 to 1.0 in bfloat16 gives 1.0, no
matter how often it is repeated. Stochastic rounding preserves such updates on average. Kahan summation stores what each
step loses and adds it in the next:

    params = apply_updates(params, updates, "stochastic", key=key)

    compensation = init_compensation(params)                                   # once; checkpoint it with the parameters
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

# For float16 parameters too: float16's smallest numbers are too large to hold its own rounding errors, and bfloat16 has
# more range in the same memory.
COMPENSATION_DTYPE = jnp.bfloat16
"""dtype of Kahan compensations"""

ROUNDINGS = ("nearest", "stochastic", "kahan")
"""the values of `rounding` that `apply_updates` accepts"""


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
    """Adds `updates` to `params` and returns the sums in the dtypes of `params`.

    Half-precision parameters are summed in float32, and the sum is rounded once. Float32 and wider parameters are added
    in their own dtype, whatever `rounding` is. A sum beyond the largest number of the dtype becomes infinite. Leaves
    without a gradient (integers, bools, PRNG keys, float0, fp8) are returned unchanged. An update of -0.0, which
    `loss_scaling` returns for a skipped step, leaves its parameter and its compensation unchanged to the bit. So does
    a None in place of an update, whose parameter has no compensation but None.

    Args:
      params: any pytree.
      updates: a pytree of the same structure; its dtypes may differ from those of `params`.
      rounding: `nearest` rounds ties to even. `stochastic` rounds to one of the two neighbours, such that the mean is
        the float32 sum. `kahan` rounds to nearest, stores the rounding error in the compensation, and adds it in the
        next step. The compensation is bfloat16, so a step may still lose 2^-10 of a unit in the last place.
      key: PRNG key of stochastic rounding; pass a new one in each step, and the same one on all replicas. The place of
        each leaf in `params` is folded in.
      compensation: the compensation that the previous step returned; in the first step, `init_compensation(params)`.

    Returns:
      The new parameters; with `kahan`, the pair (new parameters, new compensation).

    >>> one, update = jnp.bfloat16(1), jnp.float32(1e-3)
    >>> apply_updates(one, update)
    Array(1, dtype=bfloat16)
    >>> apply_updates(one, update, "kahan", compensation=init_compensation(one))
    (Array(1, dtype=bfloat16), Array(0.000999451, dtype=bfloat16))

    Source: Zamirai et al. 2020, Revisiting BFloat16 Training (stochastic rounding and Kahan summation of updates).
    Raises:
      InputError: `rounding` is unknown, `stochastic` without a key, `kahan` without a compensation, or a compensation
        without `kahan`.
    """
    if rounding not in ROUNDINGS:
        raise InputError(
            f"apply_updates: rounding={rounding!r}; expected one of {', '.join(ROUNDINGS)}"
            f"{nearest(str(rounding), ROUNDINGS)}"
        )
    if (compensation is not None) != (rounding == "kahan"):
        raise InputError(
            f"apply_updates: rounding={rounding!r} {'without' if compensation is None else 'with'} a compensation; "
            "expected init_compensation(params) with kahan, and no compensation otherwise"
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
    whole, params = params, jax.tree.map(lambda p, u: None if u is None else p, params, updates)
    if not jax.tree.leaves(params):  # transpose needs at least one leaf
        return whole, compensation
    pairs = jax.tree.map(_add_kahan, params, updates, compensation)
    params, compensation = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), pairs)
    return jax.tree.map(lambda p, new: p if new is None else new, whole, params), compensation


def init_compensation(params: Any) -> Any:
    """Creates the Kahan compensation before the first step: bfloat16 zeros with the shape of each half-precision leaf.

    Other leaves get a scalar 0, so that the result has the structure of `params`.
    """
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, COMPENSATION_DTYPE) if _is_half(x) else jnp.zeros((), COMPENSATION_DTYPE), params
    )


def _add_nearest(param: Any, update: Any) -> Any:
    if update is None or not has_gradient(param):
        return param
    param = jnp.asarray(param)
    total = _float32(param) + _float32(update) if _is_half(param) else param + update
    return _unless_skipped(update, _rounded(total, param.dtype), param)


def _add_stochastic(param: Any, update: Any, key: jax.Array) -> Any:
    if update is None or not _is_half(param):
        return _add_nearest(param, update)
    total = quantize(_float32(param) + _float32(update), param.dtype.name, rounding="stochastic", key=key)
    return _unless_skipped(update, total.astype(param.dtype), param)


def _add_kahan(param: Any, update: Any, compensation: jax.Array) -> tuple[Any, jax.Array]:
    if not _is_half(param):
        return _add_nearest(param, update), compensation
    due = _float32(update) + _float32(compensation)
    new = _rounded(_float32(param) + due, param.dtype)
    lost = _rounded(due - (_float32(new) - _float32(param)), COMPENSATION_DTYPE)
    return _unless_skipped(update, new, param), _unless_skipped(update, lost, compensation)


def _rounded(total: jax.Array, dtype: Any) -> jax.Array:
    """Rounds `total` to nearest in `dtype`. Integer operations round to half: XLA may drop a cast there (trap T6)."""
    if dtype in HALF and total.dtype == jnp.float32:
        total = quantize(total, jnp.dtype(dtype).name)
    return total.astype(dtype)


def _unless_skipped(update: Any, new: jax.Array, old: Any) -> jax.Array:
    """Selects `old` where the update is -0.0, else `new`. Adding -0.0 would flush subnormals and round again."""
    update = jnp.asarray(update)
    parts = (update.real, update.imag) if jnp.iscomplexobj(update) else (update,)
    return jnp.where(functools.reduce(jnp.logical_and, [(x == 0) & jnp.signbit(x) for x in parts]), old, new)


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _is_half(x: Any) -> bool:
    return hasattr(x, "dtype") and x.dtype in HALF
