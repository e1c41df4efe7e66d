"""`from_nnx`: a Flax NNX module as a pure model, like a Linen one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxmp.errors import InputError

STATE = "state"
"""collection of what an NNX module keeps that is no parameter: batch statistics, caches"""


@dataclasses.dataclass(frozen=True)
class FromNNX:
    """A model made of an NNX module: `init` and `apply` as a Linen module has them, pure functions both.

    It goes wherever jaxmp takes a Linen module (`make_loss`, `Experiment`, `with_policy`), under any policy without
    rules: a policy reaches it by its operations (`jaxmp.autocast`), not by its layers.

    >>> model = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))
    >>> model.apply(variables, jax.numpy.ones((1, 2))).shape
    (1, 3)
    """

    make: Callable[..., Any]
    """`make(rngs)`, a function that constructs the module with `nnx.Rngs`"""

    def init(self, key: jax.Array, *inputs: Any, train: bool = False) -> dict[str, Any]:
        """`{"params": ..., "state": ...}` of a fresh module, from the key alone; NNX modules need no inputs for it."""
        del inputs, train
        params, state = _split(self._module(key))
        return {"params": nnx.to_pure_dict(params), STATE: nnx.to_pure_dict(state)}

    def apply(
        self,
        variables: dict[str, Any],
        *inputs: Any,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
        mutable: bool | str | Sequence[str] = False,
    ) -> Any:
        """What the module returns for `inputs`; with `mutable`, the pair of it and `{"state": ...}`, as in Linen.

        Args:
          variables: what `init` returned, or the like.
          inputs: arguments of the module's `__call__`.
          train: whether dropout drops and batch statistics are of the batch: NNX's `train()` or `eval()`.
          rngs: a dict of which one key, the first, is that of all random streams of this call.
          mutable: anything but False: return the pair. Its second part is {} for an empty list.
        """
        # The key is that of this call's random streams. The fresh values that it makes are replaced, so that XLA never
        # computes them.
        module = self._module(next(iter(rngs.values())) if rngs else jax.random.key(0))
        for fresh, given in zip(_split(module), (variables["params"], variables.get(STATE, {})), strict=True):
            nnx.replace_by_pure_dict(fresh, given)
            nnx.update(module, fresh)
        (module.train if train else module.eval)()
        out = module(*inputs)
        if mutable is False:
            return out
        return out, ({STATE: nnx.to_pure_dict(_split(module)[1])} if mutable else {})

    def _module(self, key: jax.Array) -> Any:
        module = self.make(nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise InputError(f"from_nnx: {self.make!r} returned a {type(module).__name__}; expected an nnx.Module")
        return module


def from_nnx(make: Callable[..., Any]) -> FromNNX:
    """A model from a function that constructs an NNX module: `from_nnx(lambda rngs: MyModule(64, rngs=rngs))`."""
    return FromNNX(make)


def _split(module: Any) -> tuple[Any, Any]:
    """Parameters, and what is neither parameter nor random stream."""
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
    _, params, _, state = parts
    return params, state
