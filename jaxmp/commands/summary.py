"""`print_summary`: the numbers of a run on the terminal, as `jaxmp train` and `jaxmp eval` show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_summary(summary: Mapping[str, Any], above: str = "") -> None:
    """Prints one line for each number; a nested mapping's name goes before its own names. Lists are left out."""
    for name, value in summary.items():
        if isinstance(value, Mapping):
            print_summary(value, f"{above}{name} ")
        elif not isinstance(value, list):
            print(f"{above + name:<16} {value:.6g}" if isinstance(value, float) else f"{above + name:<16} {value}")
