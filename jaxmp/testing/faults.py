"""What the laws put into a train step: an inf or NaN in the batch or in a gradient, or gradients of their choice.

Gradients are put in at run time, by a callback in the backward pass: one compiled program serves all of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.scaling.transform import OVERWRITTEN
from jaxmp.trees import has_gradient

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
    value: complex
    """value that replaces the number; of a complex one, both parts"""
    once: bool = False
    """whether only one of the gradients has the fault, where a step takes several: of one replica, or one microbatch"""

    def __str__(self) -> str:
        where = " of one replica" if self.once else ""
        return f"a step with {self.value} in the gradient of {self.path}{where}"


Fault = Clean | BadBatch | BadGradient


class GradientLeaf(NamedTuple):
    """A parameter that a step differentiates."""

    call: int
    """number of the call of `jax.grad` in the step, from 0"""
    path: str
    """path of the parameter"""
    shape: tuple[int, ...]
    """shape of its gradient"""
    dtype: np.dtype
    """dtype of its gradient"""


class Observed(NamedTuple):
    """What a step with injected gradients computed."""

    losses: dict[int, list[np.ndarray]]
    """what each call of `jax.grad` differentiated (the scaled loss), once for each microbatch and replica"""
    finite: dict[int, list[bool]]
    """whether its own gradients, which the injected ones replace, were all finite"""


Chosen = Callable[[GradientLeaf], "np.ndarray | None"]
"""The gradient, as the step's backward pass would have it (scaled), for a leaf; None for the step's own."""


class _Slot:
    """What is put into the gradients now, and what is seen. The compiled programs read and write it."""

    def __init__(self) -> None:
        self.chosen: Chosen = lambda leaf: None
        self.last: Callable[[GradientLeaf, int], complex | None] = lambda leaf, count: None
        self.observed = Observed({}, {})
        self.seen: dict[tuple[int, str], GradientLeaf] = {}
        self.calls = 0


_slot = _Slot()


@contextlib.contextmanager
def injected(chosen: Chosen | None = None, bad: BadGradient | None = None) -> Iterator[Observed]:
    """Context manager: gradients from `jax.grad` and `jax.value_and_grad` are those that the laws choose.

    Both functions are replaced in the module `jax` meanwhile. A gradient function that was taken before (`from jax
    import grad`, or `jax.grad(...)` outside of the step) keeps its gradients. What the step returned has to be ready
    before the context ends.

    Args:
      chosen: gradients that replace the step's own; none by default.
      bad: a fault in one leaf.
    """
    _slot.chosen = chosen or (lambda leaf: None)
    _slot.last = lambda leaf, count: (
        bad.value if bad is not None and leaf.path == bad.path and not (bad.once and count) else None
    )
    _slot.observed, _slot.calls = Observed({}, {}), 0
    old = jax.grad, jax.value_and_grad
    jax.grad, jax.value_and_grad = _patched(jax.grad), _patched(jax.value_and_grad)
    try:
        with _in_force(("jaxmp.testing", "injected")):
            yield _slot.observed
    finally:
        jax.effects_barrier()
        jax.grad, jax.value_and_grad = old
        _slot.chosen, _slot.last = (lambda leaf: None), (lambda leaf, count: None)


def _patched(transform: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(transform)
    def with_gradients(fun: Callable[..., Any], argnums: Any = 0, has_aux: bool = False, **kwargs: Any) -> Any:
        @functools.wraps(fun)
        def replaced(*inputs: Any, **named: Any) -> Any:
            new, call = list(inputs), _slot.calls
            _slot.calls += 1
            for i in argnums if isinstance(argnums, (tuple, list)) else (argnums,):
                new[i] = _with_gradients(inputs[i], call)
            out = fun(*new, **named)
            loss = out[0] if has_aux else out
            if jnp.ndim(loss) == 0:
                jax.debug.callback(functools.partial(_see_loss, call), jax.lax.stop_gradient(loss))
            return out

        return transform(replaced, argnums, has_aux, **kwargs)

    return with_gradients


def _see_loss(call: int, loss: Any) -> None:
    _slot.observed.losses.setdefault(call, []).append(np.asarray(loss))


def _with_gradients(params: Any, call: int) -> Any:
    """Returns the parameters; in the backward pass, their gradients are replaced."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    values = [x for _, x in leaves]
    places = [
        i for i, (name, x) in enumerate(zip(names, values, strict=True)) if _is_trained(x) and OVERWRITTEN not in name
    ]
    if not places:
        return params
    found = tuple(GradientLeaf(call, names[i], jnp.shape(values[i]), np.dtype(values[i].dtype)) for i in places)
    _slot.seen.update({(leaf.call, leaf.path): leaf for leaf in found})
    for i, value in zip(places, _replacing(found, [values[i] for i in places]), strict=True):
        values[i] = value
    return jax.tree_util.tree_unflatten(structure, values)


def _is_trained(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic)) and has_gradient(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _replacing(leaves: tuple[GradientLeaf, ...], params: list[Any]) -> list[Any]:
    return params


def _backward(leaves: tuple[GradientLeaf, ...], _: None, grads: list[Any]) -> tuple[list[Any]]:
    def read(finite: Any) -> Any:
        seen = _slot.observed.finite.setdefault(leaves[0].call, [])
        seen.append(bool(np.all(finite)))
        chosen = [_slot.chosen(leaf) for leaf in leaves]
        last = [_slot.last(leaf, len(seen) - 1) for leaf in leaves]
        arrays = [
            np.zeros(leaf.shape, leaf.dtype) if value is None else np.asarray(value, leaf.dtype).reshape(leaf.shape)
            for leaf, value in zip(leaves, chosen, strict=True)
        ]
        return (
            arrays,
            np.array([value is not None for value in chosen]),
            np.array([value is not None for value in last]),
            np.array([0.0 if value is None else value for value in last], np.complex64),
        )

    count = len(leaves)
    shapes = (
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        jax.ShapeDtypeStruct((count,), np.bool_),
        jax.ShapeDtypeStruct((count,), np.bool_),
        jax.ShapeDtypeStruct((count,), np.complex64),
    )
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in grads]))
    arrays, replace, poison, last = jax.pure_callback(read, shapes, finite, vmap_method="sequential")

    def one(i: int, g: Any) -> Any:
        g = jnp.where(replace[i], arrays[i], g)
        bad = last[i] if jnp.iscomplexobj(g) else last[i].real.astype(g.dtype)
        return jnp.where(poison[i], g.ravel().at[-1].set(bad).reshape(g.shape), g) if g.size else g

    return ([one(i, g) for i, g in enumerate(grads)],)


_replacing.defvjp(lambda leaves, params: (params, None), _backward)


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Context manager: jit and pmap compile anew, and use nothing that they compiled before."""
    with _in_force(("jaxmp.testing", object())):
        yield


def differentiated(step: Callable[[Any, Any], Any], state: Any, batch: Any) -> list[GradientLeaf]:
    """Returns the parameters that a step differentiates with `jax.grad` or `jax.value_and_grad`."""
    _slot.seen = {}
    with injected(), _in_force(("jaxmp.testing", object())):  # traced anew, also where it was before
        try:
            traced(step, state, batch)
        except Exception:  # a step that looks at numbers, and so cannot be traced as a whole
            jax.block_until_ready(step(state, batch))
    return sorted(_slot.seen.values())


def traced(step: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
    """Returns the jaxpr of a step."""
    if hasattr(step, "trace"):  # it is jitted, perhaps with options that a jit around it would not allow
        return step.trace(state, batch).jaxpr
    return jax.make_jaxpr(lambda state, batch: step(state, batch))(state, batch)
