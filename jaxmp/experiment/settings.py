"""`Loop` and `Parallel`: how long an experiment trains, and how its steps are spread over devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Literal, get_args

import jax
from jax.sharding import AxisType

from jaxmp.errors import InputError, nearest, number, whole_number
from jaxmp.training.gradients import OVERFLOWS
from jaxmp.training.metrics import WATCHABLE
from jaxmp.training.parallel import AXIS, Devices


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long to train, and what to do on the way."""

    epochs: int = 10
    """Passes over the training set."""
    steps: int | None = None
    """Steps to train; replaces epochs."""
    limit_batches: int | None = None
    """Batches of an epoch to train on, and as many rows of each other split to evaluate on; by default all."""
    overfit_batches: int | None = None
    """Train on the same few batches in every epoch, and validate on their rows: a model that learns fits them all."""
    max_minutes: float | None = field(default=None, metadata={"identity": "operates"})
    """Save and stop after so many minutes; the same command goes on. By default never."""
    log_every: int = field(default=50, metadata={"identity": "operates"})
    """Steps between two lines of training metrics; each line shows the mean since the last one."""
    eval_every: int | None = field(default=None, metadata={"identity": "chooses"})
    """Steps between two evaluations on the validation split; by default one evaluation an epoch."""
    save_every: int | None = field(default=None, metadata={"identity": "operates"})
    """Steps between two checkpoints; one is also saved at every evaluation."""
    keep: int = field(default=2, metadata={"identity": "operates"})
    """Number of the latest checkpoints to keep; the best one is kept as well."""
    monitor: str | None = field(default=None, metadata={"identity": "chooses"})
    """Validation metric that decides which checkpoint is best and when training stops early; by default the task's."""
    mode: Literal["max", "min"] | None = field(default=None, metadata={"identity": "chooses"})
    """Whether the best value of that metric is the largest or the smallest; by default as the task declares."""
    patience: int | None = field(default=None, metadata={"identity": "chooses"})
    """Stop early after this many evaluations in a row without a better value; by default never."""
    accumulate_steps: int = 1
    """Microbatches to split each batch into; their gradients are summed, which saves memory."""
    accumulate_overflow: Literal["window", "microbatch"] = "window"
    """What is dropped if one microbatch overflows: the whole step (window), or only that microbatch."""
    batch_norm: Literal["global", "replica"] = "global"
    """Devices over which batch normalisation takes its statistics: all together (global), or each its own (replica)."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, for example 0.999; evaluation then uses the average."""
    max_consecutive_skips: int = field(default=50, metadata={"identity": "operates"})
    """Fail after this many skipped steps in a row; a step is skipped if its gradients overflow."""
    steps_per_dispatch: int | None = field(default=None, metadata={"identity": "operates"})
    """Largest number of steps in one call of the device; by default chosen for speed."""
    ranges_every: int | None = field(default=None, metadata={"identity": "operates"})
    """Steps between two records of the ranges of values, with under- and overflows."""
    watch: tuple[str, ...] = field(default=(), metadata={"identity": "operates"})
    """Metrics of training to measure in each step: gradient_norm, update_norm, and zero_losses, the share of losses
    that are exactly 0."""
    log_images: int | None = field(default=None, metadata={"identity": "operates"})
    """Images of the first batch to show in TensorBoard and Weights & Biases, as the model sees them."""
    log_samples: int | None = field(default=None, metadata={"identity": "operates"})
    """Texts or pictures to draw at each evaluation on the validation split, as `jaxmp sample` does, kept in the run's
    folder and in TensorBoard."""
    wandb: bool = field(default=False, metadata={"identity": "operates"})
    """Send the metrics to Weights & Biases, too."""

    def __post_init__(self) -> None:
        """Refuses what could not run."""
        for name in ("epochs", "log_every", "keep", "max_consecutive_skips", "accumulate_steps"):
            object.__setattr__(self, name, whole_number(f"loop.{name}", getattr(self, name), 1))
        limits = ("limit_batches", "overfit_batches")
        for name in (
            "steps",
            "eval_every",
            "save_every",
            "patience",
            "ranges_every",
            "steps_per_dispatch",
            "log_images",
            "log_samples",
            *limits,
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(f"loop.{name}", getattr(self, name), 1))
        if self.ema_decay is not None:
            object.__setattr__(self, "ema_decay", float(number("loop.ema_decay", self.ema_decay)))
        if self.max_minutes is not None:
            object.__setattr__(self, "max_minutes", float(number("loop.max_minutes", self.max_minutes)))
        self._require("max_minutes", self.max_minutes is None or self.max_minutes > 0, "a number above 0")
        if isinstance(self.watch, str):
            raise InputError(f"loop.watch = {self.watch!r}: expected a tuple, ({self.watch!r},)")
        for name in self.watch:
            if name not in WATCHABLE:
                raise InputError(
                    f"loop.watch: {name!r}: expected {', '.join(WATCHABLE)}{nearest(str(name), WATCHABLE)}"
                )
        self._require("accumulate_overflow", self.accumulate_overflow in OVERFLOWS, " or ".join(OVERFLOWS))
        self._require("batch_norm", self.batch_norm in ("global", "replica"), "global or replica")
        self._require("mode", self.mode in (None, "max", "min"), "max or min")
        self._require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"loop.{name}={getattr(self, name)}: expected {expected}")


Mode = Literal["jit", "pmap"]
Shard = Literal["replicated", "zero1", "fsdp"]
RematPolicy = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the work is spread over the devices, and what of it is done twice to save memory."""

    mode: Mode = field(default="jit", metadata={"identity": "rounds"})
    """How the step is distributed: by jax.jit over a mesh of devices, or by jax.pmap."""
    shard: Shard = field(default="replicated", metadata={"identity": "rounds"})
    """What is split over the devices: nothing, the optimizer state (zero1), or the parameters as well (fsdp)."""
    remat: tuple[str, ...] = field(default=(), metadata={"identity": "rounds"})
    """Modules to recompute in the backward pass, to save memory: paths such as encoder/*, or classes such as @Block."""
    remat_policy: RematPolicy = field(default="nothing_saveable", metadata={"identity": "rounds"})
    """What is stored of these modules nevertheless; a policy in jax.checkpoint_policies."""

    def __post_init__(self) -> None:
        """Refuses what no mode can do."""
        for name, kind in (("mode", Mode), ("shard", Shard), ("remat_policy", RematPolicy)):
            value, values = getattr(self, name), get_args(kind)
            if value not in values:
                raise InputError(
                    f"parallel.{name} = {value!r}: expected {' or '.join(values)}{nearest(str(value), values)}"
                )
        if isinstance(self.remat, str):
            raise InputError(f"parallel.remat = {self.remat!r}: expected a tuple, ({self.remat!r},)")
        if not isinstance(self.remat, tuple) or not all(isinstance(text, str) for text in self.remat):
            raise InputError(f"parallel.remat = {self.remat!r:.60}: expected a tuple of patterns, such as ('@Block',)")
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
