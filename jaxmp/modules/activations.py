"""`RowSharding`: activations stay on the device of their examples, in a program that XLA partitions.

With split weights the partitioner may as well gather the examples and split the features, in every layer. A constraint
on the outputs of each module makes it gather the weights that the module is about to use, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import jax
from jax.sharding import NamedSharding

from jaxmp.modules.interventions import Context, Intervention, Order, Run


@dataclasses.dataclass(frozen=True)
class RowSharding(Intervention):
    """Shards the arrays that modules return along axis 0, by the example."""

    sharding: NamedSharding
    """of rows along axis 0"""
    rows: int
    """number of rows; an array whose axis 0 has another size may lie anywhere"""

    order: ClassVar[Order] = Order.SHARDING

    def trace_key(self) -> Hashable:
        """The sharding and the number of rows."""
        return self

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model, with the outputs of its modules sharded."""
        return run(self._intercept, variables, args, kwargs)

    def _intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        out = next_fun(*args, **kwargs)
        return jax.tree.map(self._shard, out) if context.method_name == "__call__" else out

    def _shard(self, x: Any) -> Any:
        by_row = isinstance(x, jax.Array) and x.ndim > 0 and x.shape[0] == self.rows
        return jax.lax.with_sharding_constraint(x, self.sharding) if by_row else x
