"""Functions that a user gives to change the data: host transforms in NumPy, and transforms on the device."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.source import Columns, Source, as_column, is_numeric
from jaxmp.errors import InputError

Rows = dict[str, np.ndarray]
HostTransform = Callable[[Rows], Rows]
Transform = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]

FIRST_STREAM = 0x74726E73
"""number of the first transform's stream of keys; no place in a batch, by which augmentation draws, is as large"""


@contextlib.contextmanager
def errors_named(call: str) -> Iterator[None]:
    """Context manager: any exception inside is raised as an InputError that begins with `call`.

    The message has the exception's class and text, and the line of the user's own code that raised it.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{call}: {error}") from error
    except MemoryError:  # it is the machine's, and no bad input
        raise
    except Exception as error:  # a user's function can raise anything
        where = _own_line(error)
        raise InputError(f"{call} raised {type(error).__name__}: {error}{where}") from error


def _own_line(error: Exception) -> str:
    """`" (file.py, line 3)"`: the last line of the traceback that is neither jaxmp's nor installed; "" if none is."""
    foreign = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(foreign) and "-packages" not in frame.filename:
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def read_rows(source: Source, indices: np.ndarray) -> Rows:
    """Returns `source[indices]`, the rows of a source that may be one's own.

    Raises: InputError if the source raised, or returned no dict of arrays with a row for each index.
    """
    if isinstance(source, Columns | HostTransformed):  # which checks what it reads
        return source[indices]
    call = f"{type(source).__name__}[indices]"
    with errors_named(call):
        rows = source[indices]
    if not isinstance(rows, Mapping):
        raise InputError(f"{call} returned {_described(rows)}; expected a dict of arrays, {{name: array}}")
    for name, column in rows.items():
        if not (hasattr(column, "dtype") and hasattr(column, "shape")):
            raise InputError(f"{call} returned {_described(column)} as {name!r}; expected an array")
        if column.shape[:1] != (len(indices),):
            raise InputError(
                f"{call} returned {name!r} of shape {tuple(column.shape)} for {len(indices)} indices; expected a row "
                "for each of them"
            )
    with errors_named(call):  # arrays of other libraries become NumPy's
        return {
            name: column if isinstance(column, np.ndarray | jax.Array) else as_column(name, column)
            for name, column in rows.items()
        }


def apply_host_transforms(transforms: Sequence[HostTransform], rows: Mapping[str, Any]) -> Rows:
    """`rows` after each of `transforms` in order.

    Args:
      transforms: functions of a dict of arrays, each (n, ...), that return such a dict with the same n.
      rows: arrays of shape (n, ...), of text and objects too.

    Raises:
      InputError: a transform raised, or returned no dict of arrays or another number of rows. Names the transform.
    """
    rows = dict(rows)
    for index, transform in enumerate(transforms):
        call = _call("host_transforms", index, transform)
        count = len(next(iter(rows.values())))
        with errors_named(call):
            result = transform(dict(rows))
        if not isinstance(result, Mapping) or not result:
            raise InputError(f"{call} returned {_described(result)}; expected a dict of arrays, {{name: array}}")
        with errors_named(call):
            rows = {str(name): as_column(name, column) for name, column in result.items()}
        shapes = {name: column.shape for name, column in rows.items()}
        if any(shape[:1] != (count,) for shape in shapes.values()):
            raise InputError(
                f"{call} was given {count} rows and returned arrays of shapes {shapes}; expected {count} along axis 0"
            )
    return rows


class HostTransformed:
    """A `Source` whose rows have gone through host transforms."""

    def __init__(self, source: Source, transforms: Sequence[HostTransform]):
        self.source, self.transforms = source, tuple(transforms)
        self.thread_safe = getattr(source, "thread_safe", False)
        self._first = self._layout(self._transformed(np.arange(1)))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        """The transformed rows. Raises InputError if their columns differ in dtype or shape from those of row 0."""
        rows = self._transformed(indices)
        found = self._layout(rows)
        if found != self._first:
            raise InputError(
                f"data.host_transforms gave {_listed(found)} for some rows and {_listed(self._first)} for the first "
                "row alone; expected the same columns, dtypes and shapes for every row: pad or cut them to one length"
            )
        return rows

    def _transformed(self, indices: np.ndarray) -> Rows:
        return apply_host_transforms(self.transforms, read_rows(self.source, indices))

    @staticmethod
    def _layout(rows: Rows) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (column.dtype.name, column.shape[1:]) for name, column in rows.items() if is_numeric(column)}


def apply_transforms(
    transforms: Sequence[Transform], batch: dict[str, Any], key: Any, global_index: jax.Array | None = None
) -> dict[str, Any]:
    """`batch` after each of `transforms` in order, by `jax.vmap` over the examples. Pure, to be traced.

    Args:
      transforms: functions `(key, row) -> row` of one example, a dict of arrays without the leading axis.
      batch: arrays of shape (rows, ...).
      key: the step's key for the data; None in evaluation, and then each transform gets None.
      global_index: int32 (rows,), the place of each row in the whole batch; by default 0 to rows - 1.

    Raises:
      InputError: a transform raised while it was traced, returned no dict of arrays, or lost "weight". Names it.
    """
    for index, transform in enumerate(transforms):
        call = _call("transforms", index, transform)
        with errors_named(call):
            if key is None:
                batch = jax.vmap(lambda row, apply=transform: _one(apply, None, row))(batch)
                continue
            if global_index is None:
                global_index = jnp.arange(len(next(iter(batch.values()))))
            of_transform = jax.random.fold_in(key, FIRST_STREAM + index)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(of_transform, global_index)
            batch = jax.vmap(lambda key, row, apply=transform: _one(apply, key, row))(keys, batch)
    return batch


def _one(transform: Transform, key: jax.Array | None, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
    result = transform(key, dict(row))
    if not isinstance(result, Mapping):
        raise InputError(f"returned {_described(result)}; expected a dict of arrays, {{name: array}}")
    if "weight" in row and ("weight" not in result or jnp.ndim(result["weight"])):
        raise InputError(
            f"returned {', '.join(map(str, result)) or 'an empty dict'}; expected 'weight', a number, among them, as "
            "in {**row, ...}"
        )
    for name, value in result.items():
        if not isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise InputError(f"returned {_described(value)} as {name!r}; expected an array or a number")
    return {str(name): jnp.asarray(value) for name, value in result.items()}


def _call(field: str, index: int, function: Any) -> str:
    return f"data.{field}[{index}] ({function_name(function)})"


def function_name(function: Any) -> str:
    """The name of a function in a message; a `functools.partial` goes by its function, an object by its class."""
    while hasattr(function, "func"):
        function = function.func
    return getattr(function, "__qualname__", None) or type(function).__name__


def _described(result: Any) -> str:
    if result is None or (isinstance(result, Mapping) and not result):
        return "None" if result is None else "an empty dict"
    return "an array" if isinstance(result, jax.Array | np.ndarray) else type(result).__name__


def _listed(layout: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in layout.items()) or "no numbers"
