"""Learning-rate schedules: the learning rate as a function of the number of applied steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
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

    def numbers(self, steps: int) -> dict[str, Any]:
        """The numbers of a run of `steps` steps that may be arguments of a compiled step, by name: trees of floats.

        Schedules of one class that differ in these values alone share one program.
        """
        del steps  # for subclasses
        return {"warmup_steps": float(self.warmup_steps)}

    def _factor(self, t: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
        """Returns the learning rate without warm-up, as a fraction of the peak.

        Args:
          t: the step, float32 scalar.
          numbers: those of `numbers()`, floats or float32 scalars.
        """
        raise NotImplementedError

    def make(self, peak: Any, steps: int, numbers: Mapping[str, Any] | None = None) -> optax.Schedule:
        """Creates the optax schedule of a run.

        Args:
          peak: the peak learning rate, a number or a float32 scalar.
          steps: number of steps of the run.
          numbers: what takes the place of `self.numbers(steps)`, such as arguments of the program that is being traced;
            by default the values are constants.

        Returns:
          A function that maps the count of applied steps (int32 scalar) to the learning rate (float32 scalar).

        Raises:
          InputError: the warm-up is longer than the run; the `_factor` of a subclass has other arguments than
            (self, t, numbers).
        """
        check_arguments(self._factor, "t", "numbers")
        require(self, "warmup_steps", self.warmup_steps <= steps, f"at most the {steps} steps of the run")
        # The `numbers` of a subclass may leave out those of the warm-up.
        own = {**Schedule.numbers(self, steps), **(self.numbers(steps) if numbers is None else numbers)}

        def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
            t = jnp.asarray(count, jnp.float32)
            warmup = jnp.minimum(1.0, (t + 1.0) / jnp.maximum(own["warmup_steps"], 1.0))
            return peak * warmup * self._factor(t, own)

        return learning_rate


def check_arguments(method: Callable[..., Any], *names: str) -> None:
    """Raises InputError unless a subclass's method takes as many arguments as `names`, the last of that name."""
    given = tuple(inspect.signature(method).parameters)
    if len(given) != len(names) or given[-1] != names[-1]:
        raise InputError(
            f"{method.__qualname__}(self, {', '.join(given)}): expected {method.__name__}(self, {', '.join(names)}), "
            "where numbers holds what the class's `numbers(steps)` returns"
        )


def _progress(t: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
    """Returns the progress of the run: 0 at the end of the warm-up, 1 at and after the end of the run."""
    warmup_steps = numbers["warmup_steps"]
    return jnp.clip((t - warmup_steps) / jnp.maximum(numbers["steps"] - warmup_steps, 1.0), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ConstantRate(Schedule):
    """A constant learning rate, after the warm-up if there is one."""

    def _factor(self, t: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
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

    def numbers(self, steps: int) -> dict[str, Any]:
        """See `Schedule.numbers`."""
        return {**super().numbers(steps), "steps": float(steps), "final": float(self.final)}

    def _factor(self, t: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
        final = numbers["final"]
        return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(math.pi * _progress(t, numbers)))


@dataclass(frozen=True, kw_only=True)
class LinearDecay(Schedule):
    """A learning rate that falls linearly from the peak to `final` times the peak."""

    final: float = 0.0
    """Learning rate at the end of the run, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "final", 0 <= self.final <= 1, "a fraction of the peak, 0 to 1")

    def numbers(self, steps: int) -> dict[str, Any]:
        """See `Schedule.numbers`."""
        return {**super().numbers(steps), "steps": float(steps), "final": float(self.final)}

    def _factor(self, t: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
        return 1.0 + (numbers["final"] - 1.0) * _progress(t, numbers)


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

    def numbers(self, steps: int) -> dict[str, Any]:
        """See `Schedule.numbers`; the boundaries are numbers of steps."""
        first_steps = [round(boundary * steps) if boundary < 1 else round(boundary) for boundary in self.boundaries]
        return {**super().numbers(steps), "boundaries": [float(step) for step in first_steps], "drop": float(self.drop)}

    def _factor(self, t: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
        passed = jnp.sum(t >= jnp.stack([jnp.asarray(step, jnp.float32) for step in numbers["boundaries"]]))
        return numbers["drop"] ** passed.astype(jnp.float32)


def schedule_numbers(schedule: Any, steps: int) -> dict[str, Any] | None:
    """The numbers of a schedule that may be arguments of a compiled step, for `make_schedule`; {} of an optax schedule.

    None if the schedule has a `make` of its own, which may decide by its numbers, and by that of the peak.
    """
    if isinstance(schedule, Schedule) and type(schedule).make is Schedule.make:
        return schedule.numbers(steps)
    return None if callable(getattr(schedule, "make", None)) else {}


def make_schedule(schedule: Any, peak: Any, steps: int, numbers: Mapping[str, Any] | None = None) -> optax.Schedule:
    """The learning rate by count of applied steps, of a `Schedule` or of an optax schedule.

    Args:
      schedule: one of jaxmp's, or a function of the count (int32 scalar) such as
        `optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000)`. Its values multiply `peak`, as those of jaxmp's do.
      peak: the learning rate that the schedule multiplies, a number or a float32 scalar; 1 where an optax schedule
        gives learning rates itself.
      steps: number of steps of the run.
      numbers: what takes the place of `schedule_numbers(schedule, steps)`; None or {}: they are constants.

    Raises:
      InputError: an optax schedule raises, gives something else than a number of at least 0, or reaches less than a
        twentieth: then it gives learning rates, and `peak` would multiply them once more.
    """
    make = getattr(schedule, "make", None)
    if callable(make):
        return make(peak, steps, numbers) if numbers else make(peak, steps)
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
