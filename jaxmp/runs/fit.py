"""Trainer: `steps`, a generator, and `fit`, which evaluates, saves, writes and stops around it.

Side effects have one order. After a dispatch of steps: the lines of the dispatch before are written, and the ranges of
the first of its steps if they were counted, while this one runs; then the hooks of a `StepInfo`; then, if this step is
due for it, evaluate, write, draw samples, the hooks of an `Evaluated`, save; then the next batch, its ranges if they
are due, and the next dispatch. A run that fails after a step first does all that is due there, but for the hooks of an
`Evaluated`. A line is on disk before a checkpoint of its step is begun, so that a run that is killed at any moment and
resumed ends with the same lines; a hook is called again for what it saw after the last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import jax

from jaxmp.data.pipeline import left_out
from jaxmp.distributed import processes
from jaxmp.distributed.signals import stop_signals
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.canonical import canonical
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import identity_hash
from jaxmp.experiment.reachable import made_by
from jaxmp.instruments.nonfinite import name_nonfinite
from jaxmp.runs.checkpoint import Checkpoints
from jaxmp.runs.checks import check, check_targets, reading_processes
from jaxmp.runs.console import Console
from jaxmp.runs.due import Due, Interruption
from jaxmp.runs.folder import RunFolder, how_to_blame
from jaxmp.runs.going_on import (
    DEVICES,
    PLACE,
    Parent,
    changed_settings,
    log_changes,
    log_neighbours,
    log_sampled,
    log_without_effect,
    refuse_other_code,
    refuse_other_rows,
    refuse_other_rows_if_readable,
    with_session,
)
from jaxmp.runs.hooks import Evaluated, Hook, HookFailed, Hooks, Pause, StateLost, StepInfo
from jaxmp.runs.privacy import Spending, may_share_rows, private_seeds, spent_by
from jaxmp.runs.provenance import provenance
from jaxmp.runs.records import Line, Records, is_pruned
from jaxmp.runs.run import Run
from jaxmp.runs.trace import StepRange, Trace
from jaxmp.runs.trainer import SPLITS, Trainer
from jaxmp.runs.weights_file import WeightsFile
from jaxmp.runs.writers import escaped_output
from jaxmp.scaling.transform import consecutive_skips, find_state
from jaxmp.training.feed import Feed
from jaxmp.training.metrics import Metrics, specs_to_json
from jaxmp.training.objective import objective_key
from jaxmp.training.optimizers import Private
from jaxmp.training.state import TrainState


class Shared(Protocol):
    """The protocol of a place in a program that trains several runs; see `jaxmp.studies.seeds_together`."""

    @property
    def text(self) -> str:
        """Which of how many places, `1 of 3`: what the last digits of the run depend on."""
        ...

    def feed(self, own: Feed, trainer: Trainer) -> Feed:
        """The feed that makes the run's dispatches, in place of its `own`. Raises InputError if there can be none."""
        ...


class Fitted(NamedTuple):
    """What `fit` leaves."""

    path: Path
    """the run folder; `jaxmp.Run(path)` reads it back"""
    summary: dict[str, Any]
    """what is in its summary.json; empty if the run was stopped"""
    stopped: bool
    """whether a signal, `loop.max_minutes` or a hook's `Pause` ended this session before the run's end, after saving"""
    trained: bool = True
    """whether this call trained; False if the run had ended before"""

    def _repr_html_(self) -> str:
        """Shows the run in a notebook, as `jaxmp.Run(path)` does."""
        return Run(self.path)._repr_html_()


def steps(experiment: Experiment, state: TrainState | None = None) -> Iterator[StepInfo]:
    """Trains, and yields after each dispatch; nothing is written, evaluated or waited for.

    Args:
      experiment: what to train.
      state: where to go on from; a fresh one by default. It is donated.

    Yields:
      `StepInfo(step, state, metrics)`, at least at every step that the loop's `log_every` and evaluations are due. The
      next dispatch is given the memory of `state`: copy what is to be kept.
    """
    trainer = Trainer(experiment)
    _ = trainer.metric_specs  # checks the task's declaration
    check_targets(trainer, "train")
    devices = trainer.devices
    feed = trainer.feed(fuse=trainer.fuse_steps)
    state = devices.put_state(trainer.init() if state is None else state)
    first = int(devices.get(state.step))
    for info in _dispatches(trainer, feed, state, devices.put(trainer.no_metrics), first):
        yield StepInfo(info.step, devices.get(info.state), devices.get(info.metrics))


def _dispatches(
    trainer: Trainer,
    feed: Feed,
    state: Any,
    metrics: Any,
    first: int,
    count_ranges: Callable[[int, Any], None] = lambda step, state: None,
    due: Due | None = None,
    run: Callable[..., tuple[Any, Any]] | None = None,
) -> Iterator[StepInfo]:
    """The dispatches from step `first` to the end, as placed on the devices. `metrics` begins anew after each line.

    `count_ranges(step, state)` is given the state before a step whose ranges are due. `due` says where dispatches end;
    `run(state, metrics, step, count)` makes one, by default the feed's.
    """
    loop = trainer.experiment.loop
    due, run = due or Due(loop, trainer.batches.per_epoch, trainer.steps), run or feed.run
    nothing = trainer.devices.put(trainer.no_metrics)
    step = first
    try:
        while step < trainer.steps:
            if due.ranges(step):
                count_ranges(step, state)
            stop = due.next_stop(step, loop.steps_per_dispatch or trainer.steps)
            state, metrics = run(state, metrics, step, stop - step)
            step = stop
            yield StepInfo(step, state, metrics)
            if due.line(step):
                metrics = nothing
    finally:
        feed.close()


@escaped_output()
def fit(
    experiment: Experiment,
    *,
    workdir: str | os.PathLike[str] = "runs",
    name: str = "experiment",
    origin: dict[str, Any] | None = None,
    overwrite: bool = False,
    continue_from: str | os.PathLike[str] | None = None,
    init_from: str | os.PathLike[str] | None = None,
    init_only: Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    shared: Shared | None = None,
    profile: tuple[int, int] | None = None,
    progress: Literal["auto", "none"] = "auto",
    log: Callable[[str], None] = print,
) -> Fitted:
    """Trains an experiment in a run folder: `workdir/name/<hash>-s<seed>`.

    A run that is there already goes on where it stopped; a finished one is only read. SIGTERM and Ctrl-C save and stop.
    If JAX has several processes (`jax.distributed`), all of them call this alike; the first writes and speaks.

    Args:
      experiment: what to train.
      workdir: folder of all runs; one that all processes see.
      name: of the experiment; the command line uses the config file's.
      origin: how the experiment can be made again, kept in config.json: the `source` and `file` of its config, the
        sources of its `imports` from there, and the `overrides` of the command line; see `ConfigFile.origin`.
      overwrite: begin anew if there is a run.
      continue_from: a run, `RUN` or `RUN@STEP`: goes on from all of its last state, or of that step, with what is
        changed in the experiment, in a folder of its own. Its batches have to be the same.
      init_from: a run, `RUN`, `RUN@best` or `RUN@STEP`: begins with its weights and model state, by path, and all else
        fresh. With a moving average there, it is the average that is taken. Or a file of pretrained weights,
        `FILE.safetensors`, see `jaxmp.runs.weights_file`.
      init_only: patterns of the weights to take, see `jaxmp.trees.Pattern`; the others begin fresh. By default all.
      profile: the first and the last of the steps to trace, counted from 1; the trace goes to `plugins/profile` in
        the run folder, and xprof opens it.
      progress: whether the screen shows a bar on a terminal and in a notebook, and lines elsewhere ("auto"), or neither
        ("none").
      hooks: functions of your own, called between steps and after evaluations; see `jaxmp.runs.hooks`. They are no part
        of the run's identity, and change no bit of it.
      shared: the run's place in a program that trains several seeds together; by default it has a program of its own.
      log: takes each message to the user.

    Returns:
      `Fitted`: the run's folder, its summary, whether it was stopped before its end, and whether this call trained it.

    Raises:
      InputError: the experiment, its data or the folder cannot be used, or `profile` names steps that this session does
        not make; nothing was written or lost.
      RunFailed: the loss is NaN, too many steps in a row were skipped, the scaler gave up, or a hook raised. The state
        is saved.
    """
    called = Hooks(hooks)
    with contextlib.ExitStack() as stack:
        console = None
        if progress != "none" and processes.is_first():
            console = Console()
            stack.callback(console.close)
        return _fit(
            experiment,
            console,
            workdir=workdir,
            name=name,
            origin=origin or {},
            overwrite=overwrite,
            continue_from=continue_from,
            init_from=init_from,
            init_only=init_only,
            traced=None if profile is None else StepRange(*profile),
            hooks=called,
            shared=shared,
            log=log if processes.is_first() else _silent,
        )


def _fit(
    experiment: Experiment,
    console: Console | None,
    *,
    workdir: str | os.PathLike[str],
    name: str,
    origin: dict[str, Any],
    overwrite: bool,
    continue_from: str | os.PathLike[str] | None,
    init_from: str | os.PathLike[str] | None,
    init_only: Sequence[str],
    traced: StepRange | None,
    hooks: Hooks,
    shared: Shared | None,
    log: Callable[[str], None],
) -> Fitted:
    """`fit`, with what shows its progress; None for nothing."""
    began, doing = time.monotonic(), _silent if console is None else console.doing
    doing("reading data")
    parent = processes.from_first(lambda: parent_of(continue_from, init_from, init_only))
    begins_with = None if parent is None else parent.begins_with
    folder = RunFolder.of(experiment, workdir, name, begins_with)
    place = None if shared is None else shared.text
    program = made_by(experiment)  # before `load` is called, which may change what it is made by: count, keep
    recorded, summary = processes.from_first(
        lambda: (
            _recorded(folder, identity_hash(experiment, begins_with), program, overwrite, log),
            None if overwrite else folder.read_summary(),
        )
    )
    if summary is not None:
        trainer, changes = Trainer(experiment), changed_settings(recorded, experiment, jax.device_count(), place)
        if any(change.kind == "rounds" and change.path not in (DEVICES, PLACE) for change in changes):
            check(trainer)  # the rest was checked before it was trained
        processes.from_first(lambda: refuse_other_rows_if_readable(folder, recorded, trainer, log))
        log_without_effect(changes, log)
        return Fitted(folder.path, summary, stopped=False, trained=False)

    trainer = Trainer(experiment)
    fuse = recorded["fuse_steps"] if recorded else trainer.fuse_steps
    check(trainer)
    if traced is not None:
        traced.check(0, trainer.steps)
    rows = processes.from_first(lambda: trainer.fingerprints(workers=reading_processes(trainer)))
    doing("compiling")
    if recorded:
        refuse_other_rows(folder, recorded, rows)
    # Nothing is taken over where a session before has done so, and trained on.
    begins = parent is not None and processes.from_first(
        lambda: not recorded or max(folder.checkpoint_steps(), default=0) < (parent.step if parent.takes_all else 1)
    )
    if parent is not None and begins:
        parent.check(trainer, rows)
        fuse = parent.config.get("fuse_steps", fuse) if isinstance(parent, Parent) and parent.takes_all else fuse
    feed = trainer.feed(fuse=fuse)
    if shared is not None:
        feed = shared.feed(feed, trainer)
    fresh = trainer.init()
    if parent is not None and begins and not parent.takes_all:
        fresh = parent.give_weights(trainer, fresh, log)
    with contextlib.ExitStack() as stack:

        def take_folder() -> None:
            if overwrite and folder.path.exists():
                with folder.locked(log):
                    folder.delete()
            folder.create()
            stack.enter_context(folder.locked(log))
            folder.clear_failure()
            if not recorded:
                run = {"name": name, "hash": identity_hash(experiment, begins_with), "seed": experiment.seed}
                run |= {
                    "fuse_steps": fuse,
                    "steps": trainer.steps,
                    "scaler": canonical(experiment.make_scalers() or experiment.make_scaler(), "scaler"),
                    "made_by": program,
                    "rows": rows,
                }
                if parent is not None:
                    run |= {"begins_with": begins_with}
                if place is not None:
                    run |= {PLACE: place}
                if trainer.is_private:
                    run |= {"privacy": spending.to_json()}
                if isinstance(parent, Parent):
                    run |= {"parent": str(parent.folder.path.absolute())}
                    run |= {"best_since": parent.best_since(trainer)} if parent.takes_all else {}
                elif parent is not None:
                    run |= {"weights_file": str(parent.path.absolute())}
                shown: dict[str, Any] = {"metrics": specs_to_json(trainer.metric_specs)}
                shown |= {"monitor": trainer.monitor.name, "mode": trainer.monitor.best}
                folder.write_config(run | origin | {"experiment": experiment.to_json()} | shown | provenance())

        spending = _spending(trainer, parent, rows, log) if trainer.is_private and not recorded else Spending(trainer)
        if not recorded:
            log_neighbours(folder, trainer, fresh, rows, begins_with, log)
        carried = None
        if isinstance(parent, Parent) and begins and parent.takes_all:
            carried = parent.carry_over(trainer, fresh, log)
        processes.from_first(take_folder)
        if carried is not None:
            carried.write(folder)
        changes = changed_settings(recorded, experiment, trainer.devices.count, place) if recorded else []
        _log_particulars(trainer, log)
        log_sampled(rows, log)
        log_changes(changes, log)
        stop = Interruption(stack.enter_context(stop_signals()), began, experiment.loop.max_minutes)
        with _Session(trainer, feed, folder, log, stop, traced, console, hooks) as session:
            step, state, metrics = session.resume(fresh)
            if traced is not None:
                traced.check(step, trainer.steps)
            if step == 0 and experiment.loop.log_images:
                session.records.show_images(feed.batch(0))
            if changes:
                processes.from_first(lambda: folder.write_config(with_session(recorded, step, changes)))
            return session.train(step, state, metrics)


def _spending(
    trainer: Trainer, parent: Parent | WeightsFile | None, rows: dict[str, Any], log: Callable[[str], None]
) -> Spending:
    """What a private run begins with having told of its rows: what the weights of `parent` tell of them.

    Raises: InputError if its seed would draw the noise of a private run before it again, which is accounted for as if
      it were other noise.
    """
    if parent is None:
        return Spending(trainer)
    public = None
    if not isinstance(parent, Parent) or not may_share_rows(parent.config, rows):
        public = str(parent.folder.path if isinstance(parent, Parent) else parent.path)
        log(f"epsilon takes the weights of {public} for public: they were trained on other rows, as far as is known")
    if not isinstance(parent, Parent):
        return Spending(trainer, taken_for_public=public)
    seed, seeds = trainer.experiment.seed, private_seeds(parent.config)
    if seed in seeds and not parent.takes_all:  # --continue goes on after the steps whose noise was drawn
        whose = "its own" if seed == parent.config["seed"] else "that of a run before it"
        raise InputError(
            f"--init-from {parent.folder.path}: with seed {seed}, which was {whose}, the noise and the batches would "
            "be the same again; expected another --seed"
        )
    before, first = spent_by(parent.config, parent.step, rows), parent.step if parent.takes_all else 0
    return Spending(trainer, before, first, tuple(sorted(seeds)), public)


def _silent(message: str) -> None:
    """The log of a process that is not the first."""


def parent_of(
    continue_from: str | os.PathLike[str] | None = None,
    init_from: str | os.PathLike[str] | None = None,
    init_only: Sequence[str] = (),
) -> Parent | WeightsFile | None:
    """What a run begins with: the state or weights of another, or weights of a file; None if it begins afresh."""
    if continue_from is not None and init_from is not None:
        raise InputError(
            f"--continue {continue_from} and --init-from {init_from}: expected one of the two, all of a run's state or "
            "its weights alone"
        )
    if init_only and init_from is None:
        raise InputError(f"--init-only {' '.join(init_only)}: only with --init-from, which is not given")
    if continue_from is not None:
        return Parent.find(continue_from, "continue")
    if init_from is not None and WeightsFile.is_named_by(init_from):
        return WeightsFile.find(init_from, init_only)
    return None if init_from is None else Parent.find(init_from, "init", init_only)


def _recorded(
    folder: RunFolder,
    expected: str,
    program: dict[str, Any],
    overwrite: bool,
    log: Callable[[str], None],
) -> Any:
    """The config.json of a run to be resumed, of this hash; None if there is none, or it is to be overwritten."""
    if folder.is_unused():
        return None
    try:
        config = folder.read_config()
    except (OSError, InputError) as error:
        raise InputError(
            f"{folder.path} is not empty and no run folder ({error}); choose another --workdir, or move it away"
        ) from error
    if overwrite:
        return None
    if config["hash"] != expected:
        raise InputError(
            f"{folder.path} belongs to another experiment: hash {config['hash']}, expected {expected}; choose "
            "another --workdir, or --overwrite"
        )
    if not folder.has_ended:
        folder.refuse_earlier_version(config)
    refuse_other_code(folder, config, program, log)
    return config


def _log_particulars(trainer: Trainer, log: Callable[[str], None]) -> None:
    """Says what the user should know before the first step."""
    experiment = trainer.experiment
    if outside := left_out(trainer.source()):
        columns = ", ".join(f"{name} ({of})" for name, of in outside.items())
        log(f"columns left out, as JAX does not support their dtypes: {columns}")
    for split in SPLITS:
        if split not in trainer.splits:
            chosen = "the last weights are the best" if split == "validation" else "the summary has no test metrics"
            log(f"this data has no {split} split: {chosen}")
    if any(policy.param_dtype.itemsize < 4 for policy in experiment.policy.policies):
        lost = "an update of less than half a unit in the last place of a weight is lost"
        rounding = experiment.policy.rounding
        consequence = lost if rounding == "nearest" else f"updates are added with rounding={rounding}"
        log(f"precision {experiment.policy}: no float32 master weights; {consequence}")
    for line in (*trainer.frozen(), *trainer.pruned()):
        log(line)
    rows = len(trainer.source())
    if isinstance(experiment.optimizer, Private) and experiment.optimizer.delta * rows >= 1:
        log(
            f"optimizer.delta = {experiment.optimizer.delta:g}: not below 1 / {rows}, one over the number of training "
            "rows, so that to publish a row of them would count as private"
        )
    if experiment.loop.overfit_batches is not None:
        log(
            f"loop.overfit_batches = {experiment.loop.overfit_batches}: every epoch trains on the same "
            f"{len(trainer.source('validation'))} rows, and they are the validation split"
        )


class _Session:
    """One session of `fit` on one run folder: its side effects, in order.

    Of several processes all do the same, but for writing: what they decide by is the same in all of them, since it
    comes from the devices, where it is replicated, or from the first process.
    """

    def __init__(
        self,
        trainer: Trainer,
        feed: Feed,
        folder: RunFolder,
        log: Callable[[str], None],
        stop: Interruption,
        traced: StepRange | None,
        console: Console | None,
        hooks: Hooks,
    ):
        self.trainer, self.feed, self.folder, self.log, self.hooks = trainer, feed, folder, log, hooks
        self.stop = stop  # of this process
        self.stop_agreed = False  # of all, see `_stops`
        self.paused: str | None = None  # why a hook ended this session
        self.traced, self.trace = traced, Trace(traced, folder.path, log)
        self.records = Records(trainer, folder, console)
        self.checkpoints: Checkpoints = folder.checkpoints(
            keep=trainer.experiment.loop.keep, best_of=trainer.monitor.name, mode=trainer.monitor.best
        )

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        """Ends the writers and waits for the checkpoints, whatever happened.

        But not if one of several processes may have failed alone: no checkpoint is whole without the others.
        """
        with contextlib.ExitStack() as stack:
            if error is None or not processes.several():
                stack.callback(self.checkpoints.close)
            stack.callback(self.records.close)
            stack.callback(self.trace.close)

    def resume(self, fresh: TrainState) -> tuple[int, TrainState, Metrics]:
        """Step, state and metrics to go on from: of the newest whole checkpoint, else `fresh`."""
        template: dict[str, Any] = {"state": fresh, "metrics": self.trainer.no_metrics}
        found = self.checkpoints.restore(template, warn=self.log)
        step, tree = (0, template) if found is None else found
        if found is not None:
            self.log(f"resuming {self.folder.path} from step {step}")
        self.records.open(step)
        return step, tree["state"], tree["metrics"]

    def train(self, step: int, state: TrainState, metrics: Metrics) -> Fitted:
        """Trains from `step` to the end, to early stopping, to a hook's `Stop` or `Pause`, or to a signal."""
        trainer, devices, records = self.trainer, self.trainer.devices, self.records
        due = Due(trainer.experiment.loop, trainer.batches.per_epoch, trainer.steps, self.traced)
        placed = devices.put_state(state)
        state = devices.get(placed)
        waiting: Line | None = None

        def run(state: Any, metrics: Any, first: int, count: int) -> tuple[Any, Any]:
            result = self.trace.run(self.feed.run, state, metrics, first, count)
            records.dispatched(first, first + count, result[1])
            return result

        dispatches = _dispatches(trainer, self.feed, placed, devices.put(metrics), step, self._count_ranges, due, run)
        because = processes.from_first(functools.partial(self.folder.read_stop, at=step))  # by a hook, before
        for info in () if records.out_of_patience() or because else dispatches:
            step, state, metrics = info.step, devices.get(info.state), devices.get(info.metrics)
            before, waiting = waiting, None
            since_line = trainer.no_metrics if due.line(step) else metrics  # as the next dispatch begins
            if due.check(step):
                waiting = self._line(step, due.line(step), metrics, state)
            # The line of the dispatch before: this one is under way, so waiting for those numbers idles no device.
            problem = self._write(before)
            records.write_ranges()
            failed = None
            if not problem:
                because, failed = self._call_hooks(StepInfo(step, state, metrics))
            if not (problem or because or failed or due.save(step) or self._stops()):
                continue
            if problem or because:  # this step is the last of the run, which gets a line, whatever is due
                waiting = (waiting or self._line(step, True, metrics, state))._replace(due=True)
                since_line = trainer.no_metrics
            problem, waiting = self._write(waiting) or problem, None
            if problem:  # whatever a hook says
                because = None
            evaluates = (due.evaluation(step) or because) and "validation" in trainer.splits
            measured = records.evaluate(step, state, "validation") if evaluates else None
            if evaluates and trainer.experiment.loop.log_samples:
                records.draw_samples(step, state)
            if measured is not None and not (problem or failed):
                evaluated = Evaluated(step, state, "validation", measured, self.folder.path)
                again, failed = self._call_hooks(evaluated)
                because = because or again
            if because and not failed:
                self.log(f"stopped after step {step}: {because}")
                processes.from_first(functools.partial(self.folder.write_stop, step, because))
            if measured is not None and (because or step == trainer.steps):
                records.count_last(step, measured)
            counted = measured if records.is_counted(step) else None  # by which the best is chosen
            self.checkpoints.save(step, {"state": state, "metrics": since_line}, counted)
            records.interrupted()
            if problem:
                self._fail(problem, step, state)
            if failed:
                self._fail_in_hook(failed, step)
            if because or (due.evaluation(step) and records.out_of_patience()):
                break
            if self._stops() and step < trainer.steps:
                self.checkpoints.wait()
                why = self.stop.why if self.paused is None else f" ({self.paused})"
                self.log(
                    f"stopped at step {step}{why} and saved in {self.folder.path}; the same command goes on from there"
                )
                return Fitted(self.folder.path, {}, stopped=True)
        return Fitted(self.folder.path, self._finish(step, state, because), stopped=False)

    def _call_hooks(self, value: StepInfo | Evaluated) -> tuple[str | None, HookFailed | None]:
        """Why a hook stops the run, and what went wrong in one; None each if not. A pause is kept for `_stops`."""
        try:
            found = self.hooks.call(value)
            if isinstance(found, Pause):
                self.paused = found.why
                return None, None
            return found and found.why, None
        except StateLost as error:
            self._fail_in_hook(
                error, value.step, "The same call, with the hook mended, goes on from the last checkpoint"
            )
        except HookFailed as error:
            return None, error

    def _fail_in_hook(self, failed: HookFailed, step: int, further: str | None = None) -> NoReturn:
        """Ends the run after a checkpoint of `step`, because of a hook; `further`: what to say where there is none."""
        self.checkpoints.wait()
        reason = f"{failed}, after step {step}"
        processes.from_first(lambda: self.folder.write_failure(step, reason))
        saved = f"The state is saved in {self.folder.path}; with the hook mended, the same call goes on"
        raise RunFailed(f"{reason}. {further or saved}") from (failed.__cause__ or failed)

    def _line(self, step: int, due: bool, metrics: Metrics, state: TrainState) -> Line:
        return self.records.line(step, due, metrics, state, stop=self.stop.asked())

    def _write(self, line: Line | None) -> str | None:
        """Writes a line; returns why the run cannot go on, if it cannot."""
        verdict = self.records.write(line)
        self.stop_agreed |= verdict.stop
        return verdict.problem

    def _stops(self) -> bool:
        """Whether a signal, the time, or a hook's `Pause` stops the run after this dispatch.

        Several processes stop together, though a signal may reach one: each line carries whether any of them was
        asked to, and all come to know it when they wait for its numbers anyway.
        """
        if self.paused is not None:  # what the hooks of the first process say, all know
            return True
        return self.stop_agreed if processes.several() else self.stop.asked()

    def _count_ranges(self, step: int, state: Any) -> None:
        """Dispatches the counting of the next step's ranges; they are fetched when the step is under way."""
        trainer, devices = self.trainer, self.trainer.devices
        state, batch = devices.get(state), devices.shard_rows(self.feed.batch(step))
        for name in trainer.due(step):
            seen = trainer.state_seen(name)(state, batch)
            self.records.add_ranges(step + 1, trainer.step_ranges(name)(seen, batch), state, name)

    def _finish(self, step: int, state: TrainState, because: str | None) -> dict[str, Any]:
        """The last evaluation, on the test set, and the summary. `because`: why a hook ended the run."""
        experiment, records = self.trainer.experiment, self.records
        self.checkpoints.wait()
        splits = self.trainer.splits
        test = records.evaluate(step, state, "test") if "test" in splits else {}
        if "test" in splits:
            _, failed = self._call_hooks(Evaluated(step, state, "test", test, self.folder.path))
            if failed:
                self._fail_in_hook(failed, step)
        counts = records.counts(step, state)
        if not is_pruned(counts, experiment):
            skipped = counts["skipped_steps"]
            why = f"the run was stopped after step {step}" if because else f"{skipped} of the steps were skipped"
            self.log(f"pruned to {counts['sparsity']:.2%}, not {experiment.pruning.share:.2%}, since {why}")
        best_step, best = records.best()
        best_on_test = self._test_of_best(best_step, step, state, test) if "test" in splits else None
        summary = {
            "steps": step,
            **counts,
            **records.spent(step),
            "test": test,
            "best": {"step": best_step, self.trainer.monitor.name: best, "test": best_on_test}
            if "validation" in splits
            else {},
            "stopped_early": step < self.trainer.steps,
            **({"stopped_because": because} if because else {}),
            "wall_seconds": records.seconds(),
            **self.trainer.parameter_counts,
            "precision": str(experiment.policy),
            "policy": [row._asdict() for row in self.trainer.explain()],
        }
        processes.from_first(lambda: self.folder.write_summary(summary))
        return summary

    def _test_of_best(self, best: int, step: int, state: TrainState, test: dict[str, float]) -> dict[str, float] | None:
        """The metrics of the best weights on the test split; None if there is no intact checkpoint of them."""
        if best == step:
            return test
        if best not in processes.from_first(self.checkpoints.steps):
            return None
        template = {"state": state, "metrics": self.trainer.no_metrics}
        found, why = processes.try_in_each(lambda: self.checkpoints.restore(template, step=best, warn=self.log))
        if why is not None:
            self.log(f"the best weights, of step {best}, are not measured on the test split: {why}")
            return None
        placed = self.trainer.devices.get(self.trainer.devices.put_state(found[1]["state"]))
        metrics = self.records.measure(placed, "test")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.log(f"the best weights, of step {best}, on the test split: {shown}")
        return metrics

    def _fail(self, problem: str, step: int, state: TrainState) -> NoReturn:
        """Ends the run after a checkpoint of `step`, and says why."""
        self.checkpoints.wait()
        reason = f"{problem}; {culprit}" if (culprit := self._culprit(step, state)) else problem
        processes.from_first(lambda: self.folder.write_failure(step, reason))
        how = how_to_blame(self.folder.path, self.folder.read_config())
        more = f"; what made it, and what would have prevented it: {how}" if how else ""
        raise RunFailed(f"{reason}. The state is saved in {self.folder.path}{more}")

    def _culprit(self, step: int, state: TrainState) -> str | None:
        """What was not finite in the last step, of each objective that was skipped in it; None if none was.

        None for a private step, too: it left out the rows that were not finite.
        """
        if self.trainer.is_private:
            return None
        due = self.trainer.due(step - 1)
        skipped = [name for name in due if self._was_skipped(state, name)]
        found = []
        for name in skipped:
            # Whose changes it did not see, though they are in the state by now.
            changed = due if self.trainer.order == "at_once" else due[due.index(name) :]
            found.append(self._repeated(step, state, name, [each for each in changed if each not in skipped]))
        return "; ".join(found) or None

    def _was_skipped(self, state: TrainState, name: str | None) -> bool:
        opt_state = state.opt_state if name is None else state.opt_state[name]
        return find_state(opt_state) is not None and bool(consecutive_skips(opt_state))

    def _repeated(self, step: int, state: TrainState, name: str | None, changed: list[str | None]) -> str:
        """What was not finite in the last step of an objective, which is repeated.

        A skipped step left the state as it was, but for the loss scale; others may have `changed` it in the same step.
        """
        scaling = find_state(state.opt_state if name is None else state.opt_state[name])
        assert scaling is not None
        devices, batch, scale = self.trainer.devices, self.feed.batch(step - 1), scaling.skipped_scale
        if devices.several_processes:
            batch = devices.whole(batch)
        key = jax.random.fold_in(state.key, step - 1)
        key = key if name is None else objective_key(key, name)
        grads, measured, _ = self.trainer.gradients(name)(state.params, state.model_state, scale, batch, key)
        found = name_nonfinite(grads, measured.loss)
        of = "" if name is None else f" of {name}"
        after = f", with the parameters that {', '.join(map(str, changed))} left in it" if changed else ""
        if found is None:
            return f"step {step}{of}, repeated at loss scale {float(scale):g} on one device{after}, is finite"
        return f"not finite in step {step}{of}, at loss scale {float(scale):g}{after}: {found}"
