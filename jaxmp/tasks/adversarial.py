"""`Adversarial`: a generator of images and a discriminator, trained against each other.

Source: I. Goodfellow et al., Generative Adversarial Networks, NeurIPS 2014, https://arxiv.org/abs/1406.2661, section 3
and algorithm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError, whole_number
from jaxmp.tasks.samples import Samples, Sampling, Trained, draw_pictures
from jaxmp.tasks.task import Task
from jaxmp.training.batch import Batch
from jaxmp.training.metrics import Mean, Metrics, MetricSpec
from jaxmp.training.objective import ObjectiveSpec
from jaxmp.training.step import ORDERS

DISCRIMINATOR, GENERATOR = "discriminator", "generator"
"""the two objectives, each named like the part of the model that it trains"""


@dataclasses.dataclass(frozen=True)
class Adversarial(Task):
    """The non-saturating losses of a generative adversarial network: two objectives, each with its own loss scale.

    Each objective draws latent variables of its own in each step, from the key of the step. The generator's sees no
    real image: it calls the model's `judge_generated`, so that a bad row of the data (NaN, say) skips the
    discriminator's step and changes nothing of the generator's, batch statistics included.

    The model has its parameters below `generator` and `discriminator`, and these methods, as `jaxmp.models.dcgan.DCGAN`
    does:

      `__call__(*inputs)` and `judge_generated(*inputs)`: what they return has `real` (None of the second) and
        `generated`, logits (rows,) of the discriminator, positive for what it takes to be real.
      `draw(count)`: images (count, height, width, channels), normalised as those of the data are.

    No metric of the two losses says which weights make the best images: the best checkpoint is that of the lowest
    generator loss on the validation split, and `jaxmp sample` takes the last one.

    Raises: InputError if a value is not one of those below.
    """

    inputs: tuple[str, ...] = ("image",)
    """keys of the batch that the model is called with"""
    discriminator_steps: int = 1
    """steps of the discriminator for each step of the generator: k of algorithm 1"""
    order: Literal["in_turn", "at_once"] = "in_turn"  # type: ignore[misc]  # a field here
    """in a step with both, whether the generator sees the discriminator as its step left it ("in_turn"), or as it was
    before ("at_once")"""

    metrics: ClassVar[Mapping[str, MetricSpec]] = {
        "loss": MetricSpec("min", "nats"),
        "accuracy": MetricSpec(None, "%"),
        "taken_for_real": MetricSpec("max", "%"),
    }
    monitor = f"{GENERATOR}/loss"

    def __post_init__(self) -> None:
        """Checks the ranges, and that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")
        steps = whole_number("task.discriminator_steps", self.discriminator_steps, 1)
        object.__setattr__(self, "discriminator_steps", steps)
        if self.order not in ORDERS:
            raise InputError(f"task.order = {self.order!r}: expected {' or '.join(ORDERS)}")

    @property
    def objectives(self) -> Mapping[str, ObjectiveSpec]:  # type: ignore[override]  # of the fields
        """The discriminator's, then the generator's."""
        return {
            DISCRIMINATOR: ObjectiveSpec((DISCRIMINATOR,)),
            GENERATOR: ObjectiveSpec((GENERATOR,), every=self.discriminator_steps, method="judge_generated"),
        }

    def __call__(self, outputs: Any, batch: Batch, objective: str) -> tuple[Mean, Metrics]:  # type: ignore[override]
        """The loss of an objective in nats an image, -log D(x) - log(1 - D(G(z))) or -log D(G(z)), D from 0 to 1.

        The discriminator has `accuracy`, the share of real and of generated images, half and half, that it tells
        right; the generator `taken_for_real`, the share of generated images that the discriminator tells wrong.
        """
        # Of logits and in float32: log(1 - sigmoid(x)) in half is 0 or infinite (trap T23).
        weight, generated = batch["weight"], outputs.generated.astype(jnp.float32)
        if objective == GENERATOR:
            taken = Mean.of(generated > 0, weight)
            return Mean.of(jax.nn.softplus(-generated), weight), {"taken_for_real": taken}
        real = outputs.real.astype(jnp.float32)
        right = ((real > 0).astype(jnp.float32) + (generated <= 0)) / 2
        losses = jax.nn.softplus(-real) + jax.nn.softplus(generated)
        return Mean.of(losses, weight), {"accuracy": Mean.of(right, weight)}

    def predictions(self, outputs: Any) -> dict[str, jax.Array]:
        """`probability`, float32 (examples,), that the discriminator gives a row of being real; `output`, its logit."""
        return {"probability": jax.nn.sigmoid(outputs.real.astype(jnp.float32)), "output": outputs.real}

    def sample(self, trained: Trained, key: jax.Array, sampling: Sampling) -> Samples:
        """Pictures that the generator makes, without the normalisation of the data (its `mean` and `std`).

        Raises: InputError as `draw_pictures` does.
        """
        # A dataset of one's own that does not normalise has neither.
        mean, std = (jnp.asarray(getattr(trained.data, name, of)) for name, of in (("mean", 0.0), ("std", 1.0)))
        return draw_pictures(trained, key, sampling, lambda images: images * std + mean)

    def check(self, outputs: Any, batch: Any) -> None:
        """Raises InputError unless the outputs are two logits a row, of real and of generated images."""
        found: list[Any] = [getattr(outputs, name, None) for name in ("real", "generated")]
        if any(not hasattr(logits, "shape") for logits in found):
            raise InputError(
                f"the model's outputs are of type {type(outputs).__name__}; expected logits called real and generated, "
                "as those of jaxmp.models.dcgan.DCGAN"
            )
        for name, logits in zip(("real", "generated"), found, strict=True):
            if tuple(logits.shape) != tuple(batch["weight"].shape):
                raise InputError(
                    f"the logits called {name} are {logits.dtype}{list(logits.shape)}; expected one for each row, "
                    f"{list(batch['weight'].shape)}"
                )
