"""Finds the modules that a config file imports from its own folder.

A run records their sources. Does not import JAX.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def local_imports(source: str, file: str) -> dict[str, str]:
    """Returns the sources of all modules that a Python file imports from its own folder or below, by module name.

    Includes imports of the imported modules and imports inside functions. Finds them without importing anything. Omits
    jaxmp and installed packages, whose versions a run records.

    Args:
      source: text of the Python file.
      file: its path.
    """
    folder = Path(file).resolve().parent
    found: dict[str, str] = {}
    waiting = [(source, "")]
    while waiting:
        for name in _imported(*waiting.pop()):
            spec = None if name in found else _spec(name)
            if spec is None or not _is_local(spec, folder):
                continue
            found[name] = _text(spec) or ""
            is_package = spec.submodule_search_locations is not None
            waiting.append((found[name], name if is_package else name.rpartition(".")[0]))
    return dict(sorted(found.items()))


def _imported(source: str, package: str) -> Iterator[str]:
    """Yields all names that may be modules in the imports of a file of `package`, and their parent packages."""
    with contextlib.suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                with contextlib.suppress(ImportError):  # a relative import outside a package
                    base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    names = [f"{base}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _spec(name: str) -> ModuleSpec | None:
    """Returns the spec of a module, whether it has been imported or not; None if it cannot be found."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    above = name.rpartition(".")[0]
    if spec is not None or not above:
        return spec or PathFinder.find_spec(name)
    package = _spec(above)
    inside = None if package is None else package.submodule_search_locations
    return None if inside is None else PathFinder.find_spec(name, inside)


def _is_local(spec: ModuleSpec, folder: Path) -> bool:
    file = Path(spec.origin or "").resolve()
    installed = (Path(__file__).parents[1], sysconfig.get_path("stdlib"))
    return (
        file.suffix == ".py"
        and file.is_relative_to(folder)
        and not {"site-packages", "dist-packages"} & set(file.parts)
        and not any(file.is_relative_to(path) for path in installed)
    )


def _text(spec: ModuleSpec) -> str | None:
    try:
        return Path(spec.origin or "").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
