"""What an experiment is checked for before its first step, on its data and its devices."""

from __future__ import annotations

import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.data.source import Source
from jaxmp.errors import InputError, nearest
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.classification import check_labels
from jaxmp.training.feed import NAN_LOSS

OTHERS: tuple[Split, ...] = ("validation", "test")
"""the splits that are evaluated"""


def check(trainer: Trainer) -> None:
    """Refuses what would otherwise fail at the first evaluation, at the end, or never.

    Raises:
      InputError: a rule of the policy that matches no module, a batch that does not divide over the devices, a
        monitored metric that is not measured, columns that differ between the splits, labels out of range.
    """
    experiment, loop = trainer.experiment, trainer.experiment.loop
    trainer.explain()
    experiment.parallel.make(experiment.data.batch_size, loop.accumulate_steps)
    measured = [name for name in trainer.no_metrics if name != NAN_LOSS]
    if loop.monitor not in measured:
        raise InputError(
            f"loop.monitor={loop.monitor!r} is nothing that is measured; expected one of {', '.join(measured)}"
            f"{nearest(loop.monitor, measured)}"
        )
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
    """Refuses labels of these splits that are none of the model's classes."""
    experiment = trainer.experiment
    sources: dict[str, Source] = {split: trainer.source(split) for split in splits}
    check_labels(experiment.model, experiment.task, trainer.batch_spec, sources)
