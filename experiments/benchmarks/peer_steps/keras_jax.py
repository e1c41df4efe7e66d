"""The steps that Keras 3 makes on JAX: `fit` of a compiled model, under a dtype policy of its own."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

from typing import Any

import keras
from keras import layers, ops

from .cases import FIRST_SCALE, LEARNING_RATE, Case

PACKAGES = ("keras",)
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Tied(layers.Layer):
    """Logits by the transpose of an embedding."""

    def __init__(self, embedding: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.embedding = embedding

    def call(self, x: Any) -> Any:
        """Maps (rows, length, width) to logits."""
        return self.embedding(x, reverse=True)


class Positions(layers.Layer):
    """Learned positions, added to the embeddings of tokens."""

    def build(self, shape: Any) -> None:
        """Makes the weight."""
        self.weight = self.add_weight(shape=shape[1:], initializer="uniform")

    def call(self, x: Any) -> Any:
        """Adds them to x (rows, length, width)."""
        return x + ops.cast(self.weight, x.dtype)


def model_of(case: Case) -> Any:
    """Returns the Keras model of a case; its layers take the global dtype policy."""
    of: Any = case.model
    x = inputs = keras.Input(case.row, dtype="int32" if case.is_tokens else "float32")
    match type(of).__name__:
        case "MLP":
            for width in of.features:
                x = layers.Dense(width, "relu")(x)
            x = layers.Dense(case.classes)(x)
        case "CNN":
            for channels in of.channels:
                x = layers.MaxPooling2D()(layers.Conv2D(channels, 3, padding="same", activation="relu")(x))
            x = layers.Dense(case.classes)(layers.Flatten()(x))
        case "SequenceClassifier":
            x = layers.Dense(case.classes)(layers.LSTM(of.width)(x))
        case _:
            embedding = layers.ReversibleEmbedding(of.vocabulary, of.width)
            x = Positions()(embedding(x))
            for _ in range(of.layers):
                y = layers.LayerNormalization(epsilon=1e-5)(x)
                x = x + layers.MultiHeadAttention(of.heads, of.width // of.heads)(y, y, use_causal_mask=True)
                y = layers.Dense(4 * of.width, "gelu")(layers.LayerNormalization(epsilon=1e-5)(x))
                x = x + layers.Dense(of.width)(y)
            x = Tied(embedding)(layers.LayerNormalization(epsilon=1e-5)(x))
    return keras.Model(inputs, layers.Activation("linear", dtype="float32")(x))


def compiled(case: Case, precision: str, *, steps_per_execution: int = 1) -> Any:
    """Returns the model, compiled with optimizer, loss and accuracy."""
    keras.config.set_dtype_policy(POLICIES[precision])
    try:
        keras.utils.set_random_seed(0)
        model = model_of(case)
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras.optimizers.SGD(LEARNING_RATE)
    if precision == "float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, FIRST_SCALE)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=steps_per_execution, jit_compile=True)
    return model


def parameters(case: Case) -> int:
    """Returns the number of parameters."""
    return compiled(case, "float32").count_params()


def make_fit(case: Case, precision: str, *, steps_per_execution: int) -> Any:
    """Returns `steps(count)`: an epoch of so many steps by `fit`, on arrays in memory."""
    model = compiled(case, precision, steps_per_execution=steps_per_execution)
    columns: dict[int, Any] = {}

    def steps(count: int) -> None:
        if count not in columns:
            columns[count] = case.columns(count)
        rows = columns[count]
        model.fit(rows["x"], rows["label"], batch_size=case.rows, epochs=1, verbose=0)

    return steps
