"""`gradient_errors`: how far the gradients of several precisions are from exact ones, on the same states and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Parallel
from jaxmp.modules.linen import cast_to_param
from jaxmp.precision.policy import parse_policy
from jaxmp.runs.fit import steps
from jaxmp.runs.trainer import Training
from jaxmp.tasks.loss import make_loss
from jaxmp.training.state import TrainState
from jaxmp.trees import cast_floats

REFERENCES = ("float64", "float32")


def gradient_errors(experiments: Mapping[str, Experiment], count: int, *, against: str = "float64") -> dict[str, Any]:
    """Relative error and cosine of the gradients of a loss under several precisions, along one training run.

    The first experiment is trained, and at `count` of its steps, evenly spread and the first among them, all take the
    gradient from its state and on its batch. Each is scaled by the scale with which its own scaler begins, and unscaled
    in float64.

    Against `float64`, all gradients are taken as in evaluation (no dropout, batch statistics as they stand), since
    random masks would be others in float64; a task's own casts of outputs to float32 remain. Against `float32`, they
    are taken as in training, with the same masks.

    Args:
      experiments: one for each precision, by its name, which differ in nothing else. The first says the states.
      count: at how many steps.
      against: `float64` or `float32`.

    Returns:
      As JSON: `steps`, and for each precision lists over them of `relative_error` (of the norm over all parameters) and
      `one_minus_cosine`, and the `worst` parameter by its own relative error; None where a gradient is not finite.

    Raises: InputError for another reference, or a count below 1.
    """
    if against not in REFERENCES:
        raise InputError(f"gradients against {against!r}: expected one of {', '.join(REFERENCES)}")
    if count < 1:
        raise InputError(f"gradients at {count} steps: expected a whole number of at least 1")
    train = against == "float32"
    first, *_ = experiments.values()
    functions = {name: _gradients(experiment, train) for name, experiment in experiments.items()}
    exact = _exact(first, train)
    at: list[int] = []
    found: dict[str, dict[str, Any]] = {
        name: {
            "relative_error": [],
            "one_minus_cosine": [],
            "worst": {"parameter": "", "relative_error": 0.0, "step": 0},
        }
        for name in experiments
    }
    for step, state, batch in _states(first, count):
        at.append(step + 1)
        reference = exact(state, batch)
        for name, gradients in functions.items():
            error, angle, worst = _errors(gradients(state, batch), reference)
            found[name]["relative_error"].append(error)
            found[name]["one_minus_cosine"].append(angle)
            before = found[name]["worst"]["relative_error"]
            if before is not None and (worst[1] is None or worst[1] > before):
                found[name]["worst"] = {"parameter": worst[0], "relative_error": worst[1], "step": step + 1}
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


def _states(experiment: Experiment, count: int) -> Iterator[tuple[int, TrainState, Any]]:
    """Steps, from 0, the states before them and their batches: `count` of the whole run."""
    # Which device does what changes no state by more than rounding; one host copy of each is looked at.
    experiment = dataclasses.replace(experiment, parallel=Parallel("jit"))
    training = Training(experiment)
    feed = training.feed(many=False)
    wanted = {round(i * training.steps / count) for i in range(min(count, training.steps))}
    if 0 in wanted:
        yield 0, training.init(), feed.batch(0)
    single = dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, steps_per_dispatch=1))
    for info in steps(single):
        if info.step in wanted and info.step < training.steps:
            yield info.step, info.state, feed.batch(info.step)
        if info.step >= max(wanted):
            return


def _gradients(experiment: Experiment, train: bool) -> Callable[[TrainState, Any], Any]:
    """`(state, batch) -> gradients` in float64 NumPy arrays, under the experiment's own policy and first scale."""
    loss_fn = make_loss(experiment.model, experiment.task, experiment.policy, train=train)
    scale = experiment.make_scaler().init().scale

    @jax.jit
    def scaled_gradients(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            total, (weight, _, _) = loss_fn(params, model_state, batch, key)
            return total / weight * scale

        return jax.grad(loss, allow_int=True)(params)

    def gradients(state: TrainState, batch: Any) -> Any:
        inputs = [batch[name] for name in experiment.task.inputs]
        params = cast_to_param(experiment.model, experiment.policy, state.params, *inputs)
        key = jax.random.fold_in(state.key, state.step)
        return _in_float64(scaled_gradients(params, state.model_state, batch, key), 1 / float(scale))

    return gradients


def _exact(experiment: Experiment, train: bool) -> Callable[[TrainState, Any], Any]:
    """`(state, batch) -> gradients` in float64 NumPy arrays, by float64 or float32 arithmetic."""
    if train:
        plain = dataclasses.replace(experiment, precision="float32")
        return _gradients(plain, train)

    # Not through Experiment, which refuses float64 where it is not on for good.
    loss_fn = make_loss(experiment.model, experiment.task, parse_policy("p=f64,c=f64,o=f64"), train=False)

    @jax.jit
    def exact(params: Any, model_state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            total, (weight, _, _) = loss_fn(params, model_state, batch, None)
            return total / weight

        return jax.grad(loss, allow_int=True)(params)

    def gradients(state: TrainState, batch: Any) -> Any:
        host = jax.device_get((state.params, state.model_state, batch))
        with jax.enable_x64(True):
            return _in_float64(exact(*cast_floats(host, np.float64)), 1.0)

    return gradients


def _in_float64(grads: Any, factor: float) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): np.asarray(leaf).astype(np.float64) * factor
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _errors(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> tuple[float | None, float | None, Any]:
    """Relative error and 1 - cosine over all leaves, and the worst leaf with its own relative error."""
    a = np.concatenate([found[name].ravel() for name in exact])
    b = np.concatenate([exact[name].ravel() for name in exact])
    if not np.all(np.isfinite(a)):
        name = next(name for name in exact if not np.all(np.isfinite(found[name])))
        return None, None, (name, None)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if not norms[1]:
        return None, None, ("", 0.0)
    error = float(np.linalg.norm(a - b) / norms[1])
    # 1 - cosine as half the squared distance of the directions: the difference of 1 and a cosine would cancel.
    angle = float(np.sum((a / norms[0] - b / norms[1]) ** 2) / 2) if norms[0] else 1.0
    each = {
        name: float(np.linalg.norm(found[name] - exact[name]) / norm)
        for name in exact
        if (norm := np.linalg.norm(exact[name]))
    }
    worst = max(each, key=lambda name: each[name])
    return error, angle, (worst, each[worst])
