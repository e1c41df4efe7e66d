"""`VGG`: a deep network of 3x3 convolutions for image classification.

Source: K. Simonyan and A. Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015,
https://arxiv.org/abs/1409.1556, table 1.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmp.errors import InputError
from jaxmp.models.sizes import check_rates, check_sizes


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each ended by 2x2 max-pooling, then Dense layers: `VGG()` is VGG-16 (D in the table).

    Raises:
      InputError: a size is below 1, `dropout` is not in [0, 1), there are not as many `blocks` as `channels`, or, when
        called, the image is too small for the stages.
    """

    blocks: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Number of convolutions of each stage; the paper's A is (1, 1, 2, 2, 2), its E (2, 2, 4, 4, 4)."""
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Number of channels of each stage; each halves height and width, rounded down."""
    dense: tuple[int, ...] = (4096, 4096)
    """Width of each hidden Dense layer; for CIFAR-10's images () is usual."""
    classes: int = 1000
    """Number of logits."""
    dropout: float = 0.5
    """Dropout rate after each hidden Dense layer, during training."""
    batch_norm: bool = False
    """Whether a batch normalisation follows each convolution, which the paper did not have yet."""

    def __post_init__(self) -> None:
        check_sizes(self, "blocks", "channels", "dense", "classes")
        check_rates(self, "dropout")
        if len(self.blocks) != len(self.channels):
            raise InputError(f"VGG: blocks={self.blocks} beside channels={self.channels}: expected one of each a stage")
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        stages, size = len(self.channels), image.shape[1:3]
        if min(size) < 2**stages:
            raise InputError(
                f"VGG: {stages} stages would halve an image of {size} {stages} times; expected at most "
                f"{min(size).bit_length() - 1} stages"
            )
        he = nn.initializers.he_normal()
        x = image
        for count, channels in zip(self.blocks, self.channels, strict=True):
            for _ in range(count):
                x = nn.Conv(channels, (3, 3), use_bias=not self.batch_norm, kernel_init=he)(x)
                if self.batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.dense:
            x = nn.relu(nn.Dense(width, kernel_init=he)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)
