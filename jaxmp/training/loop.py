"""The training loop: `steps`, a generator, and `fit`, which evaluates, saves, writes and stops around it.

Side effects have one order. After a dispatch of steps: the lines of the dispatch before are written, while this one
runs; then, where this step is due for it, evaluate, write, save; then the next batch and the next dispatch. A line is
on disk before a checkpoint of its step is begun, so that a run that is killed at any moment and resumed ends with the
same lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax

from jaxmp.data.dataset import Split
from jaxmp.errors import InputError, RunFailed, nearest
from jaxmp.scaling.historical import scaler_exhausted
from jaxmp.scaling.scalers import NoScaler, StaticScaler
from jaxmp.scaling.transform import consecutive_skips, loss_scale, skipped_steps
from jaxmp.training.build import Training
from jaxmp.training.checkpoint import Checkpoints
from jaxmp.training.feed import NAN_LOSS, Feed
from jaxmp.training.metrics import Metrics, compute
from jaxmp.training.provenance import provenance
from jaxmp.training.state import TrainState
from jaxmp.training.writers import Console, JsonLines, TensorBoard, WeightsAndBiases, Writer

if TYPE_CHECKING:
    from jaxmp.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long to train, and what to do on the way."""

    epochs: int = 10
    """passes over the training set"""
    steps: int | None = None
    """steps to train, instead of epochs"""
    log_every: int = 50
    """steps between two lines of training metrics, each the mean over the steps since the last"""
    eval_every: int | None = None
    """steps between two evaluations; each epoch by default"""
    save_every: int | None = None
    """steps between two checkpoints, besides those after each evaluation"""
    keep: int = 2
    """how many of the last checkpoints are kept, besides the best"""
    monitor: str = "accuracy"
    """validation metric by which a checkpoint is the best and training stops early"""
    mode: Literal["max", "min"] = "max"
    """whether more of that metric is better, or less"""
    patience: int | None = None
    """evaluations in a row without a better metric after which training stops early"""
    ema_decay: float | None = None
    """decay of a moving average of the weights, which is then what is evaluated"""
    max_consecutive_skips: int = 50
    """steps skipped in a row after which the run has failed"""
    steps_per_dispatch: int | None = None
    """most steps in one dispatch; by default all up to the next thing to do, or one where that is faster"""
    wandb: bool = False
    """also report to Weights & Biases"""

    def __post_init__(self) -> None:
        """Refuses what could not run."""
        for name, least in (("epochs", 1), ("log_every", 1), ("keep", 1), ("max_consecutive_skips", 1)):
            self._require(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("steps", "eval_every", "save_every", "patience", "steps_per_dispatch"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        self._require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"loop.{name}={getattr(self, name)}: expected {expected}")


class StepInfo(NamedTuple):
    """Where training stands after a dispatch."""

    step: int
    """steps attempted so far"""
    state: TrainState
    """the state after them; donated to the next dispatch, so copy what you keep"""
    metrics: Metrics
    """what was measured since the last line that is due, on the device; `jaxmp.training.metrics.compute` fetches it"""


class Fitted(NamedTuple):
    """What `fit` leaves."""

    path: Path
    """the run folder; `jaxmp.Run(path)` reads it back"""
    summary: dict[str, Any]
    """what is in its summary.json; empty where the run was stopped"""
    stopped: bool
    """whether a signal stopped it before its end, after saving"""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which steps something is due after: functions of the step alone, so that a resumed run does the same."""

    loop: Loop
    per_epoch: int
    last: int

    def evaluates(self, step: int) -> bool:
        """Whether the validation set is evaluated after this step."""
        return step == self.last or step % (self.loop.eval_every or self.per_epoch) == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        every = self.loop.save_every
        return self.evaluates(step) or (every is not None and step % every == 0)

    def writes(self, step: int) -> bool:
        """Whether a line of training metrics ends with this step; so it does with all that is saved."""
        return self.saves(step) or step % self.loop.log_every == 0

    def next_stop(self, step: int, most: int) -> int:
        """The step that a dispatch from `step` on runs to: the next that something is due after, in this epoch."""
        loop = self.loop
        every = [loop.log_every, loop.eval_every, loop.save_every, self.per_epoch]
        due = [step + n - step % n for n in every if n]
        return min(*due, self.last, step + most)


def steps(experiment: Experiment, state: TrainState | None = None) -> Iterator[StepInfo]:
    """Trains, and yields after each dispatch; nothing is written, evaluated or waited for.

    Args:
      experiment: what to train.
      state: where to go on from; a fresh one by default. It is donated.

    Yields:
      `StepInfo(step, state, metrics)`, at least at every step that the loop's `log_every` and evaluations are due.
    """
    training = Training(experiment)
    devices = training.devices
    feed = training.feed(many=training.many_steps_pay)
    state = devices.put(training.init() if state is None else state)
    first = int(devices.get(state.step))
    for info in _dispatches(training, feed, state, devices.put(training.no_metrics), first):
        yield StepInfo(info.step, devices.get(info.state), devices.get(info.metrics))


def _dispatches(training: Training, feed: Feed, state: Any, metrics: Any, first: int) -> Iterator[StepInfo]:
    """The dispatches from step `first` to the end, as placed on the devices. `metrics` begins anew after each line."""
    loop = training.experiment.loop
    schedule = Schedule(loop, training.batches.per_epoch, training.steps)
    nothing = training.devices.put(training.no_metrics)
    step = first
    try:
        while step < training.steps:
            stop = schedule.next_stop(step, loop.steps_per_dispatch or training.steps)
            state, metrics = feed.run(state, metrics, step, stop - step)
            step = stop
            yield StepInfo(step, state, metrics)
            if schedule.writes(step):
                metrics = nothing
    finally:
        feed.close()


def fit(
    experiment: Experiment,
    *,
    workdir: str | os.PathLike[str] = "runs",
    name: str = "experiment",
    origin: dict[str, Any] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Fitted:
    """Trains an experiment in a run folder: `workdir/name/<hash>-s<seed>`.

    A run that is there already goes on where it stopped; a finished one is only read. SIGTERM and Ctrl-C save and stop.

    Args:
      experiment: what to train.
      workdir: folder of all runs.
      name: of the experiment; the command line uses the config file's.
      origin: how the experiment can be made again, kept in config.json: the `source` and `file` of its config, and the
        `overrides` of the command line.
      overwrite: begin anew where there is a run.
      say: takes each message to the user.

    Raises:
      InputError: the experiment, its data or the folder cannot be used; nothing was written or lost.
      RunFailed: the loss is NaN, or too many steps in a row were skipped. The state before is saved.
    """
    folder = Path(workdir) / name / f"{experiment.hash}-s{experiment.seed}"
    recorded = _recorded(folder, experiment, overwrite)
    if (folder / "summary.json").exists() and not overwrite:
        return Fitted(folder, json.loads((folder / "summary.json").read_text()), stopped=False)

    training = Training(experiment)
    many = recorded["many_steps"] if recorded else training.many_steps_pay
    _check(training)
    feed = training.feed(many=many)
    fresh = training.init()
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    if not recorded:
        folder.mkdir(parents=True, exist_ok=True)
        run = {"name": name, "hash": experiment.hash, "seed": experiment.seed, "many_steps": many}
        _write_json(folder / "config.json", run | (origin or {}) | {"experiment": experiment.to_json()} | provenance())
    if any(policy.param_dtype.itemsize < 4 for policy in experiment.policy.policies):
        lost = "an update of less than half a unit in the last place of a weight is lost"
        rounding = experiment.policy.rounding
        consequence = lost if rounding == "nearest" else f"updates are added with rounding={rounding}"
        say(f"precision {experiment.policy}: no float32 master weights; {consequence}")
    session = _Session(training, feed, folder, say)
    with contextlib.closing(session), _stop_signals() as stop:
        return session.train(*session.resume(fresh), stop)


class _Session:
    """One session of `fit` on one run folder: its side effects, in order."""

    def __init__(self, training: Training, feed: Feed, folder: Path, say: Callable[[str], None]):
        loop = training.experiment.loop
        self.training, self.feed, self.folder, self.say, self.loop = training, feed, folder, say, loop
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=loop.keep, best_of=loop.monitor, mode=loop.mode)
        self.writers: list[Writer] = []
        self.read = jax.jit(_read)
        self.evaluated: list[tuple[int, float]] = []  # step and monitored metric of each evaluation
        self.seconds_before = 0.0  # of the sessions before this one
        self.began = self.line_at = time.perf_counter()
        self.line_step = 0

    def close(self) -> None:
        """Ends the writers and waits for the checkpoints, whatever happened."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            for writer in self.writers:
                stack.callback(writer.close)

    def resume(self, fresh: TrainState) -> tuple[int, TrainState, Metrics]:
        """Step, state and metrics to go on from: of the newest whole checkpoint, else `fresh`."""
        training, folder = self.training, self.folder
        template: dict[str, Any] = {"state": fresh, "metrics": training.no_metrics}
        found = self.checkpoints.restore(template, warn=self.say)
        step, tree = (0, template) if found is None else found
        if found is not None:
            self.say(f"resuming {folder} from step {step}")
        self.writers = [
            JsonLines(folder / "metrics.jsonl", resume_step=step),
            TensorBoard(folder, resume_step=step),
            Console(training.steps, training.batches.per_epoch),
        ]
        if self.loop.wandb:
            self.writers.append(WeightsAndBiases(folder, folder.parent.name, training.experiment.to_json()))
        for record in _records(folder / "metrics.jsonl"):
            self.seconds_before = record["wall_seconds"]
            if record["split"] == "validation":
                self.evaluated.append((record["step"], _number(record[self.loop.monitor])))
        self.line_step = step
        return step, tree["state"], tree["metrics"]

    def train(self, step: int, state: TrainState, metrics: Metrics, stop: Callable[[], bool]) -> Fitted:
        """Trains from `step` to the end, to early stopping, or to a signal."""
        training, devices = self.training, self.training.devices
        schedule = Schedule(self.loop, training.batches.per_epoch, training.steps)
        placed = devices.put(state)
        state = devices.get(placed)
        waiting: _Line | None = None
        dispatches = _dispatches(training, self.feed, placed, devices.put(metrics), step)
        for info in () if self._out_of_patience() else dispatches:
            step, state, metrics = info.step, devices.get(info.state), devices.get(info.metrics)
            # The line of the dispatch before: this one is under way, so waiting for those numbers idles no device.
            self._write(waiting, step, state)
            waiting = _Line(step, metrics, self.read(state.opt_state)) if schedule.writes(step) else None
            if not (schedule.saves(step) or stop()):
                continue
            self._write(waiting, step, state)
            waiting = None
            measured = self._evaluate(step, state, "validation") if schedule.evaluates(step) else None
            self._save(step, state, training.no_metrics if schedule.writes(step) else metrics, measured)
            if schedule.evaluates(step) and self._out_of_patience():
                break
            if stop() and step < training.steps:
                self.checkpoints.wait()
                self.say(f"stopped at step {step} and saved in {self.folder}; the same command goes on from there")
                return Fitted(self.folder, {}, stopped=True)
        return Fitted(self.folder, self._finish(step, state), stopped=False)

    def _write(self, line: _Line | None, step: int, state: TrainState) -> None:
        """Writes a line of training metrics; raises RunFailed where it shows that the run cannot go on."""
        if line is None:
            return
        values = compute(line.metrics)
        readings = {name: value.item() for name, value in jax.device_get(line.readings).items()}
        in_a_row, exhausted = readings.pop("consecutive_skips"), readings.pop("exhausted")
        nan_loss = values.pop(NAN_LOSS)
        now = time.perf_counter()
        examples = (line.step - self.line_step) * self.training.batches.batch_size
        rate = examples / max(now - self.line_at, 1e-9)
        self._record(line.step, "train", values | {"examples_per_second": rate}, readings)
        self.line_at, self.line_step = now, line.step
        if in_a_row >= self.loop.max_consecutive_skips:
            self._fail(f"{in_a_row} steps in a row were skipped, the last of them step {line.step}", step, state)
        scaler = self.training.experiment.make_scaler()
        if nan_loss and isinstance(scaler, NoScaler | StaticScaler):
            self._fail(f"the loss is NaN, at or before step {line.step}", step, state)
        if exhausted:
            gives_up = f"the loss scale came to its floor, where {type(scaler).__name__} gives up"
            self._fail(f"{gives_up}, at or before step {line.step}", step, state)

    def _evaluate(self, step: int, state: TrainState, split: Split) -> dict[str, float]:
        values = compute(self.training.evaluate(state, split))
        readings = {name: value.item() for name, value in jax.device_get(self.read(state.opt_state)).items()}
        readings = {name: readings[name] for name in ("loss_scale", "skipped_steps")}
        self._record(step, split, values, readings)
        if split == "validation":
            self.evaluated.append((step, values[self.loop.monitor]))
        self.line_at = time.perf_counter()  # the time of an evaluation is not the time of a step
        return values

    def _record(self, step: int, split: str, values: dict[str, float], readings: dict[str, Any]) -> None:
        record = {
            "step": step,
            "applied_steps": step - readings["skipped_steps"],
            "epoch": step / self.training.batches.per_epoch,
            "split": split,
            **values,
            **readings,
            "wall_seconds": self._seconds(),
        }
        for writer in self.writers:
            writer.write(record)

    def _save(self, step: int, state: TrainState, metrics: Metrics, measured: dict[str, float] | None = None) -> None:
        self.checkpoints.save(step, {"state": state, "metrics": metrics}, measured)

    def _finish(self, step: int, state: TrainState) -> dict[str, Any]:
        """The last evaluation, on the test set, and the summary."""
        experiment = self.training.experiment
        self.checkpoints.wait()
        test = self._evaluate(step, state, "test")
        best_step, best = self._best()
        summary = {
            "steps": step,
            "applied_steps": step - int(skipped_steps(state.opt_state)),
            "skipped_steps": int(skipped_steps(state.opt_state)),
            "loss_scale": float(loss_scale(state.opt_state)),
            "test": test,
            "best": {"step": best_step, self.loop.monitor: best},
            "stopped_early": step < self.training.steps,
            "wall_seconds": self._seconds(),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "precision": str(experiment.policy),
            "policy": [row._asdict() for row in self.training.explain()],
        }
        _write_json(self.folder / "summary.json", summary)
        return summary

    def _best(self) -> tuple[int, float]:
        sign = 1 if self.loop.mode == "max" else -1
        numbers = [pair for pair in self.evaluated if not math.isnan(pair[1])]
        return max(numbers, key=lambda pair: (sign * pair[1], -pair[0]), default=(0, math.nan))

    def _out_of_patience(self) -> bool:
        if self.loop.patience is None:
            return False
        best_step, _ = self._best()
        return sum(step > best_step for step, _ in self.evaluated) >= self.loop.patience

    def _fail(self, what: str, step: int, state: TrainState) -> None:
        self._save(step, state, self.training.no_metrics)
        self.checkpoints.wait()
        raise RunFailed(f"{what}; {self._culprit(step, state)}. The state is saved in {self.folder}")

    def _culprit(self, step: int, state: TrainState) -> str:
        """Names the first non-finite leaf, by repeating the last steps: a skipped one left the state as it was."""
        for at in range(step - 1, max(-1, step - 1 - self.loop.max_consecutive_skips), -1):
            found = self.training.first_non_finite(state, self.feed.batch(at), at)
            if found is not None:
                return f"the first non-finite value is {found}"
        return "none of the last steps, repeated with the state at hand, gives a non-finite value"

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began


class _Line(NamedTuple):
    """What a line of training metrics is made from; arrays that no later step is given to donate."""

    step: int
    metrics: Metrics
    readings: dict[str, jax.Array]


def _read(opt_state: Any) -> dict[str, jax.Array]:
    # As results of a program of its own they are copies: the state's buffers are donated to the next dispatch.
    return {
        "loss_scale": loss_scale(opt_state),
        "skipped_steps": skipped_steps(opt_state),
        "consecutive_skips": consecutive_skips(opt_state),
        "exhausted": scaler_exhausted(opt_state),
    }


def _check(training: Training) -> None:
    """What would otherwise be found out only at the first evaluation, or after it."""
    loop, data = training.experiment.loop, training.experiment.data
    training.explain()
    measured = [name for name in training.no_metrics if name != NAN_LOSS]
    if loop.monitor not in measured:
        raise InputError(
            f"loop.monitor={loop.monitor!r} is nothing that is measured; expected one of {', '.join(measured)}"
            f"{nearest(loop.monitor, measured)}"
        )
    for split in ("validation", "test"):
        data.source(split)


def _recorded(folder: Path, experiment: Experiment, overwrite: bool) -> dict[str, Any] | None:
    """The config.json of a run to be resumed; None where there is none, or it is to be overwritten."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
        found = config["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} is not empty and no run folder ({type(error).__name__}: {error}); choose another --workdir, or "
            "move it away"
        ) from error
    if overwrite:
        return None
    if found != experiment.hash:
        raise InputError(
            f"{folder} belongs to another experiment: hash {found}, expected {experiment.hash}; choose another "
            "--workdir, or --overwrite"
        )
    return config


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _write_json(path: Path, value: Any) -> None:
    """Writes a file that is either whole or not there."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within: SIGTERM and Ctrl-C only set a flag, which the yielded function reads; a second one acts as ever."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield received.is_set
        return

    def handle(number: int, frame: Any) -> None:
        received.set()
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
