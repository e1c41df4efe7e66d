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


# A program, an edit of it: the result of `f` differs, without a difference in the code of `f`.
FURTHER_EDITS = {
    "local name like a global": (
        """
config = {'a': 1}
def other():
    config = {}
    config['b'] = 2
    return config
def f(x):
    return x * config['a'] + len(other())
""",
        "'a': 1",
        "'a': 2",
    ),
    "enum": (
        """
import enum
class M(enum.Enum):
    A = 1
def f(x): return x * M.A.value
""",
        "A = 1",
        "A = 2",
    ),
    "intenum": (
        """
import enum
class M(enum.IntEnum):
    A = 1
def f(x): return x * M.A
""",
        "A = 1",
        "A = 2",
    ),
    "custom_vjp bwd": (
        """
import jax
@jax.custom_vjp
def g(x): return x
def fwd(x): return x, None
def bwd(r, d): return (d * 2,)
g.defvjp(fwd, bwd)
def f(x): return g(x)
""",
        "d * 2",
        "d * 3",
    ),
    "custom_jvp": (
        """
import jax
@jax.custom_jvp
def g(x): return x
@g.defjvp
def rule(p, t): return p[0], t[0] * 2
def f(x): return g(x)
""",
        "t[0] * 2",
        "t[0] * 3",
    ),
    "slots": (
        """
class S:
    __slots__ = ('a',)
    def __init__(self): self.a = 1
s = S()
def f(x): return x * s.a
""",
        "self.a = 1",
        "self.a = 2",
    ),
    "what a slot holds": (
        """
class S:
    __slots__ = ('a',)
    def __init__(self, a): self.a = a
s = S(1)
def f(x): return x * s.a
""",
        "S(1)",
        "S(2)",
    ),
    "instance": (
        """
class S:
    def __init__(self, a): self.a = a
s = S(1)
def f(x): return x * s.a
""",
        "S(1)",
        "S(2)",
    ),
    "jitted method": (
        """
import jax
class N:
    __call__ = jax.jit(lambda self, x: x * 2)
f = N()
""",
        "x * 2",
        "x * 3",
    ),
    "partialmethod": (
        """
import functools
class N:
    def g(self, k, x): return x * k
    h = functools.partialmethod(g, 2)
    def __call__(self, x): return self.h(x)
f = N()
""",
        "(g, 2)",
        "(g, 3)",
    ),
    "regex": (
        """
import re
P = re.compile('a+')
def f(x): return P.sub('', x)
""",
        "a+",
        "b+",
    ),
    "date": (
        """
import datetime
P = datetime.date(2020, 1, 1)
def f(x): return P
""",
        "1, 1",
        "1, 2",
    ),
    "path": (
        """
import pathlib
P = pathlib.Path('a')
def f(x): return P
""",
        "'a'",
        "'b'",
    ),
    "range": (
        """
P = range(3)
def f(x): return P
""",
        "range(3)",
        "range(4)",
    ),
    "slice": (
        """
P = slice(3)
def f(x): return P
""",
        "slice(3)",
        "slice(4)",
    ),
    "fraction": (
        """
from fractions import Fraction
P = Fraction(1, 3)
def f(x): return P
""",
        "1, 3",
        "1, 4",
    ),
    "namedtuple": (
        """
from typing import NamedTuple
class P(NamedTuple):
    a: int = 1
p = P()
def f(x): return p.a
""",
        "= 1",
        "= 2",
    ),
    "frozenset": (
        """
P = frozenset(['a', 'b'])
def f(x): return P
""",
        "'b'",
        "'c'",
    ),
    "bytearray": (
        """
P = bytearray(b'ab')
def f(x): return P
""",
        "b'ab'",
        "b'ac'",
    ),
    "deque": (
        """
import collections
P = collections.deque([1, 2])
def f(x): return P
""",
        "1, 2",
        "1, 3",
    ),
    "defaultdict": (
        """
import collections
P = collections.defaultdict(int, a=1)
def f(x): return P
""",
        "a=1",
        "a=2",
    ),
    "mappingproxy": (
        """
import types
P = types.MappingProxyType({'a': 1})
def f(x): return P
""",
        "'a': 1",
        "'a': 2",
    ),
    "simplenamespace": (
        """
import types
P = types.SimpleNamespace(a=1)
def f(x): return P.a
""",
        "a=1",
        "a=2",
    ),
    "dataclass default": (
        """
import dataclasses
@dataclasses.dataclass
class P:
    a: int = 1
    b: list = dataclasses.field(default_factory=lambda: [1])
def f(x): return P().a
""",
        "a: int = 1",
        "a: int = 2",
    ),
    "default_factory": (
        """
import dataclasses
@dataclasses.dataclass
class P:
    b: list = dataclasses.field(default_factory=lambda: [1])
def f(x): return P().b
""",
        "[1]",
        "[2]",
    ),
    "singledispatch": (
        """
import functools
@functools.singledispatch
def g(x): return x
@g.register(int)
def _(x): return x * 2
def f(x): return g(x)
""",
        "x * 2",
        "x * 3",
    ),
    "optax chain": (
        """
import optax
def mine(g, s, p=None): return g, s
f = optax.chain(optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g * 2, s)), optax.scale(1.0))
""",
        "g * 2",
        "g * 3",
    ),
    "optax scale": (
        """
import optax
f = optax.chain(optax.scale(1.0), optax.scale(3.0))
""",
        "3.0",
        "4.0",
    ),
    "classmethod": (
        """
class A:
    @classmethod
    def k(cls): return 2
def f(x): return x * A.k()
""",
        "return 2",
        "return 3",
    ),
    "metaclass": (
        """
class Meta(type):
    def k(cls): return 2
class A(metaclass=Meta): pass
def f(x): return x * A.k()
""",
        "return 2",
        "return 3",
    ),
    "descriptor": (
        """
class D:
    def __get__(self, o, t=None): return 2
class A:
    k = D()
def f(x): return x * A.k
""",
        "return 2",
        "return 3",
    ),
    "object array": (
        """
import numpy as np
P = np.array([1, 'a'], object)
def f(x): return P
""",
        "1, 'a'",
        "2, 'a'",
    ),
    "jit static": (
        """
import jax, functools
@functools.partial(jax.jit, static_argnums=1)
def g(x, k): return x * k
def f(x): return g(x, 2)
""",
        "x * k",
        "x + k",
    ),
    "vmap": (
        """
import jax
def g(x): return x * 2
h = jax.vmap(g)
def f(x): return h(x)
""",
        "x * 2",
        "x * 3",
    ),
    "checkpoint": (
        """
import jax
@jax.checkpoint
def g(x): return x * 2
def f(x): return g(x)
""",
        "x * 2",
        "x * 3",
    ),
    "contextmanager": (
        """
import contextlib
@contextlib.contextmanager
def g():
    yield 2
def f(x):
    with g() as k: return x * k
""",
        "yield 2",
        "yield 3",
    ),
    "vectorize": (
        """
import numpy as np
h = np.vectorize(lambda x: x * 2)
def f(x): return h(x)
""",
        "x * 2",
        "x * 3",
    ),
    "bound method": (
        """
class A:
    def __init__(self, k): self.k = k
    def g(self, x): return x * self.k
f = A(2).g
""",
        "A(2)",
        "A(3)",
    ),
    "alias of an installed function": (
        """
import flax.linen as nn
act = nn.relu
def f(x): return act(x)
""",
        "nn.relu",
        "nn.tanh",
    ),
    "which of two functions": (
        """
def g(x): return x
def h(x): return -x
STAGES = {'a': g, 'b': h}
def f(x): return STAGES['a'](x) + STAGES['b'](2 * x)
""",
        "'a': g, 'b': h",
        "'a': h, 'b': g",
    ),
    "second of two closures": (
        """
def adding(n):
    def add(x): return x + n
    return add
one, two = adding(4), adding(5)
def f(x): return one(two(x))
""",
        "adding(5)",
        "adding(6)",
    ),
    "value of a member": (
        """
import enum
class M(enum.IntEnum):
    A = 1
CHOSEN = M.A
def f(x): return x * CHOSEN
""",
        "A = 1",
        "A = 2",
    ),
}


@pytest.mark.parametrize("edit", FURTHER_EDITS)
def test_an_edit_is_found_wherever_it_can_be_reached(edit):
    source, old, new = FURTHER_EDITS[edit]
    assert source.count(old) == 1
    before, again, after = (made_by(Made(load(text).f)) for text in (source, source, source.replace(old, new)))
    assert Comparison(before, again).changed == [] != Comparison(before, after).changed


CHANGES_ITSELF = {
    "closure": """
def make():
    kept = {}
    def f(x):
        kept[x] = x
        return kept
    return f
f = make()
""",
    "counter": """
def make():
    n = 0
    def f(x):
        nonlocal n
        n += 1
    return f
f = make()
""",
    "default": """
def f(x, kept={}, *, more=[]):
    kept[x] = x
    more.append(x)
""",
    "attribute": """
class Rows:
    def __init__(self):
        self.kept, self.calls = {}, 0
    def read(self, x):
        self.kept[x] = x
        self.calls += 1
READER = Rows()
def f(x):
    READER.read(x)
""",
    "list in a dict": """
KEPT = {"x": []}
def f(x): KEPT["x"].append(x)
""",
    "attribute of a global": """
import types
STATE = types.SimpleNamespace(n=0, kept={})
def f(x):
    STATE.n += 1
    STATE.kept[x] = x
""",
    "generator": """
import numpy as np
RNG = np.random.default_rng(0)
def f(x):
    return RNG.normal()
""",
    "memo": """
import functools
@functools.lru_cache
def g(x): return x
def f(x):
    return g(x)
""",
}


@pytest.mark.parametrize("kind", CHANGES_ITSELF)
def test_what_a_program_changes_as_it_runs_is_no_alarm(kind):
    module = load(CHANGES_ITSELF[kind])
    before = made_by(Made(module.f))
    module.f(1)
    assert Comparison(before, made_by(Made(module.f))).changed == []


def test_a_local_variable_does_not_hide_a_global_of_its_name():
    program = "config = {'a': 1}\ndef g():\n    config = {}\n    config['b'] = 2\ndef f(x): return config['a'], g()\n"
    before, after = (made_by(Made(load(text).f)) for text in (program, program.replace("'a': 1", "'a': 2")))
    assert Comparison(before, after).changed == ["mine.config['a']"]


def test_a_module_that_a_closure_holds_is_followed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine_too", load(OTHER.replace("SCALE = 3", "SCALE = 4")))
    sys.modules["mine_too"].__name__ = "mine_too"
    program = "def make():\n    import mine_too\n    def f(x): return mine_too.rows(x)\n    return f\nf = make()\n"
    assert made_by(Made(load(program).f))["mine_too.SCALE"] == {"value": 4}


FLAX = """
import dataclasses, enum
import flax.linen as nn

class Kind(enum.Enum):
    A = "a"

@dataclasses.dataclass(frozen=True)
class Task:
    kind: Kind = Kind.A

class Net(nn.Module):
    width: int = 3
    _scale = 2.0

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width)(x) * self._scale, Task()

f = Net()
"""


def test_what_flax_and_dataclass_keep_in_classes_of_ones_own_is_left_out():
    made = made_by(Made(load(FLAX).f))
    own = {name.removeprefix("mine.") for name, of in made.items() if name.startswith("mine.") and "in" not in of}
    assert own == {
        *(
            "Kind",
            "Kind.A",
            "Net",
            "Net.width",
            "Net._scale",
            "Net.__call__",
            "Task",
            "Task.kind",
            "Task.kind.__class__",
        ),
    }
    for old, new, name in (("2.0", "3.0", "Net._scale"), ('"a"', '"b"', "Kind.A"), ("int = 3", "int = 4", "Net.width")):
        changed = Comparison(made, made_by(Made(load(FLAX.replace(old, new)).f))).changed
        assert f"mine.{name}" in changed


def test_what_a_package_made_is_compared_under_one_version_of_it_alone():
    program = "import optax\nf = optax.chain(optax.scale(1.0), optax.scale(3.0))\n"
    made = made_by(Made(load(program).f))
    (inside,) = (name for name, of in made.items() if of == {"value": 3, "in": "optax"})
    other = made | {"optax": {"version": "0.1"}, inside: {"value": 4, "in": "optax"}}
    compared = Comparison(other, made)
    assert compared.changed == [] and compared.packages == [f"optax {made['optax']['version']} (was 0.1)"]
