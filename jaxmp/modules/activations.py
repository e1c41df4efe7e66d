"""Activations that stay where their examples are, in a program that the partitioner spreads over devices.

With split weights the partitioner may as well gather the examples and split the features, in every layer. Told where
the output of each module lies, it gathers the weights that the module is about to use, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding


def kept_with_rows(apply: Callable[..., Any], sharding: NamedSharding, rows: int) -> Callable[..., Any]:
    """`model.apply` of a Linen module, with the arrays that its modules return spread by the example.

    Args:
      apply: the function.
      sharding: of rows along axis 0.
      rows: number of rows; an array whose axis 0 has another size may lie anywhere.
    """

    def spread(x: Any) -> Any:
        by_row = isinstance(x, jax.Array) and x.ndim > 0 and x.shape[0] == rows
        return jax.lax.with_sharding_constraint(x, sharding) if by_row else x

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = next_fun(*args, **kwargs)
        return jax.tree.map(spread, out) if context.method_name == "__call__" else out

    @functools.wraps(apply)
    def applied(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return apply(*args, **kwargs)

    return applied
