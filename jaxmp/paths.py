"""What the leaves of a pytree are called: where they stand, `/` between the names, as in `encoder/Dense_0/kernel`."""

from __future__ import annotations

from typing import Any

import jax


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
