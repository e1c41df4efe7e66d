"""Metrics as states that merge by addition: over steps, batches and replicas, and exactly so over padded rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
    """A weighted mean that is not divided yet."""

    total: jax.Array
    """weighted sum of the values, float32 scalar"""
    weight: jax.Array
    """sum of the weights, float32 scalar"""

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> Mean:
        """The mean of `values` under `weights`, of one shape. A value of weight 0 counts for nothing, even NaN.

        (Not so in gradients: 0 times the NaN that a row of weight 0 makes on its way through a model is NaN.)
        """
        weights = weights.astype(jnp.float32)
        values = jnp.where(weights != 0, values.astype(jnp.float32), 0)
        return cls(total=jnp.sum(values * weights), weight=jnp.sum(weights))

    def compute(self) -> jax.Array:
        """The mean, float32 scalar; NaN where nothing was counted."""
        return self.total / self.weight


Metrics = dict[str, Mean]
"""What a step or an evaluation measured, by name."""


def merge(first: Metrics, second: Metrics) -> Metrics:
    """The metrics of two sets of examples together."""
    return jax.tree.map(jnp.add, first, second)


def zeros_like(metrics: Any) -> Metrics:
    """Metrics like `metrics`, arrays or `jax.ShapeDtypeStruct`s, that have counted nothing; on the host."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metrics)


def compute(metrics: Metrics) -> dict[str, float]:
    """The metrics as Python floats, computed in float64. Waits for the device."""
    values = jax.device_get(metrics)
    return {
        name: float(mean.total) / float(mean.weight) if mean.weight else float("nan") for name, mean in values.items()
    }
