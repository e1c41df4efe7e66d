"""`NextToken`: causal language modelling, with its perplexity and bits a byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import ExpOfMean, Mean, Metrics, MetricSpec


@dataclasses.dataclass(frozen=True)
class NextToken(Task):
    """Softmax cross-entropy of the next token, from logits (rows, length, vocabulary).

    All means are over the targets that count, so that neither padding nor how rows make up batches changes them.
    """

    inputs: tuple[str, ...] = ("tokens",)
    """keys of the batch that the model is called with"""
    target: str = "next_tokens"
    """key of the tokens that follow, int (rows, length), from 0 on"""
    padding: int = -1
    """target that does not count"""
    byte_counts: str | None = None
    """key of the number of bytes of each target, int (rows, length); None: each is one byte"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "perplexity": MetricSpec("min", digits=2),
        "bits_per_byte": MetricSpec("min", "bits", digits=3),
    }

    def __post_init__(self) -> None:
        """Checks that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy a token in nats; `perplexity`, its exponential; `bits_per_byte` of the targets' text."""
        self.check(outputs, batch)
        targets = batch[self.target]
        counts = targets != self.padding
        losses = optax.softmax_cross_entropy_with_integer_labels(
            outputs.astype(jnp.float32), jnp.where(counts, targets, 0)
        )
        weight = jax.lax.broadcast_in_dim(batch["weight"], targets.shape, (0,)) * counts
        loss = Mean.of(losses, weight)
        byte_counts = jnp.ones_like(targets) if self.byte_counts is None else batch[self.byte_counts]
        of_bytes = jnp.sum(weight * jnp.where(counts, byte_counts, 0))
        bits = Mean(loss.total / math.log(2), of_bytes)
        return loss, {"perplexity": ExpOfMean(*loss), "bits_per_byte": bits}

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
        """Raises InputError if a target or an input token is outside [0, vocabulary); no loss would show it."""
        vocabulary = outputs.shape[-1]
        for name in (self.target, *self.inputs):
            tokens = columns.get(name)
            if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu" or not tokens.size:
                continue
            least, most = int(tokens.min()), int(tokens.max())
            if most >= vocabulary or (least < 0 and not (name == self.target and self._is_padded(tokens))):
                padding = f", and {self.padding} for padding" if name == self.target else ""
                raise InputError(
                    f"{name!r} of the {split} split: tokens run from {least} to {most}; expected 0 to "
                    f"{vocabulary - 1}, one for each of the model's {vocabulary} outputs{padding}"
                )

    def _is_padded(self, tokens: np.ndarray) -> bool:
        return not ((tokens < 0) & (tokens != self.padding)).any()
