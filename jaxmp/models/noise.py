"""`Noise`: random numbers for each row of a batch, the latent variables of a model that makes images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Noise(nn.Module):
    """Draws random numbers for each row of a batch from the random stream "noise", in float32 under every policy.

    The row at index i draws from `fold_in(key, i)`, so that more rows begin with the same numbers. In training
    `jaxmp.modules.dropout` gives the indices in the whole batch: the numbers depend neither on the number of devices
    nor on that of microbatches. In evaluation it gives those in the whole split: nor on the size of its batches.
    """

    width: int
    """number of random numbers for each row"""
    distribution: Callable[..., Any] = jax.random.normal
    """`distribution(key, shape)` draws them"""

    @nn.compact
    def __call__(self, rows: int, index: jax.Array | None = None) -> jax.Array:
        """Draws numbers (rows, width); `index`, int32 (rows,), is the index of each row, by default 0 to rows - 1."""
        index = jnp.arange(rows) if index is None else index
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self.make_rng("noise"), index)
        return jax.vmap(lambda key: self.distribution(key, (self.width,)))(keys)
