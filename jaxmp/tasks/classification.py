"""`Classification`: one of several classes an example."""

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
from jaxmp.training.batch import EXAMPLE_INDEX, Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec

MIXED_IN, SHARE = "label of the row mixed in", "share of the row itself"
"""keys of a mixed batch"""


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Softmax cross-entropy and accuracy of one of several classes an example, from logits (examples, ..., classes)."""

    inputs: tuple[str, ...] = ("image",)
    """keys of the batch that the model is called with"""
    target: str = "label"
    """key of the integer labels, (examples, ...), from 0 on"""
    label_smoothing: float = 0.0
    """share of the target that is spread evenly over all classes"""
    class_weights: tuple[float, ...] = ()
    """weight of the loss of each class, of its label; the loss is then a weighted mean; (): all are 1"""
    mixup: float = 0.0
    """parameter alpha of mixup, 0.2, say: in training, the inputs of two rows are mixed, by a share drawn from
    Beta(alpha, alpha), and so are their losses; 0: there is no mixing"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "accuracy": MetricSpec("max", "%"),
    }
    monitor = "accuracy"

    def __post_init__(self) -> None:
        """Checks the range of the numbers, and that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing={self.label_smoothing}: expected 0 <= label_smoothing < 1")
        if not 0 <= self.mixup < math.inf:
            raise InputError(f"mixup={self.mixup}: expected 0 or more")
        weights = tuple(map(float, self.class_weights))
        object.__setattr__(self, "class_weights", weights)
        if not all(0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
            raise InputError(f"class_weights={weights}: expected numbers of at least 0, not all 0")

    def change(self, batch: Batch, key: jax.Array, *, train: bool) -> Batch:
        """Mixes, in training, the inputs of each two neighbours in the batch, if `mixup` is above 0.

        Rows come in random order, so that neighbours are random pairs; and which are depends on no number of devices.

        Source: H. Zhang et al., mixup, ICLR 2018, https://arxiv.org/abs/1710.09412, section 2.

        Raises: InputError if an input is of whole numbers, or the rows of a replica and microbatch are odd in number.
        """
        if not train or not self.mixup:
            return batch
        rows = len(batch["weight"])
        if rows % 2:
            raise InputError(
                f"task.mixup = {self.mixup} mixes pairs of rows: a device has {rows} rows of a microbatch; expected an "
                "even number: another data.batch_size"
            )
        for name in self.inputs:
            if not jnp.issubdtype(batch[name].dtype, jnp.floating):
                raise InputError(
                    f"task.mixup mixes {name!r}, which is {batch[name].dtype}; expected floats, images, say"
                )
        index = batch.get(EXAMPLE_INDEX)
        pairs = (jnp.arange(rows) if index is None else index)[::2] // 2
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, pairs)
        share = jnp.repeat(
            jax.vmap(lambda key: jax.random.beta(key, self.mixup, self.mixup, dtype=jnp.float32))(keys), 2
        )
        mixed = {name: _mixed(batch[name], share) for name in self.inputs}
        return {**batch, **mixed, MIXED_IN: _neighbour(batch[self.target]), SHARE: share}

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy in nats, and `accuracy`, a share from 0 to 1; of mixed rows, for the larger label."""
        self.check(outputs, batch)
        logits, labels = outputs.astype(jnp.float32), batch[self.target]
        # Each of a row's labels has the weight of its row.
        weight = jax.lax.broadcast_in_dim(batch["weight"], labels.shape, (0,))
        if SHARE not in batch:
            losses, of_label = self._loss(logits, labels)
            loss = Mean.of(losses, weight * of_label) if self.class_weights else Mean.of(losses, weight)
            return loss, {"accuracy": Mean.of(jnp.argmax(logits, axis=-1) == labels, weight)}
        other, share = batch[MIXED_IN], jax.lax.broadcast_in_dim(batch[SHARE], labels.shape, (0,))
        (own_losses, own), (other_losses, others) = self._loss(logits, labels), self._loss(logits, other)
        own_part, other_part = (
            Mean.of(own_losses, weight * share * own),
            Mean.of(other_losses, weight * (1 - share) * others),
        )
        loss = Mean(own_part.total + other_part.total, own_part.weight + other_part.weight)
        correct = jnp.argmax(logits, axis=-1) == jnp.where(share >= 0.5, labels, other)
        return loss, {"accuracy": Mean.of(correct, weight)}

    def _loss(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        """The cross-entropy of each label, and the weight of its class."""
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        return losses, jnp.asarray(self.class_weights, jnp.float32)[labels] if self.class_weights else 1.0

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
        if self.class_weights and len(self.class_weights) != outputs.shape[-1]:
            raise InputError(
                f"class_weights={self.class_weights}: {len(self.class_weights)} weights; expected one for each of the "
                f"model's {outputs.shape[-1]} outputs"
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


def _neighbour(x: jax.Array) -> jax.Array:
    """The rows of `x`, each two neighbours exchanged."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _mixed(x: jax.Array, share: jax.Array) -> jax.Array:
    """Each row times its share, and its neighbour times the rest, in the dtype of `x`; computed in float32."""
    share = share.reshape(-1, *[1] * (x.ndim - 1))
    return (share * x + (1 - share) * _neighbour(x)).astype(x.dtype)
