"""`Classification`: one of several classes an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.data.source import Source
from jaxmp.errors import InputError
from jaxmp.modules.model import as_model
from jaxmp.tasks.loss import one_row
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics


@dataclasses.dataclass(frozen=True)
class Classification:
    """One of several classes an example: softmax cross-entropy and accuracy from logits (examples, classes)."""

    inputs: tuple[str, ...] = ("image",)
    """keys of the batch that the model is called with"""
    target: str = "label"
    """key of the integer labels, (examples,), from 0 on"""
    label_smoothing: float = 0.0
    """share of the target that is spread evenly over all classes"""

    def __post_init__(self) -> None:
        """Checks the range of the smoothing, and that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing={self.label_smoothing}: expected 0 <= label_smoothing < 1")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy in nats, and `accuracy`."""
        logits, labels = outputs.astype(jnp.float32), batch[self.target]
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
            raise InputError(
                f"{self.target!r} is {labels.dtype}{list(labels.shape)} beside logits of {list(logits.shape)}; "
                f"expected whole numbers, one an example: {list(logits.shape[:-1])}"
            )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        correct = jnp.argmax(logits, axis=-1) == labels
        return Mean.of(losses, batch["weight"]), {"accuracy": Mean.of(correct, batch["weight"])}


def check_labels(model: Any, task: Task, batch: Any, splits: Mapping[str, Source]) -> None:
    """Refuses labels of a `Classification` that are none of the model's classes, which no loss shows for what they are.

    They are looked at where they are at hand, in a column in memory or memory-mapped; no other column is read.

    Args:
      model: as for `make_loss`.
      task: one that makes its loss of labels in another way than `Classification` is not looked at.
      batch: arrays or `ShapeDtypeStruct`s that the model can be called with.
      splits: sources of rows by the name of their split, for the message.

    Raises: InputError with the least and the greatest label.
    """
    if not isinstance(task, Classification) or type(task).__call__ is not Classification.__call__:
        return

    def outputs(key: jax.Array) -> Any:
        inputs = one_row(task, batch)
        params, model_state = as_model(model).init(key, *inputs)
        return as_model(model).apply(params, model_state, *inputs)[0]

    classes = jax.eval_shape(outputs, jax.random.key(0)).shape[-1]
    for split, source in splits.items():
        labels = getattr(source, "columns", {}).get(task.target)
        if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or not labels.size:
            continue
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= classes:
            raise InputError(
                f"{task.target!r} of the {split} split: labels run from {least} to {most}; expected 0 to "
                f"{classes - 1}, one for each of the model's {classes} outputs"
            )
