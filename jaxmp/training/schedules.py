"""Learning-rate schedules: the learning rate as a function of the number of applied steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp.errors import InputError, require

LOOKED_AHEAD = np.unique([*range(64), *np.geomspace(64, 2**24, 512).astype(int)]).astype(np.int32)
"""counts of applied steps at which an optax schedule is evaluated before it is used"""
SMALLEST_PEAK = 0.05
"""the largest factor of a schedule that is lower must be a schedule of learning rates, given as one of factors"""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The base class of schedules: a linear warm-up, multiplied by a factor that each subclass defines.

    The learning rate at applied step t = 0, 1, ... is `peak * min(1, (t + 1) / warmup_steps) * factor(t, steps)`. The
    first step of the warm-up has the rate `peak / warmup_steps`, not 0, and the last one has `peak`. Steps that loss
    scaling skipped do not count.
    """

    warmup_steps: int = 0
    """Number of applied steps during which the learning rate rises linearly to its peak."""

    def __post_init__(self) -> None:
        require(self, "warmup_steps", self.warmup_steps >= 0, "0 or more steps")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        """Returns the learning rate at step `t` (float32 scalar) without warm-up, as a fraction of the peak."""
        raise NotImplementedError

    def make(self, peak: Any, steps: int) -> optax.Schedule:
        """Creates the optax schedule of a run.

        Args:
          peak: the peak learning rate, a number or a float32 scalar.
          steps: number of steps of the run.

        Returns:
          A function that maps the count of applied steps (int32 scalar) to the learning rate (float32 scalar).

        Raises:
          InputError: the warm-up is longer than the run.
        """
        require(self, "warmup_steps", self.warmup_steps <= steps, f"at most the {steps} steps of the run")

        def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
            t = jnp.asarray(count, jnp.float32)
            warmup = jnp.minimum(1.0, (t + 1.0) / max(self.warmup_steps, 1))
            return peak * warmup * self._factor(t, steps)

        return learning_rate

    def _progress(self, t: jax.Array, steps: int) -> jax.Array:
        """Returns the progress of the run: 0 at the end of the warm-up, 1 at and after the end of the run."""
        return jnp.clip((t - self.warmup_steps) / max(steps - self.warmup_steps, 1), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ConstantRate(Schedule):
    """A constant learning rate, after the warm-up if there is one."""

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class CosineDecay(Schedule):
    """A learning rate that falls along half a cosine from the peak to `final` times the peak.

    Source: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; without restarts.
    """

    final: float = 0.0
    """Learning rate at the end of the run, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "final", 0 <= self.final <= 1, "a fraction of the peak, 0 to 1")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(math.pi * self._progress(t, steps)))


@dataclass(frozen=True, kw_only=True)
class LinearDecay(Schedule):
    """A learning rate that falls linearly from the peak to `final` times the peak."""

    final: float = 0.0
    """Learning rate at the end of the run, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "final", 0 <= self.final <= 1, "a fraction of the peak, 0 to 1")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return 1.0 + (self.final - 1.0) * self._progress(t, steps)


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    """A learning rate that is multiplied by `drop` at each boundary."""

    boundaries: tuple[float, ...] = (0.5, 0.75)
    """When the learning rate drops: fractions of the run (all below 1) or applied steps (all 1 or more), ascending."""
    drop: float = 0.1
    """Factor by which the learning rate is multiplied at each boundary."""

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


def takes_any_peak(schedule: Any) -> bool:
    """Whether `make_schedule` takes an argument of the program that is being traced as the peak.

    Not if the schedule has a `make` of its own, which may decide by the value of the peak.
    """
    make = getattr(type(schedule), "make", None)
    return make is Schedule.make or not callable(getattr(schedule, "make", None))


def make_schedule(schedule: Any, peak: Any, steps: int) -> optax.Schedule:
    """The learning rate by count of applied steps, of a `Schedule` or of an optax schedule.

    Args:
      schedule: one of jaxmp's, or a function of the count (int32 scalar) such as
        `optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000)`. Its values multiply `peak`, as those of jaxmp's do.
      peak: the learning rate that the schedule multiplies, a number or a float32 scalar; 1 where an optax schedule
        gives learning rates itself.
      steps: number of steps of the run.

    Raises:
      InputError: an optax schedule raises, gives something else than a number of at least 0, or reaches less than a
        twentieth: then it gives learning rates, and `peak` would multiply them once more.
    """
    make = getattr(schedule, "make", None)
    if callable(make):
        return make(peak, steps)
    name = getattr(schedule, "__qualname__", type(schedule).__name__).removesuffix(".<locals>.schedule")
    try:
        with jax.ensure_compile_time_eval():
            factors = np.asarray(jax.vmap(schedule)(jnp.asarray(LOOKED_AHEAD)))
    except Exception as error:
        raise InputError(
            f"schedule {name} raised {type(error).__name__}, called with a count of steps (int32 scalar, traced): "
            f"{str(error)[:200]}; expected a number of at least 0"
        ) from error
    within = factors[: max(int(np.searchsorted(LOOKED_AHEAD, steps)), 1)]  # beyond the run it may be anything
    if factors.shape != LOOKED_AHEAD.shape or not np.all(within >= 0) or not np.all(np.isfinite(within)):
        what = (
            f"shape {factors.shape[1:]}" if factors.ndim != 1 else f"values from {within.min():g} to {within.max():g}"
        )
        raise InputError(
            f"schedule {name} gives {what}; expected a finite number of at least 0 at each step of the run"
        )
    # A traced peak is that of an optimizer whose own number was checked here before.
    if not isinstance(peak, jax.Array) and peak != 1 and 0 < np.nanmax(factors) < SMALLEST_PEAK:
        raise InputError(
            f"schedule {name} reaches {np.nanmax(factors):g} at most, and a schedule multiplies the learning rate, "
            f"{peak:g}; expected one with a peak of 1, or learning_rate=1.0 beside a schedule of learning rates"
        )
    return lambda count: jnp.asarray(peak * schedule(count), jnp.float32)
