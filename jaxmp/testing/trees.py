"""Pytrees of a step or a scaler, compared leaf by leaf and to the bit, and in words."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Snapshot(NamedTuple):
    """A pytree on the host: what a checkpoint keeps."""

    paths: list[str]
    """names of the leaves, as `jax.tree_util.keystr` has them"""
    leaves: list[np.ndarray]
    """their values; of PRNG keys the data"""


def snapshot(tree: Any) -> Snapshot:
    """A pytree copied to the host."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return Snapshot([jax.tree_util.keystr(path) for path, _ in leaves], [host(leaf) for _, leaf in leaves])


def host(leaf: Any) -> np.ndarray:
    """A leaf as a NumPy array that shares no memory with it; of a PRNG key its data."""
    return np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def restored(saved: Snapshot, like: Any) -> Any:
    """A snapshot as arrays on the devices of `like`."""

    def put(value: np.ndarray, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return type(leaf)(value) if isinstance(leaf, (int, float, bool)) else value
        if is_key(leaf):
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
        return jax.device_put(value, leaf.sharding)

    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [put(v, leaf) for v, leaf in zip(saved.leaves, leaves, strict=True)])


def first_difference(expected: Snapshot, found: Snapshot) -> str | None:
    """Where two snapshots differ by a bit, in words; None where nowhere."""
    if expected.paths != found.paths:
        return f"the leaves are {', '.join(found.paths)}, and were {', '.join(expected.paths)}"
    for path, a, b in zip(expected.paths, expected.leaves, found.leaves, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"leaf {path or 'itself'} is {describe(b)}, and was {describe(a)}"
        different = np.flatnonzero(_bytes(a) != _bytes(b))
        if len(different):
            i = int(different[0]) // max(a.dtype.itemsize, 1)
            return (
                f"leaf {path or 'itself'} has {value(b, i)}{_place(b, i)} instead of {value(a, i)}"
                f"{' (equal numbers, other bits)' if a.ravel()[i] == b.ravel()[i] else ''}"
            )
    return None


def largest_error(expected: Snapshot, found: Snapshot, start: Snapshot) -> tuple[float, str]:
    """The largest distance of a float leaf from what it should be, relative to how far it has moved, and its path.

    Distances are Euclidean. Where nothing moves, the distance itself counts; what is not finite is at distance inf.
    """
    worst = (0.0, "")
    for path, a, b, s in zip(expected.paths, expected.leaves, found.leaves, start.leaves, strict=True):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            if not np.array_equal(a, b):
                worst = max(worst, (float("inf"), path))
            continue
        a, b, s = (x.astype(np.float64) for x in (a, b, s))
        moved, error = np.linalg.norm(a - s), np.linalg.norm(b - a)
        error = error / moved if moved else error
        worst = max(worst, (float(error) if np.isfinite(error) else float("inf"), path))
    return worst


def same_structure(a: Any, b: Any) -> bool:
    """Whether two pytrees have one structure."""
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    return bool(structures[0] == structures[1])


def type_difference(before: Any, after: Any) -> str | None:
    """Where two pytrees differ in what decides on a second compile: structure, shape, dtype, weak type."""
    if not same_structure(before, after):
        return f"the state is {describe(after)}, and was {describe(before)}"[:500]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if _type(a) != _type(b):
            name = jax.tree_util.keystr(path) or "itself"
            return f"leaf {name} is {_type(b)}, and was {_type(a)} (what is compiled for one is not for the other)"
    return None


def describe(tree: Any) -> str:
    """A pytree with dtype and shape in the place of each leaf; short."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {describe(leaf)}" for key, leaf in tree.items()) + "}"
    if hasattr(tree, "dtype"):
        name = "PRNG key" if is_key(tree) else "float0" if tree.dtype == jax.dtypes.float0 else tree.dtype.name
        return f"{name}{list(tree.shape)}"
    if same_structure(tree, 0):
        return type(tree).__name__
    # By paths, and not mapped: a node of another library may refuse anything but arrays.
    leaves = [f"{jax.tree_util.keystr(path)}: {describe(x)}" for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    return f"{type(tree).__name__}({', '.join(leaves)})"


def value(leaf: np.ndarray, i: int) -> str:
    """The i-th number of a leaf, in digits that tell it from its neighbours."""
    x = leaf.ravel()[i]
    return f"{float(x):.9g}" if jnp.issubdtype(leaf.dtype, jnp.floating) else str(x)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of floats of two bytes or more."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1


def _type(leaf: Any) -> str:
    aval = jax.typeof(leaf) if not isinstance(leaf, np.ndarray) else leaf
    weak = ", weakly typed" if getattr(aval, "weak_type", False) else ""
    return f"{describe(aval)}{weak}"


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)


def _place(leaf: np.ndarray, i: int) -> str:
    place = [int(k) for k in np.unravel_index(i, leaf.shape)]
    return f" at {place}" if leaf.ndim else ""
