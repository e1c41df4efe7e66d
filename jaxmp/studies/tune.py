"""`tune`: many runs with one question, which values of some fields of an experiment are the best.

Every trial is one run, or one for each of several seeds, in ordinary run folders: those of `jaxmp train` with the
trial's values, to the bit. The same call in other processes and on other machines works on the same study; one that
was killed is gone on with by the next. A loss that overflows or diverges is a result, the worst one, with its reason.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmp.distributed.signals import stop_signals
from jaxmp.errors import InputError, RunFailed, local_path, nearest, whole_number
from jaxmp.experiment.config_file import ConfigFile, available
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.reachable import made_by
from jaxmp.reports import study_report as pages
from jaxmp.reports.page import command, require_html, write
from jaxmp.runs.checks import check
from jaxmp.runs.fit import fit
from jaxmp.runs.folder import FolderInUse, RunFolder
from jaxmp.runs.going_on import PLACE, refuse_other_code
from jaxmp.runs.hooks import Evaluated, Hook, Pause, StepInfo
from jaxmp.runs.provenance import provenance
from jaxmp.runs.records import is_pruned
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.writers import escaped_output
from jaxmp.studies.outcome import recorded_failure, require_all_steps
from jaxmp.studies.seeds_together import NotTogether, Place, SeedsTogether, require_together
from jaxmp.studies.tune_compiled import shared_compiles
from jaxmp.studies.tune_space import Space, Subject, spelled
from jaxmp.studies.tune_study import (
    PRUNERS,
    SAMPLERS,
    WILCOXON_SEEDS,
    Definition,
    StudyFolder,
    TrialQueue,
    open_study,
    require_optuna,
    study_to_json,
)
from jaxmp.training.metrics import specs_to_json

TRIALS = 40
"""trials of a study, unless it is a grid, which has its points"""
CLEAR_EVERY = 20
"""trials after which a worker forgets what it compiled: 15 to 20 MiB each of `digits_mlp`"""
NOT_ALLOWED = (ArithmeticError, AssertionError, LookupError, NotImplementedError, TypeError, ValueError)
"""what a model or a task raises for values that it cannot be made or traced with; InputError is among them"""


class Tuning(dict[str, Any]):
    """A study as JSON. `print` shows its table, a notebook its table and figures, `save` writes its page.

    The `importance` of each field is computed when it is first asked for.
    """

    _storage: str | None = None

    def __str__(self) -> str:
        return pages.text(self)

    def __repr__(self) -> str:
        return f"<study of {self['definition']['config']}: {len(self['trials'])} trials>"

    def _repr_html_(self) -> str:
        """Shows the first table and figures of the page in a notebook."""
        return pages.cell(self)

    @classmethod
    def read(cls, folder: StudyFolder, storage: str | None = None) -> Tuning:
        """The study of a folder; for `storage`, see `study_to_json`."""
        found = cls(study_to_json(folder, storage, importance=False))
        found._storage = storage
        return found

    def __missing__(self, key: str) -> Any:
        if key != "importance":
            raise KeyError(key)
        whole = study_to_json(StudyFolder(Path(self["folder"])), self._storage)
        return self.setdefault(key, whole[key])

    @property
    def best(self) -> dict[str, Any] | None:
        """The best of the trials that have all seeds: its `params`, `value`, `seeds` and `runs`; None if none has."""
        return pages.best_of(self)

    def save(self, path: str | Path) -> None:
        """Writes the page, and the JSON beside it. Raises InputError if a file cannot be written, or ends in .json."""
        output = Path(path).expanduser()
        require_html("save", output)
        _ = self["importance"]
        write(output.with_suffix(".json"), json.dumps(self, indent=1, allow_nan=False) + "\n")
        pages.page(self).write(output)


def tune(
    subject: Experiment | ConfigFile,
    space: Sequence[str] | Mapping[str, Any],
    *,
    trials: int | None = None,
    seeds: int = 1,
    metric: str | None = None,
    sampler: str = "tpe",
    pruner: str = "none",
    seeds_together: bool = False,
    study: str = "tune",
    storage: str | None = None,
    heartbeat: float | None = None,
    name: str = "experiment",
    overrides: Sequence[str] = (),
    workdir: str = "runs",
    ready: Callable[[], None] = lambda: None,
    log: Callable[[str], None] = print,
) -> Tuning | None:
    """Trains trials of an experiment until none is left to begin, and returns the study.

    The space, the metric and the storage are checked before the first trial. Trials that other workers train are not
    waited for. By the same call, a study that was stopped goes on, and one with a larger `trials` gets more.

    Args:
      subject: the experiment to vary, or a config file.
      space: which fields to vary: `{"optimizer.learning_rate": "log:1e-4:1e-1", "data.batch_size": (32, 64)}`, or the
        texts of the command line; see `jaxmp.studies.tune_space`.
      trials: number of trials of all workers together; by default 40, and of a grid all its points.
      seeds: runs of each trial, from the experiment's seed on; the trial's value is their mean.
      metric: what is made best on the validation split, where each run counts by its best evaluation; by default the
        metric that the experiment monitors.
      sampler: `tpe` (Bergstra et al. 2011), `random`, `cmaes` (at least two ranges), or `grid` (lists only).
      pruner: `none`; `median` and `hyperband` (Li et al. 2018) compare the curve of a trial's first seed with that of
        others; `wilcoxon` compares trials over paired seeds, of which it wants 5 or more.
      seeds_together: train the seeds of a trial at once, by one compiled program with an axis of seeds; see
        `jaxmp.studies.seeds_together`. The bits of a run differ from those of a run that is trained alone.
      study: its name, and the folder in `workdir/NAME` that it is kept in.
      storage: where the trials are kept, by default in a journal in that folder: another journal file, or the URL of
        a database.
      heartbeat: seconds between two signs of life in a database, for machines that share one and no locks.
      name: of the experiment, as `jaxmp.fit` takes it; a config file has its own.
      overrides: for a config file, further arguments of `jaxmp train` for all runs.
      workdir: folder of all runs.
      ready: called when everything has been checked, before the first trial.
      log: takes each message to the user.

    Returns:
      The study, a dict for JSON that prints as a table; None if a signal stopped it, after saving the run.

    Raises:
      InputError: the space, an option, the storage or the experiment's data cannot be used, the study in that folder
        asks something else, or the extra `tune` is not installed.
      RunFailed: the database was lost on the way.
    """
    of = Subject(subject, subject.name if isinstance(subject, ConfigFile) else name, tuple(overrides))
    if not isinstance(subject, Experiment | ConfigFile):
        raise InputError(f"tune: {subject!r:.60}: expected an Experiment")
    if overrides and isinstance(subject, Experiment):
        raise InputError("tune: overrides are those of a config file; expected dataclasses.replace(experiment, ...)")
    _require_one_of("--sampler", sampler, SAMPLERS)
    _require_one_of("--pruner", pruner, PRUNERS)
    seeds = whole_number("--seeds", seeds, 1)
    require_optuna(sampler)
    parsed = Space.parse(space, of)
    points = parsed.points() if sampler == "grid" else None
    if sampler == "grid" and trials is not None:
        raise InputError(f"--trials {trials}: a grid has its {len(points or ())} points; expected no --trials")
    if sampler == "cmaes" and len(parsed.ranges) < 2:
        raise InputError(
            f"--sampler cmaes: varies ranges, of which there are {len(parsed.ranges)}; expected two or more"
        )
    if pruner == "wilcoxon" and seeds < WILCOXON_SEEDS:
        raise InputError(
            f"--pruner wilcoxon: with --seeds {seeds} it can end no trial early; expected {WILCOXON_SEEDS} or more"
        )
    if seeds_together and seeds == 1:
        raise InputError("--seeds-together: with --seeds 1 there is nothing to run together; expected 2 or more")
    if seeds_together and pruner == "wilcoxon":
        raise InputError(
            "--seeds-together: --pruner wilcoxon ends a trial after some of its seeds, and all are trained at once; "
            "expected median, hyperband or none"
        )
    trainer = Trainer(of.base)
    check(trainer)
    if seeds_together:
        require_together(trainer)
    chosen, direction = _metric(trainer, metric)
    definition = Definition(
        config=of.name,
        experiment=of.base.hash,
        seed=of.base.seed,
        overrides=list(overrides),
        space=parsed.to_json(),
        trials=len(points) if points is not None else whole_number("--trials", TRIALS if trials is None else trials, 1),
        seeds=seeds,
        metric=chosen,
        direction=direction,
        sampler=sampler,
        pruner=pruner,
        seeds_together=bool(seeds_together),
    )
    if not study or Path(study).name != study:
        raise InputError(f"--study {study!r}: expected a name for its folder, such as tune")
    folder = StudyFolder(local_path("workdir", workdir) / of.name / study)
    folder.refuse_what_is_no_study()
    program = made_by(of.base)
    if StudyFolder.is_one(folder.path):
        _refuse_other_code(folder, program, log)
    more = {
        "metrics": specs_to_json(trainer.metric_specs),
        "workdir": workdir,
        "source": _argument(subject) if isinstance(subject, ConfigFile) else None,
        "command": command(),
        "made_by": program,
        **{key: value for key, value in provenance(patch=False).items() if key != "command"},
    }
    queue = open_study(folder, definition, points, storage=storage, heartbeat=heartbeat, more=more, log=log)
    ready()
    from optuna.exceptions import StorageInternalError

    try:
        with shared_compiles(folder.id, queue.finished):
            if not _Worker(of, parsed, queue, workdir, log).work():
                return None
        return Tuning.read(folder, storage)
    except StorageInternalError as error:
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        raise RunFailed(f"the storage of {folder.path} was lost ({why}); the same command goes on") from error
    finally:
        queue.close()


def _refuse_other_code(folder: StudyFolder, program: dict[str, Any], log: Callable[[str], None]) -> None:
    """Raises InputError if the study began with other code: its trials would not be of one question."""
    try:
        refuse_other_code(RunFolder(folder.path), folder.read(), program, log)
    except InputError as error:
        raise InputError(
            f"{str(error).partition(';')[0]}; take back the change, or --study NAME begins a study of its own"
        ) from None


def _argument(config: ConfigFile) -> str:
    """What names a config file on the command line: its bare name, where that finds this file."""
    named = available().get(config.name)
    return config.name if named is not None and named.resolve() == Path(config.file) else config.file


def _require_one_of(option: str, value: str, names: Sequence[str]) -> None:
    if value not in names:
        raise InputError(f"{option} {value}: expected one of {', '.join(names)}{nearest(value, names)}")


def _metric(trainer: Trainer, metric: str | None) -> tuple[str, str]:
    """The metric that is made best, and its direction. Raises InputError if no validation split measures it."""
    specs = trainer.metric_specs
    if "validation" not in trainer.splits:
        raise InputError("tune: this data has no validation split, and a study never chooses by the test split")
    if metric is None:
        return trainer.monitor.name, trainer.monitor.best
    if metric not in specs:
        raise InputError(f"--metric {metric}: expected one of {', '.join(specs)}{nearest(metric, specs)}")
    best = specs[metric].best
    if best is None:
        raise InputError(f"--metric {metric}: it has no better direction; expected another")
    return metric, best


class _Failure(NamedTuple):
    """A run that diverged, or did not fit into memory."""

    reason: str


class _SeedRun(NamedTuple):
    """The run of one seed of a trial."""

    place: int
    """which of the seeds, from 0"""
    experiment: Experiment
    arguments: list[str]
    """of `jaxmp train`"""
    folder: RunFolder


class _Stopped(Exception):
    """A signal stopped the run, which is saved."""


class _Pruned(Exception):
    """The pruner ended the run, which is saved."""


class _Worker:
    """Takes trials from a study, and trains them."""

    def __init__(self, subject: Subject, space: Space, queue: TrialQueue, workdir: str, log: Callable[[str], None]):
        self.subject, self.space, self.queue, self.workdir, self.log = subject, space, queue, workdir, log
        self.definition = queue.definition
        self._trained = 0
        self.worst = math.inf if self.definition.direction == "min" else -math.inf

    def work(self) -> bool:
        """Trains until no trial waits, and none is a dead worker's. Returns False if a signal stopped it."""
        from optuna.exceptions import UpdateFinishedTrialError

        with stop_signals() as stopped:  # `fit` has its own, and saves a run that a signal reaches
            while not stopped():
                with self.queue.take() as taken:
                    if taken is None:
                        return True
                    try:
                        self._train(taken.trial, taken.again, stopped)
                    except _Stopped:
                        break
                    except UpdateFinishedTrialError:  # without a sign of life for too long, it was given to another
                        number = taken.trial.user_attrs.get("point", taken.trial.number) + 1
                        self.log(f"trial {number}: another worker took it over; its run is kept")
            self.log("stopped, and the run is saved; the same command goes on")
        return False

    def _train(self, trial: Any, again: bool, stopped: Callable[[], bool]) -> None:
        """Trains the runs of a trial, and tells the study what came out."""
        from optuna.trial import TrialState

        drawn = self.space.suggest(trial)
        where = f"[trial {trial.user_attrs.get('point', trial.number) + 1}/{self.definition.trials}]"
        said = ", ".join(f"{spelled(path)} {_shown(value)}" for path, value in drawn.items())
        if again:
            self.log(f"{where} {said}: goes on where another worker left it")
        values: dict[int, float] = {}
        state, value, reason = TrialState.COMPLETE, self.worst, None
        train = self._together if self.definition.seeds_together else self._one_by_one
        try:
            for i, outcome in enumerate(train(trial, drawn, again, stopped)):
                seed = self.definition.seed + i
                if isinstance(outcome, _Failure):
                    value, reason = self.worst, f"seed {seed}: {outcome.reason}"
                    break
                values[seed] = outcome
                value = statistics.fmean(values.values())
                if self.definition.pruner == "wilcoxon":
                    _report(trial, i, outcome)
                    if i + 1 < self.definition.seeds and trial.should_prune():
                        reason = f"worse than the best trial on the same {i + 1} seeds (Wilcoxon)"
                        break
        except _Pruned as pruned:
            state, reason = TrialState.PRUNED, str(pruned)
        except _Refused as refused:
            state, reason = TrialState.PRUNED, str(refused)
        trial.set_user_attr("seeds", {str(seed): of for seed, of in values.items()})
        if reason is not None:
            trial.set_user_attr("reason", reason)
        told = None if state == TrialState.PRUNED else value
        self.queue.study.tell(trial, told, state=state, skip_if_finished=True)
        self._trained += 1
        if self._trained % CLEAR_EVERY == 0:
            jax.clear_caches()
        result = f"{self.definition.metric} {value:.6g}" if told is not None and math.isfinite(value) else ""
        self.log(f"{where} {said}: {'; '.join(filter(None, (result, reason)))}")

    def _one_by_one(
        self, trial: Any, drawn: Mapping[str, Any], again: bool, stopped: Callable[[], bool]
    ) -> Iterator[float | _Failure]:
        """Trains the run of each seed when what came out is asked for."""
        for index in range(self.definition.seeds):
            yield self._fit(trial, self._new_run(trial, drawn, index), again, stopped, None)

    def _together(
        self, trial: Any, drawn: Mapping[str, Any], again: bool, stopped: Callable[[], bool]
    ) -> list[float | _Failure]:
        """Trains the runs of all seeds at once. A run that fails leaves the others alone; any other end ends all."""
        runs = [self._new_run(trial, drawn, index) for index in range(self.definition.seeds)]
        group = SeedsTogether(len(runs))
        with escaped_output():  # once: a thread that ends would take it away from the others
            found = group.run(lambda place: self._fit(trial, runs[place.index], again, stopped, place))
        raised = [each for each in found if isinstance(each, BaseException)]
        # What is no result before what is one, and that before the runs that were stopped because of it.
        raised.sort(key=lambda error: (isinstance(error, _Stopped), isinstance(error, _Pruned | _Refused)))
        if raised:
            raise raised[0]
        return found

    def _new_run(self, trial: Any, drawn: Mapping[str, Any], index: int) -> _SeedRun:
        """The run of one seed of a trial, which the study is told of. Raises _Refused if no experiment allows it."""
        try:
            experiment, arguments = self.space.point(self.subject, drawn, self.definition.seed + index)
        except InputError as error:
            raise _Refused(f"no experiment allows this: {error}") from None
        folder = RunFolder.of(experiment, self.workdir, self.subject.name)
        if index == 0:
            trial.set_user_attr("arguments", arguments)
        runs = trial.user_attrs.get("runs", [])
        if str(folder.path) not in runs:
            trial.set_user_attr("runs", [*runs, str(folder.path)])
        return _SeedRun(index, experiment, arguments, folder)

    def _fit(
        self, trial: Any, run: _SeedRun, again: bool, stopped: Callable[[], bool], place: Place | None
    ) -> float | _Failure:
        """Trains one run of a trial. Returns its best value of the metric on the validation split.

        Of a run with pruning, that of weights that are pruned as far as it prunes them, and of the last.

        Raises:
          _Stopped: a signal stopped it, or came before it began.
          InputError: as `fit` does once the run has begun; or a hook ended it early.
        """
        index, experiment, arguments, folder = run
        watches, paused = self.definition.pruner in ("median", "hyperband") and index == 0, False
        trouble: Exception | None = None
        if watches and again and trial.should_prune():  # as a worker found that did not live to say it
            raise _Pruned(f"worse than other trials ({self.definition.pruner})")

        def watch(evaluated: Evaluated) -> Pause | None:
            nonlocal paused, trouble
            if evaluated.split != "validation" or not watches:
                return None
            steps = RunFolder(evaluated.path).read_config()["steps"]
            try:
                _report(trial, _percent(evaluated.step, steps), evaluated.metrics.get(self.definition.metric))
                paused = trial.should_prune()
            except Exception as error:  # of the storage: no fault of the run, as an error of a hook would be
                trouble = error
            return Pause("worse than other trials") if paused or trouble else None

        def stop(info: StepInfo) -> Pause | None:  # a thread sees no signal by itself
            return Pause("the worker stops") if stopped() else None

        self._say_otherwise_begun(folder, place)
        hooks: tuple[Hook, ...] = (watch,) if place is None else (watch, stop, place.end)
        while True:
            if stopped() or (place is not None and place.has_ended):
                raise _Stopped
            if (failed := recorded_failure(folder, experiment, _silent)) is not None:
                return _Failure(failed)
            try:
                fitted = fit(
                    experiment,
                    workdir=self.workdir,
                    name=self.subject.name,
                    origin=self.subject.origin(arguments),
                    hooks=hooks,
                    shared=place,
                    progress="none",
                    log=_silent,
                )
            except FolderInUse:  # `jaxmp train`, or a worker whose trial has the same values
                if place is not None:
                    place.leave()  # that worker may wait for the folder of another seed of this trial
                if not stopped():
                    time.sleep(1.0)
                continue
            except RunFailed as error:
                return _Failure(folder.read_failure() or str(error))
            except NotTogether as error:
                raise _Refused(str(error)) from None
            except NOT_ALLOWED as error:
                if not folder.is_unused():  # it was allowed, and something else is wrong
                    raise
                kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
                raise _Refused(f"no experiment allows this: {kind}{error}") from None
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                shared = f", with {self.definition.seeds} seeds in one program" if place is not None else ""
                return _Failure(f"out of memory{shared}: {str(error).partition(chr(10))[0]}")
            break
        if trouble is not None:
            raise trouble
        require_all_steps(fitted)
        lines = [line for line in folder.read_lines() if line["split"] == "validation"]
        if watches:  # of a run that had ended before, which calls no hook
            steps = folder.read_config()["steps"]
            for line in lines:
                _report(trial, _percent(line["step"], steps), line.get(self.definition.metric))
        if fitted.stopped:
            if paused:
                raise _Pruned(f"worse than other trials after {lines[-1]['step']} steps ({self.definition.pruner})")
            raise _Stopped
        last = lines[-1]["step"] if lines else 0
        counted = [line for line in lines if is_pruned(line, experiment) or line["step"] == last]
        found = [line.get(self.definition.metric) for line in counted]
        values = [value for value in found if value is not None and math.isfinite(value)]
        if not values:
            return _Failure(f"no evaluation has a finite {self.definition.metric}")
        return float(min(values) if self.definition.direction == "min" else max(values))

    def _say_otherwise_begun(self, folder: RunFolder, place: Place | None) -> None:
        """Says that a run, of another study or of `jaxmp train`, has other bits than this study would give it."""
        if folder.is_unused():
            return
        before = folder.read_config().get(PLACE)
        if before != (None if place is None else place.text):
            how = f"as {before} seeds in one program" if before else "alone"
            self.log(f"{folder.path}: this run was begun {how}; its last digits are those of that")


class _Refused(Exception):
    """A combination of values that no experiment allows."""


def _percent(step: int, steps: int) -> int:
    return round(100 * step / steps)


def _report(trial: Any, step: int, value: float | None) -> None:
    """Reports an intermediate value, once; one that is not finite says nothing to a pruner."""
    reported = trial.storage.get_trial(trial._trial_id).intermediate_values
    if value is not None and math.isfinite(value) and step not in reported:
        trial.report(value, step)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _silent(message: str) -> None:
    """The log of a trial's own run."""
