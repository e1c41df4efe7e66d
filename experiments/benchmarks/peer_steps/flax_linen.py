"""The steps as in Flax's examples: a dtype in every layer, TrainState, and DynamicScale in float16."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

from .cases import DTYPES, FIRST_SCALE, Case, loss_and_accuracy, optimizer

PACKAGES = ("flax",)


class MLP(nn.Module):
    """A multi-layer perceptron."""

    features: tuple[int, ...]
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (rows, features) to logits."""
        for width in self.features:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x)


class CNN(nn.Module):
    """Blocks of convolution and pooling."""

    channels: tuple[int, ...]
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to logits."""
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3), dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x.reshape(len(x), -1))


class LSTM(nn.Module):
    """A scanned LSTM, and a layer from its last step."""

    width: int
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps sequences (rows, time, features) to logits."""
        cell = nn.OptimizedLSTMCell(self.width, dtype=self.dtype, name="cell")
        carry = (jnp.zeros((len(x), self.width), self.dtype),) * 2
        x = nn.RNN(cell)(x.astype(self.dtype), initial_carry=carry)
        return nn.Dense(self.classes, dtype=self.dtype)(x[:, -1])


class Transformer(nn.Module):
    """GPT-2 with tied embeddings."""

    vocabulary: int
    layers: int
    heads: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (rows, length) to logits."""
        length, small = tokens.shape[1], nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, embedding_init=small)
        embed_position = nn.Embed(length, self.width, dtype=self.dtype, embedding_init=small)
        x = embed(tokens) + embed_position(jnp.arange(length))
        mask = nn.make_causal_mask(tokens, dtype=bool)
        for _ in range(self.layers):
            y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, mask=mask)
            y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x)
            y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
            x = x + nn.Dense(self.width, dtype=self.dtype)(y)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x))


def model_of(case: Case, dtype: Any) -> nn.Module:
    """Returns the Flax model of a case."""
    of: Any = case.model
    match type(of).__name__:
        case "MLP":
            return MLP(of.features, case.classes, dtype)
        case "CNN":
            return CNN(of.channels, case.classes, dtype)
        case "SequenceClassifier":
            return LSTM(of.width, case.classes, dtype)
    return Transformer(of.vocabulary, of.layers, of.heads, of.width, dtype)


class ScaledState(TrainState):
    """The state of Flax's ImageNet example: with a DynamicScale."""

    dynamic_scale: Any = None


def make(case: Case, precision: str) -> tuple[Any, Any]:
    """Returns `(step, state)`."""
    model = model_of(case, DTYPES[precision])
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(case.columns()["x"]))["params"]
    # A strongly typed scale: with the default of Flax, the step compiles twice.
    scale = DynamicScale(scale=jnp.float32(FIRST_SCALE)) if precision == "float16" else None
    first = ScaledState.create(apply_fn=model.apply, params=params, tx=optimizer(), dynamic_scale=scale)

    def step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            loss, accuracy = loss_and_accuracy(state.apply_fn({"params": params}, batch["x"]), batch["label"])
            return loss, {"loss": loss, "accuracy": accuracy}

        if state.dynamic_scale is None:
            grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads), metrics
        scale, finite, (_, metrics), grads = state.dynamic_scale.value_and_grad(loss_fn, has_aux=True)(state.params)
        new = state.apply_gradients(grads=grads)
        select = lambda n, o: jnp.where(finite, n, o)  # noqa: E731
        params = jax.tree.map(select, new.params, state.params)
        opt_state = jax.tree.map(select, new.opt_state, state.opt_state)
        return new.replace(params=params, opt_state=opt_state, dynamic_scale=scale), metrics

    return step, first.replace(step=jnp.int32(0))
