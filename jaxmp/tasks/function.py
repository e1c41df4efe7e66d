"""`FunctionTask`: a task that is one function of outputs and batch."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmp.data.transforms import function_name
from jaxmp.errors import InputError
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics
from jaxmp.trees import upcast


@dataclasses.dataclass(frozen=True)
class FunctionTask(Task):
    """A task of one function. An `Experiment` makes one of a function that it is given as its task:

    def squared_error(outputs, batch):
        return jnp.sum((outputs - batch["y"]) ** 2, axis=-1)

    Experiment(model, data, task=squared_error)                                 # of the column "x"
    Experiment(model, data, task=FunctionTask(squared_error, ("image",)))       # of another one
    """

    function: Callable[..., Any]
    """Function of (outputs, batch) that returns the loss of each row, shape (rows,), and, if it likes, a dict of
    metrics beside it."""
    inputs: tuple[str, ...] = ("x",)
    """keys of the batch that the model is called with"""

    def __post_init__(self) -> None:
        """Checks that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """The loss and the metrics that the function returns: each a `Mean`, or the values of the rows, (rows,).

        Outputs in half precision are given to the function in float32. Raises InputError for what is neither.
        """
        returned = self.function(jax.tree.map(upcast, outputs), batch)
        loss: Any = returned
        metrics: Mapping[str, Any] = {}
        if type(returned) is tuple and len(returned) == 2 and isinstance(returned[1], Mapping):
            loss, metrics = returned
        return self._mean(loss, "the loss", batch), {name: self._mean(of, name, batch) for name, of in metrics.items()}

    def _mean(self, values: Any, name: Any, batch: Batch) -> Mean:
        if isinstance(values, Mean):
            return values
        rows, call = batch["weight"].shape, f"{function_name(self.function)}(outputs, batch)"
        if not hasattr(values, "shape"):
            raise InputError(f"{call} returned a {type(values).__name__} as {name}; expected {_EXPECTED}")
        if values.shape != rows:
            why = ", which would count the rows that fill up the last batch" if not values.shape else ""
            raise InputError(
                f"{call} returned an array of shape {values.shape} as {name}{why}; expected one number a row, "
                f"{rows}: {_EXPECTED}"
            )
        return Mean.of(values, batch["weight"])


_EXPECTED = "the loss of each row, (rows,), or (losses, {name: values of each row}); a jaxmp.Mean for another weighting"


def as_task(task: Any) -> Any:
    """A `FunctionTask` of a function; any other task as it is."""
    return FunctionTask(task) if isinstance(task, types.FunctionType | functools.partial) else task
