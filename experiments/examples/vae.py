"""A variational autoencoder of handwritten digits: two latent Dense layers, and samples after each evaluation.

After pytorch/examples/vae/main.py, on the digits of scikit-learn.   Run: python experiments/examples/vae.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from jaxmp import TFDS, Adam, Evaluated, Experiment, FunctionTask, Loop, fit


class VAE(nn.Module):
    """One hidden layer on either side of 20 latent variables."""

    def setup(self):
        self.encoder, self.decoder = nn.Dense(400), nn.Dense(400)
        self.mean, self.log_variance, self.pixels = nn.Dense(20), nn.Dense(20), nn.Dense(64)

    def __call__(self, image):
        hidden = nn.relu(self.encoder(image.reshape(-1, 64)))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        latent = mean + jnp.exp(log_variance / 2) * jax.random.normal(self.make_rng("noise"), mean.shape)
        return self.decode(latent), mean, log_variance

    def decode(self, latent):
        return self.pixels(nn.relu(self.decoder(latent)))


def bound(outputs, batch):
    """The negative evidence lower bound of each image."""
    logits, mean, log_variance = outputs
    pixels = optax.sigmoid_binary_cross_entropy(logits, batch["image"].reshape(-1, 64)).sum(axis=1)
    return pixels + (jnp.expm1(log_variance) - log_variance + mean**2).sum(axis=1) / 2


def samples(evaluated: Evaluated):
    """Draws 64 images from the prior, after each evaluation."""
    latent, variables = jax.random.normal(jax.random.key(0), (64, 20)), {"params": evaluated.state.params}
    pixels = nn.sigmoid(VAE().apply(variables, latent, method="decode")).reshape(8, 8, 8, 8).transpose(0, 2, 1, 3)
    Image.fromarray(np.uint8(255 * pixels.reshape(64, 64))).save(evaluated.path / f"samples_{evaluated.step}.png")


DATA = TFDS(name="digits", batch_size=128, std=(16 / 255,))
EXPERIMENT = Experiment(VAE(), DATA, FunctionTask(bound, ("image",)), Adam(1e-3), loop=Loop(epochs=60, eval_every=100))
if __name__ == "__main__":
    fit(EXPERIMENT, name="vae", hooks=(samples,))
