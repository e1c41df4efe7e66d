"""`find_policy`: the cheapest policy that keeps the gradient, of any loss or of an experiment."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError, nearest
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments import find_policy as instrument
from jaxmp.instruments.find_policy import FoundPolicy, Point
from jaxmp.modules.linen import ModulePolicy, explain
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.reports.page import command, write
from jaxmp.runs.provenance import provenance
from jaxmp.runs.replay import states_at
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.subject import require_call
from jaxmp.tasks.loss import make_loss
from jaxmp.tasks.task import require_objective
from jaxmp.training.gradients import scaled_mean_loss
from jaxmp.training.objective import trained_view
from jaxmp.training.state import TrainState

Loss = Callable[[PolicyTree], Callable[..., jax.Array]]
"""`loss(tree)` is the loss under a tree: `loss(tree)(params, *batch)`, a scalar, a mean over the batch"""


@overload
def find_policy(
    subject: Experiment,
    *,
    half: str = ...,
    budget: float = ...,
    unit: str = ...,
    batches: int = ...,
    warmup_steps: int = ...,
    run: str | Path | Run | None = ...,
    loss_scale: float | None = ...,
    objective: str | None = ...,
    log: Callable[[str], None] = ...,
) -> FoundPolicy: ...
@overload
def find_policy(
    subject: Loss,
    explain: Callable[[PolicyTree], Iterable[ModulePolicy]],
    points: Iterable[Point | tuple[Any, Sequence[tuple[Any, ...]]]],
    *,
    half: Policy | str = ...,
    budget: float = ...,
    unit: str = ...,
    loss_scale: float | None = ...,
    log: Callable[[str], None] = ...,
) -> FoundPolicy: ...
def find_policy(subject: Loss | Experiment, *args: Any, **how: Any) -> FoundPolicy:
    """Finds the PolicyTree with the most FLOPs in half precision whose gradients stay within a budget of error.

        jaxmp.find_policy(experiment, half="mixed_float16", budget=0.1, unit="noise", batches=4, warmup_steps=100)

        loss = lambda tree: lambda params, x, y: cross_entropy(jaxmp.with_policy(model.apply, tree)(params, x), y)
        explain = lambda tree: jaxmp.explain(model, tree, x)
        jaxmp.find_policy(loss, explain, [(params, [(x, y), (x2, y2), ...])], half="mixed_float16", budget=0.1)

    The search is greedy, by error for FLOPs, and compiles the gradient about once for each module. Errors are those of
    each parameter's gradient beside the gradient in float64. Of an experiment, gradients are those of the training
    loss, with one key for all random draws: the same masks and noise under each tree and in float64. Its own precision
    is ignored.

    Args:
      subject: an Experiment; or `loss`: `loss(tree)` is the loss under a tree, `loss(tree)(params, *batch)`, a scalar,
        a mean over the batch.
      args: after `loss`: `explain`, such that `explain(tree)` returns the modules and the policy of each; and `points`,
        where gradients are taken: float32 parameters, with at least two batches for each.
      how: of both:
        half: the policy of modules in half: mixed_float16, the default, mixed_bfloat16, or another with float32
          parameters, or with a recipe, such as nvfp4.
        budget: the largest error allowed, in units, of any parameter's gradient at any point; 0.1 by default.
        unit: of the error of a parameter's gradient, at each point: "noise", the default, the standard deviation of the
          exact gradient over the batches; "gradient", its root mean square; "float32", the error of float32.
        loss_scale: the factor of the loss, a power of two; by default the initial scale of the experiment's scaler, or
          2**15 for float16, else 1. A gradient that overflows at this scale exceeds any budget.
        log: takes each message.
        Of an experiment alone:
        batches: number of gradients at each state, on the batches of the steps from there on; 4 by default.
        warmup_steps: gradients are taken at the fresh state, and at the state after this many float32 steps, by default
          100; 0: at the fresh state only.
        run: a run of the same model. Gradients are taken at its checkpoints instead of after warm-up steps.
        objective: which of several objectives, whose trained parameters are judged, at states between two steps.

    Returns:
      The tree and the measurements: `.precision`, what `--precision` takes, `.modules`, `.trials`, `.gap`. Its rules
      name paths.

    Raises:
      InputError: the subject is neither; `budget` is not positive, or below the error of float32; `half` is not a half
        policy; there are too few batches or modules; no module with FLOPs can be in half; or the run is of another
        model.
    """
    if isinstance(subject, Experiment):
        if args:
            raise InputError("find_policy: explain and points are those of a loss; an experiment has its own")
        takes = inspect.signature(find_policy_of).parameters
        for name in how:
            if name not in takes:
                raise InputError(f"find_policy: an experiment takes no {name!r}{nearest(name, takes)}")
        return find_policy_of(subject, **how)
    find = instrument.find_policy
    require_call("find_policy", "an Experiment", subject, (None,), {})
    require_call("find_policy", "an Experiment", find, (subject, *args), how, tuple(inspect.signature(find).parameters))
    return find(subject, *args, **how)


def find_policy_of(
    experiment: Experiment,
    *,
    half: str = "mixed_float16",
    budget: float = 0.1,
    unit: str = "noise",
    batches: int = 4,
    warmup_steps: int = 100,
    run: str | Path | Run | None = None,
    loss_scale: float | None = None,
    objective: str | None = None,
    log: Callable[[str], None] = print,
) -> FoundPolicy:
    """Finds the PolicyTree with the most FLOPs in half precision that keeps an experiment's gradients within a budget.

    See `jaxmp.find_policy` for the search, `half`, `budget` and `unit`. Gradients are those of the training loss,
    with one key for all random draws: the same masks and noise under each tree and in float64. The experiment's own
    precision is ignored.

    Args:
      experiment: its model, loss and training batches are used.
      batches: number of gradients at each state, on the batches of the steps from there on.
      warmup_steps: gradients are taken at the fresh state, and at the state after this many float32 steps; 0: at the
        fresh state only.
      run: a run of the same model. Gradients are taken at its checkpoints instead of after warm-up steps.
      loss_scale: by default the initial scale of the experiment's scaler under `half`.
      objective: which of several objectives, whose trained parameters are judged, at states between two steps.
      log: takes each message to the user.

    Raises: InputError as `jaxmp.find_policy` does, and for a run of another model.
    """
    for name, value, least in (("batches", batches, 1), ("warmup_steps", warmup_steps, 0)):
        if value < least:
            raise InputError(f"{name}={value}: expected a whole number of at least {least}")
    require_objective(experiment.task, objective, "--objective")
    if loss_scale is None:
        loss_scale = float(dataclasses.replace(experiment, precision=half).scaler_of(objective).init().scale)
    # Which device does what changes no gradient by more than rounding.
    experiment = dataclasses.replace(experiment, precision="float32", parallel=Parallel("jit"))
    trainer = Trainer(experiment)
    trains = trainer.by_name[objective].trains

    def points() -> Iterator[Point]:
        feed = trainer.feed(fuse=False)
        for state in _states(trainer, warmup_steps, run):
            first = int(state.step)
            log(f"state after {first} steps, batches {first + 1} to {first + batches}")
            own = trained_view(state.params, trains)
            frozen = jax.tree.map(lambda leaf, trained: None if trained is not None else leaf, state.params, own)
            yield Point(own, [(frozen, state.model_state, feed.batch(first + i)) for i in range(batches)])

    return instrument.find_policy(
        lambda tree: _loss(experiment, tree, objective),
        lambda tree: explain(experiment.adapted_model, tree, tuple(trainer.inputs)),
        points(),
        half=half,
        budget=budget,
        unit=unit,
        loss_scale=loss_scale,
        log=log,
    )


def save(found: FoundPolicy, name: str, path: Path) -> None:
    """Writes what was found for the config `name` as JSON, with its provenance. Raises InputError if it cannot."""
    content = {"config": name, **provenance(patch=False), "command": command(), **found.to_json()}
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _loss(experiment: Experiment, policy: PolicyTree, objective: str | None) -> Callable[..., jax.Array]:
    """`(trained parameters, frozen parameters, model_state, batch) -> loss`, with None in place of the others."""
    loss_fn = make_loss(experiment.adapted_model, experiment.task, policy, objective=objective)
    mean_loss = scaled_mean_loss(loss_fn)

    def loss(own: Any, frozen: Any, model_state: Any, batch: Any) -> jax.Array:
        params = jax.tree.map(lambda a, b: b if a is None else a, own, frozen, is_leaf=lambda leaf: leaf is None)
        return mean_loss(params, model_state, jnp.float32(1), batch, jax.random.key(0))[0]

    return loss


def _states(trainer: Trainer, warmup_steps: int, run: str | Path | Run | None) -> Iterator[TrainState]:
    """Yields the fresh state, then those of a run's checkpoints, or the one after the warm-up steps."""
    fresh = trainer.init()
    yield fresh
    if run is not None:
        yield from _checkpoints(run if isinstance(run, Run) else Run(run), fresh)
    elif warmup_steps:
        wanted = {1 + min(warmup_steps, trainer.steps - 1)}
        yield from (past.state for past in states_at(trainer.experiment, wanted))


def _checkpoints(run: Run, fresh: TrainState) -> Iterator[TrainState]:
    found = run.checkpoint_steps()
    if not found:
        raise InputError(f"{run.path} has no checkpoint yet")
    for step in found:
        state = run.state(step)
        if _shapes(state.params) != _shapes(fresh.params):
            raise InputError(f"{run.path} trained a model with other parameters than this config's")
        yield state


def _shapes(params: Any) -> Any:
    return [(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
