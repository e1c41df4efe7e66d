"""From a source to batches: which rows a step sees, and how they reach the device.

A step's rows are a pure function of (seed, step), whether the split is resident on the device or streamed from the
host. What is then done to a batch on the device is `Dataset.prepare`. A batch is a dict of arrays with a leading axis,
and "weight" float32 (batch,): 1 for a row, 0 for padding.
"""

from __future__ import annotations

import functools
import gc
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmp.data.dataset import Dataset, Split
from jaxmp.data.source import Columns, Source, as_column, as_trained, for_device, is_numeric, permutation
from jaxmp.data.transforms import HostTransformed, apply_host_transforms, read_rows
from jaxmp.data.workers import sendable
from jaxmp.errors import InputError, RunFailed

READ_THREADS = 4
READ_AHEAD = 8  # batches
CHECKED_BYTES = 2**23  # read at a time
SAMPLED_ROWS = 256  # of a source that is no arrays


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order in which an epoch visits the rows: a permutation, int32 (examples,), equal in every NumPy version."""
    return permutation(seed, epoch, examples)


@dataclass(frozen=True)
class Batches:
    """Which rows each step sees. An epoch visits each row once; its last batch is padded with rows of weight 0."""

    examples: int
    """Rows of the split."""
    batch_size: int
    """Rows of a batch, counted over all devices."""
    seed: int
    """Seed of the order of the rows."""
    limit: int | None = None
    """The most batches of an epoch; all by default. Each epoch takes other rows."""
    repeat: bool = False
    """Whether every epoch takes the batches of the first."""

    def __post_init__(self):
        if self.batch_size > self.examples:
            raise InputError(f"data.batch_size is {self.batch_size}; the training split has only {self.examples} rows")

    @property
    def per_epoch(self) -> int:
        """Number of batches of an epoch, the padded one included."""
        whole = -(-self.examples // self.batch_size)
        return whole if self.limit is None else min(self.limit, whole)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """The rows of each batch of an epoch, int32 (per_epoch, batch_size); the last is padded with the first rows."""
        order = epoch_order(self.seed, 0 if self.repeat else epoch, self.examples)
        return np.resize(order, (self.per_epoch, self.batch_size))

    @property
    def expected_rows(self) -> float:
        """The expected number of rows in a batch, padding included: what a private step divides by."""
        return self.batch_size

    @property
    def mean_rows(self) -> float:
        """The mean number of rows in the batches of an epoch, without padding: only the last batch may have some."""
        last = float(np.sum(self.weights(self.per_epoch - 1)))
        return ((self.per_epoch - 1) * self.batch_size + last) / self.per_epoch

    def batch(self, rows: Any, position: Any) -> tuple[Any, Any]:
        """Rows and weights of the batch at `position` in an epoch, from `rows`, its line of `epoch_rows`."""
        return rows, self.weights(position)

    def weights(self, position: int | jax.Array) -> np.ndarray | jax.Array:
        """float32 (batch_size,): 1 for rows and 0 for padding in the batch at `position`, 0 to per_epoch - 1."""
        rows = position * self.batch_size + np.arange(self.batch_size, dtype=np.int32)
        return (rows < self.examples).astype(np.float32)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (batch_size,) int32 that step `step`, from 0, sees, and their weights (batch_size,) float32."""
        epoch, position = divmod(step, self.per_epoch)
        rows, weights = self.batch(_epoch_rows(self, epoch)[position], position)
        return rows, np.asarray(weights)


@functools.lru_cache(maxsize=2)  # of this epoch and, read ahead, of the next
def _epoch_rows(batches: Batches, epoch: int) -> np.ndarray:
    rows = batches.epoch_rows(epoch)
    rows.setflags(write=False)
    return rows


def resident(source: Source) -> dict[str, np.ndarray]:
    """All rows of `source` as arrays, without the columns that hold no numbers in row 0.

    Raises InputError if a column holds numbers of one shape in row 0 and not in all rows, or as `for_device` does.
    """
    return _read_numeric(source, np.arange(len(source)), first_row(source))


def first_row(source: Source) -> dict[str, np.ndarray]:
    """Row 0 of `source`, (1, ...): the columns that hold numbers in it, and so in every batch."""
    return _numeric(read_rows(source, np.arange(1)))


def prepared_ahead(data: Dataset, source: Source) -> Source:
    """The training rows as the steps take them, after `data.prepare_ahead`; `source` itself where that does nothing.

    Whether they are resident or streamed then, the steps see the same bits.
    """
    if type(data).prepare_ahead is Dataset.prepare_ahead:
        return source
    return Columns(data.prepare_ahead(resident(source)))


def nbytes(source: Source, prepare_ahead: Callable[[dict[str, np.ndarray]], Any] = dict) -> int:
    """The size in bytes of `prepare_ahead(resident(source))`, computed from one row."""
    row = prepare_ahead(first_row(source))
    return sum(column.nbytes for column in row.values()) * len(source)


def left_out(source: Source) -> dict[str, str]:
    """The columns of `source` that hold no numbers that JAX has, and what they hold, by name: no batch has them."""
    first = read_rows(source, np.arange(1))
    kinds = {name: _kind(column) for name, column in first.items() if not is_numeric(column)}
    return {**getattr(source, "left_out", {}), **kinds}


def check_values(source: Source) -> None:
    """Raises InputError if a column holds values that JAX cannot, see `for_device`.

    Args:
      source: of `Columns`, the columns of large whole numbers are read in parts if they are arrays in memory or in
        files, which have a dtype, and else at a sample of the rows; of any other source a sample of its rows is read.
    """
    if not isinstance(source, Columns):
        sample(source)
        return
    for name, column in source.columns.items():
        row = np.asarray(column[np.arange(1)])
        if row.dtype.kind not in "iu" or row.dtype.itemsize <= 4:
            continue
        if not hasattr(column, "dtype"):
            sample(Columns({name: column}))
            continue
        size = max(1, CHECKED_BYTES // max(1, row.nbytes))
        for start in range(0, len(column), size):
            end = min(start + size, len(column))
            for_device(name, column[start:end] if isinstance(column, np.ndarray) else column[np.arange(start, end)])


def sample(source: Source) -> dict[str, np.ndarray]:
    """At most 256 rows of `source`, spread evenly, the first and the last among them: the columns that hold numbers.

    Raises: InputError as `resident` does.
    """
    return _read_numeric(source, sampled_rows(len(source)), first_row(source))


def sampled_rows(rows: int) -> np.ndarray:
    """At most 256 of `rows` rows, int64, ascending: spread evenly, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(np.int64))


def _kind(column: np.ndarray) -> str:
    if column.dtype != object:
        return column.dtype.name
    first = column.ravel()[0]
    return "text" if isinstance(first, str | bytes) else f"objects ({type(first).__name__})"


def stream(
    source: Source,
    batches: Batches,
    first_step: int,
    last_step: int,
    *,
    global_index: np.ndarray | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of steps `first_step` to `last_step - 1`, which Grain reads ahead.

    A step's batch is the same whichever step the stream starts at. Closing the generator stops the reading ahead.

    Args:
      source: the training rows.
      batches: which rows each step sees.
      first_step: the first step, from 0.
      last_step: the step before which the stream ends.
      global_index: int (rows,), the places in each batch that are read, in that order; all by default.
      workers: processes that read; 0 reads in this one, in threads if the source is `thread_safe`.

    Raises:
      InputError: whatever `source` raises as an InputError, in another process too; or it cannot be sent there; or as
        `resident` does.
      RunFailed: a process that reads was killed.
    """
    read = functools.partial(_read, batches=batches, global_index=global_index, first=first_row(source))
    yield from _read_ahead(source, read, range(first_step, last_step), workers)


def read_whole(source: Source, size: int, *, workers: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yields all rows of `source` in order, `size` at a time, columns of text and objects too.

    `workers` processes read ahead; with 0, this thread reads. Raises as `stream` does.
    """
    rows = len(source)
    if workers:
        yield from _read_ahead(source, functools.partial(_read_part, size=size), range(-(-rows // size)), workers)
    else:
        for part in range(-(-rows // size)):
            yield _read_part(source, part, size=size).columns


def _read_ahead(
    source: Source, read: Callable[..., _Batch], numbers: range, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields `read(source, number)` for each number, read ahead by Grain."""
    import grain

    if workers:
        # The semaphores of an earlier stream are in Grain's reference cycles. Freed while Python tells its resource
        # tracker of new ones, they would call it within a call, which it warns of, and leak.
        gc.collect()
        source = sendable(source, workers)
    threads = READ_THREADS if getattr(source, "thread_safe", False) else 0
    # A whole batch is an element: 20 times as fast as single rows that are batched afterwards.
    elements = grain.MapDataset.range(numbers.start, numbers.stop).map(functools.partial(_number, read, source))
    loader = elements.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=READ_AHEAD))
    if workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, and nobody here parses any
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        loader = loader.mp_prefetch(options)
    iterator = iter(loader)
    try:
        for batch in iterator:
            yield batch.columns
    except RuntimeError as error:
        if workers and (code := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))):
            raise RunFailed(_ended_worker(int(code[1]), workers)) from error
        raise
    finally:
        iterator.close()


def _ended_worker(code: int, workers: int) -> str:
    by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return (
        f"a process that reads data (data.workers = {workers}) {by}{why}; the same command goes on from the last "
        "checkpoint, with fewer --data.workers or a smaller --data.batch-size if memory is short"
    )


@dataclass(frozen=True)
class _Batch:
    """A batch that Grain takes for no array: it puts arrays in shared memory, where those of a killed process stay."""

    columns: dict[str, np.ndarray]


def _number(read: Callable[..., _Batch], source: Source, number: Any) -> _Batch:
    return read(source, int(number))


def _read(
    source: Source,
    step: int,
    *,
    batches: Batches,
    global_index: np.ndarray | None,
    first: Mapping[str, np.ndarray],
) -> _Batch:
    rows, weight = batches.rows(step)
    if global_index is not None:
        rows, weight = rows[global_index], weight[global_index]
    return _Batch(_read_numeric(source, rows, first) | {"weight": weight})


def _read_part(source: Source, part: int, *, size: int) -> _Batch:
    return _Batch(read_rows(source, np.arange(part * size, min((part + 1) * size, len(source)))))


def evaluation_batches(
    source: Source, batch_size: int, global_index: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields all rows once, in order, in batches of one size; the last is filled up with rows of weight 0.

    Of each batch only the rows at `global_index`, int (rows,), are read; all by default. Raises InputError as
    `resident` does.
    """
    examples, first = len(source), first_row(source)
    global_index = np.arange(batch_size) if global_index is None else global_index
    for start in range(0, examples, batch_size):
        rows = start + global_index
        yield _read_numeric(source, rows % examples, first) | {"weight": (rows < examples).astype(np.float32)}


def check_splits(dataset: Dataset, train: Source, others: Mapping[Split, Source], columns: Sequence[str]) -> None:
    """Raises InputError if one of `columns` has another dtype or shape in another split than in the train split.

    Compared before and after `dataset.prepare`, which is traced for evaluation, where transforms get no key.

    Args:
      dataset: how batches are prepared.
      train: the training rows.
      others: the rows of other splits, by the split's name.
      columns: the columns that the task asks for; prepared training batches have them.
    """
    raw, prepared = read_rows(train, np.arange(1)), batch_shapes(dataset, train, 1, train=True)
    for split, source in others.items():
        _check_columns(split, read_rows(source, np.arange(1)), raw, columns)
        _check_columns(split, batch_shapes(dataset, source, 1, train=False), prepared, columns)


def _check_columns(split: str, found: Mapping[str, Any], train: Mapping[str, Any], columns: Sequence[str]) -> None:
    def layout(batch: Mapping[str, Any], name: str) -> str:
        return f"{batch[name].dtype}{list(batch[name].shape[1:])}" if name in batch else "nothing"

    for name in columns:
        if name in train and layout(found, name) != layout(train, name):
            raise InputError(
                f"{name!r} of the {split} split is {layout(found, name)}; expected {layout(train, name)}, as in the "
                "train split"
            )


def batch_of(dataset: Dataset, rows: Mapping[str, Any], inputs: Sequence[str] = ()) -> dict[str, Any]:
    """A batch of rows as `dataset.source` gives them, or `dataset.encode` takes them: after the host transforms.

    Each row has weight 1. The batch is not yet prepared. Columns have the dtypes of the training rows where those hold
    their values, see `as_trained`.

    Args:
      dataset: whose host transforms are applied.
      rows: arrays of shape (n, ...); a column "weight" that is left after the host transforms is ignored.
      inputs: columns of which InputError is raised if they cannot have the dtype of the training rows.
    """
    train = dataset.read("train")
    assert train is not None  # `Dataset` refuses data without it
    trained = read_rows(train.source if isinstance(train, HostTransformed) else train, np.arange(1))
    columns = {
        name: column if hasattr(column, "dtype") else as_column(name, column)
        for name, column in dataset.encode(rows).items()
    }
    for name in columns.keys() & trained.keys():
        columns[name] = as_trained(name, columns[name], trained[name], required=name in inputs)
    columns = apply_host_transforms(dataset.host_transforms, columns)
    columns.pop("weight", None)
    return _numeric(columns) | {"weight": np.ones(len(next(iter(columns.values()))), np.float32)}


def batch_shapes(dataset: Dataset, source: Source, size: int, *, train: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a prepared batch of `size` rows of `source`, traced and not computed.

    Raises InputError if a transform fails while it is traced.
    """
    row = first_row(source) | {"weight": np.ones(1, np.float32)}
    raw = {
        name: jax.ShapeDtypeStruct((size, *column.shape[1:]), jax.dtypes.canonicalize_dtype(column.dtype))
        for name, column in row.items()
    }
    return jax.eval_shape(dataset.prepare(train=train), raw, jax.random.key(0))


def _numeric(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "weight" in batch:
        raise InputError(
            "the data has a column 'weight'; a batch has its own under that name, 1 for a row and 0 for padding: "
            "rename the column, in a host transform for example"
        )
    return {name: for_device(name, column) for name, column in batch.items() if is_numeric(column)}


def _read_numeric(source: Source, rows: np.ndarray, first: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows at `rows`, int (n,): the columns of `first`, row 0. Raises InputError if one holds no numbers there."""
    batch = read_rows(source, rows)
    for name in first.keys() & batch.keys():
        if not is_numeric(batch[name]):
            raise InputError(_not_as_the_first(name, batch[name], rows, first[name].shape[1:]))
    return _numeric({name: column for name, column in batch.items() if name in first})


def _not_as_the_first(name: str, column: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> str:
    """What is wrong with a column of which row 0 holds numbers of this shape, and one of `rows` does not."""

    def is_alike(value: Any) -> bool:
        is_list = isinstance(value, np.ndarray) and value.dtype.kind == "O"
        alone = as_column(name, [value.tolist() if is_list else value])
        return is_numeric(alone) and alone.shape[1:] == shape

    unlike = [row for row, value in zip(rows.tolist(), column, strict=True) if not is_alike(value)]
    where = f"row {unlike[0]}" if unlike else "another row"
    return (
        f"column {name!r} holds numbers of shape {shape} in row 0, and in {where} numbers of another shape, an empty "
        "value or none; bring its rows to one shape, or leave it out, in data.host_transforms"
    )
