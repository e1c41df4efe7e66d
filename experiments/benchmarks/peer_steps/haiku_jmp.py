"""The steps as in Haiku's ImageNet example: policies of jmp set for modules, and jmp's DynamicLossScale in float16."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import optax

from .cases import DTYPES, FIRST_SCALE, Case, loss_and_accuracy, optimizer

PACKAGES = ("dm-haiku", "jmp")


def mlp(of: Any, classes: int, x: jax.Array) -> jax.Array:
    """A multi-layer perceptron."""
    for width in of.features:
        x = jax.nn.relu(hk.Linear(width)(x))
    return hk.Linear(classes)(x)


def cnn(of: Any, classes: int, x: jax.Array) -> jax.Array:
    """Blocks of convolution and pooling."""
    for channels in of.channels:
        x = jax.nn.relu(hk.Conv2D(channels, 3)(x))
        x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
    return hk.Linear(classes)(x.reshape(len(x), -1))


def lstm(of: Any, classes: int, x: jax.Array) -> jax.Array:
    """A scanned LSTM, and a layer from its last step."""
    core = hk.LSTM(of.width)
    state = jax.tree.map(lambda s: s.astype(x.dtype), core.initial_state(len(x)))
    outputs, _ = hk.dynamic_unroll(core, x, state, time_major=False)
    return hk.Linear(classes)(outputs[:, -1])


def transformer(of: Any, classes: int, tokens: jax.Array, dtype: Any) -> jax.Array:
    """GPT-2 with tied embeddings."""
    length, head, small = tokens.shape[1], of.width // of.heads, hk.initializers.RandomNormal(0.02)
    embed, embed_position = hk.Embed(classes, of.width, w_init=small), hk.Embed(length, of.width, w_init=small)
    x = embed(tokens).astype(dtype) + embed_position(jnp.arange(length)).astype(dtype)
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    norm = lambda x: hk.LayerNorm(-1, True, True)(x)  # noqa: E731
    init = hk.initializers.VarianceScaling()
    for _ in range(of.layers):
        y = norm(x)
        x = x + hk.MultiHeadAttention(of.heads, head, w_init=init)(y, y, y, mask=mask).astype(dtype)
        x = x + hk.Linear(of.width)(jax.nn.gelu(hk.Linear(4 * of.width)(norm(x))))
    return norm(x) @ embed.embeddings.T.astype(dtype)


def make(case: Case, precision: str) -> tuple[Any, Any]:
    """Returns `(step, state)`. The policy is set while the step is traced alone: Haiku keeps it for the process."""
    of, dtype, tx = case.model, DTYPES[precision], optimizer()
    policy = jmp.Policy(jnp.float32, dtype, dtype)
    body = {"MLP": mlp, "CNN": cnn, "SequenceClassifier": lstm}.get(type(of).__name__)
    layers = dict.fromkeys((hk.Linear, hk.Conv2D, hk.LSTM, hk.MultiHeadAttention), policy)
    # As in the example for its batch norm; in float16 the gradient by a variance of 1e-3 is above the largest number.
    layers[hk.LayerNorm] = jmp.Policy(jnp.float32, jnp.float32, dtype)

    def under_policy(x: jax.Array) -> jax.Array:
        for layer, own in layers.items():
            hk.mixed_precision.set_policy(layer, own)
        try:
            if body is None:
                return transformer(of, case.classes, x, dtype)
            return body(of, case.classes, x.astype(dtype))
        finally:
            for layer in layers:
                hk.mixed_precision.clear_policy(layer)

    forward = hk.without_apply_rng(hk.transform(under_policy))
    params = jax.jit(forward.init)(jax.random.key(0), jnp.asarray(case.columns()["x"]))
    half = precision == "float16"
    # A strongly typed scale, so that gradients are unscaled in float32.
    scale = jmp.DynamicLossScale(jnp.float32(FIRST_SCALE)) if half else jmp.NoOpLossScale()

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, scale = state

        def loss_fn(params: Any) -> Any:
            loss, accuracy = loss_and_accuracy(forward.apply(params, batch["x"]), batch["label"])
            return scale.scale(loss), {"loss": loss, "accuracy": accuracy}

        grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
        grads = scale.unscale(grads)
        updates, new_opt_state = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        if half:
            finite = jmp.all_finite(grads)
            scale = scale.adjust(finite)
            new = jmp.select_tree(finite, new, (params, opt_state))
        return (*new, scale), metrics

    return step, (params, tx.init(params), scale)
