"""`MultiLabel`: any number of several labels an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec


@dataclasses.dataclass(frozen=True)
class MultiLabel(Task):
    """Sigmoid cross-entropy of several labels, each of which an example has or has not, from logits (examples, labels).

    A label is predicted where its logit is above 0.
    """

    inputs: tuple[str, ...] = ("image",)
    """keys of the batch that the model is called with"""
    target: str = "labels"
    """key of the labels, bool or 0 and 1, (examples, labels)"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "accuracy": MetricSpec("max", "%"),
        "exact_match": MetricSpec("max", "%"),
        "f1": MetricSpec("max", "%"),
    }
    monitor = "f1"

    def __post_init__(self) -> None:
        """Checks that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy a label in nats; `accuracy` of labels, `exact_match` of an example's labels, and `f1`.

        `f1` is that of all labels of all examples together (micro-averaged), exact over batches.
        """
        self.check(outputs, batch)
        logits, truth = outputs.astype(jnp.float32), batch[self.target] != 0
        weight, predicted = batch["weight"], logits > 0
        losses = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, truth.astype(jnp.float32)), axis=1)
        right, both = predicted == truth, jnp.sum(predicted & truth, axis=1)
        either = jnp.sum(predicted, axis=1) + jnp.sum(truth, axis=1)
        return Mean.of(losses, weight), {
            "accuracy": Mean.of(jnp.mean(right, axis=1), weight),
            "exact_match": Mean.of(jnp.all(right, axis=1), weight),
            "f1": Mean(2 * Mean.of(both, weight).total, Mean.of(either, weight).total),
        }

    def predictions(self, outputs: jax.Array) -> dict[str, jax.Array]:
        """`prediction`, whether each label is predicted, bool; its `probability`, float32; the logits as `output`.

        All are (examples, labels).
        """
        return {
            "prediction": outputs > 0,
            "probability": jax.nn.sigmoid(outputs.astype(jnp.float32)),
            "output": outputs,
        }

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError unless there is a label for each logit."""
        labels = batch[self.target]
        if not hasattr(outputs, "shape"):
            raise InputError(f"the model's outputs are of type {type(outputs).__name__}; expected one array of logits")
        if labels.shape != outputs.shape or len(labels.shape) != 2:
            raise InputError(
                f"{self.target!r} is {labels.dtype}{list(labels.shape)} beside logits of {list(outputs.shape)}; "
                "expected one label, 0 or 1, for each logit: (examples, labels)"
            )

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a label is neither 0 nor 1."""
        labels = columns.get(self.target)
        if not isinstance(labels, np.ndarray) or not labels.size or labels.dtype.kind not in "iuf":
            return
        other = labels[(labels != 0) & (labels != 1)]
        if other.size:
            raise InputError(f"{self.target!r} of the {split} split: a label is {other[0]}; expected 0 or 1")
