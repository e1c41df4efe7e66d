"""The steps in plain JAX, written for one model each: nothing but what the step needs. The baseline of all ratios.

Like jaxmp's, they keep float32 master weights, cast them where they are used, and sum a bias's gradient in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.training.metrics import Mean

from .cases import DTYPES, FIRST_SCALE, Case, loss_and_accuracy, optimizer

Forward = Callable[[Any, jax.Array, Any], jax.Array]
"""`(params, x, dtype) -> logits`"""


def dense(p: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """A Dense layer."""
    y = x.astype(dtype) @ p["kernel"].astype(dtype)
    return y + jnp.broadcast_to(p["bias"], y.shape).astype(dtype)


def mlp(params: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """The forward pass of `MLP`."""
    last = len(params) - 1
    for i in range(last):
        x = jax.nn.relu(dense(params[f"Dense_{i}"], x, dtype))
    return dense(params[f"Dense_{last}"], x, dtype)


def cnn(params: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """The forward pass of `CNN`."""
    for i in range(len(params) - 1):
        p = params[f"Conv_{i}"]
        kernel, numbers = p["kernel"].astype(dtype), ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x.astype(dtype), kernel, (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + jnp.broadcast_to(p["bias"], x.shape).astype(dtype))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return dense(params["Dense_0"], x.reshape(len(x), -1), dtype)


def lstm(params: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """The forward pass of `SequenceClassifier`, its gates one product: all inputs at once, the state step by step."""
    steps = jnp.swapaxes(x.astype(dtype) @ params["inputs"].astype(dtype), 0, 1)
    rows, width = x.shape[0], params["state"].shape[0]

    def cell(carry: Any, gates: jax.Array) -> Any:
        c, h = carry
        gates = gates + h @ params["state"].astype(dtype)
        gates = gates + jnp.broadcast_to(params["bias"], gates.shape).astype(dtype)
        i, f, g, o = jnp.split(gates, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

    zeros = jnp.zeros((rows, width), dtype)
    (_, h), _ = jax.lax.scan(cell, (zeros, zeros), steps)
    return dense(params["head"], h, dtype)


def lstm_params(params: Any) -> Any:
    """The parameters of `SequenceClassifier` with the gates side by side."""
    cell = params["forward_0"]
    return {
        "inputs": jnp.concatenate([cell[f"i{gate}"]["kernel"] for gate in "ifgo"], -1),
        "state": jnp.concatenate([cell[f"h{gate}"]["kernel"] for gate in "ifgo"], -1),
        "bias": jnp.concatenate([cell[f"h{gate}"]["bias"] for gate in "ifgo"]),
        "head": params["head"],
    }


def norm(p: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """A LayerNorm, its statistics in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean
    return ((x - mean) * (jax.lax.rsqrt(variance + 1e-5) * p["scale"]) + p["bias"]).astype(dtype)


def transformer(params: Any, tokens: jax.Array, dtype: Any, *, heads: int) -> jax.Array:
    """The forward pass of `GPT2`."""
    rows, length = tokens.shape
    embedding = params["tokens"]["embedding"]
    x = embedding[tokens].astype(dtype) + params["positions"]["embedding"][:length].astype(dtype)
    seen = jnp.tril(jnp.ones((length, length), bool))
    for i in range(sum(name.startswith("blocks_") for name in params)):
        p = params[f"blocks_{i}"]
        y = norm(p["attention_norm"], x, dtype)
        q, k, v = (
            dense(p["attention"][name], y, dtype).reshape(rows, length, heads, -1) for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), -1).astype(dtype)
        y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        x = x + dense(p["attention"]["out"], y, dtype)
        y = dense(p["up"], norm(p["mlp_norm"], x, dtype), dtype)
        x = x + dense(p["down"], jax.nn.gelu(y), dtype)
    return norm(params["norm"], x, dtype) @ embedding.T.astype(dtype)


def forward_of(case: Case) -> tuple[Forward, Any]:
    """Returns the forward pass of a model and its first parameters, the same numbers as jaxmp's."""
    params, name = case.params(), type(case.model).__name__
    if name == "SequenceClassifier":
        return lstm, lstm_params(params)
    if name == "GPT2":
        heads = case.model.heads  # type: ignore[attr-defined]
        return (lambda params, x, dtype: transformer(params, x, dtype, heads=heads)), params
    return {"MLP": mlp, "CNN": cnn}[name], params


def make(case: Case, precision: str) -> tuple[Any, Any]:
    """Returns `(step, state)`; with loss scaling and skipping in float16 alone."""
    forward, params = forward_of(case)
    dtype, tx = DTYPES[precision], optimizer()

    def loss_fn(params: Any, batch: Any) -> Any:
        loss, accuracy = loss_and_accuracy(forward(params, batch["x"], dtype), batch["label"])
        return loss, {"loss": loss, "accuracy": accuracy}

    def plain(state: Any, batch: Any) -> Any:
        params, opt_state = state
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    if precision == "float16":
        return scaled(scaled_gradients(loss_fn), tx), first_scaled(params, tx)
    return plain, (params, tx.init(params))


def scaled_gradients(loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Returns `(params, batch, scale) -> (gradients of the loss times the scale, metrics)`."""

    def gradients(params: Any, batch: Any, scale: Any) -> Any:
        def scaled_loss(params: Any) -> Any:
            loss, metrics = loss_fn(params, batch)
            return loss * scale, metrics

        return jax.grad(scaled_loss, has_aux=True)(params)

    return gradients


def scaled(gradients: Callable[[Any, Any, Any], Any], tx: optax.GradientTransformation) -> Any:
    """Returns the step with dynamic loss scaling, of the gradients that `scaled_gradients` describes."""

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, scale, good_steps = state
        grads, metrics = gradients(params, batch, scale)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        finite &= jnp.isfinite(metrics["loss"])
        updates, new_opt_state = tx.update(jax.tree.map(lambda g: g / scale, grads), opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (params, opt_state))
        grow = finite & (good_steps == 1999)
        good_steps = jnp.where(finite & ~grow, good_steps + 1, 0)
        grown = jnp.where(grow, jnp.minimum(scale * 2, 2.0**24), scale)
        scale = jnp.where(finite, grown, jnp.maximum(scale * 0.5, 2.0**-14))
        return (params, opt_state, scale, good_steps), metrics

    return step


def first_scaled(params: Any, tx: optax.GradientTransformation) -> Any:
    """Returns the state that `scaled` begins with."""
    return params, tx.init(params), jnp.float32(FIRST_SCALE), jnp.int32(0)


def with_state_of_jaxmp(case: Case, step: Any, state: Any) -> tuple[Any, Any]:
    """Returns `(step, state)` that also take and return what jaxmp's do: number and key, sums and weights of metrics.

    The weights are those of the batch's rows; the key is only handed on, as this model draws nothing.
    """

    def stated(both: Any, batch: Any) -> Any:
        state, number, key = both
        state, means = step(state, batch)
        weight = jnp.float32(case.rows)
        return (state, number + 1, key), {name: Mean(mean * weight, weight) for name, mean in means.items()}

    return stated, (state, jnp.int32(0), jax.random.key(0))
