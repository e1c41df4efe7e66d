"""What a traced function does: all its equations, those of nested functions included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any, names: str = "") -> Iterator[tuple[Any, str]]:
    """Every equation of a jaxpr and of those inside it, with the names of the scopes that it stands in."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        here = "/".join(filter(None, (names, str(equation.source_info.name_stack))))
        yield equation, here
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner, here)


def dtypes(equation: Any) -> set[Any]:
    """The dtypes of an equation's operands."""
    return {v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")}
