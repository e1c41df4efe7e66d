"""What a run is made by: real edits are found, harmless ones are not, in a file, a notebook and a REPL."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import linecache
import sys
import types
from typing import Any

import jax
import pytest

from jaxmp.experiment.reachable import Comparison, made_by

PROGRAM = '''
"""Models of mine."""
import functools
import numpy as np

SCALE = 2.0
TABLE = {"a": [1, 2], "b": np.arange(3)}


def helper(x, shift=0):
    """Scales."""
    return x * SCALE + shift


def adding(n):
    def add(x):
        return x + n

    return add


def wrapping(f):
    @functools.wraps(f)
    def wrapper(*args):
        return f(*args) + 1

    return wrapper


@wrapping
def wrapped(x):
    return x * x


plus = adding(4)
STAGES = [helper, lambda x: x - 1]


class Base:
    def inherited(self, x):
        return x / 2


class Net(Base):
    width = 3

    @property
    def depth(self):
        return 5

    def __call__(self, x, k=1):
        x = self.inherited(helper(x)) + TABLE["a"][0] + wrapped(x) + plus(x)
        return np.sum(x) * self.depth + k + sum(stage(x) for stage in STAGES)


def unused(x):
    return x
'''

EDITS: dict[str, tuple[str, str, bool]] = {
    "body": ("return np.sum(x) * self.depth", "return np.max(x) * self.depth", True),
    "helper": ("return x * SCALE + shift", "return x / SCALE + shift", True),
    "constant": ("SCALE = 2.0", "SCALE = 3.0", True),
    "number in the code": ("x * x", "x * x * 2", True),
    "default": ("x, k=1", "x, k=2", True),
    "default of a helper": ("shift=0", "shift=1", True),
    "closure": ("adding(4)", "adding(5)", True),
    "base class": ("return x / 2", "return x / 3", True),
    "wrapper": ("f(*args) + 1", "f(*args) + 2", True),
    "what is wrapped": ("x * x", "x * x * x", True),
    "container": ('{"a": [1, 2]', '{"a": [1, 3]', True),
    "array in a container": ("np.arange(3)", "np.arange(1, 4)", True),
    "function in a container": ("lambda x: x - 1", "lambda x: x - 2", True),
    "attribute of the class": ("width = 3", "width = 4", True),
    "property": ("return 5", "return 6", True),
    "comment": ("    width = 3\n", "    # a width\n    width = 3  # three\n", False),
    "docstring": ('"""Scales."""', '"""Scales, and shifts."""', False),
    "docstring of the file": ('"""Models of mine."""', '"""Models of mine: 0.97."""', False),
    "white space": ("return x * SCALE + shift", "return (x *   SCALE\n            + shift)", False),
    "unused function": ("def unused(x):\n    return x\n", "def unused(x):\n    return x + 1\n", False),
    "unused import": ("import functools\n", "import functools\nimport textwrap\n", False),
    "place in the file": ("SCALE = 2.0\n", "\n\n\nSCALE = 2.0\n", False),
}


@dataclasses.dataclass
class Made:
    model: Any


_number = itertools.count()


def run(program: str, place: str, tmp_path: Any) -> dict[str, Any]:
    """Runs a program as a file does, a notebook's cell or a REPL, and describes what its Net is made by."""
    module = types.ModuleType("mine")
    sys.modules["mine"] = module
    name = {"file": str(tmp_path / "mine.py"), "notebook": f"<ipython-input-{next(_number)}>", "REPL": "<stdin>"}[place]
    linecache.cache.pop(name, None)
    if place == "file":
        (tmp_path / "mine.py").write_text(program)
    if place == "notebook":
        linecache.cache[name] = (len(program), None, program.splitlines(keepends=True), name)
    exec(compile(program, name, "exec", dont_inherit=True), vars(module))
    return made_by(Made(module.Net()))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("place", ["file", "notebook", "REPL"])
def test_real_edits_are_found_and_harmless_ones_raise_no_alarm(place, edit, tmp_path):
    old, new, is_real = EDITS[edit]
    assert old in PROGRAM
    if place == "REPL" and edit == "docstring":
        pytest.skip("a REPL keeps no text, and bytecode has its docstring")
    before, after = run(PROGRAM, place, tmp_path), run(PROGRAM.replace(old, new), place, tmp_path)
    assert bool(Comparison(before, after).changed) == is_real


def test_a_text_that_is_not_what_runs_is_not_trusted(tmp_path):
    """A file that was edited after it was imported: the function goes by its bytecode."""
    before = run(PROGRAM, "file", tmp_path)
    module = sys.modules["mine"]
    (tmp_path / "mine.py").write_text(PROGRAM.replace("return x * SCALE", "return x / SCALE"))
    linecache.checkcache()
    now = made_by(Made(module.Net()))
    assert "syntax" in before["mine.helper"] and "bytecode" in now["mine.helper"]


def test_what_differs_is_named(tmp_path):
    before = run(PROGRAM, "file", tmp_path)
    after = run(PROGRAM.replace("SCALE = 2.0", "SCALE = 3.0"), "file", tmp_path)
    assert Comparison(before, after).changed == ["mine.SCALE"]


def test_installed_packages_go_by_version_and_nothing_within_them(tmp_path):
    made = run(PROGRAM, "file", tmp_path)
    assert set(made["numpy"]) == {"version"} and not any(name.startswith("numpy.") for name in made)
    other = made | {"numpy": {"version": "1.0"}}
    assert Comparison(other, made).packages == [f"numpy {made['numpy']['version']} (was 1.0)"]


def test_bytecode_of_another_python_is_unknown_rather_than_changed(tmp_path):
    made = run(PROGRAM, "REPL", tmp_path)
    other = made | {"mine.helper": {"bytecode": "0" * 16, "python": "3.9"}}
    compared = Comparison(other, made)
    assert compared.unknown == ["mine.helper"] and compared.changed == []


def load(source: str) -> types.ModuleType:
    """Runs a program as a notebook's cell."""
    module, name = types.ModuleType("mine"), f"<ipython-input-{next(_number)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec", dont_inherit=True), vars(module))
    return module


COUNTING = """
CACHE, CALLS = {}, 0

def load(split):
    global CALLS
    CALLS += 1
    CACHE[split] = CALLS
    return CACHE[split]
"""


def test_what_the_program_itself_fills_is_no_constant():
    module = load(COUNTING)
    before = made_by(Made(module.load))
    assert module.load("train") == module.CALLS == 1
    assert made_by(Made(module.load)) == before


@pytest.mark.parametrize(
    "around", [jax.jit, functools.lru_cache, lambda f: functools.partial(f, 1), lambda f: [f], lambda f: {"f": f}]
)
def test_ones_own_code_is_found_inside_what_installed_code_returned(around):
    made = made_by(Made(around(load(PROGRAM).helper)))
    assert "syntax" in made["mine.helper"] and "mine.SCALE" in made


OTHER = "SCALE = 3\n\ndef rows(x):\n    return x * SCALE\n\ndef others(x):\n    return x\n"


@pytest.mark.parametrize(
    "text",
    [
        "import mine_too\n\ndef load(split):\n    return mine_too.rows(split)\n",
        "def load(split):\n    import mine_too\n    return mine_too.rows(split)\n",
        "def load(split):\n    from mine_too import rows\n    return rows(split)\n",
    ],
)
def test_modules_of_ones_own_are_followed_by_what_is_taken_of_them(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    results = []
    for other in (OTHER, OTHER.replace("SCALE = 3", "SCALE = 4"), OTHER.replace("return x\n", "return -x\n")):
        (tmp_path / "mine_too.py").write_text(other)
        sys.modules.pop("mine_too", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        results.append(made_by(Made(load(text).load)))
    sys.modules.pop("mine_too", None)
    assert Comparison(results[0], results[1]).changed == ["mine_too.SCALE"]
    assert Comparison(results[0], results[2]).changed == []
