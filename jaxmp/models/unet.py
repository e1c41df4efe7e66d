"""`UNet`: a convolutional network that classifies each pixel of an image.

Source: O. Ronneberger, P. Fischer and T. Brox, U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI
2015, https://arxiv.org/abs/1505.04597, section 2. Its convolutions keep the size of the image, as is usual since.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.models.sizes import check_sizes


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with a batch normalisation and relu."""

    channels: int
    """number of channels of both"""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, height, width, channels)."""
        for _ in range(2):
            x = nn.Conv(self.channels, (3, 3), use_bias=False, kernel_init=nn.initializers.he_normal())(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x))
        return x


class UNet(nn.Module):
    """A path down, of double convolutions and max-pooling, and one up, which sees the results of the path down.

    Raises:
      InputError: a size is below 1, or, when called, height or width of the image is no multiple of what the levels
        halve it by.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Number of channels of each level, from the image down."""
    classes: int = 2
    """Number of logits of a pixel."""

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "classes")
        super().__post_init__()

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, height, width, classes)."""
        factor = 2 ** (len(self.channels) - 1)
        if image.shape[1] % factor or image.shape[2] % factor:
            raise InputError(
                f"UNet: an image of {image.shape[1:3]}: expected multiples of {factor}, "
                f"which channels={self.channels} halve {len(self.channels) - 1} times"
            )
        x, levels = image, []
        for index, channels in enumerate(self.channels):
            x = nn.max_pool(x, (2, 2), strides=(2, 2)) if index else x
            x = DoubleConv(channels, name=f"down_{index}")(x, train=train)
            levels.append(x)
        for index, channels in reversed(list(enumerate(self.channels[:-1]))):
            x = nn.ConvTranspose(channels, (2, 2), (2, 2), name=f"double_{index}")(x)
            x = DoubleConv(channels, name=f"up_{index}")(jnp.concatenate([levels[index], x], axis=-1), train=train)
        return nn.Conv(self.classes, (1, 1), name="head")(x)
