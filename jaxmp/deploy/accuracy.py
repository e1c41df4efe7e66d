"""What a smaller model costs in right decisions: two accuracies on the same rows, and the interval of their change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmp.data.pipeline import evaluation_batches
from jaxmp.deploy.decisions import decisions, labels_of, targets_of
from jaxmp.runs.run import Run

CONFIDENCE = 1.96
"""standard errors on each side of a 95 % interval"""

Batch = Mapping[str, Any]


class Accuracy(NamedTuple):
    """How often decisions are right, on the rows that were measured."""

    right: int
    """number of right decisions"""
    rows: int
    """number of decisions that count: one a row, or one for each of its labels that is no padding"""

    @property
    def share(self) -> float:
        """The share of right decisions."""
        return self.right / self.rows

    def interval(self) -> tuple[float, float]:
        """Its 95 % interval (Wilson 1927)."""
        from scipy import stats

        found = stats.binomtest(self.right, self.rows).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


class Trade(NamedTuple):
    """The accuracies of two models on the same rows."""

    before: Accuracy
    after: Accuracy
    change: tuple[float, float, float]
    """change of the share of right decisions, and its 95 % interval, by pairs of decisions"""

    def lines(self, name: str) -> list[str]:
        """The two accuracies and their change in words; `name` is that of the second model."""
        found = []
        for of, accuracy in (("run", self.before), (name, self.after)):
            low, high = accuracy.interval()
            found.append(
                f"{of:<16} accuracy {100 * accuracy.share:.2f} % ({100 * low:.2f} to {100 * high:.2f}), "
                f"{accuracy.right:,} of {accuracy.rows:,}"
            )
        change, low, high = (100 * each for each in self.change)
        return [*found, f"change           {change:+.2f} points ({low:+.2f} to {high:+.2f}), by pairs of decisions"]


def trade(run: Run, source: Any, before: Callable[[Batch], Any], after: Callable[[Batch], Any]) -> Trade | None:
    """Measures two models on the same rows; None if the task decides nothing that the data label.

    Labels that are padding do not count, so that the first share is the run's own metric `accuracy` on these rows. The
    interval of the change is that of a difference of paired proportions, with half an observation in each cell of
    disagreement (A. Agresti and Y. Min, Statistics in Medicine 24, 2005).

    Args:
      run: whose task decides by the outputs.
      source: the rows.
      before: the outputs of the first model for a batch of rows that are not prepared yet.
      after: those of the second.
    """
    task, targets, right = run.experiment.task, targets_of(run.experiment), []
    for batch in evaluation_batches(source, run.experiment.data.eval_batch_size):
        there = int(np.sum(batch["weight"]))
        both = [decisions(task, outputs(batch)) for outputs in (before, after)]
        labels = labels_of(task, targets(batch), both[0])
        if labels is None:
            return None
        counts = labels.counts[:there]
        right.append(np.stack([np.asarray(each == labels.values)[:there][counts] for each in both]))
    first, second = np.concatenate(right, axis=1)
    count = first.size
    if not count:
        return None
    lost, won = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    change = (won - lost) / count
    b, c = won + 0.5, lost + 0.5
    error = math.sqrt(b + c - (b - c) ** 2 / (count + 2)) / (count + 2)
    middle = (b - c) / (count + 2)
    interval = change, middle - CONFIDENCE * error, middle + CONFIDENCE * error
    return Trade(Accuracy(int(first.sum()), count), Accuracy(int(second.sum()), count), interval)
