"""Converts any config value to JSON that is the same in every process. A run is named after the hash of this JSON.

`repr` is not suitable: that of a function contains an address, that of an array is abbreviated, and that of a Flax
module depends on the version of Flax.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import linecache
import operator
import os
import sys
import types
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.trees import is_key


def canonical(value: Any, where: str) -> Any:
    """Converts `value` to JSON, such that equal values give equal JSON in any process, and different values do not.

    - Numbers are compared by value, those of NumPy too: 1 equals 1.0 and np.int64(1). Modules
      that a function holds go by their name.
    - dtypes are represented by their name; arrays by dtype, shape and a digest of their bytes.
    - Dataclasses and Flax modules are represented by class and fields; a value with `to_canonical`, by the JSON
      that it returns.
    - Named functions are represented by module, qualified name, and the values in their closure and defaults. Their
      bodies are not compared.
    - Lambdas are represented by their source code, and the values in their closure and defaults.

    Args:
      value: a tree of dataclasses, Flax modules, named tuples, mappings, sequences, sets and leaves.
      where: path of `value` in the config, for error messages.

    Raises:
      InputError: a value cannot be identified in another process, such as an open file or an object of a plain class.
    """
    return _canonical(value, where, ())


def _canonical(value: Any, where: str, within: tuple[Any, ...]) -> Any:
    """Implements `canonical`. `within` holds the enclosing functions, so that recursion into itself ends."""

    def part(name: str, of: Any) -> Any:
        return _canonical(of, f"{where}{name}", within)

    dtype = _as_dtype(value)
    if dtype is not None:
        return dtype
    if isinstance(value, enum.Enum):
        return f"{_name_of(type(value))}.{value.name}"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, complex):
        return {"complex": [_number(value.real), _number(value.imag)]}
    if isinstance(value, bytes):
        return {"bytes": _digest(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, types.ModuleType) and within:  # that a function holds
        return {"module": value.__name__}
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, np.floating) and value.dtype.itemsize <= 8:
        return _number(float(value))
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _array(value)
    if isinstance(value, type):
        return _name_of(value)
    if hasattr(type(value), "to_canonical"):  # what stands for something else, such as a run
        return value.to_canonical()
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        if _is_linen(value):
            del fields["parent"]  # set only while a module is bound to another
            if fields["name"] is None:
                del fields["name"]
        return {"class": _name_of(type(value))} | {name: part(f".{name}", of) for name, of in fields.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": _name_of(type(value))} | {
            name: part(f".{name}", getattr(value, name)) for name in value._fields
        }
    if isinstance(value, (list, tuple)):
        return [part(f"[{index}]", of) for index, of in enumerate(value)]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: part(f"[{key!r}]", value[key]) for key in sorted(value)}
        return {"items": sorted(([part("", key), part(f"[{key!r}]", of)] for key, of in value.items()), key=repr)}
    if isinstance(value, Set):
        return {"set": sorted((part("", of) for of in value), key=repr)}
    if callable(value):
        return _function(value, where, within)
    raise _no_identity(value, where)


def _as_dtype(value: Any) -> str | None:
    """Returns "float16" for `np.float16`, `jnp.float16` and `np.dtype("float16")`; None if `value` is not a dtype."""
    if isinstance(value, np.dtype):
        return value.name
    # jnp.float16 has a class of its own, which is not a subclass of np.generic.
    if isinstance(value, type(jnp.float16)) or (isinstance(value, type) and issubclass(value, np.generic)):
        with contextlib.suppress(TypeError):  # an abstract one, such as np.floating: a class like any other
            return jnp.dtype(value).name
    return None


def _number(value: float) -> Any:
    """Converts a float to JSON: 1.0 becomes 1, since a config may use either; inf and NaN become strings."""
    if not np.isfinite(value):
        return {"float": repr(float(value))}
    return int(value) if value.is_integer() and abs(value) <= 2**53 else float(value)


def _array(value: Any) -> Any:
    dtype = value.dtype
    if is_key(value):
        value = jax.random.key_data(value)
    value = np.asarray(value)
    return {"array": dtype.name, "shape": list(value.shape), "sha256": _digest(np.ascontiguousarray(value).tobytes())}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _name_of(value: Any) -> str:
    """The module and name of a class or function; jaxmp's own without the module, so that a file can be moved."""
    name = getattr(value, "__qualname__", None) or value.__name__
    return f"jaxmp.{name}" if value.__module__.startswith("jaxmp.") else f"{value.__module__}.{name}"


def _is_linen(value: Any) -> bool:
    linen = sys.modules.get("flax.linen")  # if it is not imported, there is no Linen module
    return linen is not None and isinstance(value, linen.Module)


def _function(value: Any, where: str, within: tuple[Any, ...]) -> Any:
    if isinstance(value, functools.partial):
        parts = {"partial": value.func, "arguments": value.args, "keywords": value.keywords}
        return {name: _canonical(of, f"{where} ({name})", within) for name, of in parts.items()}
    if isinstance(value, types.MethodType):
        return {"method": value.__func__.__qualname__, "of": _canonical(value.__self__, f"{where} (self)", within)}
    if not isinstance(value, types.FunctionType):
        if hasattr(value, "__wrapped__"):  # jax.jit, jax.custom_jvp, functools.lru_cache: the function is inside
            return _canonical(value.__wrapped__, where, within)
        if not _is_reachable(value):
            raise _no_identity(value, where)
        return _name_of(value)
    if value in within:
        return {"recursive": value.__qualname__}
    within = (*within, value)
    # Private values in a library function (sentinels, decorators) are identified by the name of the function.
    opaque_is_fine = _is_reachable(value)

    def held(name: str, of: Any) -> Any:
        try:
            return _canonical(of, f"{where} ({name})", within)
        except InputError:
            if opaque_is_fine:
                return _name_of(type(of))
            raise

    code = value.__code__
    identity: dict[str, Any] = {"function": _name_of(value)}
    if value.__name__ == "<lambda>":
        identity["code"] = _code_of_lambda(value, where)
    if value.__closure__:
        cells = zip(code.co_freevars, value.__closure__, strict=True)
        identity["closure"] = {name: held(name, _contents(cell)) for name, cell in cells}
    if value.__defaults__:
        names = code.co_varnames[: code.co_argcount][-len(value.__defaults__) :]
        identity["defaults"] = {name: held(name, of) for name, of in zip(names, value.__defaults__, strict=True)}
    if value.__kwdefaults__:
        identity.setdefault("defaults", {}).update({k: held(k, of) for k, of in sorted(value.__kwdefaults__.items())})
    return identity if len(identity) > 1 else identity["function"]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable of the enclosing function that is not assigned yet
        return None


def _is_reachable(value: Any) -> bool:
    """Returns whether a function can be looked up by its name in its module, so that the name identifies it."""
    try:
        name = getattr(value, "__qualname__", None) or value.__name__
        found = operator.attrgetter(name)(sys.modules[value.__module__])
    except (AttributeError, KeyError):
        return False
    return found is value or inspect.unwrap(found) is value


def _code_of_lambda(function: Callable[..., Any], where: str) -> str:
    """Returns the source of a lambda without layout and comments, which is stable between Python versions."""
    code = function.__code__
    source = function.__globals__.get("__source__") or "".join(linecache.getlines(code.co_filename))
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:  # not Python: the lines of a notebook's magic
        nodes = iter(())
    found = {ast.unparse(n) for n in nodes if isinstance(n, ast.Lambda) and n.lineno == code.co_firstlineno}
    if len(found) != 1:
        raise InputError(
            f"{where}: a lambda {'without source' if not found else 'on one line with another'} cannot be identified "
            f"(line {code.co_firstlineno} of {code.co_filename}); give it a name with `def`"
        )
    return found.pop()


def _no_identity(value: Any, where: str) -> InputError:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return InputError(
        f"{where} = {text}: a {_name_of(type(value))} is not the same in the next process, so that a run with it "
        "could not be named or rebuilt; expected numbers, strings, tuples, dicts, arrays, functions, frozen "
        "dataclasses or Flax modules"
    )
