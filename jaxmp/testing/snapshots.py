"""Snapshots of pytrees: copied to the host, compared leaf by leaf and to the bit, restored, and described in words."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.trees import is_floating, is_key, same_structure


class Snapshot(NamedTuple):
    """A pytree on the host: what a checkpoint keeps."""

    paths: list[str]
    """names of the leaves, as `jax.tree_util.keystr` has them"""
    leaves: list[np.ndarray]
    """their values; of PRNG keys the data"""


def snapshot(tree: Any) -> Snapshot:
    """Copies a pytree to the host."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return Snapshot([jax.tree_util.keystr(path) for path, _ in leaves], [host(leaf) for _, leaf in leaves])


def host(leaf: Any) -> np.ndarray:
    """Copies a leaf to a NumPy array; of a PRNG key, its data."""
    return np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def restored(saved: Snapshot, like: Any) -> Any:
    """Returns a snapshot as arrays with the structure and on the devices of `like`."""

    def put(value: np.ndarray, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return type(leaf)(value) if isinstance(leaf, (int, float, bool)) else value
        if is_key(leaf):
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
        return jax.device_put(value, leaf.sharding)

    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [put(v, leaf) for v, leaf in zip(saved.leaves, leaves, strict=True)])


def first_difference(expected: Snapshot, found: Snapshot) -> str | None:
    """Says where two snapshots differ by a bit; None if nowhere."""
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


def type_difference(before: Any, after: Any) -> str | None:
    """Says where two pytrees differ in structure, shape, dtype or weak type, for which jit compiles anew; or None."""
    if not same_structure(before, after):
        return f"the state is {describe(after)}, and was {describe(before)}"[:500]
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if _type(a) != _type(b):
            name = jax.tree_util.keystr(path) or "itself"
            return f"leaf {name} is {_type(b)}, and was {_type(a)} (what is compiled for one is not for the other)"
    return None


def place_difference(before: Any, after: Any) -> str | None:
    """Says where a leaf of two equal pytrees lies on other devices, for which jit compiles anew; or None."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (
            isinstance(a, jax.Array)
            and isinstance(b, jax.Array)
            and (a.committed, a.sharding) != (b.committed, b.sharding)
        ):
            name = jax.tree_util.keystr(path) or "itself"
            return f"leaf {name} of the first state {_placed(a)}; after a step it {_placed(b)}"
    return None


def _placed(x: jax.Array) -> str:
    return f"{'lies' if x.committed else 'may lie anywhere, and is'} on {x.sharding}"


def describe(tree: Any) -> str:
    """Describes a pytree: its structure, with dtype and shape for each leaf."""
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
    """Formats number `i` of a leaf, with enough digits to tell it from its neighbours in float32."""
    x = leaf.ravel()[i]
    return f"{float(x):.9g}" if is_floating(leaf) else str(x)


def _type(leaf: Any) -> str:
    aval = jax.typeof(leaf) if not isinstance(leaf, np.ndarray) else leaf
    weak = ", weakly typed" if getattr(aval, "weak_type", False) else ""
    return f"{describe(aval)}{weak}"


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)


def _place(leaf: np.ndarray, i: int) -> str:
    place = [int(k) for k in np.unravel_index(i, leaf.shape)]
    return f" at {place}" if leaf.ndim else ""
