"""`grid`: the runs of a study of precisions and seeds, before they run."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment


class Cell(NamedTuple):
    """One run of the grid, before it runs."""

    precision: str
    seed: int
    experiment: Experiment
    overrides: list[str]


def grid(
    subject: Experiment | ConfigFile, precisions: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Cell]:
    """Lists the runs seed by seed, so that runs that are compared are close in time as well.

    Args:
      subject: what to train.
      precisions: what `--precision` takes.
      seeds: one run of each precision each.
      overrides: further arguments of `jaxmp train` for all runs of a config file.

    Raises: InputError if a list is empty, a precision is unknown, or two are equal, however they are spelled.
    """
    if not isinstance(subject, Experiment | ConfigFile):
        raise InputError(f"compare: {subject!r:.60}: expected an Experiment")
    if overrides and isinstance(subject, Experiment):
        raise InputError("compare: overrides are those of a config file; expected dataclasses.replace(experiment, ...)")
    for name, values in (("--precision", precisions), ("--seeds", seeds)):
        if not values:
            raise InputError(f"{name}: nothing to compare; expected one value or more")
        twice = [value for value, count in collections.Counter(values).items() if count > 1]
        if twice:
            raise InputError(f"{name}: {twice[0]} is given twice")
    cells = []
    for seed in seeds:
        for precision in precisions:
            arguments = [*overrides, "--precision", precision, "--seed", str(seed)]
            if isinstance(subject, ConfigFile):
                experiment = subject.experiment(arguments)
            else:
                experiment = dataclasses.replace(subject, precision=precision, seed=seed)
            cells.append(Cell(precision, seed, experiment, arguments))
    first: dict[str, str] = {}
    for cell in cells[: len(precisions)]:
        same = first.setdefault(cell.experiment.hash, cell.precision)
        if same != cell.precision:
            raise InputError(f"--precision: {same} and {cell.precision} are one policy, {cell.experiment.policy}")
    return cells
