"""`check_sizes`, `check_rates`, `check_choice` and `check_heads`: the checks that the models' fields have in common."""

from __future__ import annotations

from typing import Any

from jaxmp.errors import InputError


def check_sizes(model: Any, *names: str) -> None:
    """Raises InputError if one of these fields of a model, or an entry of a tuple in one, is below 1.

    A list becomes a tuple.
    """
    for name in names:
        value = getattr(model, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(model, name, value)
        if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
            raise InputError(f"{type(model).__name__}: {name}={value}: expected 1 or more")


def check_heads(model: Any) -> None:
    """Raises InputError unless the width of a model is a multiple of its number of heads."""
    if model.width % model.heads:
        raise InputError(f"{type(model).__name__}: width={model.width}: expected a multiple of heads={model.heads}")


def check_rates(model: Any, *names: str) -> None:
    """Raises InputError if one of these fields of a model, a dropout rate, is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(model, name) < 1:
            raise InputError(f"{type(model).__name__}: {name}={getattr(model, name)}: expected 0 or more, below 1")


def check_choice(model: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises InputError if a field of a model is none of its values."""
    if getattr(model, name) not in choices:
        expected = " or ".join(map(str, choices))
        raise InputError(f"{type(model).__name__}: {name}={getattr(model, name)!r}: expected {expected}")
