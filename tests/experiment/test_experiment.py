"""An Experiment: what it refuses, its JSON and its hash."""

import ast
import dataclasses
import functools
import json
import math
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

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
    NoScaler,
    Parallel,
    Scaling,
    StaticScaler,
)
from jaxmp.experiment.canonical import canonical
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.reachable import made_by
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP


class Block(nn.Module):
    """A module inside another."""

    width: int = 8
    """Width."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width)(x))


class Net(nn.Module):
    """A model with a field that holds several values."""

    features: Sequence[int] = (4, 5)
    """Widths."""

    @nn.compact
    def __call__(self, x):
        return x


def load(split, rows=4):
    return {"image": np.zeros((rows, 2)), "label": np.zeros(rows, int)}


def experiment(**fields):
    return Experiment(**({"model": Net(), "data": Arrays(load), "optimizer": Adam(schedule=CosineDecay())} | fields))


# What an Experiment is and refuses.


def test_precision_is_refused_where_it_is_written_and_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'mixed_float16'"):
        experiment(precision="mixed_flaot16")
    with pytest.raises(InputError, match=r"str\(policy\)"):
        experiment(precision=experiment().policy)


def test_a_class_in_the_place_of_an_instance_is_refused():
    with pytest.raises(InputError, match=r"model = MLP: expected an instance, MLP\(\.\.\.\)"):
        experiment(model=MLP)


OPTIMIZER = r"Adam\(1e-3\) or another of jaxmp's, an optax transformation, .*such a make\(steps\)"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model", 3, "a Flax Linen module; of NNX, jaxmp.from_nnx"),
        ("data", "mnist", r"TFDS\(name=...\), Arrays\(load\)"),
        ("task", "classification", r"Classification\(\)"),
        ("optimizer", "adam", OPTIMIZER),
        ("optimizer", 1e-2, OPTIMIZER),
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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mode", "pjit", r"parallel.mode = 'pjit': expected jit or pmap; did you mean 'jit'\?"),
        ("shard", "zero2", r"parallel.shard = 'zero2': expected replicated or zero1 or fsdp; did you mean 'zero1'\?"),
        ("remat_policy", "dot_saveable", r"= 'dot_saveable': expected nothing_saveable or .*mean 'dots_saveable'\?"),
        ("remat", ["@Block"], r"parallel.remat = \['@Block'\]: expected a tuple of patterns"),
        ("remat", (nn.Dense,), "parallel.remat = .*: expected a tuple of patterns"),
    ],
)
def test_what_no_step_can_be_distributed_by_is_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        Parallel(**{field: value})


def test_an_optax_transformation_is_named_by_all_that_it_was_made_of():
    def with_decay(decay):
        return optax.chain(optax.scale_by_adam(), lambda_decay(decay), optax.scale(-1e-3))

    def lambda_decay(decay):
        def update(updates, state, params):
            return jax.tree.map(lambda u, p: u + decay * p, updates, params), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    values = [
        *(optax.adam(1e-3), optax.adam(2e-3), optax.adam(1e-3, b1=0.8), optax.sgd(1e-3)),
        *(optax.adam(optax.cosine_decay_schedule(1e-3, steps)) for steps in (10, 20)),
        *(lambda steps: optax.adam(optax.linear_schedule(1.0, 0.0, steps)), with_decay(0.1), with_decay(0.2)),
    ]
    hashes = [experiment(optimizer=value).hash for value in values]
    assert len(set(hashes)) == len(values)
    assert experiment(optimizer=optax.adam(1e-3)).hash == hashes[0]
    assert made_by(experiment(optimizer=with_decay(0.1))) == made_by(experiment(optimizer=with_decay(0.1)))
    assert any("lambda_decay" in name for name in made_by(experiment(optimizer=with_decay(0.1))))
    with pytest.raises(InputError, match="is not the same in the next process"):
        experiment(optimizer=optax.GradientTransformation(optax.sgd(1.0).init, Unnamed().update)).to_json()


class Unnamed:
    """What an object without fields holds is not known."""

    def update(self, updates, state, params=None):
        return updates, state


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


def test_moving_a_file_of_jaxmp_changes_no_hash(monkeypatch):
    before = Experiment(model=MLP(), data=Arrays(load))
    expected = before.hash
    for kind in (MLP, Arrays, Classification, Adam, Loop, Scaling):
        monkeypatch.setattr(kind, "__module__", "jaxmp.another_room.another_file")
    assert before.hash == expected
    monkeypatch.setattr(MLP, "__module__", "mine")
    assert before.hash != expected


def test_no_two_classes_of_jaxmp_that_a_config_can_hold_have_one_name():
    homes = {}
    rooms = ("precision", "data", "models", "modules", "scaling", "training", "tasks", "experiment")
    for path in (path for room in rooms for path in (Path(jaxmp.__file__).parent / room).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            is_part = isinstance(node, ast.ClassDef) and (
                any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
                or any(ast.unparse(base).endswith("Module") for base in node.bases)
            )
            if is_part and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(path.name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
