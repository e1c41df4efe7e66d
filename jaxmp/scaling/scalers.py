"""Scalers: how the loss scale reacts to finite and to overflowing steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError, nearest
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree

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
    """A pure pair of functions. A scaler of one's own needs these two methods and nothing else.

    Its state is a NamedTuple of strongly typed scalars, with the loss scale S as `scale`; `ScalerState`, or another.
    """

    def init(self) -> Any:
        """The state before the first step."""
        ...

    def update(self, state: Any, finite: jax.Array, grad_max: jax.Array) -> Any:
        """The state after a step.

        Args:
          state: the state before it.
          finite: bool scalar: the loss and all gradients of the step were finite.
          grad_max: float32 scalar: the largest magnitude among the still scaled gradients; inf where not finite.
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
        require_bounds(self)
        require_factors(self)
        for name in ("growth_interval", "hysteresis"):
            require_count(f"DynamicScaler.{name}", getattr(self, name))

    def init(self) -> ScalerState:
        """A state at `init_scale`."""
        return scaler_state(self.init_scale)

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
        require_power_of_two("StaticScaler.scale", self.scale)

    def init(self) -> ScalerState:
        """A state at `scale`."""
        return scaler_state(self.scale)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """`state`, whatever happened."""
        del finite, grad_max
        return state


@dataclasses.dataclass(frozen=True)
class NoScaler:
    """A loss scale of 1, for float32 and bfloat16; steps that overflow are skipped all the same."""

    def init(self) -> ScalerState:
        """A state at scale 1."""
        return scaler_state(1.0)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """`state`, whatever happened."""
        del finite, grad_max
        return state


def scaler_state(scale: float) -> ScalerState:
    """The state of a scaler at `scale` that has counted nothing."""
    # One buffer a leaf, each strongly typed: shared buffers cannot be donated, weak types compile twice (trap T7).
    return ScalerState(
        scale=jnp.array(scale, jnp.float32), good_steps=jnp.array(0, jnp.int32), overflows=jnp.array(0, jnp.int32)
    )


def require_power_of_two(name: str, value: float) -> None:
    """Raises InputError where `value`, called `name`, is no power of two within float32's normal range."""
    value = float(value)  # of NumPy's float16, the bounds below are infinite
    if not (math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5):
        below = 2.0 ** math.floor(math.log2(value)) if math.isfinite(value) and value > 0 else 1.0
        raise InputError(f"{name}={value!r}: expected a power of two, such as {below:g}; others round the gradients")
    if not SMALLEST <= value <= LARGEST:
        raise InputError(f"{name}={value!r}: expected 2**-126 to 2**126, where S and 1/S are normal float32 numbers")


def require_bounds(scaler: Any) -> None:
    """Raises InputError where a scaler's `init_scale`, `min_scale` and `max_scale` are no powers of two in order."""
    name = type(scaler).__name__
    for field in ("init_scale", "min_scale", "max_scale"):
        require_power_of_two(f"{name}.{field}", getattr(scaler, field))
    if not scaler.min_scale <= scaler.init_scale <= scaler.max_scale:
        raise InputError(
            f"{name}: init_scale={scaler.init_scale:g} is outside "
            f"[min_scale={scaler.min_scale:g}, max_scale={scaler.max_scale:g}]"
        )


def require_factors(scaler: Any) -> None:
    """Raises InputError where a scaler's `growth_factor` or `backoff_factor` is no power of two, or the wrong way."""
    name = type(scaler).__name__
    for field in ("growth_factor", "backoff_factor"):
        require_power_of_two(f"{name}.{field}", getattr(scaler, field))
    if scaler.growth_factor < 1 or scaler.backoff_factor > 1:
        raise InputError(
            f"{name}: growth_factor={scaler.growth_factor:g} must be at least 1 and "
            f"backoff_factor={scaler.backoff_factor:g} at most 1"
        )


def require_count(name: str, value: float, *, least: int = 1, most: int = 2**30) -> None:
    """Raises InputError where `value`, called `name`, is no whole number from `least` to `most`."""
    if not (least <= value <= most and value == int(value)):
        raise InputError(f"{name}={value}: expected a whole number from {least} to {most}")


class HeadroomState(NamedTuple):
    """The state of `HeadroomScaler`; strongly typed scalars."""

    scale: jax.Array
    """the loss scale S, float32, the largest power of two up to `ceiling`"""
    ceiling: jax.Array
    """the largest scale that leaves the headroom, float32: 65504 / 2**headroom / the largest gradient of late"""


@dataclasses.dataclass(frozen=True)
class HeadroomScaler:
    """Backs off before the overflow: keeps `headroom` bits free above the largest gradient seen lately.

    The scale is the largest power of two with `S * largest <= 65504 / 2**headroom`, where `largest` is a running
    maximum of the unscaled gradients that halves every `half_life` finite steps. So the scale falls at once when
    gradients grow, in one step and by as much as it takes, and doubles at most once in `half_life` steps when they
    shrink. Above the floor, gradients that grow by no more than `2**headroom` from one finite step to the next do not
    overflow.

    The scaler sees the gradients of the parameters only. What overflows first may be a gradient inside the network, or
    a partial sum: the headroom has to cover the distance between the two. Where it does not, and the step overflows,
    the scale is halved at once, and stays there for `half_life` finite steps. 65504 is float16's largest number;
    gradients that never pass through float16 need no scaler.

    Source: ours. The thought, a scale chosen from the statistics of gradients, is that of Zhao et al. 2019, Adaptive
    Loss Scaling for Mixed Precision Training, which has one for each layer.
    Raises: InputError for values that are no powers of two, contradict each other, or leave float32's normal range.
    """

    init_scale: float = 2.0**15
    """scale of the first step, and a ceiling that has to be outgrown like any other"""
    headroom: int = 4
    """bits between the largest scaled gradient and float16's largest number"""
    half_life: int = 1000
    """finite steps in which the running maximum of the gradients forgets a factor of two"""
    min_scale: float = 2.0**-14
    """floor of the scale"""
    max_scale: float = 2.0**24
    """cap of the scale"""

    def __post_init__(self) -> None:
        """Refuses what would break the contract: a scale that is a power of two, within normal float32 numbers."""
        require_bounds(self)
        require_count("HeadroomScaler.headroom", self.headroom, least=0, most=30)
        # A longer half-life would be a factor that float32 rounds to 1, or to a much shorter one.
        require_count("HeadroomScaler.half_life", self.half_life, most=100_000)

    def init(self) -> HeadroomState:
        """A state at `init_scale`."""
        return HeadroomState(
            scale=jnp.array(self.init_scale, jnp.float32), ceiling=jnp.array(self.init_scale, jnp.float32)
        )

    def update(self, state: HeadroomState, finite: jax.Array, grad_max: jax.Array) -> HeadroomState:
        """The rule of the class; see `Scaler.update` for the arguments."""
        # Unscaled, `grad_max` could leave float32's range; a ceiling cannot: where there is no gradient it is inf.
        limit = jnp.float32(65504 / 2**self.headroom)
        ceiling = jnp.where(
            finite,
            jnp.minimum(state.ceiling * jnp.float32(2 ** (1 / self.half_life)), state.scale * (limit / grad_max)),
            state.scale / 2,
        )
        ceiling = jnp.clip(ceiling, jnp.float32(self.min_scale), jnp.float32(self.max_scale))
        return HeadroomState(scale=_power_of_two_below(ceiling), ceiling=ceiling)


def _power_of_two_below(x: jax.Array) -> jax.Array:
    """The largest power of two up to `x`, a positive normal float32: its bits without the mantissa."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7F800000)
    return jax.lax.bitcast_convert_type(exponent, jnp.float32)


Kind = Literal["auto", "dynamic", "static", "none"]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Which loss scaler a run uses, and its numbers; those of a dynamic one are `DynamicScaler`'s."""

    kind: Kind = "auto"
    """How the loss is scaled; auto means dynamic if anything computes in float16, else none."""
    init_scale: float = DynamicScaler.init_scale
    """Loss scale of the first step (of every step if static), a power of two."""
    growth_factor: float = DynamicScaler.growth_factor
    """Factor by which the scale grows after growth_interval finite steps in a row, a power of two."""
    backoff_factor: float = DynamicScaler.backoff_factor
    """Factor by which an overflow lowers the scale, a power of two."""
    growth_interval: int = DynamicScaler.growth_interval
    """Number of finite steps in a row after which the scale grows."""
    hysteresis: int = DynamicScaler.hysteresis
    """Number of overflows in a row from which on the scale is lowered."""
    min_scale: float = DynamicScaler.min_scale
    """Smallest scale."""
    max_scale: float = DynamicScaler.max_scale
    """Largest scale."""

    def __post_init__(self) -> None:
        kinds = get_args(Kind)
        if self.kind not in kinds:
            raise InputError(
                f"scaler.kind = {self.kind!r}: expected {' or '.join(kinds)}{nearest(str(self.kind), kinds)}"
            )
        if self.kind == "static":
            StaticScaler(self.init_scale)
        else:
            self._dynamic()

    def make(self, policy: Policy | PolicyTree) -> Scaler:
        """The scaler for training under `policy`."""
        kind = self.kind
        if kind == "auto":
            kind = "dynamic" if policy.wants_scaling else "none"
        if kind == "dynamic":
            return self._dynamic()
        return StaticScaler(self.init_scale) if kind == "static" else NoScaler()

    def _dynamic(self) -> DynamicScaler:
        return DynamicScaler(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "kind"}
        )
