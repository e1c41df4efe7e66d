"""Where rows come from: the protocol `Source`, and `Columns`, its form over arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from jaxmp.errors import InputError


class Source(Protocol):
    """The rows of one split, in a fixed order. Any batch of them can be read at once, from several threads."""

    def __len__(self) -> int:
        """The number of rows."""

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`, int (n,): arrays of shape (n, ...). Text is an array of strings, bytes or objects."""


class Columns:
    """A `Source` over arrays with a common leading axis, in memory or memory-mapped.

    A column is an array, or any object with `__len__` whose `column[indices]` is a NumPy array.
    """

    def __init__(self, columns: Mapping[str, Any]):
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(column[indices]) for name, column in self.columns.items()}


def as_column(name: Any, values: Any) -> np.ndarray:
    """`values` as an array; lists of str or bytes as an object array, which keeps each string at its own length.

    Raises InputError for lists of different lengths.
    """
    if isinstance(values, list | tuple) and values and all(isinstance(value, str | bytes) for value in values):
        column = np.empty(len(values), object)
        column[:] = values
        return column
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(
            f"column {str(name)!r} is no array ({error}); expected rows of one shape, or an object array"
        ) from error


def is_text(column: Any) -> bool:
    """Whether the column holds strings, bytes or objects, which stay on the host."""
    return column.dtype.kind in "OSU"
