"""Optimizers as config values; `make` turns one, with its schedule, clipping and weight decay, into an optax optimizer.

    Adam(1e-3, schedule=CosineDecay(warmup_steps=500), clip_norm=1.0).make(steps=10_000)

Loss scaling is not part of it: wrap the result, `jaxmp.loss_scaling(optimizer.make(steps), scaler)`, so that an
overflow also skips clipping, weight decay and the count of the schedule.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import jax
import optax

from jaxmp.errors import InputError, nearest, require
from jaxmp.scaling.float32_math import clip_by_global_norm
from jaxmp.scaling.state_format import parse_state_format, state_format
from jaxmp.training.privacy import Privacy
from jaxmp.training.schedules import ConstantRate, check_arguments, make_schedule, schedule_numbers
from jaxmp.trees import Pattern, path_name

KERNELS_AND_EMBEDDINGS = ("**/*kernel", "**/*embedding")
"""Patterns of the parameters that decay by default, in Flax's naming: not biases, and not the scales of norms."""


def decay_mask(params: Any, *, patterns: tuple[str, ...]) -> Any:
    """The parameters that weight decay shrinks: a tree of bools like `params`, True where a path matches a pattern.

    Args:
      params: a pytree; the path of a leaf is `encoder/layer_0/Dense_0/kernel`. None stands for a frozen parameter.
      patterns: see `jaxmp.trees.Pattern`.

    Raises:
      InputError: a pattern matches no parameter, frozen ones included. Of `KERNELS_AND_EMBEDDINGS`, one that matches
        is enough.

    >>> decay_mask({"Dense_0": {"kernel": 1.0, "bias": 1.0}}, patterns=("**/kernel",))
    {'Dense_0': {'bias': False, 'kernel': True}}
    """
    paths = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
    with_frozen = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: leaf is None)
    names, wanted = [path_name(path) for path, _ in with_frozen], [Pattern(text) for text in patterns]
    idle = [pattern for pattern in wanted if not any(pattern.matches(name) for name in names)]
    if idle and (idle == wanted or patterns != KERNELS_AND_EMBEDDINGS):
        raise InputError(
            f"weight decay: the pattern {str(idle[0])!r} in the optimizer's `decay` matches no parameter; "
            f"{idle[0].what_there_is(names)}"
        )
    return jax.tree.map(lambda path: any(pattern.matches(path) for pattern in wanted), paths)


def is_optimizer(value: Any) -> bool:
    """Whether `make_optimizer` takes `value`: an object with `make`, an optax transformation, or a function."""
    if isinstance(value, optax.GradientTransformation):
        return True
    return not isinstance(value, type) and (callable(getattr(value, "make", None)) or isinstance(value, _FUNCTIONS))


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)

Numbers = Mapping[str, Any]
"""Numbers of an optimizer by name, trees of Python floats, or of float32 scalars that are arguments of the program."""


def optimizer_numbers(optimizer: Any, steps: int) -> dict[str, Any]:
    """The numbers that may be arguments of a compiled step, see `Optimizer.numbers`; {} unless it is one of jaxmp's.

    Also {} where a subclass has a `make` or a `rate` of its own, which need not take numbers.
    """
    return optimizer.numbers(steps) if isinstance(optimizer, Optimizer) and _takes_numbers(type(optimizer)) else {}


def _takes_numbers(kind: type[Optimizer]) -> bool:
    return kind.make is Optimizer.make and kind.rate is Optimizer.rate


def make_optimizer(optimizer: Any, steps: int, numbers: Numbers | None = None) -> optax.GradientTransformation:
    """The optax transformation of an optimizer, for a run of `steps` steps.

    Args:
      optimizer: one of jaxmp's, or an object with a `make(steps)` like theirs; an optax transformation; or a function
        of the number of steps that returns one: `lambda steps: optax.sgd(optax.linear_schedule(0.1, 0.0, steps))`.
      steps: number of steps of the run.
      numbers: what takes the place of the optimizer's own `optimizer_numbers`, a tree like it; None or {}: they are
        constants.

    Raises:
      InputError: as the optimizer's `make` does; or what comes out is no optax transformation, or scales the loss
        itself, which the experiment's scaler does.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        made, name = optimizer, "the optimizer"
    else:
        of_ones_own = isinstance(optimizer, _FUNCTIONS)
        make = optimizer if of_ones_own else optimizer.make
        name = f"optimizer: {getattr(make, '__qualname__', 'the function')}({steps})"
        try:
            made = make(steps, numbers) if numbers else make(steps)
        except TypeError as error:
            if not of_ones_own:
                raise
            raise InputError(f"{name} raised TypeError: {error}; expected a function of the number of steps") from error
    if not isinstance(made, optax.GradientTransformation):
        wrapped = " (.gradient_transformation() gives one)" if hasattr(made, "gradient_transformation") else ""
        raise InputError(f"{name} is a {type(made).__name__}; expected an optax transformation{wrapped}")
    if getattr(made.init, "__qualname__", "").startswith("loss_scaling."):
        raise InputError(
            f"{name} scales the loss; expected the optimizer alone, since Experiment.scaler says the scaling"
        )
    return made


def _is_path(text: str) -> bool:
    """Whether `text` is a pattern for paths: a parameter has no class."""
    try:
        return not Pattern(text).by_class
    except InputError:
        return False


@dataclass(frozen=True)
class Optimizer:
    """The base class of optimizers: learning rate, schedule, clipping, weight decay and the formats of the state.

    Raises:
      InputError: a value is out of range.
    """

    learning_rate: float = 1e-3
    """Peak learning rate; the schedule multiplies it by a factor of 0 to 1."""
    _: KW_ONLY
    schedule: Any = ConstantRate()
    """How the learning rate changes: ConstantRate, CosineDecay, LinearDecay, StepDecay, or an optax schedule, whose
    values multiply the learning rate."""
    clip_norm: float | None = None
    """Largest global norm of the gradients: larger ones are scaled down to it. By default they are not clipped."""
    weight_decay: float = 0.0
    """Weight decay: this multiple of a parameter is added to its gradient (L2 regularisation)."""
    decay: tuple[str, ...] = KERNELS_AND_EMBEDDINGS
    """Parameters that decay: patterns of paths (*: part of a name, **: any names); by default not biases and norms."""
    state_format: str | None = None
    """Formats of fields of the optimizer's state: mu=e4m3:block128,nu=e4m3:block128,expanded. By default float32."""

    def __post_init__(self) -> None:
        if callable(self.learning_rate):
            kind = type(self).__name__
            raise InputError(
                f"{kind}.learning_rate is a function: expected a number; a schedule of learning rates is given as "
                f"{kind}(1.0, schedule=...), whose values multiply the number"
            )
        require(self, "learning_rate", 0 <= self.learning_rate < math.inf, "0 or a positive number")
        require(
            self,
            "schedule",
            not isinstance(self.schedule, type) and (hasattr(self.schedule, "make") or callable(self.schedule)),
            "ConstantRate(), CosineDecay(), LinearDecay() or StepDecay(), or an optax schedule",
        )
        require(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "a positive number, or None")
        require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or a positive number")
        require(self, "decay", not isinstance(self.decay, str), f"a tuple, ({self.decay!r},)")
        require(self, "decay", self.weight_decay == 0 or len(self.decay) > 0, "at least one pattern with weight decay")
        require(
            self, "decay", all(_is_path(text) for text in self.decay), "paths of parameters, such as ('**/kernel',)"
        )
        if self.state_format is not None:
            parse_state_format(self.state_format)

    def numbers(self, steps: int) -> dict[str, Any]:
        """The numbers of the update that may be arguments of a compiled step, by name; `schedule` has its own.

        Optimizers of one class that differ in these values alone share one program. A number that is off (0, None) is
        not among them: it decides which program it is. Nor are b1 and b2: optax forms 1 - b2 in double precision, and
        in float32 it is wrong by 1e-5 at 0.999.
        """
        of_schedule, found = schedule_numbers(self.schedule, steps), dict[str, Any]()
        if of_schedule is not None:
            found |= {"learning_rate": float(self.learning_rate), "schedule": of_schedule}
        if self.clip_norm is not None:
            found["clip_norm"] = float(self.clip_norm)
        if self.weight_decay:
            found["weight_decay"] = float(self.weight_decay)
        return found

    def _rule(self, learning_rate: optax.Schedule, numbers: Numbers) -> optax.GradientTransformation:
        """Returns the optax optimizer, with weight decay but without clipping; `numbers` has those of `numbers()`."""
        raise NotImplementedError

    def rate_of(self, steps: int, numbers: Numbers) -> optax.Schedule:
        """`rate` with what `optimizer_numbers` gave: an own `rate` of a subclass need not take numbers."""
        return self.rate(steps, numbers) if _takes_numbers(type(self)) else self.rate(steps)

    def rate(self, steps: int, numbers: Numbers | None = None) -> optax.Schedule:
        """The learning rate of a run of `steps` steps, as a function of the number of applied steps."""
        own = numbers or {}
        peak = own.get("learning_rate", self.learning_rate)
        return make_schedule(self.schedule, peak, steps, own.get("schedule"))

    def make(self, steps: int, numbers: Numbers | None = None) -> optax.GradientTransformation:
        """Creates the optax transformation for a run of `steps` steps: clipping, then the optimizer.

        Its state has one layout by class: what is off is `optax.identity()`, so that it can be turned on later.

        Args:
          steps: number of steps of the run.
          numbers: what takes the place of `self.numbers(steps)`, a tree like it, such as arguments of the program that
            is being traced; by default the values are constants.

        Its `init` raises InputError if a pattern in `decay` matches no parameter, or `state_format` names a field that
        the optimizer's state does not have.

        Raises:
          InputError: the `_rule` of a subclass has other arguments than (self, learning_rate, numbers).
        """
        check_arguments(self._rule, "learning_rate", "numbers")
        numbers = self.numbers(steps) if numbers is None else numbers
        rule = self._rule(self.rate_of(steps, numbers), numbers)
        if self.state_format is not None:
            rule = state_format(rule, **parse_state_format(self.state_format))
        return optax.chain(self._clip(numbers), rule)

    def _clip(self, numbers: Numbers) -> optax.GradientTransformation:
        """Returns what is done to the gradient of the batch before the optimizer sees it."""
        return clip_by_global_norm(numbers["clip_norm"]) if "clip_norm" in numbers else optax.identity()

    def _decay_mask(self) -> Callable[[Any], Any] | None:
        """Returns the mask function for optax, which selects the parameters that decay; None without weight decay."""
        return functools.partial(decay_mask, patterns=self.decay) if self.weight_decay else None

    def _after_l2(self, rule: optax.GradientTransformation, numbers: Numbers) -> optax.GradientTransformation:
        """Chains adding weight decay to the gradients (L2 regularisation) with `rule`."""
        decay: optax.GradientTransformation = optax.identity()
        if self.weight_decay:
            decay = optax.add_decayed_weights(numbers["weight_decay"], self._decay_mask())
        return optax.chain(decay, rule)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    learning_rate: float = 0.1
    """Peak learning rate; the schedule multiplies it by a factor of 0 to 1."""
    _: KW_ONLY
    momentum: float = 0.9
    """Decay of the running sum of gradients; 0 turns momentum off and stores none."""
    nesterov: bool = False
    """Use Nesterov's momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "momentum", 0 <= self.momentum < 1, "0 or more, below 1")
        require(self, "nesterov", self.momentum > 0 or not self.nesterov, "False, where momentum is 0")

    def numbers(self, steps: int) -> dict[str, Any]:
        """See `Optimizer.numbers`."""
        return super().numbers(steps) | ({"momentum": float(self.momentum)} if self.momentum else {})

    def _rule(self, learning_rate: optax.Schedule, numbers: Numbers) -> optax.GradientTransformation:
        return self._after_l2(optax.sgd(learning_rate, numbers.get("momentum"), self.nesterov), numbers)


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980)."""

    b1: float = 0.9
    """Decay of the running mean of the gradients."""
    b2: float = 0.999
    """Decay of the running mean of the squared gradients."""
    eps: float = 1e-8
    """Added to the denominator, the root of the mean square; in float32, since float16 rounds 1e-8 to 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "b1", 0 <= self.b1 < 1, "0 or more, below 1")
        require(self, "b2", 0 <= self.b2 < 1, "0 or more, below 1")
        require(self, "eps", 0 < self.eps < math.inf, "a positive number")

    def numbers(self, steps: int) -> dict[str, Any]:
        """See `Optimizer.numbers`."""
        return super().numbers(steps) | {"eps": float(self.eps)}

    def _rule(self, learning_rate: optax.Schedule, numbers: Numbers) -> optax.GradientTransformation:
        return self._after_l2(optax.adam(learning_rate, self.b1, self.b2, numbers["eps"]), numbers)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101)."""

    weight_decay: float = 0.01
    """Weight decay: a step takes this multiple of a parameter off it, times the learning rate."""

    def _rule(self, learning_rate: optax.Schedule, numbers: Numbers) -> optax.GradientTransformation:
        decay = numbers.get("weight_decay", 0.0)
        return optax.adamw(learning_rate, self.b1, self.b2, numbers["eps"], weight_decay=decay, mask=self._decay_mask())


@dataclass(frozen=True, kw_only=True)
class LAMB(Adam):
    """Adam with updates scaled to the norm of each layer, for large batches.

    Source: You et al. 2020, https://arxiv.org/abs/1904.00962.
    """

    eps: float = 1e-6
    """Added to the denominator, the root of the mean square; in float32."""
    weight_decay: float = 0.01
    """Weight decay: this multiple of a parameter is added to its update, before the layer's norm scales the update."""

    def _rule(self, learning_rate: optax.Schedule, numbers: Numbers) -> optax.GradientTransformation:
        decay = numbers.get("weight_decay", 0.0)
        return optax.lamb(learning_rate, self.b1, self.b2, numbers["eps"], weight_decay=decay, mask=self._decay_mask())


@dataclass(frozen=True)
class Lion(Optimizer):
    """Lion: updates by the sign of a running mean of gradients, so that all have one size; keeps a single moment.

    Source: Chen et al. 2023, https://arxiv.org/abs/2302.06675.
    """

    learning_rate: float = 1e-4
    """Peak learning rate, which the schedule scales by 0 to 1; the paper advises 1/10 to 1/3 of AdamW's."""
    _: KW_ONLY
    b1: float = 0.9
    """Weight of the running mean when it is mixed with the gradient; the sign of the mix is the update."""
    b2: float = 0.99
    """Decay of the running mean of the gradients."""
    weight_decay: float = 0.1
    """Weight decay: a step takes this multiple of a parameter off it, times the learning rate; 3 to 10 x AdamW's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "b1", 0 <= self.b1 < 1, "0 or more, below 1")
        require(self, "b2", 0 <= self.b2 < 1, "0 or more, below 1")

    def _rule(self, learning_rate: optax.Schedule, numbers: Numbers) -> optax.GradientTransformation:
        decay = numbers.get("weight_decay", 0.0)
        return optax.lion(learning_rate, self.b1, self.b2, weight_decay=decay, mask=self._decay_mask())


SAMPLINGS = ("poisson", "shuffled")
"""values of `Private.sampling`"""


@dataclass(frozen=True, kw_only=True)
class Private(Optimizer):
    """The base class of private optimizers: each row's gradient is clipped, and the sum gets Gaussian noise.

    What the optimizer does with the noised gradient costs no privacy. See `jaxmp.training.privacy.Privacy` for what a
    row that is not finite, a skipped step and the loss scale mean here, and what the guarantee leaves out.

    Raises:
      InputError: a value is out of range.

    Source: Abadi et al. 2016, https://arxiv.org/abs/1607.00133.
    """

    clip_norm: float = 1.0  # type: ignore[assignment]
    """Largest norm of one row's gradient: longer ones are scaled down to it before rows are summed."""
    noise_multiplier: float = 1.0
    """Standard deviation of the noise on the sum of a batch's gradients, in units of clip_norm."""
    delta: float = 1e-5
    """Probability for which epsilon need not hold; well below 1 / (number of training rows)."""
    sampling: Literal["poisson", "shuffled"] = "poisson"
    """How batches are drawn. poisson: each row is in each batch with the same probability, and batch_size is the room
    for them. shuffled: each row once an epoch, in batches of batch_size; epsilon is then far larger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "clip_norm", self.clip_norm is not None, "a positive number")
        require(self, "noise_multiplier", 0 <= self.noise_multiplier < math.inf, "0 or a positive number")
        require(self, "delta", 0 < self.delta < 1, "a number between 0 and 1")
        require(
            self,
            "sampling",
            self.sampling in SAMPLINGS,
            f"{' or '.join(SAMPLINGS)}{nearest(str(self.sampling), SAMPLINGS)}",
        )

    def privacy(self, rows: float) -> Privacy:
        """What is done to the gradients; `rows` is the expected number of rows in a batch."""
        return Privacy(self.clip_norm, self.noise_multiplier, rows)

    def numbers(self, steps: int) -> dict[str, Any]:
        """See `Optimizer.numbers`; what rows are clipped to and their noise, which are accounted for, are constants."""
        found = super().numbers(steps)
        del found["clip_norm"]
        return found

    def _clip(self, numbers: Numbers) -> optax.GradientTransformation:
        return optax.identity()  # rows are clipped where their gradients are formed


@dataclass(frozen=True)
class DPSGD(Private, SGD):
    """Differentially private SGD with momentum: rows clipped one by one, Gaussian noise on their sum.

    Source: Abadi et al. 2016, Deep Learning with Differential Privacy, https://arxiv.org/abs/1607.00133.
    """


@dataclass(frozen=True, kw_only=True)
class DPAdam(Private, Adam):
    """Adam on differentially private gradients: rows clipped one by one, Gaussian noise on their sum."""
