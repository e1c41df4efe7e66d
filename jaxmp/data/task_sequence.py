"""`PermutedTasks`: the same images with their pixels in another order for each task, learned one task after the other.

An epoch of the loop is one task. Which rows a step sees, replayed ones included, is a pure function of (seed, step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmp.data.dataset import Dataset, Split
from jaxmp.data.images import Images
from jaxmp.data.pipeline import Batches
from jaxmp.data.source import Source, permutation
from jaxmp.data.tfds import TFDS
from jaxmp.errors import InputError, whole_number

PIXELS = 0x7069786C  # seed of the orders of pixels, which are a part of the data: every run has the same tasks


@dataclass(frozen=True, kw_only=True)
class PermutedTasks(Images):
    """A sequence of tasks: the images of `rows`, their pixels in an order of its own for each task.

    The first task is the images as they are; in the others the channels of a pixel move together. Rows have a column
    `task`, from 0, by which `jaxmp.tasks.per_task.PerTask` measures each task alone; validation and test splits have
    the rows of all tasks. The training split has all of them too, but epoch n trains on task n alone (after the last,
    on the first again), and on `replay` of earlier ones.

    Source: Goodfellow et al. 2013, https://arxiv.org/abs/1312.6211, section 4.2; Kirkpatrick et al. 2017,
    https://arxiv.org/abs/1612.00796. Replay: Chaudhry et al. 2019, On Tiny Episodic Memories in Continual Learning.
    """

    rows: Any = TFDS(name="mnist")
    """Dataset with the images; of its fields, those that name rows count."""
    column: str = "image"
    """Column of the images whose pixels are permuted."""
    tasks: int = 5
    """Number of tasks."""
    passes: int = 1
    """Passes over the training rows of a task, which make its epoch."""
    replay: float = 0.0
    """Share of each batch that is taken from the buffers of earlier tasks, below 1; 0: none is."""
    buffer: int = 1000
    """Rows that are kept of each earlier task, drawn at random."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        for name in ("tasks", "passes", "buffer"):
            object.__setattr__(self, name, whole_number(f"data.{name}", getattr(self, name), 1))
        if not isinstance(self.rows, Dataset):
            raise InputError(f"data.rows = {self.rows!r:.60}: expected a dataset, TFDS(name=...) or Arrays(load)")
        if not 0 <= self.replay < 1:
            raise InputError(f"data.replay = {self.replay}: expected 0 or more, below 1")
        if self.cuts:
            raise InputError("data.cuts: the rows of all tasks would be dealt anew; cut data.rows instead")

    def source(self, split: Split) -> Source | None:
        """The rows of all tasks, one task after the other. Raises InputError if there is no column of images."""
        source = self.rows.read(split)
        return None if source is None else _Permuted(source, self.column, self.tasks)

    def batches(self, **how: Any) -> TaskBatches:
        """Which rows each step sees; `how` are the fields of `jaxmp.data.pipeline.Batches`."""
        return TaskBatches(**how, tasks=self.tasks, passes=self.passes, replay=self.replay, buffer=self.buffer)


class _Permuted:
    """The rows of a source once for each task: row r of task t has index t * (number of rows) + r."""

    def __init__(self, source: Source, column: str, tasks: int):
        self.source, self.column, self.tasks = source, column, tasks
        self.thread_safe = getattr(source, "thread_safe", False)
        first = source[np.arange(1)]
        if column not in first or first[column].ndim < 2 or first[column].dtype == object:
            raise InputError(f"data.column = {column!r}: expected a column of images; there is {', '.join(first)}")
        if "task" in first:
            raise InputError("data.rows has a column 'task' already, which names the task here; rename it")
        shape = first[column].shape[1:]
        self.channels = shape[2] if len(shape) == 3 else 1
        size = first[column].size // self.channels
        orders = [permutation(PIXELS, task, size) for task in range(tasks)]
        self.orders = [np.arange(size, dtype=np.int32), *orders[1:]]

    def __len__(self) -> int:
        return self.tasks * len(self.source)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        task, row = np.divmod(np.asarray(indices), len(self.source))
        found = self.source[row]
        images = np.array(found[self.column], order="C")  # a copy: it is written to
        pixels = images.reshape(len(images), -1, self.channels)
        for number in np.unique(task):
            pixels[task == number] = pixels[task == number][:, self.orders[number]]
        return {**found, self.column: images, "task": task.astype(np.int32)}


@dataclass(frozen=True)
class TaskBatches(Batches):
    """Which rows each step sees, where epoch n trains on task n: each of its rows `passes` times, in random order.

    The first `replayed` rows of a batch come from the buffers of earlier tasks instead, each drawn evenly from all of
    them. A buffer holds the same rows of its task in every later epoch.

    Raises: InputError if a task has fewer rows than a batch, or `replay` rounds to none or all of a batch's rows.
    """

    tasks: int = 1
    """Number of tasks that the rows are of, equally many of each."""
    passes: int = 1
    """Passes over the rows of a task in its epoch."""
    replay: float = 0.0
    """Share of a batch from the buffers."""
    buffer: int = 1
    """Rows in the buffer of a task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size > self.of_task:
            raise InputError(f"data.batch_size is {self.batch_size}; a task has only {self.of_task} training rows")
        if self.replay and not 0 < self.replayed < self.batch_size:
            raise InputError(
                f"data.replay = {self.replay}, data.batch_size = {self.batch_size}: {self.replayed} rows of a batch "
                "would be replayed; expected at least one, and one of the task itself"
            )

    @property
    def of_task(self) -> int:
        """Number of rows of a task."""
        return self.examples // self.tasks

    @property
    def replayed(self) -> int:
        """Number of rows of a batch that come from the buffers, from the second task on."""
        return round(self.replay * self.batch_size)

    @property
    def per_epoch(self) -> int:
        """Number of batches of an epoch."""
        whole = -(-self.passes * self.of_task // self.batch_size)
        return whole if self.limit is None else min(self.limit, whole)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """The rows of each batch of an epoch, int32 (per_epoch, batch_size); the last is filled up from the first."""
        epoch = 0 if self.repeat else epoch
        task, streams = epoch % self.tasks, epoch * self.passes
        own = [permutation(self.seed, streams + i, self.of_task) for i in range(self.passes)]
        rows = np.resize(np.concatenate(own), (self.per_epoch, self.batch_size)) + np.int32(task * self.of_task)
        replayed = self.replayed
        if task and replayed:
            kept = np.concatenate([self.kept(earlier) for earlier in range(task)])
            drawn = np.random.Philox(key=np.array([self.seed, 2**63 + epoch], np.uint64))
            bits = drawn.random_raw(self.per_epoch * replayed)
            rows[:, :replayed] = kept[bits % np.uint64(len(kept))].reshape(self.per_epoch, replayed)
        return rows

    def kept(self, task: int) -> np.ndarray:
        """The rows in the buffer of a task, int32 (rows,)."""
        order = permutation(self.seed, 2**62 + task, self.of_task)
        return order[: self.buffer] + np.int32(task * self.of_task)

    def weights(self, position: Any) -> np.ndarray:
        """float32 (batch_size,): 1 for all rows, since those that fill up the last batch are rows of the task, too."""
        return np.ones(self.batch_size, np.float32)
