"""`Loop` and `Parallel`: how long an experiment trains, and how its steps are spread over devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType

from jaxmp.errors import InputError
from jaxmp.training.parallel import AXIS, Devices
from jaxmp.training.step import OVERFLOWS


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long to train, and what to do on the way."""

    epochs: int = 10
    """passes over the training set"""
    steps: int | None = None
    """steps to train, instead of epochs"""
    log_every: int = 50
    """steps between two lines of training metrics, each the mean over the steps since the last"""
    eval_every: int | None = None
    """steps between two evaluations; each epoch by default"""
    save_every: int | None = None
    """steps between two checkpoints, besides those after each evaluation"""
    keep: int = 2
    """how many of the last checkpoints are kept, besides the best"""
    monitor: str | None = None
    """validation metric by which a checkpoint is the best and training stops early; by default the task's"""
    mode: Literal["max", "min"] | None = None
    """whether more of that metric is better, or less; by default as the task declares it"""
    patience: int | None = None
    """evaluations in a row without a better metric after which training stops early"""
    accumulate_steps: int = 1
    """microbatches into which a batch is split, to save memory: the same update, to rounding"""
    accumulate_overflow: Literal["window", "microbatch"] = "window"
    """what an overflow in one microbatch drops: the step, or only that microbatch of that device"""
    batch_norm: Literal["global", "replica"] = "global"
    """over which examples batch normalisation takes its statistics: of all devices, or of each device for itself"""
    ema_decay: float | None = None
    """decay of a moving average of the weights, which is then what is evaluated"""
    max_consecutive_skips: int = 50
    """steps skipped in a row after which the run has failed"""
    steps_per_dispatch: int | None = None
    """most steps in one dispatch; by default all up to the next thing to do, or one where that is faster"""
    ranges_every: int | None = None
    """steps between two looks at exponents, under- and overflow; changes no bit, and is no part of the run's hash"""
    wandb: bool = False
    """also report to Weights & Biases"""

    def __post_init__(self) -> None:
        """Refuses what could not run."""
        for name in ("epochs", "log_every", "keep", "max_consecutive_skips", "accumulate_steps"):
            self._require(name, _is_positive(getattr(self, name)), "a whole number of at least 1")
        for name in ("steps", "eval_every", "save_every", "patience", "ranges_every", "steps_per_dispatch"):
            value = getattr(self, name)
            self._require(name, value is None or _is_positive(value), "a whole number of at least 1")
        self._require("accumulate_overflow", self.accumulate_overflow in OVERFLOWS, " or ".join(OVERFLOWS))
        self._require("batch_norm", self.batch_norm in ("global", "replica"), "global or replica")
        self._require("mode", self.mode in (None, "max", "min"), "max or min")
        self._require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"loop.{name}={getattr(self, name)}: expected {expected}")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the work is spread over the devices, and what of it is done twice to save memory."""

    mode: Literal["jit", "pmap"] = "jit"
    """jit with a manual region around the gradient, or pmap"""
    shard: Literal["replicated", "zero1", "fsdp"] = "replicated"
    """what is split over the devices: nothing; the optimizer's state; or the parameters too, with collectives by XLA,
    in the dtype of the products (zero1 and fsdp need jit)"""
    remat: tuple[str, ...] = ()
    """modules that the backward pass computes again, to keep less in memory: paths such as encoder/*, or @Class"""
    remat_policy: Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"] = "nothing_saveable"
    """what is kept inside of these modules nevertheless, as jax.checkpoint_policies calls it"""

    def __post_init__(self) -> None:
        """Refuses what no mode can do."""
        if isinstance(self.remat, str):
            raise InputError(f"parallel.remat = {self.remat!r}: expected a tuple, ({self.remat!r},)")
        if self.shard != "replicated" and self.mode != "jit":
            raise InputError(f"parallel.shard={self.shard} needs parallel.mode=jit; it is {self.mode}")

    def make(self, batch_size: int, microbatches: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Devices:
        """The devices, run in this mode.

        Args:
          batch_size: rows of a batch, over all devices.
          microbatches: how many parts a step takes a batch in.
          devices: all by default, those of other processes included.

        Raises:
          InputError: the batch does not divide over the devices and microbatches; or `pmap` over several processes.
        """
        devices = jax.devices() if devices is None else devices
        count = len(devices)
        if self.mode == "pmap" and any(device.process_index != jax.process_index() for device in devices):
            raise InputError(
                "parallel.mode=pmap: it stacks what every device holds, which no process can where devices are another "
                "one's; expected parallel.mode=jit with --distributed"
            )
        unit = count * microbatches
        if batch_size % unit:
            below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
            fitting = f"{below} or {above}" if below else f"{above}"
            into = f" and {microbatches} microbatches (loop.accumulate_steps)" if microbatches > 1 else ""
            raise InputError(
                f"data.batch_size={batch_size} does not divide over {count} devices{into}; the nearest that does: "
                f"{fitting}"
            )
        mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        return Devices(self.mode, mesh, self.shard, microbatches)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value >= 1
