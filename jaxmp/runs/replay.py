"""Past steps, taken again: the states and batches of a run's steps, or of a training that is done for them.

A run keeps all that this takes: a skipped step leaves the state as it was, a batch is a function of seed and step, and
the steps from a checkpoint on come out the same to the bit. Only what a run began with by --continue or --init-from is
read again from the other run or the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Parallel
from jaxmp.runs.fit import steps
from jaxmp.runs.going_on import Parent
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.weights_file import WeightsFile
from jaxmp.scaling.transform import consecutive_skips, find_state, loss_scale, skipped_steps
from jaxmp.tasks.task import require_objective
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
    """its loss scale; NaN where no objective of several is named"""
    objective: str | None = None
    """which of several objectives it is of; None for a single one"""


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
        return PastStep(step, state, feed.batch(step - 1), _scale(state) if not trainer.objectives else math.nan)

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
        begins = run.config.get("begins_with", {})
        # The steps of the run that this one goes on from are of another experiment.
        self._first = begins["step"] if begins.get("how") == "continue" else 0
        self._of_parent = f"; up to step {self._first} they are those of {run.config['parent']}" if self._first else ""

    def step(self, step: int, objective: str | None = None) -> PastStep:
        """The step of that number, counted from 1; of several objectives, that of one.

        Raises: InputError if the run has no such step, or the objective does not run in it; or what the run began with
          is needed, and is not there any more.
        """
        require_objective(self.trainer.experiment.task, objective, "--objective")
        state = self.before(step)
        due = self.trainer.due(step - 1)
        if objective not in due:
            raise InputError(
                f"--step {step} --objective {objective}: in this step {', '.join(map(str, due))} runs; expected a step "
                f"after a multiple of {self.trainer.objectives[str(objective)].every}"
            )
        return self._past(step, state, _scale(state, objective), objective)

    def last_skipped(self, objective: str | None = None) -> PastStep:
        """The last step that was skipped; of several objectives, that any of them skipped, or the one that is named.

        Raises: InputError if none was, or as `step` does.
        """
        names = self.trainer.objectives
        if objective is not None:
            require_objective(self.trainer.experiment.task, objective, "--objective")
        if names:
            return self._searched((objective,) if objective is not None else tuple(names))
        return self._at_hand() or self._searched((None,))

    def before(self, step: int) -> TrainState:
        """The state that a step began with."""
        checkpoints = self.run.checkpoint_steps()
        last = max([*checkpoints, *(line["step"] for line in self.run.metrics)], default=0)
        first = self._first
        if not first < step <= last:
            raise InputError(
                f"--step {step}: expected one of the steps of {self.run.path}, {first + 1} to {last}{self._of_parent}"
            )
        start = max((at for at in checkpoints if first <= at < step), default=first)
        state = self.run.state(start) if start in checkpoints else self._first_state()
        if start < step - 1:
            origin = f"the checkpoint of step {start}" if start in checkpoints else "the start"
            self.log(f"taking steps {start + 1} to {step - 1} again, from {origin}")
        return self._advance(state, start, step - 1)

    def _first_state(self) -> TrainState:
        """The state that the run began with: a fresh one, one with other weights, or all of another run's."""
        config, path, fresh = self.run.config, self.run.path, self.trainer.init()
        if "begins_with" not in config:
            return fresh
        if "sha256" in config["begins_with"]:
            return WeightsFile.of(path, config).give_weights(self.trainer, fresh, self.log)
        parent = Parent.of(path, config)
        if parent.takes_all:
            return parent.take_state(self.trainer, fresh)
        return parent.give_weights(self.trainer, fresh, self.log)

    def _past(self, step: int, state: TrainState, scale: float, objective: str | None = None) -> PastStep:
        return PastStep(step, _on_one_device(state), _on_one_device(self.feed.batch(step - 1)), scale, objective)

    def _at_hand(self) -> PastStep | None:
        """The step of the last checkpoint, if it was skipped: that left the state as it was, but for the scale."""
        state = self.run.state() if self.run.checkpoint_steps() else None
        scaling = None if state is None else find_state(state.opt_state)
        if state is None or scaling is None or not consecutive_skips(state.opt_state) or state.step <= self._first:
            return None
        step = int(state.step)
        before = dataclasses.replace(state, step=jnp.int32(step - 1))
        return self._past(step, before, float(scaling.skipped_scale))

    def _searched(self, names: tuple[str | None, ...]) -> PastStep:
        """The last step that one of the objectives `names` skipped, found between the two lines around it."""
        before, after = self._lines_around_a_skip(names)
        state, found = self.before(before + 1), None
        for at in range(before, after):
            kept = jax.tree.map(jnp.copy, state)  # the step is given the state's buffers
            state = self._advance(state, at, at + 1)
            skipped = [name for name in names if _skipped(state, name) > _skipped(kept, name)]
            if skipped:
                found = at + 1, kept, skipped[-1]
        if found is None:
            raise InputError(
                f"{self.run.path} skipped a step from {before + 1} to {after}, which taken again are all finite: on "
                "other devices, or with other versions, rounding differs; --step N looks at one of them"
            )
        step, state, name = found
        return self._past(step, state, _scale(state, name), name)

    def _lines_around_a_skip(self, names: tuple[str | None, ...]) -> tuple[int, int]:
        """The steps of two lines of metrics, with the last skipped step after the first and not after the second.

        A run that was stopped may have its last checkpoint, which counts as a line, at a step without one.
        """
        found, at, skipped = None, self._first, 0
        lines = self.run.metrics
        state = self.run.state() if self.run.checkpoint_steps() else None
        if state is not None and int(state.step) > max((line["step"] for line in lines), default=0):
            fields = {_field(name): _skipped(state, name) for name in names}
            lines.append({"step": int(state.step), **fields})
        for line in lines:
            now = sum(line.get(_field(name), 0) for name in names) if _field(names[0]) in line else skipped
            if now > skipped and line["step"] > self._first:
                found = at, line["step"]
            at, skipped = max(line["step"], self._first), now
        if found is None:
            of = f" of {names[0]}" if len(names) == 1 and names[0] else ""
            own = f"{at} steps" if not self._first else f"steps {self._first + 1} to {at}"
            raise InputError(
                f"{self.run.path}: none of its {own}{of} was skipped{self._of_parent}; --step N compares one with "
                "float32"
            )
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


def _own_state(state: TrainState, objective: str | None) -> Any:
    return state.opt_state if objective is None else state.opt_state[objective]


def _scale(state: TrainState, objective: str | None = None) -> float:
    return float(loss_scale(_own_state(state, objective)))


def _skipped(state: TrainState, objective: str | None) -> int:
    return int(skipped_steps(_own_state(state, objective)))


def _field(objective: str | None) -> str:
    """The field of a line that counts the skipped steps of an objective."""
    return "skipped_steps" if objective is None else f"skipped_steps/{objective}"


def _on_one_device(tree: Any) -> Any:
    return jax.device_put(tree, jax.local_devices()[0])
