"""An Experiment: what it refuses, its JSON and hash, config files and overrides."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp import (
    Adam,
    Arrays,
    Classification,
    ConstantRate,
    CosineDecay,
    DynamicScaler,
    Experiment,
    InputError,
    Loop,
    NoScaler,
    Parallel,
    Scaling,
    StaticScaler,
)
from jaxmp.experiment import config_file
from jaxmp.experiment.canonical import canonical
from jaxmp.experiment.config_file import ConfigFile, override
from jaxmp.models.mlp import MLP


class Block(nn.Module):
    """A module inside another."""

    width: int = 8
    """Width."""
    rate: float | None = None
    """Dropout."""
    activation: Callable[..., Any] = nn.relu
    """Activation."""
    dtype: Any = jnp.float32
    """dtype."""

    @nn.compact
    def __call__(self, x):
        return self.activation(nn.Dense(self.width)(x))


class Net(nn.Module):
    """All kinds of fields."""

    blocks: tuple[nn.Module, ...] = (Block(), Block(width=9))
    """Blocks."""
    first: Any = Block(name="first")
    """First block."""
    features: Sequence[int] = (4, 5)
    """Widths."""
    kernel: tuple[int, int] = (3, 3)
    """Kernel."""
    bias: bool = True
    """Bias."""
    label: str = "a"
    """Label."""

    @nn.compact
    def __call__(self, x):
        return x


def load(split, rows=4):
    return {"image": np.zeros((rows, 2)), "label": np.zeros(rows, int)}


def experiment(**fields):
    return Experiment(**({"model": Net(), "data": Arrays(load), "optimizer": Adam(schedule=CosineDecay())} | fields))


def leaves(value, path=()):
    """(path, value) of every leaf below a dataclass, as the command line spells it."""
    if dataclasses.is_dataclass(value):
        of_flax = ("parent", "name") if isinstance(value, nn.Module) else ()
        for field in dataclasses.fields(value):
            if field.name not in of_flax:
                yield from leaves(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, tuple) and any(dataclasses.is_dataclass(part) for part in value):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, str(index)))
    else:
        yield path, value


def at(value, path):
    for name in path:
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


# Where any other number or word will not do.
OTHERS = {
    "precision": "float32",
    "scaler.kind": "dynamic",
    "scaler.backoff_factor": 0.25,
    "parallel.mode": "pmap",
    "parallel.shard": None,  # another than replicated contradicts the other mode
    "parallel.remat_policy": "dots_saveable",
    "loop.accumulate_overflow": "microbatch",
    "loop.batch_norm": "replica",
    "loop.mode": "min",
    "loop.ema_decay": 0.5,
    "data.version": "1.0.0",
    "data.images": None,  # a tuple, where it is set
}


def another(path, value):
    """Another valid value of a leaf; None where it is no scalar."""
    if ".".join(path) in OTHERS:
        return OTHERS[".".join(path)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.5
    return {str: "other", type(None): 7}.get(type(value))


def overridable(experiment):
    """(path, the arguments that give it another value, that value) of every scalar leaf."""
    for path, value in leaves(experiment):
        new = another(path, value)
        *above, name = (part.replace("_", "-") for part in path)
        if isinstance(value, bool):
            yield path, ["--" + ".".join([*above, name if new else f"no-{name}"])], new
        elif new is not None:
            yield path, ["--" + ".".join([*above, name]), str(new)], new


# What an Experiment is and refuses.


def test_precision_is_refused_where_it_is_written_and_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'mixed_float16'"):
        experiment(precision="mixed_flaot16")
    with pytest.raises(InputError, match=r"str\(policy\)"):
        experiment(precision=experiment().policy)


def test_a_class_in_the_place_of_an_instance_is_refused():
    with pytest.raises(InputError, match=r"model = MLP: expected an instance, MLP\(\.\.\.\)"):
        experiment(model=MLP)


OPTIMIZER = r"Adam\(1e-3\) or another of jaxmp's, .*make\(steps\), which returns an optax transformation"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model", 3, "a Flax Linen module; of NNX, jaxmp.from_nnx"),
        ("data", "mnist", r"TFDS\(name=...\), Arrays\(load\)"),
        ("task", "classification", r"Classification\(\)"),
        ("optimizer", "adam", OPTIMIZER),
        ("optimizer", optax.adam(1e-2), OPTIMIZER),
        ("precision", 3, "a string"),
        ("scaler", "dynamic", r"Scaling\('dynamic'\)"),
        ("parallel", "pmap", "Parallel"),
        ("loop", {"epochs": 1}, r"Loop\(epochs=3\)"),
        ("seed", "1", "a whole number"),
    ],
)
def test_a_part_of_the_wrong_type_is_refused_with_what_to_write(field, value, expected):
    with pytest.raises(InputError, match=rf"^{field} = .{{1,60}}: expected {expected}"):
        experiment(**{field: value})


def test_a_part_of_ones_own_needs_its_methods_alone():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        def make(self, steps):
            return optax.adam(1e-2)

    assert experiment(optimizer=Mine(), scaler=DynamicScaler(), seed=np.int64(3)).hash


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(inputs="xx"), r"task.inputs = 'xx': expected a tuple, \('xx',\)"),
        (lambda: Arrays(load, images="image"), r"data.images is 'image'; expected a tuple, \('image',\)"),
        (lambda: Arrays(load, mean=0.5), r"data.mean is 0.5; expected a tuple, \(0.5,\)"),
        (lambda: Adam(decay="*kernel"), r"Adam.decay = '\*kernel': expected a tuple, \('\*kernel',\)"),
        (lambda: Parallel(remat="*"), r"parallel.remat = '\*': expected a tuple, \('\*',\)"),
    ],
)
def test_one_value_in_the_place_of_several_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_32_bits_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        experiment(seed=seed)


def test_numbers_that_no_scaler_takes_are_refused():
    with pytest.raises(InputError, match="power of two"):
        Scaling(init_scale=1000.0)
    with pytest.raises(InputError, match=r"scaler\.kind = 'dynamc'.*did you mean 'dynamic'"):
        Scaling("dynamc")


@pytest.mark.parametrize(
    ("precision", "kind", "scaler"),
    [
        ("mixed_float16", "auto", DynamicScaler(init_scale=8.0)),
        ("float16", "auto", DynamicScaler(init_scale=8.0)),
        ("mixed_bfloat16", "auto", NoScaler()),
        ("float32", "auto", NoScaler()),
        ("float32", "dynamic", DynamicScaler(init_scale=8.0)),
        ("mixed_float16", "static", StaticScaler(8.0)),
        ("mixed_float16", "none", NoScaler()),
    ],
)
def test_auto_scales_dynamically_where_anything_computes_in_float16(precision, kind, scaler):
    assert experiment(precision=precision, scaler=Scaling(kind, init_scale=8.0)).make_scaler() == scaler


def test_defaults_of_a_dynamic_scaler_stand_in_one_place():
    assert Scaling().make(experiment().policy) == DynamicScaler()


# JSON and hash.


def test_a_precision_has_one_hash_however_it_is_spelled():
    spellings = ["mixed_float16", "p=f32,c=f16,o=f32", " 16-mixed", "p=f32, c=float16,o=full"]
    assert len({Experiment(model=MLP(), precision=text).hash for text in spellings}) == 1


def test_float64_is_refused_where_jax_has_none():
    with pytest.raises(InputError, match="JAX_ENABLE_X64=1"):
        Experiment(model=MLP(), precision="f64")


def test_a_static_scale_is_bounded_by_no_dynamic_scaler():
    assert Scaling(kind="static", init_scale=2.0**25).make(jaxmp.parse_policy("mixed_float16")).scale == 2.0**25


def test_json_is_json():
    assert json.loads(json.dumps(experiment().to_json(), allow_nan=False)) == experiment().to_json()


def test_hash_leaves_out_seed_and_devices_and_nothing_else():
    same = {"seed": 3, "parallel": dataclasses.replace(experiment().parallel, mode="pmap")}
    assert experiment(**same).hash == experiment().hash
    assert experiment(**same).to_json() != experiment().to_json()
    assert len(experiment().hash) == 12


CONFIG = '''
"""A config with functions of every kind."""
import functools
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxmp import Arrays, Experiment

def loader(rows):
    def load(split, shape=(4, 4), *, dtype=np.uint8):
        return {"image": np.zeros((rows, *shape), dtype), "label": np.zeros(rows, int)}
    return load

class Net(nn.Module):
    activation: object = nn.relu
    initializer: object = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    table: object = None
    dtype: object = jnp.bfloat16

    @nn.compact
    def __call__(self, image):
        return nn.Dense(2)(image.reshape(image.shape[0], -1))

def get_config():
    scale = 3.0
    return Experiment(
        model=Net(activation=lambda x: jax.nn.gelu(x) * scale, table=np.arange(3)),
        data=Arrays(functools.partial(loader(8), shape=(2, 2))),
    )
'''


def hash_in_a_fresh_process(config):
    code = (
        "import sys; from jaxmp.experiment.config_file import ConfigFile; "
        "print(ConfigFile('my', sys.stdin.read(), '/nowhere/my.py').experiment().hash)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=config, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_hash_is_the_same_in_a_fresh_process_and_follows_every_value():
    base = ConfigFile("my", CONFIG, "/somewhere/my.py").experiment()
    assert hash_in_a_fresh_process(CONFIG) == base.hash
    for old, new in [
        ("scale = 3.0", "scale = 4.0"),  # closure of a lambda
        ("gelu(x) *", "silu(x) *"),  # code of a lambda
        ("loader(8)", "loader(9)"),  # closure of a function
        ("shape=(4, 4)", "shape=(4, 5)"),  # default
        ("np.uint8", "np.int8"),  # keyword-only default
        ("shape=(2, 2)", "shape=(2, 3)"),  # partial
        ("np.arange(3)", "np.arange(1, 4)"),  # array
        ("jnp.bfloat16", "jnp.float16"),  # dtype
        ("2.0, ", "1.0, "),  # closure of a library's function
        ("class Net", "class Net2"),
    ]:
        changed = CONFIG.replace(old, new).replace("model=Net(", "model=Net2(" if "Net2" in new else "model=Net(")
        assert changed != CONFIG
        assert ConfigFile("my", changed, "/somewhere/my.py").experiment().hash != base.hash, new


def test_layout_and_comments_do_not_change_the_hash():
    changed = CONFIG.replace("lambda x: jax.nn.gelu(x) * scale", "lambda x: (jax.nn.gelu(x)  # why\n * scale)")
    changed = "# moved down\n\n" + changed.replace("A config with", "A record with")
    base = ConfigFile("my", CONFIG, "/somewhere/my.py").experiment()
    assert ConfigFile("my", changed, "/elsewhere/my.py").experiment().hash == base.hash


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1.0),
        (2.0**15, 32768),
        ([1, 2], (1, 2)),
        (np.float16, jnp.float16),
        (np.dtype("float16"), jnp.float16),
        (jnp.arange(3), np.arange(3, dtype=np.int32)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2, 3}, {3, 2, 1}),
        (jax.jit(load), load),
        (Path("a/b"), "a/b"),
        (Block(parent=None), Block()),
    ],
)
def test_what_means_the_same_is_the_same(first, second):
    assert json.dumps(canonical(first, "x")) == json.dumps(canonical(second, "x"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, True),
        (0, False),
        (0, None),
        (1, "1"),
        (math.inf, -math.inf),
        (math.inf, "inf"),
        (0.1, np.float32(0.1)),
        (np.zeros(2), np.zeros((1, 2))),
        (np.zeros(2, np.int32), np.zeros(2, np.float32)),
        (b"a", b"b"),
        (1j, 2j),
        ({1: 2}, {"1": 2}),
        (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST),
        (jax.random.key(0), jax.random.key(1)),
        (nn.LSTMCell, nn.GRUCell),
        (nn.relu, nn.gelu),
        (ConstantRate(), CosineDecay()),
        (Block(name="a"), Block(name="b")),
        (functools.partial(load, rows=1), functools.partial(load, rows=2)),
        (DynamicScaler().init, DynamicScaler(hysteresis=2).init),
    ],
)
def test_what_differs_differs(first, second):
    assert json.dumps(canonical(first, "x")) != json.dumps(canonical(second, "x"))


def test_functions_of_libraries_have_a_name():
    for module in (jax.nn, jnp, jax.nn.initializers):
        for name in module.__all__ if hasattr(module, "__all__") else dir(module):
            if callable(getattr(module, name)) and not name.startswith("_"):
                assert json.dumps(canonical(getattr(module, name), "x"))


def test_a_function_that_refers_to_itself_is_followed_once():
    def make():
        def countdown(n):
            return n and countdown(n - 1)

        return countdown

    assert canonical(make(), "x") == canonical(make(), "x")


def test_what_cannot_be_hashed_is_refused_with_its_path():
    class Opaque:
        pass

    opaque = Opaque()

    def load(split):
        return opaque

    for where, function in {
        r"data\.load \(opaque\) = ": load,
        r"data\.load \(keywords\)\['rows'\] = ": functools.partial(print, rows=opaque),
        r"data\.load \(self\) = ": types.MethodType(load, opaque),
    }.items():
        with pytest.raises(InputError, match=f"^{where}.*Opaque"):
            _ = experiment(data=Arrays(function)).hash
    with pytest.raises(InputError, match=r"^model\.features\[1\] = .*Opaque"):
        _ = experiment(model=Net(features=(1, opaque))).hash
    with pytest.raises(InputError, match="is not the same in the next process"):
        _ = experiment(model=Net(features=sys)).hash


def test_a_lambda_that_cannot_be_told_from_its_neighbour_is_refused():
    first, _ = (lambda split: 1), (lambda split: 2)
    with pytest.raises(InputError, match="give it a name with `def`"):
        _ = experiment(data=Arrays(first)).hash
    with pytest.raises(InputError, match="without source"):
        _ = experiment(data=Arrays(eval("lambda split: 1"))).hash


# Overrides.


def test_every_scalar_leaf_can_be_overridden_and_changes_the_hash():
    base = experiment()
    paths = set()
    for path, arguments, value in overridable(base):
        changed = override(base, arguments)
        assert at(changed, path) == value, path
        assert at(base, path) != value, path
        assert (changed.hash == base.hash) == (path[0] in ("seed", "parallel") or path == ("loop", "ranges_every")), (
            path
        )
        others = [other for other, _ in leaves(base) if other != path]
        assert all(at(changed, other) is at(base, other) or at(changed, other) == at(base, other) for other in others)
        paths.add(".".join(path))
    assert {"model.blocks.1.width", "model.first.rate", "optimizer.schedule.warmup_steps", "model.bias"} <= paths
    assert {"precision", "seed", "scaler.kind", "loop.steps", "data.batch_size", "task.label_smoothing"} <= paths


def test_tuples_and_optional_fields_can_be_overridden():
    changed = override(
        experiment(model=Net(first=Block(rate=0.5))),
        "--model.features 1 2 3 --model.kernel 5 7 --model.first.rate None".split()
        + "--data.mean 0.1 0.2 --optimizer.decay *".split(),
    )
    assert changed.model.features == (1, 2, 3)
    assert changed.model.kernel == (5, 7)
    assert changed.model.first.rate is None
    assert changed.data.mean == (0.1, 0.2)
    assert changed.optimizer.decay == ("*",)


def test_an_override_keeps_all_else_the_names_of_modules_included():
    base = experiment()
    changed = override(base, ["--model.first.width", "77"])
    assert changed.model.first.name == "first"
    assert changed.model.first.activation is nn.relu
    assert changed.data is base.data
    assert changed.optimizer is base.optimizer
    assert changed.model.first.width == 77
    assert override(base, []) is base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer.learning-rat 1", "--optimizer.learning-rate"),
        ("--optimizer.learning-rate fast", "could not convert string to float: 'fast'"),
        ("--model.first.width 1.5", "invalid literal for int"),
        ("--loop.mode best", "max"),
        ("--model.kernel 3", "Expected 2 values"),
        ("--model.first.activation gelu", "set in the config file"),
    ],
)
def test_an_override_that_cannot_be_read_is_one_message_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        override(experiment(), arguments.split())
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--precision flaot32", "did you mean 'float32'"),
        ("--seed -1", "seed"),
        ("--scaler.init-scale 3", "power of two"),
        ("--optimizer.learning-rate -1", "learning_rate = -1.0: expected 0 or a positive number"),
        ("--data.batch-size 0", "1 or more"),
        ("--loop.epochs 0", "at least 1"),
    ],
)
def test_an_override_that_is_refused_is_an_input_error(arguments, message):
    with pytest.raises(InputError, match=message):
        override(experiment(), arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loop.steps 20 --loop.epochs 3", "--loop.epochs: without effect beside loop.steps = 20"),
        (
            "--scaler.kind static --scaler.growth-interval=5",
            "--scaler.growth-interval: without effect .*scaler.kind = static",
        ),
        ("--scaler.kind none --scaler.init_scale 8", "--scaler.init-scale: without effect .*scaler.kind = none"),
    ],
)
def test_an_override_without_effect_is_refused_but_not_in_a_run_that_recorded_it(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        override(experiment(), arguments.split())
    assert ConfigFile.find(str(write(tmp_path, SMALL))).experiment(arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "--loop.steps None --loop.epochs 3",
        "--loop.steps 3",
        "--scaler.kind static --scaler.init-scale 8",
        "--scaler.kind dynamic --scaler.growth-interval 5",
        "--scaler.growth-interval 5",
    ],
)
def test_an_override_with_effect_is_taken_whatever_the_file_says_beside_it(arguments):
    base = experiment(loop=Loop(epochs=7, steps=20) if "None" in arguments else Loop(epochs=7))
    assert override(base, arguments.split()).hash != base.hash


# Config files.


def write(folder, text, name="my.py"):
    path = folder / name
    path.write_text(text)
    return path


SMALL = (
    "from jaxmp import *\nfrom jaxmp.models.mlp import MLP\n\ndef get_config():\n    return Experiment(model=MLP())\n"
)


def test_a_config_is_found_by_path_and_by_name_in_the_working_folder_first(tmp_path, monkeypatch):
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    for folder in (shipped, own / "configs"):
        folder.mkdir(parents=True)
        write(folder, SMALL, "same.py")
    write(shipped, SMALL, "other.py")
    monkeypatch.chdir(own)
    monkeypatch.setattr(config_file, "folders", lambda: [Path("configs"), shipped])
    assert Path(ConfigFile.find("same").file) == own / "configs" / "same.py"
    assert Path(ConfigFile.find("other").file) == shipped / "other.py"
    assert Path(ConfigFile.find("configs/same.py").file) == own / "configs" / "same.py"
    assert sorted(config_file.available()) == ["other", "same"]
    with pytest.raises(InputError, match="did you mean 'other'"):
        ConfigFile.find("othr")
    with pytest.raises(InputError, match=r"no such file.*did you mean 'same\.py'"):
        ConfigFile.find("configs/sme.py")
    with pytest.raises(InputError, match="no such file"):
        ConfigFile.find("nowhere/same.py")


def test_a_config_that_raises_is_one_message_with_its_own_line(tmp_path):
    path = write(tmp_path, SMALL.replace("MLP()", "MLP(featurs=3)"))
    with pytest.raises(InputError) as error:
        ConfigFile.find(str(path)).experiment()
    assert str(error.value).startswith(
        f"config {path} raised in line 5:\n    return Experiment(model=MLP(featurs=3))\n"
    )
    assert "TypeError" in str(error.value) and "featurs" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1:\n    def get_config"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "SystemExit"),
        (SMALL.replace("model=MLP()", "model=MLP(), precision='flaot32'"), "did you mean 'float32'"),
        (SMALL.replace("get_config", "get_confg"), r"expected a function get_config\(\).*did you mean 'get_confg'"),
        (
            SMALL.replace("Experiment(model=MLP())", "3"),
            r"get_config\(\) returned 3, a int; expected a jaxmp.Experiment",
        ),
        (SMALL.replace("get_config()", "get_config(seed)"), "missing 1 required positional argument"),
        ("\0", "null bytes"),
    ],
)
def test_a_config_that_cannot_be_used_is_an_input_error(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        ConfigFile.find(str(write(tmp_path, text))).experiment()


def test_a_file_that_is_no_text_is_an_input_error(tmp_path):
    (tmp_path / "my.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected a Python file"):
        ConfigFile.find(str(tmp_path / "my.py"))


def test_docstrings_of_configs_are_read_without_running_them(tmp_path):
    path = write(tmp_path, '"""The record.\n\nMore."""\nraise RuntimeError\n')
    assert ConfigFile.find(str(path)).docstring.splitlines()[0] == "The record."
    assert ConfigFile.find(str(write(tmp_path, "def"))).docstring == "(not Python)"


def test_classes_and_annotations_of_a_config_are_its_own(tmp_path):
    # String annotations are looked up in the module, and so are the docstrings that --help shows.
    text = (
        "from __future__ import annotations\nimport flax.linen as nn\n"
        + SMALL
        + ("\nclass Mine(nn.Module):\n    width: int = 3\n    'Width.'\n")
    )
    config = ConfigFile.find(str(write(tmp_path, text.replace("model=MLP()", "model=Mine()"))))
    assert config.experiment(["--model.width", "4"]).model.width == 4


def test_a_config_is_plain_python_whatever_jaxmp_imports_from_the_future():
    text = "def get_config(x: int = 0):\n    raise TypeError(get_config.__annotations__)\n"
    with pytest.raises(InputError, match=r"\{'x': <class 'int'>\}"):
        ConfigFile("my", text, "my.py").experiment()


SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_scalar_leaf_of_every_shipped_config_can_be_overridden(path):
    config = ConfigFile.find(str(path))
    base = config.experiment()
    assert config.docstring
    changes = [change for change in overridable(base) if change[0] != ("loop", "epochs")]  # no effect beside steps
    changed = override(base, [argument for _, arguments, _ in changes for argument in arguments])
    for leaf, _, value in changes:
        assert at(changed, leaf) == value, leaf
    assert len(changes) > 40
