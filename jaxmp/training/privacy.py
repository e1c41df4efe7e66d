"""`Privacy`: how a step's gradient hides each row of its batch: clipped row by row, with Gaussian noise on the sum.

    tx = loss_scaling(optax.sgd(0.5), StaticScaler(2.0**8))
    step = make_train_step(Objective(loss_fn, tx, private=Privacy(clip_norm=1.0, noise_multiplier=1.1, rows=256)))

Source: Abadi et al. 2016, Deep Learning with Differential Privacy, algorithm 1, https://arxiv.org/abs/1607.00133.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError, require
from jaxmp.scaling.float32_math import global_norm
from jaxmp.trees import has_gradient, upcast

NOISE_KEY = 2**31 - 2
"""folded into the key of a step to get the key of the noise"""

PRIVATE_SCALE = 2.0**8
"""loss scale of a private step in float16: the gradient of one row, which no batch size divides, rarely reaches 2**8"""


@dataclasses.dataclass(frozen=True)
class Privacy:
    """How the gradient of a step hides each row of its batch (DP-SGD).

    Each row's gradient, unscaled and in float32 whatever the policy, is scaled down to `clip_norm` if it is longer. The
    rows are summed over microbatches and replicas in float32, even if the policy names another reduce dtype; Gaussian
    noise of standard deviation `noise_multiplier * clip_norm` is added to the sum, once, from the key of the step; and
    the result is divided by `rows`. `rows` is a constant, since the number of rows that were drawn is itself private.

    A row whose loss or gradient is not finite contributes zero, and the step goes on: if it skipped the step, then
    whether a step was applied would tell whether such a row was there, which no noise hides. So what decides whether a
    private step is skipped is the noised gradient alone, not the loss; a skipped step has been paid for like any other,
    and the accountant counts steps attempted, not steps applied. For the same reason the loss scale of a private step
    has to be constant: a scale that reacted to rows that overflow would remember them without noise, and one that sees
    the noised gradient alone, as `DynamicScaler` does here, only grows.

    The guarantee is for a row as the step sees it: a text of several windows, or a recording of several strings of
    `JoinedRecordings`, is in several rows. What it does not cover: a vocabulary that was made of the rows (Characters,
    and WordPiece and BPE without a file); the metrics of training, which are computed without noise; how
    hyper-parameters were chosen; and those who have the run's config.json, with its seed and fingerprints of the rows.

    Raises:
      InputError: a value is not one of those below.
    """

    clip_norm: float
    """largest norm of one row's gradient, over all trained parameters"""
    noise_multiplier: float
    """standard deviation of the noise in units of `clip_norm`; 0: no noise, and no privacy"""
    rows: float
    """number of rows that the noised sum is divided by: the expected number in a batch"""

    def __post_init__(self) -> None:
        require(self, "clip_norm", 0 < self.clip_norm < math.inf, "a positive number")
        require(self, "noise_multiplier", 0 <= self.noise_multiplier < math.inf, "0 or a positive number")
        require(self, "rows", 0 < self.rows < math.inf, "a positive number")

    def clip(self, grads: list[jax.Array], scale: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """The unscaled gradient of one row, clipped, and whether all of it was finite; zeros if it was not.

        Args:
          grads: the leaves of the scaled gradient, of any float dtype.
          scale: the loss scale, a power of two, float32 scalar.

        Returns: leaves in float32 or wider, and a bool scalar.
        """
        unscale = 1 / scale
        own = [upcast(g) * unscale.astype(upcast(g).dtype) for g in grads]
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in grads])) if grads else jnp.bool_(True)
        norm = global_norm(own)
        # A norm beyond float32 is inf although all values are finite: then this row contributes zero, too.
        factor = jnp.where(norm > self.clip_norm, self.clip_norm / norm, 1)
        return [jnp.where(finite, g * factor.astype(g.dtype), jnp.zeros_like(g)) for g in own], finite

    def mean(self, sums: jax.Array, scale: jax.Array) -> jax.Array:
        """A leaf of the sum of clipped gradients, divided by the number of rows and scaled again."""
        return sums / jnp.asarray(self.rows, sums.dtype) * scale.astype(sums.dtype)

    def add_noise(self, grads: Any, scale: jax.Array, key: jax.Array) -> Any:
        """Adds the noise to scaled mean gradients.

        The noise is drawn, and added, in unscaled float32 (or wider). The scale is a power of two, so that scaling the
        result again changes no bit.

        Args:
          grads: summed over replicas; a leaf without gradient is returned unchanged.
          scale: the loss scale, float32 scalar.
          key: of the step, the same on every replica.
        """
        deviation = self.noise_multiplier * self.clip_norm / self.rows
        if deviation == 0:
            return grads
        key = jax.random.fold_in(key, NOISE_KEY)
        leaves, structure = jax.tree.flatten(grads)

        def noised(i: int, g: Any) -> Any:
            if not has_gradient(g):
                return g
            unscaled = upcast(g) / scale.astype(upcast(g).dtype)
            parts = (2,) if jnp.iscomplexobj(unscaled) else ()
            noise = jax.random.normal(jax.random.fold_in(key, i), (*parts, *g.shape), unscaled.real.dtype)
            if parts:
                noise = noise[0] + 1j * noise[1]
            return (unscaled + deviation * noise) * scale.astype(unscaled.dtype)

        return jax.tree.unflatten(structure, [noised(i, g) for i, g in enumerate(leaves)])


def refuse_model_state(model_state: Any) -> None:
    """Raises InputError if a model keeps a state that its rows change together, such as BatchNorm's statistics."""
    if jax.tree.leaves(model_state):
        names = ", ".join(model_state) if isinstance(model_state, dict) else "a state"
        raise InputError(
            f"a private optimizer: the model keeps {names} from step to step, in which the rows of a batch are mixed "
            "without noise (as BatchNorm does); expected a model without, with LayerNorm or GroupNorm for example"
        )
