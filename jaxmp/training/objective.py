"""`Objective`: a loss, the optimizer that makes it small, and the parameters that this changes.

Objective(loss_fn, tx, trains=("head",))                              # the rest of the parameters is frozen
{"discriminator": Objective(...), "generator": Objective(..., every=2)}       # a GAN, for `make_train_step`
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from jaxmp.errors import InputError, nearest
from jaxmp.training.batch import LossFn
from jaxmp.training.privacy import Privacy
from jaxmp.trees import Pattern, path_name

EVERYTHING = ("**",)
"""the patterns that match every parameter"""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, the optimizer that makes it small, the parameters that it trains, and how often.

    Raises:
      InputError: a value is not one of those below.
    """

    loss_fn: LossFn
    """`(params, model_state, batch, key) -> (loss_sum, (weight, metrics, model_state))`, called with all parameters"""
    tx: optax.GradientTransformation
    """`loss_scaling(...)`; it sees None in place of each parameter that this objective does not train"""
    trains: tuple[str, ...] = EVERYTHING
    """the parameters that it trains: patterns of their paths (*: part of a name, **: any names), or of modules, which
    cover all parameters below. The others are neither differentiated nor changed, and cost no optimizer state"""
    every: int = 1
    """it runs in every step whose number, from 0 on, this divides"""
    ema_decay: float | None = None
    """decay of the moving average of the parameters that it trains, for a state that keeps one"""
    private: Privacy | None = None
    """how its gradient hides each row of the batch; None: it does not"""

    def __post_init__(self) -> None:
        check_trains(self.trains, "Objective.trains")
        check_every(self.every, "Objective.every")
        check_ema_decay(self.ema_decay, "Objective.ema_decay")


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """What a task says of one of its several objectives: the parameters that it trains, and how often.

    objectives = {"critic": ObjectiveSpec(("critic",)), "actor": ObjectiveSpec(("actor",), every=2)}

    Raises:
      InputError: a value is not one of those below.
    """

    trains: tuple[str, ...] = EVERYTHING
    """the parameters that it trains, see `Objective.trains`"""
    every: int = 1
    """it runs in every step whose number, from 0 on, this divides"""
    ema_decay: float | None = None
    """decay of the moving average of the parameters that it trains; None: `loop.ema_decay`"""
    method: str | None = None
    """name of the model's method that this objective calls, with the inputs and the mode that `__call__` takes; None:
    `__call__`. A method that leaves a part of the model out keeps that part's batch statistics as they are"""

    def __post_init__(self) -> None:
        check_trains(self.trains, "ObjectiveSpec.trains")
        check_every(self.every, "ObjectiveSpec.every")
        check_ema_decay(self.ema_decay, "ObjectiveSpec.ema_decay")
        if self.method is not None and not (isinstance(self.method, str) and self.method.isidentifier()):
            raise InputError(f"ObjectiveSpec.method = {self.method!r:.60}: expected the name of a method, or None")


Objectives = Mapping[str, Objective]
"""Several objectives by name, in the order in which they run."""


def check_every(every: Any, where: str) -> None:
    """Raises InputError unless `every` is a whole number of at least 1; `where` names it in the message."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"{where} = {every!r}: expected a whole number of at least 1")


def check_ema_decay(decay: Any, where: str) -> None:
    """Raises InputError unless `decay` is a number between 0 and 1, or None; `where` names it in the message.

    A JAX scalar, such as an argument of the program that is being traced, is taken unchecked.
    """
    if decay is None or isinstance(decay, jax.Array):
        return
    if isinstance(decay, bool) or not isinstance(decay, int | float | np.floating) or not 0 < decay < 1:
        raise InputError(f"{where} = {decay!r}: expected a number between 0 and 1, or None")


def check_trains(trains: Any, where: str) -> None:
    """Raises InputError unless `trains` is a tuple of patterns for paths; `where` names it in the message."""
    if isinstance(trains, str):
        raise InputError(f"{where} = {trains!r}: expected a tuple, ({trains!r},)")
    if not isinstance(trains, tuple) or not trains or not all(isinstance(text, str) for text in trains):
        raise InputError(f"{where} = {trains!r:.60}: expected a tuple of one or more patterns, such as ('head/**',)")
    for text in trains:
        try:
            by_class = Pattern(text).by_class
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if by_class:
            raise InputError(f"{where}: {text!r}: parameters have no class; expected paths, such as 'head/**'")


def check_objectives(objectives: Objectives) -> None:
    """Raises InputError if there is no objective, a name cannot begin a metric's, or a value is no `Objective`."""
    if not objectives:
        raise InputError("objectives = {}: expected at least one Objective by name")
    for name, objective in objectives.items():
        check_objective_name(name)
        if not isinstance(objective, Objective):
            raise InputError(f"objective {name!r} = {objective!r:.60}: expected an Objective(loss_fn, tx)")


def check_objective_name(name: Any) -> None:
    """Raises InputError if `name` cannot begin the names of an objective's metrics."""
    if not isinstance(name, str) or not name or "/" in name or any(c.isspace() for c in name):
        raise InputError(f"objective {name!r}: expected a name without / and blanks, such as 'generator'")


def check_name(name: str, names: Any, where: str) -> None:
    """Raises InputError unless `name` is one of the objectives `names`; `where` says what names it."""
    if name not in names:
        raise InputError(f"{where}: there is no objective {name!r}; there are {', '.join(names)}{nearest(name, names)}")


def due_at(objectives: Mapping[str, Objective | ObjectiveSpec], step: int) -> tuple[str, ...]:
    """The names of the objectives that run at `step`, counted from 0, in their order."""
    return tuple(name for name, objective in objectives.items() if step % objective.every == 0)


def objective_key(key: jax.Array, name: str) -> jax.Array:
    """The key from which the objective `name` draws in a step, from the key of the step."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def trained_view(params: Any, trains: tuple[str, ...] = EVERYTHING) -> Any:
    """Returns `params` with None in place of each leaf that `trains` does not match; the rest of the tree is kept.

    Args:
      params: all parameters, any pytree; also of `jax.ShapeDtypeStruct`s.
      trains: see `Objective.trains`.

    Raises:
      InputError: a pattern matches no parameter.

    >>> trained_view({"body": {"kernel": 1.0}, "head": {"kernel": 2.0}}, ("head",))
    {'body': {'kernel': None}, 'head': {'kernel': 2.0}}
    """
    if trains == EVERYTHING:
        return params
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    patterns = [Pattern(text) for text in trains]
    for pattern in patterns:
        if not any(pattern.covers(name) for name in names):
            raise InputError(
                f"trains: the pattern {str(pattern)!r} matches no parameter; {pattern.what_there_is(names)}"
            )

    def view(path: Any, leaf: Any) -> Any:
        return leaf if any(pattern.covers(path_name(path)) for pattern in patterns) else None

    return jax.tree_util.tree_map_with_path(view, params)


def trained_by_any(params: Any, trains: list[tuple[str, ...]]) -> Any:
    """Returns `params` with None in place of each leaf that none of several objectives trains."""
    views = [trained_view(params, patterns) for patterns in trains]
    return jax.tree.map(lambda leaf, *own: None if all(x is None for x in own) else leaf, params, *views)


def fill(view: Any, whole: Any) -> Any:
    """Returns `view` with the leaves of `whole` where it holds None.

    >>> fill({"body": None, "head": 3.0}, {"body": 1.0, "head": 2.0})
    {'body': 1.0, 'head': 3.0}
    """
    return jax.tree.map(lambda leaf, own: leaf if own is None else own, whole, view)


def restrict(whole: Any, view: Any) -> Any:
    """Returns `whole` with None in each place where `view`, a tree like it, holds None."""
    return jax.tree.map(lambda leaf, own: None if own is None else leaf, whole, view)
