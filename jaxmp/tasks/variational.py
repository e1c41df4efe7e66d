"""`EvidenceBound`: the negative evidence lower bound of a variational autoencoder, with its two parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError
from jaxmp.tasks.samples import Samples, Sampling, Trained, draw_pictures
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec


@dataclasses.dataclass(frozen=True)
class EvidenceBound(Task):
    """The negative evidence lower bound of an image: the cross-entropy of its pixels, and a divergence from the prior.

    The model returns `(logits, mean, log_variance)`, as `jaxmp.models.vae.VAE` does: the logits of the pixels, from one
    sample of the latent variables, and the Gaussian that it was drawn from. The prior is the standard normal.

    Source: D. Kingma and M. Welling, Auto-Encoding Variational Bayes, ICLR 2014, https://arxiv.org/abs/1312.6114,
    equation 10 and appendix B. For pixels between 0 and 1 the cross-entropy is no likelihood, and is above 0.
    """

    inputs: tuple[str, ...] = ("image",)
    """keys of the batch that the model is called with"""
    target: str = "image"
    """key of the images to reconstruct, float (rows, ...), from 0 to 1"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats", digits=2),
        "cross_entropy": MetricSpec("min", "nats", digits=2),
        "divergence": MetricSpec(None, "nats", digits=2),
    }

    def __post_init__(self) -> None:
        """Checks that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """The sum of `cross_entropy` and `divergence`, each in nats an image."""
        self.check(outputs, batch)
        logits, mean, log_variance = (x.astype(jnp.float32) for x in outputs)
        rows = logits.shape[0]
        pixels = optax.sigmoid_binary_cross_entropy(logits, batch[self.target].astype(jnp.float32))
        cross_entropy = jnp.sum(pixels.reshape(rows, -1), axis=1)
        divergence = jnp.sum(jnp.expm1(log_variance) - log_variance + jnp.square(mean), axis=1) / 2
        parts = {"cross_entropy": cross_entropy, "divergence": divergence}
        weight = batch["weight"]
        metrics = {name: Mean.of(values, weight) for name, values in parts.items()}
        return Mean.of(cross_entropy + divergence, weight), metrics

    def sample(self, trained: Trained, key: jax.Array, sampling: Sampling) -> Samples:
        """Pictures of latent variables from the prior: the mean of each pixel. Raises InputError as `draw_pictures`."""
        return draw_pictures(trained, key, sampling, jax.nn.sigmoid)

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError unless the outputs are three arrays that fit the images and each other."""
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            raise InputError(
                f"the model's outputs are of type {type(outputs).__name__}; expected (logits, mean, log_variance)"
            )
        target, shapes = batch[self.target], [list(x.shape) for x in outputs]
        if shapes[0] != list(target.shape) or shapes[1] != shapes[2] or len(shapes[1]) != 2:
            raise InputError(
                f"{self.target!r} is {target.dtype}{list(target.shape)} beside outputs of {shapes}; expected logits of "
                "the same shape, and a mean and a log_variance of (rows, latent)"
            )
        if not jnp.issubdtype(target.dtype, jnp.floating):
            raise InputError(f"{self.target!r} is {target.dtype}; expected floats from 0 to 1")

    def check_rows(self, outputs: Any, columns: Mapping[str, Any], split: str) -> None:
        """Raises InputError if a target is outside [0, 1]; the loss would be no bound, and may have no minimum."""
        target = columns.get(self.target)
        if not isinstance(target, np.ndarray) or target.dtype.kind != "f" or not target.size:
            return
        least, most = target.min(), target.max()
        if not (least >= 0 and most <= 1):
            raise InputError(
                f"{self.target!r} of the {split} split: values run from {least:g} to {most:g}; expected 0 to 1, images "
                "without data.mean and data.std, say"
            )
