"""`print_summary`: the numbers of a run on the terminal, as `jaxmp train` and `jaxmp eval` show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LEAST_NAME = 16
"""columns of the names, unless one is longer"""


def print_summary(summary: Mapping[str, Any]) -> None:
    """Prints one line for each number; a nested mapping's name goes before its own names. Lists are left out.

    What is under `best` is of two splits: the metric by which the step was chosen, of validation, and those of test.
    """
    shown: dict[str, Any] = {}
    for name, value in summary.items():
        if name == "best" and isinstance(value, Mapping):
            of_test = value.get("test") or {}
            shown[name] = {n if n == "step" else f"validation {n}": of for n, of in value.items() if n != "test"}
            shown["at best step,"] = {f"test {n}": of for n, of in of_test.items()}
        else:
            shown[name] = value
    rows = list(_rows(shown, ""))
    width = max([LEAST_NAME, *(len(name) for name, _ in rows)])
    for name, text in rows:
        print(f"{name:<{width}} {text}")


def _rows(summary: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{above}{name} ")
        elif not isinstance(value, list):
            yield above + name, f"{value:.6g}" if isinstance(value, float) else str(value)
