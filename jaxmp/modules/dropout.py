"""`DropoutByExample`: random draws of a Linen module that do not depend on how the examples are spread.

A module draws from one key for all rows of its input. On several devices that would be either the same mask for each
device's rows, or masks that depend on the number of devices. So the modules that drop out, and
`jaxmp.models.noise.Noise`, draw for each example, from their key and the example's index in the whole batch. What a
module of the user's draws by itself has no such rule: it gets a key of its own on each replica and in each microbatch.
In evaluation, where `Noise` draws too, the index is that in the whole split, and each batch gets a key of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmp.models.noise import Noise
from jaxmp.modules.interventions import LIFTED, Context, Intervention, Order, Run, attributes


class DropoutByExample(Intervention):
    """Draws dropout masks for each example; made anew for each call of the model.

    nn.Dropout, and attention with `broadcast_dropout=False`, draw for the example at index p of the whole batch from
    `fold_in(key, p)`, wherever the examples lie along axis 0 of what is dropped, alone or merged with later axes. Masks
    that all examples share (attention's by default, `broadcast_dims=(0, ...)`) are the same everywhere. `Noise` draws
    for the same index if it is called with the number of rows of the batch. Every other draw depends on how the batch
    is spread.

    Args:
      global_index: indices of the rows in the whole batch, int32 (rows,); None: the batch is the whole.
      rows: number of rows.
    """

    order: ClassVar[Order] = Order.RANDOM_DRAWS

    def __init__(self, global_index: jax.Array | None, rows: int):
        self.global_index, self.rows = global_index, rows

    def trace_key(self) -> Hashable:
        """Another one for each call that has indices: a trace that has seen them as tracers must not serve another."""
        return self.rows if self.global_index is None else object()

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model, with the draws of its modules by the example."""
        return run(self._intercept, variables, args, kwargs)

    def call_as_a_whole(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """`apply` with a key that no other replica and microbatch has: what `from_nnx` draws is not by the example."""

        def applied(*args: Any, rngs: Any = None, **kwargs: Any) -> Any:
            return apply(*args, rngs=rngs and {name: self._own(key) for name, key in rngs.items()}, **kwargs)

        return applied

    def _intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        module, call = context.module, context.method_name == "__call__"
        if call and isinstance(module, nn.Dropout):
            return self._dropout(module, next_fun, *args, **kwargs)
        if call and isinstance(module, nn.MultiHeadDotProductAttention):
            attention = module.attention_fn if module.broadcast_dropout else self._attention(module.attention_fn)
            with attributes(module, attention_fn=attention):
                return next_fun(*args, **kwargs)
        if call and isinstance(module, Noise) and len(args) == 1 and args[0] == self.rows and not kwargs:
            return next_fun(self.rows, self.global_index)
        if self.global_index is None or context.method_name == LIFTED:
            return next_fun(*args, **kwargs)

        def make_rng(*names: str) -> jax.Array:
            return self._own(type(module).make_rng(module, *names))

        with attributes(module, make_rng=make_rng):
            return next_fun(*args, **kwargs)

    def _dropout(
        self, module: nn.Dropout, next_fun: Callable[..., Any], x: Any, deterministic: Any = None, rng: Any = None
    ) -> Any:
        off = module.deterministic if deterministic is None else deterministic
        if off or module.rate in (0.0, 1.0):
            return next_fun(x, deterministic, rng)
        key = module.make_rng(module.rng_collection) if rng is None else rng
        if {0, -x.ndim} & set(module.broadcast_dims):
            return next_fun(x, deterministic, key)
        if not self._is_by_example(x):
            return next_fun(x, deterministic, self._own(key))
        dropped = jax.vmap(lambda key, x: next_fun(x, deterministic, key))(self._keys(key), self._grouped(x))
        return dropped.reshape(x.shape)

    def _attention(self, attention_fn: Callable[..., Any]) -> Callable[..., Any]:
        """`attention_fn`, each example with a key of its own."""

        @functools.wraps(attention_fn)  # Flax reads the signature
        def attention(query: Any, key: Any, value: Any, *, dropout_rng: Any = None, **kwargs: Any) -> Any:
            if dropout_rng is None:
                return attention_fn(query, key, value, dropout_rng=None, **kwargs)
            if not self._is_by_example(query) or kwargs.get("module") is not None:  # weights are sown by the whole
                return attention_fn(query, key, value, dropout_rng=self._own(dropout_rng), **kwargs)
            masks = {name: kwargs.pop(name) for name in ("mask", "bias") if kwargs.get(name) is not None}
            each = {name: x for name, x in masks.items() if x.ndim == query.ndim and x.shape[0] == query.shape[0]}
            shared = {name: x for name, x in masks.items() if name not in each}

            def of_one(rng: Any, q: Any, k: Any, v: Any, each: Any) -> Any:
                return attention_fn(q, k, v, dropout_rng=rng, **each, **shared, **kwargs)

            arrays = jax.tree.map(self._grouped, (query, key, value, each))
            return jax.vmap(of_one)(self._keys(dropout_rng), *arrays).reshape(*query.shape[:-1], value.shape[-1])

        return attention

    def _is_by_example(self, x: jax.Array) -> bool:
        return x.ndim > 0 and x.shape[0] > 0 and x.shape[0] % self.rows == 0

    def _grouped(self, x: jax.Array) -> jax.Array:
        """`x` with what belongs to one example along an axis of its own, the first."""
        return x.reshape(self.rows, -1, *x.shape[1:])

    def _keys(self, key: jax.Array) -> jax.Array:
        global_index = jnp.arange(self.rows, dtype=jnp.int32) if self.global_index is None else self.global_index
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, global_index)

    def _own(self, key: jax.Array) -> jax.Array:
        """A key that no other replica and microbatch has."""
        return key if self.global_index is None else jax.random.fold_in(key, self.global_index[0])
