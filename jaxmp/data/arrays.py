"""`Arrays`, a dataset from a function that returns arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.fingerprint import digest
from jaxmp.data.images import Images
from jaxmp.data.source import Columns, as_column
from jaxmp.data.transforms import errors_named, function_name
from jaxmp.errors import InputError


@dataclass(frozen=True, eq=False)
class Given:
    """The arrays of `Arrays.of`, as the function that loads them; known by what they hold."""

    digests: Mapping[str, Any]
    """dtype, shape and digest of each column of each split"""
    arrays: Mapping[str, Mapping[str, Any]] = field(init=False, repr=False)
    """the columns of each split, by name"""

    @classmethod
    def of(cls, arrays: Mapping[str, Mapping[str, Any]]) -> Given:
        """The function that loads these columns of these splits."""
        given = cls(digests(arrays))
        object.__setattr__(given, "arrays", arrays)
        return given

    def __call__(self, split: Split) -> Mapping[str, Any] | None:
        """The columns of a split; None if there is no such split."""
        return self.arrays.get(split)


def digests(splits: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, str]]:
    """What the columns of splits hold, `float32[3] 5f6a...` by split and name; equal in every process."""
    return {
        split: {name: f"{of.dtype.name}{list(of.shape)} {digest(of)[:16]}" for name, of in columns.items()}
        for split, columns in splits.items()
    }


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

    @classmethod
    def of(
        cls,
        train: Mapping[str, Any],
        *,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Arrays:
        """The dataset of arrays that are there already; they, not a function, are a part of the experiment's hash.

        They are copied, so that what is written to them later changes nothing; memory-mapped ones are not.

        Args:
          train: the training rows: arrays, lists or columns of text with one leading axis, by name; or a DataFrame.
          validation: the validation rows, if there are any; `jaxmp.random_split` takes them from `train`.
          test: the test rows, if there are any.
          fields: the other fields of `Arrays`, such as `batch_size`.

        >>> import numpy as np
        >>> data = Arrays.of({"x": np.zeros((100, 3)), "label": np.zeros(100, int)}, batch_size=20)
        >>> len(data.source("train"))
        100
        """
        given = {"train": train, "validation": validation, "test": test}
        splits = {}
        for split, arrays in given.items():
            if arrays is not None:
                if not hasattr(arrays, "keys"):
                    raise InputError(f"Arrays.of: {split} is a {type(arrays).__name__}; expected arrays by name")
                splits[split] = {str(name): _kept(name, arrays[name]) for name in arrays.keys()}
        return cls(load=Given.of(splits), **fields)

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
            kind = "an empty" if isinstance(loaded, Mapping) else "an" if isinstance(loaded, np.ndarray) else "a"
            what = "None" if loaded is None else f"{kind} {type(loaded).__name__}"
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


def _kept(name: Any, values: Any) -> np.ndarray:
    column = as_column(name, values)
    return column if isinstance(values, np.memmap) else column.copy()
