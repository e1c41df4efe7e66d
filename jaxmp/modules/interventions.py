"""Interventions: what is done to the modules of a model without changing its code.

    apply = intervene(model.apply, UnderPolicy("mixed_bfloat16"), Remat(("encoder/*",)))
    outputs = apply(variables, image)       # called like `model.apply`

All interventions of a model run in one Flax interceptor, in the order of `Order`, whatever order they were given in.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax

from jaxmp.trees import path_and_above

Context = nn.module.InterceptorContext
"""What Flax tells an interceptor: `module` and `method_name`."""

Interceptor = Callable[[Callable[..., Any], Any, Any, Context], Any]
"""`(next_fun, args, kwargs, context) -> outputs`: runs one method of one module, `next_fun(*args, **kwargs)`."""

LIFTED = "<lambda>"
"""The name of the methods that Flax makes itself, around a transformed class; no module of the user's has them."""


class Order(enum.IntEnum):
    """The order of interventions around the method of a module, the outermost first."""

    REMAT = enum.auto()
    """outermost: what the backward pass computes again includes the casts, the random masks and the shardings"""
    SHARDING = enum.auto()
    """outside the policy: it constrains the array that the next module gets, in the dtype that this one has"""
    OBSERVATION = enum.auto()
    """outside the policy: it sees what a module hands on, in the dtype that the next module gets"""
    POLICY = enum.auto()
    """outside random draws: they mask activations that are cast already"""
    ADAPTERS = enum.auto()
    """inside the policy, which the products of an adapter are under like those of the layer beside it"""
    RANDOM_DRAWS = enum.auto()
    """innermost: it replaces the module's own draws and nothing else"""


class Intervention:
    """One thing that is done to the modules of a model. Subclasses set `order` and override what they need."""

    order: ClassVar[Order]

    def call(self, run: Run, model: Any, variables: Any, args: Any, kwargs: Any) -> Any:
        """One call of the model: returns `run(interceptor, variables, args, kwargs)`, changed where it needs to be.

        Args:
          run: calls the model, with an interceptor for the length of this call.
          model: the Linen module; None if it is not known.
          variables: first argument of `model.apply`.
          args: inputs of the model, a tuple.
          kwargs: keyword arguments of `model.apply`.
        """
        raise NotImplementedError

    def call_as_a_whole(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """`apply` of a model whose modules cannot be reached (`from_nnx`), as far as that can be done.

        Raises: InputError if it takes modules.
        """
        return apply

    @contextlib.contextmanager
    def initializing(self) -> Iterator[Interceptor | None]:
        """Context manager around the `init` of a model: an interceptor that adds parameters to it; None if none do."""
        yield None

    def trace_key(self) -> Hashable:
        """What makes the trace of a call different from that of other calls.

        Flax traces a module under `nn.jit` once for all calls that `jax.jit` takes to be equal.
        """
        return None


Run = Callable[[Interceptor, Any, Any, Any], Any]
"""`run(interceptor, variables, args, kwargs)`: see `Intervention.call`."""

_ambient: contextvars.ContextVar[tuple[Intervention, ...]] = contextvars.ContextVar("ambient", default=())
_in_force = jax.make_user_context(())  # a part of the key of jit's caches


class _Intervened(NamedTuple):
    function: Callable[..., Any]
    apply: Callable[..., Any]
    interventions: tuple[Intervention, ...]


def intervene(apply: Callable[..., Any], *interventions: Intervention) -> Callable[..., Any]:
    """`model.apply` with interventions; of one order, those that are given later are inside.

    Args:
      apply: bound `apply` of a Linen module or of `from_nnx`; a function that wraps one (`functools.wraps`); or what
        this function returned, whose interventions then run inside the same interceptor.
      interventions: what to do to the modules.

    Raises: InputError if an intervention takes modules and the model is one of `from_nnx`.
    """
    before = _intervened(apply)
    if not interventions:
        return apply
    model = _model_of(before.apply)
    if getattr(model, "is_a_whole", False):  # asked so, since to import Flax NNX takes longer than all of jaxmp
        for each in sorted(interventions, key=lambda each: -each.order):
            apply = each.call_as_a_whole(apply)
        return _remember_model(apply, model)
    ordered = tuple(sorted((*interventions, *before.interventions), key=lambda each: each.order))

    def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
        every = tuple(sorted((*_ambient.get(), *ordered), key=lambda each: each.order))
        token = _ambient.set(())
        try:
            with _in_force((*_in_force.value, *(each.trace_key() for each in every))):
                return _call(every, (), before.apply, model, variables, args, kwargs)
        finally:
            _ambient.reset(token)

    applied._intervened = _Intervened(applied, before.apply, ordered)  # type: ignore[attr-defined]
    return applied


@contextlib.contextmanager
def intervening(*interventions: Intervention) -> Iterator[None]:
    """Context manager: adds interventions to every model that is called under others while it is open.

    A model without any (a plain `model.apply`) is not reached.
    """
    token = _ambient.set((*_ambient.get(), *interventions))
    try:
        yield
    finally:
        _ambient.reset(token)


@contextlib.contextmanager
def initializing(apply: Callable[..., Any]) -> Iterator[None]:
    """Context manager around the `init` of a model: the interventions of its `apply` add their parameters."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(each.initializing()) for each in _intervened(apply).interventions]
        interceptors = tuple(each for each in found if each is not None)
        if interceptors:
            stack.enter_context(nn.intercept_methods(in_turn(interceptors)))
        yield


@contextlib.contextmanager
def trace_apart() -> Iterator[None]:
    """Context manager: what is traced in it under `nn.jit` or `jax.jit` serves no other trace."""
    with _in_force((*_in_force.value, object())):
        yield


def _intervened(apply: Callable[..., Any]) -> _Intervened:
    found = getattr(apply, "_intervened", None)
    # functools.wraps copies attributes: only the function itself counts.
    return found if found is not None and found.function is apply else _Intervened(apply, apply, ())


def _model_of(apply: Callable[..., Any]) -> Any:
    """The model that `apply` is bound to; None if that is not known."""
    apply = inspect.unwrap(apply, stop=lambda f: hasattr(f, "__self__"))
    inner = _intervened(apply).apply
    return getattr(apply, "__self__", None) if inner is apply else _model_of(inner)


def _remember_model(apply: Callable[..., Any], model: Any) -> Callable[..., Any]:
    def applied(*args: Any, **kwargs: Any) -> Any:
        return apply(*args, **kwargs)

    applied.__wrapped__ = model.apply  # type: ignore[attr-defined]
    return applied


def _call(
    interventions: tuple[Intervention, ...],
    interceptors: tuple[Interceptor, ...],
    apply: Callable[..., Any],
    model: Any,
    variables: Any,
    args: Any,
    kwargs: Any,
) -> Any:
    """Calls the model: each intervention in turn does what it does around the call, and gives its interceptor."""
    if not interventions:
        with nn.intercept_methods(in_turn(interceptors)):
            return apply(variables, *args, **kwargs)
    first, *rest = interventions

    def run(interceptor: Interceptor, variables: Any, args: Any, kwargs: Any) -> Any:
        return _call(tuple(rest), (*interceptors, interceptor), apply, model, variables, args, kwargs)

    return first.call(run, model, variables, args, kwargs)


def in_turn(interceptors: tuple[Interceptor, ...]) -> Interceptor:
    """One interceptor that runs several, the first of them outermost, with arguments as `by_position` has them."""

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Context) -> Any:
        args, kwargs = by_position(context.orig_method, args, kwargs)
        for each in reversed(interceptors):
            next_fun = functools.partial(_step, each, next_fun, context)
        return next_fun(*args, **kwargs)

    return intercept


def _step(
    interceptor: Interceptor, next_fun: Callable[..., Any], context: Context, /, *args: Any, **kwargs: Any
) -> Any:
    return interceptor(next_fun, args, kwargs, context)


def by_position(method: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, those given by name that come next by position among `args`; the method gets the same.

    >>> by_position(lambda carry, inputs, *, train: None, (), {"train": True, "inputs": 2, "carry": 1})
    ((1, 2), {'train': True})
    """
    if not kwargs:
        return args, kwargs
    kwargs = dict(kwargs)
    # Of the function itself, not of what it wraps: a decorator may look for an argument by its name.
    parameters = inspect.signature(method, follow_wrapped=False).parameters.values()
    for parameter in [*parameters][len(args) :]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name not in kwargs:
            break
        args = (*args, kwargs.pop(parameter.name))
    return args, kwargs


class MetModules:
    """The modules that were met during one call of a model, and what patterns may call them."""

    def __init__(self) -> None:
        self.classes: dict[str, frozenset[str]] = {}  # names of the class and its bases, by path
        self.owners: dict[str, str] = {}  # path of the nn.RNN by that of its cell, which stands beside it

    def meet(self, path: str, module: nn.Module) -> None:
        """Notes a module."""
        names = (c.__name__ for c in type(module).__mro__ if issubclass(c, nn.Module) and c is not nn.Module)
        self.classes[path] = self.classes.get(path, frozenset()) | frozenset(names)
        inner: list[Any] = []
        if isinstance(module, nn.RNN):
            inner = [module.cell]
        elif isinstance(module, nn.Bidirectional):
            inner = [module.forward_rnn, module.backward_rnn]
        for each in inner:
            if isinstance(each, nn.Module) and each.scope is not None:
                self.owners.setdefault("/".join(each.path), path)

    def with_owners(self, path: str) -> list[str]:
        """The path, and those of the nn.RNNs whose cells it is in."""
        paths = [path]
        for each in paths:  # which grows on the way
            paths += [self.owners[at] for at in path_and_above(each) if self.owners.get(at, path) not in paths]
        return paths


@contextlib.contextmanager
def attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Context manager: sets attributes of one bound module for the length of a call."""
    old = {name: module.__dict__[name] for name in values if name in module.__dict__}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in old:
                object.__setattr__(module, name, old[name])
            else:
                object.__delattr__(module, name)
