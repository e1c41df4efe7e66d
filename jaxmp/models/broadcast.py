"""`Broadcast`: a learned array that all examples share, whose gradient is summed in float32."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Broadcast(nn.Module):
    """A learned array, broadcast first and then cast: position embeddings, a class token, the bias of tied logits.

    Cast first, its gradient would be summed over the batch in half (trap T2).
    """

    shape: tuple[int, ...]
    """shape of the array"""
    array_init: Any = nn.initializers.zeros
    """its initialiser"""

    @nn.compact
    def __call__(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The array (..., *self.shape), broadcast to `shape` in its own dtype, in `dtype`."""
        self.param("array", self.array_init, self.shape)
        # As it is kept: what `param` returns is cast already, under a policy.
        array = nn.unbox(self.get_variable("params", "array"))
        return jnp.broadcast_to(array, shape).astype(dtype)
