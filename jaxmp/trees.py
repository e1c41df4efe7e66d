"""Pytrees: what their leaves are called, which of them are floats or trained, and choosing between two of them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError, nearest

FLOAT32 = np.dtype(np.float32)
HALF = (np.dtype(jnp.bfloat16), np.dtype(np.float16))
"""the half precisions"""

Classes = Mapping[str, Iterable[str]]
"""The names of a module's class and its bases, by the module's path; "" is the model itself."""


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


def path_and_above(path: str) -> list[str]:
    """The path and those of all modules above it, from "" on.

    >>> path_and_above("encoder/layer_0")
    ['', 'encoder', 'encoder/layer_0']
    """
    parts = path.split("/") if path else []
    return ["/".join(parts[:n]) for n in range(len(parts) + 1)]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern for the paths of modules and parameters, whose names are joined by `/`.

    `*` is any part of one name, `?` one character, `[01]` one of several characters, and `**` any number of names, none
    included. `@Class` is a module class; it matches the modules of that class and of its subclasses.

    >>> [Pattern(text).matches("encoder/layer_0/kernel") for text in ("encoder/*/kernel", "**/*nel", "*/kernel")]
    [True, True, False]
    >>> Pattern("**/kernel").matches("kernel")
    True

    Raises: InputError if `text` can match no path.
    """

    text: str
    """a path such as `encoder/layer_0`, `encoder/*` or `**/kernel`; or `@LayerNorm`"""

    def __post_init__(self) -> None:
        """Refuses a pattern that can match no path."""
        name = self.text.removeprefix("@")
        if not name or name.startswith("/") or name.endswith("/") or "//" in name or any(c.isspace() for c in name):
            raise InputError(
                f"{self.text!r} is no pattern; expected a path such as encoder/layer_0 or encoder/*, or @ and a module "
                "class, such as @LayerNorm"
            )
        if self.by_class and not name.isidentifier():
            raise InputError(f"{name!r} is not the name of a class")

    def __str__(self) -> str:
        return self.text

    @property
    def by_class(self) -> bool:
        """Whether this is `@Class`."""
        return self.text.startswith("@")

    def matches(self, path: str, classes: Classes | None = None) -> bool:
        """Whether the pattern names `path` itself, not only a module above it.

        Args:
          path: names joined by `/`; "", the model itself, is matched by class only.
          classes: class names by the path of the module. Without it `@Class` matches nothing.
        """
        if self.by_class:
            return self.text[1:] in (classes or {}).get(path, ())
        return bool(path) and _matches(path.split("/"), self.text.split("/"))

    def covers(self, path: str, classes: Classes | None = None) -> bool:
        """Whether the pattern names `path` or a module above it. For arguments see `matches`."""
        return any(self.matches(at, classes) for at in path_and_above(path))

    def what_there_is(self, paths: Classes | Iterable[str]) -> str:
        """The end of a message about a pattern that matches nothing: up to 8 of what it could match, and the nearest.

        Args:
          paths: paths; for `@Class` the class names by path.

        >>> Pattern("encoder/lyer").what_there_is(["", "encoder", "encoder/layer"])
        "there are encoder, encoder/layer; did you mean 'encoder/layer'?"
        """
        if self.by_class:
            known = {f"@{name}" for names in (paths.values() if isinstance(paths, Mapping) else ()) for name in names}
        else:
            known = set(paths)
        shown = sorted(filter(None, known))
        # A pattern that begins with ** is compared with the ends of the paths.
        names = self.text.count("/") if self.text.startswith("**/") else 0
        candidates = (
            list(dict.fromkeys("/".join(["**", *path.split("/")[-names:]]) for path in shown)) if names else shown
        )
        listed = ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
        return f"there are {listed or 'none below the model itself'}{nearest(self.text, candidates)}"


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns or not names:
        return not names and all(pattern == "**" for pattern in patterns)
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or _matches(names[1:], patterns)
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
