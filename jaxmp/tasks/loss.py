"""`make_loss`: a model and a task under a policy, as the loss function that a train step differentiates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxmp.errors import InputError
from jaxmp.modules.activations import kept_with_rows
from jaxmp.modules.dropout import by_example
from jaxmp.modules.linen import mode_argument, with_policy
from jaxmp.modules.nnx import FromNNX
from jaxmp.modules.remat import rematerialised
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.tasks.task import Task
from jaxmp.training.batch import EXAMPLE_INDEX, Batch, LossFn


def make_loss(
    model: Any,
    task: Task,
    policy: Policy | PolicyTree | str,
    *,
    train: bool = True,
    axis_name: str | None = None,
    remat: tuple[str, ...] = (),
    remat_policy: str = "nothing_saveable",
    rows: NamedSharding | None = None,
) -> LossFn:
    """The loss function of a Flax Linen module under a policy.

    The model is called with `train=`, `training=` or `deterministic=`, whichever its `__call__` takes. Its random keys
    of every name come from the one `key`, and dropout draws by the example (see `jaxmp.modules.dropout`); its
    collections other than `params` are the model state.

    Args:
      model: a Linen module.
      task: which inputs it gets, and what its outputs mean.
      policy: a `Policy`, a `PolicyTree`, or the text of one.
      train: False for evaluation: no dropout, and the model state is read only.
      axis_name: mapped axis over which batch normalisation takes its statistics, where there are replicas.
      remat: modules that the backward pass computes again, see `jaxmp.modules.remat`.
      remat_policy: what is kept of them nevertheless.
      rows: where the rows of a batch lie, for a program that XLA partitions; see `jaxmp.modules.activations`.

    Raises (when called): InputError where a pattern of `remat`, or a rule of the policy, names no module.
    """
    mode = mode_argument(model, train)
    of_nnx = isinstance(model, FromNNX)
    if of_nnx and remat:
        raise InputError(
            f"parallel.remat={remat}: a model made by from_nnx has no modules to name; use nnx.remat in it"
        )
    evaluated = with_policy(model.apply, policy, axis_name=axis_name)

    def trained(key: jax.Array, global_index: jax.Array | None, count: int) -> Any:
        """`model.apply` in training, and its key."""
        if of_nnx:
            return evaluated, key if global_index is None else jax.random.fold_in(key, global_index[0])
        apply = with_policy(by_example(model.apply, global_index, count), policy, axis_name=axis_name)
        apply = apply if rows is None else kept_with_rows(apply, rows, count)
        return rematerialised(apply, remat, remat_policy), key

    def loss_fn(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        variables = {"params": params, **model_state}
        inputs = [batch[name] for name in task.inputs]
        if train:
            # One key for all names: Linen falls back on "params" for a collection that it is given no key for.
            apply, key = trained(key, batch.get(EXAMPLE_INDEX), len(batch["weight"]))
            rngs = {"params": key}
            outputs, model_state = apply(variables, *inputs, rngs=rngs, mutable=list(model_state), **mode)
            model_state = _without_sown(model_state)
        else:
            outputs = evaluated(variables, *inputs, **mode)
        loss, metrics = task(outputs, batch)
        return loss.total, (loss.weight, metrics, model_state)

    return loss_fn


def init_model(model: Any, task: Task, batch: Any, key: jax.Array) -> tuple[Any, Any]:
    """Fresh `(params, model_state)` of a Linen module for batches such as `batch` (arrays or `ShapeDtypeStruct`s)."""
    inputs = [jnp.zeros((1, *batch[name].shape[1:]), batch[name].dtype) for name in task.inputs]
    variables = dict(model.init(key, *inputs, **mode_argument(model, False)))
    params = variables.pop("params", {})
    return params, _without_sown(variables)


def _without_sown(variables: dict[str, Any]) -> dict[str, Any]:
    """The collections without what the model sows, which is for looking at and no state: Flax keeps it in tuples."""
    kept = {name: _without_sown(v) if isinstance(v, dict) else v for name, v in variables.items()}
    return {name: v for name, v in kept.items() if not isinstance(v, tuple) and not (isinstance(v, dict) and not v)}
