"""`find_lr`: a learning-rate range test, in the experiment's own precision.

Source: L. N. Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, https://arxiv.org/abs/1506.01186,
section 3.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.html.figure import Axis, Series, line_figure
from jaxmp.reports.page import Page
from jaxmp.runs.fit import steps
from jaxmp.tasks.task import objectives_of, require_objective
from jaxmp.text_table import without_nan
from jaxmp.training.metrics import compute
from jaxmp.training.objective import due_at
from jaxmp.training.optimizers import Optimizer
from jaxmp.training.schedules import Schedule

SMOOTHING = 0.9
"""factor of the moving average over the losses"""
DIVERGED = 4.0
"""the test ends where the averaged loss is so many times its least value"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rising(Schedule):
    """A learning rate that rises by the same factor in each applied step, up to the peak in the last one."""

    first: float
    """Learning rate of the first step, as a fraction of the peak."""

    def numbers(self, steps: int) -> dict[str, Any]:
        """See `Schedule.numbers`."""
        return {**super().numbers(steps), "steps": float(steps)}

    def _factor(self, t: jax.Array, numbers: Mapping[str, Any]) -> jax.Array:
        return jnp.exp(math.log(self.first) * (1 - t / jnp.maximum(numbers["steps"] - 1, 1)))


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The loss at each learning rate of a range test."""

    rates: list[float]
    """learning rate of each applied step"""
    losses: list[float]
    """training loss of each applied step, before its update"""
    averaged: list[float]
    """moving average of the losses, with bias correction"""
    skipped: int
    """number of steps that loss scaling skipped"""
    diverged: bool
    """whether the loss came out infinite or NaN, or rose to `DIVERGED` times its least average"""

    @property
    def suggestion(self) -> float:
        """A tenth of the learning rate at which the averaged loss is least."""
        return self.rates[min(range(len(self.averaged)), key=self.averaged.__getitem__)] / 10


def find_lr(
    experiment: Experiment,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 200,
    objective: str | None = None,
    log: Callable[[str], None] = print,
) -> RangeTest:
    """Trains from fresh weights while the learning rate rises from `lowest` to `highest`, and keeps the losses.

    The optimizer keeps its clipping, decay and moments, and loses its schedule. Nothing is written.

    Args:
      experiment: what to train; its optimizer is one of jaxmp's.
      lowest: learning rate of the first step, above 0.
      highest: learning rate of the last step.
      steps: number of steps of the objective; the test ends before that where its loss diverges.
      objective: which of several objectives the test is of; the others train at learning rates of their own.
      log: is told how the test ended, if it ended early.

    Raises:
      InputError: the range is empty, there are fewer than 10 steps, there is no such objective, the optimizer is of
        its own kind, or the first steps already diverge.
    """
    require_objective(experiment.task, objective, "--objective")
    if not 0 < lowest < highest or not math.isfinite(highest):
        raise InputError(f"learning rates {lowest:g} to {highest:g}: expected 0 < lowest < highest")
    if steps < 10:
        raise InputError(f"steps {steps}: expected 10 or more")
    own = experiment.optimizer if objective is None else experiment.optimizer_of(objective)
    if not isinstance(own, Optimizer):
        kind = type(own).__name__
        raise InputError(
            f"optimizer: a {kind} has no learning rate to change; expected one of jaxmp's, Adam(1e-3), say"
        )
    rising = Rising(first=lowest / highest)
    optimizer: Any = dataclasses.replace(own, learning_rate=highest, schedule=rising)
    several = objectives_of(experiment.task)
    whole = steps
    if objective is not None:
        optimizer = {name: experiment.optimizer_of(name) for name in several} | {objective: optimizer}
        whole = steps * several[objective].every
    loop = dataclasses.replace(
        experiment.loop, steps=whole, log_every=1, eval_every=whole, patience=None, ranges_every=None
    )
    rate, changed = rising.make(highest, steps), dataclasses.replace(experiment, optimizer=optimizer, loop=loop)
    return _measured(changed, objective, rate, log)


def _measured(
    experiment: Experiment, objective: str | None, rate: Callable[[int], Any], log: Callable[[str], None]
) -> RangeTest:
    found, average, least, skipped = RangeTest([], [], [], 0, False), 0.0, math.inf, 0
    name = "loss" if objective is None else f"{objective}/loss"
    for info in steps(experiment):
        if objective is not None and objective not in due_at(objectives_of(experiment.task), info.step - 1):
            continue
        loss = compute(info.metrics).get(name, math.nan)
        if float(info.metrics[name].weight) == 0:  # loss scaling skipped the step
            skipped += 1
            continue
        applied = len(found.rates)
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        corrected = average / (1 - SMOOTHING ** (applied + 1))
        if not math.isfinite(corrected) or (applied >= 10 and corrected > DIVERGED * abs(least)):
            log(f"step {info.step}: the loss diverges at a learning rate of {float(rate(applied)):.3g}")
            found = dataclasses.replace(found, diverged=True)
            break
        found.rates.append(float(rate(applied)))
        found.losses.append(loss)
        found.averaged.append(corrected)
        least = min(least, corrected)
    if len(found.rates) < 10:
        raise InputError(
            f"only {len(found.rates)} of {len(found.rates) + skipped} steps were applied before the loss diverged; "
            "expected 10 or more: try a lower --lowest"
        )
    return dataclasses.replace(found, skipped=skipped)


def save(found: RangeTest, name: str, output: Path) -> None:
    """Writes the page of a range test. Raises InputError if the file cannot be written."""
    page = Page(f"{name}: the loss as the learning rate rises", f"suggested learning rate: {found.suggestion:.2g}")
    series = [
        Series("", found.rates, found.losses, 0, faint=True),
        Series("average", found.rates, found.averaged, 0),
    ]
    name = "Training loss against the learning rate"
    caption = f"Thin: each step. Thick: moving average, factor {SMOOTHING}. Suggested: a tenth of its minimum's rate."
    svg = line_figure(Axis("learning rate", "log10"), Axis("loss"), series, name=name)
    page.figures([(name, svg, caption)])
    ended = "the loss diverged" if found.diverged else "the highest learning rate was reached"
    page.paragraph(f"{len(found.rates)} steps applied, {found.skipped} skipped by loss scaling; {ended}.", "note")
    page.data(without_nan(dataclasses.asdict(found)))
    page.write(output)
