"""Optimizers and learning-rate schedules: what a config says, made into one optax transformation.

    Adam(1e-3, schedule=Cosine(warmup_steps=500), clip_norm=1.0).make(steps=10_000)

There is no loss scaling in here: `jaxmp.loss_scaling(optimizer.make(steps), scaler)` goes around the whole, so that
clipping, weight decay and the schedule's count are part of what an overflow skips.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.errors import InputError
from jaxmp.paths import path_name
from jaxmp.scaling.float32_math import clip_by_global_norm

KERNELS_AND_EMBEDDINGS = ("*kernel", "*embedding")
"""What weight decay is for in Flax's naming: it leaves alone biases and the scales of norms."""


def _require(owner: object, field: str, valid: bool, expected: str) -> None:
    """Raises an InputError that names `owner.field`, its value and what was expected, unless `valid`."""
    if not valid:
        raise InputError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate at applied step t = 0, 1, ...: `peak * min(1, (t + 1) / warmup_steps) * factor(t, steps)`.

    The first step of a warm-up is `peak / warmup_steps`, not 0, and its last is the peak. Skipped steps do not count.
    """

    warmup_steps: int = 0
    """Applied steps in which the learning rate rises linearly to its peak."""

    def __post_init__(self) -> None:
        _require(self, "warmup_steps", self.warmup_steps >= 0, "0 or more steps")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        """The share of the peak at step `t` (float32 scalar) of `steps`, without the warm-up."""
        raise NotImplementedError

    def make(self, peak: float, steps: int) -> optax.Schedule:
        """A function from the count of applied steps (int32 scalar) to the learning rate (float32 scalar)."""
        _require(self, "warmup_steps", self.warmup_steps <= steps, f"at most the {steps} steps of the run")

        def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
            t = jnp.asarray(count, jnp.float32)
            warmup = jnp.minimum(1.0, (t + 1.0) / max(self.warmup_steps, 1))
            return peak * warmup * self._factor(t, steps)

        return learning_rate

    def _progress(self, t: jax.Array, steps: int) -> jax.Array:
        """0 at the end of the warm-up, 1 at the end of the run and after it."""
        return jnp.clip((t - self.warmup_steps) / max(steps - self.warmup_steps, 1), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak, all the time."""

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return jnp.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the peak to `final` (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983; no restarts)."""

    final: float = 0.0
    """What is left at the end, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "final", 0 <= self.final <= 1, "a fraction of the peak, 0 to 1")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + jnp.cos(math.pi * self._progress(t, steps)))


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from the peak to `final`."""

    final: float = 0.0
    """What is left at the end, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "final", 0 <= self.final <= 1, "a fraction of the peak, 0 to 1")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        return 1.0 + (self.final - 1.0) * self._progress(t, steps)


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """The peak, multiplied by `drop` from each boundary on."""

    boundaries: tuple[float, ...] = (0.5, 0.75)
    """Where the learning rate drops: fractions of the run (all below 1), or applied steps (all 1 or more)."""
    drop: float = 0.1
    """What each boundary multiplies the learning rate by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip((0.0, *self.boundaries), self.boundaries, strict=False))
        one_kind = len({boundary < 1 for boundary in self.boundaries}) == 1
        _require(self, "boundaries", rising and one_kind, "rising fractions of the run, or rising numbers of steps")
        _require(self, "drop", 0 < self.drop < math.inf, "a positive number")

    def _factor(self, t: jax.Array, steps: int) -> jax.Array:
        first_steps = [round(boundary * steps) if boundary < 1 else round(boundary) for boundary in self.boundaries]
        passed = jnp.sum(t >= jnp.array(first_steps, jnp.float32))
        return self.drop ** passed.astype(jnp.float32)


def decay_mask(params: Any, *, patterns: tuple[str, ...]) -> Any:
    """The parameters that weight decay shrinks: a tree of bools like `params`, True where a path matches a pattern.

    A path is `encoder/layer_0/Dense_0/kernel`; in a pattern `*` stands for any characters, `/` included. Raises an
    InputError for a pattern that matches nothing (of `KERNELS_AND_EMBEDDINGS`, one is enough).

    >>> decay_mask({"Dense_0": {"kernel": 1.0, "bias": 1.0}}, patterns=("*kernel",))
    {'Dense_0': {'bias': False, 'kernel': True}}
    """
    paths = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
    names = jax.tree.leaves(paths)
    idle = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if idle and (idle == list(patterns) or patterns != KERNELS_AND_EMBEDDINGS):
        raise InputError(
            f"weight decay: the pattern {idle[0]!r} in the optimizer's `decay` matches no parameter; "
            f"the nearest path is {_nearest_path(idle[0], names)!r}"
        )
    return jax.tree.map(lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns), paths)


def _nearest_path(pattern: str, paths: list[str]) -> str:
    """The path whose tail, of as many segments as the pattern has, is most like the pattern."""
    segments = pattern.count("/") + 1

    def likeness(path: str) -> float:
        return difflib.SequenceMatcher(None, pattern, "/".join(path.split("/")[-segments:])).ratio()

    return max(paths, key=likeness, default="")


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share: the learning rate and its schedule, clipping, weight decay."""

    learning_rate: float = 1e-3
    """Its peak, that is without the schedule."""
    _: KW_ONLY
    schedule: Any = Constant()
    """How the learning rate changes in the run: Constant, Cosine, Linear or Step (or anything with their `make`)."""
    clip_norm: float | None = None
    """The largest global norm of the gradients, which are scaled down to it; None: as they are."""
    weight_decay: float = 0.0
    """Share of a parameter that is added to its gradient (L2 regularisation)."""
    decay: tuple[str, ...] = KERNELS_AND_EMBEDDINGS
    """Paths of the parameters that decay (`*`: any characters); by default not biases and the scales of norms."""

    def __post_init__(self) -> None:
        _require(self, "learning_rate", 0 <= self.learning_rate < math.inf, "0 or a positive number")
        _require(self, "schedule", hasattr(self.schedule, "make"), "Constant(), Cosine(), Linear() or Step()")
        _require(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "a positive number, or None")
        _require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or a positive number")
        _require(self, "decay", not isinstance(self.decay, str), f"a tuple, ({self.decay!r},)")
        _require(
            self, "decay", self.weight_decay == 0 or len(self.decay) > 0, "a pattern at least, for the weight decay"
        )

    def _rule(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        """The optax optimizer, weight decay included."""
        raise NotImplementedError

    def make(self, steps: int) -> optax.GradientTransformation:
        """Clipping, then the optimizer, for a run of `steps` applied steps; its `init` checks `decay`."""
        rule = self._rule(self.schedule.make(self.learning_rate, steps))
        return rule if self.clip_norm is None else optax.chain(clip_by_global_norm(self.clip_norm), rule)

    def _decay_mask(self) -> Callable[[Any], Any] | None:
        """What tells optax, from the parameters, which of them decay; None where none does."""
        return functools.partial(decay_mask, patterns=self.decay) if self.weight_decay else None

    def _after_l2(self, rule: optax.GradientTransformation) -> optax.GradientTransformation:
        """`rule`, given gradients with the weight decay added to them."""
        if not self.weight_decay:
            return rule
        return optax.chain(optax.add_decayed_weights(self.weight_decay, self._decay_mask()), rule)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    learning_rate: float = 0.1
    """Its peak, that is without the schedule."""
    _: KW_ONLY
    momentum: float = 0.9
    """What is kept of the sum of past gradients; 0: no momentum, and no memory for it."""
    nesterov: bool = False
    """Nesterov's momentum, which looks one step ahead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "momentum", 0 <= self.momentum < 1, "0 or more, below 1")
        _require(self, "nesterov", self.momentum > 0 or not self.nesterov, "False, where momentum is 0")

    def _rule(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return self._after_l2(optax.sgd(learning_rate, self.momentum or None, self.nesterov))


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980)."""

    b1: float = 0.9
    """Decay of the running mean of the gradients."""
    b2: float = 0.999
    """Decay of the running mean of their squares."""
    eps: float = 1e-8
    """Added to the root of that mean, in float32: in float16 it would be 0, and a gradient of 0 then gives a NaN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "b1", 0 <= self.b1 < 1, "0 or more, below 1")
        _require(self, "b2", 0 <= self.b2 < 1, "0 or more, below 1")
        _require(self, "eps", 0 < self.eps < math.inf, "a positive number")

    def _rule(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return self._after_l2(optax.adam(learning_rate, self.b1, self.b2, self.eps))


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101)."""

    weight_decay: float = 0.01
    """Share of a parameter that a step takes off it, times the learning rate."""

    def _rule(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=self._decay_mask()
        )


@dataclass(frozen=True, kw_only=True)
class LAMB(Adam):
    """Adam with a step in proportion to each layer's norm, for large batches (You et al., https://arxiv.org/abs/1904.00962)."""

    eps: float = 1e-6
    """Added to the root of the mean of squares, in float32."""
    weight_decay: float = 0.01
    """Share of a parameter that is added to its update, before the update is scaled to the layer's norm."""

    def _rule(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.lamb(
            learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=self._decay_mask()
        )


@dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of a running mean: one moment, steps of one size (Chen et al., https://arxiv.org/abs/2302.06675)."""

    learning_rate: float = 1e-4
    """Its peak, that is without the schedule; the paper's advice is a third to a tenth of AdamW's."""
    _: KW_ONLY
    b1: float = 0.9
    """Share of the running mean in the mix with the gradient whose sign is the update."""
    b2: float = 0.99
    """Decay of the running mean of the gradients."""
    weight_decay: float = 0.1
    """Share of a parameter that a step takes off it, times the learning rate; three to ten times AdamW's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "b1", 0 <= self.b1 < 1, "0 or more, below 1")
        _require(self, "b2", 0 <= self.b2 < 1, "0 or more, below 1")

    def _rule(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.lion(learning_rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=self._decay_mask())
