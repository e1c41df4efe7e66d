"""`RunFolder`: the files of one run, their names, and how they are written and read.

    config.json      the resolved experiment, how it can be made again, versions, git revision, devices
    metrics.jsonl    one JSON object a line: what was measured, see writers.py
    checkpoints/     states, see checkpoint.py
    summary.json     what came out, once the run has ended
    failed.json      at which step a run failed, and why; deleted when the run goes on
    report.html      where `jaxmp report` writes
    samples/         texts and pictures drawn from the model, see samples.py
    lock             locked by the process that trains here

TensorBoard's events and the folder `wandb` stand beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxmp.errors import InputError, local_path, nearest
from jaxmp.runs.writers import read_lines
from jaxmp.text_table import without_nan

if TYPE_CHECKING:  # they import JAX, which reading a run's files does without
    from jaxmp.experiment.experiment import Experiment
    from jaxmp.runs.checkpoint import Checkpoints


class FolderInUse(InputError):
    """Another process trains in a run's folder."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Nothing is created before `create`; a method that only reads changes nothing."""

    path: Path

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        workdir: str | os.PathLike[str],
        name: str,
        begins_with: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """The folder that a run of `experiment` has in `workdir`: `workdir/name/<hash>-s<seed>`.

        `begins_with` is what identifies the state or weights of another run that it begins with. Raises InputError if
        there can be no run folder, see `local_path`.
        """
        from jaxmp.experiment.identity import identity_hash

        runs = local_path("workdir", workdir) / name
        try:
            os.fspath(runs.absolute()).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"workdir {os.fspath(runs)!r}: expected a path in UTF-8, which Orbax and TensorStore need for "
                "checkpoints; rename it, or choose another --workdir"
            ) from None
        return cls(runs / f"{identity_hash(experiment, begins_with)}-s{experiment.seed}")

    @classmethod
    def find(cls, path: Path) -> RunFolder:
        """The run folder that `path` is, or the only one that it holds, up to two folders down.

        Raises: InputError if there is none, or several.
        """
        if cls(path)._config.is_file():
            return cls(path)
        if path.is_file():
            raise InputError(f"run {str(path)!r}: this is a file; expected a run folder, as `jaxmp train` writes")
        if not path.is_dir():
            around = path.absolute().parent
            # What stands in the root folder is the system's.
            others = [other.name for other in around.glob("*/")] if around != Path(path.anchor or "/") else []
            raise InputError(f"run {str(path)!r}: no such folder{nearest(path.name, others)}")
        found = sorted(config.parent for depth in ("*", "*/*") for config in path.glob(f"{depth}/config.json"))
        if len(found) != 1:
            there = "\n".join(f"  {run}" for run in found)
            raise InputError(
                f"{path} holds {len(found)} runs; name one of them:\n{there}"
                if found
                else f"{path} is no run folder and holds none: expected a config.json in it, as `jaxmp train` writes"
            )
        return cls(found[0])

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    @property
    def _summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def _failure(self) -> Path:
        return self.path / "failed.json"

    @property
    def _lock(self) -> Path:
        return self.path / "lock"

    @property
    def metrics(self) -> Path:
        """The file of all lines."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The file that `jaxmp report` writes."""
        return self.path / "report.html"

    @property
    def samples(self) -> Path:
        """The folder of texts and pictures drawn from the model."""
        return self.path / "samples"

    def checkpoints(self, **how: Any) -> Checkpoints:
        """The run's checkpoints; for `how` (keep, best_of, mode) see `Checkpoints`."""
        from jaxmp.runs.checkpoint import Checkpoints

        return Checkpoints(self.path / "checkpoints", **how)

    def checkpoint_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(int(path.name) for path in self.path.glob("checkpoints/*") if path.name.isdecimal())

    def beside(self) -> list[RunFolder]:
        """The other runs in the same folder, by name."""
        return [
            RunFolder(config.parent)
            for config in sorted(self.path.parent.glob("*/config.json"))
            if config.parent != self.path and config.parent.suffix != ".deleted"
        ]

    # Making, locking, deleting.

    def is_unused(self) -> bool:
        """Whether no run has begun here: the folder is missing, or holds nothing but a lock and half-written files."""
        unused = not self.path.exists()
        return unused or all(path.suffix == ".partial" or path == self._lock for path in self.path.iterdir())

    def create(self) -> None:
        """Makes the folder. Raises InputError if the file system takes none there."""
        try:
            # Of a link, the folder that it points to is made.
            Path(os.path.realpath(self.path)).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise InputError(f"{self.path}: a link on the way leads to itself; choose another --workdir") from error
            if error.errno != errno.ENOENT:  # which some file systems say: /proc
                raise
            raise InputError(f"{self.path}: no folder can be made there; choose another --workdir") from error

    @contextlib.contextmanager
    def locked(self, log: Callable[[str], None]) -> Iterator[None]:
        """Context manager: no other process trains in this folder. The lock goes with the process, however that ends.

        On a file system without locks, `log` is told so, and there is none.

        Raises: FolderInUse if another process has the lock.
        """
        with self._lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderInUse(
                    f"another process is training in {self.path}; wait for it, or choose another --workdir"
                ) from None
            except OSError as error:  # some network file systems: ENOLCK, EOPNOTSUPP, ENOSYS
                log(f"{self.path} cannot be locked ({error.strerror}): see that no other process trains there")
            yield

    def is_locked(self) -> bool:
        """Whether a process trains in this folder, as far as the file system has locks. Changes nothing."""
        try:
            with self._lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock file, or no locks
            return False
        return False

    def delete(self) -> None:
        """Deletes the run, its name first: a kill on the way leaves nothing that looks like a run and is none.

        Of a link, what it points to is deleted, and the link stays.
        """
        path = self.path.resolve()
        doomed = path.with_name(f"{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except OSError:  # a mount point has to stay: config.json, which makes it a run, goes first
            self._config.unlink(missing_ok=True)
            for inside in path.iterdir():
                if inside.is_dir() and not inside.is_symlink():
                    shutil.rmtree(inside)
                else:
                    inside.unlink()
        else:
            shutil.rmtree(doomed)

    # Writing and reading JSON. A file is either whole or not there.

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json."""
        _write_json(self._config, config)

    def read_config(self) -> dict[str, Any]:
        """What config.json says. Raises InputError if it is broken, or of another version of jaxmp."""
        try:
            config = json.loads(self._config.read_text())
            missing = {"name", "hash", "seed", "experiment", "versions"} - set(config)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._config} is no JSON object ({error}); is this a run of jaxmp?") from error
        if missing or not isinstance(config, dict):
            raise InputError(
                f"{self._config} lacks {', '.join(sorted(missing))}: it was not written by this version of jaxmp"
            )
        return config

    def refuse_earlier_version(self, config: dict[str, Any]) -> None:
        """Raises InputError if the run is of a version of jaxmp whose state and experiment cannot be read any more."""
        if "made_by" not in config:
            git = config.get("git")
            revision = f", as of git revision {git['revision'][:12]} in its working directory" if git else ""
            raise InputError(
                f"{self.path} was written by an earlier jaxmp: its metrics and summary can be read, its state and "
                f"experiment only by jaxmp {config['versions'].get('jaxmp')}"
                f"{revision}"
            )

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, with which the run has ended."""
        _write_json(self._summary, summary)

    @property
    def has_ended(self) -> bool:
        """Whether the run has a summary."""
        return self._summary.exists()

    def read_summary(self) -> dict[str, Any] | None:
        """What summary.json says; None while the run has not ended. Raises InputError if it is broken."""
        if not self._summary.exists():
            return None
        try:
            summary = json.loads(self._summary.read_text())
            missing = {"steps", "test", "best", "policy"} - set(summary)
            problem = f"lacks {', '.join(sorted(missing))}" if missing else None
        except (ValueError, TypeError) as error:
            problem = f"is no JSON object ({error})"
        if problem:
            raise InputError(
                f"{self._summary} {problem}; delete this file alone, and the same `jaxmp train` makes it again from "
                "the last checkpoint"
            )
        return summary

    def write_failure(self, step: int, reason: str) -> None:
        """Writes failed.json."""
        _write_json(self._failure, {"step": step, "reason": reason})

    def clear_failure(self) -> None:
        """Deletes failed.json, if there is one."""
        self._failure.unlink(missing_ok=True)

    def read_failure(self) -> str | None:
        """Why the run failed; None if it did not."""
        if not self._failure.exists():
            return None
        try:
            return str(json.loads(self._failure.read_text())["reason"])
        except (ValueError, KeyError, TypeError):
            return f"{self._failure} is damaged; the same `jaxmp train` says it again"

    def write_stop(self, step: int, why: str) -> None:
        """Writes stop.json: that a hook ended the run after `step`."""
        _write_json(self.path / "stop.json", {"step": step, "why": why})

    def read_stop(self, *, at: int) -> str | None:
        """Why a hook ended the run after the step `at`; None if it did not. One of another step is forgotten."""
        path = self.path / "stop.json"
        content = json.loads(path.read_text()) if path.exists() else {"step": None, "why": None}
        if content["step"] != at:
            path.unlink(missing_ok=True)
            return None
        return content["why"]

    def write_lines(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes metrics.jsonl anew, with the lines of another run that this one begins with."""
        temporary = self.metrics.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(without_nan(line), allow_nan=False) + "\n" for line in lines))
        temporary.replace(self.metrics)

    def read_lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order. Raises InputError for a broken one, with its number."""
        return read_lines(self.metrics)


def parse_step(text: str, where: str) -> int | Literal["last", "best"]:
    """Which checkpoint is meant: last, best or the number of a step. Raises InputError that begins with `where`."""
    if text == "last":
        return "last"
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise InputError(f"{where}: expected last, best or the number of a step{nearest(text, ('last', 'best'))}")
    return int(text)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def how_to_blame(path: Path, config: Mapping[str, Any]) -> str | None:
    """The command that explains a skipped step of a run; of a run started from Python, the call.

    None for a private run, whose steps are not repeated.
    """
    if "privacy" in config:
        return None
    if "source" in config:
        return f"jaxmp blame {shlex.quote(str(path))}"
    return f"jaxmp.blame(jaxmp.Run({str(path)!r}, experiment)) in Python, with the experiment that was trained"
