"""`Arrays`, a dataset from a function that returns arrays."""

from __future__ import annotations

from collections.abc import Callable
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
    """Function that returns a split, load("train") -> {name: array}; also called with "validation" and "test"."""

    def source(self, split: Split) -> Columns:
        """The rows that `load(split)` returned: a dict of arrays, of text too, with one leading axis.

        Lists become arrays, lists of strings object arrays. Raises InputError if `load` raised, or returned None or
        arrays that are empty or not equally long.
        """
        call = f"{function_name(self.load)}({split!r})"
        # The first caller may be a function that JAX traces; what `load` computes with JAX must not become part of it.
        with errors_named(call), jax.ensure_compile_time_eval():
            loaded = self.load(split)
        if loaded is None:
            raise InputError(f"{call} returned None: this dataset has no {split} split")
        if not isinstance(loaded, dict) or not loaded:
            raise InputError(f"{call} returned {type(loaded).__name__}; expected a dict of arrays, {{name: array}}")
        with errors_named(call):
            columns = {str(name): as_column(name, array) for name, array in loaded.items()}
        shapes = {name: array.shape for name, array in columns.items()}
        if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
            raise InputError(f"{call} returned arrays of shapes {shapes}; expected one leading axis, the rows")
        if not len(next(iter(columns.values()))):
            raise InputError(f"{call} returned no rows")
        return Columns(columns)
