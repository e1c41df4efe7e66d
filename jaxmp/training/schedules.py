"""Learning-rate schedules, as functions of the applied step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from jaxmp.errors import require


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate at applied step t = 0, 1, ...: `peak * min(1, (t + 1) / warmup_steps) * factor(t, steps)`.

    The first step of a warm-up is `peak / warmup_steps`, not 0, and its last is the peak. Skipped steps do not count.
    """

    warmup_steps: int = 0
    """Applied steps in which the learning rate rises linearly to its peak."""

    def __post_init__(self) -> None:
        require(self, "warmup_steps", self.warmup_steps >= 0, "0 or more steps")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        """The share of the peak at step `t` (float32 scalar) of `steps`, without the warm-up."""
        raise NotImplementedError

    def make(self, peak: float, steps: int) -> optax.Schedule:
        """A function from the count of applied steps (int32 scalar) to the learning rate (float32 scalar)."""
        require(self, "warmup_steps", self.warmup_steps <= steps, f"at most the {steps} steps of the run")

        def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
            t = jnp.asarray(count, jnp.float32)
            warmup = jnp.minimum(1.0, (t + 1.0) / max(self.warmup_steps, 1))
            return peak * warmup * self._factor(t, steps)

        return learning_rate

    def _progress(self, t: jax.Array, steps: int) -> jax.Array:
        """0 at the end of the warm-up, 1 at the end of the run and after it."""
        return jnp.clip((t - self.warmup_steps) / max(steps - self.warmup_steps, 1), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ConstantRate(Schedule):
    """The peak, all the time."""

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class CosineDecay(Schedule):
    """Half a cosine from the peak to `final` (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983; no restarts)."""

    final: float = 0.0
    """What is left at the end, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "final", 0 <= self.final <= 1, "a fraction of the peak, 0 to 1")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(math.pi * self._progress(t, steps)))


@dataclass(frozen=True, kw_only=True)
class LinearDecay(Schedule):
    """A straight line from the peak to `final`."""

    final: float = 0.0
    """What is left at the end, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "final", 0 <= self.final <= 1, "a fraction of the peak, 0 to 1")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return 1.0 + (self.final - 1.0) * self._progress(t, steps)


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    """The peak, multiplied by `drop` from each boundary on."""

    boundaries: tuple[float, ...] = (0.5, 0.75)
    """Where the learning rate drops: fractions of the run (all below 1), or applied steps (all 1 or more)."""
    drop: float = 0.1
    """What each boundary multiplies the learning rate by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip((0.0, *self.boundaries), self.boundaries, strict=False))
        one_kind = len({boundary < 1 for boundary in self.boundaries}) == 1
        require(self, "boundaries", rising and one_kind, "rising fractions of the run, or rising numbers of steps")
        require(self, "drop", 0 < self.drop < math.inf, "a positive number")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        first_steps = [round(boundary * steps) if boundary < 1 else round(boundary) for boundary in self.boundaries]
        passed = jnp.sum(t >= jnp.array(first_steps, jnp.float32))
        return self.drop ** passed.astype(jnp.float32)
