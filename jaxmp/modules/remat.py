"""`Remat`: rematerialisation of modules by their paths.

What is inside such a module is computed again in the backward pass and not kept (Chen et al. 2016, "Training Deep Nets
with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174). An unmodified Linen module is reached by intercepting
its call: `nn.remat` around that call alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import flax.linen as nn
import jax

from jaxmp.errors import InputError
from jaxmp.modules.interventions import LIFTED, Context, Intervention, MetModules, Order, Run
from jaxmp.trees import Pattern

POLICIES: dict[str, Any] = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""what may be kept inside a module that is computed again"""


@dataclasses.dataclass(frozen=True)
class Remat(Intervention):
    """Computes the calls of some modules again in the backward pass. The results are the same.

    The inputs of these modules are kept and, by `policy`, some of the results inside them.

    Raises:
      InputError: a pattern is malformed; or, when the model is called, a pattern names no module that is called.
    """

    patterns: tuple[str, ...]
    """which modules, see `jaxmp.trees.Pattern`; of modules within each other the outermost is taken"""
    policy: str = "nothing_saveable"
    """what is kept nevertheless, one of `POLICIES`"""

    order: ClassVar[Order] = Order.REMAT

    def trace_key(self) -> Hashable:
        """The patterns and the policy."""
        return self

    def call_as_a_whole(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Raises an InputError: patterns name modules."""
        raise InputError(
            f"parallel.remat={self.patterns}: a model made by from_nnx has no modules to name; use nnx.remat in it"
        )

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model, with `nn.remat` around the modules that are named."""
        call = _Call([Pattern(text) for text in self.patterns], POLICIES[self.policy])
        out = run(call.intercept, variables, args, kwargs)
        call.check()
        return out


class _Call:
    """One call of a model: its interceptor, and the modules that it has met."""

    def __init__(self, patterns: list[Pattern], policy: Any):
        self.patterns, self.policy = patterns, policy
        self.met = MetModules()
        self.inside = False  # of a module that is computed again

    def check(self) -> None:
        """Raises InputError if a pattern names no module that was called."""
        classes = self.met.classes
        for pattern in self.patterns:
            if not any(pattern.matches(path, classes) for path in classes):
                raise InputError(f"parallel.remat {str(pattern)!r} names no module; {pattern.what_there_is(classes)}")

    def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        """Runs one method of one module, under `nn.remat` if its module is named."""
        module, method = context.module, context.method_name
        if method == LIFTED:
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        self.met.meet(path, module)
        named = any(pattern.matches(path, self.met.classes) for pattern in self.patterns)
        if self.inside or method != "__call__" or not named:
            return next_fun(*args, **kwargs)
        # What is no array (`train=True`, None) stays as it is: remat would make arrays of it.
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

        def again(module: nn.Module, arrays: dict[int, jax.Array]) -> Any:
            args, kwargs = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            return module(*args, **kwargs)  # type: ignore[operator]

        self.inside = True
        try:
            return nn.remat(again, policy=self.policy)(module, arrays)
        finally:
            self.inside = False
