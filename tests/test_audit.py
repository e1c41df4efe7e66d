"""`audit`: FLOPs as counted by hand, each fault found where it is, no alarm where there is none."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.cli import main
from jaxmp.config_file import ConfigFile
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.instruments.audit import audit
from jaxmp.training.build import Training

F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
IMAGES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def of(shape, dtype=F16, **fields):
    return jax.ShapeDtypeStruct(shape, dtype, **fields)


def rules(report):
    return {finding.rule for finding in report.findings}


class MLP(nn.Module):
    dtype: object = F16

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype, name="head")(nn.relu(nn.Dense(16, dtype=self.dtype)(x)))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, dtype=F16)(x)
        x = nn.Conv(8, (3, 3), feature_group_count=4, padding="VALID", kernel_dilation=1, dtype=F16)(x)
        return nn.Dense(3)(x.mean((1, 2)))


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(6, dtype=BF16))(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4), dtype=BF16, name=name)(x) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(F32))
        x += nn.DenseGeneral(8, axis=(-2, -1), dtype=BF16)(jnp.einsum("bhqk,bkhd->bqhd", weights.astype(BF16), v))
        return x + nn.Dense(8, dtype=BF16)(nn.gelu(nn.Dense(32, dtype=BF16)(x)))


def mlp(n):
    return {"float16": 2 * n * (5 * 16 + 16 * 3)}


def cnn(n):
    return {"float16": 2 * n * (16 * 8 * 9 * 4 + 4 * 8 * 9 * 2), "float32": 2 * n * 8 * 3}


def lstm(n):
    return {"bfloat16": 2 * n * 7 * (4 * 6 * 5 + 4 * 6 * 6)}


def transformer(n):
    t, d = 7, 8
    return {"bfloat16": 2 * n * (4 * t * d * d + 2 * t * t * d + 2 * t * d * 32)}


MODELS = {
    "mlp": (MLP(), (2, 5), mlp),
    "cnn": (CNN(), (2, 8, 8, 4), cnn),
    "lstm": (LSTM(), (2, 7, 5), lstm),
    "transformer": (Block(), (2, 7, 8), transformer),
}


def traced(model, shape):
    x = of(shape, F32)
    return jax.eval_shape(model.init, jax.random.key(0), x), x


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_are_those_of_a_hand_count(name):
    model, shape, count = MODELS[name]
    assert audit(model.apply, *traced(model, shape)).dot_flops_by_dtype == count(2)


@pytest.mark.parametrize("name", ["mlp", "lstm", "transformer"])
def test_a_gradient_by_weights_and_inputs_has_three_times_the_flops(name):
    model, shape, count = MODELS[name]
    loss = jax.grad(lambda v, x: jnp.sum(model.apply(v, x).astype(F32)), argnums=(0, 1))
    expected = {dtype: 3 * n for dtype, n in count(2).items()}
    assert audit(loss, *traced(model, shape)).dot_flops_by_dtype == expected


def test_a_gradient_of_strided_and_grouped_convolutions_is_counted_with_its_padding():
    variables, x = traced(CNN(), (2, 8, 8, 4))
    report = audit(jax.grad(lambda v, x: jnp.sum(CNN().apply(v, x).astype(F32))), variables, x)
    first, second, of_input = 16 * 8 * 9 * 4, 4 * 8 * 9 * 2, 16 * 8 * 9 * 2
    assert report.dot_flops_by_dtype == {
        "float16": 2 * 2 * (2 * first + 2 * second + of_input),
        "float32": 3 * 2 * 2 * 8 * 3,
    }


def summed(x):
    return jax.lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None)


def carried(x):
    return jax.lax.scan(lambda c, y: (c + y, None), jnp.zeros((), F16), x)[0]


def used_twice(w, x):
    def loss(w):
        half = w.astype(F16)
        return jnp.sum((jnp.tanh(jnp.tanh(x @ half) @ half)).astype(F32))

    return jax.grad(loss)(w)


X = of((1000,))
PLANTED = [
    ("half accumulation", summed, (X,)),
    ("half accumulation", jnp.cumsum, (X,)),
    ("half accumulation", carried, (X,)),
    ("half accumulation", used_twice, (of((4, 4), F32), of((2, 4)))),
    ("half accumulation", lambda x, i: x.at[i].add(1), (X, of((3,), jnp.int32))),
    ("half exponential", jax.nn.softmax, (X,)),
    ("half loss", jax.grad(lambda x: jnp.mean(x * x)), (X,)),
    ("weakly typed", lambda x: x + 1, (of((), F32, weak_type=True),)),
    ("vanished constant", lambda m, v: m / (jnp.sqrt(v) + 1e-8), (X, X)),
    ("vanished constant", lambda v, g: 0.999 * v + g, (of((9,), BF16), of((9,), BF16))),
    ("host callback", lambda x: jax.pure_callback(lambda y: y, X, x), (X,)),
    ("not donated", jax.jit(lambda s, x: {"a": s["a"] - x, "n": s["n"] + 1}), ({"a": X, "n": of((), jnp.int32)}, X)),
    ("compiles twice", lambda s: {"a": (s["a"] + 1).astype(F32), "n": s["n"]}, ({"a": X, "n": X},)),
]


@pytest.mark.parametrize(("rule", "fn", "args"), PLANTED)
def test_a_planted_fault_is_found_in_its_module_and_line(rule, fn, args):
    scoped = fn if hasattr(fn, "trace") and rule == "not donated" else lambda *a: jax.named_scope("Net/layer")(fn)(*a)
    found = [finding for finding in audit(scoped, *args).findings if finding.rule == rule]
    assert found
    if rule not in ("weakly typed", "not donated", "compiles twice"):
        assert found[0].path.startswith("Net/layer") and Path(__file__).name in found[0].source


def test_a_collective_in_half_is_found_unless_the_policy_asks_for_it():
    mesh, p = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    fn = jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=p("d"), out_specs=p(), check_vma=False)
    assert rules(audit(fn, X)) == {"half collective"}
    report = audit(fn, of((8,), BF16))
    assert rules(report) == {"half collective"}
    report.assert_clean("mixed_bfloat16,reduce=bf16")


def test_float32_dots_are_findings_under_a_half_policy_alone():
    report = audit(MLP(F32).apply, *traced(MLP(F32), (2, 5)))
    report.assert_clean()
    with pytest.raises(AssertionError, match=r"MLP/head at .*:\d+"):
        report.assert_clean("mixed_float16")
    assert len(report.under("head=float32; mixed_float16").findings) == 1


NO_FAULT = {
    "float32 accumulation": lambda x: jnp.dot(x, x, preferred_element_type=F32),
    "maximum": lambda x: jnp.max(x),
    "gradient of a maximum": jax.grad(lambda x: jnp.max(x).astype(F32)),
    "float32 loss": jax.grad(lambda x: jnp.mean(jnp.square(x.astype(F32)))),
    "sum": jnp.sum,
    "relu and where": lambda x: jnp.where(x > 1, jax.nn.relu(x), jnp.maximum(x, 0)),
    "residual": jax.grad(lambda x: jnp.sum((x + jnp.tanh(x)).astype(F32))),
}


@pytest.mark.parametrize("name", NO_FAULT)
def test_no_false_alarm(name):
    audit(NO_FAULT[name], X).assert_clean()


def test_casts_have_a_path_and_a_line():
    (cast, *_) = audit(lambda x: jax.named_scope("Net")(lambda y: y.astype(F16))(x), of((5,), F32)).casts
    assert cast[:4] == ("float32", "float16", 5, "Net") and Path(__file__).name in cast.source


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if "digits" in p.stem else pytest.mark.slow) for p in CONFIGS]
)
@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_the_train_step_of_every_config_is_clean(path, precision):
    experiment = ConfigFile.find(str(path)).experiment()
    image = np.zeros((32, *IMAGES[experiment.data.name]), np.uint8)
    fields = {f.name: getattr(experiment.data, f.name) for f in dataclasses.fields(Arrays(lambda split: {}))[:-1]}
    data = Arrays(**{**fields, "load": lambda split: {"image": image, "label": np.zeros(32, int)}, "batch_size": 8})
    training = Training(dataclasses.replace(experiment, data=data, precision=precision))
    step = training.devices.compile(training.train_step, (0, 0))
    report = audit(step, jax.eval_shape(training.init), training.example, policy=training.experiment.policy)
    report.assert_clean()
    assert list(report.dot_flops_by_dtype) == [precision.removeprefix("mixed_")]


def test_haikus_unscaling_in_float16_is_found():  # B3
    def update(params, x):
        grads = jax.grad(lambda p: jnp.sum((x @ p.astype(F16)).astype(F32)) * 1024.0)(params).astype(F16)
        return params - (grads * (1 / 1024.0)).astype(F32)

    assert rules(audit(update, of((4, 4), F32), of((2, 4)))) == {"half unscaling"}


def test_flaxs_weak_scale_and_unguarded_statistics_are_found():  # B11, B13
    def step(state, x):
        grads = jax.grad(lambda p: jnp.sum(x @ p))(state["params"])
        finite = jnp.all(jnp.isfinite(grads))
        params = jnp.where(finite, optax.apply_updates(state["params"], -grads), state["params"])
        scale = jnp.where(finite, state["scale"], state["scale"] * jnp.float32(0.5))
        return {"params": params, "scale": scale, "mean": 0.9 * state["mean"] + 0.1 * x.mean(0)}

    state = {"params": of((4,), F32), "scale": of((), F32, weak_type=True), "mean": of((4,), F32)}
    report = audit(step, state, of((2, 4), F32))
    found = {(finding.rule, finding.path) for finding in report.findings}
    assert {("weakly typed", "argument 0/scale"), ("compiles twice", "argument 0/scale")} <= found
    assert ("unguarded state", "argument 0/mean") in found
    assert ("unguarded state", "argument 0/params") not in found


def test_what_does_not_trace_is_one_message():
    with pytest.raises(InputError, match="does not trace"):
        audit(lambda x: x @ x, of((2, 3)))


def test_the_command(tmp_path, capsys):
    file = tmp_path / "audit.json"
    assert main(["audit", "digits_mlp", "--precision", "mixed_bfloat16", "--strict", "--json", str(file)]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert list(json.loads(file.read_text())["dot_flops_by_dtype"]) == ["bfloat16"]
