"""Where rows come from: the protocol `Source`; `Columns`, its form over arrays; `Rows`, some rows of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError


class Source(Protocol):
    """The rows of one split, in a fixed order. Any batch of them can be read at once.

    All reading is done by the thread that trains, so that a source may hold an open file or a database connection. One
    that says `thread_safe = True` is read ahead by several threads at once, as `Columns` is. With `Dataset.workers`, a
    copy of the source goes to each process: it must be picklable, so it opens its files when it is first read.
    """

    def __len__(self) -> int:
        """The number of rows."""

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`, int (n,): arrays of shape (n, ...). Text is an array of strings, bytes or objects."""


class Columns:
    """A `Source` over arrays with a common leading axis, in memory or memory-mapped.

    A column is an array, or any object with `__len__` whose `column[indices]` is a NumPy array.

    Args:
      columns: the columns by name.
      left_out: what the data has beside them, by name, and what it is; for a message.
    """

    thread_safe = True

    def __init__(self, columns: Mapping[str, Any], left_out: Mapping[str, str] | None = None):
        self.columns = dict(columns)
        self.left_out = dict(left_out or {})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(column[indices]) for name, column in self.columns.items()}


class Rows:
    """Some rows of a `Source`, as a `Source`.

    Args:
      source: the rows to take from.
      indices: int (n,), which of them, in this order.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.thread_safe = getattr(source, "thread_safe", False)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.source[self.indices[indices]]


def as_column(name: Any, values: Any) -> np.ndarray:
    """`values` as an array. Lists of str or bytes, and rows of different lengths, become an object array.

    What is no array at all (a dict, None) becomes an object array without axes. Raises InputError for a masked array
    with masked values, which would count as numbers.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.getmaskarray(values).any():
        raise InputError(
            f"column {str(name)!r} is a masked array, and {int(np.ma.getmaskarray(values).sum())} of its values are "
            "masked: fill them (.filled(value)), or leave out their rows"
        )
    if isinstance(values, list | tuple) and values and all(isinstance(value, str | bytes) for value in values):
        return _objects(values)
    try:
        return np.asarray(values)
    except (ValueError, TypeError):  # rows of different lengths
        return _objects(list(values)) if isinstance(values, list | tuple) else _objects([values]).reshape(())


def is_numeric(column: Any) -> bool:
    """Whether the column holds numbers that JAX has. All others stay on the host: text, objects, times, records."""
    dtype = column.dtype
    if dtype.kind in "mM" or dtype.char in "gG":  # times; longdouble, which has no counterpart
        return False
    return dtype.kind in "biufc" or bool(jnp.issubdtype(dtype, jnp.number))  # the second: bfloat16, float8, int4


def for_device(name: str, column: Any) -> np.ndarray:
    """A numeric column in this machine's byte order, as JAX takes it.

    Raises InputError if values do not fit in the dtype that JAX gives them: without JAX_ENABLE_X64 int64 becomes int32,
    uint64 becomes uint32 and float64 becomes float32, and JAX would wrap integers and make floats infinite.
    """
    column = column.astype(column.dtype.newbyteorder("="), copy=False)
    narrow = jax.dtypes.canonicalize_dtype(column.dtype)
    if narrow == column.dtype or not column.size or column.dtype.kind not in "iuf":
        return column
    if column.dtype.kind == "f":
        limit, sizes = float(np.finfo(narrow).max), np.abs(column)
        beyond = column[np.isfinite(column) & (sizes > limit)]
    else:
        info, least, most = np.iinfo(narrow), column.min(), column.max()
        beyond = np.array([value for value in (most, least) if not info.min <= int(value) <= info.max])
    if beyond.size:
        raise InputError(
            f"column {name!r} has the value {beyond.flat[0]}, which {narrow} cannot hold, and JAX makes {narrow} of "
            f"{column.dtype}; expected smaller numbers (scaled, or numbered anew), text (astype(str) keeps an id off "
            "the device), or JAX_ENABLE_X64=1 in the environment"
        )
    return column


def as_trained(name: str, column: Any, trained: np.ndarray, *, required: bool) -> Any:
    """A column of rows of one's own in the dtype of the training rows, by which some are prepared: uint8 is scaled.

    Whole numbers become the training rows' whole numbers or floats if those hold them, floats their floats; only uint8,
    which may be an image, does not become float.

    Args:
      name: the column's name.
      column: the rows of one's own, (n, ...).
      trained: training rows, (m, ...).
      required: whether InputError is raised if that cannot be; else the column stays as it is.
    """
    if not (is_numeric(column) and is_numeric(trained)):
        return column
    dtype = trained.dtype.newbyteorder("=")
    if jax.dtypes.canonicalize_dtype(column.dtype.newbyteorder("=")) == jax.dtypes.canonicalize_dtype(dtype):
        return column
    with np.errstate(all="ignore"):
        cast = np.asarray(column).astype(dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        is_alike = column.dtype != np.uint8 and (column.dtype.kind != "c" or dtype.kind == "c")
        fits = is_alike and (np.isfinite(cast) | ~np.isfinite(column)).all()
        expected = f"{dtype}, scaled as they are"
    else:
        fits = column.dtype.kind in "biu" and (cast == column).all()
        expected = f"{dtype}, or whole numbers that it holds"
    if not fits and required:
        raise InputError(f"column {name!r} holds {column.dtype}, and {dtype} in the training rows; expected {expected}")
    return cast if fits else column


def _objects(values: Any) -> np.ndarray:
    column = np.empty(len(values), object)
    for index, value in enumerate(values):  # not at once: NumPy would look into values that are arrays
        column[index] = value
    return column


def permutation(seed: int, stream: int, rows: int) -> np.ndarray:
    """A random order of `rows` rows, int32 (rows,), equal in every NumPy version.

    A generator's raw bits are guaranteed to stay as they are (NEP 19), and its `permutation` is not.
    """
    bits = np.random.Philox(key=np.array([seed % 2**64, stream], np.uint64)).random_raw(rows)
    return np.argsort(bits, kind="stable").astype(np.int32)
