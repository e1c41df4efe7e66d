"""Static scales of activations: the largest magnitudes that the inputs of a model's products reach on some batches."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.pipeline import evaluation_batches
from jaxmp.data.source import Rows, Source
from jaxmp.errors import InputError, whole_number
from jaxmp.modules.linen import UnderPolicy, init_delayed_scaling
from jaxmp.modules.model import as_model
from jaxmp.modules.products import ObservedProduct, observed_products
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.precision.product import Matrices
from jaxmp.precision.recipe import HISTORIES, Delayed, parse_operand
from jaxmp.runs.run import Run
from jaxmp.training.evaluation import evaluation_key
from jaxmp.training.state import TrainState
from jaxmp.trees import by_path

FORMATS = {"int8": "int8:delayed1", "e4m3": "e4m3:delayed1"}
"""formats of activations whose scale is kept, by short name"""

Key = tuple[str, int]
"""path of a layer, and the number of its product in one call of the model"""


class Calibration(NamedTuple):
    """What was found of the inputs of products, and the model state that holds their scales."""

    tree: PolicyTree
    """the policy that rounds them with their static scales"""
    largest: dict[Key, float]
    """largest magnitude of each input that is rounded, on the batches of calibration, in the compute dtype"""
    rows: int
    """rows of the training split that were looked at"""
    state: TrainState
    """the state whose model state has the scales"""
    unrounded: tuple[str, ...]
    """layers whose inputs stay as they are: a rule of the policy keeps them, they cannot be observed, or an input was 0
    on all rows; "" is the model itself"""


def calibrate(run: Run, state: TrainState, activations: str, *, batches: int) -> Calibration:
    """Finds static scales for the inputs of products: their largest magnitude on rows of the training split.

    The rows are spread evenly over the split and prepared as in evaluation; the model computes under the run's policy,
    with the weights that are evaluated. A scale maps the largest magnitude to the largest number of the format. A
    layer with an input that was 0 on all rows is not rounded.

    Args:
      run: the run, whose policy has no recipe.
      state: the state whose weights are taken.
      activations: int8 or e4m3.
      batches: the number of training batches to look at.

    Raises: InputError if `batches` is below 1, or a layer stands inside nn.scan or nn.vmap, where it has no scale
      of its own.
    """
    batches = whole_number("--calibrate", batches, 1)
    policy, default = run.experiment.policy, run.experiment.policy.default
    inputs = tuple(run.trainer.inputs)
    tree = PolicyTree.parse(f"{policy},fprop={FORMATS[activations]}/high")
    made = init_delayed_scaling(run.experiment.adapted_model, tree, *inputs)
    rows = training_rows(run, batches)
    largest = _totals(run, state, rows, lambda key, product: _magnitude(key, product.activations), np.maximum)
    layers = list(dict.fromkeys(path.rpartition("/")[0] for path in _products(made)))
    # Not observed: products of layers that offer no place to look, such as the head that is tied to an embedding.
    # Of an input that was 0 on all rows, no scale is known.
    seen = {layer: [amax for (path, _), amax in largest.items() if path == layer] for layer in layers}
    without_scale = [layer for layer, magnitudes in seen.items() if not magnitudes or 0 in magnitudes]
    if without_scale:
        rules = "; ".join(f"{layer}={default}" for layer in without_scale)
        tree = policy if "" in without_scale else PolicyTree.parse(f"{rules}; {tree}")  # "": the model is one layer
        made = init_delayed_scaling(run.experiment.adapted_model, tree, *inputs)
    histories = jax.tree.map(lambda leaf: leaf, made.get(HISTORIES, {}))  # dicts of its own
    format = parse_operand(FORMATS[activations])
    assert isinstance(format, Delayed)
    rounded: dict[Key, float] = {}
    for (path, number), amax in largest.items():
        place: Any = histories
        for name in path.split("/") if path else ():
            place = place.get(name, {})
        kept = place.get(f"activations_{number}")
        if kept is None:
            continue  # a rule keeps this layer as it is
        if not np.isfinite(amax):
            raise InputError(f"--calibrate: the input of {path} is not finite on the training split")
        # By the rule of the format, so that the scale is the one that delayed scaling would make.
        place[f"activations_{number}"] = format.scaling.update(format.scaling.init(), jnp.float32(amax))._asdict()
        rounded[path, number] = float(amax)
    with_scale = {path for path, _ in rounded}
    unrounded = tuple(dict.fromkeys([*without_scale, *(path for path, _ in largest if path not in with_scale)]))
    model_state = {**state.model_state, **made, HISTORIES: histories}
    return Calibration(tree, rounded, len(rows), dataclasses.replace(state, model_state=model_state), unrounded)


def training_rows(run: Run, batches: int) -> Source:
    """Rows of the training split for `batches` batches, or all there are, spread evenly."""
    source = run.source("train")
    most = min(batches * run.experiment.data.batch_size, len(source))
    return Rows(source, np.arange(most, dtype=np.int64) * len(source) // most)


class InputStatistics(NamedTuple):
    """What is known of the inputs x of a layer, over all rows and places at which it was called."""

    gram: np.ndarray
    """x.T @ x, float64 (inputs, inputs)"""
    magnitudes: np.ndarray
    """mean magnitude of each input, float64 (inputs,)"""


def input_statistics(
    run: Run, state: TrainState, batches: int, sizes: Mapping[str, int]
) -> tuple[dict[str, InputStatistics], int]:
    """The statistics of the inputs of layers that multiply matrices by their kernel, by path of the layer.

    The model computes under the run's policy, with the weights that are evaluated, on rows of `training_rows`. Left
    out are convolutions, layers that cannot be observed, and layers in `nn.scan`, whose inputs are told apart no more.

    Args:
      run: the run.
      state: the state whose weights are taken.
      batches: the number of training batches to look at.
      sizes: number of weights of the kernel of each layer, by path of the layer.

    Returns:
      The statistics, and the number of rows.

    Raises: InputError if `batches` is below 1, or an input is not finite.
    """
    rows = training_rows(run, whole_number("--calibrate", batches, 1))

    def products_of_inputs(key: Key, product: ObservedProduct) -> jax.Array | None:
        if product.contraction != Matrices(0) or product.weights.size != sizes.get(key[0]):
            return None
        x = product.activations.astype(jnp.float32)
        gram = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
        count = jnp.full((1, x.shape[1]), x.shape[0], jnp.float32)
        return jnp.concatenate([gram, jnp.sum(jnp.abs(x), axis=0, keepdims=True), count])

    def add(total: Any, one: Any) -> Any:
        return np.add(total, one, dtype=np.float64)

    total: dict[str, Any] = {}
    for (path, _), array in _totals(run, state, rows, products_of_inputs, add).items():
        total[path] = add(total[path], array) if path in total else np.asarray(array, np.float64)
    for path, array in total.items():
        if not np.all(np.isfinite(array)):
            raise InputError(f"--calibrate: the input of {path or 'the model'} is not finite on the training split")
    found = {path: InputStatistics(array[:-2], array[-2] / np.maximum(array[-1], 1)) for path, array in total.items()}
    return found, len(rows)


def clipped(run: Run, state: TrainState, source: Source, found: Calibration) -> dict[Key, tuple[int, int]]:
    """How many numbers of the inputs of each product exceed the largest of the calibration, and how many there are.

    Args:
      run: the run.
      state: the state whose weights are taken.
      source: rows after the host transforms.
      found: the calibration.
    """
    limits = {key: jnp.float32(amax) for key, amax in found.largest.items()}

    def above_and_size(key: Key, product: ObservedProduct) -> jax.Array:
        x = product.activations
        above = jnp.sum(jnp.abs(x.astype(jnp.float32)) > limits.get(key, jnp.inf))
        return jnp.stack([above, jnp.full_like(above, x.size)])

    counts = _totals(run, state, source, above_and_size, np.add)
    return {key: (int(counts[key][0]), int(counts[key][1])) for key in found.largest}


def _magnitude(_: Key, x: jax.Array) -> jax.Array:
    """The largest magnitude in an array, float32; NaN if a value is not finite, since XLA:CPU's max ignores NaN."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.all(jnp.isfinite(x)), jnp.max(jnp.abs(x)), jnp.nan)


def _products(made: Mapping[str, Any]) -> list[str]:
    """The paths of the scales of activations: Dense_0/activations_0."""
    names = [path.rpartition("/")[0] for path in by_path(made.get(HISTORIES, {})) if path.endswith("/scale")]
    return [name for name in names if name.rpartition("/")[2].startswith("activations_")]


def _totals(
    run: Run,
    state: TrainState,
    source: Source,
    number: Callable[[Key, ObservedProduct], jax.Array | None],
    join: Callable[[Any, Any], Any],
) -> dict[Key, Any]:
    """Numbers of the input of each product, joined over the rows of a source; rows that fill up a batch are left out.

    Args:
      run: the run.
      state: the state whose weights are taken.
      source: rows after the host transforms.
      number: makes them of the product; they have to depend on the values of the input. None: it is left out.
      join: joins those of two batches.
    """
    experiment = run.experiment
    model = as_model(experiment.adapted_model).under(UnderPolicy(experiment.policy))
    prepared = experiment.data.prepare(train=False)

    total: dict[Key, Any] = {}

    def add(product: Key, value: Any) -> None:
        one = np.array(value)
        total[product] = join(total[product], one) if product in total else one

    @jax.jit
    def measure(params: Any, model_state: Any, batch: dict[str, Any], key: jax.Array) -> None:
        calls: collections.Counter[str] = collections.Counter()

        def observe(path: str, product: ObservedProduct) -> jax.Array:
            call = (path, calls[path])
            calls[path] += 1
            numbers = number(call, product)
            if numbers is None:
                return product.result
            # A callback, since a value from within nn.remat or nn.scan cannot be returned here.
            jax.debug.callback(functools.partial(add, call), numbers)
            return product.result

        batch = prepared(batch, None)
        with observed_products(observe):
            model.apply(params, model_state, *(batch[name] for name in experiment.task.inputs), key=key)

    for batch in evaluation_batches(source, experiment.data.eval_batch_size):
        there = int(np.sum(batch["weight"]))
        rows = {name: jnp.asarray(column[:there]) for name, column in batch.items()}
        measure(state.averaged_params, state.model_state, rows, evaluation_key(state))
        jax.effects_barrier()
    return total
