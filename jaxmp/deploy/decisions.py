"""What a task decides by outputs, the labels that its decisions are compared with, and which of both count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmp.tasks.task import predictions


class Labels(NamedTuple):
    """The labels of a batch, one for each decision."""

    values: np.ndarray
    """labels, of the shape of the decisions"""
    counts: np.ndarray
    """which of them count, bool, of the same shape: all but the task's padding"""


def decisions(task: Any, outputs: Any) -> np.ndarray | None:
    """What the task decides by outputs: its predictions that are whole numbers or bools; None if there are none."""
    found = [np.asarray(value) for value in predictions(task, outputs).values()]
    return next((value for value in found if value.dtype.kind in "iub"), None)


def targets_of(experiment: Any) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """A function that makes the task's target from a batch, as evaluation does, by its name; {} if there is none.

    The batch is after the host transforms, and not prepared yet: the target may be what a transform on the device made.
    """
    name, prepared = getattr(experiment.task, "target", None), experiment.data.prepare(train=False)

    @jax.jit
    def target(batch: dict[str, Any]) -> dict[str, jax.Array]:
        return {column: of for column, of in prepared(batch, None).items() if column == name}

    return lambda batch: {column: np.asarray(of) for column, of in target(dict(batch)).items()}


def labels_of(task: Any, batch: Mapping[str, Any], decided: np.ndarray | None) -> Labels | None:
    """The labels in a batch that decisions are compared with; None if the data have no label for each decision.

    Of a batch only the target is read: what `targets_of` makes will do.
    Decisions that hold the task's padding are sequences, as those of CTC, of which no place has a label of its own.
    """
    labels = batch.get(getattr(task, "target", ""))
    if labels is None or decided is None or labels.shape != decided.shape or labels.dtype.kind not in "iubf":
        return None
    if decided.dtype == bool:
        labels = labels != 0
    elif labels.dtype.kind == "f":
        return None
    padding = getattr(task, "padding", None)
    if padding is None:
        return Labels(labels, np.ones(labels.shape, bool))
    if padding < 0 and np.any(decided == padding):
        return None
    return Labels(labels, np.asarray(labels != padding))


def compared(task: Any, batch: Mapping[str, Any], decided: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Which decisions of two models on a batch are compared, bool, of their shape: those that the run evaluates.

    They are those whose label counts. Of sequences that are filled up with padding, the places that only fill up both
    are left out.
    """
    labels, padding = labels_of(task, batch, decided), getattr(task, "padding", None)
    if labels is not None:
        return labels.counts
    if padding is None or padding >= 0:
        return np.ones(decided.shape, bool)
    return np.asarray((decided != padding) | (reference != padding))
