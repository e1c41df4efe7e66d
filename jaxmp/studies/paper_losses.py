"""Cross-entropies of rows for the papers on the precision of the softmax: in a dtype, or rounded to so many bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

RowLosses = Callable[[jax.Array, jax.Array], jax.Array]
"""maps logits, (rows, classes), and labels to the losses of the rows, in nats"""


def losses_in(dtype: Any) -> RowLosses:
    """Returns the softmax cross-entropy computed in a dtype of JAX."""

    def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(logits.astype(dtype))
        return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]

    return losses


def losses_of(bits: int) -> RowLosses:
    """Returns the softmax cross-entropy whose operations, and those of its gradient, are rounded to so many bits.

    Each result is rounded to `bits` significant bits, in float64 with 11 bits of exponent, so that no range is
    exceeded; a sum is rounded once. What a row's gradient is multiplied by, one over the number of rows, is no part of
    it.
    """

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, 11, bits - 1)

    def forward(logits: jax.Array, labels: jax.Array) -> Any:
        z = rounded(logits.astype(jnp.float64))
        shifted = rounded(z - jnp.max(z, axis=-1, keepdims=True))
        total = rounded(jnp.sum(rounded(jnp.exp(shifted)), axis=-1, keepdims=True))
        log_probabilities = rounded(shifted - rounded(jnp.log(total)))
        gradient = rounded(rounded(jnp.exp(log_probabilities)) - jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype))
        return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0], gradient

    @jax.custom_vjp
    def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return forward(logits, labels)[0]

    def backward(gradient: jax.Array, cotangent: jax.Array) -> Any:
        # Logits are float32, as are the model's.
        return (gradient * cotangent[:, None]).astype(jnp.float32), None

    losses.defvjp(forward, backward)
    return losses
