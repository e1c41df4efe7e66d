"""What a run is made by: the code and the values that can be reached from an experiment, as far as not installed.

`made_by(experiment)` follows the globals, closures, defaults, wrapped functions, base classes and containers that the
code of model, task, optimizer, data, and so on names. A function goes by its syntax tree without docstrings, if
compiling its text gives the bytecode that runs; else (after an edit, or without a text) by the bytecode. Constants and
arrays go by value, installed packages by version.

Not seen: what is looked up by a name that is computed (`getattr`), files that are read, and what is patched into
installed packages. A container that the code itself fills (a cache, a counter) is no constant, and is left out.
"""

from __future__ import annotations
import __future__

import ast
import collections
import contextlib
import dataclasses
import datetime
import dis
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import linecache
import numbers
import operator
import pathlib
import re
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmp.errors import InputError
from jaxmp.experiment.canonical import canonical

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MUTATORS = frozenset("append extend insert remove pop clear add discard update setdefault popitem sort".split())
_FUTURE = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
"""the compiler flags of all `from __future__ import ...`"""


def made_by(experiment: Any) -> dict[str, Any]:
    """What an experiment is made by, as JSON by name; equal where the same program makes it.

    Each name has one of {"syntax": digest}, {"bytecode": digest, "python": "3.11"}, {"value": JSON} and
    {"version": "1.2.3"}. A value inside an object that an installed package made has "in": the package as well.
    """
    walk = _Walk()
    for field in dataclasses.fields(experiment):
        walk.part(getattr(experiment, field.name), field.name)
    walk.package("jaxmp")
    return dict(sorted(walk.result().items()))


def made_by_function(function: Any) -> dict[str, Any]:
    """What the result of a function depends on, as JSON by name: as `made_by`, for one function and what it reaches."""
    walk = _Walk()
    walk.visit(function, "function")
    walk.package("jaxmp")
    return dict(sorted(walk.result().items()))


class Comparison:
    """What differs between two results of `made_by`.

    Attributes:
      changed: names of the functions and values that differ, or that only one of the two reaches.
      packages: those of installed packages of another version, `numpy 2.0 (was 1.26)`.
      unknown: names of functions that are kept as bytecode of another version of Python.
    """

    def __init__(self, recorded: Mapping[str, Any], now: Mapping[str, Any]):
        self.changed: list[str] = []
        self.packages: list[str] = []
        self.unknown: list[str] = []
        other = {name for name in {*recorded, *now} if _version_of(recorded, name) != _version_of(now, name)}
        for name in sorted({*recorded, *now}):
            was, is_ = recorded.get(name), now.get(name)
            if was == is_ or (was or is_ or {}).get("in") in other:  # the package itself is named
                continue
            if "version" in (was or is_ or {}):
                if was and is_:
                    self.packages.append(f"{name} {is_['version']} (was {was['version']})")
            elif was and is_ and _not_comparable(was, is_):
                self.unknown.append(name)
            else:
                self.changed.append(name if was and is_ else f"{name} ({'new' if is_ else 'not reached any more'})")


def _version_of(made: Mapping[str, Any], name: str) -> Any:
    return made.get(name, {}).get("version")


def _not_comparable(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether both are kept as bytecode of two versions of Python, or one as that of another than this."""
    versions = {of.get("python", PYTHON) for of in (was, now)}
    return len(versions) > 1


class _Walk:
    """One walk over everything that can be reached."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.mutated: set[str] = set()  # names of those that code changes
        self.seen: dict[int, tuple[Any, str]] = {}  # by id: the object, so that no id is used twice, and its name
        self.count: collections.Counter[str] = collections.Counter()  # of functions that one `def` or lambda made
        self.inside: str | None = None  # the package inside whose objects the walk is

    def result(self) -> dict[str, Any]:
        return {name: of for name, of in self.found.items() if not any(_is_within(name, each) for each in self.mutated)}

    def part(self, value: Any, name: str) -> None:
        """Visits what a part of an experiment is made by; its own numbers are in the experiment's JSON."""
        if isinstance(value, type) or not _is_plain(value):
            if isinstance(value, Mapping):
                for key, of in value.items():
                    self.part(of, f"{name}[{key!r}]")
            elif isinstance(value, (list, tuple)):
                for index, of in enumerate(value):
                    self.part(of, f"{name}[{index}]")
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                self.visit(type(value), name)
                for field in dataclasses.fields(value):
                    if field.init and field.name not in ("parent", "name"):
                        self.part(getattr(value, field.name, None), f"{name}.{field.name}")
            else:
                self.visit(value, name)

    def visit(self, value: Any, name: str) -> None:
        """Notes a value that is called `name`, and all that can be reached from it."""
        if not isinstance(value, (types.ModuleType, type)) and _is_plain(value):
            if isinstance(value, enum.Enum):  # its name is no value
                self.visit(type(value), f"{name}.__class__")
            self.constant(value, name)
            return
        if id(value) not in self.seen:
            self.seen[id(value)] = value, name
            known = self.new(value, name) or name
            self.seen[id(value)] = value, known
        _, known = self.seen[id(value)]
        if known != name and not isinstance(value, types.ModuleType):  # which of those that can be reached it is
            package, _, installed = known.partition(":")
            inside = {"in": package} if installed and "version" in self.found.get(package, {}) else {}
            self.note(name, {"value": f"is {known}"} | inside)

    def new(self, value: Any, name: str) -> str | None:
        """Notes a value that was not seen before. Returns its name if it has one of its own."""
        if isinstance(value, types.ModuleType):
            self.module(value)
            return None
        if isinstance(value, type):
            return self.a_class(value)
        if _is_code(value):
            return self.function(value, name)
        if isinstance(value, enum.Enum):
            self.visit(type(value), f"{name}.__class__")
            self.note(name, {"value": f"{type(value).__qualname__}.{value.name}"})
        elif isinstance(value, Mapping):
            for key, of in value.items():
                self.visit(of, f"{name}[{key!r}]")
            self.note(name, {"value": f"{type(value).__name__} of {len(value)}"})
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            parts = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            for index, of in enumerate(parts):
                self.visit(of, f"{name}[{index}]")
            self.note(name, {"value": f"{type(value).__name__} of {len(value)}"})
        else:
            self.an_object(value, name)
        return None

    def note(self, name: str, entry: Any) -> None:
        self.found.setdefault(name, entry | ({"in": self.inside} if self.inside else {}))

    @contextlib.contextmanager
    def within(self, module: str | None) -> Iterator[None]:
        """Context manager: what is noted is a part of what an installed module made; None for one's own."""
        before, self.inside = self.inside, None
        if module is not None:
            self.package(module)
            top = module.partition(".")[0]
            self.inside = top if top in self.found else None
        try:
            yield
        finally:
            self.inside = before

    def constant(self, value: Any, name: str) -> None:
        try:
            self.note(name, {"value": canonical(value, name)})
        except InputError:
            told = f" {value!r}" if isinstance(value, _BY_REPR) else ""
            self.note(name, {"value": f"a {type(value).__qualname__}{told}"})

    def package(self, name: str) -> None:
        """Notes the version of the installed package of a module."""
        top = name.partition(".")[0]
        version = _version(top)
        if version is not None:
            self.found.setdefault(top, {"version": version})

    def module(self, module: types.ModuleType) -> None:
        """Notes an installed module; of one's own, what code names of it is visited one by one."""
        if is_installed(module.__name__):
            self.package(module.__name__)

    def an_object(self, value: Any, name: str) -> None:
        kind = type(value)
        self.visit(kind, f"{name}.__class__")
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name")]
            changing = set()
        elif isinstance(value, types.SimpleNamespace) or not is_installed(kind.__module__):
            slots = [slot for base in kind.__mro__ for slot in _slots(base)]
            names, changing = sorted({*getattr(value, "__dict__", {}), *slots}), _changed_attributes(kind)
        else:
            names = [field for field, of in sorted(getattr(value, "__dict__", {}).items()) if _is_code(of)]
            changing = set()
        own = dataclasses.is_dataclass(value) or not is_installed(kind.__module__)
        with self.within(None if own else kind.__module__):
            for field in names:
                if field not in changing and hasattr(value, field):
                    self.visit(getattr(value, field), f"{name}.{field}")

    def a_class(self, kind: type) -> str:
        if is_installed(kind.__module__):
            self.package(kind.__module__)
            return _installed_name(kind)
        where = f"{kind.__module__}.{kind.__qualname__}"
        bases = (*kind.__bases__, type(kind))
        self.note(where, {"value": [_reference(base) for base in bases]})
        for base in bases:
            self.visit(base, _reference(base))
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            if field.default_factory is not dataclasses.MISSING:
                self.visit(field.default_factory, f"{where}.{field.name}")
        for name, member in kind.__members__.items() if issubclass(kind, enum.Enum) else ():
            self.visit(member.value, f"{where}.{name}")
        for name, of in vars(kind).items():
            if isinstance(of, (staticmethod, classmethod)):
                of = of.__func__
            if not _is_code(of) and (name.startswith("__") or _is_kept(kind, name)):
                continue
            if _is_code(of) and (name in _MADE_BY_DATACLASS or issubclass(kind, enum.Enum)) and _is_generated(of):
                continue
            if isinstance(of, property):
                for kind_of, part in (("", of.fget), (".setter", of.fset), (".deleter", of.fdel)):
                    self.visit(part, f"{where}.{name}{kind_of}") if part is not None else None
            elif isinstance(of, functools.cached_property):
                self.visit(of.func, f"{where}.{name}")
            elif not isinstance(of, _GENERATED) and not name.startswith("_abc"):
                self.visit(of, f"{where}.{name}")
        return where

    def function(self, value: Any, name: str) -> str:
        """Notes a function. Returns its name: of an installed one, that of the package with it."""
        if isinstance(value, (functools.partial, functools.partialmethod)):
            self.visit(value.func, f"{name}.func")
            self.visit(tuple(value.args), f"{name}.args")
            self.visit(dict(value.keywords), f"{name}.keywords")
            return name
        if isinstance(value, types.MethodType):
            self.visit(value.__func__, f"{name}.__func__")
            self.visit(value.__self__, f"{name}.__self__")
            return name
        if not isinstance(value, types.FunctionType):  # jax.jit, jax.custom_vjp, functools.lru_cache
            with self.within(type(value).__module__):
                self.visit(value.__wrapped__, f"{name}.__wrapped__")
                for field, of in sorted(getattr(value, "__dict__", {}).items()):
                    if field != "__wrapped__" and _is_code(of):  # the rules of a custom derivative
                        self.visit(of, f"{name}.{field}")
            return name
        # Not by what functools.wraps copies to a wrapper.
        module = str(value.__globals__.get("__name__"))
        if is_installed(module):
            with self.within(module):
                self.parts_of_installed(value, name)
            return _installed_name(value)
        if value.__code__.co_filename.startswith("<string>"):  # what dataclass makes: its fields are seen
            return name
        where = f"{module}.{value.__code__.co_qualname}"
        self.count[where] += 1
        where = where if self.count[where] == 1 else f"{where} ({self.count[where]})"
        self.seen[id(value)] = value, where  # before what it names is visited: it may name itself
        with self.within(None):
            changing = self.code(value, where)
            if hasattr(value, "__wrapped__"):
                self.visit(value.__wrapped__, f"{where} wraps")
            for variable, of in _closure(value):
                if variable not in changing:
                    self.visit(of, f"{where} closure {variable}")
            defaults = value.__defaults__ or ()
            names = value.__code__.co_varnames[: value.__code__.co_argcount]
            named = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
            for variable, of in {**named, **(value.__kwdefaults__ or {})}.items():
                if variable not in changing:
                    self.visit(of, f"{where} default {variable}")
        return where

    def parts_of_installed(self, function: types.FunctionType, name: str) -> None:
        """Visits what an installed function holds: one's own code, and numbers that it was made with."""
        if hasattr(function, "__wrapped__"):
            self.visit(function.__wrapped__, f"{name} wraps")
        registry = getattr(function, "registry", None)
        if isinstance(registry, Mapping):  # functools.singledispatch
            for kind, of in registry.items():
                self.visit(of, f"{name} of {getattr(kind, '__qualname__', kind)}")
        for variable, of in _closure(function):
            if _is_code(of) or _is_plain(of) or _holds_code(of):
                self.visit(of, f"{name} closure {variable}")

    def code(self, function: types.FunctionType, where: str) -> set[str]:
        """Notes the code of a function, and visits what it names. Returns its own variables whose values it changes."""
        node, place = syntax_of(function), function.__globals__.get("__name__")
        changing: set[str] = set()
        if node is None:
            digest = hashlib.sha256(repr(_bytecode(function.__code__)).encode()).hexdigest()[:16]
            self.note(where, {"bytecode": digest, "python": PYTHON})
        else:
            digest = hashlib.sha256(ast.dump(node).encode()).hexdigest()[:16]
            self.note(where, {"syntax": digest})
            changing = _mutated(node)
        for module, name, of in _named(function, function.__code__):
            self.visit(of, f"{module}.{name}")
        loaded = _loaded(function.__code__)
        self.mutated |= {f"{place}.{name}" for name in changing if name.partition(".")[0] in loaded}
        self.mutated |= {f"{place}.{name}" for name in _stored(function.__code__, "GLOBAL")}
        return changing | _stored(function.__code__, "DEREF")


def _is_within(name: str, variable: str) -> bool:
    """Whether a name is that of a variable or of a part of its value."""
    return name == variable or name.startswith((f"{variable}[", f"{variable}."))


_GENERATED = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)


def _is_plain(value: Any) -> bool:
    """Whether a value goes by value: a number, text, a dtype, an array."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return True
    return isinstance(value, _BY_REPR) or (hasattr(value, "dtype") and hasattr(value, "shape"))


_BY_REPR = (
    bytearray,
    range,
    slice,
    re.Pattern,
    numbers.Number,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    pathlib.PurePath,
)
"""classes whose instances are told by their repr"""


def _wraps(value: Any) -> bool:
    return callable(value) and isinstance(getattr(value, "__wrapped__", None), types.FunctionType)


def _is_code(value: Any) -> bool:
    kinds = (types.FunctionType, types.MethodType, functools.partial, functools.partialmethod)
    return isinstance(value, kinds) or (not isinstance(value, type) and _wraps(value))


def _holds_code(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_is_code, parts))


def _reference(kind: type) -> str:
    return _installed_name(kind) if is_installed(kind.__module__) else f"{kind.__module__}.{kind.__qualname__}"


def _installed_name(value: Any) -> str:
    """The package and name of an installed function or class, wherever in the package it stands."""
    return f"{str(value.__module__).partition('.')[0]}:{value.__qualname__}"


_MADE_BY_DATACLASS = frozenset(
    "__init__ __repr__ __eq__ __hash__ __lt__ __le__ __gt__ __ge__ __setattr__ __delattr__ __replace__".split()
)


def _is_generated(function: Any) -> bool:
    """Whether a method was made by `dataclass` or another package, around no code of one's own."""
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    if code is not None and code.co_filename.startswith("<string>"):
        return True
    return is_installed(str(getattr(inner, "__module__", None) if code is None else inner.__globals__.get("__name__")))


_KEPT_BY_FLAX = frozenset("parent name scope _state _parent_ref _compact_name_scope_methods".split())
"""what Flax keeps in the classes of modules for itself"""


def _is_kept(kind: type, name: str) -> bool:
    """Whether an attribute of one's own class is a package's, not one's own."""
    return issubclass(kind, enum.Enum) or (name in _KEPT_BY_FLAX and "setup" in dir(kind))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


CONSTRUCTORS = ("__init__", "__new__", "__post_init__", "__setstate__")


def _changed_attributes(kind: type) -> set[str]:
    """The attributes that methods of one's own class change, other than where an instance is made."""
    found: set[str] = set()
    for base in kind.__mro__:
        if is_installed(base.__module__):
            continue
        for name, of in vars(base).items():
            if isinstance(of, types.FunctionType) and name not in CONSTRUCTORS:
                node = syntax_of(of)
                found |= _stored(of.__code__, "ATTR") | (set() if node is None else _mutated(node, attributes=True))
    return found


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module comes with Python, jaxmp or another installed package, and not from a user's own file."""
    if module.partition(".")[0] in sys.stdlib_module_names or module.startswith("jaxmp."):
        return True
    if module == "__main__" or module.startswith("jaxmp_configs."):
        return False
    try:
        found = sys.modules.get(module)
        spec = getattr(found, "__spec__", None) or importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return False
    file = getattr(spec, "origin", None) or getattr(found, "__file__", None)
    if file is None:
        return False
    path = Path(file).resolve()
    installed = (Path(__file__).parents[1].resolve(), Path(sysconfig.get_path("stdlib")).resolve())
    inside = bool({"site-packages", "dist-packages"} & set(path.parts))
    return inside or file in ("built-in", "frozen") or any(path.is_relative_to(folder) for folder in installed)


@functools.cache
def _version(top: str) -> str | None:
    if top in sys.stdlib_module_names:
        return None
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        of = importlib.metadata.packages_distributions().get(top)
        return importlib.metadata.version(of[0]) if of else getattr(sys.modules.get(top), "__version__", None)


# What code names.


def _instructions(code: types.CodeType) -> Iterator[list[dis.Instruction]]:
    yield [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG")]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _named(function: types.FunctionType, code: types.CodeType) -> Iterator[tuple[str, str, Any]]:
    """Yields the globals that code names, and what it takes of one's own modules: module, name, value."""
    variables, missing = function.__globals__, object()
    around = dict(_closure(function))
    for instructions in _instructions(code):
        for index, one in enumerate(instructions):
            if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                value = variables.get(one.argval, missing)
                if value is missing:
                    continue
                if isinstance(value, types.ModuleType):
                    yield from _attributes(value, instructions[index + 1 :])
                else:
                    yield str(variables.get("__name__")), one.argval, value
            elif one.opname == "LOAD_DEREF" and isinstance(module := around.get(one.argval), types.ModuleType):
                yield from _attributes(module, instructions[index + 1 :])
            elif one.opname == "IMPORT_NAME":
                yield from _imported(function, instructions, index)


def _closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of functions around it that a function uses, with what they hold."""
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield variable, cell.cell_contents


def _attributes(module: types.ModuleType, after: list[dis.Instruction]) -> Iterator[tuple[str, str, Any]]:
    yield module.__name__, module.__name__, module
    if is_installed(module.__name__) or not after or after[0].opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return
    value = getattr(module, after[0].argval, None)
    if isinstance(value, types.ModuleType):
        yield from _attributes(value, after[1:])
    elif value is not None:
        yield module.__name__, after[0].argval, value


def _imported(
    function: types.FunctionType, instructions: list[dis.Instruction], index: int
) -> Iterator[tuple[str, str, Any]]:
    """Yields what a function takes from a module that it imports itself, which is imported for it."""
    name = instructions[index].argval
    level = next((one.argval for one in instructions[index - 2 : index] if one.opname == "LOAD_CONST"), 0)
    if level:
        name = importlib.util.resolve_name("." * level + name, function.__globals__.get("__package__") or "")
    if is_installed(name):
        if name in sys.modules:
            yield name, name, sys.modules[name]
        return
    try:
        module = importlib.import_module(name)
    except Exception:  # it is for the run to say so
        return
    names = {one.argval for one in instructions if one.opname in ("IMPORT_FROM", "LOAD_ATTR", "LOAD_METHOD")}
    for attribute in sorted(names):
        if attribute in vars(module):
            yield name, attribute, vars(module)[attribute]


def _stored(code: types.CodeType, what: str) -> set[str]:
    """The variables that code assigns: GLOBAL ones, those of functions around it (DEREF), or attributes (ATTR)."""
    return {
        one.argval
        for instructions in _instructions(code)
        for one in instructions
        if one.opname in (f"STORE_{what}", f"DELETE_{what}")
    }


def _loaded(code: types.CodeType) -> set[str]:
    """The global variables that code reads."""
    return {
        one.argval
        for instructions in _instructions(code)
        for one in instructions
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _mutated(node: ast.AST, *, attributes: bool = False) -> set[str]:
    """The variables, or the attributes, that code fills or changes: `name[...] = `, `name.append(...)`, `name.a = `."""
    found = set()
    for part in ast.walk(node):
        target: Any = None
        if isinstance(part, (ast.Subscript, ast.Attribute)) and isinstance(part.ctx, (ast.Store, ast.Del)):
            target = part.value if isinstance(part, ast.Subscript) else part
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr in MUTATORS:
            target = part.func.value
        names = [] if target is None else _dotted(target)
        if names and attributes:
            found.add(names[-1])
        elif names:
            found.add(".".join(names))
    return found


def _dotted(node: ast.AST) -> list[str]:
    """The names of `a.b[0].c`, without what is in brackets; none if it does not begin with a name."""
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    if isinstance(node, ast.Attribute):
        above = _dotted(node.value)
        return [*above, node.attr] if above else []
    return [node.id] if isinstance(node, ast.Name) else []


# What a function is.


def syntax_of(function: types.FunctionType) -> ast.AST | None:
    """The syntax tree of a function without docstrings; None if no text is known that compiles to its bytecode."""
    code = function.__code__
    for text in _texts(function):
        parsed = _parsed(text, code.co_flags & _FUTURE)
        if parsed is None:
            continue
        module, compiled = parsed
        wanted = _bytecode(code)
        for candidate in compiled:
            if candidate.co_name == code.co_name and _bytecode(candidate) == wanted:
                nodes = [node for node in ast.walk(module) if _first_line(node) == candidate.co_firstlineno]
                nodes = [node for node in nodes if getattr(node, "name", "<lambda>") == code.co_name]
                dumps = {ast.dump(node) for node in nodes}
                if len(dumps) == 1:
                    return nodes[0]
    return None


def _texts(function: types.FunctionType) -> Iterator[str]:
    source = function.__globals__.get("__source__")
    if source:
        yield source
    file = function.__code__.co_filename
    cached = "".join(linecache.getlines(file, function.__globals__))
    if cached:
        yield cached
    if not file.startswith("<"):
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return
        if text != cached:
            yield text


@functools.lru_cache(maxsize=64)
def _parsed(text: str, flags: int) -> tuple[ast.Module, list[types.CodeType]] | None:
    """A module without docstrings, and the code objects that its text compiles to; None if it is no Python."""
    try:
        compiled = compile(text, "<text>", "exec", flags=flags, dont_inherit=True)
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
        if isinstance(node, documented) and body and ast.get_docstring(node, clean=False) is not None:
            del body[0]
    waiting, found = [compiled], []
    while waiting:
        code = waiting.pop()
        found.append(code)
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return module, found


def _first_line(node: ast.AST) -> int | None:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return None
    decorators = getattr(node, "decorator_list", ())
    return min([node.lineno, *(one.lineno for one in decorators)])


def _bytecode(code: types.CodeType) -> tuple[Any, ...]:
    """What a code object does, without file, lines and names of its place."""
    constants = tuple(_bytecode(one) if isinstance(one, types.CodeType) else _constant(one) for one in code.co_consts)
    flags = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, flags)
    return (code.co_name, code.co_code, constants, names, counts, code.co_exceptiontable)


def _constant(value: Any) -> str:
    if isinstance(value, frozenset):
        return repr(sorted(map(_constant, value)))
    if isinstance(value, tuple):
        return repr(tuple(map(_constant, value)))
    return f"{type(value).__name__} {value!r}"
