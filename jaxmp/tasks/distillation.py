"""`Distillation`: classification by the labels and by the outputs of a teacher.

Source: G. Hinton, O. Vinyals and J. Dean, Distilling the Knowledge in a Neural Network, 2015,
https://arxiv.org/abs/1503.02531, section 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.tasks.classification import Classification
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec


@dataclasses.dataclass(frozen=True)
class Distillation(Classification):
    """Cross-entropy with the labels, and the divergence of the student's softened classes from those of a teacher.

    The loss is (1 - w) CE + w T^2 KL(teacher at T | student at T), where w is `teacher_weight` and T the temperature:
    both have gradients of one size. No gradient goes into the teacher.

    Raises:
      InputError: a value is not one of those below; before the first step, the teacher has other classes.
    """

    teacher: Any = None
    """`batch -> logits (examples, ..., classes)`: of a run, `jaxmp.runs.teacher.Teacher(run)`"""
    temperature: float = 4.0
    """what logits are divided by before the softmax, of teacher and student"""
    teacher_weight: float = 0.9
    """share of the teacher in the loss; at 0 there are the labels alone, and the teacher is not called"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = Classification.metrics

    def __post_init__(self) -> None:
        """Checks the ranges, and that there is a teacher."""
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}: expected a positive number")
        if not 0 <= self.teacher_weight <= 1:
            raise InputError(f"teacher_weight={self.teacher_weight}: expected 0 <= teacher_weight <= 1")
        if self.class_weights:
            raise InputError(f"class_weights={self.class_weights}: a teacher has no labels to weigh; expected none")
        if not callable(self.teacher):
            raise InputError(f"teacher={self.teacher!r:.60}: expected a function of a batch, such as Teacher('RUN')")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """The loss in nats, and `accuracy`; with a teacher also `cross_entropy` and `agreement`, its share of classes.

        `agreement` is the share of examples in which student and teacher give the same class.
        """
        hard, metrics = super().__call__(outputs, batch)
        if not self.teacher_weight:
            return hard, metrics
        weight = jax.lax.broadcast_in_dim(batch["weight"], outputs.shape[:-1], (0,))
        given = self._teacher_logits(outputs, batch)
        logits = outputs.astype(jnp.float32)
        soft, softened = (jax.nn.log_softmax(x / self.temperature) for x in (given, logits))
        # Where the teacher is sure, p log p is 0, and its log may be -inf.
        divergence = jnp.sum(jnp.where(soft > -jnp.inf, jnp.exp(soft) * (soft - softened), 0), axis=-1)
        total = self.temperature**2 * Mean.of(divergence, weight).total
        loss = (1 - self.teacher_weight) * hard.total + self.teacher_weight * total
        agree = jnp.argmax(logits, axis=-1) == jnp.argmax(given, axis=-1)
        return Mean(loss, hard.weight), {
            **metrics,
            "cross_entropy": hard,
            "agreement": Mean.of(agree, weight),
        }

    def _teacher_logits(self, outputs: Any, batch: Batch) -> jax.Array:
        given = jax.lax.stop_gradient(self.teacher(batch))
        if getattr(given, "shape", None) != outputs.shape:
            raise InputError(
                f"the teacher's outputs are {list(getattr(given, 'shape', ()))} beside logits of "
                f"{list(outputs.shape)}; expected a teacher of the same classes"
            )
        return given.astype(jnp.float32)

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a label is outside [0, classes); cross-entropy would accept it silently."""
        Classification(self.inputs, self.target).check_rows(outputs, columns, split)
