"""`jaxmp train CONFIG --fast-dev-run`: a few steps of everything that a run does, in a folder that is deleted again."""

from __future__ import annotations

import collections
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Literal

import optax

from jaxmp.distributed import processes
from jaxmp.errors import RunFailed, local_path
from jaxmp.experiment.experiment import Experiment
from jaxmp.reports.run_report import report
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.training.optimizers import Private, make_optimizer
from jaxmp.training.schedules import make_schedule

STEPS, BATCHES = 4, 2
"""steps to train, and batches of an epoch: there are two evaluations and two checkpoints"""


@dataclasses.dataclass(frozen=True)
class OfWholeRun:
    """The optimizer of a longer run: its schedule knows all steps, which may be fewer than those of its warm-up."""

    optimizer: Any
    """as the experiment has it"""
    steps: int
    """of the whole run"""

    def make(self, steps: int) -> optax.GradientTransformation:
        """Creates the optax transformation of the whole run, whatever `steps` says."""
        return make_optimizer(self.optimizer, self.steps)


@dataclasses.dataclass(frozen=True)
class ScheduleOfWholeRun:
    """The schedule of a longer run, inside an optimizer that has to keep its class."""

    schedule: Any
    """as the optimizer has it"""
    steps: int
    """of the whole run"""

    def make(self, peak: Any, steps: int) -> optax.Schedule:
        """Creates the optax schedule of the whole run, whatever `steps` says."""
        return make_schedule(self.schedule, peak, self.steps)


def of_whole_run(optimizer: Any, steps: int) -> Any:
    """The optimizer of a run of `steps` steps, for a shorter one."""
    if isinstance(optimizer, Private):  # by its class, rows are clipped and get noise
        return dataclasses.replace(optimizer, schedule=ScheduleOfWholeRun(optimizer.schedule, steps))
    return OfWholeRun(optimizer, steps)


def fast_dev_run(
    experiment: Experiment,
    *,
    name: str,
    workdir: str = "runs",
    init_from: str | None = None,
    init_only: Sequence[str] = (),
    progress: Literal["auto", "none"] = "auto",
    log: Callable[[str], None] = print,
) -> str:
    """Makes a few steps of everything, and says what was done. For the arguments see `jaxmp.fit`.

    Of several processes, the folder that is deleted again is in `workdir`, which all of them see.

    Raises:
      InputError: training would refuse the experiment.
      RunFailed: the steps failed.
    """
    place = local_path("workdir", workdir) if processes.several() else None
    folder = processes.from_first(lambda: tempfile.mkdtemp(prefix="jaxmp-fast-dev-run-", dir=place))
    begin: dict[str, Any] = {"init_from": init_from, "init_only": init_only}
    try:
        shorter = shortened(experiment)
        fitted = fit(shorter, workdir=folder, name=name, progress=progress, log=log, **begin)
        return _read_back(Run(fitted.path, shorter))
    except RunFailed as failed:
        reason = str(failed).partition(". The state is saved in ")[0]
        raise RunFailed(f"{reason}; without --fast-dev-run the state is saved, for `jaxmp blame`") from None
    finally:
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)


def shortened(experiment: Experiment) -> Experiment:
    """The same experiment for a few steps, each with its line, and for a few batches of each split."""
    loop = experiment.loop
    fields: dict[str, Any] = {"log_every": 1, "eval_every": None, "save_every": None, "patience": None, "wandb": False}
    fields |= {"limit_batches" if loop.overfit_batches is None else "overfit_batches": BATCHES}
    fields |= {} if loop.ranges_every is None else {"ranges_every": BATCHES}
    whole = Trainer(experiment)
    optimizer = of_whole_run(experiment.optimizer, whole.steps)
    if whole.objectives:
        of_each = {each: -(-whole.steps // spec.every) for each, spec in whole.objectives.items()}
        optimizer = {each: of_whole_run(experiment.optimizer_of(each), steps) for each, steps in of_each.items()}
    loop = dataclasses.replace(loop, steps=STEPS, **fields)
    return dataclasses.replace(experiment, optimizer=optimizer, loop=loop)


def _read_back(run: Run) -> str:
    """Restores the last state, draws the report, and says what was done."""
    step = int(run.state().step)
    if processes.is_first():
        report([run]).write(run.path / "report.html")
    lines = collections.Counter(line["split"] for line in run.metrics)
    evaluated = ", ".join(f"{count} of {split}" for split, count in lines.items() if split != "train")
    return (
        f"fast dev run: {step} steps; evaluations: {evaluated or 'none'}; a checkpoint was written and read back, a "
        "report drawn. Nothing is kept"
    )
