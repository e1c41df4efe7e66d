"""Pytrees: names of their leaves, kinds of leaves, casts, and choosing between two trees.

Five functions tell kinds of arrays apart; all but `is_castable` take a `jax.ShapeDtypeStruct` or an abstract value too:

| | float16 and wider | fp8, fp4 | complex | integer, bool, float0 | PRNG key |
|---|---|---|---|---|---|
| `is_castable` | yes | no | no | no | no |
| `is_floating` | yes | yes | no | no | no |
| `is_inexact` | yes | yes | yes | no | no |
| `has_gradient` | yes | no | yes | no | no |
| `is_key` | no | no | no | no | yes |
"""

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


def is_castable(x: Any) -> bool:
    """True for what a policy casts: arrays and NumPy scalars of real floats of two bytes or more.

    False for fp8 and narrower floats, which hold scales or quantised values; for complex numbers, integers, bools, PRNG
    keys and float0; and for Python numbers, dtypes and `jax.ShapeDtypeStruct`, which cannot be cast.
    """
    return isinstance(x, (jax.Array, np.ndarray, np.generic)) and is_floating(x) and x.dtype.itemsize > 1


def is_floating(x: Any) -> bool:
    """True for real floats of any width, fp8 and narrower included.

    False for complex numbers, integers, bools, PRNG keys and float0; and for Python numbers.
    """
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def is_inexact(x: Any) -> bool:
    """True for what can hold an inf or a NaN, or be differentiated by JAX: floats of any width, and complex numbers.

    False for integers, bools, PRNG keys and float0; and for Python numbers.
    """
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def has_gradient(x: Any) -> bool:
    """True for what is trained: floats of two bytes or more, and complex numbers. Python floats count.

    False for fp8 and narrower floats, integers, bools, PRNG keys and float0.
    """
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1


def is_key(x: Any) -> bool:
    """True for typed PRNG keys (`jax.random.key`); False for all else, and for the uint32 keys of old JAX."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Casts the castable leaves of `tree` (see `is_castable`) to `dtype`; keeps all other leaves and the structure."""
    return jax.tree.map(lambda x: x.astype(dtype) if is_castable(x) and x.dtype != dtype else x, tree)


def upcast(x: Any) -> Any:
    """Casts a leaf that has a gradient to float32, or keeps its dtype if that is wider; returns any other as it is."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) if has_gradient(x) else x


def strongly_typed(x: Any) -> Any:
    """Makes a leaf an array with a strong dtype; a weakly typed one, such as a Python number, compiles twice (T7)."""
    dtype = jnp.result_type(x)
    return x if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(x, dtype)


def tree_where(finite: jax.Array, new: Any, old: Any) -> Any:
    """Selects `new` where `finite` is true and `old` elsewhere, leaf by leaf, bit for bit, in the dtypes of `old`.

    Selects, because arithmetic fails: `old + 0 * new` lets NaN through, and `old + 0.0` turns -0.0 into +0.0.
    """
    return jax.tree.map(lambda n, o: jnp.where(finite, n if n.dtype == o.dtype else n.astype(o.dtype), o), new, old)


def same_structure(a: Any, b: Any) -> bool:
    """True if two pytrees have the same structure, whatever their leaves are."""
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    return bool(structures[0] == structures[1])


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf, given its path from `jax.tree_util`: its keys joined by `/`; `""` for a lone leaf.

    >>> tree = {"layers": [1, {"kernel": 2}]}
    >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['layers/0', 'layers/1/kernel']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of `tree` by name (see `path_name`), in order; of two leaves with one name, the last."""
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
