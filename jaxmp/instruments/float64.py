"""`in_float64`: a function of float32 arrays evaluated in float64, with the random numbers that it draws in float32.

Under `jax.enable_x64` a function would draw other numbers: another mask of dropout, another noise. So it is traced in
float32, and each of its operations then runs in float64, but for those that make floats of random bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmp.errors import InputError
from jaxmp.jaxprs import bare, bind, called, interpret, jaxprs_in, opened, scan_counts
from jaxmp.trees import FLOAT32, HALF

_SCATTERS = {"scatter-add": lax.scatter_add, "scatter-mul": lax.scatter_mul, "scatter": lax.scatter}
_AS_TRACED = {"bitcast_convert_type", "nextafter", "random_gamma", "rng_uniform"}
"""Operations that are defined by the width of their operands, or draw numbers."""

_NARROW = (*HALF, FLOAT32, np.dtype(np.complex64))


def draws(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether a function of arrays, or of `jax.ShapeDtypeStruct`, draws random numbers."""
    return "random_bits" in str(jax.make_jaxpr(fn)(*args))


def in_float64(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` with its operations in float64. Casts to float32 or to half in it are left out.

    Args:
      fn: a function of pytrees of arrays, that jit can trace.

    Returns:
      A function with the same arguments, in any float dtypes; its results are on the host, floats in float64.

    Raises: InputError for an operation that holds functions of its own and is not known here, a linear solver.
    """
    compiled: dict[Any, tuple[Any, Any]] = {}

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        arrays = [x if _is_key(x) else np.asarray(jax.device_get(x)) for x in leaves]
        key = tree, tuple((x.shape, x.dtype) for x in arrays)
        if key not in compiled:
            shapes = [jax.ShapeDtypeStruct(x.shape, _narrow(x.dtype)) for x in arrays]
            trace = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)), return_shape=True)
            closed, out = trace(*shapes)
            consts = [np.asarray(jax.device_get(x)) if _is_float(x) else x for x in closed.consts]
            evaluate = jax.jit(lambda *leaves: _evaluate(bare(closed), [*map(_wide, consts), *leaves]))
            compiled[key] = evaluate, jax.tree.structure(out)
        evaluate, structure = compiled[key]
        with jax.enable_x64(True):
            return jax.device_get(jax.tree.unflatten(structure, evaluate(*map(_wide, arrays))))

    return run


def _evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The results of an open jaxpr, for its constants and inputs."""
    return interpret(jaxpr, args, _equation, lambda v: _wide(np.asarray(v.val, v.aval.dtype)))


def _equation(eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if (within := called(eqn)) is not None:
        return _closed(within, operands)
    if name == "scan":
        return _scan(eqn, operands)
    if name == "while":
        return _while(eqn, operands)
    if name == "cond":
        branches = [lambda *x, b=b: _closed(b, x) for b in eqn.params["branches"]]
        return list(lax.switch(operands[0], branches, *operands[1:]))
    if name in _AS_TRACED:
        return [_wide(x) for x in bind(eqn, _as_traced(eqn, operands))]
    if name in _SCATTERS:
        options = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
        return [_SCATTERS[name](*operands, **{option: eqn.params[option] for option in options})]
    if jaxprs_in(eqn):
        if any(_is_float(v.aval) for v in (*eqn.invars, *eqn.outvars)) and name not in ("reduce", "reduce_window"):
            raise InputError(
                f"{name} holds functions of its own and cannot be evaluated in float64 with the draws of float32; "
                "expected a model without it, or one that draws no random numbers"
            )
        return [_wide(x) for x in bind(eqn, _as_traced(eqn, operands))]
    params = dict(eqn.params)
    for field in ("new_dtype", "preferred_element_type", "dtype"):
        if params.get(field) in _NARROW:
            params[field] = _double(params[field])
    if "precision" in params and name != "reduce_precision":
        params["precision"] = None
    return bind(eqn, operands, params)


def _closed(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    inner, consts = opened(jaxpr)
    return _evaluate(inner, [*map(_wide, consts), *operands])


def _scan(eqn: Any, operands: list[Any]) -> list[Any]:
    consts, carries = scan_counts(eqn.params)
    own, start, slices = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]

    def body(carry: Any, x: Any) -> Any:
        out = _closed(eqn.params["jaxpr"], [*own, *carry, *x])
        return out[:carries], out[carries:]

    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, start, slices, **how)
    return [*carry, *stacked]


def _while(eqn: Any, operands: list[Any]) -> list[Any]:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body, start = operands[:n], operands[n : n + m], operands[n + m :]

    def condition(carry: Any) -> Any:
        return _closed(eqn.params["cond_jaxpr"], [*of_cond, *carry])[0]

    return list(lax.while_loop(condition, lambda c: _closed(eqn.params["body_jaxpr"], [*of_body, *c]), start))


def _as_traced(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    dtypes = [v.aval.dtype for v in eqn.invars]
    return [x.astype(d) if d in _NARROW else x for x, d in zip(operands, dtypes, strict=True)]


def _wide(x: Any) -> Any:
    return x.astype(_double(x.dtype)) if _is_float(x) and x.dtype in _NARROW else x


def _double(dtype: Any) -> Any:
    return np.dtype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)


def _narrow(dtype: Any) -> Any:
    return {np.dtype(np.float64): FLOAT32, np.dtype(np.complex128): np.dtype(np.complex64)}.get(dtype, dtype)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
