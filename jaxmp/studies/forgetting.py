"""`forgetting`: what a run on a sequence of tasks has lost of the earlier ones, from its metrics.jsonl.

python -c "import jaxmp.studies.forgetting as f, sys; print(f.forgetting(sys.argv[1]))" runs/permuted_mnist/HASH-s0
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

import numpy as np

from jaxmp.errors import InputError
from jaxmp.runs.folder import RunFolder
from jaxmp.text_table import table


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """How well each task was done after each task was learned."""

    metric: str
    """the metric, such as accuracy"""
    after: tuple[tuple[float, ...], ...]
    """`after[k][j]`: the metric of task j on the validation split after task k was learned, NaN if not finite"""

    @property
    def average_metric(self) -> float:
        """The mean of the metric over all tasks after the last (average accuracy)."""
        return sum(self.after[-1]) / len(self.after[-1])

    @property
    def of_tasks(self) -> tuple[float, ...]:
        """What was lost of each task but the last: its best before the last task was learned, less that after it."""
        best = np.max(self.after[:-1], axis=0, initial=-np.inf)
        return tuple(float(best[j]) - self.after[-1][j] for j in range(len(self.after) - 1))

    @property
    def average_forgetting(self) -> float:
        """The average forgetting: the mean of `of_tasks`. Chaudhry et al. 2018, section 3.2, of a metric to maximise.

        https://arxiv.org/abs/1801.10112. 0 for a single task.
        """
        return sum(self.of_tasks) / len(self.of_tasks) if self.of_tasks else 0.0

    def __str__(self) -> str:
        """A table: a row after each task, a column for each task; and the two means."""
        header = ("after task", *(f"{self.metric}_{j}" for j in range(len(self.after[-1]))))
        rows = [(str(k), *(f"{value:.4f}" for value in row)) for k, row in enumerate(self.after)]
        shown = table(rows, header=header, right=range(1, len(header)))
        averages = f"average {self.metric} {self.average_metric:.4f}, average forgetting {self.average_forgetting:.4f}"
        return f"{shown}\n{averages}"


def forgetting(run: str | os.PathLike[str], metric: str = "accuracy") -> Forgetting:
    """What a run on a sequence of tasks, an epoch each, has lost of the earlier ones.

    Args:
      run: its folder.
      metric: measured by `jaxmp.tasks.per_task.PerTask`, as `METRIC_0`, `METRIC_1` and so on; more is better.

    Raises: InputError if there is no such run, no validation line at the end of an epoch has the metric of a task, or
      the epoch of a task has no validation line at its end.
    """
    folder = RunFolder.find(Path(run))
    lines = [line for line in folder.read_lines() if line["split"] == "validation" and line["epoch"] % 1 == 0]
    names = sorted({name for line in lines for name in line if re.fullmatch(rf"{re.escape(metric)}_\d+", name)})
    if not names:
        raise InputError(
            f"{folder.path}: no validation line at the end of an epoch has {metric}_0; expected a run whose task is "
            "PerTask(...), on a dataset such as PermutedTasks"
        )
    order = sorted(names, key=lambda name: int(name.rpartition("_")[2]))
    by_epoch = {int(line["epoch"]): line for line in lines}
    for epoch in range(1, len(order) + 1):
        if epoch not in by_epoch:
            raise InputError(
                f"{folder.path}: no evaluation after epoch {epoch}, at the end of task {epoch - 1}; expected a "
                "finished run without loop.eval_every"
            )
    values = ((by_epoch[k + 1][name] for name in order) for k in range(len(order)))
    return Forgetting(metric, tuple(tuple(math.nan if value is None else value for value in row) for row in values))
