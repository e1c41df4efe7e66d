"""`generate`: tokens drawn from a decoder, one after the other, with its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.errors import InputError


def generate(
    model: Any,
    variables: Any,
    prompt: jax.Array,
    count: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    apply: Callable[..., Any] | None = None,
    vocabulary: int | None = None,
) -> jax.Array:
    """Draws the tokens that follow a prompt from a decoder, `GPT2` or `Llama`.

    The prompt is read at once, then each token is drawn from the logits of the one before. Draws are made in float32
    whatever the policy (trap T19). To be jitted with `count` and `temperature` fixed.

    Args:
      model: the decoder; it says by its `context` how many positions there are.
      variables: its variables, without a cache.
      prompt: tokens, int (batch, length), at least one each.
      count: number of tokens to draw.
      key: key of the draws.
      temperature: what the logits are divided by; 0: the most probable token is taken.
      apply: `with_policy(model.apply, policy)`, for a policy; by default `model.apply`.
      vocabulary: number of tokens that there are, where the model has logits of more; None: as many as logits.

    Returns:
      The tokens drawn, int32 (batch, count).

    Raises:
      InputError: the prompt is empty or no matrix, `count` or `temperature` is out of range, or there are not enough
        positions.
    """
    if prompt.ndim != 2:
        raise InputError(f"generate: a prompt of {list(prompt.shape)}; expected tokens (batch, length)")
    length = prompt.shape[1]
    if not length or count < 1 or length + count > model.context:
        raise InputError(
            f"generate: {count} tokens after a prompt of {length}; expected at least one of each, and together at most "
            f"context={model.context}"
        )
    if not temperature >= 0:
        raise InputError(f"generate: temperature={temperature}: expected 0 or more")
    run = model.apply if apply is None else apply

    def read(state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, state = run({**variables, **state}, tokens, decode=True, mutable=["cache"])
        logits = logits[:, -1].astype(jnp.float32)
        return logits if vocabulary is None else logits.at[:, vocabulary:].set(-jnp.inf), state

    def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def step(carry: Any, key: jax.Array) -> Any:
        token, state = carry
        logits, state = read(state, token[:, None])
        token = draw(key, logits)
        return (token, state), token

    first, *keys = jax.random.split(key, count)
    logits, state = read({}, prompt)
    token = draw(first, logits)
    if not keys:
        return token[:, None]
    _, rest = jax.lax.scan(step, (token, state), jnp.stack(keys))
    return jnp.concatenate([token[:, None], rest.T], axis=1)
