"""`Subject`: one way of using a published system, and the batch of a small regression for train steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmp.testing import Laws


class Subject(NamedTuple):
    """One way of using a published system, and the laws to check on it."""

    name: str
    """the system and the way, a few words"""
    packages: tuple[str, ...]
    """distributions whose versions tell which system it was"""
    laws: Laws
    """the laws of it"""
    not_asked: Mapping[str, str] = {}
    """laws that would test the adapter instead of the system, and why"""


def batch() -> dict[str, Any]:
    """Returns eight rows: `x` float32 (8, 4), `y` float32 (8, 3)."""
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(8, 4)).astype(np.float32), "y": random.normal(size=(8, 3)).astype(np.float32)}
