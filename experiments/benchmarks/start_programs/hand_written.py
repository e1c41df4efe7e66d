"""What `jaxmp train digits_mlp` does, written by hand in JAX, Flax and optax: `python hand_written.py STEPS FOLDER`.

Data, training in float16 with dynamic loss scaling, an evaluation and a line each 100 steps, and a checkpoint at each.
With one step it ends after that step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class MLP(nn.Module):
    """The model of digits_mlp, in float16."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images to logits."""
        x = nn.relu(nn.Dense(512, dtype=jnp.float16)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10, dtype=jnp.float16)(x).astype(jnp.float32)


def load() -> tuple[Any, Any, Any]:
    """Returns the images, float32, and labels of the train, validation and test split."""
    images, labels = load_digits(return_X_y=True)
    images = ((images / 255 - 0.0192) / 0.0236).astype(np.float32)
    x, rest, y, rest_labels = train_test_split(images, labels.astype(np.int32), train_size=1258, random_state=0)
    return (x, y), (rest[:270], rest_labels[:270]), (rest[270:], rest_labels[270:])


def programs() -> tuple[Any, Any, Any]:
    """Returns what makes the first state, many train steps, and an evaluation."""
    model, key, rows = MLP(), jax.random.key(0), 64
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, 1000))

    def first_state() -> Any:
        params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 64)), False)["params"])(key)
        return params, tx.init(params), jnp.float32(2.0**15), jnp.int32(0)

    def loss_fn(params: Any, x: Any, y: Any, key: Any) -> Any:
        logits = model.apply({"params": params}, x, True, rngs={"dropout": key})
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, jnp.mean(logits.argmax(-1) == y)

    def step(i: Any, carry: Any) -> Any:
        params, opt_state, scale, good, x, y, order, first, sums = carry
        batch = jax.lax.dynamic_slice_in_dim(order, ((first + i) * rows) % (len(order) - rows), rows)

        def scaled(params: Any) -> Any:
            loss, accuracy = loss_fn(params, x[batch], y[batch], jax.random.fold_in(key, first + i))
            return loss * scale, (loss, accuracy)

        grads, measured = jax.grad(scaled, has_aux=True)(params)
        grads = jax.tree.map(lambda g: g / scale, grads)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        updates, new_opt_state = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (params, opt_state))
        grow = finite & (good == 1999)
        scale = jnp.where(finite, jnp.where(grow, scale * 2, scale), scale / 2)
        good = jnp.where(finite & ~grow, good + 1, 0)
        return params, opt_state, scale, good, x, y, order, first, jax.tree.map(jnp.add, sums, measured)

    @jax.jit
    def many(params: Any, opt_state: Any, scale: Any, good: Any, x: Any, y: Any, order: Any, first: Any, n: Any) -> Any:
        zeros = jnp.float32(0), jnp.float32(0)
        carry = params, opt_state, scale, good, x, y, order, first, zeros
        carry = jax.lax.fori_loop(0, n, step, carry)
        return (*carry[:4], carry[-1])

    @jax.jit
    def evaluate(params: Any, x: Any, y: Any) -> Any:
        logits = model.apply({"params": params}, x, False)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == y)}

    return first_state, many, evaluate


def main(count: int, folder: Path) -> None:
    """Trains for `count` steps."""
    train, validation, test = load()
    first_state, many, evaluate = programs()
    rng, at_once = np.random.default_rng(0), min(100, count)
    state = first_state()
    x, y = map(jnp.asarray, train)
    for first in range(0, count, at_once):
        order = jnp.asarray(rng.permutation(len(x)).astype(np.int32))
        *state, sums = many(*state, x, y, order, np.int32(first), np.int32(at_once))
        jax.block_until_ready(sums)
        if count == 1:
            return
        measured = {name: float(value) for name, value in evaluate(state[0], *validation).items()}
        print(json.dumps({"step": first + at_once, "loss": float(sums[0]) / at_once, **measured}), flush=True)
        checkpointer().save(folder / str(first + at_once), state)
    print(json.dumps({name: float(value) for name, value in evaluate(state[0], *test).items()}))
    checkpointer().wait_until_finished()


_checkpointer: list[Any] = []


def checkpointer() -> Any:
    """Orbax's, in the background, as jaxmp has it."""
    if not _checkpointer:
        import orbax.checkpoint as ocp

        _checkpointer.append(ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()))
    return _checkpointer[0]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
