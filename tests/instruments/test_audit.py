"""`audit`: FLOPs as counted by hand, each fault found where it is, no alarm where there is none."""

import dataclasses
import json
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.instruments.audit import audit
from jaxmp.jaxprs import module_path
from jaxmp.models.mlp import MLP as OurMLP
from jaxmp.precision.policy_tree import PolicyTree
from jaxmp.runs.trainer import Trainer

F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


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
    # Of a square: for the gradient of a sum the last product itself is not needed, and is not computed.
    loss = jax.grad(lambda v, x: jnp.sum(model.apply(v, x).astype(F32) ** 2), argnums=(0, 1))
    expected = {dtype: 3 * n for dtype, n in count(2).items()}
    assert audit(loss, *traced(model, shape)).dot_flops_by_dtype == expected


def test_what_is_not_needed_is_not_computed_and_not_counted():
    def loss(w, x):
        return jnp.sum((x @ w).astype(F32)), jnp.cumsum(x @ w, 0)  # the second in the jaxpr alone

    report = audit(lambda w, x: jax.grad(loss, has_aux=True)(w, x)[0], of((4, 3)), of((2, 4)))
    assert report.dot_flops_by_dtype == {"float16": 2 * 2 * 4 * 3} and not report.findings


def test_a_gradient_of_strided_and_grouped_convolutions_is_counted_with_its_padding():
    variables, x = traced(CNN(), (2, 8, 8, 4))
    report = audit(jax.grad(lambda v, x: jnp.sum(CNN().apply(v, x) ** 2)), variables, x)
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
    ("half exponential", jax.nn.logsumexp, (X,)),
    ("half exponential", lambda x: jnp.log(summed(x)), (X,)),
    ("half loss", jax.grad(lambda x: jnp.mean(x * x)), (X,)),
    ("weakly typed", lambda x: x + 1, (of((), F32, weak_type=True),)),
    ("vanished constant", lambda m, v: m / (jnp.sqrt(v) + 1e-8), (X, X)),
    ("vanished constant", lambda m, v: m / jnp.sqrt(v + 1e-8), (X, X)),
    ("vanished constant", lambda v: jax.lax.rsqrt(v + 1e-8), (X,)),
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
    "gradient of a pooling layer": jax.grad(
        lambda x: jnp.sum(nn.max_pool(x.reshape(1, 1000, 1), (2,), (2,)).astype(F32))
    ),
    "scatter to places of its own": lambda x: x.at[jnp.arange(3)].add(1, unique_indices=True),
    "softmax over a short axis": lambda x: jax.nn.softmax(x[:100]),
    "logsumexp over a short axis": lambda x: jax.nn.logsumexp(x[:100]),
    "gradient in half times an array": lambda x: jax.grad(lambda x: jnp.sum(x.astype(F32) ** 2))(x) * x,
    "unscaling in bfloat16": lambda x: jax.grad(lambda x: jnp.sum(x.astype(F32) ** 2))(x.astype(BF16)) * 2.0**-15,
    "derivative forward": lambda x: jax.jvp(lambda x: jnp.mean(x * x), (x,), (x,))[1],
    "residuals of a loop": lambda x: jax.lax.fori_loop(0, 9, lambda i, h: h + jnp.tanh(h), x),
    "a constant that vanishes and divides nothing": lambda x: jnp.log1p(x + 1e-8) / (x + 1),
    "residual": jax.grad(lambda x: jnp.sum((x + jnp.tanh(x)).astype(F32))),
}


@pytest.mark.parametrize("name", NO_FAULT)
def test_no_false_alarm(name):
    audit(NO_FAULT[name], X).assert_clean()


def test_the_gradient_of_a_scalar_in_half_is_no_loss():
    report = audit(jax.grad(lambda s, x: jnp.sum((x * (s * 3)).astype(F32))), of(()), X)
    assert rules(report) == {"half accumulation"}


def test_a_loss_in_half_is_found_once_where_it_is_formed():
    report = audit(jax.grad(lambda x: jnp.sum((jnp.sum(x) * x).astype(F32))), X)
    (found,) = (finding for finding in report.findings if finding.rule == "half loss")
    assert found.times == 1


def test_a_logarithm_of_few_terms_in_half_is_no_finding_of_its_own():
    assert rules(audit(lambda x: jnp.log(summed(x[:100])), X)) == {"half accumulation"}


def test_casts_have_a_path_and_a_line():
    (cast, *_) = audit(lambda x: jax.named_scope("Net")(lambda y: y.astype(F16))(x), of((5,), F32)).casts
    assert cast[:4] == ("float32", "float16", 5, "Net") and Path(__file__).name in cast.source


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[] if p.stem in ("digits_mlp", "digits_cnn") else pytest.mark.slow)
        for p in CONFIGS
    ],
)
@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_the_train_step_of_every_config_is_clean(made_up, path, precision):
    experiment = made_up(ConfigFile.find(str(path)).experiment(), 32)
    if hasattr(experiment.task, "teacher"):
        pytest.skip("needs a teacher's run: audited in test_configs.py")
    trainer = Trainer(dataclasses.replace(experiment, precision=precision))
    step, _ = trainer.program()
    report = audit(step, jax.eval_shape(trainer.init), trainer.batch_spec, policy=trainer.experiment.policy)
    of_loss = [found for found in report.findings if "jaxmp/tasks/ctc.py" in found.source]  # see test_configs.py
    assert list(report.findings) == of_loss and bool(of_loss) == ("ctc" in path.stem)
    expected = {precision.removeprefix("mixed_")} | ({"float32"} if of_loss else set())
    assert set(report.dot_flops_by_dtype) == expected


# Nested functions: a product of 2 * 4 * 4 * 4 FLOPs in each, and where its fault is found.

W, H = of((4, 4)), of((2, 4))
PRODUCT = 2 * 2 * 4 * 4


def product(w, x):
    return x @ w


@jax.custom_jvp
def with_jvp(w, x):
    return product(w, x)


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), product(tangents[0], primals[1])))


@jax.custom_vjp
def with_vjp(w, x):
    return product(w, x)


with_vjp.defvjp(lambda w, x: (product(w, x), (w, x)), lambda kept, g: (kept[1].T @ g, (g @ kept[0].T) @ kept[0]))


def branches(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)


def counted_to(n):
    def loop(w, x):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]

    return loop


def gradient(fn):
    return jax.grad(lambda w, x: jnp.sum(fn(w, x).astype(F32) ** 2), argnums=(0, 1))


MESH = jax.sharding.AbstractMesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
P = jax.sharding.PartitionSpec


def sharded(w, x):
    return jax.shard_map(product, mesh=MESH, in_specs=(P(), P()), out_specs=P("d"), check_vma=False)(w, x)


NESTED = {
    "jit": (jax.jit(product), 1),
    "jit of jit": (jax.jit(jax.jit(product)), 1),
    "vmap": (jax.vmap(product, (None, 0)), 1),
    "cond": (branches, 2),
    "switch": (lambda w, x: jax.lax.switch(1, [lambda: x, lambda: x @ w, lambda: x @ w @ w]), 2),
    "while": (counted_to(5), 1),
    "scan": (lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0], 5),
    "fori": (lambda w, x: jax.lax.fori_loop(0, 5, lambda i, c: c @ w, x), 5),
    "scan of scan": (
        lambda w, x: jax.lax.scan(
            lambda c, _: (jax.lax.scan(lambda c, _: (c @ w, None), c, None, length=3)[0], None), x, None, length=5
        )[0],
        15,
    ),
    "remat": (jax.checkpoint(product), 1),
    "gradient": (gradient(lambda w, x: jnp.tanh(product(w, x))), 3),
    # The forward pass again in the backward pass.
    "gradient of remat": (gradient(jax.checkpoint(lambda w, x: jnp.tanh(product(w, x)))), 4),
    "custom_jvp": (with_jvp, 1),
    "gradient of custom_jvp": (jax.grad(lambda w, x: jnp.sum(with_jvp(w, x).astype(F32) ** 2)), 2),
    "custom_vjp": (with_vjp, 1),
    "gradient of custom_vjp": (gradient(with_vjp), 4),
    "shard_map": (sharded, 8),
    "platform": (
        lambda w, x: jax.lax.platform_dependent(w, x, cpu=lambda w, x: x @ w, default=lambda w, x: x @ w @ w),
        1,
    ),
    "other platform": (lambda w, x: jax.lax.platform_dependent(w, x, cuda=lambda w, x: x @ w @ w, default=product), 1),
}


@pytest.mark.parametrize("name", NESTED)
def test_products_in_nested_functions_are_counted_as_often_as_they_run(name):
    fn, times = NESTED[name]
    if name == "platform" or name == "other platform":
        assert jax.default_backend() == "cpu"
    report = audit(fn, W, H)
    flops = report.dot_flops_by_dtype["float16"]
    assert flops == times * PRODUCT, report.dots
    assert all(Path(__file__).name in dot.source for dot in report.dots)


def test_a_pmapped_function_is_one_that_is_sharded_over_devices():
    # There is one device here; those of `sharded` are on paper.
    assert "shard_map" in str(jax.make_jaxpr(jax.pmap(product, in_axes=(None, 0)))(W, of((1, 2, 4))))
    assert audit(jax.pmap(product, in_axes=(None, 0)), W, of((1, 2, 4))).dot_flops_by_dtype == {"float16": PRODUCT}


def test_a_function_that_is_mapped_over_some_axes_counts_on_those():
    mesh = jax.sharding.AbstractMesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def fn(w, x):
        return jax.shard_map(product, mesh=mesh, in_specs=(P(), P("a")), out_specs=P("a"), axis_names={"a"})(w, x)

    assert audit(fn, W, of((4, 4))).dot_flops_by_dtype == {"float16": 2 * PRODUCT}


def test_what_is_not_counted_is_said():
    assert audit(counted_to(5), W, H).notes == ("the body of a while loop is counted once",)
    assert audit(branches, W, H).notes == ("of a conditional the branch with most FLOPs is counted",)
    call = jax.ffi.ffi_call("kernel", of((2,)))
    assert audit(lambda x: call(x), of((2,))).notes == ("what is inside of ffi_call is not counted",)
    groups = of((2,), jnp.int32)
    assert "ragged dots are not counted" in audit(jax.lax.ragged_dot, of((6, 4)), of((2, 4, 5)), groups).notes


FAULTY = jax.named_scope("layer")(summed)
INSIDE = {
    "jit": lambda x: jax.jit(FAULTY)(x),
    "cond": lambda x: jax.lax.cond(x[0] > 0, lambda: FAULTY(x), lambda: x[0]),
    "while": lambda x: jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (FAULTY(x), c[1] * 2), (x[0], x[1]))[0],
    "the condition of while": lambda x: jax.lax.while_loop(lambda c: c < FAULTY(x), lambda c: c * 2, x[0]),
    "scan": lambda x: jax.lax.scan(lambda c, _: (c, FAULTY(x)), None, None, length=3)[1],
    "remat": lambda x: jax.checkpoint(FAULTY)(x),
    "custom_jvp": lambda x: _custom(jax.custom_jvp, "defjvp", lambda p, t: (FAULTY(p[0]), FAULTY(t[0])))(x),
    "custom_vjp": lambda x: _custom(jax.custom_vjp, "defvjp", lambda x: (FAULTY(x), x), lambda x, g: (g * x,))(x),
    "shard_map": lambda x: jax.shard_map(FAULTY, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)(x),
    "pmap": lambda x: jax.pmap(FAULTY)(x[None]),
}


def _custom(transform, define, *rules):
    fn = transform(FAULTY)
    getattr(fn, define)(*rules)
    return fn


@pytest.mark.parametrize("name", INSIDE)
def test_a_fault_in_a_nested_function_is_found_with_its_scope_and_line(name):
    times = {"scan": 3, "shard_map": 8}
    findings = audit(INSIDE[name], X).findings
    assert [(f.rule, f.path, f.times) for f in findings] == [("half accumulation", "layer", times.get(name, 1))]
    assert Path(__file__).name in findings[0].source


def test_a_fault_in_a_custom_backward_pass_is_found():
    fn = _custom(jax.custom_vjp, "defvjp", lambda x: (jnp.max(x), x), lambda x, g: (FAULTY(x) * x,))
    (finding,) = audit(jax.grad(lambda x: fn(x).astype(F32)), X).findings
    assert finding.rule == "half accumulation" and finding.path.endswith("layer")


def test_a_sum_that_a_while_loop_carries_in_half_is_found():
    def mean(x):
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] + x[c[0]]), (0, jnp.zeros((), F16)))[1]

    (finding,) = audit(mean, X).findings
    assert "a loop carries a sum over its turns in float16" in finding.what


def accumulations(body, outside=lambda h, w: h):
    """What is found in the gradient by a half weight that a scan uses in each turn."""

    def loss(w, x):
        h = jax.lax.scan(lambda h, _: (body(h, w), None), x, None, length=3)[0]
        return jnp.sum(outside(h, w).astype(F32) ** 2)

    return {(f.rule, f.what.split(" in ")[0]) for f in audit(jax.grad(loss), W, H).findings}


def repeated(h, w, times):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=times)[0]


CARRIED = ("half accumulation", "a loop carries a sum over its 3 turns")
ADDED = ("half accumulation", "gradients of a weight's uses add up")


def test_the_gradient_of_a_weight_that_a_scan_uses_is_one_finding_for_each_sum():  # T1
    assert accumulations(lambda h, w: jnp.tanh(h @ w)) == {CARRIED}
    assert accumulations(lambda h, w: jnp.tanh(h @ w), lambda h, w: h @ w) == {CARRIED, ADDED}
    assert accumulations(lambda h, w: jnp.tanh(h @ w), lambda h, w: repeated(h, w, 5)) >= {CARRIED, ADDED}
    assert ADDED in accumulations(lambda h, w: jnp.tanh(h @ w) * (h[::-1] @ w))
    assert accumulations(lambda h, w: jnp.tanh((h @ w.astype(F32)).astype(F16))) == {CARRIED}


def multiplied(w, x):
    """A loss whose two products of one half weight both have an argument as their other operand."""
    half = w.astype(F16)
    return jnp.sum(((x @ half) * (x[::-1] @ half)).astype(F32))


MADE_OF_IT = {
    "itself": lambda w: w,
    "a mask of it": lambda w: w.astype(F16) * jnp.tri(4, dtype=F16),
    "a slice of it": lambda w: jnp.stack([w, w])[1],
}


@pytest.mark.parametrize("made", MADE_OF_IT)
def test_a_weight_that_multiplies_the_batch_itself_twice_is_found(made):
    report = audit(jax.grad(lambda w, x: multiplied(MADE_OF_IT[made](w), x)), of((4, 4), F32), H)
    assert [(f.rule, f.what.split(" in ")[0], f.times) for f in report.findings] == [(*ADDED, 1)]


def test_the_gradients_of_a_weight_that_the_smaller_branch_adds_up_are_found():
    def loss(w, x):
        large = lambda: jnp.sum((x @ w.astype(F16) @ jnp.ones((4, 64), F16)).astype(F32))  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, large, lambda: multiplied(w, x))

    assert [f.what.split(" in ")[0] for f in audit(jax.grad(loss), of((4, 4), F32), H).findings] == [ADDED[1]]


def residual(w, x):
    """The loss of a residual network in half that uses each weight once."""
    h = x.astype(F16) @ w["in"].astype(F16)
    for name in ("first", "second"):
        h += jnp.tanh(h @ (w[name][0] * jnp.tri(4)).astype(F16)) @ w[name][1].astype(F16)
    return jnp.sum(h.astype(F32) ** 2)


def test_a_loop_over_steps_raises_no_alarm_for_residuals_and_counts_what_a_step_adds_up():
    def trained(loss):
        step = jax.jit(lambda w, x: jax.tree.map(lambda p, g: p - g, w, jax.grad(loss)(w, x)))
        return lambda w, xs: jax.lax.scan(lambda w, x: (step(w, x), None), w, xs)[0]

    weights = {"in": of((4, 4), F32), "first": of((2, 4, 4), F32), "second": of((2, 4, 4), F32)}
    xs = of((3, 2, 4), F32)
    audit(jax.grad(residual), weights, of((2, 4), F32)).assert_clean()
    audit(trained(residual), weights, xs).assert_clean()
    (found,) = audit(trained(multiplied), of((4, 4), F32), of((3, 2, 4))).findings
    assert found[:2] == ("half accumulation", "gradients of a weight's uses add up in float16") and found.times == 3


def test_the_residual_of_an_embedding_is_no_sum_of_a_weights_gradients():
    def loss(table, w, tokens):
        h = table[tokens].astype(F16)
        return jnp.sum((h + jnp.tanh(h @ w.astype(F16))).astype(F32))

    audit(jax.grad(loss, (0, 1)), of((9, 4), F32), of((4, 4), F32), of((2,), jnp.int32)).assert_clean()


def test_a_state_without_any_guard_is_no_finding():
    report = audit(lambda state, x: {"a": state["a"] + x, "b": state["b"] * 2}, {"a": X, "b": X}, X)
    assert not report.findings


def test_gradients_and_new_arrays_are_no_state():
    squares = jax.jit(jax.grad(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)))
    audit(squares, {"a": of((3,), F32), "b": of((4,), F32)}).assert_clean()
    audit(jax.jit(lambda p: {"a": 2 * p["a"], "b": -p["b"]}), {"a": X, "b": X}).assert_clean()
    audit(jax.jit(lambda x: x + 1), X).assert_clean()


def test_what_is_handed_on_need_not_be_donated():
    step = jax.jit(lambda s, x: {"a": s["a"] + x, "table": s["table"]})
    (finding,) = audit(step, {"a": X, "table": of((50,), F32)}, X).findings
    assert finding.rule == "not donated" and finding.what.startswith("1 array of 2,000 bytes")


def test_a_decision_outside_guards_what_a_conditional_chooses():
    def step(state, x):
        params, grads = state["params"], jax.grad(lambda p: jnp.sum(x @ p))(state["params"])
        params = jax.lax.cond(jnp.all(jnp.isfinite(grads)), lambda: params - grads, lambda: params)
        return {"params": params, "mean": 0.9 * state["mean"] + x.mean(0)}

    report = audit(step, {"params": of((4,), F32), "mean": of((4,), F32)}, of((2, 4), F32))
    assert [(f.rule, f.path) for f in report.findings] == [("unguarded state", "argument 0/mean")]


def test_what_a_branch_differentiates_and_leaves_out_is_said():
    half = jax.grad(lambda x: jnp.mean(x * x))
    assert "half loss" in rules(audit(lambda x: jax.lax.cond(x[0] > 0, half, jnp.negative, x), X))
    report = audit(lambda w, x: jax.lax.cond(x[0, 0] > 0, counted_to(5), product, w, x), W, H)
    assert "the body of a while loop is counted once" in report.notes


def stablehlo_flops(fn, *args):
    """FLOPs of the products in the lowered program, from its text: nothing of the audit's own."""
    flops = {}
    names = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    types = r"\(tensor<(\S+)>, tensor<\S+>\) -> tensor<(\S+)>"
    pattern = r"stablehlo\.dot_general .*contracting_dims = \[([\d, ]*)\] x .*: " + types
    for contracted, operand, result in re.findall(pattern, jax.jit(fn).lower(*args).as_text()):
        (*shape, dtype), (*out, _) = operand.split("x"), result.split("x")
        n = 2 * math.prod(map(int, out)) * math.prod(int(shape[int(d)]) for d in contracted.split(","))
        flops[names[dtype]] = flops.get(names[dtype], 0) + n
    return flops


def test_a_product_of_two_dtypes_is_one_of_the_wider():
    mixed = lambda x, w: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=F32)  # noqa: E731
    assert audit(mixed, H, of((4, 4), F32)).dot_flops_by_dtype == {"float32": PRODUCT}


class Rematted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(MLP)(name="block")(x)


def test_the_backward_pass_of_a_remat_has_the_paths_of_the_forward_pass():
    loss = jax.grad(lambda v, x: jnp.sum(Rematted().apply(v, x).astype(F32) ** 2))
    paths = {dot.path for dot in audit(loss, *traced(Rematted(), (2, 5))).dots}
    assert paths == {"Rematted/block/Dense_0", "Rematted/block/head"}


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_the_products_are_those_of_the_lowered_program(name):
    model, shape, _ = MODELS[name]
    loss = jax.grad(lambda v, x: jnp.sum(model.apply(v, x).astype(F32)), argnums=(0, 1))
    assert audit(loss, *traced(model, shape)).dot_flops_by_dtype == stablehlo_flops(loss, *traced(model, shape))


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, dtype=F32, name="inner")(nn.LayerNorm(dtype=F32)(x))


class WithNorm(nn.Module):
    inner: object = F16

    @nn.compact
    def __call__(self, x):
        x = Norm(name="norm")(nn.Dense(4, dtype=self.inner)(x))
        return nn.RNN(nn.OptimizedLSTMCell(4, dtype=F16), name="rnn")(x[:, None])


def test_rules_by_class_are_followed_where_the_modules_are_known():
    policy = PolicyTree.parse("@Norm=float32; mixed_float16")
    model, (variables, x) = WithNorm(F32), traced(WithNorm(F32), (2, 5))
    report = audit(model.apply, variables, x)
    assert not report.under(policy).findings  # any of them might be a Norm
    held = report.under(policy, jaxmp.explain(model, policy, x)).findings
    assert [(f.rule, f.path) for f in held] == [("float32 dot", "WithNorm/Dense_0")]
    assert len(report.under("mixed_float16").findings) == 2
    report.under("@RNN=float32; @Norm=float32; Dense_0=float32; mixed_float16").assert_clean()


class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="body")(nn.Dense(3, name="while")(x))


def test_a_module_may_be_called_as_jax_calls_the_parts_of_a_loop():
    report = audit(Loop().apply, jax.eval_shape(Loop().init, jax.random.key(0), of((2, 3))), of((2, 3)))
    assert [dot.path for dot in report.dots] == ["Loop/while", "Loop/body"]
    assert module_path("jit(f)/jvp(Net)/while/body/closed_call/RNN.f/while/cell") == "Net/RNN/while/cell"


def test_a_model_of_ours_is_shown_by_its_own_lines():
    model = OurMLP((4,), classes=2)
    report = audit(model.apply, jax.eval_shape(model.init, jax.random.key(0), of((2, 3))), of((2, 3)))
    assert len(report.dots) == 2
    assert all("models/mlp.py:" in dot.source for dot in report.dots)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(5, 4, name="tokens")
        return embed.attend(embed(x))


def test_another_method_of_a_module_is_of_that_module():
    x = of((2,), jnp.int32)
    report = audit(Tied().apply, jax.eval_shape(Tied().init, jax.random.key(0), x), x)
    assert [f.path for f in report.under("mixed_float16").findings] == ["Tied/tokens"]
    report.assert_clean("tokens=float32; mixed_float16")


@pytest.mark.parametrize("rule", ["@OptimizedLSTMCell", "@RNN"])
def test_a_rule_for_a_recurrent_layer_covers_its_cell(rule):
    model = WithNorm()
    policy = PolicyTree.parse(f"{rule}=mixed_bfloat16; @Norm=float32; mixed_float16")
    variables, x = traced(model, (2, 5))
    report = audit(model.apply, variables, x, policy=policy, modules=jaxmp.explain(model, policy, x))
    paths = {dot.path: report._lookup(policy, dot.path).compute_dtype for dot in report.dots}
    assert {name for path, name in paths.items() if "LSTMCell" in path} == {jnp.dtype(BF16)}
    assert paths["WithNorm/norm/inner"] == F32


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
        mean = 0.9 * state["mean"] + 0.1 * x.mean(0)
        return {"params": params, "scale": scale, "mean": mean, "mask": state["mask"]}

    state = {"params": of((4,), F32), "scale": of((), F32, weak_type=True), "mean": of((4,), F32)}
    state["mask"] = of((4,), F32)
    report = audit(step, state, of((2, 4), F32))
    found = {(finding.rule, finding.path) for finding in report.findings}
    assert {("weakly typed", "argument 0/scale"), ("compiles twice", "argument 0/scale")} <= found
    assert ("unguarded state", "argument 0/mean") in found
    assert not {("unguarded state", f"argument 0/{name}") for name in ("params", "mask")} & found


def test_what_does_not_trace_is_one_message():
    with pytest.raises(InputError, match="does not trace"):
        audit(lambda x: x @ x, of((2, 3)))
    with pytest.raises(InputError, match=r"audit: int does not trace .*expected a function"):
        audit(3, of((2, 3)))
    with pytest.raises(InputError, match=r"does not trace .*TracerBoolConversionError"):
        audit(lambda x: x if x > 0 else -x, of(()))


def test_the_command(tmp_path, capsys):
    file = tmp_path / "audit.json"
    assert main(["audit", "digits_mlp", "--precision", "mixed_bfloat16", "--strict", "--json", str(file)]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert list(json.loads(file.read_text())["dot_flops_by_dtype"]) == ["bfloat16"]


def test_the_command_with_a_rule_by_class(capsys):
    assert main(["audit", "digits_mlp", "--precision", "@Dense=float32; mixed_float16", "--strict"]) == 0
    assert "float32" in capsys.readouterr().out


def test_the_command_with_an_unknown_target_is_bad_input(capsys):
    assert main(["audit", "digits_mlp", "--target", "h200"]) == 2
    assert "target 'h200': expected h100" in capsys.readouterr().err


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))


@pytest.mark.slow
def test_batch_statistics_are_guarded_like_the_rest_of_the_state():
    model, x = Normed(), jnp.ones((4, 5))
    variables, tx = model.init(jax.random.key(0), x), jaxmp.loss_scaling(optax.adam(1e-3))
    state = jaxmp.TrainState.create(
        variables["params"], tx, key=jax.random.key(0), model_state={"batch_stats": variables["batch_stats"]}
    )
    loss = jaxmp.make_loss(model, jaxmp.Classification(inputs=("x",)), "mixed_float16")
    step = jax.jit(jaxmp.make_train_step(loss, tx), donate_argnums=0)
    audit(step, state, {"x": x, "label": jnp.zeros(4, jnp.int32), "weight": jnp.ones(4)}).assert_clean("mixed_float16")


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_input_gradient_of_a_strided_convolution_has_as_many_flops_as_the_convolution(stride):
    def convolution(x, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=names)

    x, kernel = jax.ShapeDtypeStruct((4, 32, 32, 8), jnp.float32), jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.float32)
    y = jax.eval_shape(convolution, x, kernel)
    by_hand = {"float32": 2 * 4 * (32 // stride) ** 2 * 16 * 3 * 3 * 8}
    assert audit(convolution, x, kernel).dot_flops_by_dtype == by_hand
    for backward in (
        lambda x, kernel, y: jax.vjp(lambda x: convolution(x, kernel), x)[1](y),
        lambda x, kernel, y: jax.vjp(lambda kernel: convolution(x, kernel), kernel)[1](y),
    ):
        assert audit(backward, x, kernel, y).dot_flops_by_dtype == by_hand


def test_a_general_reduce_that_adds_is_a_sum():
    def reduced(operation):
        return audit(lambda x: jax.lax.reduce(x, jnp.float16(0), operation, (0,)), jnp.ones(1000, jnp.float16)).findings

    assert [finding.rule for finding in reduced(jax.lax.add)] == ["half accumulation"]
    assert not reduced(jax.lax.max)


def test_a_factor_of_one_is_a_vanished_decay_only_where_it_multiplies_state():
    x = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    assert not audit(lambda x, y: 1.0 * jnp.tanh(x) + y, x, x).findings
    assert [f.rule for f in audit(lambda x, y: 0.999 * x + 0.001 * y, x, x).findings] == ["vanished constant"]

    def decayed(m, xs):
        return jax.lax.scan(lambda m, x: (0.999 * m + 0.001 * x, None), m, xs)[0]

    xs = jax.ShapeDtypeStruct((3, 8, 4), jnp.bfloat16)
    assert "vanished constant" in [f.rule for f in audit(lambda x, xs: decayed(jnp.tanh(x), xs), x, xs).findings]
