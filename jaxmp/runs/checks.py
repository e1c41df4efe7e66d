"""What an experiment is checked for before its first step, on its data and its devices."""

from __future__ import annotations

from jaxmp.data.dataset import Split
from jaxmp.data.pipeline import check_splits, check_values
from jaxmp.data.source import Source
from jaxmp.errors import InputError
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.task import check_rows


def check(trainer: Trainer) -> None:
    """Refuses what would otherwise fail at the first evaluation, at the end, or never.

    Raises:
      InputError: a rule of the policy that matches no module, a batch that does not divide over the devices, a
        monitored metric that is not measured, columns that differ between the splits, labels out of range, integers
        that do not fit in 32 bits; patience without a validation split.
    """
    experiment = trainer.experiment
    trainer.explain()
    experiment.parallel.make(experiment.data.batch_size, experiment.loop.accumulate_steps)
    _ = trainer.monitor
    others: dict[Split, Source] = {split: trainer.source(split) for split in trainer.splits if split != "train"}
    if experiment.loop.patience is not None and "validation" not in others:
        raise InputError(
            f"loop.patience = {experiment.loop.patience}: without a validation split nothing says when to stop; "
            "expected a validation split, or no patience"
        )
    check_splits(experiment.data, trainer.source(), others, trainer.columns)
    for split in trainer.splits:
        check_values(trainer.source(split))
    check_targets(trainer, *trainer.splits)


def check_targets(trainer: Trainer, *splits: Split) -> None:
    """Refuses rows of these splits that the task cannot take, such as labels out of range."""
    for split in splits:
        columns = getattr(trainer.source(split), "columns", {})
        check_rows(trainer.experiment.task, trainer.outputs, columns, split)
