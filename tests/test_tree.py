"""The one rule of the tree, and what follows from it: a file imports from its own folder, or from what stands above."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import jaxmp

PACKAGE = Path(jaxmp.__file__).parent
GROUND = ("errors", "field_docs", "trees", "jaxprs", "text_table")
ROOMS = (
    *("html", "precision", "data", "models", "modules", "scaling", "training", "tasks", "instruments", "testing"),
    *("experiment", "distributed", "runs", "deploy", "reports", "studies", "commands"),
)
TOP = ("cli", "child", "__main__", "__init__")
ORDER = (*GROUND, *ROOMS, *TOP)
"""from the ground up: each may import from those before it"""

DIFFERENTIATES = {"grad", "value_and_grad", "vjp", "linearize", "jvp", "jacrev", "jacfwd", "hessian"}
MAY_DIFFERENTIATE = {
    "training/gradients.py": "the gradient of every objective",
    "instruments/memory.py": "looks at what jax.vjp of a given function keeps, and takes no gradient",
    "precision/autocast.py": "runs the derivative rules of a given function in other dtypes",
}
"""files outside testing/, whose laws differentiate what they are given, and why"""


def files() -> dict[str, Path]:
    """The Python files of the package by their dotted name below it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = path
    return found


parsed = functools.cache(ast.parse)


@functools.cache
def imported(source: str, files: tuple[str, ...]) -> set[str]:
    """The files of jaxmp that a module imports, inside functions and under TYPE_CHECKING too."""

    def file(name: str) -> str | None:
        inside = name.removeprefix("jaxmp").removeprefix(".")
        return next((each for each in (inside, f"{inside}.__init__".lstrip(".")) if each in files), None)

    found: set[str | None] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found |= {file(alias.name) for alias in node.names if alias.name.partition(".")[0] == "jaxmp"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            if str(node.module).partition(".")[0] == "jaxmp":
                found |= {file(f"{node.module}.{alias.name}") or file(str(node.module)) for alias in node.names}
    return {name for name in found if name}


def room(name: str) -> str:
    return name.partition(".")[0]


def violations(sources: dict[str, str]) -> list[str]:
    """What breaks the rule, a line each, of files by name."""
    found = []
    for name, source in sources.items():
        for other in imported(source, tuple(sources)):
            if room(name) != room(other) and ORDER.index(room(other)) > ORDER.index(room(name)):
                found.append(f"{name} imports {other}, which stands below it")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: path.read_text() for name, path in files().items()}


def test_a_file_imports_from_its_own_folder_or_from_what_stands_above_it(sources):
    assert violations(sources) == []


def test_an_import_from_below_is_found_wherever_it_stands(sources):
    for text in (
        "import jaxmp.runs.fit",
        "from jaxmp.runs import fit",
        "from jaxmp.runs.fit import steps",
        "def f():\n    from jaxmp.runs.fit import steps",
        "if TYPE_CHECKING:\n    from jaxmp.runs.fit import steps",
        "import jaxmp",
    ):
        broken = {**sources, "training.step": text}
        assert len(violations(broken)) == 1 + len(violations(sources)), text


def test_no_two_files_import_each_other(sources):
    needs = {name: imported(source, tuple(sources)) for name, source in sources.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(needs[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in needs:
        visit(name, ())


def test_the_top_of_the_package_has_the_ground_floor_the_rooms_and_the_doors():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))} - {"configs"}
    assert there <= set(ORDER)


def test_only_models_modules_and_testing_import_flax(sources):
    for name, source in sources.items():
        names = {
            name
            for node in ast.walk(parsed(source))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        if any(name.partition(".")[0] == "flax" for name in names):
            assert room(name) in ("models", "modules", "testing"), f"{name} imports flax"


def test_a_loss_is_differentiated_in_one_place(sources):
    found = {}
    for name, source in sources.items():
        calls = [
            node.lineno
            for node in ast.walk(parsed(source))
            if isinstance(node, ast.Attribute) and node.attr in DIFFERENTIATES and ast.unparse(node.value) == "jax"
        ]
        if calls and room(name) != "testing":
            found[f"{name.replace('.', '/')}.py"] = calls
    assert set(found) == set(MAY_DIFFERENTIATE), found
