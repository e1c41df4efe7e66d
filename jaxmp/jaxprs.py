"""Where an equation of a jaxpr stands: in which module, on which line, in the forward or the backward pass."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Not public, and used to read alone: the line of the user's code.
from jax._src import source_info_util

QUANTIZE = "quantize_"
"""how the scope begins around the equations that round to an emulated format; its name follows"""
LOSS_SCALE = "loss_scale"
"""scope around the multiplication of the loss by the loss scale"""

_NO_MODULES = {"checkpoint", "closed_call", "rematted_computation", "shard_map", LOSS_SCALE}
_LOOP = re.compile(r"(?<![^/])while/(body|cond)(?![^/])/?")  # as the compiled program has a scan
_CALLS = ("jit", "pjit", "pmap", "xla_pmap")
_OWN = os.path.dirname(__file__) + os.sep
_OWN_MODELS = tuple(os.path.join(_OWN, room) + os.sep for room in ("models", "tasks"))


def scopes(eqn: Any, outer: str = "") -> str:
    """The name stack of an equation, below that of the equations around it."""
    return "/".join(filter(None, (outer, str(eqn.source_info.name_stack))))


def module_path(names: str) -> str:
    """The path of modules and scopes in a name stack, the class of the model first: `transpose(jvp(Net))/head`
    is Net/head.

    Methods other than `__call__` (`LSTMCell_0.scan_fn`) are left out, and so are the functions that JAX names.
    """
    parts: list[str] = []
    previous_wrapped = False
    for part in _LOOP.sub("", names).split("/"):
        name, wrapped = part, False
        while name.endswith(")") and "(" in name:
            transform, name = name[:-1].split("(", 1)
            wrapped = True
            if transform in _CALLS:
                name = ""
        name = name.partition(".")[0]
        # Under remat the backward pass names the outermost scope twice, and a method stands before its module.
        repeated = parts and parts[-1] == name and (not wrapped or previous_wrapped)
        if name and not repeated and name not in _NO_MODULES and not name.startswith(QUANTIZE):
            parts.append(name)
        previous_wrapped = wrapped
    return "/".join(parts)


def quantized(names: str) -> str:
    """The emulated format that a name stack says an equation rounds to, or ""."""
    found = re.findall(rf"{QUANTIZE}([\w-]+)", names)
    return found[-1] if found else ""


def is_scaling(names: str) -> bool:
    """Whether an equation multiplies the loss by the loss scale, or transposes that."""
    return LOSS_SCALE in re.split(r"[/()]", names)


def is_backward(names: str) -> bool:
    """Whether the equation was made by transposition: a cotangent, or something on the way to one."""
    return "transpose(" in names and "rematted_computation" not in names


def source_line(eqn: Any) -> str:
    """file:line of the innermost frame that is in no library, else of the innermost one."""
    innermost = None
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        if not in_library(frame.file_name):
            return f"{frame.file_name}:{frame.start_line}"
        innermost = innermost or frame
    return f"{innermost.file_name}:{innermost.start_line}" if innermost else ""


@functools.cache
def in_library(file: str) -> bool:
    """Whether a file belongs to an installed package, or to jaxmp but for its models: not to what is looked at."""
    if file.startswith(_OWN):
        return not file.startswith(_OWN_MODELS)
    return any(f"{os.sep}{name}{os.sep}" in file for name in ("site-packages", "dist-packages"))


def bare(jaxpr: Any) -> Any:
    """A jaxpr without its constants; one class in JAX 0.12, two before."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A jaxpr and its constants."""
    return bare(jaxpr), list(getattr(jaxpr, "consts", ()))


def functions(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds, without their constants."""
    for parameter in eqn.params.values():
        for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            if hasattr(bare(inner), "eqns"):
                yield bare(inner)


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the operands of a scan, of these parameters, are the same in each turn, and how many are carried."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries = (len(group) for group in params["ft_in"].unpack()[:2])  # JAX 0.12 keeps the structure instead
    return consts, carries
