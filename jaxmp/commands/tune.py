"""`jaxmp tune CONFIG`: many trials of one experiment, by one worker or several."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxmp.commands.command import ConfigCommand, require_path
from jaxmp.errors import BAD_INPUT, DONE, FAILED, STOPPED, InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.overrides import field_path

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment

READY = "JAXMP_TUNE_READY"
"""environment variable of a worker that `--jobs` started: the file descriptor that it writes to when all is checked"""
RESTARTS = 5
"""how often, for each job, a worker that was killed is started again"""


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp tune`."""

    space: tuple[str, ...] = ()
    """Fields to vary: LEAF=log:LOW:HIGH, LEAF=linear:LOW:HIGH or LEAF=VALUE,VALUE (or VALUE|VALUE)."""
    trials: int | None = None
    """Number of trials of all workers together; by default 40, and of a grid all its points."""
    seeds: int = 1
    """Runs of each trial, from --seed on; a trial's value is their mean."""
    metric: str | None = None
    """Metric to make best, on the validation split; by default the one that the config monitors."""
    sampler: Literal["tpe", "random", "grid", "cmaes"] = "tpe"
    """How values are chosen; a grid has every combination of lists."""
    pruner: Literal["none", "median", "hyperband", "wilcoxon"] = "none"
    """How a trial is ended early: by its first seed's curve (median, hyperband), or over 5 seeds or more (wilcoxon)."""
    seeds_together: bool = False
    """Train the seeds of a trial at once, by one program; bits differ from those of seeds trained one by one."""
    jobs: int | None = None
    """Number of worker processes on this machine; by default one a GPU, and one on a CPU."""
    study: str = "tune"
    """Name of the study, and its folder in WORKDIR/CONFIG; the same command goes on with it, on any machine."""
    storage: str | None = None
    """Where trials are kept: another journal file, or the URL of a database, such as postgresql+psycopg://USER@HOST/NAME
    (after pip install 'psycopg[binary]'); by default a journal in that folder."""
    heartbeat: float | None = None
    """Seconds between signs of life in the database, for machines that share one and no locks of files."""
    workdir: str = "runs"
    """Folder for the runs and the study; runs that exist are resumed, or read if they are finished."""

    @property
    def varied(self) -> list[str]:
        """The fields that the study varies, by path."""
        return [field_path(text) for text in self.space]


def tune(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Searches the best values of some fields of a config, by many runs; the same command goes on."""
    require_path(workdir=options.workdir)
    from jaxmp.studies.tune import tune as study

    own = vars(options) | {"space": list(options.space)}
    del own["jobs"]
    log = functools.partial(print, flush=True)  # a line a trial, soon, in the log of a job as well
    found = study(config, overrides=overrides, ready=_say_ready, log=log, **own)
    if found is None:
        return STOPPED
    if READY in os.environ:  # the parent shows what came out
        return DONE
    print(found)
    return DONE if found.best is not None or not _is_finished(found) else FAILED


def _is_finished(study: Any) -> bool:
    return all(trial["state"] not in ("running", "waiting") for trial in study["trials"])


def start_workers(options: Options, argv: Sequence[str]) -> int | None:
    """With several jobs: starts a worker process for each, and waits for them. None if this process is the worker.

    Called before the config file is run: a process that has initialised a GPU would keep its memory.
    """
    if READY in os.environ:
        return None
    gpus = _gpus()
    jobs = options.jobs if options.jobs is not None else max(1, len(gpus))
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: expected a whole number of at least 1")
    if jobs == 1:
        return None
    code = _Workers([sys.executable, "-m", "jaxmp", "tune", *argv], jobs, gpus).run()
    if code in (DONE, FAILED):
        from pathlib import Path

        from jaxmp.reports.study_report import best_of, text
        from jaxmp.studies.tune_study import StudyFolder, study_to_json

        folder = Path(options.workdir).expanduser() / ConfigFile.find(argv[0]).name / options.study
        found = study_to_json(StudyFolder(folder), options.storage, importance=False)
        print(text(found))
        if code == DONE and best_of(found) is None:
            return FAILED
    return code


def _severity(code: int) -> int:
    order = (DONE, STOPPED, FAILED, BAD_INPUT)
    return order.index(code) if code in order else len(order)


class _Workers:
    """The worker processes of one machine."""

    def __init__(self, command: Sequence[str], jobs: int, gpus: Sequence[str]):
        self.command, self.jobs, self.gpus = list(command), jobs, gpus
        self.stopping = False
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def run(self) -> int:
        """Starts all, the others when the first has checked everything, and returns the worst of their exit codes."""
        before = {n: signal.signal(n, self._forward) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            reader, writer = os.pipe()
            self._start(0, writer)
            os.close(writer)
            ready = os.read(reader, 1)  # nothing, if it ends before
            os.close(reader)
            if not ready:
                code = self.running[0].wait()
                return STOPPED if self.stopping else max(code, FAILED)
            for index in range(1, self.jobs):
                self._start(index)
            return self._wait()
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)

    def _start(self, index: int, ready: int | None = None) -> None:
        environment = os.environ | {READY: "" if ready is None else str(ready)}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[index % len(self.gpus)]
        passed = () if ready is None else (ready,)
        self.running[index] = subprocess.Popen(self.command, env=environment, pass_fds=passed)
        if self.stopping:
            self.running[index].terminate()

    def _wait(self) -> int:
        """Waits for all workers. One that was killed is started again, and goes on with its trial."""
        worst, restarts = DONE, 0
        while self.running:
            time.sleep(0.1)
            for index, process in list(self.running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self.running[index]
                if code < 0 and not self.stopping and restarts < RESTARTS * self.jobs:
                    restarts += 1
                    print(f"jaxmp: worker {index} was killed by signal {-code}, and is started again", file=sys.stderr)
                    self._start(index)
                    continue
                worst = max(worst, FAILED if code < 0 else code, key=_severity)
        return STOPPED if self.stopping else worst

    def _forward(self, number: int, frame: Any) -> None:
        self.stopping = True
        for process in list(self.running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _say_ready() -> None:
    """Tells the parent that all is checked, and that the other workers can start."""
    descriptor = os.environ.get(READY)
    if descriptor:
        os.write(int(descriptor), b"1")
        os.close(int(descriptor))


def _gpus() -> list[str]:
    """The GPUs that this machine has for us, as CUDA names them; found without JAX, which would take their memory."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True)
    except OSError:
        return []
    return listed.stdout.decode().split() if listed.returncode == 0 else []


COMMAND = ConfigCommand("tune", Options, tune, before_config=start_workers)
