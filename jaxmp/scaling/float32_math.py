"""Optimizer numerics: `float32_math` around any optax optimizer, and a global norm that neither over- nor underflows.

    tx = float32_math(optax.adamw(1e-3), store={"mu": jnp.bfloat16})

In half precision Adam's eps of 1e-8 is 0, so that a zero gradient gives NaN; b2 = 0.999 rounds to 1.0, so that the
second moment never decays (trap T14); and the sum of the squares of a few hundred overflows (trap T5). `loss_scaling`
hands its inner optimizer float32 numbers as it is; there, `float32_math` inside it is for `store`.
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
from jaxmp.trees import HALF, has_gradient, is_castable, strongly_typed, upcast


class Float32MathState(NamedTuple):
    """The state of `float32_math`, a part of the optimizer state."""

    inner_state: Any
    """the state of the inner optimizer, its arrays in the dtypes that they are stored in"""
    steps: jax.Array
    """steps so far, int32: each rounds with random bits of its own"""


def float32_math(
    inner: optax.GradientTransformation,
    store: Any | Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, computing in float32 (or wider, where its input is) whatever the dtype of gradients and parameters.

    Its state is widened before each step and stored after it. The dtypes in the state are those of `init` for ever, and
    none is weakly typed (traps T7 and T17). Integers, bools, keys and scalars are kept as they are. Leaves of gradients
    and parameters that are no floats are handed on to `inner` as they are.

    The updates come out in float32: `optax.apply_updates` then adds in float32, and rounds the sum once.

    Rounded to nearest, a bfloat16 moment whose decay is slower than half an ulp (1 - b < 2**-9, such as b2 = 0.999)
    does not decay at all. Store such moments in float32 (`store={"mu": jnp.bfloat16}`), or give a `seed`. In float16
    the square of a gradient below 2**-12 is 0.

    Args:
      inner: any optax transformation.
      store: dtype in which the arrays in the state that have one dimension or more are kept between steps: float32,
        bfloat16 or float16. Or a mapping from names of state fields, such as `mu`, to dtypes; the others stay as they
        are.
      seed: rounds what is stored in half precision stochastically, without bias, with random bits that depend on the
        seed, the step and the place in the state alone, so that replicas agree. Without one, to nearest.

    Raises:
      InputError: `store` names something that is no such dtype; or, in `init`, a field that the state of `inner` does
        not have.

    >>> tx = float32_math(optax.adam(1e-3), store={"mu": jnp.bfloat16})
    >>> state = tx.init({"w": jnp.ones(3, jnp.bfloat16)})
    >>> adam = state.inner_state[0]
    >>> print(adam.mu["w"].dtype, adam.nu["w"].dtype, adam.count.dtype)
    bfloat16 float32 int32
    """
    dtypes = {name: _stored_dtype(dtype) for name, dtype in _by_name(store).items()}
    if not isinstance(inner, optax.GradientTransformation):  # optax.MultiSteps has init and update, and is none
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Float32MathState:
        state = inner.init(_widened(params))
        seen: set[str] = set()

        def stored(path: Any, x: Any) -> Any:
            fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]  # parameters have keys
            seen.update(fields)
            dtype = next((dtypes[name] for name in ("", *fields) if name in dtypes), None)
            return strongly_typed(x) if dtype is None or not is_castable(x) or x.ndim == 0 else x.astype(dtype)

        state = jax.tree_util.tree_map_with_path(stored, state)
        for name in dtypes.keys() - seen - {""}:
            raise InputError(
                f"float32_math: store names {name!r}, which the state of the optimizer does not have"
                f"{nearest(name, seen) or '; it has ' + ', '.join(sorted(seen - {''}))}"
            )
        return Float32MathState(inner_state=state, steps=jnp.array(0, jnp.int32))

    def update(grads: Any, state: Float32MathState, params: Any = None, **extra: Any) -> tuple[Any, Float32MathState]:
        updates, new = inner.update(_widened(grads), _widened(state.inner_state), _widened(params), **extra)
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.steps)
        places = itertools.count()

        def stored(x: Any, old: jax.Array) -> jax.Array:
            return _rounded(x, old.dtype, None if key is None else jax.random.fold_in(key, next(places)))

        return updates, Float32MathState(jax.tree.map(stored, new, state.inner_state), state.steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all floats in a pytree, float32 scalar (wider where a leaf is).

    Sums in float32 whatever the leaves are (trap T5). All values are first divided by a power of two close to the
    largest, so that no square overflows or underflows: the norm is right wherever float32 can hold it. Inf or NaN where
    a value is; 0 for an empty tree. Leaves that are no floats (integers, bools, keys, float0) are left out.

    >>> print(global_norm({"a": jnp.full(4, 300.0, jnp.float16), "b": jnp.float32(3e30)}))
    3e+30
    """
    magnitudes = [jnp.abs(upcast(x)) for x in jax.tree.leaves(tree) if has_gradient(x)]
    if not magnitudes:
        return jnp.float32(0)
    largest = jnp.max(jnp.stack([jnp.max(x, initial=0.0) for x in magnitudes]))
    # Exact: a power of two, and within 2**126, so that it and its inverse are normal numbers.
    exponent = jnp.clip(jnp.frexp(largest)[1], -126, 126)  # 0 for inf and NaN
    down, up = jnp.ldexp(jnp.ones_like(largest), -exponent), jnp.ldexp(jnp.ones_like(largest), exponent)
    return jnp.sqrt(sum(jnp.sum(jnp.square(x * down.astype(x.dtype))) for x in magnitudes)) * up


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with `global_norm`: for gradients in half precision, or of any magnitude.

    Optax's sums the squares of a float16 leaf in float16; inf then clips all gradients to 0. Here a tree whose norm is
    above `max_norm` is multiplied in float32 by `max_norm / norm`, and keeps its dtypes; one within it stays as it is,
    to the bit. A NaN anywhere makes all of it NaN, as optax's does.

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
    """`store` as a mapping; "", the name of the root of every path, stands for all of the state."""
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


def _widened(tree: Any) -> Any:
    return jax.tree.map(upcast, tree)


def _rounded(x: Any, dtype: Any, key: jax.Array | None) -> jax.Array:
    """`x` in `dtype`, the one that `init` stored it in: to nearest; with a key, what becomes half stochastically."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return x
    x = jnp.asarray(x)
    if dtype in HALF and (x.dtype == jnp.float32 or (key is not None and x.dtype == jnp.float64)):
        # By integers: between two steps in one program, XLA folds away a cast to half and back (trap T6).
        x = quantize(
            x.astype(jnp.float32), jnp.dtype(dtype).name, rounding="nearest" if key is None else "stochastic", key=key
        )
    return x.astype(dtype)
