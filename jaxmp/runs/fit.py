"""The training loop: `steps`, a generator, and `fit`, which evaluates, saves, writes and stops around it.

Side effects have one order. After a dispatch of steps: the lines of the dispatch before are written, and what was seen
of the first of its steps where that was looked at, while this one runs; then, where this step is due for it, evaluate,
write, save; then the next batch, a look at it where one is due, and the next dispatch. A line is on disk before a
checkpoint of its step is begun, so that a run that is killed at any moment and resumed ends with the same lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.distributed import processes
from jaxmp.distributed.signals import stop_signals
from jaxmp.errors import InputError, RunFailed, nearest
from jaxmp.experiment.imports import changed_import, program
from jaxmp.instruments.ranges import StepRanges
from jaxmp.runs.checkpoint import Checkpoints
from jaxmp.runs.due import Due
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Training
from jaxmp.runs.writers import Console, JsonLines, TensorBoard, WeightsAndBiases, Writer, read_lines
from jaxmp.scaling.historical import scaler_exhausted
from jaxmp.scaling.scalers import LARGEST, Scaler
from jaxmp.scaling.transform import consecutive_skips, find_state, loss_scale, skipped_steps
from jaxmp.tasks.classification import check_labels
from jaxmp.text_table import without_nan
from jaxmp.training.feed import NAN_LOSS, Feed
from jaxmp.training.metrics import Metrics, compute
from jaxmp.training.state import TrainState

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


LOCK = "lock"
"""file in a run folder, locked by the process that trains in it"""

FAILURE = "failed.json"
"""file in the folder of a run that failed: at which `step`, and the `reason`; gone when the run goes on"""


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
    trained: bool = True
    """whether this call trained; not where the run was finished"""


def steps(experiment: Experiment, state: TrainState | None = None) -> Iterator[StepInfo]:
    """Trains, and yields after each dispatch; nothing is written, evaluated or waited for.

    Args:
      experiment: what to train.
      state: where to go on from; a fresh one by default. It is donated.

    Yields:
      `StepInfo(step, state, metrics)`, at least at every step that the loop's `log_every` and evaluations are due. The
      next dispatch is given the memory of `state`: copy what is to be kept.
    """
    training = Training(experiment)
    check_labels(experiment.model, experiment.task, training.example, {"train": training.source})
    devices = training.devices
    feed = training.feed(many=training.should_fuse_steps)
    state = devices.put_state(training.init() if state is None else state)
    first = int(devices.get(state.step))
    for info in _dispatches(training, feed, state, devices.put(training.no_metrics), first):
        yield StepInfo(info.step, devices.get(info.state), devices.get(info.metrics))


def _dispatches(
    training: Training,
    feed: Feed,
    state: Any,
    metrics: Any,
    first: int,
    look: Callable[[int, Any], None] = lambda step, state: None,
) -> Iterator[StepInfo]:
    """The dispatches from step `first` to the end, as placed on the devices. `metrics` begins anew after each line.

    `look(step, state)` sees the state before a step that is to be looked at.
    """
    loop = training.experiment.loop
    schedule = Due(loop, training.batches.per_epoch, training.steps)
    nothing = training.devices.put(training.no_metrics)
    step = first
    try:
        while step < training.steps:
            if schedule.looks(step):
                look(step, state)
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
    log: Callable[[str], None] = print,
) -> Fitted:
    """Trains an experiment in a run folder: `workdir/name/<hash>-s<seed>`.

    A run that is there already goes on where it stopped; a finished one is only read. SIGTERM and Ctrl-C save and stop.
    Where JAX has several processes (`jax.distributed`), all of them call this alike; the first writes and speaks.

    Args:
      experiment: what to train.
      workdir: folder of all runs; one that all processes see.
      name: of the experiment; the command line uses the config file's.
      origin: how the experiment can be made again, kept in config.json: the `source` and `file` of its config, the
        sources of its `imports` from there, and the `overrides` of the command line; see `ConfigFile.origin`.
      overwrite: begin anew where there is a run.
      log: takes each message to the user.

    Raises:
      InputError: the experiment, its data or the folder cannot be used; nothing was written or lost.
      RunFailed: the loss is NaN, too many steps in a row were skipped, or the scaler gave up. The state is saved.
    """
    if not processes.is_first():
        log = _nothing
    folder = Path(workdir) / name / f"{experiment.hash}-s{experiment.seed}"
    recorded, summary = processes.from_first(
        lambda: (_recorded(folder, experiment, origin or {}, overwrite), None if overwrite else read_summary(folder))
    )
    if summary is not None:
        if recorded and recorded["experiment"].get("parallel") != experiment.to_json()["parallel"]:
            check(Training(experiment))  # the rest is in the hash, and was checked before it was trained
        return Fitted(folder, summary, stopped=False, trained=False)

    training = Training(experiment)
    many = recorded["fuse_steps"] if recorded else training.should_fuse_steps
    check(training)
    feed = training.feed(many=many)
    fresh = training.init()
    with contextlib.ExitStack() as stack:

        def take_folder() -> None:
            if overwrite and folder.exists():
                with _locked(folder):
                    _delete(folder)
            _make(folder)
            stack.enter_context(_locked(folder))
            (folder / FAILURE).unlink(missing_ok=True)
            if not recorded:
                run = {"name": name, "hash": experiment.hash, "seed": experiment.seed, "fuse_steps": many}
                whole = run | (origin or {}) | {"experiment": experiment.to_json()} | provenance()
                _write_json(folder / "config.json", whole)

        processes.from_first(take_folder)
        _say_what_is_particular(training, recorded, log)
        stop = stack.enter_context(stop_signals())
        with _Session(training, feed, folder, log, stop) as session:
            return session.train(*session.resume(fresh))


def _nothing(message: str) -> None:
    """What a process says that is not the first."""


def _say_what_is_particular(training: Training, recorded: dict[str, Any] | None, log: Callable[[str], None]) -> None:
    """What the user should know before the first step."""
    experiment, count = training.experiment, training.devices.count
    if any(policy.param_dtype.itemsize < 4 for policy in experiment.policy.policies):
        lost = "an update of less than half a unit in the last place of a weight is lost"
        rounding = experiment.policy.rounding
        consequence = lost if rounding == "nearest" else f"updates are added with rounding={rounding}"
        log(f"precision {experiment.policy}: no float32 master weights; {consequence}")
    if recorded and len(recorded["devices"]) != count:
        log(
            f"this run began on {len(recorded['devices'])} devices and goes on on {count}: sums are rounded in another "
            "order, and a module that draws noise by itself, other than by nn.Dropout, draws another"
        )


class _Session:
    """One session of `fit` on one run folder: its side effects, in order.

    Of several processes all do the same, but for writing: what they decide by is the same in all of them, since it
    comes from the devices, where it is replicated, or from the first process.
    """

    def __init__(
        self, training: Training, feed: Feed, folder: Path, log: Callable[[str], None], stop: Callable[[], bool]
    ):
        loop = training.experiment.loop
        self.training, self.feed, self.folder, self.log, self.loop = training, feed, folder, log, loop
        self.stop_asked = stop  # of this process
        self.stop_agreed = False  # of all, see `_stops`
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=loop.keep, best_of=loop.monitor, mode=loop.best_is)
        self.writers: list[Writer] = []
        self.read = jax.jit(_read)
        self.looked: list[tuple[int, StepRanges, jax.Array]] = []  # step, what was seen of it, scale: not written yet
        self.evaluated: list[tuple[int, float]] = []  # step and monitored metric of each evaluation
        self.seconds_before = 0.0  # of the sessions before this one
        self.began = self.line_at = time.perf_counter()
        self.line_step = 0

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        """Ends the writers and waits for the checkpoints, whatever happened.

        But not where one of several processes may have failed alone: no checkpoint is whole without the others.
        """
        with contextlib.ExitStack() as stack:
            if error is None or not processes.several():
                stack.callback(self.checkpoints.close)
            for writer in self.writers:
                stack.callback(writer.close)

    def resume(self, fresh: TrainState) -> tuple[int, TrainState, Metrics]:
        """Step, state and metrics to go on from: of the newest whole checkpoint, else `fresh`."""
        training, folder = self.training, self.folder
        template: dict[str, Any] = {"state": fresh, "metrics": training.no_metrics}
        found = self.checkpoints.restore(template, warn=self.log)
        step, tree = (0, template) if found is None else found
        if found is not None:
            self.log(f"resuming {folder} from step {step}")
        processes.from_first(lambda: self._open_writers(step))
        self.seconds_before, self.evaluated = processes.from_first(self._so_far)
        self.line_step = step
        return step, tree["state"], tree["metrics"]

    def _open_writers(self, step: int) -> None:
        training, folder = self.training, self.folder
        self.writers = [
            JsonLines(folder / "metrics.jsonl", resume_step=step),
            TensorBoard(folder, resume_step=step),
            Console(training.steps, training.batches.per_epoch),
        ]
        if self.loop.wandb:
            self.writers.append(WeightsAndBiases(folder, folder.parent.name, training.experiment.to_json()))

    def _so_far(self) -> tuple[float, list[tuple[int, float]]]:
        """What the lines of the sessions before say: the seconds they took, and what they measured."""
        records = read_lines(self.folder / "metrics.jsonl")
        evaluations = [record for record in records if record["split"] == "validation"]
        evaluated = [(record["step"], _number(record[self.loop.monitor])) for record in evaluations]
        return records[-1]["wall_seconds"] if records else 0.0, evaluated

    def _stops(self) -> bool:
        """Whether a signal stops the run after this dispatch.

        Several processes stop together, though the signal may reach one: each line carries whether any of them was
        asked to, and all come to know it where they wait for its numbers anyway.
        """
        return self.stop_agreed if processes.several() else self.stop_asked()

    def train(self, step: int, state: TrainState, metrics: Metrics) -> Fitted:
        """Trains from `step` to the end, to early stopping, or to a signal."""
        training, devices = self.training, self.training.devices
        schedule = Due(self.loop, training.batches.per_epoch, training.steps)
        placed = devices.put_state(state)
        state = devices.get(placed)
        waiting: _Line | None = None
        dispatches = _dispatches(training, self.feed, placed, devices.put(metrics), step, self._look)
        for info in () if self._out_of_patience() else dispatches:
            step, state, metrics = info.step, devices.get(info.state), devices.get(info.metrics)
            before, waiting = waiting, None
            since_line = training.no_metrics if schedule.writes(step) else metrics  # as the next dispatch begins
            if schedule.checks(step):
                waiting = self._line(step, schedule.writes(step), metrics, state)
            # The line of the dispatch before: this one is under way, so waiting for those numbers idles no device.
            problem = self._write(before)
            self._write_ranges()
            if not (problem or schedule.saves(step) or self._stops()):
                continue
            if problem:  # by now this step is done too: the last of the run, which gets a line, whatever is due
                waiting = (waiting or self._line(step, True, metrics, state))._replace(due=True)
                since_line = training.no_metrics
            problem, waiting = self._write(waiting) or problem, None
            if problem:
                self._fail(problem, step, state, since_line)
            measured = self._evaluate(step, state, "validation") if schedule.evaluates(step) else None
            self._save(step, state, since_line, measured)
            if schedule.evaluates(step) and self._out_of_patience():
                break
            if self._stops() and step < training.steps:
                self.checkpoints.wait()
                self.log(f"stopped at step {step} and saved in {self.folder}; the same command goes on from there")
                return Fitted(self.folder, {}, stopped=True)
        return Fitted(self.folder, self._finish(step, state), stopped=False)

    def _line(self, step: int, due: bool, metrics: Metrics, state: TrainState) -> _Line:
        readings = self.read(state.opt_state)
        return _Line(step, due, metrics, readings | {"stop": self.training.devices.any_process(self.stop_asked())})

    def _fail(self, problem: str, step: int, state: TrainState, metrics: Metrics) -> NoReturn:
        """Saves the state, and why the run ends here."""
        self._save(step, state, metrics)
        self.checkpoints.wait()
        reason = f"{problem}; {culprit}" if (culprit := self._culprit(step, state)) else problem
        processes.from_first(lambda: _write_json(self.folder / FAILURE, {"step": step, "reason": reason}))
        raise RunFailed(
            f"{reason}. The state is saved in {self.folder}; what made it, and what would have prevented it: "
            f"jaxmp blame {self.folder}"
        )

    def _write(self, line: _Line | None) -> str | None:
        """Writes a line of training metrics where one is due; returns why the run cannot go on, where it cannot."""
        if line is None:
            return None
        values = compute(line.metrics)
        readings = {name: value.item() for name, value in jax.device_get(line.readings).items()}
        in_a_row, exhausted = readings.pop("consecutive_skips"), readings.pop("exhausted")
        self.stop_agreed |= readings.pop("stop")
        nan_loss = values.pop(NAN_LOSS)
        if line.due:
            now = time.perf_counter()
            examples = (line.step - self.line_step) * self.training.batches.batch_size
            rate = examples / max(now - self.line_at, 1e-9)
            self._record(line.step, "train", values | {"examples_per_second": rate}, readings)
            self.line_at, self.line_step = now, line.step
        if in_a_row >= self.loop.max_consecutive_skips:
            return f"{in_a_row} steps in a row were skipped, the last of them step {line.step}"
        if nan_loss:  # no matter of the scale, which multiplies the loss and not what it is made from
            return f"the loss is NaN, at or before step {line.step}"
        if exhausted:
            scaler = type(self.training.experiment.make_scaler()).__name__
            return f"the loss scale came to its floor, where {scaler} gives up, at or before step {line.step}"
        return None

    def _look(self, step: int, state: Any) -> None:
        """Dispatches the counting of what the next step is made of; it is fetched when the step is under way."""
        state = self.training.devices.get(state)
        looked = self.training.look(state, self.feed.batch(step))
        self.looked.append((step + 1, looked, self.read(state.opt_state)["loss_scale"]))

    def _write_ranges(self) -> None:
        """Writes what was seen of steps that are under way by now, each as a record of its own."""
        for step, looked, scale in self.looked:
            record = {
                "step": step,
                "epoch": step / self.training.batches.per_epoch,
                "split": "ranges",
                "loss_scale": float(scale),
                "wall_seconds": self._seconds(),
                "ranges": looked.read(),
            }
            for writer in self.writers:
                writer.write(record)
        self.looked = []

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
        processes.from_first(lambda: _write_json(self.folder / "summary.json", summary))
        return summary

    def _best(self) -> tuple[int, float]:
        sign = 1 if self.loop.best_is == "max" else -1
        numbers = [pair for pair in self.evaluated if not math.isnan(pair[1])]
        return max(numbers, key=lambda pair: (sign * pair[1], -pair[0]), default=(0, math.nan))

    def _out_of_patience(self) -> bool:
        if self.loop.patience is None:
            return False
        best_step, _ = self._best()
        return sum(step > best_step for step, _ in self.evaluated) >= self.loop.patience

    def _culprit(self, step: int, state: TrainState) -> str | None:
        """What was not finite in the last step, which is repeated; None where that was not skipped.

        A skipped step left the state as it was, but for the loss scale.
        """
        in_a_row, scaling = int(consecutive_skips(state.opt_state)), find_state(state.opt_state)
        if not in_a_row or scaling is None:
            return None
        scale = _scale_of_last(self.training.experiment.make_scaler(), float(scaling.scaler.scale), in_a_row)
        found = self.training.not_finite(state, self.feed.batch(step - 1), step - 1, scale)
        if found is None:
            return f"step {step}, repeated at loss scale {scale:g} with its whole batch at once, is finite"
        return f"not finite in step {step}, at loss scale {scale:g}: {found}"

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began


def _scale_of_last(scaler: Scaler, after: float, in_a_row: int) -> float:
    """The loss scale of the last of some steps skipped in a row, from the scale after it.

    Found by trying the powers of two from which the row may have begun.
    """

    def last_two(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        overflow = jnp.bool_(False), jnp.float32(jnp.inf)
        before = scaler.init()._replace(scale=start)
        before = jax.lax.fori_loop(0, in_a_row - 1, lambda _, state: scaler.update(state, *overflow), before)
        return before.scale, scaler.update(before, *overflow).scale

    starts = after * 2.0 ** np.arange(64)
    last, then = jax.jit(jax.vmap(last_two))(jnp.float32(starts[starts <= LARGEST]))
    found = np.flatnonzero(np.asarray(then) == after)
    return float(last[found[0]]) if len(found) else after


class _Line(NamedTuple):
    """What a line of training metrics is made from; arrays that no later step is given to donate."""

    step: int
    due: bool
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


def check(training: Training) -> None:
    """What would otherwise be found out only at the first evaluation, or after it, or not at all. Raises InputError."""
    experiment, loop, data = training.experiment, training.experiment.loop, training.experiment.data
    training.explain()
    training.experiment.parallel.make(training.experiment.data.batch_size, loop.accumulate_steps)
    measured = [name for name in training.no_metrics if name != NAN_LOSS]
    if loop.monitor not in measured:
        raise InputError(
            f"loop.monitor={loop.monitor!r} is nothing that is measured; expected one of {', '.join(measured)}"
            f"{nearest(loop.monitor, measured)}"
        )
    train = training.source[np.arange(1)]
    others = {split: data.source(split) for split in ("validation", "test")}
    for split, source in others.items():
        row = source[np.arange(1)]
        for name in training.columns:
            expected = f"{train[name].dtype}{list(train[name].shape[1:])}"
            found = f"{row[name].dtype}{list(row[name].shape[1:])}" if name in row else "nothing"
            if found != expected:
                raise InputError(
                    f"{name!r} of the {split} split is {found}; expected {expected}, as in the train split"
                )
    check_labels(experiment.model, experiment.task, training.example, {"train": training.source, **others})


def _recorded(folder: Path, experiment: Experiment, origin: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The config.json of a run to be resumed; None where there is none, or it is to be overwritten."""
    if not folder.exists() or all(path.suffix == ".partial" or path.name == LOCK for path in folder.iterdir()):
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
    if "source" in origin and "source" in config:
        changed = changed_import(config.get("imports", {}))
        if program(origin["source"]) != program(config["source"]):
            changed = origin.get("file", "the config")
        if changed is not None:
            raise InputError(
                f"{changed} has changed since {folder} began, in what no field of the experiment shows: choose another "
                "--workdir, or --overwrite"
            )
    return config


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary.json of a run that has ended, None where there is none. Raises InputError for a broken one."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        missing = {"steps", "test", "best", "policy"} - set(summary)
        problem = f"lacks {', '.join(sorted(missing))}" if missing else None
    except (ValueError, TypeError) as error:
        problem = f"is no JSON object ({error})"
    if problem:
        raise InputError(
            f"{path} {problem}; delete this file alone, and the same `jaxmp train` makes it again from the last "
            "checkpoint"
        )
    return summary


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # some file systems take no folders, and say it so: /proc
        raise InputError(f"{folder}: no folder can be made there; choose another --workdir") from error


def _delete(folder: Path) -> None:
    """Takes the name away first, so that a kill on the way leaves nothing that looks like a run and is none."""
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within: no other process trains in this folder. The lock goes with the process, however that ends."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {folder}; wait for it, or choose another --workdir"
            ) from None
        yield


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _write_json(path: Path, value: Any) -> None:
    """Writes a file that is either whole or not there."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
