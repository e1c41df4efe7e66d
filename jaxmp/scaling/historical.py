"""Historical scalers: the loss scale as torch, jmp, flax, apex, Megatron, DeepSpeed and fairseq move it.

For reproducing what was trained with them, and for comparing rules; for new work there is `DynamicScaler`. Each follows
its original step by step, quirks included, in jaxmp's names, with the original's defaults. All differ from their
originals in these ways:

- The scale stays a power of two within `[min_scale, max_scale]`. Where the original knows no such bound, it is 2**-126
  or 2**126, and S and 1/S are normal float32 numbers (an original without bounds reaches 0 or inf instead: defect B10).
  A growth that would exceed `max_scale` does not happen, but is counted as one.
- All counters are in the state, so that a run that is restarted goes on as if it had not stopped (defect B18).
- Nothing is raised. Where the original stops the run at its floor, the state says `exhausted` from that step on, and
  `scaler_exhausted(opt_state)` reads it; the scale stays where it is, and the rule goes on.
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
    """What all of the rules have: a scale that is multiplied now and then, within bounds."""

    init_scale: float = 2.0**16
    """scale of the first step"""
    growth_factor: float = 2.0
    """factor when the scale grows"""
    backoff_factor: float = 0.5
    """factor when the scale is lowered"""
    growth_interval: int = 2000
    """finite steps before the scale grows"""
    min_scale: float = SMALLEST
    """floor of the scale"""
    max_scale: float = LARGEST
    """cap of the scale"""

    def __post_init__(self) -> None:
        require_bounds(self)
        require_factors(self)
        require_count(f"{type(self).__name__}.growth_interval", self.growth_interval)

    def init(self) -> Any:
        """A state at `init_scale`."""
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
    """`torch.amp.GradScaler`: an overflow lowers the scale, `growth_interval` finite steps in a row let it grow.

    Torch has no bounds: its scale can be lowered to 0, and grows as long as it is finite.

    Source: pytorch, torch/amp/grad_scaler.py (`GradScaler`), aten/src/ATen/native/cuda/AmpKernels.cu
    (`_amp_update_scale_`).
    """

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """The rule of the class; see `Scaler.update` for the arguments."""
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
    """`jmp.DynamicLossScale`: torch's rule, from a lower start and with a floor of 1.

    jmp grows when its counter is `period - 1` before the step: after `growth_interval` finite steps too. Its one
    `factor` is `growth_factor`, and 1 / `backoff_factor`. Its floor is lost at every jit boundary (defect B1); here it
    holds.

    Source: deepmind/jmp, jmp/_src/loss_scale.py (`DynamicLossScale.adjust`).
    """

    init_scale: float = 2.0**15
    """scale of the first step; jmp has no default, its documentation uses this one"""
    min_scale: float = 1.0
    """floor of the scale; jmp's `min_loss_scale`"""


@dataclasses.dataclass(frozen=True)
class FlaxScaler(_Factors):
    """`flax.training.dynamic_scale.DynamicScale`: grows on the finite step after `growth_interval` of them in a row.

    The step that grows is not counted again, so that growths are `growth_interval + 1` finite steps apart. Flax's cap
    is the largest float32, which is no power of two.

    Source: google/flax, flax/training/dynamic_scale.py (`DynamicScale.value_and_grad`).
    """

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """The rule of the class; see `Scaler.update` for the arguments."""
        del grad_max
        due = finite & (state.good_steps == self.growth_interval)
        return ScalerState(
            scale=self._moved(state.scale, grow=due, lower=~finite),
            good_steps=jnp.where(finite & ~due, state.good_steps + 1, 0),
            overflows=state.overflows,
        )


@dataclasses.dataclass(frozen=True)
class ApexScaler(_Factors):
    """`apex.amp`: torch's rule with a cap of 2**24, and the hysteresis of apex's update kernel.

    Only the `hysteresis`-th overflow in a row, and each after it, lowers the scale; every overflow starts the count of
    finite steps anew. A growth beyond the cap stops at the cap.

    Source: NVIDIA/apex, apex/amp/scaler.py (`LossScaler.update_scale`: the cap, no hysteresis) and
    csrc/update_scale_hysteresis.cu (the hysteresis, no cap).
    """

    max_scale: float = 2.0**24
    """cap of the scale; apex's `max_loss_scale`"""
    hysteresis: int = 1
    """overflows in a row before the scale is lowered"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("ApexScaler.hysteresis", self.hysteresis)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """The rule of the class; see `Scaler.update` for the arguments."""
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
    """Megatron-LM's `DynamicGradScaler`: a hysteresis that only a growth refills.

    `hysteresis - 1` overflows are let pass, in a row or not; each after them lowers the scale, until it grows again.
    `ScalerState.overflows` counts those since the last growth, up to `hysteresis`.

    Source: NVIDIA/Megatron-LM, megatron/core/optimizer/grad_scaler.py (`DynamicGradScaler.update`); defaults from
    megatron/training/arguments.py.
    """

    init_scale: float = 2.0**32
    """scale of the first step"""
    growth_interval: int = 1000
    """finite steps in a row before the scale grows; Megatron's `loss_scale_window`"""
    min_scale: float = 1.0
    """floor of the scale"""
    hysteresis: int = 2
    """the overflow since the last growth from which on the scale is lowered"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("MegatronScaler.hysteresis", self.hysteresis)

    def update(self, state: ScalerState, finite: jax.Array, grad_max: jax.Array) -> ScalerState:
        """The rule of the class; see `Scaler.update` for the arguments."""
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
    """A scaler state that knows when its rule is at its end."""

    exhausted: jax.Array
    """bool scalar: an overflow came where the scale could not be lowered any more; stays True"""


def scaler_exhausted(opt_state: Any) -> jax.Array:
    """Whether the scaler has come to the end of its rule, where its original stops the run; bool scalar.

    True from that step on; False for a scaler that never gives up, and where `opt_state` holds none. A loop reads it
    now and then, and ends the run:

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
    """finite steps since the last overflow or growth, int32; the growing step counts for the next growth"""
    overflows: jax.Array
    """overflows since the hysteresis was full, up to `delayed_shift`, int32"""
    exhausted: jax.Array
    """whether an overflow came at the floor, bool"""


@dataclasses.dataclass(frozen=True)
class DeepSpeedScaler(_Factors):
    """DeepSpeed's `DynamicLossScaler`: a hysteresis, and the end of the run at the floor.

    The `delayed_shift`-th overflow, and each after it, lowers the scale. A growth fills the hysteresis up again; with
    `consecutive_hysteresis` every finite step does. The finite step after `growth_interval` of them lets the scale
    grow, and so does each `growth_interval`-th after it. An overflow that finds the scale at `min_scale`, and would
    lower it, makes the state `exhausted`; DeepSpeed raises there.

    Source: microsoft/DeepSpeed, deepspeed/runtime/fp16/loss_scaler.py (`DynamicLossScaler.update_scale`); defaults from
    deepspeed/runtime/constants.py.
    """

    growth_interval: int = 1000
    """finite steps before the scale grows; DeepSpeed's `loss_scale_window`"""
    min_scale: float = 1.0
    """floor of the scale"""
    delayed_shift: int = 2
    """the overflow from which on the scale is lowered; `hysteresis` in DeepSpeed's configuration"""
    consecutive_hysteresis: bool = False
    """whether every finite step fills the hysteresis up, and not only a growth"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("DeepSpeedScaler.delayed_shift", self.delayed_shift)

    def init(self) -> DeepSpeedState:
        """A state at `init_scale`."""
        return DeepSpeedState(*scaler_state(self.init_scale), exhausted=jnp.array(False))

    def update(self, state: DeepSpeedState, finite: jax.Array, grad_max: jax.Array) -> DeepSpeedState:
        """The rule of the class; see `Scaler.update` for the arguments."""
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
    """whether the scale should have gone below its floor, bool"""


@dataclasses.dataclass(frozen=True)
class FairseqScaler(_Factors):
    """fairseq's `DynamicLossScaler`: lowers the scale when too large a share of the steps overflowed.

    On an overflow, the overflows since the scale was last *lowered* are divided by the steps since it last *moved*
    (grown or lowered; the original counts the two so); at a share of `tolerance` or more the scale is lowered. It grows
    after `growth_interval` finite steps in a row. Where the scale would go below `min_scale` it stays, and the state is
    `exhausted`; fairseq raises there.

    fairseq raises as soon as the scale reaches 1e-4 (`min_loss_scale`), which is no power of two; 2**-13 is the last
    one above it, so that the floor of 2**-13 is the same rule. Its one `scale_factor` is `growth_factor`, and 1 /
    `backoff_factor`; its optional `threshold_loss_scale`, a floor without an end, is left out. Shares are compared in
    whole numbers, exactly, in the first 2**20 steps after a move; from then on the steps are no longer counted.

    Source: facebookresearch/fairseq, fairseq/optim/dynamic_loss_scaler.py (`DynamicLossScaler`), called from
    fairseq/optim/fp16_optimizer.py.
    """

    init_scale: float = 2.0**15
    """scale of the first step"""
    min_scale: float = 2.0**-13
    """floor of the scale"""
    tolerance: float = 0.0
    """share of overflows at which the scale is lowered, 0 to 1, a fraction with a denominator of at most 1000"""

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
        """A state at `init_scale`."""
        return FairseqState(*scaler_state(self.init_scale), steps=jnp.array(0, jnp.int32), exhausted=jnp.array(False))

    def update(self, state: FairseqState, finite: jax.Array, grad_max: jax.Array) -> FairseqState:
        """The rule of the class; see `Scaler.update` for the arguments."""
        del grad_max
        good = state.good_steps + 1
        due = finite & (good == self.growth_interval)
        # Up to 2**20 the products stay within int32; a float32 share could fall on the wrong side of the tolerance.
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
    """`count + 1`, but no more than `most`: a count that is only compared with `most` cannot run over."""
    return jnp.minimum(count + 1, most)
