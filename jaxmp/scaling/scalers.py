"""Loss scalers: rules that change the loss scale after each step."""

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
    """The state of most scalers: strongly typed scalars."""

    scale: jax.Array
    """the loss scale S, float32, a power of two"""
    good_steps: jax.Array
    """finite steps since the last overflow or growth (a growth that `max_scale` prevented counts), int32"""
    overflows: jax.Array
    """overflows in a row, counted up to the hysteresis, int32"""


class Scaler(Protocol):
    """The protocol of a loss scaler: any class with these two pure methods is one.

    The state is a NamedTuple of strongly typed scalars, such as `ScalerState`. Its field `scale` must be the loss
    scale.
    """

    def init(self) -> Any:
        """Returns the state before the first step."""
        ...

    def update(self, state: Any, finite: jax.Array, grad_max: jax.Array) -> Any:
        """Returns the state after a step.

        Args:
          state: the state before the step.
          finite: whether the loss and all gradients of the step were finite, bool scalar.
          grad_max: largest magnitude among the gradients before unscaling, float32 scalar; inf if not `finite`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DynamicScaler:
    """Dynamic loss scaling by the rule of `torch.amp.GradScaler`, with a floor, a cap and hysteresis.

    An overflow multiplies the scale by `backoff_factor`. After `growth_interval` finite steps in a row, the scale is
    multiplied by `growth_factor`, unless the result would exceed `max_scale`. The scale stays within
    `[min_scale, max_scale]`. With `hysteresis=h`, the first h - 1 overflows in a row do not lower the scale (apex).

    Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.2; the rule as torch 2 applies it.

    Raises:
      InputError: a scale or factor is not a power of two within float32's normal range, or values contradict each
        other.
    """

    init_scale: float = 2.0**15
    """loss scale of the first step"""
    growth_factor: float = 2.0
    """factor by which the scale grows after `growth_interval` finite steps in a row"""
    backoff_factor: float = 0.5
    """factor by which an overflow lowers the scale"""
    growth_interval: int = 2000
    """number of finite steps in a row after which the scale grows"""
    hysteresis: int = 1
    """number of overflows in a row from which on the scale is lowered"""
    min_scale: float = 2.0**-14
    """smallest loss scale"""
    max_scale: float = 2.0**24
    """largest loss scale"""

    def __post_init__(self) -> None:
        """Checks the fields: every possible scale must be a power of two within float32's normal range."""
        require_bounds(self)
        require_factors(self)
        for name in ("growth_interval", "hysteresis"):
            require_count(f"DynamicScaler.{name}", getattr(self, name))

    def init(self) -> ScalerState:
        """Returns the state before the first step, with scale `init_scale`."""
        return scaler_state(self.init_scale)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
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
        # The count stops at `hysteresis`, so that it cannot overflow int32 in a run that never recovers.
        return ScalerState(
            scale=jnp.where(finite, grown, lowered),
            good_steps=jnp.where(finite & ~due, good, zero),
            overflows=jnp.where(finite, zero, jnp.minimum(overflows, jnp.int32(self.hysteresis))),
        )


@dataclasses.dataclass(frozen=True)
class StaticScaler:
    """A loss scale that never changes. Steps that overflow are still skipped.

    Raises:
      InputError: `scale` is not a power of two within float32's normal range.
    """

    scale: float
    """the loss scale"""

    def __post_init__(self) -> None:
        """Checks that the scale does not round gradients (defect B9: a scale of 65504 changes 0.16 % of them)."""
        require_power_of_two("StaticScaler.scale", self.scale)

    def init(self) -> ScalerState:
        """Returns the state before the first step."""
        return scaler_state(self.scale)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """Returns `state` unchanged."""
        del finite, grad_max
        return state


@dataclasses.dataclass(frozen=True)
class NoScaler:
    """A constant loss scale of 1, for float32 and bfloat16. Steps that overflow are still skipped."""

    def init(self) -> ScalerState:
        """Returns the state before the first step, with scale 1."""
        return scaler_state(1.0)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """Returns `state` unchanged."""
        del finite, grad_max
        return state


def scaler_state(scale: float) -> ScalerState:
    """Creates a `ScalerState` with loss scale `scale` and all counts 0."""
    # Each leaf has its own buffer, since shared ones cannot be donated, and is strongly typed, since weakly typed ones
    # make the step compile twice (trap T7).
    return ScalerState(
        scale=jnp.array(scale, jnp.float32), good_steps=jnp.array(0, jnp.int32), overflows=jnp.array(0, jnp.int32)
    )


def require_power_of_two(name: str, value: float) -> None:
    """Raises InputError unless `value` is a power of two from 2**-126 to 2**126. The message calls it `name`."""
    value = float(value)  # in NumPy's float16, the bounds below would be infinite
    if not (math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5):
        below = 2.0 ** math.floor(math.log2(value)) if SMALLEST <= value < LARGEST else 1.0
        raise InputError(
            f"{name}={value!r}: expected a power of two, such as {below:g} or {2 * below:g}; others round the gradients"
        )
    if not SMALLEST <= value <= LARGEST:
        raise InputError(f"{name}={value!r}: expected 2**-126 to 2**126, where S and 1/S are normal float32 numbers")


def require_bounds(scaler: Any) -> None:
    """Raises InputError unless a scaler's scales are powers of two with `min_scale <= init_scale <= max_scale`."""
    name = type(scaler).__name__
    for field in ("init_scale", "min_scale", "max_scale"):
        require_power_of_two(f"{name}.{field}", getattr(scaler, field))
    if not scaler.min_scale <= scaler.init_scale <= scaler.max_scale:
        raise InputError(
            f"{name}: init_scale={scaler.init_scale:g} is outside "
            f"[min_scale={scaler.min_scale:g}, max_scale={scaler.max_scale:g}]"
        )


def require_factors(scaler: Any) -> None:
    """Raises InputError unless `growth_factor` >= 1 and `backoff_factor` <= 1, both powers of two."""
    name = type(scaler).__name__
    for field in ("growth_factor", "backoff_factor"):
        require_power_of_two(f"{name}.{field}", getattr(scaler, field))
    if scaler.growth_factor < 1 or scaler.backoff_factor > 1:
        raise InputError(
            f"{name}: growth_factor={scaler.growth_factor:g} must be at least 1 and "
            f"backoff_factor={scaler.backoff_factor:g} at most 1"
        )


def require_count(name: str, value: float, *, least: int = 1, most: int = 2**30) -> None:
    """Raises InputError unless `value` is a whole number from `least` to `most`. The message calls it `name`."""
    if not (least <= value <= most and value == int(value)):
        raise InputError(f"{name}={value}: expected a whole number from {least} to {most}")


class HeadroomState(NamedTuple):
    """The state of `HeadroomScaler`; strongly typed scalars."""

    scale: jax.Array
    """the loss scale S, float32: the largest power of two that is at most `ceiling`"""
    ceiling: jax.Array
    """the largest scale that leaves the headroom, float32: 65504 / 2**headroom / (running maximum of gradients)"""


@dataclasses.dataclass(frozen=True)
class HeadroomScaler:
    """A loss scaler that lowers the scale before an overflow: it keeps recent gradients `headroom` bits below overflow.

    The scale S is the largest power of two with `S * largest <= 65504 / 2**headroom`. Here 65504 is float16's largest
    number, and `largest` is a running maximum of the magnitudes of the unscaled gradients that halves every `half_life`
    finite steps. When gradients grow, one step lowers the scale as far as necessary; when they shrink, the scale
    doubles at most once in `half_life` steps. While the scale is above `min_scale`, gradients that grow by at most
    `2**headroom` from one finite step to the next do not overflow.

    The scaler only sees the gradients of parameters. A gradient inside the network or a partial sum may be larger and
    overflow first; `headroom` has to cover that difference. If a step overflows nevertheless, the scale is halved and
    stays there for `half_life` finite steps. Gradients that are never float16 need no scaler.

    Source: ours. Zhao et al. 2019, Adaptive Loss Scaling for Mixed Precision Training, also choose the scale from
    statistics of the gradients, but for each layer.

    Raises:
      InputError: a scale is not a power of two within float32's normal range, values contradict each other, or
        `headroom` or `half_life` is out of range.
    """

    init_scale: float = 2.0**15
    """loss scale of the first step, and first value of the ceiling"""
    headroom: int = 4
    """bits between the largest scaled gradient and float16's largest number"""
    half_life: int = 1000
    """number of finite steps in which the running maximum of the gradients halves"""
    min_scale: float = 2.0**-14
    """smallest loss scale"""
    max_scale: float = 2.0**24
    """largest loss scale"""

    def __post_init__(self) -> None:
        """Checks the fields: every possible scale must be a power of two within float32's normal range."""
        require_bounds(self)
        require_count("HeadroomScaler.headroom", self.headroom, least=0, most=30)
        # For a longer half-life, float32 would round the factor of a step to 1, or to that of a much shorter one.
        require_count("HeadroomScaler.half_life", self.half_life, most=100_000)

    def init(self) -> HeadroomState:
        """Returns the state before the first step, with scale and ceiling `init_scale`."""
        return HeadroomState(
            scale=jnp.array(self.init_scale, jnp.float32), ceiling=jnp.array(self.init_scale, jnp.float32)
        )

    def update(self, state: HeadroomState, finite: jax.Array, grad_max: jax.Array) -> HeadroomState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
        # The unscaled `grad_max` could leave float32's range; the ceiling is clipped (it is inf where `grad_max` is 0).
        limit = jnp.float32(65504 / 2**self.headroom)
        ceiling = jnp.where(
            finite,
            jnp.minimum(state.ceiling * jnp.float32(2 ** (1 / self.half_life)), state.scale * (limit / grad_max)),
            state.scale / 2,
        )
        ceiling = jnp.clip(ceiling, jnp.float32(self.min_scale), jnp.float32(self.max_scale))
        return HeadroomState(scale=_power_of_two_below(ceiling), ceiling=ceiling)


def _power_of_two_below(x: jax.Array) -> jax.Array:
    """The largest power of two that is at most `x`, a positive normal float32: its bits without the mantissa."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7F800000)
    return jax.lax.bitcast_convert_type(exponent, jnp.float32)


Kind = Literal["auto", "dynamic", "static", "none"]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The loss scaler of an experiment; the defaults are those of `DynamicScaler`."""

    kind: Kind = "auto"
    """How the loss is scaled; auto means dynamic if anything computes in float16 (static, 256, with a private
    optimizer), else none."""
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
        """Creates the scaler for training under `policy`."""
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
