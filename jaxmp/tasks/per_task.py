"""`PerTask`: a task whose metrics are also measured on each of several tasks that a column of the data tells apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.tasks.function import as_task
from jaxmp.tasks.task import objectives_of
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec


@dataclasses.dataclass(frozen=True)
class PerTask:
    """A task with the metrics of each of several tasks beside those of all: `accuracy_0`, `accuracy_1` and so on.

        PerTask(Classification(), count=5)

    Made for continual learning (`jaxmp.data.task_sequence`): the forgetting is computed from these metrics, see
    `jaxmp.studies.forgetting`.

    Raises: InputError if `count` is below 1, or `task` has several objectives.
    """

    task: Any
    """The task that is measured."""
    count: int
    """Number of tasks, which the column `column` numbers from 0."""
    column: str = "task"
    """Column of the data that tells the tasks apart."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", as_task(self.task))
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise InputError(f"PerTask.count = {self.count!r}: expected a whole number of at least 1")
        if objectives_of(self.task):
            raise InputError(f"PerTask: {type(self.task).__name__} has several objectives; expected a task with one")

    def __getattr__(self, name: str) -> Any:
        """Gives all else as the task does: inputs, target, monitor, predictions."""
        if name.startswith("__") or name == "task":
            raise AttributeError(name)
        return getattr(self.task, name)

    @property
    def metrics(self) -> Mapping[str, MetricSpec]:
        """The specs of the task, and those of its metrics on each of the tasks."""
        own = dict(getattr(self.task, "metrics", {}))
        each = {f"{name}_{number}": own[name] for name in own if name != "loss" for number in range(self.count)}
        return {**own, **each}

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """The loss and metrics of `task` over all rows, and each metric over the rows of each task alone."""
        loss, metrics = self.task(outputs, batch)
        each: Metrics = {}
        for number in range(self.count):
            weight = jnp.where(batch[self.column] == number, batch["weight"], 0)
            _, of_task = self.task(outputs, {**batch, "weight": weight})
            each |= {f"{name}_{number}": mean for name, mean in of_task.items()}
        return loss, {**metrics, **each}
