"""Feeds: pass batches to the train step, and run one or many steps per dispatch.

`Resident` keeps small data on the device and can run many steps in one dispatch. `Streamed` reads larger data batch by
batch and dispatches each step. With both, the batch of a step is a pure function of (seed, step), so that a run can be
resumed from any step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Dataset
from jaxmp.data.pipeline import Batches, resident, stream
from jaxmp.data.source import Source
from jaxmp.scaling.transform import consecutive_skips, last_step_finite
from jaxmp.training.metrics import NAN_LOSS, Mean, Metrics, merge
from jaxmp.training.parallel import Devices
from jaxmp.training.state import TrainState
from jaxmp.training.step import TrainStep

AUGMENTATION = 0x6A786D70  # folded into keys, so that augmentation uses other keys than everything else from that seed

LONG_SKIP = "long_skip"
"""name of a metric that feeds add: the share of steps with which a row of skipped steps became as long as a limit"""

HIDDEN_METRICS = (NAN_LOSS, LONG_SKIP)
"""names of the metrics that feeds add to those of the task; of several objectives, `nan_loss/NAME` and so on"""


def is_hidden(metric: str) -> bool:
    """Whether a metric is one that feeds add to those of the task."""
    return metric.partition("/")[0] in HIDDEN_METRICS


class Feed(Protocol):
    """The protocol of feeds: runs train steps, each on the batch that belongs to it."""

    def run(self, state: TrainState, metrics: Metrics, first: int, count: int) -> tuple[TrainState, Metrics]:
        """Runs steps `first` to `first + count - 1`, and merges the metrics of applied steps into `metrics`.

        All these steps must belong to one epoch. `state` is donated. Returns the new state and metrics without waiting
        for the device.
        """
        ...

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Returns the batch of a step as the train step receives it, whole and on one device, for later inspection."""
        ...

    def close(self) -> None:
        """Stops reading ahead."""
        ...


class DueSteps(NamedTuple):
    """The train steps of several objectives: one for each set of objectives that run in a step."""

    due_at: Callable[[int], tuple[str, ...]]
    """the objectives that run at a step, counted from 0"""
    make: Callable[[tuple[str, ...]], TrainStep]
    """the train step that runs these"""


class DuePrograms:
    """The compiled programs of several objectives: one for each set of objectives that run in a step.

    XLA:CPU runs the gradient of a convolution in a conditional as naively as in a loop: where steps are dispatched
    singly, the host chooses.

    Args:
      steps: the train steps to choose from.
      compile: makes a program of a train step.
    """

    def __init__(self, steps: DueSteps, compile: Callable[[TrainStep], Callable[..., Any]]):
        self._steps, self._compile = steps, compile
        self.compiled: dict[tuple[str, ...], Callable[..., Any]] = {}

    def at(self, step: int) -> Callable[..., Any]:
        """The program of a step, counted from 0; compiled at its first use."""
        due = self._steps.due_at(step)
        if due not in self.compiled:
            self.compiled[due] = self._compile(self._steps.make(due))
        return self.compiled[due]


class Arguments(NamedTuple):
    """What a program takes beside state and data: values in which runs differ that share one compiled program."""

    numbers: Any
    """third argument of the train step: numbers of its optimizers, float32 scalars"""
    key: jax.Array
    """typed PRNG key of augmentation; step n uses `fold_in(key, n)`"""


class Resident:
    """A feed that keeps the training set on the device.

    Args:
      step: the train step.
      data: the dataset, which says how rows are scaled and augmented.
      source: the rows of the training set.
      batches: which rows make up the batch of each step.
      devices: the devices to run on.
      skip_limit: the length of a row of skipped steps that `LONG_SKIP` counts.
      numbers: third argument of the train steps, float32 scalars; they are arguments of the compiled program.
      fuse: whether a dispatch runs many steps, or each step is dispatched singly.
      due_steps: the train steps of several objectives, of which each step that is dispatched singly takes its own.
    """

    def __init__(
        self,
        step: TrainStep,
        data: Dataset,
        source: Source,
        batches: Batches,
        devices: Devices,
        *,
        fuse: bool,
        skip_limit: int,
        numbers: Any = None,
        due_steps: DueSteps | None = None,
    ):
        self.devices = devices
        self._batches, self._fuse = batches, fuse
        self.columns = devices.put(resident(source))
        """the columns of the training set, on the devices"""
        self._rows: tuple[int, Any] = (-1, None)  # an epoch, and the row indices of its batches on the device
        self._prepare = _preparation(data)
        self.arguments = _arguments(numbers, batches, devices)

        @jax.jit
        def batch(columns: Any, rows: Any, weight: Any, key: Any, step: Any) -> dict[str, jax.Array]:
            raw = {name: jnp.take(column, rows, axis=0) for name, column in columns.items()}
            return self._prepare({**raw, "weight": weight}, key, step)

        self._batch = batch

        def advance(accumulating: Any, carry: Any, columns: Any, rows: jax.Array, own: Arguments) -> Any:
            state = carry[0]
            position = state.step % batches.per_epoch
            found, weight = batches.batch(rows[position], position)
            share = devices.share(devices.interleave_microbatches({"rows": found, "weight": weight}))
            raw = {name: jnp.take(column, share["rows"], axis=0) for name, column in columns.items()}
            batch, index = {**raw, "weight": share["weight"]}, devices.global_index(batches.batch_size)
            return accumulating(carry, self._prepare(batch, own.key, state.step, index), own.numbers)

        def program(step: TrainStep) -> Callable[..., Any]:
            accumulating = _accumulating(step, skip_limit)

            def many_steps(
                state: TrainState, metrics: Metrics, columns: Any, rows: jax.Array, own: Arguments, count: Any
            ) -> Any:
                def turn(_: Any, carry: Any) -> Any:
                    return advance(accumulating, carry, columns, rows, own)

                return jax.lax.fori_loop(0, count, turn, (state, metrics))

            def one_step(state: TrainState, metrics: Metrics, columns: Any, rows: jax.Array, own: Arguments) -> Any:
                return advance(accumulating, (state, metrics), columns, rows, own)

            return many_steps if fuse else one_step

        def compile(step: TrainStep) -> Callable[..., Any]:
            placed = 0, 0, 0, 0, 0
            return devices.compile(program(step), (*placed, None) if fuse else placed)

        self.program = compile(step)
        self.programs = None if fuse or due_steps is None else DuePrograms(due_steps, compile)
        self.many_steps: Callable[..., Any] | None = program(step) if fuse else None
        """what `program` compiles: `(state, metrics, columns, rows, arguments, count) -> (state, metrics)`"""

    def data(self, first: int) -> tuple[Any, Any, Arguments]:
        """What the program takes between `metrics` and `count` in a dispatch from step `first`, on the devices.

        Returns: the columns of the training set, the indices of the rows of each batch of the epoch, int32 (batches of
        an epoch, batch size), and the arguments of the run.
        """
        epoch = first // self._batches.per_epoch
        if self._rows[0] != epoch:
            self._rows = epoch, self.devices.put(self._batches.epoch_rows(epoch))
        return self.columns, self._rows[1], self.arguments

    def run(self, state: TrainState, metrics: Metrics, first: int, count: int) -> Any:
        """See `Feed.run`."""
        args = self.data(first)
        if self._fuse:
            return self.program(state, metrics, *args, np.int32(count))
        for step in range(first, first + count):
            program = self.program if self.programs is None else self.programs.at(step)
            state, metrics = program(state, metrics, *args)
        return state, metrics

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See `Feed.batch`."""
        rows, weight = self._batches.rows(step)
        columns = self.devices.get(self.columns)
        return self._batch(columns, rows, weight, self.devices.get(self.arguments.key), np.int32(step))

    def close(self) -> None:
        """Does nothing: this feed does not read ahead."""


class Streamed:
    """A feed that reads the training set batch by batch, ahead of the steps.

    Args:
      step: the train step.
      data: the dataset, which says how rows are scaled and augmented, and how many workers read.
      source: the rows of the training set.
      batches: which rows make up the batch of each step.
      devices: the devices to run on.
      last: number of steps of the run: reading ahead stops there.
      skip_limit: the length of a row of skipped steps that `LONG_SKIP` counts.
      numbers: third argument of the train steps, float32 scalars; they are arguments of the compiled program.
      due_steps: the train steps of several objectives, of which each step takes its own.
    """

    def __init__(
        self,
        step: TrainStep,
        data: Dataset,
        source: Source,
        batches: Batches,
        devices: Devices,
        last: int,
        *,
        skip_limit: int,
        numbers: Any = None,
        due_steps: DueSteps | None = None,
    ):
        self._source, self._batches, self._devices, self._last = source, batches, devices, last
        self._workers = data.workers
        self._ahead: Any = None
        self._next = -1  # the step whose batch `_ahead` returns next
        self._prepare = _preparation(data)
        self.arguments = _arguments(numbers, batches, devices)

        def program(step: TrainStep) -> Callable[..., Any]:
            accumulating = _accumulating(step, skip_limit)

            def one_step(state: TrainState, metrics: Metrics, raw: Any, own: Arguments) -> Any:
                batch = self._prepare(raw, own.key, state.step, devices.global_index(batches.batch_size))
                return accumulating((state, metrics), batch, own.numbers)

            return devices.compile(one_step, (0, 0, 0, 0))

        self.program = program(step)
        self.programs = None if due_steps is None else DuePrograms(due_steps, program)

    def run(self, state: TrainState, metrics: Metrics, first: int, count: int) -> Any:
        """See `Feed.run`."""
        if self._next != first:
            self.close()
            # Each of several processes reads only the rows of its own devices.
            global_index = self._devices.local_indices(self._batches.batch_size)
            self._ahead = stream(
                self._source, self._batches, first, self._last, global_index=global_index, workers=self._workers
            )
        for step in range(first, first + count):
            program = self.program if self.programs is None else self.programs.at(step)
            state, metrics = program(state, metrics, self._devices.put_local(next(self._ahead)), self.arguments)
        self._next = first + count
        return state, metrics

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See `Feed.batch`."""
        raw = next(stream(self._source, self._batches, step, step + 1))
        columns = {name: jnp.asarray(column) for name, column in raw.items()}
        return self._prepare(columns, _augmentation_key(self._batches), step)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._ahead is not None:
            self._ahead.close()


def should_fuse_steps(loss: Any) -> bool:
    """Whether many steps should run in one dispatch: not if XLA:CPU would run a convolution's gradient in a loop.

    It does so naively: 5 -> 228, 66 -> 915 and 59 -> 1236 ms a step for three small CNNs on 2 cores (JAX 0.12).

    Args:
      loss: the jaxpr of the loss.
    """
    return jax.default_backend() != "cpu" or "conv_general_dilated" not in str(loss)


def _arguments(numbers: Any, batches: Batches, devices: Devices) -> Arguments:
    """The arguments of a run, on its devices."""
    return devices.put(Arguments(numbers, _augmentation_key(batches)))


def _augmentation_key(batches: Batches) -> jax.Array:
    """The key of a run's augmentation: of another stream than the model's."""
    return jax.random.fold_in(jax.random.key(batches.seed), AUGMENTATION)


def _preparation(data: Dataset) -> Callable[..., dict[str, jax.Array]]:
    """Returns `(raw batch, key, step, global_index=None) -> batch`: `data.prepare` with the key of that step."""
    apply = data.prepare(train=True)

    def prepared(raw: dict[str, jax.Array], key: jax.Array, step: Any, global_index: Any = None) -> Any:
        return apply(raw, jax.random.fold_in(key, step), global_index)

    return prepared


def _accumulating(step: TrainStep, skip_limit: int) -> Callable[[Any, Any, Any], Any]:
    """Returns the step with accumulated metrics: `((state, metrics), batch, numbers) -> (state, metrics)`.

    Metrics are added step by step, so that the sums do not depend on how steps are split into dispatches.
    """

    def accumulating(carry: tuple[TrainState, Metrics], batch: Any, numbers: Any) -> tuple[TrainState, Metrics]:
        (state, metrics), one = carry, jnp.float32(1)
        state, measured = step(state, batch) if numbers is None else step(state, batch, numbers)
        names = [name.partition("/")[2] for name in measured if name.startswith(f"{NAN_LOSS}/")]
        if names:  # several objectives: each has zeroed its own metrics
            rows = {name: consecutive_skips(state.opt_state[name]) == skip_limit for name in names}
            long = {f"{LONG_SKIP}/{name}": Mean(row.astype(jnp.float32), one) for name, row in rows.items()}
            return state, merge(metrics, {**measured, **long})
        is_nan = jnp.isnan(measured["loss"].total).astype(jnp.float32)
        is_long = (consecutive_skips(state.opt_state) == skip_limit).astype(jnp.float32)
        applied = last_step_finite(state.opt_state)
        measured = jax.tree.map(lambda x: jnp.where(applied, x, jnp.zeros_like(x)), measured)
        return state, merge(metrics, {**measured, NAN_LOSS: Mean(is_nan, one), LONG_SKIP: Mean(is_long, one)})

    return accumulating
