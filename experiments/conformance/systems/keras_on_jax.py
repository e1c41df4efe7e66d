"""Adapters of Keras 3 on JAX: LossScaleOptimizer, and the train step that `fit` compiles under mixed_float16."""

from __future__ import annotations

import functools
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
from subject import Subject, batch

from jaxmp.testing import ScalerAdapter, StepAdapter, scaler_laws, step_laws


def own(optimizer: keras.optimizers.LossScaleOptimizer) -> int:
    """Returns how many variables belong to LossScaleOptimizer itself; they come before those of the inner optimizer."""
    return len(optimizer.variables) - len(optimizer.inner_optimizer.variables)


def scale_among(optimizer: keras.optimizers.LossScaleOptimizer) -> int:
    """Returns the index of the loss scale among the variables."""
    return next(i for i, variable in enumerate(optimizer.variables) if variable is optimizer.dynamic_scale)


def optimizer_for(shapes: tuple[tuple[int, ...], ...]) -> keras.optimizers.LossScaleOptimizer:
    """Creates a LossScaleOptimizer for float32 variables of these shapes; updates are minus the unscaled gradients."""
    with jax.ensure_compile_time_eval():
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0))
        optimizer.build([keras.Variable(jnp.zeros(shape), dtype="float32") for shape in shapes])
    return optimizer


def scaler() -> ScalerAdapter:
    """Returns an adapter of `scale_loss` and `stateless_apply`, as the JAX trainer calls them."""
    scalar = optimizer_for(((),))

    def values(optimizer):
        return [variable.value for variable in optimizer.variables]

    first, count = values(scalar), own(scalar)

    def scale(state, loss):
        with keras.StatelessScope(state_mapping=list(zip(scalar.variables, state, strict=False))):
            return scalar.scale_loss(loss)

    @functools.cache
    def unscale_for(shapes):
        optimizer = optimizer_for(shapes)
        rest, zeros = values(optimizer)[count:], [jnp.zeros(shape, jnp.float32) for shape in shapes]
        return jax.jit(lambda state, grads: optimizer.stateless_apply([*state, *rest], grads, zeros)[0])

    def unscale(state, grads):
        leaves, structure = jax.tree.flatten(grads)
        return structure.unflatten([-x for x in unscale_for(tuple(x.shape for x in leaves))(state, leaves)])

    @jax.jit  # as in `fit`
    def adjust(state, finite):
        grad = jnp.where(finite, jnp.float32(1), jnp.inf)
        return scalar.stateless_apply([*state, *first[count:]], [grad], [jnp.float32(0)])[1][:count]

    return ScalerAdapter(lambda: [jnp.array(x) for x in first[:count]], scale, unscale, adjust, growth_interval=2000)


def step() -> StepAdapter:
    """Returns an adapter of `train_step` of a model compiled under mixed_float16; Keras wraps its optimizer."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.BatchNormalization(dtype="mixed_float16"), keras.layers.Dense(3, dtype="mixed_float16")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="model")
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(keras.optimizers.LossScaleOptimizer(inner, 2.0**10, dynamic_growth_steps=4), "mse")
    rows = batch()
    model.optimizer.build(model.trainable_variables)
    model.train_on_batch(rows["x"], rows["y"])  # builds the metrics

    names = "trainable", "non_trainable", "optimizer", "metrics"
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    first = [[jnp.array(variable.value) for variable in group] for group in variables]

    count, scale = own(model.optimizer), scale_among(model.optimizer)

    def init():
        return dict(zip(names, jax.tree.map(jnp.copy, first), strict=True))

    @jax.jit
    def train_step(state, batch):
        _, new = model.train_step(tuple(state[name] for name in names), (batch["x"], batch["y"]))
        return dict(zip(names, map(list, new), strict=True))

    def kept(state):
        inner = state["optimizer"][count:]
        return {"trainable": state["trainable"], "non_trainable": state["non_trainable"], "optimizer": inner}

    return StepAdapter(init, train_step, rows, kept, loss_scale=lambda state: state["optimizer"][scale])


def subjects() -> list[Subject]:
    """Returns the optimizer and the step."""
    packages = ("keras",)
    lists = "Keras takes lists of float gradients, not trees"
    real = "the optimizer's variables are float32 here: Keras has no complex ones"
    not_asked = {
        "leaves_without_gradient_stay": lists,
        "fp8_leaves_stay": lists,
        "scalars_and_complex_are_unscaled": real,
    }
    return [
        Subject("Keras, LossScaleOptimizer", packages, scaler_laws(scaler()), not_asked),
        Subject("Keras, train_step in mixed_float16", packages, step_laws(step())),
    ]
