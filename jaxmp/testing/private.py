"""Laws of a private step (DP-SGD): how far one row can move the gradient, and the noise that hides it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.testing.faults import Clean
from jaxmp.testing.laws import Broken, calling
from jaxmp.testing.trial import Trial
from jaxmp.trees import HALF, is_castable

ROWS = 4
"""at most so many rows of the batch are changed, the first and the last among them"""
FACTORS = (1.0, 2.0**4, 2.0**8, 2.0**12, 0.0, math.inf, math.nan)
"""what the floats of a row are multiplied by"""
SLACK = 1e-3
"""share of the clip norm that rounding may add to the sum"""
SIGMAS = 6.0
"""a mean and a deviation may be off by so many standard errors: one draw in 10**9 is further off"""
STEPS = 16
"""noise is drawn in so many steps"""


def weightless(batch: Any, rows: np.ndarray) -> Any:
    """The batch with weight 0 for `rows`, an array of numbers from 0 to rows - 1: as if they were not there."""
    if not isinstance(batch, Mapping) or "weight" not in batch:
        raise Broken("the batch has no 'weight', so that its rows cannot be taken away; give Claim its `without=`")
    weight = np.array(batch["weight"])
    weight.reshape(-1)[rows] = 0
    return {**batch, "weight": jnp.asarray(weight)}


@dataclasses.dataclass(frozen=True)
class PrivateClaim:
    """What a private step claims, and how the laws see its gradient."""

    clip_norm: float
    """largest norm of one row's gradient"""
    noise_multiplier: float
    """standard deviation of the noise on the sum, in units of `clip_norm`"""
    rows: float
    """number that the noised sum is divided by"""
    gradient: Callable[[Any, Any], Any]
    """`gradient(before, out)`: the noised mean gradient, unscaled, that the optimizer was given, from the state before
    the step and all that it returned; a pytree of floats. Of an optimizer that keeps it, exact; a difference of
    parameters divided by a learning rate is rounded, and may break the law about float32"""
    without: Callable[[Any, np.ndarray], Any] = weightless
    """`without(batch, rows)`: the batch as if these rows were not in it; by default they get weight 0"""


def row_is_bounded(trial: Trial) -> None:
    """One row more or less, whatever it holds, moves the unscaled sum of gradients by at most the clip norm.

    Rows of large numbers, zeros, infinities and NaN: a row that is not finite may neither pass nor stop the step.
    """
    claim: PrivateClaim = trial.adapter.private
    for row, factor, moved in _moves(trial):
        # What a float32 keeps of the noise that both sums have: it does not cancel to the bit.
        count = math.sqrt(sum(x.size for x in jax.tree.leaves(_gradient(trial, trial.adapter.batch))))
        bound = claim.clip_norm * (1 + SLACK + 2.0**-21 * claim.noise_multiplier * count)
        if not moved <= bound:
            raise Broken(
                f"row {row}, its floats times {factor:g}, moves the sum of gradients by {moved:.6g}; "
                f"expected at most the clip norm, {claim.clip_norm:g}"
            )


def long_row_counts_by_clip_norm(trial: Trial) -> None:
    """A row whose gradient is long moves the unscaled sum of gradients by the clip norm, not by less.

    Clipping that sees scaled gradients, or means, leaves less of a row than is said, under the same noise.
    """
    claim: PrivateClaim = trial.adapter.private
    most = max(moved for _, _, moved in _moves(trial))
    if most < claim.clip_norm * 0.9:
        raise Broken(
            f"of all rows, and all multiples of them, none moves the sum of gradients by over {most:.6g}; expected "
            f"the clip norm, {claim.clip_norm:g}, of a row with a longer gradient (if none has, give a smaller one)"
        )


def noise_is_as_claimed(trial: Trial) -> None:
    """The noise on the unscaled sum is Gaussian, of deviation noise_multiplier * clip_norm, drawn anew in float32.

    One noise for all replicas and microbatches, another for each step and each parameter.
    """
    claim: PrivateClaim = trial.adapter.private
    expected = claim.noise_multiplier * claim.clip_norm
    empty = claim.without(trial.adapter.batch, np.arange(_rows(trial)))
    state, drawn = trial.fresh(), []
    for _ in range(STEPS):
        before = jax.tree.map(jnp.copy, state)
        out = trial.out(state, Clean(), empty)
        state = trial._state(out, before)
        leaves = jax.tree.leaves(calling("the claim's gradient", claim.gradient, before, out))
        drawn.append([np.asarray(x, np.float64).ravel() * claim.rows for x in leaves])
    together = [np.concatenate(leaves) for leaves in drawn]
    for i, one in enumerate(together):
        same = [j + 1 for j in range(i) if expected and np.array_equal(one, together[j])]
        if same:
            raise Broken(f"steps {same[0]} and {i + 1} draw the same noise: their difference shows the rows")
    values = np.concatenate(together)
    if not expected:
        if np.any(values):
            raise Broken("without a row and without noise the gradient is not 0")
        return
    count = len(values)
    deviation, error = math.sqrt(np.mean(values**2)), SIGMAS / math.sqrt(2 * count)
    if not abs(deviation / expected - 1) <= error:
        raise Broken(
            f"the noise on the sum has deviation {deviation:.6g} in {count} draws; expected {expected:g} to {error:.1%}"
        )
    if abs(np.mean(values)) > SIGMAS * expected / math.sqrt(count):
        raise Broken(f"the noise on the sum has mean {np.mean(values):.6g}; expected 0")
    kurtosis = np.mean(values**4) / deviation**4
    if abs(kurtosis - 3) > SIGMAS * math.sqrt(24 / count):
        raise Broken(f"the noise has kurtosis {kurtosis:.4g}; expected 3, that of a Gaussian")
    for leaves in drawn:
        for i, one in enumerate(leaves):
            if len(one) > 1 and any(len(one) == len(other) and np.array_equal(one, other) for other in leaves[:i]):
                raise Broken("two parameters of one shape get the same noise: their difference shows the rows")
    for dtype in HALF:
        for name, of in (
            ("the sum", values),
            ("the mean", values / claim.rows),
            ("a unit Gaussian", values / expected),
        ):
            if np.mean(_is_of(of, dtype)) > 0.5:
                raise Broken(
                    f"the noise, as that of {name}, has the values of {np.dtype(dtype).name}; expected float32"
                )


PRIVATE_LAWS = (row_is_bounded, long_row_counts_by_clip_norm, noise_is_as_claimed)
"""the laws of a private step, beside those of every step"""


def _rows(trial: Trial) -> int:
    return math.prod(jax.tree.leaves(trial.adapter.batch)[0].shape[: _axes(trial)])


def _axes(trial: Trial) -> int:
    """How many leading axes of the batch count rows: of replicas, there is one more."""
    return 2 if trial.read("stacked") else 1


def _gradient(trial: Trial, batch: Any) -> Any:
    """The unscaled mean gradient of the first step on a batch, in float64."""
    before, state = trial.fresh(), trial.fresh()
    out = trial.out(state, Clean(), batch)
    found = calling("the claim's gradient", trial.adapter.private.gradient, before, out)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def _moves(trial: Trial) -> Iterator[tuple[int, float, float]]:
    """Rows, what their floats are multiplied by, and by how much the row moves the sum of gradients of the first step.

    Both steps draw the same noise, which is in the state's key: their difference shows the row alone.
    """
    kept = trial.__dict__.setdefault("_private_moves", [])
    if not kept:
        claim: PrivateClaim = trial.adapter.private
        batch, rows = trial.adapter.batch, _rows(trial)
        for row in sorted({round(i * (rows - 1) / (ROWS - 1)) for i in range(ROWS)}):
            without = _gradient(trial, claim.without(batch, np.array([row])))
            for factor in FACTORS:
                with_row = _gradient(
                    trial, jax.tree.map(lambda x, f=factor, r=row: _times(x, f, r, _axes(trial)), batch)
                )
                apart = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), with_row, without)
                kept.append((row, factor, claim.rows * math.sqrt(sum(jax.tree.leaves(apart)))))
    yield from kept


def _times(x: Any, factor: float, row: int, axes: int) -> Any:
    """A leaf of the batch with one row multiplied; a column of one number a row, such as weights, stays."""
    if not is_castable(x) or np.ndim(x) <= axes:
        return x
    changed = np.array(x)
    rows = changed.reshape(-1, *x.shape[axes:])
    rows[row] = rows[row] * factor if math.isfinite(factor) else factor
    return jnp.asarray(changed)


def _is_of(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Which values are, to three roundings of float32, values of a narrower dtype."""
    rounded = values.astype(np.float32).astype(dtype).astype(np.float64)
    return np.abs(values - rounded) <= 2.0**-22 * np.abs(values)
