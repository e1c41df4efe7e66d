"""Past steps, taken again: the states and batches of a run's steps, or of a training that is done for them.

A run keeps all that this takes: a skipped step leaves the state as it was, a batch is a function of seed and step, and
the steps from a checkpoint on come out the same to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Parallel
from jaxmp.runs.fit import steps
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.transform import consecutive_skips, find_state, loss_scale, skipped_steps
from jaxmp.training.state import TrainState


class PastStep(NamedTuple):
    """One step, as it was."""

    step: int
    """its number, counted from 1"""
    state: TrainState
    """what it began with, on one device; the loss scale apart"""
    batch: dict[str, jax.Array]
    """prepared, of the whole batch size, on one device"""
    scale: float
    """its loss scale"""


def states_at(experiment: Experiment, wanted: Collection[int]) -> Iterator[PastStep]:
    """Trains an experiment anew, up to the last step that is wanted, and yields these steps.

    Args:
      experiment: what to train; on how many devices changes no state by more than rounding, so one program is used.
      wanted: numbers of steps, counted from 1, at most the last step of the run.
    """
    loop = dataclasses.replace(experiment.loop, steps_per_dispatch=1)
    experiment = dataclasses.replace(experiment, parallel=Parallel("jit"), loop=loop)
    trainer = Trainer(experiment)
    feed = trainer.feed(fuse=False)

    def past(step: int, state: TrainState) -> PastStep:
        return PastStep(step, state, feed.batch(step - 1), float(loss_scale(state.opt_state)))

    try:
        if 1 in wanted:
            yield past(1, trainer.init())
        if max(wanted, default=0) > 1:
            for info in steps(experiment):
                if info.step + 1 in wanted:
                    yield past(info.step + 1, info.state)
                if info.step + 1 >= max(wanted):
                    return
    finally:
        feed.close()


class Past:
    """The steps of a run, taken again.

    Args:
      run: the run; it is only read.
      log: takes each message about progress.

    Raises: InputError if the run folder was not written by this version of jaxmp, or the data have changed since.
    """

    def __init__(self, run: Run, log: Callable[[str], None]):
        if "fuse_steps" not in run.config:
            raise InputError(
                f"{run.path / 'config.json'} lacks fuse_steps: it was not written by this version of jaxmp"
            )
        self.run, self.log = run, log
        self.trainer = run.trainer
        run.source("train")  # refuses other rows, whose steps would be others
        self.feed = self.trainer.feed(fuse=run.config["fuse_steps"])
        devices = len(run.config.get("devices", ())) or self.trainer.devices.count
        if devices != self.trainer.devices.count:
            log(f"this run began on {devices} devices; on {self.trainer.devices.count}, sums are rounded otherwise")

    def step(self, step: int) -> PastStep:
        """The step of that number, counted from 1. Raises InputError if the run has none."""
        state = self.before(step)
        return self._past(step, state, float(loss_scale(state.opt_state)))

    def last_skipped(self) -> PastStep:
        """The last step that was skipped. Raises InputError if none was."""
        return self._at_hand() or self._searched()

    def before(self, step: int) -> TrainState:
        """The state that a step began with."""
        checkpoints = self.run.checkpoint_steps()
        last = max([*checkpoints, *(line["step"] for line in self.run.metrics)], default=0)
        if not 1 <= step <= last:
            raise InputError(f"--step {step}: expected one of the steps of {self.run.path}, 1 to {last}")
        start = max((at for at in checkpoints if at < step), default=0)
        state = self.run.state(start) if start else self.trainer.init()
        if start < step - 1:
            origin = f"the checkpoint of step {start}" if start else "the start"
            self.log(f"taking steps {start + 1} to {step - 1} again, from {origin}")
        return self._advance(state, start, step - 1)

    def _past(self, step: int, state: TrainState, scale: float) -> PastStep:
        return PastStep(step, _on_one_device(state), _on_one_device(self.feed.batch(step - 1)), scale)

    def _at_hand(self) -> PastStep | None:
        """The step of the last checkpoint, if it was skipped: that left the state as it was, but for the scale."""
        state = self.run.state() if self.run.checkpoint_steps() else None
        scaling = None if state is None else find_state(state.opt_state)
        if state is None or scaling is None or not consecutive_skips(state.opt_state):
            return None
        step = int(state.step)
        before = dataclasses.replace(state, step=jnp.int32(step - 1))
        return self._past(step, before, float(scaling.skipped_scale))

    def _searched(self) -> PastStep:
        """The last step that was skipped, found between the two lines of metrics around it."""
        before, after = self._lines_around_a_skip()
        state, found = self.before(before + 1), None
        for at in range(before, after):
            kept = jax.tree.map(jnp.copy, state)  # the step is given the state's buffers
            state = self._advance(state, at, at + 1)
            if skipped_steps(state.opt_state) > skipped_steps(kept.opt_state):
                found = at + 1, kept
        if found is None:
            raise InputError(
                f"{self.run.path} skipped a step from {before + 1} to {after}, which taken again are all finite: on "
                "other devices, or with other versions, rounding differs; --step N looks at one of them"
            )
        step, state = found
        return self._past(step, state, float(loss_scale(state.opt_state)))

    def _lines_around_a_skip(self) -> tuple[int, int]:
        """The steps of two lines of metrics, with the last skipped step after the first and not after the second.

        A run that was stopped may have its last checkpoint, which counts as a line, at a step without one.
        """
        found, at, skipped = None, 0, 0
        lines = self.run.metrics
        state = self.run.state() if self.run.checkpoint_steps() else None
        if state is not None and int(state.step) > max((line["step"] for line in lines), default=0):
            lines.append({"step": int(state.step), "skipped_steps": int(skipped_steps(state.opt_state))})
        for line in lines:
            if line.get("skipped_steps", skipped) > skipped:
                found = at, line["step"]
            at, skipped = line["step"], line.get("skipped_steps", skipped)
        if found is None:
            raise InputError(f"{self.run.path}: none of its {at} steps was skipped; --step N compares one with float32")
        return found

    def _advance(self, state: TrainState, first: int, last: int) -> TrainState:
        """The state after the steps up to `last`, from the one before step `first` (counted from 0)."""
        devices, per_epoch = self.trainer.devices, self.trainer.batches.per_epoch
        placed, metrics = devices.put_state(state), devices.put(self.trainer.no_metrics)
        while first < last:
            count = min(last - first, per_epoch - first % per_epoch)
            placed, metrics = self.feed.run(placed, metrics, first, count)
            first += count
        return _on_one_device(devices.get(placed))


def _on_one_device(tree: Any) -> Any:
    return jax.device_put(tree, jax.local_devices()[0])
