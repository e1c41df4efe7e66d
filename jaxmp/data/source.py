"""Where rows come from: the protocol under every dataset, and its form over arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """The rows of one split, in a fixed order, any batch of them at once."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices` (int array of shape (n,)): arrays with a leading axis of n."""


class Columns:
    """A `Source` over arrays with a common leading axis, in memory or memory-mapped.

    An array here is anything with `__len__` that gives a NumPy array for an array of indices.
    """

    def __init__(self, columns: Mapping[str, Any]):
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(column[indices]) for name, column in self.columns.items()}
