"""Feeds: how batches reach the train step, and how many steps go into one dispatch.

Small data lies on the device, and one dispatch runs many steps; larger data is streamed, a step a dispatch. Both give
the same batch for a step, a pure function of (seed, step), so that a run can go on from any step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Dataset
from jaxmp.data.pipeline import Batches, resident, stream
from jaxmp.data.source import Source
from jaxmp.scaling.transform import last_step_finite
from jaxmp.training.metrics import Mean, Metrics, merge
from jaxmp.training.parallel import Devices
from jaxmp.training.state import TrainState
from jaxmp.training.step import TrainStep

AUGMENTATION = 0x6A786D70  # sets the keys of the data apart from all others that the seed gives

NAN_LOSS = "nan_loss"
"""name of a metric that feeds add: the share of steps, skipped ones included, whose loss was NaN"""


class Feed(Protocol):
    """Runs train steps on the batches that are theirs."""

    def run(self, state: TrainState, metrics: Metrics, first: int, count: int) -> tuple[TrainState, Metrics]:
        """Steps `first` to `first + count - 1`, all of one epoch, adding what the applied ones measured to `metrics`.

        `state` is donated. Returns without waiting for the device.
        """
        ...

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch that the step `step` sees, prepared, on one device; to look at it again later."""
        ...

    def close(self) -> None:
        """Ends what reads ahead."""
        ...


class Resident:
    """A feed from a training set that lies on the device, with many steps in one dispatch, or one."""

    def __init__(
        self, step: TrainStep, data: Dataset, source: Source, batches: Batches, devices: Devices, *, many: bool
    ):
        self._batches, self._devices, self._many = batches, devices, many
        self._columns = devices.put(resident(source))
        self._rows: tuple[int, Any] = (-1, None)  # an epoch, and the rows of its batches on the device
        self._prepare = _preparation(data, batches)
        counted = _counted(step)

        @jax.jit
        def batch(columns: Any, rows: Any, weight: Any, step: Any) -> dict[str, jax.Array]:
            raw = {name: jnp.take(column, rows, axis=0) for name, column in columns.items()}
            return self._prepare({**raw, "weight": weight}, step)

        self._batch = batch

        def advance(carry: Any, columns: Any, rows: jax.Array) -> Any:
            state = carry[0]
            position = state.step % batches.per_epoch
            own = devices.share(
                devices.interleave_microbatches({"rows": rows[position], "weight": batches.weights(position)})
            )
            raw = {name: jnp.take(column, own["rows"], axis=0) for name, column in columns.items()}
            batch = {**raw, "weight": own["weight"]}
            return counted(carry, self._prepare(batch, state.step, devices.global_index(batches.batch_size)))

        def many_steps(state: TrainState, metrics: Metrics, columns: Any, rows: jax.Array, count: Any) -> Any:
            return jax.lax.fori_loop(0, count, lambda _, carry: advance(carry, columns, rows), (state, metrics))

        def one_step(state: TrainState, metrics: Metrics, columns: Any, rows: jax.Array) -> Any:
            return advance((state, metrics), columns, rows)

        in_axes = (0, 0, 0, 0, None) if many else (0, 0, 0, 0)
        self.program = devices.compile(many_steps if many else one_step, in_axes)

    def run(self, state: TrainState, metrics: Metrics, first: int, count: int) -> Any:
        """See `Feed.run`."""
        epoch = first // self._batches.per_epoch
        if self._rows[0] != epoch:
            self._rows = epoch, self._devices.put(self._batches.epoch_rows(epoch))
        args = (self._columns, self._rows[1])
        if self._many:
            return self.program(state, metrics, *args, np.int32(count))
        for _ in range(count):
            state, metrics = self.program(state, metrics, *args)
        return state, metrics

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See `Feed.batch`."""
        rows, weight = self._batches.rows(step)
        columns = self._devices.get(self._columns)
        return self._batch(columns, rows, weight, np.int32(step))

    def close(self) -> None:
        """Nothing reads ahead."""


class Streamed:
    """A feed from a training set that is read batch by batch, ahead of the step that wants it."""

    def __init__(self, step: TrainStep, data: Dataset, source: Source, batches: Batches, devices: Devices, last: int):
        self._source, self._batches, self._devices, self._last = source, batches, devices, last
        self._workers = data.workers
        self._ahead: Any = None
        self._next = -1  # the step whose batch comes next out of `_ahead`
        self._prepare = _preparation(data, batches)
        counted = _counted(step)

        def one_step(state: TrainState, metrics: Metrics, raw: Any) -> Any:
            batch = self._prepare(raw, state.step, devices.global_index(batches.batch_size))
            return counted((state, metrics), batch)

        self.program = devices.compile(one_step, (0, 0, 0))

    def run(self, state: TrainState, metrics: Metrics, first: int, count: int) -> Any:
        """See `Feed.run`."""
        if self._next != first:
            self.close()
            # Of several processes, each reads what its own devices take.
            global_index = self._devices.local_indices(self._batches.batch_size)
            self._ahead = stream(
                self._source, self._batches, first, self._last, global_index=global_index, workers=self._workers
            )
        for _ in range(count):
            state, metrics = self.program(state, metrics, self._devices.put_local(next(self._ahead)))
        self._next = first + count
        return state, metrics

    def batch(self, step: int) -> dict[str, jax.Array]:
        """See `Feed.batch`."""
        raw = next(stream(self._source, self._batches, step, step + 1))
        return self._prepare({name: jnp.asarray(column) for name, column in raw.items()}, step)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._ahead is not None:
            self._ahead.close()


def _preparation(data: Dataset, batches: Batches) -> Callable[..., dict[str, jax.Array]]:
    """`(raw batch, step, global_index=None) -> batch`: `data.prepare` with the key of that step."""
    apply = data.prepare(train=True)

    def prepared(raw: dict[str, jax.Array], step: Any, global_index: Any = None) -> dict[str, jax.Array]:
        # A stream of keys of its own, beside the one that the model draws from.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(batches.seed), AUGMENTATION), step)
        return apply(raw, key, global_index)

    return prepared


def _counted(step: TrainStep) -> Callable[[Any, Any], Any]:
    """The step with what it measured added up: `((state, metrics), batch) -> (state, metrics)`.

    One by one and in order, so that the sums do not depend on how the steps are split into dispatches.
    """

    def counted(carry: tuple[TrainState, Metrics], batch: Any) -> tuple[TrainState, Metrics]:
        state, metrics = carry
        state, measured = step(state, batch)
        is_nan = jnp.isnan(measured["loss"].total).astype(jnp.float32)
        applied = last_step_finite(state.opt_state)
        measured = jax.tree.map(lambda x: jnp.where(applied, x, jnp.zeros_like(x)), measured)
        return state, merge(metrics, {**measured, NAN_LOSS: Mean(is_nan, jnp.float32(1))})

    return counted
