"""Historical scalers: the loss scaling rules of torch, jmp, Flax, apex, Megatron, DeepSpeed and fairseq.

They are for reproducing published training runs and for comparing rules; for new work use `DynamicScaler`. Each one
follows its original step by step, quirks included, with the original's defaults but with jaxmp's names. They differ
from their originals as follows:

- The scale stays a power of two within `[min_scale, max_scale]`. If the original has no bound, the bound is 2**-126 or
  2**126, so that S and 1/S are normal float32 numbers. (An original without bounds reaches 0 or inf: defect B10.) If
  the scale should grow beyond `max_scale`, it stays, and its counters change as if it had grown (`ApexScaler`: it
  becomes `max_scale`).
- All counters are in the state, so that a restarted run continues exactly as if it had not stopped (defect B18).
- No scaler raises an exception. If the original stops the run at its smallest scale, `exhausted` becomes True in the
  state, which `scaler_exhausted(opt_state)` returns; the scale stays, and the rule continues.
"""

from __future__ import annotations

import dataclasses
import fractions
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.scaling.scalers import (
    LARGEST,
    SMALLEST,
    ScalerState,
    require_bounds,
    require_count,
    require_factors,
    scaler_state,
)
from jaxmp.scaling.transform import find_state


@dataclasses.dataclass(frozen=True)
class _Factors:
    """The base of all rules: a scale that is multiplied by one of two factors and stays within bounds."""

    init_scale: float = 2.0**16
    """loss scale of the first step"""
    growth_factor: float = 2.0
    """factor by which the scale grows"""
    backoff_factor: float = 0.5
    """factor by which the scale is lowered"""
    growth_interval: int = 2000
    """number of finite steps after which the scale grows"""
    min_scale: float = SMALLEST
    """smallest loss scale"""
    max_scale: float = LARGEST
    """largest loss scale"""

    def __post_init__(self) -> None:
        require_bounds(self)
        require_factors(self)
        require_count(f"{type(self).__name__}.growth_interval", self.growth_interval)

    def init(self) -> Any:
        """Returns the state before the first step, with scale `init_scale`."""
        return scaler_state(self.init_scale)

    def _grown(self, scale: jax.Array) -> jax.Array:
        grown = scale * jnp.float32(self.growth_factor)
        return jnp.where(grown <= self.max_scale, grown, scale)

    def _lowered(self, scale: jax.Array) -> jax.Array:
        return jnp.maximum(scale * jnp.float32(self.backoff_factor), jnp.float32(self.min_scale))

    def _moved(self, scale: jax.Array, *, grow: jax.Array, lower: jax.Array) -> jax.Array:
        return jnp.where(grow, self._grown(scale), jnp.where(lower, self._lowered(scale), scale))


@dataclasses.dataclass(frozen=True)
class TorchScaler(_Factors):
    """The rule of `torch.amp.GradScaler`: lower on every overflow, grow after `growth_interval` finite steps in a row.

    Torch has no bounds: its scale can fall to 0, and grows as long as it is finite.

    Source: pytorch, torch/amp/grad_scaler.py (`GradScaler`), aten/src/ATen/native/cuda/AmpKernels.cu
    (`_amp_update_scale_`).
    """

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
        del grad_max
        good = state.good_steps + 1
        due = finite & (good == self.growth_interval)
        return ScalerState(
            scale=self._moved(state.scale, grow=due, lower=~finite),
            good_steps=jnp.where(finite & ~due, good, 0),
            overflows=state.overflows,
        )


@dataclasses.dataclass(frozen=True)
class JmpScaler(TorchScaler):
    """The rule of `jmp.DynamicLossScale`: torch's rule with a lower initial scale, and a smallest scale of 1.

    jmp's scale grows when its counter is `period - 1` before the step, which is after `growth_interval` finite steps,
    as in torch. Its single `factor` is both `growth_factor` and 1 / `backoff_factor`. jmp loses its smallest scale at
    every jit boundary (defect B1); this class keeps it.

    Source: deepmind/jmp, jmp/_src/loss_scale.py (`DynamicLossScale.adjust`).
    """

    init_scale: float = 2.0**15
    """loss scale of the first step; jmp has no default, this value is from its documentation"""
    min_scale: float = 1.0
    """smallest loss scale; `min_loss_scale` in jmp"""


@dataclasses.dataclass(frozen=True)
class FlaxScaler(_Factors):
    """The rule of `flax.training.dynamic_scale.DynamicScale`: one finite step more than torch's before each growth.

    The scale grows on the finite step after `growth_interval` finite steps in a row. That step does not count for the
    next growth, so that growths are `growth_interval + 1` finite steps apart. Flax's largest scale is the largest
    float32, which is not a power of two; here it is 2**126.

    Source: google/flax, flax/training/dynamic_scale.py (`DynamicScale.value_and_grad`).
    """

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
        del grad_max
        due = finite & (state.good_steps == self.growth_interval)
        return ScalerState(
            scale=self._moved(state.scale, grow=due, lower=~finite),
            good_steps=jnp.where(finite & ~due, state.good_steps + 1, 0),
            overflows=state.overflows,
        )


@dataclasses.dataclass(frozen=True)
class ApexScaler(_Factors):
    """The rule of `apex.amp`: torch's rule with a largest scale of 2**24, and the hysteresis of apex's update kernel.

    The first `hysteresis - 1` overflows in a row do not lower the scale; each later one does. Every overflow resets the
    count of finite steps. A growth beyond `max_scale` sets the scale to `max_scale`.

    Source: NVIDIA/apex, apex/amp/scaler.py (`LossScaler.update_scale`: largest scale, no hysteresis) and
    csrc/update_scale_hysteresis.cu (hysteresis, no largest scale).
    """

    max_scale: float = 2.0**24
    """largest loss scale; `max_loss_scale` in apex"""
    hysteresis: int = 1
    """number of overflows in a row from which on the scale is lowered"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("ApexScaler.hysteresis", self.hysteresis)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
        del grad_max
        good = state.good_steps + 1
        due = finite & (good == self.growth_interval)
        overflows = _one_more(state.overflows, self.hysteresis)
        return ScalerState(
            scale=self._moved(state.scale, grow=due, lower=~finite & (overflows == self.hysteresis)),
            good_steps=jnp.where(finite & ~due, good, 0),
            overflows=jnp.where(finite, 0, overflows),
        )

    def _grown(self, scale: jax.Array) -> jax.Array:
        return jnp.minimum(scale * jnp.float32(self.growth_factor), jnp.float32(self.max_scale))


@dataclasses.dataclass(frozen=True)
class MegatronScaler(_Factors):
    """The rule of Megatron-LM's `DynamicGradScaler`: a hysteresis that only a growth resets.

    After a growth, the first `hysteresis - 1` overflows do not lower the scale, in a row or not; each later one does,
    until the scale grows again. `ScalerState.overflows` counts overflows since the last growth, up to `hysteresis`.

    Source: NVIDIA/Megatron-LM, megatron/core/optimizer/grad_scaler.py (`DynamicGradScaler.update`); defaults from
    megatron/training/arguments.py.
    """

    init_scale: float = 2.0**32
    """loss scale of the first step"""
    growth_interval: int = 1000
    """number of finite steps in a row after which the scale grows; `loss_scale_window` in Megatron"""
    min_scale: float = 1.0
    """smallest loss scale"""
    hysteresis: int = 2
    """number of overflows since the last growth from which on the scale is lowered"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("MegatronScaler.hysteresis", self.hysteresis)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
        del grad_max
        good = state.good_steps + 1
        due = finite & (good == self.growth_interval)
        overflows = jnp.where(finite, state.overflows, _one_more(state.overflows, self.hysteresis))
        return ScalerState(
            scale=self._moved(state.scale, grow=due, lower=~finite & (overflows == self.hysteresis)),
            good_steps=jnp.where(finite & ~due, good, 0),
            overflows=jnp.where(due, 0, overflows),
        )


@runtime_checkable
class Exhaustible(Protocol):
    """The protocol of a scaler state that tells when the original scaler would stop the run."""

    exhausted: jax.Array
    """whether an overflow occurred when the scale could not be lowered any more, bool scalar; stays True"""


def scaler_exhausted(opt_state: Any) -> jax.Array:
    """Whether the original scaler would have stopped the run by now, bool scalar.

    Always False if the scaler never stops a run, or if `opt_state` holds no scaler. A training loop checks it from time
    to time:

        if scaler_exhausted(state.opt_state):
            raise RunFailed("the loss scale is at its floor, and gradients still overflow")
    """
    state = find_state(opt_state)
    if state is None or not isinstance(state.scaler, Exhaustible):
        return jnp.bool_(False)
    return state.scaler.exhausted


class DeepSpeedState(NamedTuple):
    """The state of `DeepSpeedScaler`; strongly typed scalars."""

    scale: jax.Array
    """the loss scale S, float32, a power of two"""
    good_steps: jax.Array
    """finite steps since the last overflow or growth, int32; the step of a growth counts as the first"""
    overflows: jax.Array
    """overflows since the hysteresis was last reset, counted up to `delayed_shift`, int32"""
    exhausted: jax.Array
    """whether an overflow should have lowered the scale at `min_scale`, bool"""


@dataclasses.dataclass(frozen=True)
class DeepSpeedScaler(_Factors):
    """The rule of DeepSpeed's `DynamicLossScaler`: a hysteresis, and an end of the run at the smallest scale.

    The first `delayed_shift - 1` overflows do not lower the scale; each later one does. A growth resets this count;
    with `consecutive_hysteresis`, every finite step does. The scale grows on the finite step after `growth_interval`
    finite steps in a row, and again on every `growth_interval`-th finite step after it. If an overflow should lower the
    scale and it is already `min_scale`, the state becomes `exhausted`; DeepSpeed raises an exception there.

    Source: microsoft/DeepSpeed, deepspeed/runtime/fp16/loss_scaler.py (`DynamicLossScaler.update_scale`); defaults from
    deepspeed/runtime/constants.py.
    """

    growth_interval: int = 1000
    """number of finite steps after which the scale grows; `loss_scale_window` in DeepSpeed"""
    min_scale: float = 1.0
    """smallest loss scale"""
    delayed_shift: int = 2
    """number of overflows from which on the scale is lowered; `hysteresis` in DeepSpeed's configuration"""
    consecutive_hysteresis: bool = False
    """whether every finite step resets the hysteresis, rather than only a growth"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("DeepSpeedScaler.delayed_shift", self.delayed_shift)

    def init(self) -> DeepSpeedState:
        """Returns the state before the first step, with scale `init_scale`."""
        return DeepSpeedState(*scaler_state(self.init_scale), exhausted=jnp.array(False))

    def update(self, state: DeepSpeedState, finite: jax.Array, grad_max: jax.Array) -> DeepSpeedState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
        del grad_max
        due = finite & (state.good_steps == self.growth_interval)
        overflows = jnp.where(finite, state.overflows, _one_more(state.overflows, self.delayed_shift))
        lower = ~finite & (overflows == self.delayed_shift)
        refill = finite if self.consecutive_hysteresis else due
        return DeepSpeedState(
            scale=self._moved(state.scale, grow=due, lower=lower),
            good_steps=jnp.where(finite, jnp.where(due, 1, state.good_steps + 1), 0),
            overflows=jnp.where(refill, 0, overflows),
            exhausted=state.exhausted | (lower & (state.scale == self.min_scale)),
        )


class FairseqState(NamedTuple):
    """The state of `FairseqScaler`; strongly typed scalars."""

    scale: jax.Array
    """the loss scale S, float32, a power of two"""
    good_steps: jax.Array
    """finite steps in a row since the last growth, int32"""
    overflows: jax.Array
    """overflows since the scale was last lowered, int32"""
    steps: jax.Array
    """steps since the scale last grew or was lowered, int32"""
    exhausted: jax.Array
    """whether an overflow should have lowered the scale below `min_scale`, bool"""


@dataclasses.dataclass(frozen=True)
class FairseqScaler(_Factors):
    """The rule of fairseq's `DynamicLossScaler`: lower the scale if a large enough share of steps overflowed.

    On an overflow, the number of overflows since the scale was last *lowered* is divided by the number of steps since
    it last *changed* (grew or was lowered; the original counts them so). If this share is at least `tolerance`, the
    scale is lowered. It grows after `growth_interval` finite steps in a row. If the scale should fall below
    `min_scale`, it stays, and the state becomes `exhausted`; fairseq raises an exception there.

    fairseq raises as soon as the scale reaches its `min_loss_scale` of 1e-4. That is not a power of two; 2**-13 is the
    smallest one above it, so that `min_scale=2**-13` gives the same rule. fairseq's single `scale_factor` is both
    `growth_factor` and 1 / `backoff_factor`. Its optional `threshold_loss_scale`, a smallest scale that does not end
    the run, is left out. Shares are compared exactly, in whole numbers, for the first 2**20 steps after a change; later
    steps are not counted.

    Source: facebookresearch/fairseq, fairseq/optim/dynamic_loss_scaler.py (`DynamicLossScaler`), called from
    fairseq/optim/fp16_optimizer.py.
    """

    init_scale: float = 2.0**15
    """loss scale of the first step"""
    min_scale: float = 2.0**-13
    """smallest loss scale"""
    tolerance: float = 0.0
    """share of overflows from which on the scale is lowered, 0 to 1: a fraction with a denominator of at most 1000"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance <= 1:
            raise InputError(f"FairseqScaler.tolerance={self.tolerance!r}: expected a share from 0 to 1")
        if float(self._share) != self.tolerance:
            raise InputError(
                f"FairseqScaler.tolerance={self.tolerance!r}: expected a fraction with a denominator of at most 1000, "
                f"such as {float(self._share)!r}"
            )

    @property
    def _share(self) -> fractions.Fraction:
        return fractions.Fraction(self.tolerance).limit_denominator(1000)

    def init(self) -> FairseqState:
        """Returns the state before the first step, with scale `init_scale`."""
        return FairseqState(*scaler_state(self.init_scale), steps=jnp.array(0, jnp.int32), exhausted=jnp.array(False))

    def update(self, state: FairseqState, finite: jax.Array, grad_max: jax.Array) -> FairseqState:
        """Applies the rule described above; see `Scaler.update` for the arguments."""
        del grad_max
        good = state.good_steps + 1
        due = finite & (good == self.growth_interval)
        # Up to 2**20, the products fit into int32. A float32 share could round to the wrong side of the tolerance.
        steps = _one_more(state.steps, 2**20)
        overflows = jnp.where(finite, state.overflows, _one_more(state.overflows, 2**20))
        lower = ~finite & (overflows * self._share.denominator >= steps * self._share.numerator)
        below = state.scale * jnp.float32(self.backoff_factor) < self.min_scale
        return FairseqState(
            scale=self._moved(state.scale, grow=due, lower=lower & ~below),
            good_steps=jnp.where(finite & ~due, good, 0),
            overflows=jnp.where(lower, 0, overflows),
            steps=jnp.where(due | lower, 0, steps),
            exhausted=state.exhausted | (lower & below),
        )


def _one_more(count: jax.Array, most: int) -> jax.Array:
    """Returns `min(count + 1, most)`, so that a count that is only compared with `most` cannot overflow."""
    return jnp.minimum(count + 1, most)
