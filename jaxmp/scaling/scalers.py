"""Scalers: how the loss scale reacts to finite and to overflowing steps."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError

# Between these bounds S and 1/S are both normal float32 numbers; subnormals are flushed to zero (trap T10).
SMALLEST, LARGEST = 2.0**-126, 2.0**126


class ScalerState(NamedTuple):
    """What a scaler keeps between steps; strongly typed scalars."""

    scale: jax.Array
    """the loss scale S, float32, a power of two"""
    good_steps: jax.Array
    """finite steps since the scale last changed, or grew as far as it may, int32"""
    overflows: jax.Array
    """overflows in a row that have not lowered the scale yet, int32"""


class Scaler(Protocol):
    """A pure pair of functions. A scaler of one's own needs these two methods and nothing else."""

    def init(self) -> ScalerState:
        """The state before the first step."""
        ...

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """The state after a step.

        Args:
          state: the state before it.
          finite: bool scalar: the loss and all gradients of the step were finite.
          grad_max: float32 scalar: the largest magnitude among the still scaled gradients; inf or NaN where not finite.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DynamicScaler:
    """Dynamic loss scaling by the rule of `torch.amp.GradScaler`, with a floor, a cap and hysteresis.

    An overflow multiplies the scale by `backoff_factor`; `growth_interval` finite steps in a row multiply it by
    `growth_factor`, unless that exceeds `max_scale`. The scale stays within `[min_scale, max_scale]`. With
    `hysteresis` h only the h-th overflow in a row, and each after it, lowers the scale (apex).

    Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.2; the rule as torch 2 applies it.
    Raises: InputError for values that are no powers of two, contradict each other, or leave float32's normal range.
    """

    init_scale: float = 2.0**15
    """scale of the first step"""
    growth_factor: float = 2.0
    """factor after `growth_interval` finite steps in a row"""
    backoff_factor: float = 0.5
    """factor after an overflow"""
    growth_interval: int = 2000
    """finite steps in a row before the scale grows"""
    hysteresis: int = 1
    """overflows in a row before the scale is lowered"""
    min_scale: float = 2.0**-14
    """floor of the scale"""
    max_scale: float = 2.0**24
    """cap of the scale"""

    def __post_init__(self) -> None:
        """Refuses what would break the contract: a scale that is a power of two, within normal float32 numbers."""
        for name in ("init_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"):
            _power_of_two(f"DynamicScaler.{name}", getattr(self, name))
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise InputError(
                f"DynamicScaler: init_scale={self.init_scale:g} is outside "
                f"[min_scale={self.min_scale:g}, max_scale={self.max_scale:g}]"
            )
        if self.growth_factor < 1 or self.backoff_factor > 1:
            raise InputError(
                f"DynamicScaler: growth_factor={self.growth_factor:g} must be at least 1 and "
                f"backoff_factor={self.backoff_factor:g} at most 1"
            )
        for name in ("growth_interval", "hysteresis"):
            value = getattr(self, name)
            if value != int(value) or value < 1:
                raise InputError(f"DynamicScaler.{name}={value}: expected a whole number of at least 1")

    def init(self) -> ScalerState:
        """A state at `init_scale`."""
        return _state(self.init_scale)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """The rule of the class; see `Scaler.update` for the arguments."""
        del grad_max
        good = state.good_steps + 1
        due = good == self.growth_interval
        grown = state.scale * jnp.float32(self.growth_factor)
        grown = jnp.where(due & (grown <= self.max_scale), grown, state.scale)

        overflows = state.overflows + 1
        lower = overflows >= self.hysteresis
        lowered = jnp.maximum(state.scale * jnp.float32(self.backoff_factor), jnp.float32(self.min_scale))
        lowered = jnp.where(lower, lowered, state.scale)

        zero = jnp.int32(0)
        # Past `hysteresis` the count stands still, so that it cannot run over in a run that never recovers.
        return ScalerState(
            scale=jnp.where(finite, grown, lowered),
            good_steps=jnp.where(finite & ~due, good, zero),
            overflows=jnp.where(finite, zero, jnp.minimum(overflows, jnp.int32(self.hysteresis))),
        )


@dataclasses.dataclass(frozen=True)
class StaticScaler:
    """A loss scale that never changes; steps that overflow are skipped all the same.

    Raises: InputError where `scale` is no power of two within float32's normal range.
    """

    scale: float
    """the loss scale"""

    def __post_init__(self) -> None:
        """Refuses a scale that would round the gradients (defect B9: 65504 changes 0.16 % of them)."""
        _power_of_two("StaticScaler.scale", self.scale)

    def init(self) -> ScalerState:
        """A state at `scale`."""
        return _state(self.scale)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """`state`, whatever happened."""
        del finite, grad_max
        return state


@dataclasses.dataclass(frozen=True)
class NoScaler:
    """A loss scale of 1, for float32 and bfloat16; steps that overflow are skipped all the same."""

    def init(self) -> ScalerState:
        """A state at scale 1."""
        return _state(1.0)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """`state`, whatever happened."""
        del finite, grad_max
        return state


def _state(scale: float) -> ScalerState:
    # One buffer a leaf, each strongly typed: shared buffers cannot be donated, weak types compile twice (trap T7).
    return ScalerState(
        scale=jnp.array(scale, jnp.float32), good_steps=jnp.array(0, jnp.int32), overflows=jnp.array(0, jnp.int32)
    )


def _power_of_two(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5):
        below = 2.0 ** math.floor(math.log2(value)) if math.isfinite(value) and value > 0 else 1.0
        raise InputError(f"{name}={value!r}: expected a power of two, such as {below:g}; others round the gradients")
    if not SMALLEST <= value <= LARGEST:
        raise InputError(f"{name}={value!r}: expected 2**-126 to 2**126, where S and 1/S are normal float32 numbers")
