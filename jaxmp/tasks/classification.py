"""`Classification`: one of several classes an example."""

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
class Classification(Task):
    """Softmax cross-entropy and accuracy of one of several classes an example, from logits (examples, ..., classes)."""

    inputs: tuple[str, ...] = ("image",)
    """keys of the batch that the model is called with"""
    target: str = "label"
    """key of the integer labels, (examples, ...), from 0 on"""
    label_smoothing: float = 0.0
    """share of the target that is spread evenly over all classes"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "accuracy": MetricSpec("max", "%"),
    }
    monitor = "accuracy"

    def __post_init__(self) -> None:
        """Checks the range of the smoothing, and that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing={self.label_smoothing}: expected 0 <= label_smoothing < 1")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy in nats, and `accuracy`, a share from 0 to 1."""
        self.check(outputs, batch)
        logits, labels = outputs.astype(jnp.float32), batch[self.target]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        correct = jnp.argmax(logits, axis=-1) == labels
        # Each of a row's labels has the weight of its row.
        weight = jax.lax.broadcast_in_dim(batch["weight"], labels.shape, (0,))
        return Mean.of(losses, weight), {"accuracy": Mean.of(correct, weight)}

    def predictions(self, outputs: jax.Array) -> dict[str, jax.Array]:
        """`prediction`, the class of the largest logit, int32; its `probability`, float32; and the logits as `output`.

        Args:
          outputs: logits (examples, ..., classes); the others are (examples, ...).
        """
        probabilities = jax.nn.softmax(outputs.astype(jnp.float32), axis=-1)
        likeliest = jnp.argmax(outputs, axis=-1).astype(jnp.int32)
        return {"prediction": likeliest, "probability": jnp.max(probabilities, axis=-1), "output": outputs}

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError unless the labels are integers, one for each row of logits."""
        labels = batch[self.target]
        if not hasattr(outputs, "shape"):
            raise InputError(f"the model's outputs are of type {type(outputs).__name__}; expected one array of logits")
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != outputs.shape[:-1]:
            raise InputError(
                f"{self.target!r} is {labels.dtype}{list(labels.shape)} beside logits of {list(outputs.shape)}; "
                f"expected whole numbers, one for each vector of logits: {list(outputs.shape[:-1])}"
            )

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a label is outside [0, classes); cross-entropy would accept it silently.

        A subclass with a `__call__` of its own may take other labels, and is not checked.
        """
        labels = columns.get(self.target)
        if type(self).__call__ is not Classification.__call__:
            return
        if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or not labels.size:
            return
        least, most, classes = int(labels.min()), int(labels.max()), outputs.shape[-1]
        if least < 0 or most >= classes:
            raise InputError(
                f"{self.target!r} of the {split} split: labels run from {least} to {most}; expected 0 to "
                f"{classes - 1}, one for each of the model's {classes} outputs"
            )
