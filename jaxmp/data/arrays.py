"""One's own data: a function that returns arrays."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmp.data.dataset import Dataset, Split
from jaxmp.data.source import Columns
from jaxmp.errors import InputError


@dataclass(frozen=True)
class Arrays(Dataset):
    """Rows that a function of one's own loads, a split at a time.

    >>> import numpy as np
    >>> data = Arrays(lambda split: {"image": np.zeros((100, 8, 8, 1), np.uint8), "label": np.zeros(100, int)})
    >>> len(data.source("train"))
    100
    """

    load: Callable[..., Any]
    """`load(split)`, split "train", "validation" or "test": a dict of arrays with one leading axis; None without it."""

    def source(self, split: Split) -> Columns:
        """What `load(split)` returned. Raises InputError where it raised, or returned no equally long arrays."""
        call = f"{getattr(self.load, '__qualname__', self.load)}({split!r})"
        try:
            # Who asks first may be a function that JAX traces; what a load computes by JAX is no part of that.
            with jax.ensure_compile_time_eval():
                loaded = self.load(split)
        except InputError:
            raise
        except Exception as error:  # whatever a user's function raises is shown as bad input, with its place
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            raise InputError(f"{call} raised {type(error).__name__}: {error} ({where})") from error
        if loaded is None:
            raise InputError(f"{call} returned None: this dataset has no {split} split")
        if not isinstance(loaded, dict) or not loaded:
            raise InputError(f"{call} returned {type(loaded).__name__}; expected a dict of arrays, {{name: array}}")
        columns = {str(name): np.asarray(array) for name, array in loaded.items()}
        shapes = {name: array.shape for name, array in columns.items()}
        if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
            raise InputError(f"{call} returned arrays of shapes {shapes}; expected one leading axis, the rows")
        if not len(next(iter(columns.values()))):
            raise InputError(f"{call} returned no rows")
        return Columns(columns)
