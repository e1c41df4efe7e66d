"""Pytrees: what their leaves are called, which of them are floats or trained, and choosing between two of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOAT32 = np.dtype(np.float32)
HALF = (np.dtype(jnp.bfloat16), np.dtype(np.float16))
"""the half precisions"""


def is_float(x: Any) -> bool:
    """True for an array (or NumPy scalar) whose values may be cast: a real float of two bytes or more.

    False for integers, bools, PRNG keys, float0, complex numbers, Python scalars, and for fp8 and narrower floats,
    which carry scales or quantised values of their own.
    """
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return False
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1


def cast_floats(tree: Any, dtype: Any) -> Any:
    """`tree` with its floats (see `is_float`) in `dtype`, all else untouched. Idempotent; keeps the structure."""
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) and x.dtype != dtype else x, tree)


def has_gradient(x: Any) -> bool:
    """True for what is trained: real or complex numbers, an array, a type of one, or a Python number.

    False for integers, bools, PRNG keys, float0, and for fp8 and narrower floats.
    """
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1


def upcast(x: Any) -> Any:
    """An array that has a gradient in float32, or in its own dtype where that is wider; all else as it is."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) if has_gradient(x) else x


def strongly_typed(x: Any) -> Any:
    """A leaf as an array of its own dtype: Python numbers and what was made of them would compile twice (trap T7)."""
    dtype = jnp.result_type(x)
    return x if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(x, dtype)


def tree_where(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `finite`, else `old`, leaf by leaf and to the bit, in the dtypes of `old`.

    By selection: `old + 0 * new` would let NaN through, and `old + 0.0` turns -0.0 into +0.0.
    """
    return jax.tree.map(lambda n, o: jnp.where(finite, n if n.dtype == o.dtype else n.astype(o.dtype), o), new, old)


def path_name(path: tuple[Any, ...]) -> str:
    """The name at a path of `jax.tree_util`'s; `""` for a tree that is one leaf.

    >>> tree = {"layers": [1, {"kernel": 2}]}
    >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['layers/0', 'layers/1/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by their names, in order; of two with the same name, the last."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
