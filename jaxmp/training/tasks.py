"""Tasks: how a batch feeds a model, and how its outputs become a loss and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxmp.data.source import Source
from jaxmp.errors import InputError
from jaxmp.precision.flax import mode_argument, with_policy
from jaxmp.precision.nnx import FromNNX
from jaxmp.precision.policy import Policy
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.training.activations import kept_with_rows
from jaxmp.training.metrics import Mean, Metrics
from jaxmp.training.noise import by_example
from jaxmp.training.remat import rematerialised

Batch = dict[str, jax.Array]
"""Arrays with the examples along axis 0, and `"weight"`, float32 (examples,): 0 for a row that only fills the batch."""

PLACE = "place in the batch"
"""in what is a part of a batch, a replica's or a microbatch: the place of each row in the whole, int32 (examples,)"""

LossFn = Callable[[Any, Any, Batch, Any], tuple[jax.Array, tuple[jax.Array, Metrics, Any]]]
"""`loss_fn(params, model_state, batch, key) -> (loss_sum, (weight, metrics, model_state))`.

A sum and a weight rather than a mean, both float32 scalars: masked losses, a smaller last batch and replicas then agree
to rounding. The key is the same for all parts of a batch: fold `batch[PLACE]` in, where there is one, for noise that
differs between them. Where a batch comes in microbatches, the weight must not depend on the parameters."""


class Task(Protocol):
    """What `make_loss` wants to know. A task of one's own needs these two and nothing else."""

    inputs: tuple[str, ...]
    """keys of the batch that the model is called with, in order"""

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Mean, Metrics]:
        """The loss and further metrics, in float32 whatever dtype the outputs have."""
        ...


@dataclasses.dataclass(frozen=True)
class Classification:
    """One of several classes an example: softmax cross-entropy and accuracy from logits (examples, classes)."""

    inputs: tuple[str, ...] = ("image",)
    """keys of the batch that the model is called with"""
    target: str = "label"
    """key of the integer labels, (examples,), from 0 on"""
    label_smoothing: float = 0.0
    """share of the target that is spread evenly over all classes"""

    def __post_init__(self) -> None:
        """Checks the range of the smoothing, and that `inputs` are several."""
        if isinstance(self.inputs, str):
            raise InputError(f"task.inputs = {self.inputs!r}: expected a tuple, ({self.inputs!r},)")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing={self.label_smoothing}: expected 0 <= label_smoothing < 1")

    def __call__(self, outputs: jax.Array, batch: Batch) -> tuple[Mean, Metrics]:
        """Mean cross-entropy in nats, and `accuracy`."""
        logits, labels = outputs.astype(jnp.float32), batch[self.target]
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
            raise InputError(
                f"{self.target!r} is {labels.dtype}{list(labels.shape)} beside logits of {list(logits.shape)}; "
                f"expected whole numbers, one an example: {list(logits.shape[:-1])}"
            )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        correct = jnp.argmax(logits, axis=-1) == labels
        return Mean.of(losses, batch["weight"]), {"accuracy": Mean.of(correct, batch["weight"])}


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
    of every name come from the one `key`, and dropout draws by the example (see `jaxmp.training.noise`); its
    collections other than `params` are the model state.

    Args:
      model: a Linen module.
      task: which inputs it gets, and what its outputs mean.
      policy: a `Policy`, a `PolicyTree`, or the text of one.
      train: False for evaluation: no dropout, and the model state is read only.
      axis_name: mapped axis over which batch normalisation takes its statistics, where there are replicas.
      remat: modules that the backward pass computes again, see `jaxmp.training.remat`.
      remat_policy: what is kept of them nevertheless.
      rows: where the rows of a batch lie, for a program that XLA partitions; see `jaxmp.training.activations`.

    Raises (when called): InputError where a pattern of `remat`, or a rule of the policy, names no module.
    """
    mode = mode_argument(model, train)
    of_nnx = isinstance(model, FromNNX)
    if of_nnx and remat:
        raise InputError(
            f"parallel.remat={remat}: a model made by from_nnx has no modules to name; use nnx.remat in it"
        )
    evaluated = with_policy(model.apply, policy, axis_name=axis_name)

    def trained(key: jax.Array, places: jax.Array | None, count: int) -> Any:
        """`model.apply` in training, and its key."""
        if of_nnx:
            return evaluated, key if places is None else jax.random.fold_in(key, places[0])
        apply = with_policy(by_example(model.apply, places, count), policy, axis_name=axis_name)
        apply = apply if rows is None else kept_with_rows(apply, rows, count)
        return rematerialised(apply, remat, remat_policy), key

    def loss_fn(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        variables = {"params": params, **model_state}
        inputs = [batch[name] for name in task.inputs]
        if train:
            # One key for all names: Linen falls back on "params" for a collection that it is given no key for.
            apply, key = trained(key, batch.get(PLACE), len(batch["weight"]))
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


def check_labels(model: Any, task: Task, batch: Any, splits: Mapping[str, Source]) -> None:
    """Refuses labels of a `Classification` that are none of the model's classes, which no loss shows for what they are.

    They are looked at where they are at hand, in a column in memory or memory-mapped; no other column is read.

    Args:
      model: as for `make_loss`.
      task: one that makes its loss of labels in another way than `Classification` is not looked at.
      batch: arrays or `ShapeDtypeStruct`s that the model can be called with.
      splits: sources of rows by the name of their split, for the message.

    Raises: InputError with the least and the greatest label.
    """
    if not isinstance(task, Classification) or type(task).__call__ is not Classification.__call__:
        return

    def outputs(key: jax.Array) -> Any:
        params, model_state = init_model(model, task, batch, key)
        inputs = [jnp.zeros((1, *batch[name].shape[1:]), batch[name].dtype) for name in task.inputs]
        return model.apply({"params": params, **model_state}, *inputs, **mode_argument(model, False))

    classes = jax.eval_shape(outputs, jax.random.key(0)).shape[-1]
    for split, source in splits.items():
        labels = getattr(source, "columns", {}).get(task.target)
        if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or not labels.size:
            continue
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= classes:
            raise InputError(
                f"{task.target!r} of the {split} split: labels run from {least} to {most}; expected 0 to "
                f"{classes - 1}, one for each of the model's {classes} outputs"
            )


def _without_sown(variables: dict[str, Any]) -> dict[str, Any]:
    """The collections without what the model sows, which is for looking at and no state: Flax keeps it in tuples."""
    kept = {name: _without_sown(v) if isinstance(v, dict) else v for name, v in variables.items()}
    return {name: v for name, v in kept.items() if not isinstance(v, tuple) and not (isinstance(v, dict) and not v)}
