"""How far gradients are from exact ones: float64 references, and errors relative to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.training.batch import LossFn
from jaxmp.training.gradients import make_gradients
from jaxmp.training.objective import EVERYTHING
from jaxmp.trees import by_path, cast_floats

Arrays = Mapping[str, np.ndarray]
"""float64 arrays by the path of the parameter"""

GradientFn = Callable[[Any, Any, Any, Any], Arrays]
"""`(params, model_state, batch, key) -> Arrays`: the unscaled gradients"""


class GradientError(NamedTuple):
    """How far a gradient is from an exact one, over all parameters together."""

    relative_error: float | None
    """norm of the difference over the norm of the exact one; None if a gradient is not finite, or the exact one is 0"""
    one_minus_cosine: float | None
    """1 minus the cosine of the angle between the two; None likewise"""
    worst: str
    """the parameter with the largest relative error of its own; that of the first non-finite gradient, if any"""
    worst_error: float | None
    """its relative error; None if it is not finite"""


def float64_arrays(tree: Any, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The real floats of a pytree as float64 NumPy arrays, divided by `scale`, by path."""
    return {
        path: np.asarray(leaf).astype(np.float64) / scale
        for path, leaf in by_path(tree).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def scaled_gradients(loss_fn: LossFn, scale: float, *, trains: tuple[str, ...] = EVERYTHING) -> GradientFn:
    """The gradients of a loss function under a loss scale, compiled; unscaled in float64.

    Those of the parameters that `trains` names, see `jaxmp.Objective`.
    """
    gradients = jax.jit(make_gradients(loss_fn, trains=trains))

    def unscaled(params: Any, model_state: Any, batch: Any, key: Any) -> Arrays:
        grads, _, _ = gradients(params, model_state, jnp.float32(scale), batch, key)
        return float64_arrays(grads, scale)

    return unscaled


def exact_gradients(loss_fn: LossFn, *, trains: tuple[str, ...] = EVERYTHING) -> GradientFn:
    """The gradients of a loss function in float64 arithmetic, of arguments that are float64 by then.

    Args:
      loss_fn: one that computes in the dtype of its arguments, or in float64, and draws no random numbers: in float64
        it would draw others. What it casts to float32 by itself remains.
      trains: the parameters that are differentiated, see `jaxmp.Objective`.
    """
    gradients = jax.jit(make_gradients(loss_fn, trains=trains))

    def exact(params: Any, model_state: Any, batch: Any, key: Any) -> Arrays:
        host = jax.device_get((params, model_state, batch))
        with jax.enable_x64(True):
            params, model_state, batch = cast_floats(host, np.float64)
            grads, _, _ = gradients(params, model_state, np.float64(1), batch, key)
            return float64_arrays(grads)

    return exact


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over the norm of `exact`; for an `exact` of zeros, 1 if `found` is not zero, else 0."""
    norm = np.linalg.norm(exact)
    return float(np.linalg.norm(found - exact) / norm) if norm else float(np.any(found != 0))


def gradient_error(found: Arrays, exact: Arrays) -> GradientError:
    """The error of a gradient, by parameter and over all of them."""
    a = np.concatenate([found[path].ravel() for path in exact])
    b = np.concatenate([exact[path].ravel() for path in exact])
    if not np.all(np.isfinite(a)):
        return GradientError(None, None, next(path for path in exact if not np.all(np.isfinite(found[path]))), None)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if not norms[1]:
        return GradientError(None, None, "", 0.0)
    # 1 - cosine as half the squared distance of the directions: the difference of 1 and a cosine would cancel.
    angle = float(np.sum((a / norms[0] - b / norms[1]) ** 2) / 2) if norms[0] else 1.0
    each = {path: relative_error(found[path], exact[path]) for path in exact if np.any(exact[path])}
    worst = max(each, key=lambda path: each[path])
    return GradientError(relative_error(a, b), angle, worst, each[worst])
