"""Observation: looking at what the modules of a model return, without changing it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar

from jaxmp.modules.interventions import Context, Intervention, Order, Run, intervening

Observer = Callable[[str, Any], Any]
"""`(path, outputs) -> outputs`: called with what the module at `path` returns; what it returns takes its place."""

_count = itertools.count()


class Observation(Intervention):
    """An observer of the outputs of each module's `__call__`, for the length of one trace."""

    order: ClassVar[Order] = Order.OBSERVATION

    def __init__(self, observer: Observer):
        self._observer = observer

    def trace_key(self) -> Hashable:
        """A number of its own for each call: no other trace may meet what this one left under `nn.jit`."""
        return next(_count)

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model, observed."""

        def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
            out = next_fun(*args, **kwargs)
            return self._observer("/".join(context.module.path), out) if context.method_name == "__call__" else out

        return run(intercept, variables, args, kwargs)


@contextlib.contextmanager
def observed_modules(observer: Observer) -> Iterator[None]:
    """Context manager: what each Linen module's `__call__` returns goes through `observer`, when it is traced.

    It reaches models that are called under a policy or another intervention. The observer gets what the module hands
    on, after its policy; for the whole model, "", that is before the cast to the output dtype.
    """
    with intervening(Observation(observer)):
        yield
