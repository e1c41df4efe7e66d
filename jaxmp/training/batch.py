"""What a train step is given and differentiates: a batch, and a loss function of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxmp.training.metrics import Metrics

Batch = dict[str, jax.Array]
"""Arrays with the examples along axis 0, and `"weight"`, float32 (examples,): 0 for a row that only fills the batch."""

EXAMPLE_INDEX = "place in the batch"
"""the place of each row in the whole, int32 (examples,): of a part of a batch, a replica's or a microbatch, in the
batch; of a batch of an evaluation, in all rows that are evaluated"""

LossFn = Callable[[Any, Any, Batch, Any], tuple[jax.Array, tuple[jax.Array, Metrics, Any]]]
"""`loss_fn(params, model_state, batch, key) -> (loss_sum, (weight, metrics, model_state))`.

The metrics have any names but `loss`. A sum and a weight rather than a mean, both float32 scalars: masked losses, a
smaller last batch and replicas then agree to rounding. The key is the same for all parts of a batch: fold
`batch[PLACE]` in, where there is one, for noise that differs between them. Where a batch comes in microbatches, the
weight must not depend on the parameters."""
