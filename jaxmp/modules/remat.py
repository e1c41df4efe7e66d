"""Rematerialisation by module path: what is inside of a module is computed again in the backward pass, not kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174. An unmodified Linen
module is reached by intercepting its call, as a policy reaches it: `nn.remat` around that call alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxmp.errors import InputError
from jaxmp.modules.linen import Modules
from jaxmp.precision.policy_tree import names, there_are

POLICIES: dict[str, Any] = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""what may be kept inside of a module that is computed again"""


def rematerialised(
    apply: Callable[..., Any], modules: tuple[str, ...], policy: str = "nothing_saveable"
) -> Callable[..., Any]:
    """`model.apply` of a Linen module, with the calls of some modules computed again in the backward pass.

    Same results; inputs and, by `policy`, some results of these modules are kept, and nothing else inside of them.

    Args:
      apply: the function.
      modules: which modules: paths such as `encoder/layer_0`, with `*` for any part of one name and `**` for any number
        of names, or `@` and a module class. Of modules within each other the outermost is taken.
      policy: what is kept nevertheless, one of `POLICIES`.

    Raises (when called): InputError where a pattern names no module that is called.
    """

    @functools.wraps(apply)
    def applied(*args: Any, **kwargs: Any) -> Any:
        call = _Call(modules, POLICIES[policy])
        with nn.intercept_methods(call.intercept):
            out = apply(*args, **kwargs)
        call.check()
        return out

    return applied if modules else apply


class _Call:
    """One call of a model: a Linen method interceptor, outside of that of the policy, so that casts are redone too."""

    def __init__(self, patterns: tuple[str, ...], policy: Any):
        self.patterns, self.policy = patterns, policy
        self.met = Modules()
        self.inside = False  # of a module that is computed again

    def check(self) -> None:
        """Raises InputError where a pattern names no module that was called."""
        for pattern in self.patterns:
            if not any(names(pattern, path, self.met.classes) for path in self.met.classes):
                raise InputError(f"parallel.remat {pattern!r} names no module; {there_are(pattern, self.met.classes)}")

    def intercept(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Runs one method of one module, under `nn.remat` where its module is named."""
        module, method = context.module, context.method_name
        if method == "<lambda>":  # Flax's own, around a transformed class: no module of the user's
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        self.met.meet(path, module)
        named = any(names(pattern, path, self.met.classes) for pattern in self.patterns)
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
