"""`CTC`: connectionist temporal classification, sequences of labels from longer sequences of steps."""

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
class CTC(Task):
    """Connectionist temporal classification: the likelihood of labels, summed over all places they may have.

    The model returns `(logits, steps)`, as `jaxmp.models.rnn.SequenceLabeller` does: logits (rows, steps, labels + 1),
    of which the last is the blank, and how many steps of each row count, int (rows,).

    Source: A. Graves, S. Fernandez, F. Gomez and J. Schmidhuber, Connectionist temporal classification, ICML 2006,
    https://doi.org/10.1145/1143844.1143891; the label error rate is that of its section 2.1, summed over rows.
    """

    inputs: tuple[str, ...] = ("features", "frames")
    """keys of the batch that the model is called with"""
    target: str = "labels"
    """key of the labels, int (rows, longest), from 0 on, each row filled up at its end with `padding`"""
    padding: int = -1
    """label that does not count"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats", digits=3),
        "label_error_rate": MetricSpec("min", "%"),
        "too_short": MetricSpec("min", "%"),
    }
    monitor = "label_error_rate"

    def __post_init__(self) -> None:
        """Checks that `inputs` are several, and that the padding is no label."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")
        if self.padding >= 0:
            raise InputError(f"task.padding = {self.padding}: expected a number below 0, since labels begin with 0")

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean negative log-likelihood of a row's labels in nats, and metrics.

        `label_error_rate` is the number of labels to insert, delete or replace in the greedy decoding of all rows, by
        the number of labels. `too_short` is the share of rows with fewer steps than their labels take, of which no
        alignment has any likelihood: the loss leaves them out.
        """
        self.check(outputs, batch)
        logits, steps = outputs
        labels, weight = batch[self.target].astype(jnp.int32), batch["weight"]  # of uint8, -1 would be a label
        counts = labels != self.padding
        number = jnp.sum(counts, axis=1)
        labels = jnp.where(counts, labels, 0)
        losses = ctc_loss(logits, steps, labels, number)
        # Between two equal labels there is a blank.
        repeated = jnp.sum((labels[:, 1:] == labels[:, :-1]) & counts[:, 1:], axis=1)
        too_short = steps < number + repeated
        edits = edit_distance(*greedy_labels(logits, steps), labels, number)
        return Mean.of(losses, jnp.where(too_short, 0, weight)), {
            "label_error_rate": Mean(*(jnp.sum(weight * x.astype(jnp.float32)) for x in (edits, number))),
            "too_short": Mean.of(too_short, weight),
        }

    def predictions(self, outputs: Any) -> dict[str, jax.Array]:
        """`prediction`, int32 (rows, steps), the greedy decoding, filled up with `padding`; `count`, int32 (rows,)."""
        labels, kept = greedy_labels(*outputs)
        count = jnp.sum(kept, axis=1)
        order = jnp.argsort(~kept, axis=1, stable=True)
        first = jnp.arange(labels.shape[1]) < count[:, None]
        return {
            "prediction": jnp.where(first, jnp.take_along_axis(labels, order, axis=1), self.padding),
            "count": count.astype(jnp.int32),
        }

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError unless the outputs are logits and numbers of steps, and the labels whole numbers."""
        labels = batch[self.target]
        if not isinstance(outputs, tuple) or len(outputs) != 2 or not hasattr(outputs[0], "shape"):
            raise InputError(f"the model's outputs are of type {type(outputs).__name__}; expected (logits, steps)")
        (logits, steps), rows = outputs, labels.shape[0]
        if len(logits.shape) != 3 or logits.shape[0] != rows or steps.shape != (rows,) or logits.shape[2] < 2:
            raise InputError(
                f"the model's outputs are of {list(logits.shape)} and {list(steps.shape)}; expected logits (rows, "
                f"steps, labels + 1) and the number of steps (rows,), of {rows} rows"
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer) or len(labels.shape) != 2:
            raise InputError(
                f"{self.target!r} is {labels.dtype}{list(labels.shape)}; expected whole numbers (rows, longest)"
            )

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a label is none of the model's, or stands behind padding; no loss would show it."""
        labels = columns.get(self.target)
        if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 2 or not labels.size:
            return
        counts = labels != self.padding
        of_model, used = outputs[0].shape[-1] - 1, labels[counts]
        if used.size and (used.min() < 0 or used.max() >= of_model):
            raise InputError(
                f"{self.target!r} of the {split} split: labels run from {used.min()} to {used.max()}; expected 0 to "
                f"{of_model - 1}, one for each of the model's {of_model + 1} outputs but the last, the blank, and "
                f"{self.padding} for padding"
            )
        late = np.flatnonzero((counts[:, 1:] & ~counts[:, :-1]).any(1))
        if late.size:
            raise InputError(
                f"{self.target!r} of the {split} split, row {late[0]}: a label stands behind padding, "
                f"{self.padding}; expected padding at the end of a row"
            )


def ctc_loss(logits: jax.Array, steps: jax.Array, labels: jax.Array, number: jax.Array) -> jax.Array:
    """Negative log-likelihood of labels, summed over their alignments: nats, float32 (rows,). All in float32.

    Args:
      logits: (rows, steps, labels + 1), of any float dtype; the last is the blank.
      steps: number of steps that count of each row, int (rows,).
      labels: int (rows, longest), from 0 on.
      number: number of labels that count of each row, int (rows,).
    """
    logits = logits.astype(jnp.float32)
    no_step = (jnp.arange(logits.shape[1]) >= steps[:, None]).astype(jnp.float32)
    no_label = (jnp.arange(labels.shape[1]) >= number[:, None]).astype(jnp.float32)
    # optax picks the labels' log-probabilities by a product with zeros and ones, of TF32 by default on a GPU.
    with jax.default_matmul_precision("highest"):
        return optax.ctc_loss(logits, no_step, labels, no_label, blank_id=logits.shape[2] - 1)


def greedy_labels(logits: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest class of each step, int32 (rows, steps), and whether it is a label, bool (rows, steps).

    It is none where it is the blank, the last class, or that of the step before, or where the step is padding.
    """
    likeliest = jnp.argmax(logits, axis=2).astype(jnp.int32)
    before = jnp.pad(likeliest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    counts = jnp.arange(likeliest.shape[1]) < steps[:, None]
    return likeliest, counts & (likeliest != logits.shape[2] - 1) & (likeliest != before)


def edit_distance(found: jax.Array, kept: jax.Array, labels: jax.Array, number: jax.Array) -> jax.Array:
    """The least number of labels to insert, delete or replace to make one sequence of another: int32 (rows,), exact.

    Source: V. Levenshtein, Binary codes capable of correcting deletions, insertions and reversals, 1966.

    Args:
      found: one sequence of each row, int (rows, steps).
      kept: which of its entries count, bool (rows, steps).
      labels: the other, int (rows, longest).
      number: how many of its entries count, the first ones, int (rows,).
    """
    place = jnp.arange(labels.shape[1] + 1, dtype=jnp.int32)

    def step(distance: jax.Array, entry: Any) -> tuple[jax.Array, None]:
        # distance[row, n]: from the entries so far to the first n labels
        label, counts = entry
        replaced = distance[:, :-1] + (labels != label[:, None])
        best = jnp.minimum(distance + 1, jnp.pad(replaced, ((0, 0), (1, 0)), constant_values=np.iinfo(np.int32).max))
        inserted = jax.lax.cummin(best - place, axis=1) + place
        return jnp.where(counts[:, None], inserted, distance), None

    first = jnp.broadcast_to(place, (len(labels), len(place)))
    distance, _ = jax.lax.scan(step, first, (found.T, kept.T))
    return jnp.take_along_axis(distance, number[:, None], axis=1)[:, 0]
