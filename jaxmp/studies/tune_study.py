"""`StudyFolder`: the files of a study of many trials, and how workers share its trials.

    study.json       what the study asks: config, space, number of trials, seeds, metric, sampler, pruner, storage
    journal.log      the trials, by Optuna; or a database holds them
    lock             locked while a worker makes the study or takes a trial
    locks/<trial>    locked by the worker that trains this trial

A trial that the storage calls running, and whose lock is free, is a dead worker's: the next worker takes the lock, and
goes on with the same trial in the same run folders. Nothing here imports JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import importlib.util
import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxmp.errors import InputError, install, local_path
from jaxmp.text_table import without_nan, without_password

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "random", "grid", "cmaes")
"""how the values of the next trial are chosen"""
PRUNERS = ("none", "median", "hyperband", "wilcoxon")
"""how a trial is ended early"""
WILCOXON_P = 0.1
"""one-sided p below which a trial is worse than the best on the seeds that both have"""
WILCOXON_SEEDS = 5
"""fewest seeds of a trial that the Wilcoxon pruner can end early: of 4 pairs, all worse, p is 1/16; of 3 it is 1/8"""
REACH_SECONDS = 30.0
"""seconds for which a storage that does not answer is tried"""
UNSIGNED_SECONDS = 60.0
"""seconds after which a running trial that no worker signed is a dead worker's: signing follows taking at once"""
MAKER_SECONDS = 2.0
"""seconds without a new trial after which another worker makes them no more"""
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""packages of the drivers of databases that are named otherwise than what they install"""
JOURNAL_KEYS = {"op_code", "worker_id"}
"""keys that every line of a journal of Optuna has"""
JOURNAL_LINE = 2**16
"""most bytes of a journal's first line, which makes its first study"""
FIRST_PERCENT = 10
"""percent of a run that the hyperband pruner gives to every trial"""

Log = Callable[[str], None]


class Definition(NamedTuple):
    """What a study asks. All of it but `trials` has to stay the same while the study goes on."""

    config: str
    """name of the experiment"""
    experiment: str
    """hash of the experiment before anything is varied"""
    seed: int
    """first seed of every trial, and of the sampler"""
    overrides: list[str]
    """arguments of `jaxmp train` for all runs"""
    space: dict[str, str]
    """the range or list of each leaf"""
    trials: int
    """number of trials"""
    seeds: int
    """runs of each trial"""
    metric: str
    """what is made best, on the validation split"""
    direction: str
    """min or max"""
    sampler: str
    pruner: str
    seeds_together: bool = False
    """whether one program trains the seeds of a trial, which changes the bits of every run"""

    def differences(self, other: Definition) -> list[str]:
        """In what another definition differs, a text each."""
        found = []
        for name, was in self._asdict().items():
            now = getattr(other, name)
            if name == "space" and was != now:
                for leaf in dict.fromkeys([*was, *now]):
                    if was.get(leaf) != now.get(leaf):
                        found.append(
                            f"space {leaf} is {now.get(leaf, 'not varied')} (was {was.get(leaf, 'not varied')})"
                        )
                if list(was) != list(now) and set(was) == set(now):
                    found.append(f"the leaves are in the order {', '.join(now)} (was {', '.join(was)})")
            elif name != "trials" and was != now:
                found.append(f"{name} is {_text(now)} (was {_text(was)})")
        return found


class Taken(NamedTuple):
    """A trial that this worker trains."""

    trial: optuna.Trial
    again: bool
    """whether another worker had begun it"""


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study."""

    path: Path

    @property
    def _file(self) -> Path:
        return self.path / "study.json"

    @classmethod
    def is_one(cls, path: Path) -> bool:
        """Whether `path` is the folder of a study."""
        return (path / "study.json").is_file()

    def refuse_what_is_no_study(self) -> None:
        """Raises InputError if there is something else in the folder."""
        own = ("lock", "locks", "journal.log", "journal.log.flock")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; expected a folder, or none yet: choose another --study")
        if not self.path.exists() or StudyFolder.is_one(self.path):
            return
        if any(path.name not in own and path.suffix != ".partial" for path in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and no study; choose another --study, or move it away")

    def create(self) -> None:
        """Makes the folder, and that of the locks."""
        (self.path / "locks").mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        """The content of study.json. Raises InputError if it is broken."""
        try:
            content = json.loads(self._file.read_text())
            content["definition"] = Definition(**content["definition"])
        except FileNotFoundError:
            raise InputError(f"{self.path} is no study: expected a study.json in it, as `jaxmp tune` writes") from None
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self._file} was not written by this version of jaxmp ({error})") from error
        return content

    def write(self, content: Mapping[str, Any]) -> None:
        """Writes study.json, whole or not at all."""
        definition = content["definition"]
        text = json.dumps({**content, "definition": definition._asdict()}, indent=1) + "\n"
        temporary = self._file.with_suffix(f".{os.getpid()}.partial")
        temporary.write_text(text)
        temporary.replace(self._file)

    @property
    def id(self) -> str:
        """What tells this folder from that of another machine: only workers with one folder share its locks."""
        return str(self.read()["id"])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context manager: no other worker makes the study or takes a trial."""
        with (self.path / "lock").open("w") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def trial_locked(self, number: int) -> Iterator[bool]:
        """Context manager that holds the lock of a trial. Yields whether it could be had."""
        with (self.path / "locks" / str(number)).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Where there are no locks, nobody can be seen to have this one.
                yield error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
            else:
                yield True


@dataclass
class TrialQueue:
    """The trials of a study, as workers take and end them."""

    folder: StudyFolder
    study: optuna.Study
    definition: Definition
    heartbeat: float | None = None
    """seconds between two signs of life in the database; None where the folder's locks say who lives"""
    log: Log = print
    _told: set[str] = dataclasses.field(default_factory=set)

    @contextlib.contextmanager
    def take(self) -> Iterator[Taken | None]:
        """Context manager that holds a trial to train, a dead worker's before one that waits; None if there is none."""
        import optuna
        from optuna.trial import TrialState

        with contextlib.ExitStack() as stack:
            if self.heartbeat is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that it is experimental
                    optuna.storages.fail_stale_trials(self.study)
            else:
                for frozen in self._trials(TrialState.RUNNING):
                    if not self._may_be_dead(frozen):
                        continue
                    lock = contextlib.ExitStack()
                    if lock.enter_context(self.folder.trial_locked(frozen.number)) and self._still_runs(frozen):
                        stack.push(lock)
                        yield Taken(self._opened(frozen._trial_id, frozen.number), again=True)
                        return
                    lock.close()
            yield self._ask(stack)

    def _ask(self, stack: contextlib.ExitStack) -> Taken | None:
        from optuna.storages._heartbeat import get_heartbeat_thread
        from optuna.trial import TrialState

        trial = None
        with self.folder.locked():
            while trial is None and (waiting := self._trials(TrialState.WAITING)):
                lock = contextlib.ExitStack()
                if self.heartbeat is None:
                    # Before it runs: or another worker would see it run without a lock.
                    lock.enter_context(self.folder.trial_locked(waiting[0].number))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that signs of life are given by Study.optimize: here, below
                    trial = self.study.ask()
                if trial.number == waiting[0].number:
                    stack.push(lock)
                    break
                lock.close()  # a worker with another folder was faster
                if trial.number not in {frozen.number for frozen in waiting}:  # ask() makes one where none waits
                    self.study.tell(trial, state=TrialState.FAIL)
                    trial = None
                elif self.heartbeat is None:
                    stack.enter_context(self.folder.trial_locked(trial.number))
            if trial is None:
                return None
            trial.set_user_attr("folder", self.folder.id)
        if self.heartbeat is not None:
            heart: Any = get_heartbeat_thread(trial._trial_id, self.study._storage)
            stack.enter_context(heart)
        self.study.sampler = make_sampler(self.definition, trial.number)
        return Taken(trial, again="failed_trial" in trial.storage.get_trial_system_attrs(trial._trial_id))

    def _opened(self, trial_id: int, number: int) -> optuna.Trial:
        import optuna

        self.study.sampler = make_sampler(self.definition, number)
        trial = optuna.Trial(self.study, trial_id)
        trial.set_user_attr("folder", self.folder.id)
        return trial

    def _trials(self, *states: Any) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _still_runs(self, frozen: Any) -> bool:
        return not self.study._storage.get_trial(frozen._trial_id).state.is_finished()

    def _may_be_dead(self, frozen: Any) -> bool:
        """Whether a running trial is one whose worker this folder's locks could show."""
        signed = frozen.user_attrs.get("folder")
        if signed is None:
            began = frozen.datetime_start or datetime.datetime.now()
            mine = self.definition_is_in_folder or (datetime.datetime.now() - began).total_seconds() > UNSIGNED_SECONDS
            return bool(mine)
        if signed != self.folder.id and signed not in self._told:
            self._told.add(signed)
            self.log(
                "workers with another folder take part, whose locks this one does not see: a trial that one of them "
                "leaves behind is theirs to go on with, or give --heartbeat 60 to all workers"
            )
        return bool(signed == self.folder.id)

    @property
    def definition_is_in_folder(self) -> bool:
        """Whether the trials are in the folder's own journal, which only workers with this folder see."""
        return self.folder.read()["storage"] is None

    def close(self) -> None:
        """Closes the connections to a database."""
        close_storage(self.study._storage)

    def finished(self) -> bool:
        """Whether no trial waits or runs."""
        return all(frozen.state.is_finished() for frozen in self.study.get_trials(deepcopy=False))


# Opening a study.


def require_optuna(sampler: str = "tpe") -> None:
    """Raises InputError if the packages of the extra `tune` are not installed."""
    for package in ("optuna", *(("cmaes",) if sampler == "cmaes" else ())):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"jaxmp tune needs {package}, which is not installed: {install('tune')}")


def open_storage(folder: StudyFolder, url: str | None, heartbeat: float | None = None) -> Any:
    """The storage of a study's trials: the folder's journal, the journal file `url`, or a database.

    Args:
      folder: of the study.
      url: None; the path of a journal file; or a database, `postgresql+psycopg://user@host/name`, `sqlite:///file`.
      heartbeat: seconds between two signs of life of a worker, for a database.

    Raises: InputError if it cannot be reached within 30 seconds, has no driver, or is a file but no journal.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if heartbeat is not None and not 1 <= heartbeat < math.inf:
        raise InputError(f"--heartbeat {heartbeat:g}: expected 1 second or more")
    if url is None or "://" not in url:
        if heartbeat is not None:
            raise InputError(f"--heartbeat {heartbeat:g}: only with a database; a journal file has locks instead")
        path = folder.path / "journal.log" if url is None else local_path("--storage", url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if url is not None:  # that in the study's folder is its own, whatever a kill left of it
                _refuse_no_journal(path)
            return optuna.storages.JournalStorage(_journal(path))
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"--storage {path}: expected a journal file of Optuna ({error})") from error
    return _database(url, heartbeat)


def close_storage(storage: Any) -> None:
    """Closes the connections of a storage, if it is a database."""
    storage.remove_session()
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)  # Optuna puts a cache around a database
    if engine is not None:
        engine.dispose()


def _refuse_no_journal(path: Path) -> None:
    """Raises InputError if the file is there, not empty and no journal: opening it cuts off a line without its end.

    A first line without its end is nobody's study: it is not cut off, since the file may be something else.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        first = file.readline(JOURNAL_LINE)
    if not first:
        return
    if not first.endswith(b"\n") and len(first) < JOURNAL_LINE:  # a longer one is no journal's
        raise InputError(
            f"--storage {path}: is there and no journal of Optuna: its first line has no end; expected another file; "
            "or delete this one, if a study was being made in it when the machine went down"
        )
    try:
        line = json.loads(first)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not line.keys() >= JOURNAL_KEYS:
        raise InputError(f"--storage {path}: is there and no journal of Optuna; expected another file")


def _journal(path: Path) -> Any:
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import BaseJournalFileLock

    class Flock(BaseJournalFileLock):
        """A lock that goes with its process. (Optuna's stay after a kill, and hold up all others for 30 seconds.)"""

        def __init__(self) -> None:
            self._files: list[Any] = []

        def acquire(self) -> bool:
            file = path.with_name(f"{path.name}.flock").open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
            self._files.append(file)
            drop_torn_line(path)
            return True

        def release(self) -> None:
            self._files.pop().close()

    try:
        with path.with_name(f"{path.name}.flock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return JournalFileBackend(str(path))  # no locks there: Optuna's make do with links
    return JournalFileBackend(str(path), lock_obj=Flock())


def drop_torn_line(path: Path) -> None:
    """Cuts off the end of a journal that a kill left without its line break: the next line would be joined to it."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        text = path.read_bytes()
        file.truncate(text.rfind(b"\n") + 1)


def _database(url: str, heartbeat: float | None) -> Any:
    import optuna
    import sqlalchemy.exc

    shown, end = without_password(url), time.monotonic() + REACH_SECONDS
    how: dict[str, Any] = {}
    if heartbeat is not None:
        callback = optuna.storages.RetryHeartbeatStaleTrialCallback()
        how = {"heartbeat_interval": max(1, int(heartbeat)), "grace_period": max(2, int(4 * heartbeat))}
        how["heartbeat_stale_trial_callback"] = callback
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that heartbeats are experimental
                return optuna.storages.RDBStorage(url, **how)
        except ImportError as error:
            module = getattr(error.__cause__ or error, "name", None) or str(error)
            raise InputError(
                f"--storage {shown}: its driver {module} is not installed: pip install {DRIVERS.get(module, module)}"
            ) from None
        except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError, ValueError) as error:
            raise InputError(
                f"--storage {shown}: expected a journal file, or a URL such as postgresql+psycopg://user@host/name "
                f"({_first_line(error)})"
            ) from None
        except sqlalchemy.exc.SQLAlchemyError as error:
            if time.monotonic() > end:
                why = _first_line(error)
                raise InputError(f"--storage {shown}: tried for {REACH_SECONDS:g} s and not reached ({why})") from None
            time.sleep(min(1.0, REACH_SECONDS / 10))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def open_study(
    folder: StudyFolder,
    definition: Definition,
    points: Sequence[Mapping[str, str]] | None,
    *,
    storage: str | None = None,
    heartbeat: float | None = None,
    more: Mapping[str, Any] | None = None,
    log: Log = print,
) -> TrialQueue:
    """Makes a study with all its trials waiting, or opens the one that is there.

    Args:
      folder: of the study.
      definition: what it asks.
      points: the points of a grid; None where a sampler chooses.
      storage: see `open_storage`.
      heartbeat: see `open_storage`.
      more: what study.json keeps beside the definition.
      log: takes each message to the user.

    Raises: InputError if the study that is there asks something else, with what differs.
    """
    import optuna

    folder.create()
    with folder.locked():
        content = folder.read() if StudyFolder.is_one(folder.path) else None
        if content is not None:
            _refuse_other(folder.path, content["definition"], definition)
            if content["storage"] != _kept(storage):
                where = content["storage"] or "its own journal"
                raise InputError(
                    f"{folder.path}: its trials are in {where}; expected the same --storage, or another --study"
                )
        opened = open_storage(folder, storage, heartbeat)
        name = f"{definition.config}/{folder.path.name}"
        direction: Any = "minimize" if definition.direction == "min" else "maximize"
        try:
            study = optuna.create_study(storage=opened, study_name=name, direction=direction)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=opened, study_name=name)
            if storage is not None and content is None:
                _wait_for_maker(study, definition)
        study.sampler, study.pruner = make_sampler(definition, 0), make_pruner(definition)
        kept = study.user_attrs.get("definition")
        if kept is not None:
            _refuse_other(folder.path, Definition(**kept), definition)
        there = max(content["definition"].trials if content else 0, kept["trials"] if kept else 0)
        if there > definition.trials:
            log(f"--trials {definition.trials}: the study has {there}, and goes on with all")
            definition = definition._replace(trials=there)
        if content is None or definition.trials > content["definition"].trials:
            fresh = {"id": uuid.uuid4().hex, "storage": _kept(storage), "study": name, **(more or {})}
            folder.write({**(content or fresh), "definition": definition})
        if kept is None or kept["trials"] < definition.trials:
            study.set_user_attr("definition", definition._asdict())
        _enqueue(study, definition, points)
    return TrialQueue(folder, study, definition, heartbeat, log)


def _wait_for_maker(study: optuna.Study, definition: Definition) -> None:
    """Waits while a worker with another folder, whose lock holds nobody up here, is making the trials."""
    seen = -1
    while seen < (there := len(study.get_trials(deepcopy=False))) < definition.trials:
        seen = there
        time.sleep(MAKER_SECONDS)


def _enqueue(study: optuna.Study, definition: Definition, points: Sequence[Mapping[str, str]] | None) -> None:
    """Makes those trials that are missing, by their number: a worker may have died in the middle of making them."""
    there = {trial.user_attrs.get("point") for trial in study.get_trials(deepcopy=False)}
    for i in range(definition.trials):
        if i not in there:
            study.enqueue_trial(dict(points[i]) if points is not None else {}, user_attrs={"point": i})


def _refuse_other(path: Path, was: Definition, now: Definition) -> None:
    if differences := was.differences(now):
        raise InputError(
            f"{path} is another study: {'; '.join(differences)}; expected the same, or --study NAME for one of its own"
        )


def _kept(storage: str | None) -> str | None:
    """The storage as study.json keeps it, without a password."""
    return None if storage is None else without_password(storage)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def make_sampler(definition: Definition, number: int) -> Any:
    """Optuna's sampler for the trial of that number. Its draws depend on no worker: it is seeded by the number."""
    import optuna

    seed = (definition.seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some of its arguments are experimental
        if definition.sampler == "tpe":
            # constant_liar: trials that run count as bad, so that two workers do not try the same.
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        if definition.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(definition: Definition) -> Any:
    """Optuna's pruner. The step of median and hyperband is a percentage of the run; that of wilcoxon a seed's index."""
    import optuna

    if definition.pruner == "median":
        return optuna.pruners.MedianPruner()
    if definition.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=FIRST_PERCENT, max_resource=100, reduction_factor=3)
    if definition.pruner == "wilcoxon":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            return optuna.pruners.WilcoxonPruner(p_threshold=WILCOXON_P)
    return optuna.pruners.NopPruner()


# Reading a study.


def study_to_json(folder: StudyFolder, storage: str | None = None, *, importance: bool = True) -> dict[str, Any]:
    """A study with all its trials, as JSON.

    Args:
      folder: of the study.
      storage: where its trials are, if that needs a password; by default what study.json says.
      importance: whether to add the importance of each field, for which Optuna imports scikit-learn.

    Raises: InputError if it is no study, or its storage cannot be reached.
    """
    import optuna

    content = folder.read()
    definition: Definition = content["definition"]
    opened = open_storage(folder, storage or content["storage"])
    try:
        study = optuna.load_study(study_name=content["study"], storage=opened)
        kept = [t for t in study.get_trials(deepcopy=False) if t.state != optuna.trial.TrialState.FAIL]
        more = {"importance": _importance(study, definition)} if importance else {}
    except KeyError:
        raise InputError(f"{folder.path}: its storage holds no study {content['study']}") from None
    finally:
        close_storage(opened)
    trials = sorted(map(_trial, kept), key=lambda trial: trial["number"])
    drawn = {path: of for trial in kept for path, of in trial.distributions.items()}
    best = _best(trials, definition)
    return without_nan(
        {
            **content,
            "definition": definition._asdict(),
            "folder": str(folder.path),
            "trials": trials,
            "best": best and best["number"],
            "choices": {path.replace("_", "-"): [*of.choices] for path, of in drawn.items() if hasattr(of, "choices")},
            **more,
        }
    )


def _trial(frozen: Any) -> dict[str, Any]:
    kept = frozen.user_attrs
    state = {"COMPLETE": "done"}.get(frozen.state.name, frozen.state.name.lower())
    value = frozen.value if frozen.state.name == "COMPLETE" else None
    if value is not None and not math.isfinite(value):
        state, value = "failed", None
    elif value is not None and "reason" in kept:  # over so many of its seeds it has a value
        state = "pruned"
    return {
        "number": kept.get("point", frozen.number),
        "state": state,
        "value": value,
        "params": frozen.params,
        "seeds": kept.get("seeds", {}),
        "runs": kept.get("runs", []),
        "arguments": kept.get("arguments", []),
        "reason": kept.get("reason"),
        "curve": sorted(frozen.intermediate_values.items()),
        "ended": frozen.datetime_complete and frozen.datetime_complete.isoformat(),
    }


def _best(trials: Sequence[dict[str, Any]], definition: Definition) -> dict[str, Any] | None:
    """The best trial among those that have all seeds; None if there is none."""
    whole = [t for t in trials if t["state"] == "done" and len(t["seeds"]) == definition.seeds]
    sign = 1 if definition.direction == "min" else -1
    return min(whole, key=lambda trial: (sign * trial["value"], trial["number"]), default=None)


def _importance(study: Any, definition: Definition) -> dict[str, float]:
    """How much of the spread of the value each leaf explains, by Optuna's PED-ANOVA; {} where trials are too few."""
    import optuna

    finite = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if math.isfinite(trial.value)
    ]
    if len(finite) < 4 or len({trial.value for trial in finite}) < 2 or not definition.space:
        return {}
    of_finite = optuna.create_study(direction=study.direction)
    of_finite.add_trials(finite)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(of_finite)
        except (ValueError, RuntimeError):  # all trials have one value of each leaf, say
            return {}
    return {name: float(share) for name, share in found.items()}
