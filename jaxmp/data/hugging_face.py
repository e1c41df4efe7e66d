"""`HuggingFace`, a dataset from a `datasets.Dataset` of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.images import Images
from jaxmp.data.source import Columns, as_column, is_numeric
from jaxmp.data.transforms import errors_named, function_name
from jaxmp.errors import InputError


@dataclass(frozen=True)
class HuggingFace(Images):
    """The rows of `datasets.Dataset` objects, which a function of your own loads, one split at a time.

        HuggingFace(lambda split: datasets.load_from_disk("imdb")[split], images=())

    Text stays on the host; `host_transforms` can turn it into numbers. The package `datasets` is none of jaxmp's own.
    """

    load: Callable[..., Any]
    """Function that returns a split, load("train") -> datasets.Dataset; also called with "validation" and "test", of
    which it may return None if there is no such split."""

    def source(self, split: Split) -> Columns | None:
        """The columns of the dataset, in its own order; None if `load` returned None.

        Columns of single numbers are read at once, so that labels can be checked; others (images, text, lists) when
        they are indexed. Images become arrays, uint8 (rows, height, width, channels). Raises InputError if `load`
        raised or returned no `datasets.Dataset` with rows.
        """
        call = f"{function_name(self.load)}({split!r})"
        with errors_named(call), jax.ensure_compile_time_eval():
            loaded = self.load(split)
        if loaded is None and split != "train":
            return None
        if not all(hasattr(loaded, name) for name in ("column_names", "with_format", "select_columns")) or isinstance(
            loaded.column_names, dict
        ):
            raise InputError(
                f"{call} returned {type(loaded).__name__}; expected a datasets.Dataset: of a DatasetDict one of its "
                "splits, of an IterableDataset list(...) in Dataset.from_list"
            )
        if not len(loaded):
            raise InputError(f"{call} returned no rows")
        loaded = loaded.with_format(None)  # not NumPy, which stacks rows of different lengths as it likes
        columns: dict[str, Any] = {}
        for name in loaded.column_names:
            column = _Column(loaded.select_columns([name]), name)
            first = column[np.arange(1)]
            is_number = first.ndim == 1 and is_numeric(first)
            columns[name] = column[np.arange(len(loaded))] if is_number else column
        return Columns(columns)


class _Column:
    """A column of a `datasets.Dataset`: `column[indices]` is an array."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        values = self.dataset[np.asarray(indices).tolist()][self.name]
        return as_column(self.name, [_pixels(value) if hasattr(value, "getbands") else value for value in values])


def _pixels(image: Any) -> np.ndarray:
    """The pixels of a Pillow image, (height, width, channels); of a palette its colours, red, green, blue."""
    pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA") else image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
