"""`TableFiles`, a dataset of tables in files: CSV, JSON lines, Parquet and NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.images import Images
from jaxmp.data.source import Columns, is_numeric
from jaxmp.errors import InputError, local_path, nearest


@dataclass(frozen=True, kw_only=True)
class TableFiles(Images):
    """A dataset of tables, a file for each split.

    The suffix says what a file is: .csv (the first line has the names of the columns), .jsonl (an object a line),
    .parquet, or .npz (arrays with a common leading axis). A folder is read as its .npy files, each the column of its
    name; they are memory-mapped, so that more than fits in memory can be streamed. The others are read into memory.

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

        Raises InputError if the file cannot be read, lacks a column of `features` or `label`, a feature is no number,
        or a label of text is none of the training rows'.
        """
        path = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if path is None:
            return None
        columns = read_columns(path, f"data.{split}")
        if self.features:
            parts = [_take(columns, name, "data.features", path) for name in self.features]
            for name, part in zip(self.features, parts, strict=True):
                if not is_numeric(part) or part.dtype.kind == "c":
                    raise InputError(
                        f"data.features names {name!r}, which in {path} holds {_kind(part)}; expected numbers"
                    )
            rows = len(parts[0])
            columns["features"] = np.concatenate([part.reshape(rows, -1) for part in parts], axis=1, dtype=np.float32)
        if self.label is not None:
            columns["label"] = self._labels(_take(columns, self.label, "data.label", path), split, path)
        return Columns(columns)

    def classes(self) -> list[str]:
        """The classes of `label`, in the order of their numbers. Raises InputError as `source` does."""
        if self.label is None:
            raise InputError("data.label is None; expected the column of the classes")
        column = _take(read_columns(self.train, "data.train"), self.label, "data.label", self.train)
        return sorted({str(value) for value in column})

    def _labels(self, column: np.ndarray, split: Split, path: str) -> np.ndarray:
        if is_numeric(column):
            return column
        classes = {name: number for number, name in enumerate(self.classes())}
        for row, value in enumerate(column):
            if str(value) not in classes:
                raise InputError(
                    f"{path}, row {row}: {self.label} is {str(value)!r}, which no row of {self.train} has; expected "
                    f"one of {', '.join(classes)}{nearest(str(value), classes)}"
                )
        return np.array([classes[str(value)] for value in column], np.int32)


def read_columns(path: str, where: str) -> dict[str, np.ndarray]:
    """The columns of a table file, or of a folder of .npy files; see `TableFiles`.

    Raises: InputError, which begins with `where`, if there is none, or it cannot be read.
    """
    from jaxmp.data.tables import check_lengths, read_table

    folder = local_path(where, path)
    if not folder.is_dir():
        return read_table(path, where)
    columns = {file.stem: _map(file) for file in sorted(folder.glob("*.npy"))}
    if not columns:
        raise InputError(f"{where} {path!r}: the folder has no .npy files; expected some, each a column")
    check_lengths(str(folder), columns)
    return columns


def _map(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} cannot be read as npy: {str(error).partition(chr(10))[0]:.300}") from None


def _take(columns: Mapping[str, np.ndarray], name: str, where: str, path: str) -> np.ndarray:
    if name not in columns:
        raise InputError(f"{where} names {name!r}; {path} has {', '.join(columns)}{nearest(name, columns)}")
    return columns[name]


def _kind(column: np.ndarray) -> str:
    return "text" if column.dtype.kind in "OSU" else column.dtype.name
