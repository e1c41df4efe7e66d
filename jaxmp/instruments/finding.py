"""`Finding`: one fault, or one needless cost, that `audit` found, and the place where it stands."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxmp.jaxprs import Place


class Finding(NamedTuple):
    """One fault, or one needless cost, that `audit` found."""

    rule: str
    """name of the rule, such as "half accumulation" """
    what: str
    """what happens there, in words"""
    path: str
    """path of the Flax modules or named scopes around it; for arguments and results, their path in the pytree"""
    source: str
    """file:line of the user's code, or "" """
    dtype: str
    """name of the dtype in which it happens, or "" """
    times: int
    """how many times one call does it"""

    def __str__(self) -> str:
        where = " at ".join(filter(None, (self.path, self.source)))
        return f"{self.rule}: {self.what}" + (f" ({self.times} times)" if self.times > 1 else "") + f" [{where}]"


@dataclasses.dataclass(frozen=True)
class Counted(Place):
    """The place of an equation, and how many times a call runs it."""

    times: int = 1


def found(rule: str, what: str, dtype: Any, place: Counted) -> Finding:
    """Returns the finding of an equation that stands at `place`."""
    name = np.dtype(dtype).name if dtype != "" else ""
    return Finding(rule, what, place.module, place.source, name, place.times)
