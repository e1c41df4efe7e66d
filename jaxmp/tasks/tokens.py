"""`TokenClassification`: a class for each token; and `PerToken`, the base of all tasks with a target for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec


class TokenLosses(NamedTuple):
    """Cross-entropies of a batch's targets, each of shape (rows, length)."""

    loss: jax.Array
    """cross-entropy in nats, float32"""
    weight: jax.Array
    """weight of the row, or 0 where the target does not count, float32"""
    target: jax.Array
    """target, or 0 where it does not count"""


@dataclasses.dataclass(frozen=True)
class PerToken(Task):
    """The base of tasks with a target for each token, and logits (rows, length, classes)."""

    inputs: tuple[str, ...] = ("tokens", "mask")
    """keys of the batch that the model is called with"""
    target: str = "targets"
    """key of the targets, int (rows, length), from 0 on"""
    padding: int = -1
    """target that does not count"""

    def __post_init__(self) -> None:
        """Checks that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")

    def losses(self, outputs: jax.Array, batch: Batch) -> TokenLosses:
        """The softmax cross-entropy of each target, in float32. Raises InputError as `check` does."""
        self.check(outputs, batch)
        targets = batch[self.target].astype(jnp.int32)  # of uint8, a padding of -1 would be a class
        counts = targets != self.padding
        targets = jnp.where(counts, targets, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)
        weight = jax.lax.broadcast_in_dim(batch["weight"], targets.shape, (0,)) * counts
        return TokenLosses(losses, weight, targets)

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError unless there is a whole number, the target, for each vector of logits."""
        targets = batch[self.target]
        if not hasattr(outputs, "shape"):
            raise InputError(f"the model's outputs are of type {type(outputs).__name__}; expected one array of logits")
        if not jnp.issubdtype(targets.dtype, jnp.integer) or targets.shape != outputs.shape[:-1]:
            raise InputError(
                f"{self.target!r} is {targets.dtype}{list(targets.shape)} beside logits of {list(outputs.shape)}; "
                f"expected whole numbers, one for each vector of logits: {list(outputs.shape[:-1])}"
            )

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a target is outside [0, classes), and is not `padding`; no loss would show it."""
        self.check_range(self.target, outputs.shape[-1], columns, split)

    def check_range(self, name: str, classes: int, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a column of whole numbers, if it is at hand, has one outside [0, classes)."""
        tokens = columns.get(name)
        if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu":
            return
        if name == self.target:
            tokens = tokens[tokens != self.padding]
        if not tokens.size:
            return
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= classes:
            padding = f", and {self.padding} for padding" if name == self.target else ""
            raise InputError(
                f"{name!r} of the {split} split: tokens run from {least} to {most}; expected 0 to {classes - 1}, one "
                f"for each of the model's {classes} outputs{padding}"
            )


@dataclasses.dataclass(frozen=True)
class TokenClassification(PerToken):
    """Softmax cross-entropy and accuracy of a class for each token, from logits (rows, length, classes).

    All means are over the tokens that count, so that neither padding nor how rows make up batches changes them.
    """

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "accuracy": MetricSpec("max", "%"),
    }
    monitor = "accuracy"

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy a token in nats, and `accuracy`, a share from 0 to 1."""
        losses = self.losses(outputs, batch)
        correct = jnp.argmax(outputs, axis=-1) == losses.target
        return Mean.of(losses.loss, losses.weight), {"accuracy": Mean.of(correct, losses.weight)}

    def predictions(self, outputs: jax.Array) -> dict[str, jax.Array]:
        """`prediction`, the class of the largest logit of each token, int32 (rows, length); the logits as `output`."""
        return {"prediction": jnp.argmax(outputs, axis=-1).astype(jnp.int32), "output": outputs}
