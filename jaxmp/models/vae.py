"""`VAE`: a variational autoencoder of images.

Source: D. Kingma and M. Welling, Auto-Encoding Variational Bayes, ICLR 2014, https://arxiv.org/abs/1312.6114, appendix
C: a Gaussian encoder and a Bernoulli decoder, each with hidden Dense layers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.models.noise import Noise
from jaxmp.models.sizes import check_sizes


class Reconstruction(NamedTuple):
    """What a VAE makes of a batch of images."""

    logits: jax.Array
    """logits of the pixels' Bernoulli distributions, of the shape of the images"""
    mean: jax.Array
    """means of the latent variables, (batch, latent)"""
    log_variance: jax.Array
    """logarithms of their variances, (batch, latent)"""


class VAE(nn.Module):
    """A variational autoencoder: Dense layers to the latent variables' distribution, and from a sample back.

    The sample is drawn in evaluation too, from the random stream "noise".

    Raises:
      InputError: a size is below 1.
    """

    image: tuple[int, ...] = (28, 28, 1)
    """Height, width and channels of the images."""
    hidden: tuple[int, ...] = (500,)
    """Width of each hidden Dense layer of the encoder; the decoder has the same in reverse."""
    latent: int = 20
    """Number of latent variables."""

    def __post_init__(self) -> None:
        check_sizes(self, "image", "hidden", "latent")
        super().__post_init__()

    def setup(self) -> None:
        """The layers of encoder and decoder."""
        self.encoder = [nn.Dense(width) for width in self.hidden]
        self.mean, self.log_variance = nn.Dense(self.latent), nn.Dense(self.latent)
        self.decoder = [nn.Dense(width) for width in reversed(self.hidden)]
        self.pixels = nn.Dense(math.prod(self.image))
        self.noise = Noise(self.latent)

    def __call__(self, image: jax.Array) -> Reconstruction:
        """Maps images (batch, *image), from 0 to 1, to a `Reconstruction` from one sample of the latent variables."""
        mean, log_variance = self.encode(image)
        noise = self.noise(mean.shape[0])  # float32 whatever the policy (trap T19)
        # In the dtype of the noise: in half, exp would overflow, and small differences from the mean would be lost.
        wide = jnp.promote_types(mean.dtype, noise.dtype)
        latent = mean.astype(wide) + jnp.exp(log_variance.astype(wide) / 2) * noise
        return Reconstruction(self.decode(latent.astype(mean.dtype)), mean, log_variance)

    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps images to means and logarithms of variances of the latent variables, both (batch, latent)."""
        x = image.reshape(image.shape[0], -1)
        for layer in self.encoder:
            x = nn.tanh(layer(x))
        return self.mean(x), self.log_variance(x)

    def decode(self, latent: jax.Array) -> jax.Array:
        """Maps latent variables (batch, latent) to the logits of the pixels, (batch, *image)."""
        x: Any = latent
        for layer in self.decoder:
            x = nn.tanh(layer(x))
        return self.pixels(x).reshape(latent.shape[0], *self.image)

    def draw(self, count: int) -> jax.Array:
        """Draws the latent variables of images from the prior, and returns the logits of the pixels, (count, *image).

        The prior is the standard normal distribution; it is drawn from the random stream "noise".
        """
        return self.decode(self.noise(count))
