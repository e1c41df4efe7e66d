"""A GAN in one file, outside of the package: BatchNorm in both nets, clipping and AdamW, two dynamic scalers."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import AdamW, Arrays, Experiment, Loop, Mean, MetricSpec, ObjectiveSpec, Scaling, Task


class Generator(nn.Module):
    @nn.compact
    def __call__(self, noise, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(noise)))
        return nn.Dense(8)(x)


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.leaky_relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x)))
        return nn.Dense(1)(x)[:, 0]


class GAN(nn.Module):
    def setup(self):
        self.generator, self.discriminator = Generator(), Discriminator()

    def __call__(self, real, noise, train: bool):
        fake = self.generator(noise, train)
        return self.discriminator(real, train), self.discriminator(fake, train)


@dataclasses.dataclass(frozen=True)
class Adversarial(Task):
    """Tells drawn rows from made ones, and makes rows that are taken for drawn."""

    inputs: tuple[str, ...] = ("x", "noise")
    every: int = 2
    order: str = "in_turn"
    metrics: ClassVar = {"discriminator/accuracy": MetricSpec("max", "%"), "loss": MetricSpec("min", "nats")}
    monitor = "discriminator/accuracy"

    @property
    def objectives(self):
        return {
            "discriminator": ObjectiveSpec(("discriminator",)),
            "generator": ObjectiveSpec(("generator",), every=self.every),
        }

    def __call__(self, outputs, batch, objective):
        real, fake = (logits.astype(jnp.float32) for logits in outputs)
        if objective == "generator":
            return Mean.of(jax.nn.softplus(-fake), batch["weight"]), {}
        losses = jax.nn.softplus(-real) + jax.nn.softplus(fake)
        right = ((real > 0).astype(jnp.float32) + (fake < 0)) / 2
        return Mean.of(losses, batch["weight"]), {"accuracy": Mean.of(right, batch["weight"])}


def load(split):
    rng = np.random.default_rng(len(split))
    x = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 8)) + 1
    return {"x": x.astype(np.float32), "noise": rng.normal(size=(64, 4)).astype(np.float32)}


def redraw(key, row):
    """Other noise in each step; both objectives of a step see the same."""
    return row if key is None else {**row, "noise": jax.random.normal(key, row["noise"].shape)}


def get_config():
    return Experiment(
        model=GAN(),
        data=Arrays(load, batch_size=16, transforms=(redraw,)),
        task=Adversarial(),
        optimizer={
            "discriminator": AdamW(4e-3, clip_norm=1.0),
            "generator": AdamW(2e-3, b1=0.5, clip_norm=1.0),
        },
        precision="mixed_float16",
        scaler={
            "discriminator": Scaling("dynamic", init_scale=2.0**24, growth_interval=8),
            "generator": Scaling("dynamic", init_scale=2.0**20, growth_interval=4),
        },
        loop=Loop(steps=24, log_every=4, eval_every=8, save_every=4, ema_decay=0.9),
    )
