"""How far the gradients of several precisions are from exact ones, along one training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
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
from jaxmp.tasks.task import refuse_several
from jaxmp.training.gradients import make_gradients

REFERENCES = ("float64", "float32")
"""values of `against`"""


def compare_gradients(experiments: Mapping[str, Experiment], count: int, *, against: str = "float64") -> dict[str, Any]:
    """Relative error and cosine of the gradients of a loss under several precisions, along one training run.

    The first experiment is trained, and at `count` of its steps, evenly spread and the first among them, all take the
    gradient from its state and on its batch. Each is scaled by the scale with which its own scaler begins, and unscaled
    in float64.

    Against `float64`, all gradients are taken as in evaluation (no dropout, batch statistics as they are); a task's own
    casts of outputs to float32 remain. A model that draws in evaluation too draws the same numbers in float64. Against
    `float32`, gradients are taken as in training, with the same masks.

    Args:
      experiments: one for each precision, by its name; they differ in nothing else. The first says the states.
      count: at how many steps.
      against: `float64` or `float32`.

    Returns:
      As JSON: `steps`, and for each precision lists over them of `relative_error` (of the norm over all parameters) and
      `one_minus_cosine`, and the `worst` parameter by its own relative error; None if a gradient is not finite.

    Raises: InputError for another reference, or a count below 1.
    """
    if against not in REFERENCES:
        raise InputError(f"gradients against {against!r}: expected one of {', '.join(REFERENCES)}")
    if count < 1:
        raise InputError(f"gradients at {count} steps: expected a whole number of at least 1")
    train = against == "float32"
    first, *_ = experiments.values()
    refuse_several(first.task, "a comparison of gradients")
    functions = {name: _gradients(experiment, train) for name, experiment in experiments.items()}
    exact = _gradients(dataclasses.replace(first, precision="float32"), train) if train else _exact(first)
    at: list[int] = []
    found: dict[str, dict[str, Any]] = {
        name: {
            "relative_error": [],
            "one_minus_cosine": [],
            "worst": {"parameter": "", "relative_error": 0.0, "step": 0},
        }
        for name in experiments
    }
    total = Trainer(first).steps
    wanted = {1 + round(i * total / count) for i in range(min(count, total))}
    for past in states_at(first, wanted):
        at.append(past.step)
        reference = exact(past)
        for name, gradients in functions.items():
            error = gradient_error(gradients(past), reference)
            found[name]["relative_error"].append(error.relative_error)
            found[name]["one_minus_cosine"].append(error.one_minus_cosine)
            before = found[name]["worst"]["relative_error"]
            if before is not None and (error.worst_error is None or error.worst_error > before):
                worst = {"parameter": error.worst, "relative_error": error.worst_error, "step": past.step}
                found[name]["worst"] = worst
    how = "as in training, with the same random masks" if train else "as in evaluation, without random masks"
    return {
        "against": against,
        "method": (
            f"At {len(at)} steps of the first run ({next(iter(experiments))}, seed {first.seed}), from its state and "
            f"on its batch, {how}; each under the loss scale that its scaler begins with. Relative error: "
            "‖g \N{MINUS SIGN} r‖ / ‖r‖ over all parameters together, r in "
            f"{against}."
        ),
        "steps": at,
        "precisions": found,
    }


def _gradients(experiment: Experiment, train: bool) -> Callable[[PastStep], Arrays]:
    """The gradients of a step under the experiment's own policy and first loss scale."""
    loss_fn = make_loss(experiment.adapted_model, experiment.task, experiment.policy, train=train)
    scale = float(experiment.make_scaler().init().scale)
    return _at_step(experiment, scaled_gradients(loss_fn, scale, trains=experiment.trained))


def _exact(experiment: Experiment) -> Callable[[PastStep], Arrays]:
    """The gradients of a step by float64 arithmetic, from the parameters as they are kept."""

    def gradients(precision: Any) -> Any:
        loss_fn = make_loss(experiment.adapted_model, experiment.task, precision, train=False)
        return make_gradients(loss_fn, trains=experiment.trained)

    # Not through Experiment, which refuses float64 unless it is on for good.
    float64 = parse_policy("p=f64,c=f64,o=f64")
    exact = exact_gradients(
        make_loss(experiment.adapted_model, experiment.task, float64, train=False), trains=experiment.trained
    )
    drawn = in_float64(gradients("float32"))

    def at_step(past: PastStep) -> Arrays:
        state, key = past.state, _key(past)
        arguments = (state.params, state.model_state, jnp.float32(1), past.batch, key)
        if draws(gradients("float32"), *arguments):  # under a policy for float64 it would draw others
            return float64_arrays(drawn(*arguments)[0])
        return exact(state.params, state.model_state, past.batch, key)

    return at_step


def _key(past: PastStep) -> jax.Array:
    return jax.random.fold_in(past.state.key, past.state.step)


def _at_step(experiment: Experiment, gradients: GradientFn) -> Callable[[PastStep], Arrays]:
    def at_step(past: PastStep) -> Arrays:
        state, inputs = past.state, [past.batch[name] for name in experiment.task.inputs]
        params = cast_to_param(experiment.adapted_model, experiment.policy, state.params, *inputs)
        return gradients(params, state.model_state, past.batch, _key(past))

    return at_step
