"""Splits of one's own: random ones, k folds, and training rows that come as often from each class.

    data = jaxmp.random_split({"x": x, "label": y}, validation=0.1, test=0.1, stratify="label")
    folds = [fit(replace(experiment, data=fold)) for fold in jaxmp.k_folds(data, 5)]
    data = jaxmp.balanced(data, by="label")

Each takes any `Dataset`, or arrays by name, and returns a dataset of the same class that says so in its field `cuts`:
which rows go where is a function of the seed and the number of rows alone, and a part of the experiment's hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from jaxmp.data.arrays import Arrays
from jaxmp.data.dataset import Dataset, Split
from jaxmp.data.source import Columns, Source, permutation
from jaxmp.data.transforms import read_rows
from jaxmp.errors import InputError, nearest, number, whole_number

AnyDataset = TypeVar("AnyDataset", bound=Dataset)
Open = Callable[[Split], "Source | None"]
"""opens a split as it is before a cut"""

CHUNK_ROWS = 4096
"""rows read at a time, of a source that is no arrays"""


def random_split(
    data: Dataset | Mapping[str, Any],
    *,
    validation: float = 0.1,
    test: float = 0.0,
    seed: int = 0,
    stratify: str | None = None,
) -> Any:
    """The dataset with its training rows dealt anew, at random, to train, validation and test.

    Args:
      data: a dataset, or arrays by name, as for `Arrays.of`.
      validation: share of the training rows, from 0 to 1, or a whole number of them; 0: the data's own split, if any.
      test: the same for the test split.
      seed: of the random choice.
      stratify: a column of labels: each class has the same share of each split, to a row.

    Raises: InputError if the shares leave no training rows, or, when it is read, if a share above 0 is less than half a
      row, or there is no such column.
    """
    return _cut(data, RandomSplit(validation, test, seed, stratify))


def k_folds(data: Dataset | Mapping[str, Any], k: int = 5, *, seed: int = 0, stratify: str | None = None) -> list[Any]:
    """The k datasets of a cross-validation: in each, another k-th of the training rows is the validation split.

    The test split stays the data's own.

    Args:
      data: a dataset, or arrays by name, as for `Arrays.of`.
      k: the number of folds, at least 2.
      seed: of the random choice.
      stratify: a column of labels: each class is spread evenly over the folds, to a row.

    Raises: InputError if k is no whole number of at least 2, or, when it is read, if there is no such column.
    """
    k = whole_number("k", k, 2)
    return [_cut(data, Fold(i, k, seed, stratify)) for i in range(k)]


def balanced(data: Dataset | Mapping[str, Any], by: str, *, seed: int = 0) -> Any:
    """The dataset whose training rows come as often from each class: rows of rarer ones come several times an epoch.

    An epoch has as many rows of each class as the largest has. Validation and test stay as they are. Where the size of
    a class does not divide that of the largest, the rows that come once more are drawn at random, by the seed. To weigh
    the loss instead, see `jaxmp.Weighted`.

    Args:
      data: a dataset, or arrays by name, as for `Arrays.of`. Split it first: `balanced(random_split(data), by)`.
      by: the column of labels.
      seed: of the random choice.

    Raises: InputError, when it is read, if there is no such column.
    """
    return _cut(data, Balanced(by, seed))


def _cut(data: Any, cut: Any) -> Any:
    if isinstance(data, Mapping):
        data = Arrays.of(data)
    if not isinstance(data, Dataset):
        raise InputError(f"data = {data!r:.60}: expected a Dataset, such as TFDS() or Arrays(load), or arrays by name")
    if any(isinstance(before, Balanced) for before in data.cuts):
        raise InputError(
            "the data is balanced already, so that copies of one row would come into train and validation; expected "
            "the other order, balanced(random_split(data), by)"
        )
    return dataclasses.replace(data, cuts=(*data.cuts, cut))


@dataclasses.dataclass(frozen=True)
class RandomSplit:
    """Deals the training rows to three splits. See `random_split`."""

    validation: float = 0.1
    """Share or number of the training rows that are the validation split; 0: the data's own."""
    test: float = 0.0
    """Share or number of the training rows that are the test split; 0: the data's own."""
    seed: int = 0
    """Seed of the random choice."""
    stratify: str | None = None
    """Column of labels, of which each class is dealt alike."""

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            value = number(f"random_split: {name}", getattr(self, name))
            if value < 0 or (value >= 1 and value != int(value)):
                raise InputError(
                    f"random_split: {name} = {value:g}: expected a share below 1, or a whole number of rows"
                )
        _check_seed(self, "random_split")
        shares = [share for share in (self.validation, self.test) if share < 1]
        if sum(shares) >= 1:
            raise InputError(f"random_split: validation = {self.validation:g} and test = {self.test:g} leave no rows")

    def source(self, split: Split, open: Open) -> Source | None:
        """The rows of a split."""
        if split != "train" and not getattr(self, split):
            return open(split)
        source = open("train")
        assert source is not None  # `Dataset` refuses data without it
        rows = len(source)
        classes = _classes(source, self.stratify)
        counts = {name: _count(getattr(self, name), rows) for name in ("validation", "test")}
        for name, count in counts.items():
            if getattr(self, name) and not count:
                raise InputError(
                    f"random_split: {name} = {getattr(self, name):g} of {rows} rows is none of them; expected a larger "
                    "share, or a whole number of rows"
                )
        if sum(counts.values()) >= rows:
            raise InputError(f"random_split: {counts} rows leave none of {rows} to train on")
        order, parts = permutation(self.seed, 0, rows), {}
        for name, count in counts.items():
            taken = _take(order, classes, count)
            parts[name], order = order[taken], order[~taken]
        return taken_rows(source, np.sort(order if split == "train" else parts[split]))


@dataclasses.dataclass(frozen=True)
class Fold:
    """One fold of a cross-validation. See `k_folds`."""

    number: int
    """Which of the folds is the validation split, from 0."""
    k: int
    """Number of folds."""
    seed: int = 0
    """Seed of the random choice."""
    stratify: str | None = None
    """Column of labels, of which each class is dealt alike."""

    def __post_init__(self) -> None:
        _check_seed(self, "k_folds")

    def source(self, split: Split, open: Open) -> Source | None:
        """The rows of a split."""
        if split == "test":
            return open("test")
        source = open("train")
        assert source is not None
        rows = len(source)
        if rows < self.k:
            raise InputError(f"k_folds: {self.k} folds of {rows} rows; expected at most a fold for each row")
        order = permutation(self.seed, 1, rows)
        order = order[np.argsort(_classes(source, self.stratify)[order], kind="stable")]
        validation = np.zeros(rows, bool)
        validation[order[self.number :: self.k]] = True
        return taken_rows(source, np.flatnonzero(validation if split == "validation" else ~validation))


@dataclasses.dataclass(frozen=True)
class Balanced:
    """Repeats training rows until each class has as many. See `balanced`."""

    by: str
    """Column of labels."""
    seed: int = 0
    """Seed of the choice of the rows that come once more."""

    def __post_init__(self) -> None:
        _check_seed(self, "balanced")

    def source(self, split: Split, open: Open) -> Source | None:
        """The rows of a split."""
        source = open(split)
        if split != "train" or source is None:
            return source
        classes = _classes(source, self.by)
        most = int(np.bincount(classes).max())
        rows = []
        for i in range(classes.max() + 1):
            own = np.flatnonzero(classes == i)
            more = own[permutation(self.seed, 2 + i, len(own))[: most % len(own)]]
            rows += [np.tile(own, most // len(own)), more]
        return taken_rows(source, np.sort(np.concatenate(rows)))


def taken_rows(source: Source, rows: np.ndarray) -> Source:
    """The source of the rows at `rows`, int (n,), of another one. What is in memory is copied, all else read later."""
    if isinstance(source, Columns):
        columns = {
            name: column[rows] if type(column) is np.ndarray else _TakenColumn(column, rows)
            for name, column in source.columns.items()
        }
        return Columns(columns, left_out=source.left_out)
    return TakenRows(source, rows)


class TakenRows:
    """A `Source` of some rows of another one, perhaps several times."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows
        self.thread_safe = getattr(source, "thread_safe", False)
        self.left_out = getattr(source, "left_out", {})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return read_rows(self._source, self._rows[indices])


class _TakenColumn:
    """Some rows of a column that is not in memory."""

    def __init__(self, column: Any, rows: np.ndarray):
        self._column, self._rows = column, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Any) -> np.ndarray:
        return np.asarray(self._column[self._rows[indices]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    @property
    def dtype(self) -> np.dtype:
        return self._column.dtype

    @property
    def ndim(self) -> int:
        return self._column.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._column.shape[1:])


def _check_seed(cut: Any, function: str) -> None:
    object.__setattr__(cut, "seed", whole_number(f"{function}: seed", cut.seed, 0))


def _count(wanted: float, rows: int) -> int:
    return round(wanted * rows) if wanted < 1 else int(wanted)


def _take(order: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """Which places of `order` are taken, bool: the first `count`, with the same share of each class, to a row."""
    of = classes[order]
    sizes = np.bincount(of)
    exact = sizes * (count / len(order))
    quota = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - quota), kind="stable")[: count - int(quota.sum())]
    quota[largest] += 1
    taken = np.zeros(len(order), bool)
    for i, wanted in enumerate(quota):
        taken[np.flatnonzero(of == i)[:wanted]] = True
    return taken


def _classes(source: Source, column: str | None) -> np.ndarray:
    """The class of each row as a number from 0 on, int (rows,); all 0 without a column of labels."""
    rows = len(source)
    if column is None:
        return np.zeros(rows, int)
    first = read_rows(source, np.arange(1))
    if column not in first:
        raise InputError(
            f"the data has no column {column!r} of labels; it has {', '.join(sorted(first))}{nearest(column, first)}"
        )
    if first[column].shape != (1,):
        raise InputError(f"column {column!r} has shape {first[column].shape[1:]} a row; expected one label a row")
    if isinstance(source, Columns):
        labels = np.asarray(source.columns[column][:])
    else:
        chunks = np.split(np.arange(rows), range(CHUNK_ROWS, rows, CHUNK_ROWS))
        labels = np.concatenate([read_rows(source, chunk)[column] for chunk in chunks])
    if labels.dtype == object:  # bytes of any encoding, by a character each
        labels = np.array([label.decode("latin-1") if isinstance(label, bytes) else str(label) for label in labels])
    return np.unique(labels, return_inverse=True)[1].reshape(rows)
