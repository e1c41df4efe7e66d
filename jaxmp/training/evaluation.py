"""Evaluation: the metrics of a model over a whole split, exact over its smaller last batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Dataset
from jaxmp.data.pipeline import evaluation_batches
from jaxmp.data.source import Source
from jaxmp.training.batch import EXAMPLE_INDEX, Batch, LossFn
from jaxmp.training.metrics import Mean, Metrics, merge, with_loss
from jaxmp.training.parallel import Devices
from jaxmp.training.state import TrainState

EvalStep = Callable[..., Metrics]
"""`(params, model_state, batch, key=None) -> metrics`"""

EVALUATION = 0x6576616C
"""number of the stream of keys that evaluation draws from; no step of a run is as large"""


def make_eval_step(loss_fn: LossFn | Mapping[str, LossFn]) -> EvalStep:
    """The pure `(params, model_state, batch, key=None) -> metrics`, from `make_loss(..., train=False)`.

    `loss` is one of the metrics. `key` is that of the draws that the model makes in evaluation; None if it makes none.
    Of several loss functions by name, all are given the same key, and their metrics are called `name/loss` and so on.
    """
    if isinstance(loss_fn, Mapping):
        steps = {name: make_eval_step(of) for name, of in loss_fn.items()}

        def eval_steps(params: Any, model_state: Any, batch: Batch, key: jax.Array | None = None) -> Metrics:
            measured = {name: step(params, model_state, batch, key) for name, step in steps.items()}
            return {f"{name}/{metric}": mean for name, of in measured.items() for metric, mean in of.items()}

        return eval_steps

    def eval_step(params: Any, model_state: Any, batch: Batch, key: jax.Array | None = None) -> Metrics:
        total, (weight, metrics, _) = loss_fn(params, model_state, batch, key)
        return with_loss(Mean(total.astype(jnp.float32), weight.astype(jnp.float32)), metrics)

    return eval_step


def evaluation_key(state: TrainState) -> jax.Array:
    """The key of an evaluation of `state`: a function of its key and its step."""
    return _evaluation_key(state.key, state.step)


@jax.jit
def _evaluation_key(key: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, EVALUATION), step)


class Evaluation:
    """Evaluates states on the rows of a split.

    Args:
      loss_fn: from `make_loss(..., train=False)`; of several objectives, by name.
      data: how its rows are prepared, and the number of rows in a batch.
      devices: where the states lie.
      no_metrics: the metrics of the loss function, `loss` included, that have counted nothing.
    """

    def __init__(self, loss_fn: LossFn | Mapping[str, LossFn], data: Dataset, devices: Devices, no_metrics: Metrics):
        self._devices, self._no_metrics = devices, no_metrics
        self._batch_size = -(-data.eval_batch_size // devices.count) * devices.count
        step, prepared = make_eval_step(loss_fn), data.prepare(train=False)

        @jax.jit
        def add(params: Any, model_state: Any, metrics: Metrics, batch: Any, key: jax.Array, first: Any) -> Metrics:
            batch = prepared(batch, None)
            index = first + jnp.arange(len(batch["weight"]), dtype=jnp.int32)
            return merge(metrics, step(params, model_state, {**batch, EXAMPLE_INDEX: index}, key))

        self._add = add

    def __call__(self, state: TrainState, source: Source) -> Metrics:
        """The metrics over all rows of `source`; of the averaged weights if the state has them.

        What is drawn for a row is a function of the state's key and step, and of the row's number: see
        `jaxmp.modules.dropout` for what draws by the row.

        Args:
          state: on these devices, as `Devices.get` returns it.
          source: the rows, taken in order.
        """
        params = state.averaged_params
        metrics, own = self._devices.whole(self._no_metrics), self._devices.local_rows(self._batch_size)
        key = evaluation_key(state)
        for number, batch in enumerate(evaluation_batches(source, self._batch_size, own)):
            batch = self._devices.shard_local_rows(batch)
            metrics = self._add(params, state.model_state, metrics, batch, key, np.int32(number * self._batch_size))
        return metrics
