"""`what_if`: what recipes would do to the products of a step, of any loss, of an experiment or of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments import what_if as instrument
from jaxmp.instruments.what_if import WhatIf, recipe_of
from jaxmp.precision.recipe import Recipe
from jaxmp.reports.page import command, write
from jaxmp.runs.provenance import provenance
from jaxmp.runs.replay import Past, PastStep, states_at
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.transform import loss_scale
from jaxmp.studies.subject import OF_FUNCTION, require_call, require_none
from jaxmp.tasks.task import require_objective
from jaxmp.training.objective import EVERYTHING

RECIPES = ("mxfp8", "mxfp4", "nvfp4", "block128", "fp8_current")
"""the recipes that are measured by default"""

Recipes = Mapping[str, Recipe] | Sequence[str]
"""Recipes by name, or their texts: names of recipes or formats, or fields."""


def what_if(
    subject: Callable[..., Any] | Experiment | Run,
    *args: Any,
    recipes: Recipes = RECIPES,
    step: int | None = None,
    objective: str | None = None,
    accumulate_steps: int | None = None,
    trains: tuple[str, ...] | None = None,
    log: Callable[[str], None] = print,
) -> WhatIf:
    """Measures what recipes would do to each layer's three products in one step, which is not changed.

    Measured are Dense, DenseGeneral and Conv layers without groups, also within attention, scan, remat and vmap, and if
    the step runs under a recipe, the other layers that it rounds. The step of an experiment or a run is run under its
    own precision, on one device, with the loss scale, batch and key of that step.

    Args:
      subject: an Experiment, which is trained up to the step; a Run, which is only read; or a loss function that runs
        Linen modules under `jaxmp.with_policy`, as `jaxmp.make_loss` makes them.
      args: for a loss function `params, model_state, scale, batch, key`; none for the others.
      recipes: what to measure: texts such as `nvfp4`, `mxfp4,hadamard=none` or `e4m3:block32`, or recipes by name.
      step: of an experiment or a run, which step, from 1. By default the first of an experiment, and the last of a run.
      objective: of an experiment or a run, which of several objectives.
      accumulate_steps: of a loss function, number of microbatches of a batch; 1 by default.
      trains: of a loss function, the parameters that it is differentiated by, see `jaxmp.Objective`; all by default.
      log: takes each message to the user.

    Returns:
      The losses of operands and products, by recipe, layer and product.

    Raises:
      InputError: the subject is none of these; a recipe, the step or the objective is unknown; the loss function does
        not take these arguments; or it runs no layer that is measured.
    """
    if isinstance(subject, Experiment | Run):
        of_loss = {"arguments": args or None, "accumulate_steps": accumulate_steps, "trains": trains}
        require_none("what_if", of_loss, OF_FUNCTION)
        return what_if_of(subject, recipes=recipes, step=step, objective=objective, log=log)
    require_none("what_if", {"step": step, "objective": objective}, "only of an experiment or a run")
    loss = require_call("what_if", "an Experiment, a Run", subject, (None,) * 4, {})
    if len(args) != 5:
        raise InputError(
            f"what_if: {len(args)} arguments after the loss; expected params, model_state, scale, batch, key"
        )
    measure = instrument.make_what_if(
        loss,
        _by_name(recipes),
        accumulate_steps=1 if accumulate_steps is None else accumulate_steps,
        trains=EVERYTHING if trains is None else trains,
    )
    return jax.jit(measure)(*args).read()


def what_if_of(
    subject: Experiment | Run,
    *,
    recipes: Recipes = RECIPES,
    step: int | None = None,
    objective: str | None = None,
    log: Callable[[str], None] = print,
) -> WhatIf:
    """Measures what recipes would do to one step of an experiment, or of a run as it was.

    The step runs under the experiment's own precision, on one device, with the loss scale, batch and key of that step.

    Args:
      subject: the experiment, which is trained up to the step; or the run, which is only read.
      recipes: see `what_if`.
      step: which step, from 1. By default the first of an experiment, and the last of a run.
      objective: which of several objectives.
      log: takes each message to the user.

    Raises:
      InputError: a recipe, the step or the objective is unknown, or the model has no layer that is measured.
    """
    named = _by_name(recipes)
    experiment = subject.experiment if isinstance(subject, Run) else subject
    require_objective(experiment.task, objective, "--objective")
    past = _past(subject, step, objective, log)
    experiment = dataclasses.replace(experiment, parallel=Parallel("jit"))
    trained = Trainer(experiment).replayed[objective]
    log(f"step {past.step}: {', '.join(named)}")
    measure = instrument.make_what_if(
        trained.loss_fn, named, accumulate_steps=experiment.loop.accumulate_steps, trains=trained.trains
    )
    state = past.state
    key = jax.random.fold_in(state.key, state.step)
    return jax.jit(measure)(state.params, state.model_state, jnp.float32(past.scale), past.batch, key).read()


def save(found: WhatIf, name: str, path: Path) -> None:
    """Writes what was found for a config or run as JSON, with its provenance. Raises InputError if it cannot."""
    content = {"of": name, **provenance(patch=False), "command": command(), "products": found.to_json()}
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _by_name(recipes: Recipes) -> dict[str, Recipe]:
    named = dict(recipes) if isinstance(recipes, Mapping) else {text: recipe_of(text) for text in recipes}
    if not named:
        raise InputError(f"what-if without a recipe: expected one or several, such as {', '.join(RECIPES)}")
    return named


def _past(subject: Experiment | Run, step: int | None, objective: str | None, log: Callable[[str], None]) -> PastStep:
    """The step that is measured, with the loss scale of the objective."""
    if isinstance(subject, Run):
        lines = [line["step"] for line in subject.metrics]
        last = max([*subject.checkpoint_steps(), *lines], default=0)
        return Past(subject, log).step(last if step is None else step, objective)
    steps = Trainer(subject).steps
    wanted = 1 if step is None else step
    if not 1 <= wanted <= steps:
        raise InputError(f"--step {wanted}: expected one of the steps of the experiment, 1 to {steps}")
    (past,) = states_at(subject, {wanted})
    if objective is None:
        return past
    scale = float(loss_scale(past.state.opt_state[objective]))
    return past._replace(scale=scale, objective=objective)
