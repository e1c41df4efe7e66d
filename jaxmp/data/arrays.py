"""`Arrays`, a dataset from a function that returns arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxmp.data.dataset import Split
from jaxmp.data.images import Images
from jaxmp.data.source import Columns, as_column
from jaxmp.data.transforms import errors_named, function_name
from jaxmp.errors import InputError


@dataclass(frozen=True)
class Arrays(Images):
    """A dataset of arrays, which a function of your own loads, one split at a time.

    >>> import numpy as np
    >>> data = Arrays(lambda split: {"image": np.zeros((100, 8, 8, 1), np.uint8), "label": np.zeros(100, int)})
    >>> len(data.source("train"))
    100
    """

    load: Callable[..., Any]
    """Function that returns a split, load("train") -> {name: array}; also called with "validation" and "test", of which
    it may return None if there is no such split."""

    def source(self, split: Split) -> Columns | None:
        """The rows that `load(split)` returned: a dict of arrays, of text too, with one leading axis; None if None.

        `load` is called once for each split. Lists become arrays, lists of strings or of different lengths object
        arrays. What has no rows (None, a number, a nested dict) is left out. Raises InputError if `load` raised, or
        returned no training rows or arrays that are empty or not equally long.
        """
        loaded = self.__dict__.setdefault("_loaded", {})
        if split not in loaded:
            loaded[split] = self._load(split)
        return loaded[split]

    def _load(self, split: Split) -> Columns | None:
        call = f"{function_name(self.load)}({split!r})"
        # The first caller may be a function that JAX traces; what `load` computes with JAX must not become part of it.
        with errors_named(call), jax.ensure_compile_time_eval():
            loaded = self.load(split)
        if loaded is None and split != "train":
            return None
        if not isinstance(loaded, Mapping) or not loaded:
            what = "None" if loaded is None else f"an empty {type(loaded).__name__}" if loaded == {} else None
            what = what or f"a {type(loaded).__name__}"
            raise InputError(f"{call} returned {what}; expected a dict of arrays, {{name: array}}")
        with errors_named(call):
            columns = {str(name): as_column(name, array) for name, array in loaded.items()}
        rowless = {name: type(loaded[name]).__name__ for name in loaded if not columns[str(name)].ndim}
        columns = {name: column for name, column in columns.items() if column.ndim}
        if not columns:
            raise InputError(f"{call} returned no arrays, only {rowless}; expected a dict of arrays, {{name: array}}")
        shapes = {name: array.shape for name, array in columns.items()}
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise InputError(f"{call} returned arrays of shapes {shapes}; expected one leading axis, the rows")
        if not len(next(iter(columns.values()))):
            raise InputError(f"{call} returned no rows")
        return Columns(columns, left_out={str(name): f"a {kind} without rows" for name, kind in rowless.items()})
