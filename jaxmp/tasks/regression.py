"""`Regression`: real numbers, by their squared error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Mean squared error of outputs (rows, ...) from targets of the same shape, and their mean absolute error."""

    inputs: tuple[str, ...] = ("x",)
    """keys of the batch that the model is called with"""
    target: str = "y"
    """key of the numbers that the outputs should be, (rows, ...)"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min"),
        "absolute_error": MetricSpec("min"),
    }

    def __post_init__(self) -> None:
        """Checks that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """The squared error and `absolute_error`, each the mean over the numbers of a row, then over rows."""
        self.check(outputs, batch)
        error = outputs.astype(jnp.float32) - batch[self.target].astype(jnp.float32)
        error = error.reshape(error.shape[0], -1)
        weight = batch["weight"]
        metrics = {"absolute_error": Mean.of(jnp.mean(jnp.abs(error), axis=1), weight)}
        return Mean.of(jnp.mean(jnp.square(error), axis=1), weight), metrics

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError unless outputs and targets have the same shape; others would be broadcast."""
        target = batch[self.target]
        if not hasattr(outputs, "shape"):
            raise InputError(f"the model's outputs are of type {type(outputs).__name__}; expected one array of numbers")
        if target.shape != outputs.shape:
            last = outputs.shape == (*target.shape, 1)
            hint = f"; give the targets an axis of 1 in a transform, {self.target}[None]" if last else ""
            raise InputError(
                f"{self.target!r} is {target.dtype}{list(target.shape)} beside outputs of {list(outputs.shape)}; "
                f"expected numbers of the same shape{hint}"
            )
