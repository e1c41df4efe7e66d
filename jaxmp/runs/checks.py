"""What an experiment is checked for before its first step, on its data and its devices."""

from __future__ import annotations

import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.errors import InputError
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.task import check_rows

OTHERS: tuple[Split, ...] = ("validation", "test")
"""the splits that are evaluated"""


def check(trainer: Trainer) -> None:
    """Refuses what would otherwise fail at the first evaluation, at the end, or never.

    Raises:
      InputError: a rule of the policy that matches no module, a batch that does not divide over the devices, a
        monitored metric that is not measured, columns that differ between the splits, labels out of range.
    """
    experiment = trainer.experiment
    trainer.explain()
    experiment.parallel.make(experiment.data.batch_size, experiment.loop.accumulate_steps)
    _ = trainer.monitor
    train = trainer.source()[np.arange(1)]
    for split in OTHERS:
        row = trainer.source(split)[np.arange(1)]
        for name in trainer.columns:
            expected = f"{train[name].dtype}{list(train[name].shape[1:])}"
            found = f"{row[name].dtype}{list(row[name].shape[1:])}" if name in row else "nothing"
            if found != expected:
                raise InputError(
                    f"{name!r} of the {split} split is {found}; expected {expected}, as in the train split"
                )
    check_targets(trainer, "train", *OTHERS)


def check_targets(trainer: Trainer, *splits: Split) -> None:
    """Refuses rows of these splits that the task cannot take, such as labels out of range."""
    for split in splits:
        columns = getattr(trainer.source(split), "columns", {})
        check_rows(trainer.experiment.task, trainer.outputs, columns, split)
