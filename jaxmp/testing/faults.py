"""Faults that the laws inject into a train step: an inf or NaN in the batch, or in the gradient of a parameter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.trees import is_castable

# A part of jit's and pmap's cache keys, so that a compiled step is traced anew where its gradient has a fault.
_in_force = jax.make_user_context(None)


class Clean(NamedTuple):
    """A step without a fault."""

    def __str__(self) -> str:
        return "a step"


class BadBatch(NamedTuple):
    """A step on a batch with one number replaced."""

    path: str
    """path of the leaf in the batch"""
    place: int
    """index of the number in the flattened leaf"""
    value: float
    """value that replaces it"""

    def __str__(self) -> str:
        return f"a step with {self.value} as number {self.place} of the batch's {self.path}"

    def apply(self, batch: Any) -> Any:
        """Returns the batch with the fault."""

        def replace(path: Any, leaf: Any) -> Any:
            if jax.tree_util.keystr(path) != self.path:
                return leaf
            new = np.array(leaf)
            new.flat[self.place] = self.value
            return jax.device_put(new, leaf.sharding) if isinstance(leaf, jax.Array) else new

        return jax.tree_util.tree_map_with_path(replace, batch)


class BadGradient(NamedTuple):
    """A step in which the last number in the gradient of one parameter is replaced. The loss stays as it is."""

    path: str
    """path of the parameter"""
    value: float
    """value that replaces the number"""

    def __str__(self) -> str:
        return f"a step with {self.value} in the gradient of {self.path}"


Fault = Clean | BadBatch | BadGradient


@contextlib.contextmanager
def bad_gradient(fault: BadGradient | None, seen: set[str] | None = None) -> Iterator[None]:
    """Context manager: gradients from `jax.grad` and `jax.value_and_grad` have the fault.

    Both are replaced in the module `jax` meanwhile. A gradient function that was taken before (`from jax import grad`,
    or `jax.grad(...)` outside of the step) has no fault.

    Args:
      fault: the fault, or None.
      seen: a set to which the paths of all differentiated parameters are added.
    """

    def patched(transform: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(transform)
        def with_fault(fun: Callable[..., Any], argnums: Any = 0, *args: Any, **kwargs: Any) -> Any:
            @functools.wraps(fun)
            def faulty(*inputs: Any, **named: Any) -> Any:
                new = list(inputs)
                for i in argnums if isinstance(argnums, (tuple, list)) else (argnums,):
                    new[i] = _poisoned(inputs[i], fault, seen)
                return fun(*new, **named)

            return transform(faulty, argnums, *args, **kwargs)

        return with_fault

    old = jax.grad, jax.value_and_grad
    jax.grad, jax.value_and_grad = patched(jax.grad), patched(jax.value_and_grad)
    try:
        # To see the parameters the step has to be traced, also where it was before.
        with _in_force(("jaxmp.testing", fault if seen is None else object())):
            yield
    finally:
        jax.grad, jax.value_and_grad = old


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Context manager: jit and pmap compile anew, and use nothing that they compiled before."""
    with _in_force(("jaxmp.testing", object())):
        yield


def differentiated(step: Callable[[Any, Any], Any], state: Any, batch: Any) -> list[str]:
    """Returns the paths of the parameters that a step differentiates with `jax.grad` or `jax.value_and_grad`."""
    seen: set[str] = set()
    with bad_gradient(None, seen):
        try:
            traced(step, state, batch)
        except Exception:  # a step that looks at numbers, and so cannot be traced as a whole
            step(state, batch)
    return sorted(seen)


def traced(step: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
    """Returns the jaxpr of a step."""
    if hasattr(step, "trace"):  # it is jitted, perhaps with options that a jit around it would not allow
        return step.trace(state, batch).jaxpr
    return jax.make_jaxpr(lambda state, batch: step(state, batch))(state, batch)


def _poisoned(params: Any, fault: BadGradient | None, seen: set[str] | None) -> Any:
    def leaf(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if not is_castable(x):
            return x
        if seen is not None:
            seen.add(name)
        return _bad_vjp(fault.value, x) if fault is not None and name == fault.path else x

    return jax.tree_util.tree_map_with_path(leaf, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bad_vjp(value: float, x: jax.Array) -> jax.Array:
    return x


def _backward(value: float, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (g.ravel().at[-1].set(jnp.asarray(value, g.dtype)).reshape(g.shape),)


_bad_vjp.defvjp(lambda value, x: (x, None), _backward)
