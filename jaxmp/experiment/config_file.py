"""`ConfigFile`: a Python file with `get_config() -> Experiment`, and what the command line changes in it.

Finding and listing configs needs no JAX; running one does.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import linecache
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmp.errors import InputError, nearest

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    from jaxmp.experiment.experiment import Experiment


def folders() -> list[Path]:
    """Where configs are looked for by name: `./configs`, then those that come with jaxmp."""
    package = Path(__file__).parents[1]
    shipped = package / "configs"  # in the wheel; in a checkout they stand beside the package
    return [Path("configs"), shipped if shipped.is_dir() else package.parent / "configs"]


def available() -> dict[str, Path]:
    """The configs that can be named, by name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("[!_]*.py")):
            found.setdefault(path.stem, path)
    return found


@dataclass(frozen=True)
class ConfigFile:
    """The source of a config, from a file or from a run folder that kept it."""

    name: str
    """the file's name without `.py`; run folders stand under it"""
    source: str
    """the text of the file"""
    file: str
    """the file's path, for `__file__` and for messages"""

    @classmethod
    def find(cls, config: str) -> ConfigFile:
        """The config that a command line names: the path of a Python file, or a bare name.

        Raises:
          InputError: there is none, or it is no text.
        """
        path = Path(config)
        if path.suffix != ".py" and len(path.parts) == 1:
            configs = available()
            if config not in configs:
                places = " and ".join(str(folder) for folder in folders())
                raise InputError(
                    f"config {config!r}: no {config}.py in {places}; expected one of {', '.join(sorted(configs))}, "
                    f"or the path of a Python file{nearest(config, configs)}"
                )
            path = configs[config]
        try:
            return cls(path.stem, path.read_text(encoding="utf-8"), str(path.resolve()))
        except FileNotFoundError:
            raise InputError(f"config {config!r}: no such file{_nearest_file(path)}") from None
        except (IsADirectoryError, UnicodeDecodeError) as error:
            raise InputError(f"config {config!r}: expected a Python file ({error})") from None

    @property
    def docstring(self) -> str:
        """The record at the top of the file, read without running it; "" where there is none."""
        try:
            return ast.get_docstring(ast.parse(self.source)) or ""
        except (SyntaxError, ValueError):  # ValueError: a null byte
            return "(not Python)"

    def experiment(self, overrides: Sequence[str] = ()) -> Experiment:
        """Runs the file's `get_config()`, and applies command-line overrides to what it returns.

        Raises:
          InputError: the file raises (the message has its line), or returns something else.
        """
        from jaxmp.experiment.experiment import Experiment

        module = self._run()
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            names = [name for name, value in vars(module).items() if isinstance(value, types.FunctionType)]
            raise InputError(
                f"config {self.file}: expected a function get_config() that returns a jaxmp.Experiment"
                f"{nearest('get_config', names)}"
            )
        experiment = self._guarded(get_config)
        if not isinstance(experiment, Experiment):
            raise InputError(
                f"config {self.file}: get_config() returned {experiment!r:.60}, a {type(experiment).__name__}; "
                "expected a jaxmp.Experiment"
            )
        return _changed(experiment, overrides, prog="jaxmp", description="")

    def origin(self, overrides: Sequence[str]) -> dict[str, Any]:
        """How an experiment of this file can be made again, for `fit` to record. Called after `experiment`."""
        from jaxmp.experiment.imports import local_imports

        imports = local_imports(self.source, self.file)
        return {"source": self.source, "file": self.file, "imports": imports, "overrides": list(overrides)}

    def _run(self) -> types.ModuleType:
        # The name is the same in every process, so that the file's own functions and classes keep their identity; the
        # entry in sys.modules and the lines let typing and inspect find their annotations and docstrings. The source
        # stays with the module: the file, and with it those lines, may change.
        module = types.ModuleType(f"jaxmp_configs.{self.name}")
        vars(module).update(__file__=self.file, __source__=self.source)
        sys.modules[module.__name__] = module
        linecache.cache[self.file] = (len(self.source), None, self.source.splitlines(keepends=True), self.file)
        self._guarded(lambda: exec(compile(self.source, self.file, "exec", dont_inherit=True), vars(module)))
        return module

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:
            raise InputError(f"config {self.file} {self._where_and_what(error)}") from error

    def _where_and_what(self, error: BaseException) -> str:
        """The file's own line in which `error` arose, and the error; no lines of anyone else's."""
        what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.file]
        if isinstance(error, SyntaxError) and error.filename == self.file:
            lines, what = [error.lineno], f"{type(error).__name__}: {error.msg}"
        if not lines:
            return f"raised {what}"
        return f"raised in line {lines[-1]}:\n    {linecache.getline(self.file, lines[-1] or 0).strip()}\n{what}"


def override(experiment: Any, arguments: Sequence[str], *, prog: str = "jaxmp", description: str = "") -> Any:
    """A dataclass (an Experiment) with leaves changed by arguments such as `--optimizer.learning-rate 3e-4`.

    What no argument names stays the very object that it was.

    Raises:
      InputError: a value that the dataclass refuses, or one that another field leaves without effect.
      SystemExit: 2 after a message about an argument that cannot be read, 0 after `--help`.
    """
    changed = _changed(experiment, arguments, prog=prog, description=description)
    _refuse_without_effect(changed, {argument.partition("=")[0].replace("_", "-") for argument in arguments})
    return changed


def _refuse_without_effect(experiment: Any, names: set[str]) -> None:
    """Raises an InputError where one of the fields named, `--loop.epochs`, has no effect in `experiment`.

    Of a field in the file that cannot be known: it may be there for another command line.
    """
    steps = getattr(getattr(experiment, "loop", None), "steps", None)
    if steps is not None and "--loop.epochs" in names:
        raise InputError(
            f"--loop.epochs: without effect beside loop.steps = {steps}; expected one of the two, or --loop.steps None"
        )
    kind = getattr(getattr(experiment, "scaler", None), "kind", None)
    takes = {"static": {"--scaler.kind", "--scaler.init-scale"}, "none": {"--scaler.kind"}}
    idle = {name for name in names if name.startswith("--scaler.")} - takes.get(str(kind), names)
    if idle:
        raise InputError(f"{', '.join(sorted(idle))}: without effect where scaler.kind = {kind}; expected dynamic")


def _changed(experiment: Any, arguments: Sequence[str], *, prog: str, description: str) -> Any:
    if not arguments:
        return experiment
    import tyro

    try:
        return tyro.cli(
            type(experiment),
            default=experiment,
            args=arguments,
            prog=prog,
            description=description,
            registry=_registry(),
        )
    except _Refused as refused:
        raise refused.error from None


class _Refused(Exception):
    """Carries an InputError past tyro, which makes its own message of every ValueError."""

    def __init__(self, error: InputError):
        self.error = error


def _registry() -> ConstructorRegistry:
    """How tyro is to treat dataclasses that have a value already, and functions."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructTypeInfo

    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def replace_what_changed(info: StructTypeInfo) -> StructConstructorSpec | None:
        # tyro would call the class with the fields it knows: a Linen module would lose its name, and an untouched
        # subtree would be built anew.
        nonlocal asking
        default = info.default
        if asking or isinstance(default, type) or not dataclasses.is_dataclass(default):
            return None
        asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False

        def replace(**fields: Any) -> Any:
            changed = {name: value for name, value in fields.items() if value is not getattr(default, name)}
            for name, value in changed.items():  # tyro makes a list of what is annotated as a Sequence
                if isinstance(value, list) and isinstance(getattr(default, name), tuple):
                    changed[name] = tuple(value)
            try:
                return dataclasses.replace(info.default, **changed) if changed else default
            except InputError as error:
                raise _Refused(error) from error

        replace.__doc__ = type(default).__doc__
        return dataclasses.replace(spec, instantiate=replace) if isinstance(spec, StructConstructorSpec) else None

    @registry.primitive_rule
    def show_functions_by_name(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if not _holds_functions(info):
            return None

        def refuse(arguments: list[str]) -> Any:
            raise ValueError(f"{arguments[0]!r} given, but a function or class is set in the config file")

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{set in the file}",
            instance_from_str=refuse,
            is_instance=callable,
            str_from_instance=lambda function: [_plain_name(function)],
        )

    return registry


def _holds_functions(info: PrimitiveTypeInfo) -> bool:
    """Whether values of the type are functions, classes or dtypes: shown by name, and not to be typed in."""
    kind = info.type_origin or info.type
    if kind is collections.abc.Callable or kind is type:
        return True
    if not isinstance(kind, type) or dataclasses.is_dataclass(kind):
        return False
    return any("__call__" in vars(base) for base in kind.__mro__)


def _plain_name(function: Any) -> str:
    while not hasattr(function, "__name__"):
        inner = getattr(function, "__wrapped__", getattr(function, "func", None))  # jax.jit, functools.partial
        if inner is None:
            return type(function).__name__
        function = inner
    return getattr(function, "__qualname__", None) or function.__name__


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor folder {str(folder)!r})"
    return nearest(path.name, [other.name for other in folder.glob("*.py")])
