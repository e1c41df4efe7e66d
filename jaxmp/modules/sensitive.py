"""`sensitive`: whether a model's own code, between its layers, is right in half precision.

Most of it is: residual connections, activations, pooling. What is not are the traps T19 to T25 of the numerics
contract: random draws, positions and angles in half, counts above what half can count, logarithms, linear algebra and
FFTs, and what a rule keeps in float32 but gets rounded. `with_policy` runs such models by operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from jaxmp.jaxprs import SAME_VALUES, bare, interpret, jaxprs_in, scopes
from jaxmp.trees import HALF, is_floating

LAYER, ROUNDED, EDGE = "jaxmp.layer", "jaxmp.rounded", "jaxmp.edge"
"""named scopes of a trace that is looked at: operations of a layer, casts of the model's inputs, casts to the wider
dtype of a rule"""

_NO_HALF = {v.name for v in vars(lax.linalg).values() if isinstance(v, Primitive)} | {"fft", "random_gamma"}
_NEVER_IN_HALF = {"sin", "cos", "tan", "log", "log1p", "atanh", "acosh", "acos", "asin", "erf_inv", "rng_uniform"}
_NEVER_IN_HALF |= {"cumsum", "cumprod", "cumlogsumexp"}
_WHOLE = SAME_VALUES | {"add", "sub", "mul", "max", "min", "neg", "slice", "concatenate", "clamp", "select_n", "rem"}


class _Facts(NamedTuple):
    """What is known of a value."""

    rounded: bool = False
    """made of an input of the model that was rounded"""
    mask: bool = False
    """zeros and ones"""
    counted: bool = False
    """a sum of a mask, over more terms than half can count"""
    largest: float = math.inf
    """of whole numbers: what they are below"""


def sensitive(jaxpr: Any) -> bool:
    """Whether an open jaxpr holds operations in half, outside of layers, that need float32; see the module."""
    found: list[str] = []
    _walk(jaxpr, [_Facts()] * len(jaxpr.constvars + jaxpr.invars), "", found)
    return bool(found)


def _walk(jaxpr: Any, given: Sequence[_Facts], outer: str, found: list[str]) -> list[_Facts]:
    def equation(eqn: Any, facts: list[_Facts]) -> list[_Facts]:
        names = scopes(eqn, outer)
        inner = jaxprs_in(eqn)
        if inner:
            results: list[_Facts] = []
            for each in map(bare, inner):
                skipped = len(eqn.invars) - len(each.invars)
                fits = 0 <= skipped and len(each.outvars) == len(eqn.outvars)
                start = facts[skipped:] if fits else [_Facts()] * len(each.invars)
                out = _walk(each, [*([_Facts()] * len(each.constvars)), *start], names, found)
                results = out if fits else results
            return results or [_Facts(rounded=any(f.rounded for f in facts))] * len(eqn.outvars)
        return [_facts(eqn, v, facts, names, found) for v in eqn.outvars]

    return interpret(jaxpr, given, equation, lambda v: _Facts(largest=_size(v)))


def _facts(eqn: Any, v: Any, facts: list[_Facts], names: str, found: list[str]) -> _Facts:
    name, dtype = eqn.primitive.name, getattr(v.aval, "dtype", None)
    halves = [x.aval for x in (*eqn.invars, *eqn.outvars) if getattr(x.aval, "dtype", None) in HALF]
    if halves and name in _NO_HALF:
        found.append(name)
    if LAYER in names:
        return _Facts()
    if name == "random_bits" and eqn.params.get("bit_width") in (8, 16):  # 8: for the 7 bits of bfloat16
        found.append("a random draw")
    if halves and name in _NEVER_IN_HALF:
        found.append(name)
    if name == "convert_element_type" and EDGE in names and facts[0].rounded:
        found.append("the input of a rule")
    whole = eqn.invars and jnp.issubdtype(getattr(eqn.invars[0].aval, "dtype", bool), jnp.integer)
    if dtype in HALF and name == "convert_element_type":
        if facts[0].counted or (whole and facts[0].largest > 2 ** (jnp.finfo(dtype).nmant + 1)):
            found.append("whole numbers")
    if name == "iota" and dtype in HALF and v.aval.shape[eqn.params["dimension"]] > 2 ** (jnp.finfo(dtype).nmant + 1):
        found.append("iota")
    rounded = any(f.rounded for f in facts) or (
        name == "convert_element_type" and dtype in HALF and ROUNDED in names and is_floating(eqn.invars[0].aval)
    )
    boolean = bool(eqn.invars) and _is_bool(eqn.invars[0].aval)
    mask = name in SAME_VALUES and (boolean or facts[0].mask)
    count = (name in SAME_VALUES and facts[0].counted) or (
        name == "reduce_sum" and facts[0].mask and eqn.invars[0].aval.size // max(v.aval.size, 1) > 256
    )
    largest = math.inf
    if name == "iota":
        largest = v.aval.shape[eqn.params["dimension"]]
    elif name in _WHOLE and facts:
        largest = math.prod(f.largest for f in facts) if name == "mul" else sum(f.largest for f in facts)
        largest = facts[0].largest if name in SAME_VALUES else largest
    elif _is_bool(v.aval):
        largest = 1
    return _Facts(rounded, mask, count, largest)


def _is_bool(aval: Any) -> bool:
    return np.dtype(bool) == getattr(aval, "dtype", None)


def _size(v: Any) -> float:
    try:
        return abs(float(v.val))
    except (TypeError, ValueError):
        return math.inf
