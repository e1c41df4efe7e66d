"""`DCGAN`: a convolutional generator of images and a discriminator.

Source: A. Radford, L. Metz and S. Chintala, Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks, ICLR 2016, https://arxiv.org/abs/1511.06434, sections 3 and 4, figure 1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.models.noise import Noise
from jaxmp.models.sizes import check_sizes

NORMAL = nn.initializers.normal(0.02)
"""initialiser of all kernels (section 4)"""


class Generator(nn.Module):
    """Maps noise to images: a Dense layer, then transposed convolutions that double height and width."""

    image: tuple[int, int, int]
    """height, width and channels of the images"""
    channels: tuple[int, ...]
    """number of channels before each doubling"""
    kernel: int
    """height and width of the kernels"""

    @nn.compact
    def __call__(self, noise: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps noise (batch, noise) to images (batch, *image), from -1 to 1."""
        height, width, depth = self.image
        doublings = len(self.channels)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        size, stride = (self.kernel, self.kernel), (2, 2)
        start = (height >> doublings, width >> doublings, self.channels[0])
        x = nn.Dense(start[0] * start[1] * start[2], use_bias=False, kernel_init=NORMAL)(noise)
        x = nn.relu(norm()(x.reshape(-1, *start)))
        for channels in self.channels[1:]:
            x = nn.ConvTranspose(channels, size, stride, use_bias=False, kernel_init=NORMAL)(x)
            x = nn.relu(norm()(x))
        return nn.tanh(nn.ConvTranspose(depth, size, stride, kernel_init=NORMAL)(x))


class Discriminator(nn.Module):
    """Maps images to logits, positive for real ones: convolutions that halve height and width, and a Dense layer."""

    channels: tuple[int, ...]
    """number of channels after each halving"""
    kernel: int
    """height and width of the kernels"""

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch,)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = image
        for index, channels in enumerate(self.channels):
            size = (self.kernel, self.kernel)
            x = nn.Conv(channels, size, (2, 2), use_bias=index == 0, kernel_init=NORMAL)(x)
            x = nn.leaky_relu(norm()(x) if index else x, 0.2)
        return nn.Dense(1, kernel_init=NORMAL)(x.reshape(x.shape[0], -1))[:, 0]


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws numbers between -1 and 1, the noise of section 3 of the paper."""
    return jax.random.uniform(key, shape, minval=-1, maxval=1)


class Judged(NamedTuple):
    """What a DCGAN makes of a batch of images."""

    real: jax.Array | None
    """logits of the discriminator for the batch, (batch,); None if only generated images were judged"""
    generated: jax.Array
    """logits of the discriminator for as many generated images, (batch,)"""
    images: jax.Array
    """the generated images, (batch, height, width, channels), from -1 to 1"""


class DCGAN(nn.Module):
    """A generator and a discriminator, whose parameters are below `generator` and `discriminator`.

    Raises:
      InputError: a size is below 1, there are no `channels`, or height or width of the images is no multiple of 2 to
        the number of `channels`.
    """

    image: tuple[int, int, int] = (64, 64, 3)
    """Height, width and channels of the images."""
    channels: tuple[int, ...] = (1024, 512, 256, 128)
    """Number of channels of the generator before each doubling of the size; the discriminator has them in reverse."""
    noise: int = 100
    """Length of the vector of noise that an image is made of."""
    kernel: int = 5
    """Height and width of the kernels."""

    def __post_init__(self) -> None:
        check_sizes(self, "image", "channels", "noise", "kernel")
        if not self.channels:
            raise InputError("DCGAN: channels=(): expected one or more")
        factor = 2 ** len(self.channels)
        if self.image[0] % factor or self.image[1] % factor:
            raise InputError(
                f"DCGAN: image={self.image}: expected height and width in multiples of {factor}, "
                f"which channels={self.channels} halve {len(self.channels)} times"
            )
        super().__post_init__()

    def setup(self) -> None:
        """Generator and discriminator."""
        self.generator = Generator(self.image, self.channels, self.kernel)
        self.discriminator = Discriminator(tuple(reversed(self.channels)), self.kernel)
        self.latent = Noise(self.noise, uniform)

    def __call__(self, image: jax.Array, *, train: bool = False) -> Judged:
        """Judges images (batch, *image), from -1 to 1, and as many generated ones, of noise from the stream "noise"."""
        real = self.discriminator(image, train=train)
        return self.judge_generated(image, train=train)._replace(real=real)

    def judge_generated(self, image: jax.Array, *, train: bool = False) -> Judged:
        """Judges as many generated images as there are in `image`, whose values it does not read."""
        images = self.draw(image.shape[0], train=train)
        return Judged(None, self.discriminator(images, train=train), images)

    def draw(self, count: int, *, train: bool = False) -> jax.Array:
        """Draws images (count, *image), from -1 to 1, of noise from the stream "noise"."""
        return self.generate(self.latent(count), train=train)

    def generate(self, noise: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps noise (batch, noise), uniform from -1 to 1, to images (batch, *image), from -1 to 1."""
        return self.generator(jnp.asarray(noise), train=train)
