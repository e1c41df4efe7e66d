"""`Weighted`: a task whose rows count differently, by a column of the data or by their class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError, nearest
from jaxmp.tasks.function import as_task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A task with weights for its rows, in training and in evaluation.

        Weighted(Regression(), column="sample_weight")
        Weighted(Classification(), classes=class_weights(labels))

    The loss is sum(weight * loss) / sum(weight), as PyTorch's weighted cross-entropy is (Keras divides by the number of
    rows). The other metrics stay those of `task`, each row counting once.

    Raises: InputError unless one of `column` and `classes` is given, or if the task mixes rows (`mixup`).
    """

    task: Any
    """The task whose loss is weighted."""
    column: str | None = None
    """Column of the data with a weight of 0 or more for each row."""
    classes: tuple[float, ...] = ()
    """Weight of each class, by the number of the class; the labels are the task's target."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", as_task(self.task))
        if (self.column is None) == (len(self.classes) == 0):
            raise InputError(
                f"Weighted(column={self.column!r}, classes={self.classes}): expected one of the two, a column of the "
                "data or a weight for each class"
            )
        object.__setattr__(self, "classes", tuple(float(weight) for weight in self.classes))
        if not all(0 <= weight < float("inf") for weight in self.classes) or (self.classes and not any(self.classes)):
            raise InputError(f"Weighted.classes = {self.classes}: expected finite weights of 0 or more, not all 0")
        if mixup := getattr(self.task, "mixup", 0):
            raise InputError(
                f"Weighted: task.mixup = {mixup} mixes the losses of two rows, and one weight would be that of both; "
                "expected 0, or the weights of classes in the task itself, Classification(class_weights=...)"
            )
        if self.classes and not hasattr(self.task, "target"):
            raise InputError(f"Weighted.classes: {type(self.task).__name__} has no target, the column of the labels")

    def __getattr__(self, name: str) -> Any:
        """Gives all else as the task does: inputs, target, metrics, monitor, predictions."""
        if name.startswith("__") or name == "task":
            raise AttributeError(name)
        return getattr(self.task, name)

    def __call__(self, outputs: Any, batch: Batch, *objective: str) -> tuple[Mean, Metrics]:
        """The weighted loss, and the metrics of `task`; `objective` is one of its several ones, if it has them."""
        if self.column is not None:
            weight = batch[self.column].astype(jnp.float32)
        else:
            weight = jnp.take(jnp.asarray(self.classes, jnp.float32), batch[self.task.target], mode="clip")
        _, metrics = self.task(outputs, batch, *objective)
        # A weight of NaN in a row that only fills up the batch must not count.
        weight = jnp.where(batch["weight"] > 0, batch["weight"] * weight, 0)
        loss, _ = self.task(outputs, {**batch, "weight": weight}, *objective)
        return loss, metrics

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError as the task does, or if the column is missing or has no number for each row."""
        if self.column is not None and self.column not in batch:
            raise InputError(
                f"Weighted.column = {self.column!r}: the data has {', '.join(sorted(batch))}"
                f"{nearest(self.column, batch)}"
            )
        of = batch[self.column if self.column is not None else self.task.target]
        if of.shape != batch["weight"].shape:
            what = "a weight" if self.column is not None else "one label"
            raise InputError(f"Weighted: a column of shape {of.shape}; expected {what} for each row, (rows,)")
        if hasattr(self.task, "check"):
            self.task.check(outputs, batch)

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError as the task does, or if a weight is negative or not finite, or a label has no weight."""
        if self.column is not None and self.column in columns:
            weights = np.asarray(columns[self.column][:], np.float64)
            bad = np.flatnonzero(~((weights >= 0) & (weights < np.inf)))
            if len(bad):
                raise InputError(
                    f"{split}: row {bad[0]} has the weight {weights[bad[0]]:g} in {self.column!r}; expected 0 or more"
                )
            if not weights.any():
                raise InputError(f"{split}: all weights in {self.column!r} are 0")
        if self.classes and self.task.target in columns:
            largest = int(np.max(columns[self.task.target][:]))
            if largest >= len(self.classes):
                raise InputError(
                    f"{split}: a label is {largest}, and Weighted.classes has {len(self.classes)} weights, for labels "
                    f"from 0 to {len(self.classes) - 1}"
                )
        if hasattr(self.task, "check_rows"):
            self.task.check_rows(outputs, columns, split)


def class_weights(labels: Any) -> tuple[float, ...]:
    """Weights under which each class counts alike: rows / (classes * rows of the class), as scikit-learn's "balanced".

    Args:
      labels: integers from 0 on, any shape.

    Raises: InputError if they are no such integers, or a class between 0 and the largest has no rows.

    >>> class_weights([0, 0, 0, 1])
    (0.6666666666666666, 2.0)
    """
    counted = np.asarray(labels)
    if counted.dtype.kind not in "iu" or not counted.size or counted.min() < 0:
        raise InputError(
            f"class_weights: labels of {counted.dtype}, {counted.size} of them: expected integers from 0 on"
        )
    counts = np.bincount(counted.ravel())
    if not counts.all():
        raise InputError(
            f"class_weights: class {int(np.argmin(counts))} has no rows; expected labels from 0 on, no gaps"
        )
    return tuple((counted.size / (len(counts) * counts)).tolist())
