"""How far the gradients of several precisions are from exact ones, along one training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments.float64 import draws, in_float64
from jaxmp.instruments.gradient_error import (
    Arrays,
    GradientFn,
    exact_gradients,
    float64_arrays,
    gradient_error,
    scaled_gradients,
)
from jaxmp.modules.linen import cast_to_param
from jaxmp.precision.policy import parse_policy
from jaxmp.runs.replay import PastStep, states_at
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.loss import make_loss
from jaxmp.tasks.task import objectives_of
from jaxmp.training.gradients import make_gradients
from jaxmp.training.objective import objective_key

REFERENCES = ("float64", "float32")
"""values of `against`"""


def compare_gradients(experiments: Mapping[str, Experiment], count: int, *, against: str = "float64") -> dict[str, Any]:
    """Relative error and cosine of the gradients of a loss under several precisions, along one training run.

    The first experiment is trained, and at `count` of its steps, evenly spread and the first among them, all take the
    gradient from its state and on its batch. Each is scaled by the scale with which its own scaler begins, and unscaled
    in float64. Of several objectives, each has `count` of the steps in which it is due, and the state that it sees.

    Against `float64`, all gradients are taken as in evaluation (no dropout, batch statistics as they are); a task's own
    casts of outputs to float32 remain. A model that draws in evaluation too draws the same numbers in float64. Against
    `float32`, gradients are taken as in training, with the same masks.

    Args:
      experiments: one for each precision, by its name; they differ in nothing else. The first says the states.
      count: at how many steps.
      against: `float64` or `float32`.

    Returns:
      As JSON: `steps`, and for each precision lists over them of `relative_error` (of the norm over all parameters) and
      `one_minus_cosine`, and the `worst` parameter by its own relative error; None if a gradient is not finite. Of
      several objectives: `objectives`, all of this for each by name.

    Raises: InputError for another reference, or a count below 1.
    """
    if against not in REFERENCES:
        raise InputError(f"gradients against {against!r}: expected one of {', '.join(REFERENCES)}")
    if count < 1:
        raise InputError(f"gradients at {count} steps: expected a whole number of at least 1")
    train = against == "float32"
    first, *_ = experiments.values()
    trainer = Trainer(dataclasses.replace(first, parallel=Parallel("jit")))
    measured = {name: _Measured(experiments, name, train) for name in objectives_of(first.task) or (None,)}
    steps = {name: _spread(count, trainer.steps, _every(first, name)) for name in measured}
    for past in states_at(first, set().union(*steps.values())):
        for name, of in measured.items():
            if past.step in steps[name]:
                of.add(past._replace(state=trainer.state_seen(name)(past.state, past.batch), objective=name))
    found = {name: of.to_json(against) for name, of in measured.items()}
    return found[None] if None in found else {"objectives": found}


class _Measured:
    """The errors of the gradients of one objective; None names the single one."""

    def __init__(self, experiments: Mapping[str, Experiment], objective: str | None, train: bool):
        first, *_ = experiments.values()
        self.objective, self.train, self.seed = objective, train, first.seed
        self.functions = {name: _gradients(experiment, objective, train) for name, experiment in experiments.items()}
        in_float32 = dataclasses.replace(first, precision="float32")
        self.exact = _gradients(in_float32, objective, train) if train else _exact(first, objective)
        self.steps: list[int] = []
        self.found: dict[str, dict[str, Any]] = {
            name: {
                "relative_error": [],
                "one_minus_cosine": [],
                "worst": {"parameter": "", "relative_error": 0.0, "step": 0},
            }
            for name in experiments
        }

    def add(self, past: PastStep) -> None:
        """Measures the gradients of a step."""
        self.steps.append(past.step)
        reference = self.exact(past)
        for name, gradients in self.functions.items():
            error, found = gradient_error(gradients(past), reference), self.found[name]
            found["relative_error"].append(error.relative_error)
            found["one_minus_cosine"].append(error.one_minus_cosine)
            before = found["worst"]["relative_error"]
            if before is not None and (error.worst_error is None or error.worst_error > before):
                found["worst"] = {"parameter": error.worst, "relative_error": error.worst_error, "step": past.step}

    def to_json(self, against: str) -> dict[str, Any]:
        """What was found, as `compare_gradients` returns it."""
        how = "as in training, with the same random masks" if self.train else "as in evaluation, without random masks"
        seen = "its state" if self.objective is None else "the state that the objective sees"
        return {
            "against": against,
            "method": (
                f"At {len(self.steps)} steps of the first run ({next(iter(self.found))}, seed {self.seed}), from "
                f"{seen} and on its batch, {how}; each under the loss scale that its scaler begins with. Relative "
                "error: ‖g \N{MINUS SIGN} r‖ / ‖r‖ over all parameters together, r in "
                f"{against}."
            ),
            "steps": self.steps,
            "precisions": self.found,
        }


def _every(experiment: Experiment, objective: str | None) -> int:
    return 1 if objective is None else objectives_of(experiment.task)[objective].every


def _spread(count: int, total: int, every: int) -> set[int]:
    """Numbers of steps, counted from 1, spread over those in which an objective is due."""
    attempts = -(-total // every)
    return {1 + every * round(i * attempts / count) for i in range(min(count, attempts))}


def _trains(experiment: Experiment, objective: str | None) -> tuple[str, ...]:
    return experiment.trained if objective is None else objectives_of(experiment.task)[objective].trains


def _gradients(experiment: Experiment, objective: str | None, train: bool) -> Callable[[PastStep], Arrays]:
    """The gradients of a step under the experiment's own policy and first loss scale."""
    loss_fn = make_loss(experiment.adapted_model, experiment.task, experiment.policy, objective=objective, train=train)
    scale = float(experiment.scaler_of(objective).init().scale)
    return _at_step(experiment, scaled_gradients(loss_fn, scale, trains=_trains(experiment, objective)))


def _exact(experiment: Experiment, objective: str | None) -> Callable[[PastStep], Arrays]:
    """The gradients of a step by float64 arithmetic, from the parameters as they are kept."""
    trains = _trains(experiment, objective)

    def loss_in(precision: Any) -> Any:
        return make_loss(experiment.adapted_model, experiment.task, precision, objective=objective, train=False)

    def gradients(precision: Any) -> Any:
        return make_gradients(loss_in(precision), trains=trains)

    # Not through Experiment, which refuses float64 unless it is on for good.
    exact = exact_gradients(loss_in(parse_policy("p=f64,c=f64,o=f64")), trains=trains)
    drawn = in_float64(gradients("float32"))

    def at_step(past: PastStep) -> Arrays:
        state, key = past.state, _key(past)
        arguments = (state.params, state.model_state, jnp.float32(1), past.batch, key)
        if draws(gradients("float32"), *arguments):  # under a policy for float64 it would draw others
            return float64_arrays(drawn(*arguments)[0])
        return exact(state.params, state.model_state, past.batch, key)

    return at_step


def _key(past: PastStep) -> jax.Array:
    key = jax.random.fold_in(past.state.key, past.state.step)
    return key if past.objective is None else objective_key(key, past.objective)


def _at_step(experiment: Experiment, gradients: GradientFn) -> Callable[[PastStep], Arrays]:
    def at_step(past: PastStep) -> Arrays:
        state, inputs = past.state, [past.batch[name] for name in experiment.task.inputs]
        params = cast_to_param(experiment.adapted_model, experiment.policy, state.params, *inputs)
        return gradients(params, state.model_state, past.batch, _key(past))

    return at_step
