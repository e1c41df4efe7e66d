"""`ConfigFile`: a Python file with `get_config() -> Experiment`.

Finding and listing configs needs no JAX; running one does.
"""

from __future__ import annotations

import ast
import linecache
import sys
import sysconfig
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmp.errors import InputError, nearest

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


def folders() -> list[Path]:
    """The folders in which configs are searched by name: `./configs`, then the one that comes with jaxmp."""
    package = Path(__file__).parents[1]
    shipped = package / "configs"  # in the wheel; in a checkout they stand beside the package
    return [Path("configs"), shipped if shipped.is_dir() else package.parent / "configs"]


def available() -> dict[str, Path]:
    """The path of each config that has a name; `./configs` comes first."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("[!_]*.py")):
            found.setdefault(path.stem, path)
    return found


@dataclass(frozen=True)
class ConfigFile:
    """The source of a config, read from a file or from a run folder."""

    name: str
    """the file's name without `.py`; the folder of its runs has this name"""
    source: str
    """the text of the file"""
    file: str
    """the file's path, for `__file__` and for messages"""

    @classmethod
    def find(cls, config: str) -> ConfigFile:
        """Reads the config that a command line names: the path of a Python file, or a bare name.

        Raises:
          InputError: the file does not exist, or is not text.
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
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
            raise InputError(f"config {config!r}: expected a Python file ({error})") from None

    @property
    def docstring(self) -> str:
        """The docstring of the file, read without running it; "" if it has none."""
        try:
            return ast.get_docstring(ast.parse(self.source)) or ""
        except (SyntaxError, ValueError):  # ValueError: a null byte
            return "(not Python)"

    def experiment(self, overrides: Sequence[str] = ()) -> Experiment:
        """Runs the file's `get_config()` and changes the experiment by recorded command-line arguments.

        Raises:
          InputError: the file raises (the message shows its line), or returns anything but an Experiment.
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
        if not overrides:
            return experiment
        from jaxmp.experiment.overrides import override

        return override(experiment, overrides)

    def origin(self, overrides: Sequence[str]) -> dict[str, Any]:
        """What `fit` records to make the experiment again: source, file, local imports and overrides.

        Call it after `experiment`, so that the modules are found where the file imported them from.
        """
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
        self._import_from_folder()
        linecache.cache[self.file] = (len(self.source), None, self.source.splitlines(keepends=True), self.file)
        self._guarded(lambda: exec(compile(self.source, self.file, "exec", dont_inherit=True), vars(module)))
        return module

    def _import_from_folder(self) -> None:
        """Puts the file's folder in front of the import path, as Python does for a script, for the modules beside it.

        A module of the same name that was imported from another folder is forgotten.
        """
        folder = Path(self.file).parent
        if not folder.is_dir():
            return
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
        beside = {path.stem for path in folder.glob("*.py")}
        beside |= {path.parent.name for path in folder.glob("*/__init__.py")}
        for name, imported in list(sys.modules.items()):
            file = getattr(imported, "__file__", None) if name.partition(".")[0] in beside else None
            if file is None or "__source__" in vars(imported) or _is_installed(file):
                continue
            if not Path(file).is_relative_to(folder):
                del sys.modules[name]

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:
            raise InputError(f"config {self.file} {self._where_and_what(error)}") from error

    def _where_and_what(self, error: BaseException) -> str:
        """The line of the file in which `error` was raised, and the error; lines of other files are left out."""
        import traceback

        what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.file]
        if isinstance(error, SyntaxError) and error.filename == self.file:
            lines, what = [error.lineno], f"{type(error).__name__}: {error.msg}"
        if not lines:
            return f"raised {what}"
        return f"raised in line {lines[-1]}:\n    {linecache.getline(self.file, lines[-1] or 0).strip()}\n{what}"


def _is_installed(file: str) -> bool:
    return "-packages" in file or file.startswith((sysconfig.get_path("stdlib"), str(Path(__file__).parents[1])))


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor folder {str(folder)!r})"
    return nearest(path.name, [other.name for other in folder.glob("*.py")])
