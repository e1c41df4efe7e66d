"""The steps as in the README of mpx: Equinox modules, `filter_value_and_grad`, and `optimizer_update` in float16."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import mpx

from .cases import FIRST_SCALE, Case, loss_and_accuracy, optimizer

PACKAGES = ("mixed-precision-for-jax", "equinox")
PRECISIONS = ("float16",)
"""mpx ignores its setting "bfloat16" (defect B8), and in float32 it has nothing to do"""


class MLP(eqx.Module):
    """A multi-layer perceptron."""

    layers: list[eqx.nn.Linear]

    def __init__(self, sizes: tuple[int, ...], key: jax.Array):
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = [eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes, sizes[1:], keys, strict=False)]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (features,) to logits."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class CNN(eqx.Module):
    """Blocks of convolution and pooling, channels first, as in Equinox."""

    convolutions: list[eqx.nn.Conv2d]
    head: eqx.nn.Linear

    def __init__(self, channels: tuple[int, ...], row: tuple[int, ...], classes: int, key: jax.Array):
        keys, sizes = jax.random.split(key, len(channels) + 1), (row[-1], *channels)
        self.convolutions = [
            eqx.nn.Conv2d(a, b, 3, padding=1, key=k) for a, b, k in zip(sizes, channels, keys, strict=False)
        ]
        side = row[0] // 2 ** len(channels)
        self.head = eqx.nn.Linear(side * side * channels[-1], classes, key=keys[-1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps an image (height, width, channels) to logits."""
        x = jnp.moveaxis(x, -1, 0)
        for convolution in self.convolutions:
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(convolution(x)))
        return self.head(x.ravel())


class LSTM(eqx.Module):
    """A scanned LSTM, and a layer from its last step."""

    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, inputs: int, width: int, classes: int, key: jax.Array):
        keys = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(inputs, width, key=keys[0])
        self.head = eqx.nn.Linear(width, classes, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps a sequence (time, features) to logits."""
        zeros = jnp.zeros(self.cell.hidden_size, x.dtype)
        (h, _), _ = jax.lax.scan(lambda carry, step: (self.cell(step, carry), None), (zeros, zeros), x)
        return self.head(h)


class Transformer(eqx.Module):
    """GPT-2 with tied embeddings."""

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[dict[str, Any]]
    norm: eqx.nn.LayerNorm

    def __init__(self, of: Any, length: int, key: jax.Array):
        width, keys = of.width, iter(jax.random.split(key, 3 * of.layers + 2))
        self.tokens, self.positions = (
            eqx.nn.Embedding(weight=0.02 * jax.random.normal(next(keys), (count, width)))
            for count in (of.vocabulary, length)
        )
        bias = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)
        self.blocks = [
            {
                "attention_norm": eqx.nn.LayerNorm(width),
                "attention": eqx.nn.MultiheadAttention(of.heads, width, key=next(keys), **bias),
                "mlp_norm": eqx.nn.LayerNorm(width),
                "up": eqx.nn.Linear(width, 4 * width, key=next(keys)),
                "down": eqx.nn.Linear(4 * width, width, key=next(keys)),
            }
            for _ in range(of.layers)
        ]
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (length,) to logits."""
        length = len(tokens)
        x = self.tokens.weight[tokens] + self.positions.weight[:length]
        mask = jnp.tril(jnp.ones((length, length), bool))
        for block in self.blocks:
            y = jax.vmap(block["attention_norm"])(x)
            x = x + block["attention"](y, y, y, mask)
            y = jax.nn.gelu(jax.vmap(block["up"])(jax.vmap(block["mlp_norm"])(x)))
            x = x + jax.vmap(block["down"])(y)
        return jax.vmap(self.norm)(x) @ self.tokens.weight.T


def model_of(case: Case) -> Any:
    """Returns the Equinox model of a case."""
    of, key = case.model, jax.random.key(0)
    match type(of).__name__:
        case "MLP":
            return MLP((*case.row, *of.features, case.classes), key)  # type: ignore[attr-defined]
        case "CNN":
            return CNN(of.channels, case.row, case.classes, key)  # type: ignore[attr-defined]
        case "SequenceClassifier":
            return LSTM(case.row[-1], of.width, case.classes, key)  # type: ignore[attr-defined]
    return Transformer(of, case.row[0], key)


def make(case: Case, precision: str) -> tuple[Any, Any]:
    """Returns `(step, state)`."""
    tx = optimizer()
    whole = (model_of(case), mpx.DynamicLossScaling(jnp.float32(FIRST_SCALE), jnp.float32(1), period=2000))
    arrays, static = eqx.partition(whole, eqx.is_array)

    def loss_fn(model: Any, batch: Any) -> Any:
        logits = jax.vmap(model)(batch["x"])
        loss, accuracy = mpx.force_full_precision(loss_and_accuracy, jnp.float32)(logits, batch["label"])
        return loss, {"loss": loss, "accuracy": accuracy}

    def step(state: Any, batch: Any) -> Any:
        arrays, opt_state = state
        model, scaling = eqx.combine(arrays, static)
        (_, metrics), scaling, finite, grads = mpx.filter_value_and_grad(loss_fn, scaling, has_aux=True)(model, batch)
        model, opt_state = mpx.optimizer_update(model, tx, opt_state, grads, finite)
        return (eqx.filter((model, scaling), eqx.is_array), opt_state), metrics

    return step, (arrays, tx.init(arrays[0]))
