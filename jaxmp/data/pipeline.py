"""From a source to batches: which rows a step sees, how they get to the device, and what is done to them there.

A step's rows are a pure function of (seed, step), whether the split is resident on the device or streamed from the
host. A batch is a dict of arrays with a leading axis, and "weight" float32 (batch,): 1 for a row, 0 for padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.augment import Augment
from jaxmp.data.dataset import Dataset
from jaxmp.data.source import Source
from jaxmp.errors import InputError, nearest

READ_THREADS = 4
READ_AHEAD = 8  # batches


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order in which an epoch visits the rows: a permutation, int32 (examples,), the same with every NumPy version.

    A generator's raw bits are guaranteed to stay as they are (NEP 19), and its `permutation` is not.
    """
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(examples)
    return np.argsort(bits, kind="stable").astype(np.int32)


@dataclass(frozen=True)
class Batches:
    """Where a step stands in the data. An epoch visits each row once; its last batch is padded, with weight 0."""

    examples: int
    """Rows of the split."""
    batch_size: int
    """Rows of a batch, over all devices."""
    seed: int
    """Of the order of the rows."""

    def __post_init__(self):
        if self.batch_size > self.examples:
            raise InputError(f"data.batch_size is {self.batch_size}; the training split has only {self.examples} rows")

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, the padded one included."""
        return -(-self.examples // self.batch_size)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """The rows of each batch of an epoch, int32 (per_epoch, batch_size); the last filled up with the first rows."""
        order = epoch_order(self.seed, epoch, self.examples)
        return np.resize(order, (self.per_epoch, self.batch_size))

    def weights(self, position: int | jax.Array) -> np.ndarray | jax.Array:
        """float32 (batch_size,): 1 for rows and 0 for padding in the batch at `position`, 0 to per_epoch - 1."""
        rows = position * self.batch_size + np.arange(self.batch_size, dtype=np.int32)
        return (rows < self.examples).astype(np.float32)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (batch_size,) int32 that step `step`, from 0, sees, and their weights (batch_size,) float32."""
        epoch, position = divmod(step, self.per_epoch)
        return _epoch_rows(self, epoch)[position], np.asarray(self.weights(position))


@functools.lru_cache(maxsize=2)  # of this epoch and, read ahead, of the next
def _epoch_rows(batches: Batches, epoch: int) -> np.ndarray:
    rows = batches.epoch_rows(epoch)
    rows.setflags(write=False)
    return rows


def resident(source: Source) -> dict[str, np.ndarray]:
    """All rows of `source` as arrays; what is no number, text, is left out."""
    return _numeric(source[np.arange(len(source))])


def nbytes(source: Source) -> int:
    """Bytes of what `resident` would return, from one row."""
    return sum(column.nbytes for column in _numeric(source[np.arange(1)]).values()) * len(source)


def stream(
    source: Source,
    batches: Batches,
    first_step: int,
    last_step: int,
    *,
    global_index: np.ndarray | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps `first_step` to `last_step - 1`, read ahead by Grain in threads, or in `workers` processes.

    Of each batch only the rows at `global_index`, (rows,), are read, in that order; all by default. Starting at any
    step gives the batches that reaching it gives. Left early, it stops what reads ahead when closed.
    """
    import grain

    # A whole batch is an element: 20 times as fast as single rows that are batched afterwards.
    steps = grain.MapDataset.range(first_step, last_step).map(functools.partial(_read, source, batches, global_index))
    loader = steps.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD))
    if workers:
        from absl import flags

        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, and nobody here parses any
        loader = loader.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        iterator.close()


def _read(source: Source, batches: Batches, global_index: np.ndarray | None, step: int) -> dict[str, np.ndarray]:
    rows, weight = batches.rows(int(step))
    if global_index is not None:
        rows, weight = rows[global_index], weight[global_index]
    return _numeric(source[rows]) | {"weight": weight}


def evaluation_batches(
    source: Source, batch_size: int, global_index: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """All rows once, in order, in batches of one size; the last is filled up with rows of weight 0.

    Of each batch only the rows at `global_index`, (rows,), are read; all by default.
    """
    examples = len(source)
    global_index = np.arange(batch_size) if global_index is None else global_index
    for start in range(0, examples, batch_size):
        rows = start + global_index
        yield _numeric(source[rows % examples]) | {"weight": (rows < examples).astype(np.float32)}


def _numeric(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "weight" in batch:
        raise InputError("the data has a column 'weight', which is what a batch calls 1 for a row and 0 for padding")
    return {name: column for name, column in batch.items() if column.dtype.kind not in "OSU"}


def prepare(dataset: Dataset, *, train: bool) -> Callable[..., dict[str, Any]]:
    """What is done to a batch on the device: `(batch, key, places=None) -> batch`, pure, to be traced.

    Each of `dataset.images`, (batch, height, width, channels), becomes float32: uint8 / 255, minus the mean, over the
    standard deviation, and, to train, augmented. All else is left as it is. Where `batch` is a part of a batch,
    `global_index`, int32 (rows,), are those of its rows in the whole: a row's draw comes from `key` and its place in
    the whole batch, and so does not depend on the number of devices. The images of one row are changed alike.
    Raises InputError where a key is missing or is no image.
    """
    augment = dataset.augment if train else Augment()

    def apply(batch: dict[str, Any], key: jax.Array, global_index: jax.Array | None = None) -> dict[str, Any]:
        images = {name: _normalise(dataset, name, batch) for name in dataset.images}
        if images and augment != Augment():
            if global_index is None:
                global_index = jnp.arange(len(next(iter(images.values()))))
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, global_index)
            images = {name: jax.vmap(augment)(keys, image) for name, image in images.items()}
        return {**batch, **images}

    return apply


def _normalise(dataset: Dataset, name: str, batch: dict[str, Any]) -> jax.Array:
    if name not in batch:
        raise InputError(f"data.images names {name!r}; the data has {', '.join(batch)}{nearest(name, batch)}")
    image = batch[name]
    channels = image.shape[-1] if image.ndim == 4 else None
    if channels is None or {len(dataset.mean), len(dataset.std)} - {1, channels}:
        raise InputError(
            f"data.images names {name!r}, of shape {image.shape}; expected (batch, height, width, channels), with "
            f"data.mean {dataset.mean} and data.std {dataset.std} one number, or one a channel"
        )
    scale = 255.0 if image.dtype == jnp.uint8 else 1.0
    return (image.astype(jnp.float32) / scale - jnp.float32(dataset.mean)) / jnp.float32(dataset.std)
