"""Optimizer numerics: `float32_math` for any optax optimizer, and a global norm without overflow or underflow.

    tx = float32_math(optax.adamw(1e-3), store={"mu": jnp.bfloat16})

In half precision, optimizers fail: Adam's eps of 1e-8 is 0 in float16, so that a zero gradient gives NaN; b2 = 0.999
rounds to 1.0 in bfloat16, so that the second moment never decays (trap T14); and in float16 the sum of squares of a few
values in the hundreds overflows (trap T5). `loss_scaling` already passes float32 gradients and parameters to its inner
optimizer. Inside it, `float32_math` is useful for its option `store`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmp.errors import InputError, nearest
from jaxmp.precision.formats import quantize
from jaxmp.scaling.state_format import PackedArray, map_with_fields
from jaxmp.trees import HALF, has_gradient, is_castable, strongly_typed, upcast


class Float32MathState(NamedTuple):
    """The optimizer state of `float32_math`."""

    inner_state: Any
    """state of the inner optimizer, with its arrays in the dtypes in which they are stored"""
    steps: jax.Array
    """number of steps so far, int32 scalar; stochastic rounding draws other random bits in each step"""


def float32_math(
    inner: optax.GradientTransformation,
    store: Any | Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in float32, whatever the dtypes of gradients and parameters; float64 leaves stay float64.

    Gradients, parameters and the state of `inner` are cast to float32 before each step, and the new state is cast to
    the dtypes in which it is stored. Those dtypes never change after `init`, and no leaf is weakly typed (traps T7 and
    T17). Integers, bools and PRNG keys pass through unchanged, and scalars in the state keep their dtype.

    The updates are float32, so that `optax.apply_updates` adds in float32 and rounds the sum once.

    With rounding to nearest, a bfloat16 moment whose decay per step is below half an ulp (1 - b < 2**-9, such as
    b2 = 0.999) does not decay at all. Store such moments in float32 (`store={"mu": jnp.bfloat16}` stores only the first
    moment in bfloat16), or pass a `seed`. In a float16 second moment, the square of a gradient below 2**-12 is 0.

    Args:
      inner: any optax transformation.
      store: dtype in which the arrays of the state are stored between steps, except scalars: float32, bfloat16 or
        float16. A mapping from names of state fields, such as `mu`, to dtypes applies to these fields only. Attributes
        of the parameters are no such fields, and what `state_format` has packed stays as it is.
      seed: with a seed, state in half precision is rounded stochastically, without bias. The random bits depend only on
        the seed, the step and the position in the state, so that replicas agree. Without a seed, it is rounded to
        nearest.

    Raises:
      InputError: `store` contains another dtype; or, in `init`, names a field that the state of `inner` does not have.

    >>> tx = float32_math(optax.adam(1e-3), store={"mu": jnp.bfloat16})
    >>> state = tx.init({"w": jnp.ones(3, jnp.bfloat16)})
    >>> adam = state.inner_state[0]
    >>> print(adam.mu["w"].dtype, adam.nu["w"].dtype, adam.count.dtype)
    bfloat16 float32 int32
    """
    dtypes = {name: _stored_dtype(dtype) for name, dtype in _by_name(store).items()}
    if not isinstance(inner, optax.GradientTransformation):  # such as optax.MultiSteps, which only has init and update
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Float32MathState:
        state = inner.init(_upcast_tree(params))
        seen: set[str] = set()

        def stored(fields: list[str], x: Any) -> Any:
            seen.update(fields)
            dtype = next((dtypes[name] for name in ("", *fields) if name in dtypes), None)
            if isinstance(x, PackedArray):
                return x
            return strongly_typed(x) if dtype is None or not is_castable(x) or x.ndim == 0 else x.astype(dtype)

        state = map_with_fields(stored, state, params)
        for name in dtypes.keys() - seen - {""}:
            raise InputError(
                f"float32_math: store names {name!r}, which the state of the optimizer does not have"
                f"{nearest(name, seen) or '; it has ' + ', '.join(sorted(seen - {''}))}"
            )
        return Float32MathState(inner_state=state, steps=jnp.array(0, jnp.int32))

    def update(grads: Any, state: Float32MathState, params: Any = None, **extra: Any) -> tuple[Any, Float32MathState]:
        updates, new = inner.update(_upcast_tree(grads), _upcast_tree(state.inner_state), _upcast_tree(params), **extra)
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.steps)
        position = itertools.count()

        def stored(x: Any, old: jax.Array) -> jax.Array:
            return _rounded(x, old.dtype, None if key is None else jax.random.fold_in(key, next(position)))

        return updates, Float32MathState(jax.tree.map(stored, new, state.inner_state), state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def global_norm(tree: Any) -> jax.Array:
    """Computes the Euclidean norm of all float leaves of a pytree; float32 scalar (float64 if a leaf is float64).

    Sums in float32 even if the leaves are in half precision (trap T5). Values are first divided by a power of two close
    to the largest, so that no square overflows or underflows: the norm is correct whenever float32 can represent it. It
    is inf or NaN if a value is, and 0 for an empty tree. Leaves without a gradient (integers, bools, keys, float0) are
    ignored.

    >>> print(global_norm({"a": jnp.full(4, 300.0, jnp.float16), "b": jnp.float32(3e30)}))
    3e+30
    """
    magnitudes = [jnp.abs(upcast(x)) for x in jax.tree.leaves(tree) if has_gradient(x)]
    if not magnitudes:
        return jnp.float32(0)
    largest = jnp.max(jnp.stack([jnp.max(x, initial=0.0) for x in magnitudes]))
    # A power of two, so that dividing is exact; at most 2**126, so that it and its inverse are normal numbers.
    exponent = jnp.clip(jnp.frexp(largest)[1], -126, 126)  # 0 for inf and NaN
    down, up = jnp.ldexp(jnp.ones_like(largest), -exponent), jnp.ldexp(jnp.ones_like(largest), exponent)
    return jnp.sqrt(sum(jnp.sum(jnp.square(x * down.astype(x.dtype))) for x in magnitudes)) * up


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips updates by their global norm; like `optax.clip_by_global_norm`, but safe for half precision.

    Optax sums the squares of a float16 leaf in float16; if the sum overflows to inf, all gradients become 0. This one
    uses `global_norm`. If the norm exceeds `max_norm`, updates are multiplied by `max_norm / norm` in float32, and keep
    their dtypes; otherwise they are returned unchanged to the bit. A NaN in any leaf makes all leaves NaN, as in optax.

    Source: Pascanu et al. 2013, On the difficulty of training recurrent neural networks, algorithm 1.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = global_norm(updates)

        def clipped(x: Any) -> Any:
            if not has_gradient(x):
                return x
            return jnp.where(norm <= max_norm, x, upcast(x) / norm * max_norm).astype(jnp.result_type(x))

        return jax.tree.map(clipped, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _by_name(store: Any) -> Mapping[str, Any]:
    """Returns `store` as a mapping from field names to dtypes; the name "" stands for the whole state."""
    return {} if store is None else store if isinstance(store, Mapping) else {"": store}


def _stored_dtype(dtype: Any) -> Any:
    names = ("float32", "bfloat16", "float16")
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in names:
        raise InputError(
            f"float32_math: store={dtype!r}: expected one of {', '.join(names)}{nearest(str(dtype), names)}"
        )
    return found


def _upcast_tree(tree: Any) -> Any:
    return jax.tree.map(upcast, tree)


def _rounded(x: Any, dtype: Any, key: jax.Array | None) -> jax.Array:
    """Rounds `x` to `dtype`, in which `init` stored it. With a key, half precision is rounded stochastically."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return x
    x = jnp.asarray(x)
    if dtype in HALF and (x.dtype == jnp.float32 or (key is not None and x.dtype == jnp.float64)):
        # With integer operations: between two steps in one program, XLA removes a cast to half and back (trap T6).
        x = quantize(
            x.astype(jnp.float32), jnp.dtype(dtype).name, rounding="nearest" if key is None else "stochastic", key=key
        )
    return x.astype(dtype)
