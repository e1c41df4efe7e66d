"""`TableFiles`, a dataset of tables in files: CSV, JSON lines, Parquet and NumPy."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.images import Images
from jaxmp.data.source import Columns, as_column, is_numeric
from jaxmp.errors import InputError, local_path, nearest


@dataclass(frozen=True, kw_only=True)
class TableFiles(Images):
    """A dataset of tables, a file for each split.

    The suffix says what a file is: .csv (the first line has the names of the columns), .jsonl (an object a line),
    .parquet, or .npz (arrays with a common leading axis). A folder is read as its .npy files, each the column of its
    name; what a step needs is read from the disk, so that more than fits in memory can be streamed. Other files are
    read into memory, and so are columns of single numbers.

        TableFiles(train="iris.csv", features=("sepal_length", "sepal_width"), label="species", images=())
    """

    train: str
    """File with the rows to train on."""
    validation: str | None = None
    """File with the rows to validate on; by default there are none."""
    test: str | None = None
    """File with the rows to test on; by default there are none."""
    features: tuple[str, ...] = ()
    """Columns of numbers that are joined to one, `features`, float32 (rows, numbers); the others stay as they are."""
    label: str | None = None
    """Column that becomes `label`, the number of its value among the sorted values of the training rows, from 0 on, if
    it holds text; whole numbers stay as they are."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        if isinstance(self.features, str):
            raise InputError(f"data.features = {self.features!r}: expected a tuple, ({self.features!r},)")

    def source(self, split: Split) -> Columns | None:
        """The rows of the file of a split; None if there is no such file.

        Raises InputError if the file cannot be read, lacks a column of `features` or `label`, or has another one called
        `features` or `label`; a feature is no number or beyond float32; or a label is none of the training rows' texts,
        or a text where they are numbers.
        """
        path = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if path is None:
            return None
        columns = read_columns(path, f"data.{split}")
        for name, made_of in (("features", self.features), ("label", self.label)):
            if name in columns and made_of and made_of not in (name, (name,)):
                raise InputError(
                    f"{path} has a column {name!r}, which data.{name} = {made_of!r} would replace; rename it"
                )
        if self.features:
            columns["features"] = self._joined(columns, path)
        if self.label is not None:
            labels = _take(columns, self.label, "data.label", path)
            if split == "train":
                self.__dict__.setdefault("_classes", _class_names(labels, f"{path}: {self.label}"))
            columns["label"] = self._labels(labels, path)
        return Columns(columns)

    def encode(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rows of one's own: where the columns of `features`, or of `label`, are there, what `source` makes of them is.

        Raises InputError as `source` does.
        """
        columns, where = {name: as_column(name, rows[name]) for name in rows}, "these rows"
        if self.features and columns.keys() >= set(self.features):
            columns["features"] = self._joined(columns, where)
        # Rows of `source` have numbers already.
        is_made = "label" in columns and (self.label != "label" or is_numeric(columns["label"]))
        if self.label in columns and not is_made:
            columns["label"] = self._labels(columns[self.label], where)
        return columns

    def _joined(self, columns: Mapping[str, Any], path: str) -> np.ndarray:
        parts = []
        for name in self.features:
            part = _take(columns, name, "data.features", path)
            if not is_numeric(part) or part.dtype.kind == "c":
                raise InputError(f"data.features names {name!r}, which in {path} holds {_kind(part)}; expected numbers")
            with np.errstate(over="ignore"):
                parts.append(part.reshape(len(part), -1).astype(np.float32))
            beyond = np.isfinite(part) & ~np.isfinite(parts[-1].reshape(part.shape))
            if beyond.any():
                raise InputError(
                    f"data.features names {name!r}, which in {path} has the value {part[beyond][0]:g}, which float32 "
                    "cannot hold; expected smaller numbers, scaled"
                )
        return np.concatenate(parts, axis=1)

    def classes(self) -> list[str] | None:
        """The classes of a `label` of text, in the order of their numbers; None for a label of numbers, or without one.

        Raises InputError as `source` does.
        """
        if self.label is None:
            return None
        if "_classes" not in self.__dict__:
            column = _take(read_columns(self.train, "data.train"), self.label, "data.label", self.train)
            self.__dict__["_classes"] = _class_names(column, f"{self.train}: {self.label}")
        return self.__dict__["_classes"]

    def _labels(self, column: np.ndarray, path: str) -> np.ndarray:
        names = self.classes()
        if names is None:
            if not is_numeric(column):
                raise InputError(
                    f"{path}: {self.label} holds {_kind(column)}, and numbers in {self.train}; expected numbers"
                )
            return column
        classes = {name: number for number, name in enumerate(names)}
        for row, value in enumerate(column):
            if str(value) not in classes:
                raise InputError(
                    f"{path}, row {row}: {self.label} is {str(value)!r}, which no row of {self.train} has; expected "
                    f"one of {', '.join(classes)}{nearest(str(value), classes)}"
                )
        return np.array([classes[str(value)] for value in column], np.int32)


class NpyFile:
    """A column of an .npy file, read where it is indexed: `column[indices]` is an array.

    Not memory-mapped: mapped pages that were read once count as the process's memory until the system needs them.
    Another process receives only the file's name.
    """

    def __init__(self, file: Path):
        """Raises ValueError, or what NumPy does, if the file is damaged, or holds objects or several arrays."""
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(mapped, np.memmap):
            raise ValueError("it holds several arrays, as .npz does; expected np.save(file, array)")
        if not mapped.flags.c_contiguous or not mapped.ndim:
            raise ValueError("its rows are not one behind the other; expected an array in C order")
        self.file, self.dtype, self.shape, self.ndim = file, mapped.dtype, mapped.shape, mapped.ndim
        self._start, self._opened = int(mapped.offset), os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._opened)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        rows = np.asarray(indices)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"{self.file} has {len(self)} rows; rows {rows.min()} to {rows.max()} were asked for")
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not found.size:
            return found
        size = found.nbytes // len(rows)
        buffer = found.reshape(-1).view(np.uint8).data
        # Neighbours in one piece: all rows, where a small set is read at once.
        firsts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist()]
        for first, end in itertools.pairwise([*firsts, len(rows)]):
            part, place = buffer[first * size : end * size], self._start + int(rows[first]) * size
            while part:
                count = os.preadv(self._opened, [part], place)  # at most 2 GiB
                if not count:
                    raise InputError(f"{self.file} ends before row {rows[end - 1]}; copy it again")
                part, place = part[count:], place + count
        return found

    def __reduce__(self) -> Any:
        return NpyFile, (self.file,)


def read_columns(path: str, where: str) -> dict[str, Any]:
    """The columns of a table file, or of a folder of .npy files; see `TableFiles`.

    Raises: InputError, which begins with `where`, if there is none, or it cannot be read.
    """
    from jaxmp.data.tables import check_lengths, read_table

    folder = local_path(where, path)
    if not folder.is_dir():
        return read_table(path, where)
    columns = {file.stem: _open(file) for file in sorted(folder.glob("*.npy"))}
    if not columns:
        raise InputError(f"{where} {path!r}: the folder has no .npy files; expected some, each a column")
    check_lengths(str(folder), columns)
    return columns


def _open(file: Path) -> Any:
    try:
        column = NpyFile(file)
        return column[np.arange(len(column))] if column.ndim == 1 else column
    except MemoryError:  # it is the machine's
        raise
    except Exception as error:  # NumPy passes on what reading the header raises
        raise InputError(f"{file} cannot be read as npy: {str(error).partition(chr(10))[0]:.300}") from None


def _take(columns: Mapping[str, Any], name: str, where: str, path: str) -> np.ndarray:
    if name not in columns:
        raise InputError(f"{where} names {name!r}; {path} has {', '.join(columns)}{nearest(name, columns)}")
    column = columns[name]
    return column[np.arange(len(column))] if isinstance(column, NpyFile) else column


def _class_names(column: np.ndarray, where: str) -> list[str] | None:
    if column.dtype == object:
        for row, value in enumerate(column):
            if not isinstance(value, str | bytes):
                raise InputError(f"{where} is {value!r:.60} in row {row}; expected texts, or numbers alone")
    return None if is_numeric(column) else sorted({str(value) for value in column})


def _kind(column: np.ndarray) -> str:
    return "text" if column.dtype.kind in "OSU" else column.dtype.name
