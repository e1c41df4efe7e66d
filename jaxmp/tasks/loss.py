"""`make_loss`: a model and a task under a policy, as the loss function that a train step differentiates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmp.errors import InputError, nearest
from jaxmp.modules.activations import RowSharding
from jaxmp.modules.dropout import DropoutByExample
from jaxmp.modules.linen import UnderPolicy
from jaxmp.modules.model import Model, as_model
from jaxmp.modules.recipe_layers import Spread
from jaxmp.modules.remat import Remat
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree, as_tree
from jaxmp.tasks.function import as_task
from jaxmp.tasks.task import Task, change_batch, check_returned, objectives_of, refuse_several, task_name, task_of
from jaxmp.training.batch import EXAMPLE_INDEX, Batch, LossFn
from jaxmp.training.metrics import Mean, recorded_means


def make_loss(
    model: Any,
    task: Any,
    policy: Policy | PolicyTree | str,
    *,
    objective: str | None = None,
    train: bool = True,
    axis_name: str | None = None,
    replicas: str | None = None,
    remat: tuple[str, ...] = (),
    remat_policy: str = "nothing_saveable",
    rows: NamedSharding | None = None,
    zero_losses: bool = False,
) -> LossFn:
    """The loss function of a model and a task under a policy.

    The model is called with `train=`, `training=` or `deterministic=`, whichever its `__call__` takes. In training all
    its random draws come from the one `key`, and dropout draws by the example (see `jaxmp.modules.dropout`). Its
    collections other than `params` are the model state.

    Args:
      model: a Linen module, or one of `from_nnx`; see `jaxmp.modules.model.as_model`.
      task: names the model's inputs, and makes a loss and metrics of its outputs: a `Task`, or a function of
        (outputs, batch), see `jaxmp.FunctionTask`.
      policy: a `Policy`, a `PolicyTree`, or the text of one.
      objective: which of the task's several objectives; None for a task with a single one.
      train: False for evaluation: no dropout, and the model state is returned as it was given. What the model draws
        all the same, a VAE's noise, comes from the key, and is by the example where the batch has `EXAMPLE_INDEX`.
      axis_name: mapped axis over which batch normalisation takes its statistics, where there are replicas.
      replicas: mapped axis over which the rows of a batch are spread, where there is one: a recipe's scales of whole
        tensors are the same on all replicas.
      remat: patterns of the modules that the backward pass computes again, see `jaxmp.modules.remat`.
      remat_policy: what is kept of them nevertheless.
      rows: sharding of the rows of a batch, for a program that XLA partitions; see `jaxmp.modules.activations`.
      zero_losses: adds the metric `zero_losses`, the share of losses that are exactly 0 (trap T27), of those that
        `Mean.of` made the loss from.

    Raises:
      InputError: `policy` is malformed, the task has no such objective, or several and none is named, or `remat` is
        given for a model of `from_nnx`; when the loss is called, a pattern of `remat` or a rule of the policy names no
        module; with `zero_losses`, the task's loss is not made by `Mean.of`.
    """
    task, method = as_task(task), dict[str, Any]()
    if objective is not None:
        several, task = task, task_of(task, objective)
        called = objectives_of(several)[objective].method
        # Not given where there is none: a `Model` of one's own may know of no methods.
        method = {} if called is None else {"method": called}
    refuse_several(task, "make_loss without objective=")
    tree = as_tree(policy)
    has_recipe = any(each.recipe is not None for each in tree.policies)

    def under(spread: Spread) -> Model:
        under_policy = as_model(model).under(UnderPolicy(tree, axis_name, spread))
        return under_policy.under(Remat(remat, remat_policy)) if train and remat else under_policy

    under_policy = under(Spread(axis_name=replicas))

    def loss_fn(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        batch = change_batch(task, batch, key, train=train)
        inputs = [batch[name] for name in task.inputs]
        index, count = batch.get(EXAMPLE_INDEX), len(batch["weight"])
        if train:
            sharding = [] if rows is None else [RowSharding(rows, count)]
            own = under(Spread(index, count, replicas)) if has_recipe else under_policy
            trained = own.under(DropoutByExample(index, count), *sharding)
            outputs, model_state = trained.apply(params, model_state, *inputs, train=True, key=key, **method)
        else:
            drawing = under_policy if index is None else under_policy.under(DropoutByExample(index, count))
            outputs, model_state = drawing.apply(params, model_state, *inputs, key=key, **method)
        try:
            with recorded_means() as made:
                returned = task(outputs, batch)
        except KeyError as error:
            name = error.args[0] if error.args else None
            if not isinstance(name, str) or name in batch:
                raise
            raise InputError(
                f"{task_name(task)} reads batch[{name!r}]; the batch has {', '.join(batch)}{nearest(name, batch)}. "
                "A column that holds no numbers is left out"
            ) from error
        check_returned(task, returned)
        loss, metrics = returned
        if zero_losses:
            metrics = {**metrics, "zero_losses": _share_of_zeros(task, loss, made)}
        return loss.total, (loss.weight, metrics, model_state)

    return loss_fn


def _share_of_zeros(task: Any, loss: Mean, made: list[tuple[Mean, jax.Array, jax.Array]]) -> Mean:
    """The share of the losses that are exactly 0, under the weights of the loss."""
    for mean, values, weights in made:
        if mean.total is loss.total:
            return Mean.of(values == 0, weights)
    raise InputError(
        f"loop.watch zero_losses: {task_name(task)} makes its loss otherwise than by Mean.of(losses, weights), so that "
        "no single losses are known"
    )


def init_model(model: Any, task: Task, batch: Any, key: jax.Array) -> tuple[Any, Any]:
    """Fresh `(params, model_state)` of a model, for batches such as `batch` (arrays or `jax.ShapeDtypeStruct`s)."""
    return as_model(model).init(key, *one_row(task, batch))


def one_row(task: Task, batch: Any) -> list[jax.Array]:
    """The model's inputs for one row: zeros of (1, ...), in the shapes and dtypes of `batch`."""
    return [jnp.zeros((1, *batch[name].shape[1:]), batch[name].dtype) for name in task.inputs]
