"""`with_fields`: a class whose docstring also has what is said of each of its fields, for `help`.

A field is documented by the string under it, where its reader and its editor look; Python keeps no such string. They
are read from the source when somebody asks for the docstring, so that importing costs nothing.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import sys
import textwrap
from typing import Any

WIDTH = 120


def with_fields(cls: type) -> type:
    """Returns `cls`, whose `__doc__` has got a section `Attributes`, made when it is first read.

    Where a class has a metaclass, as those of `abc.ABC` do, `help` does not call the descriptor: then it is made now.
    """
    own = cls.__dict__.get("__doc__")
    if _fields(cls) and not isinstance(own, _Docstring) and "\nAttributes:\n" not in (own or ""):
        found = _Docstring(own or "")
        cls.__doc__ = found if type(cls) is type else found.__get__(None, cls)  # type: ignore[assignment]
    return cls


class _Docstring:
    """A descriptor in the place of a class's docstring."""

    def __init__(self, own: str):
        self.own = own

    def __get__(self, instance: Any, owner: type) -> str:
        return _whole(owner, self.own)


def _fields(cls: type) -> tuple[str, ...]:
    """The public fields of a dataclass or a NamedTuple, in order."""
    names: Any = getattr(cls, "__dataclass_fields__", None) or getattr(cls, "_fields", ())
    return tuple(name for name in names if not name.startswith("_"))


@functools.cache
def _whole(cls: type, own: str) -> str:
    said: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        said |= _said(base)
    lines = [line for name in _fields(cls) if name in said for line in _lines(name, *said[name])]
    return f"{inspect.cleandoc(own)}\n\nAttributes:\n" + "\n".join(lines) if lines else own


def _lines(name: str, annotation: str, text: str) -> list[str]:
    # No line begins with anything but a letter: tyro, whose help is made of this, would keep the line break.
    bound = re.sub(r" (?=[\W\d])", "\0", f"{name} ({annotation}): {' '.join(text.split())}")
    wrap = textwrap.TextWrapper(WIDTH, "  ", "    ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in wrap.wrap(bound)]


def _said(cls: type) -> dict[str, tuple[str, str]]:
    """The annotation of each field that a class has of its own, with its default, and the string under it."""
    if not cls.__module__.startswith("jaxmp"):
        return {}
    body = _classes(cls.__module__).get(cls.__qualname__, [])
    found = {}
    for statement, below in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                default = "" if statement.value is None else _default(cls, statement.target.id)
                found[statement.target.id] = ast.unparse(statement.annotation) + default, str(below.value.value)
    return found


def _default(cls: type, name: str) -> str:
    value = getattr(cls, name, inspect.Parameter.empty)
    simple = isinstance(value, str | int | float | tuple | None)
    return f" = {value!r}" if simple and len(repr(value)) < 40 else ""


@functools.cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    """The statements of each class at the top of a module, by name; none without the source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except OSError:
        return {}
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
