"""Rows in files: CSV, JSON lines, Parquet and NumPy's npz, read into arrays and written from them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from jaxmp.data.source import as_column, is_numeric
from jaxmp.errors import InputError, local_path

STDIN = "-"


def read_table(path: str | os.PathLike[str], where: str = "input") -> dict[str, np.ndarray]:
    """The columns of a table, by name: arrays of shape (rows,), or (rows, ...) where each row holds as many numbers.

    The suffix says what the file is: .csv (the first line has the names), .jsonl (an object a line), .parquet or .npz
    (arrays with a common leading axis). `-` reads standard input, CSV or JSON lines. Messages about the path begin with
    `where`.

    Raises:
      InputError: there is no such file, it is of another kind or broken, it has no rows, or a cell is empty. A text in
        quotes may be empty, and `nan` is a number.
    """
    if path == STDIN:
        text = sys.stdin.buffer.read()
        kind = ".jsonl" if text.lstrip()[:1] == b"{" else ".csv"
        return _read("standard input", kind, io.BytesIO(text))
    file = local_path(where, path)
    kind = table_kind(file, where)
    try:
        with file.open("rb") as opened:
            return _read(str(file), kind, opened)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{where} {str(file)!r}: {error.strerror}; expected a file") from None


def table_kind(path: str | os.PathLike[str], where: str) -> str:
    """The suffix of a table's file, in small letters. Raises InputError, which begins with `where`, for another."""
    suffix = Path(path).suffix.lower()
    if suffix not in _READ:
        raise InputError(f"{where} {os.fspath(path)!r}: expected a file that ends with {', '.join(_READ)}")
    return suffix


def write_table(path: str | os.PathLike[str], columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns with a common leading axis; the file is whole, or as it was before.

    The suffix says how: .npz keeps every shape and dtype; .parquet and .jsonl write nested lists of what has more axes,
    and .parquet keeps the dtype; .csv makes a column of each number, `output_0`, `output_1`, ... Floats are written so
    that they are read back equal. Numbers for which NumPy has no dtype, bfloat16 say, are written as float32.

    Raises:
      InputError: another suffix.
      OSError: the file cannot be written.
    """
    path = local_path("output", path)
    kind = table_kind(path, "output")
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            _WRITE[kind](file, {name: _of_numpy(column) for name, column in columns.items()})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _of_numpy(column: np.ndarray) -> np.ndarray:
    return column.astype(np.float32) if column.dtype.kind == "V" and is_numeric(column) else column


def _read(name: str, kind: str, file: IO[bytes]) -> dict[str, np.ndarray]:
    with _broken(name, kind):
        columns = _READ[kind](file)
    check_lengths(name, columns)
    return columns


def check_lengths(name: str, columns: Mapping[str, np.ndarray]) -> None:
    """Raises InputError, which begins with `name`, unless the columns have one length, of at least one row."""
    lengths = {column: array.shape[0] if array.ndim else None for column, array in columns.items()}
    if not columns or len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise InputError(f"{name} has columns of lengths {lengths}; expected one length, of at least one row")


@contextlib.contextmanager
def _broken(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:  # it is the machine's
        raise
    except Exception as error:  # pyarrow, zipfile, NumPy and json each have their own for a broken file
        why = str(error).partition("\n")[0]
        raise InputError(f"{name} cannot be read as {kind[1:]}: {why:.300}") from None


def _from_arrow(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: _array(name, table.column(name)) for name in table.column_names}


def _array(name: str, column: pa.ChunkedArray) -> np.ndarray:
    leaves, shape = column, [len(column)]
    _refuse_empty(name, leaves.null_count)
    while (
        pa.types.is_list(leaves.type) or pa.types.is_large_list(leaves.type) or pa.types.is_fixed_size_list(leaves.type)
    ):
        sizes = pyarrow.compute.list_value_length(leaves).unique().to_pylist()
        shape.append(sizes[0] if len(sizes) == 1 else -1)
        leaves = pyarrow.compute.list_flatten(leaves)
        _refuse_empty(name, leaves.null_count)
    return as_column(name, column.to_pylist()) if -1 in shape else leaves.to_numpy().reshape(shape)


def _refuse_empty(name: str, count: int, where: str = "") -> None:
    if count:
        raise ValueError(f"column {name!r} has {count} empty cells{where}; fill them, or leave out their rows")


def _read_csv(file: IO[bytes]) -> dict[str, np.ndarray]:
    # Not "NA", "null" and the like, which may be texts, and not "nan".
    empty_is_null = pyarrow.csv.ConvertOptions(
        null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(file, parse_options=lines, convert_options=empty_is_null)
    for field in table.schema:
        if pa.types.is_binary(field.type):  # what pyarrow makes of other bytes
            raise ValueError(f"column {field.name!r} is not UTF-8")
    return _from_arrow(table)


def _read_json_lines(file: IO[bytes]) -> dict[str, np.ndarray]:
    rows = [json.loads(line) for line in file.read().splitlines() if line.strip()]
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or set(row) != set(names):
            raise ValueError(f"object {number} has other names than the first, {names}")
    columns = {name: as_column(name, [row[name] for row in rows]) for name in names}
    for name, column in columns.items():
        if column.dtype == object:  # as every column with an empty cell is
            empty = [number for number, row in enumerate(rows, start=1) if _has_empty(row[name])]
            _refuse_empty(name, len(empty), f", the first in object {empty[0]}" if empty else "")
    return columns


def _has_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(map(_has_empty, value)))


def _read_parquet(file: IO[bytes]) -> dict[str, np.ndarray]:
    return _from_arrow(pyarrow.parquet.read_table(file))


def _read_npz(file: IO[bytes]) -> dict[str, np.ndarray]:
    arrays = np.load(file, allow_pickle=False)
    if isinstance(arrays, np.ndarray):
        raise ValueError("it holds one array without a name; expected np.savez(file, name=array)")
    columns = dict(arrays)
    for name, array in columns.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name!r} in it is no array; expected np.savez(file, name=array)")
    return columns


_READ: dict[str, Callable[[IO[bytes]], dict[str, np.ndarray]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}


def _lists(columns: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {name: column.tolist() for name, column in columns.items()}


def _write_csv(file: IO[bytes], columns: dict[str, np.ndarray]) -> None:
    flat = {}
    for name, column in columns.items():
        if column.ndim == 1:
            flat[name] = column
        else:
            rows = column.reshape(len(column), -1)
            flat |= {f"{name}_{i}": rows[:, i] for i in range(rows.shape[1])}
    pyarrow.csv.write_csv(pa.table({name: pa.array(column.tolist()) for name, column in flat.items()}), file)


def _write_json_lines(file: IO[bytes], columns: dict[str, np.ndarray]) -> None:
    lists = _lists(columns)
    for row in zip(*lists.values(), strict=True):
        file.write(json.dumps(dict(zip(lists, row, strict=True))).encode() + b"\n")


def _write_parquet(file: IO[bytes], columns: dict[str, np.ndarray]) -> None:
    pyarrow.parquet.write_table(pa.table({name: _to_arrow(column) for name, column in columns.items()}), file)


def _to_arrow(column: np.ndarray) -> pa.Array:
    if column.dtype.char not in "?efd" + np.typecodes["AllInteger"]:
        return pa.array(column.tolist())
    nested = pa.array(np.ascontiguousarray(column, column.dtype.newbyteorder("=")).ravel())
    for axis in range(column.ndim - 1, 0, -1):
        ends = np.arange(np.prod(column.shape[:axis], dtype=np.int64) + 1) * column.shape[axis]
        nested = pa.LargeListArray.from_arrays(pa.array(ends), nested)
    return nested


def _write_npz(file: IO[bytes], columns: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # np.savez takes no array of the name "file"
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, column, allow_pickle=False)


_WRITE: dict[str, Callable[[IO[bytes], dict[str, np.ndarray]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
    ".npz": _write_npz,
}
