"""`MLP`: a multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxmp.models.sizes import check_rates, check_sizes


class MLP(nn.Module):
    """A multi-layer perceptron: hidden Dense layers, each followed by an activation, and a Dense layer to the logits.

    Raises:
      InputError: a size is below 1, or `dropout` is not in [0, 1).
    """

    features: tuple[int, ...] = (128,)
    """Width of each hidden layer."""
    classes: int = 10
    """Number of logits."""
    dropout: float = 0.0
    """Dropout rate after each hidden layer, during training."""
    activation: Callable[..., Any] = nn.relu
    """Activation function after each hidden layer."""

    def __post_init__(self) -> None:
        check_sizes(self, "features", "classes")
        check_rates(self, "dropout")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps inputs (batch, ...), flattened to (batch, features), to logits (batch, classes)."""
        x = inputs.reshape(inputs.shape[0], -1)
        for width in self.features:
            x = self.activation(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)
