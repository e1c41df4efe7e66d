"""Jaxprs: where an equation stands, which functions it holds, and evaluating it.

What differs between JAX 0.10 and JAX 0.12 stands here: whether an open and a closed jaxpr are two classes, and what a
scan says of its operands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

# Not public: the line of the user's code and the named scopes of an equation.
from jax._src import source_info_util
from jax.extend.core import Literal, jaxprs_in_params

from jaxmp.errors import InputError

Value = TypeVar("Value")

QUANTIZE = "quantize_"
"""prefix of the scope around the equations that round to an emulated format, before the name of the format"""
RECIPE = "recipe_"
"""prefix of the scope around the equations of a product of a recipe, before the name of the product, and of the scope
in it around the rounding of an operand: `recipe_wgrad/recipe_wgrad-gradients`"""
LOSS_SCALE = "loss_scale"
"""scope around the multiplication of the loss by the loss scale"""

SAME_VALUES = {
    *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "copy", "copy_p", "optimization_barrier"),
    *("convert_element_type", "reduce_precision", "name", "sharding_constraint", "stop_gradient", "pvary"),
}
"""Primitives whose result holds all values of their operand, rounded at most."""

COLLECTIVE_SUMS = {"psum", "psum2", "psum_invariant", "reduce_scatter", "psum_scatter"}
"""Primitives that sum over devices."""

_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
_NO_MODULES = {"jaxmp", "checkpoint", "closed_call", "rematted_computation", "shard_map", LOSS_SCALE}
_OF_RECIPE = re.compile(rf"(?<!\w){RECIPE}(fprop|dgrad|wgrad)(?:-(\w+))?(?!\w)")  # not a module called recipe_head
_LOOP = re.compile(r"(?<![^/])while/(body|cond)(?![^/])/?")  # as the compiled program has a scan
_COMPILED = ("jit", "pjit", "pmap", "xla_pmap")
_OWN = os.path.dirname(__file__) + os.sep
_OWN_MODELS = tuple(os.path.join(_OWN, room) + os.sep for room in ("models", "tasks"))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an equation stands, or the function that a jaxpr is of."""

    names: str = ""
    """name stack: transformations, modules and named scopes, outermost first"""
    source: str = ""
    """file:line of the user's code, or "" """

    def at(self, eqn: Any) -> Self:
        """Returns the place of an equation of the function that stands here."""
        return dataclasses.replace(self, names=scopes(eqn, self.names), source=source_line(eqn) or self.source)

    @property
    def module(self) -> str:
        """The path of modules and scopes (see `module_path`)."""
        return module_path(self.names)


def scopes(eqn: Any, outer: str = "") -> str:
    """Returns the name stack of an equation; `outer` is that of the function it stands in."""
    return "/".join(filter(None, (outer, str(eqn.source_info.name_stack))))


def module_path(names: str) -> str:
    """Returns the path of modules and scopes in a name stack, the class of the model first.

    Leaves out transformations, methods other than `__call__` (`LSTMCell_0.scan_fn`), functions that JAX names, and the
    scopes of emulated formats and of the products of a recipe.

    >>> module_path("transpose(jvp(Net))/head")
    'Net/head'
    """
    parts: list[str] = []
    previous_wrapped = False
    for part in _LOOP.sub("", names).split("/"):
        name, wrapped = part, False
        while name.endswith(")") and "(" in name:
            transform, name = name[:-1].split("(", 1)
            wrapped = True
            if transform in _COMPILED:
                name = ""
        name = name.partition(".")[0]
        # Under remat the backward pass names the outermost scope twice, and a method stands before its module.
        repeated = parts and parts[-1] == name and (not wrapped or previous_wrapped)
        of_format = name.startswith(QUANTIZE) or _OF_RECIPE.fullmatch(name)
        if name and not repeated and name not in _NO_MODULES and not of_format:
            parts.append(name)
        previous_wrapped = wrapped
    return "/".join(parts)


def quantized(names: str) -> str:
    """Returns the name of the emulated format to which an equation with this name stack rounds, or ""."""
    return re.sub("-(un)?saturated$", "", quantiser(names))


def quantiser(names: str) -> str:
    """The same, with `-saturated` or `-unsaturated` after a format that overflows otherwise than it does by default."""
    found = re.findall(rf"{QUANTIZE}([\w-]+)", names)
    return found[-1] if found else ""


def recipe_product(names: str) -> str:
    """Returns the product of a recipe that an equation with this name stack stands in (`fprop`, say), or "".

    >>> recipe_product("jvp(Net)/dense/recipe_wgrad/recipe_wgrad-gradients"), recipe_product("Net/recipe_head")
    ('wgrad', '')
    """
    found = _OF_RECIPE.findall(names)
    return found[-1][0] if found else ""


def recipe_operand(names: str) -> str:
    """Returns the operand whose rounding for a recipe an equation belongs to, such as `gradients`, or ""."""
    found = [role for _, role in _OF_RECIPE.findall(names) if role]
    return found[-1] if found else ""


def is_scaling(names: str) -> bool:
    """True if an equation with this name stack multiplies the loss by the loss scale, or is the transpose of that."""
    return LOSS_SCALE in re.split(r"[/()]", names)


def is_backward(names: str) -> bool:
    """True if an equation with this name stack belongs to the backward pass."""
    return "transpose(" in names and "rematted_computation" not in names


def source_line(eqn: Any) -> str:
    """Returns file:line of the innermost frame outside of libraries, else of the innermost frame, or ""."""
    innermost = None
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        if not in_library(frame.file_name):
            return f"{frame.file_name}:{frame.start_line}"
        innermost = innermost or frame
    return f"{innermost.file_name}:{innermost.start_line}" if innermost else ""


@functools.cache
def in_library(file: str) -> bool:
    """True for files of installed packages, and of jaxmp except its models and tasks: not the user's code."""
    if file.startswith(_OWN):
        return not file.startswith(_OWN_MODELS)
    return any(f"{os.sep}{name}{os.sep}" in file for name in ("site-packages", "dist-packages"))


def bare(jaxpr: Any) -> Any:
    """Returns the open jaxpr of an open or closed one. JAX 0.12 has one class for both."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns the open jaxpr of an open or closed one, and its constants, `[]` for an open one."""
    return bare(jaxpr), list(getattr(jaxpr, "consts", ()))


def closed_like(closed: Any, jaxpr: Any) -> Any:
    """Returns `closed`, a closed jaxpr, opened if `jaxpr` is open: as the same parameter of an equation wants it."""
    return closed if isinstance(closed, type(jaxpr)) else closed.jaxpr


def called(eqn: Any) -> Any:
    """Returns the jaxpr that an equation only calls, as jit, remat and custom derivatives do; None for any other."""
    if eqn.primitive.name not in _CALLS:
        return None
    return next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)


def jaxprs_in(eqn: Any) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation."""
    return list(jaxprs_in_params(eqn.params))


def equations(jaxpr: Any, outer: str = "") -> Iterator[tuple[Any, str]]:
    """Yields every equation of an open or closed jaxpr and of the jaxprs inside it, each with its name stack."""
    for eqn in bare(jaxpr).eqns:
        names = scopes(eqn, outer)
        yield eqn, names
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner, names)


def device_count(eqn: Any) -> int:
    """Returns on how many devices the jaxprs among an equation's parameters run: 1 unless it is a shard_map or pmap."""
    if eqn.primitive.name != "shard_map":  # which pmap is as well
        return 1
    sizes = dict(eqn.params["mesh"].shape)
    return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a scan, given its parameters, are constants and how many are carries."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries = (len(group) for group in params["ft_in"].unpack()[:2])  # JAX 0.12 keeps the structure instead
    return consts, carries


def interpret(
    jaxpr: Any,
    given: Sequence[Value],
    equation: Callable[[Any, list[Value]], Sequence[Value]],
    literal: Callable[[Any], Value],
) -> list[Value]:
    """Evaluates an open jaxpr on values of any kind: arrays, or what is known of them. Returns those of its results.

    A value is dropped after the last equation that reads it.

    Args:
      jaxpr: the open jaxpr.
      given: the values of its constants and then of its inputs.
      equation: `equation(eqn, operands)`, the values of an equation's results.
      literal: `literal(atom)`, the value of a literal.
    """
    env: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))
    last = _last_uses(jaxpr)

    def read(atom: Any) -> Value:
        return literal(atom) if isinstance(atom, Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        env.update(zip(eqn.outvars, equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        for v in last.get(i, ()):
            env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """By the place of an equation: the variables that nothing after it reads."""
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in (*eqn.outvars, *eqn.invars) if not isinstance(v, Literal)}
    uses: dict[int, list[Any]] = {}
    for v, i in last.items():
        if v not in kept:
            uses.setdefault(i, []).append(v)
    return uses


def bind(eqn: Any, values: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
    """Evaluates one equation: binds its primitive to `values`, and returns its results as a list.

    Args:
      eqn: the equation.
      values: its operands, arrays or tracers.
      params: parameters to use instead of the equation's own.
    """
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params if params is None else params))
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def traced_at(eqn: Any) -> Iterator[None]:
    """Context manager: what is traced stands where `eqn` did: its line, named scopes, mesh and compute device."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


@contextlib.contextmanager
def tracing(failure: str, expected: str = "") -> Iterator[None]:
    """Context manager: an exception becomes an InputError that says what failed and why, and what was expected.

    Args:
      failure: what failed, such as "audit: loss does not trace".
      expected: what was expected instead.
    """
    try:
        yield
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        message = f"{failure} with these arguments ({type(error).__name__}: {first})"
        raise InputError(f"{message}; expected {expected}" if expected else message) from error
