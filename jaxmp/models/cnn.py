"""`CNN`: a small convolutional network for image classification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxmp.errors import InputError
from jaxmp.models.sizes import check_rates, check_sizes


class CNN(nn.Module):
    """A convolutional network: blocks of convolution, activation and 2x2 max-pooling, then Dense layers to the logits.

    Raises:
      InputError: a size is below 1, `dropout` is not in [0, 1), or, when called, the image is too small for the blocks.
    """

    channels: tuple[int, ...] = (32, 64)
    """Number of channels of each block; each block halves height and width, rounded down."""
    kernel: int = 3
    """Height and width of the convolution kernels; padding keeps the size of the image."""
    dense: tuple[int, ...] = ()
    """Width of each hidden Dense layer."""
    classes: int = 10
    """Number of logits."""
    dropout: float = 0.0
    """Dropout rate after each hidden Dense layer, during training."""
    activation: Callable[..., Any] = nn.relu
    """Activation function after each convolution and hidden Dense layer."""

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "kernel", "dense", "classes")
        check_rates(self, "dropout")
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        blocks, size = len(self.channels), image.shape[1:3]
        if min(size) < 2**blocks:
            most = min(size).bit_length() - 1
            raise InputError(
                f"CNN: channels={self.channels} would halve an image of {size} {blocks} times; "
                f"expected at most {most} blocks"
            )
        x = image
        for channels in self.channels:
            x = self.activation(nn.Conv(channels, (self.kernel, self.kernel))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.dense:
            x = self.activation(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)
