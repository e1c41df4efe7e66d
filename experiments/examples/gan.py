"""A convolutional GAN of handwritten digits, with its own optimizer for each net and samples after each evaluation.

After pytorch/examples/dcgan/main.py, on the digits of scikit-learn.   Run: python experiments/examples/gan.py
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxmp import TFDS, Adam, Evaluated, Experiment, Loop, Mean, ObjectiveSpec, Task, fit


class Generator(nn.Module):
    """Makes images of noise."""

    @nn.compact
    def __call__(self, noise, train):
        x = nn.Dense(2 * 2 * 64, use_bias=False)(noise).reshape(-1, 2, 2, 64)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.ConvTranspose(32, (4, 4), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.tanh(nn.ConvTranspose(1, (4, 4), (2, 2))(x))


class Discriminator(nn.Module):
    """Tells real images from made ones."""

    @nn.compact
    def __call__(self, image, train):
        x = nn.leaky_relu(nn.Conv(32, (4, 4), (2, 2))(image), 0.2)
        x = nn.Conv(64, (4, 4), (2, 2), use_bias=False)(x)
        x = nn.leaky_relu(nn.BatchNorm(use_running_average=not train)(x), 0.2)
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


class GAN(nn.Module):
    """Both nets."""

    def setup(self):
        self.generator, self.discriminator = Generator(), Discriminator()

    def __call__(self, image, train: bool = False):
        return self.discriminator(image, train), self.judge_made(image, train)

    def judge_made(self, image, train: bool = False):
        noise = jax.random.normal(self.make_rng("noise"), (len(image), 100))
        return self.discriminator(self.generate(noise, train), train)

    def generate(self, noise, train: bool = False):
        return self.generator(noise, train)


@dataclasses.dataclass(frozen=True)
class Adversarial(Task):
    """Each net's loss, and how often made images are taken for real ones."""

    inputs: tuple[str, ...] = ("image",)
    objectives: ClassVar = {
        "discriminator": ObjectiveSpec(("discriminator",)),
        "generator": ObjectiveSpec(("generator",), method="judge_made"),
    }
    monitor = "generator/loss"

    def __call__(self, outputs, batch, objective):
        if objective == "generator":
            fake = outputs.astype(jnp.float32)
            losses = nn.softplus(-fake)
        else:
            real, fake = (logits.astype(jnp.float32) for logits in outputs)
            losses = nn.softplus(-real) + nn.softplus(fake)
        return Mean.of(losses, batch["weight"]), {"taken_for_real": Mean.of(nn.sigmoid(fake), batch["weight"])}


def samples(evaluated: Evaluated):
    """Draws 64 made images, after each evaluation."""
    noise, state = jax.random.normal(jax.random.key(0), (64, 100)), evaluated.state
    pixels = GAN().apply({"params": state.params, **state.model_state}, noise, method="generate")
    sheet = pixels.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
    Image.fromarray(np.uint8(127.5 * (sheet + 1))).save(evaluated.path / f"samples_{evaluated.step}.png")


DATA = TFDS(name="digits", batch_size=64, mean=(8 / 255,), std=(8 / 255,))
EXPERIMENT = Experiment(GAN(), DATA, Adversarial(), Adam(2e-4, b1=0.5), loop=Loop(epochs=40, eval_every=200))
if __name__ == "__main__":
    fit(EXPERIMENT, name="gan", hooks=(samples,))
