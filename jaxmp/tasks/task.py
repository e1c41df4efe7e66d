"""Tasks: how a batch feeds a model, and how its outputs become a loss and metrics."""

from __future__ import annotations

from typing import Any, Protocol

from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics


class Task(Protocol):
    """What `make_loss` wants to know. A task of one's own needs these two and nothing else."""

    inputs: tuple[str, ...]
    """keys of the batch that the model is called with, in order"""

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """The loss and further metrics, in float32 whatever dtype the outputs have."""
        ...
