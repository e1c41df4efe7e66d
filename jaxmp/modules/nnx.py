"""`from_nnx`: makes of a Flax NNX module a model with the pure functions `init` and `apply` of a Linen module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxmp.errors import InputError

STATE = "state"
"""name of the collection with the state of an NNX module other than parameters: batch statistics, caches"""


@dataclasses.dataclass(frozen=True)
class FromNNX:
    """A model made of an NNX module, with the pure functions `init` and `apply` of a Linen module.

    It goes wherever jaxmp takes a Linen module (`make_loss`, `Experiment`, `with_policy`), under any policy without
    rules. A policy is applied to its operations (`jaxmp.autocast`), not to its layers.

    >>> model = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))
    >>> model.apply(variables, jax.numpy.ones((1, 2))).shape
    (1, 3)
    """

    make: Callable[..., Any]
    """`make(rngs)`, a function that constructs the module with `nnx.Rngs`"""

    is_a_whole: ClassVar[bool] = True
    """tells `jaxmp.modules.interventions` that the modules inside cannot be reached"""

    def __post_init__(self) -> None:
        """Refuses a module that is made already: its parameters would be no arguments."""
        if isinstance(self.make, nnx.Module):
            name = type(self.make).__name__
            raise InputError(
                f"from_nnx: given a {name}; expected a function that makes one: from_nnx(lambda rngs: {name}(..., "
                "rngs=rngs))"
            )

    def init(self, key: jax.Array, *inputs: Any, train: bool = False) -> dict[str, Any]:
        """Fresh `{"params": ..., "state": ...}`, from the key alone: NNX modules know the shapes of their inputs."""
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
          variables: as `init` returns them; "state" may be left out if the module has none.
          inputs: arguments of the module's `__call__`.
          train: calls NNX's `train()` on the module, else `eval()`: dropout, and which statistics normalise.
          rngs: a dict; its first key is the key of all random streams of this call.
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
    """A model from a function that constructs an NNX module.

    >>> model = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))

    Args:
      make: `make(rngs)`, with `nnx.Rngs`, returns the `nnx.Module`.

    Raises: InputError if `make` is a module; when it is called, if it returns none.
    """
    return FromNNX(make)


def _split(module: Any) -> tuple[Any, Any]:
    """The parameters, and the state that is neither a parameter, nor a random stream, nor sown."""
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, nnx.Intermediate, ...)
    _, params, _, _, state = parts
    return params, state
