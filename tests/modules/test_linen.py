from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision

from jaxmp.errors import InputError
from jaxmp.modules.linen import explain, with_policy
from jaxmp.precision.policy import parse_policy

KEY = jax.random.key(0)
HALF = [("mixed_bfloat16", jnp.bfloat16), ("mixed_float16", jnp.float16)]
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products(jaxpr):
    return [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name in PRODUCTS]


def operand_dtypes(function, *args):
    return {v.aval.dtype for e in products(jax.make_jaxpr(function)(*args)) for v in e.invars}


def gradient(model, policy, variables, *inputs):
    """The gradient of the summed outputs with respect to the parameters, as a jitted function of them."""
    apply = with_policy(model.apply, parse_policy(policy))
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        out = apply({"params": params, **rest}, *inputs)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(out))

    return jax.jit(jax.grad(loss))


def traced_gradient(model, policy, variables, *inputs):
    """Its jaxpr, and the shapes and dtypes of what it returns. Nothing is compiled."""
    return jax.make_jaxpr(gradient(model, policy, variables, *inputs), return_shape=True)(variables["params"])


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


class SetUp(nn.Module):
    def setup(self):
        self.hidden = nn.Dense(4)
        self.w = self.param("w", nn.initializers.normal(), (4, 2))

    def __call__(self, x):
        return nn.relu(self.hidden(x)) @ self.w


class OwnParameters(nn.Module):
    """Declares parameters and knows of no dtype."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (x.shape[-1], 2))
        return x @ w + self.param("b", nn.initializers.zeros, (2,))


class HardCoded(nn.Module):
    dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, dtype=jnp.float32)(nn.Dense(2, dtype=self.dtype)(x))


class DtypeIsAProperty(nn.Module):
    @property
    def dtype(self):
        return jnp.float32

    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.normal(), (x.shape[-1], 2)) + nn.Dense(2, dtype=self.dtype)(x)


class Tied(nn.Module):
    def setup(self):
        self.embed = nn.Embed(7, 4)

    def __call__(self, ids):
        return self.embed.attend(nn.tanh(self.embed(ids)))


class TiedByHand(nn.Module):
    def setup(self):
        self.embed = nn.Embed(7, 4)

    def __call__(self, ids):
        return nn.tanh(self.embed(ids)) @ self.embed.embedding.T


class OwnCell(nn.RNNCellBase):
    """A cell that knows of no dtype."""

    features: int

    @nn.compact
    def __call__(self, h, x):
        h = nn.tanh(nn.Dense(self.features)(x) + nn.Dense(self.features, use_bias=False)(h))
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self):
        return 1


class Scanned(nn.Module):
    """`length` times the same layer."""

    length: int
    body: type[nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        body = self.body(x.shape[-1], name="body")
        scan = nn.scan(
            lambda layer, carry, _: (layer(carry), ()),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=self.length,
        )
        return scan(body, x, None)[0]


class Lifted(nn.Module):
    """remat, vmap, scan over layers and jit, in one model."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Dense)(4)(x)
        heads = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        x = heads(4)(x).mean(0)
        layers = nn.scan(nn.remat(Residual), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers()(x, None)
        return nn.jit(nn.Dense)(2)(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1])(nn.LayerNorm()(x)), None


ROWS = jnp.linspace(-1, 1, 24).reshape(4, 6)
IMAGES = jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
SEQUENCES = jnp.linspace(-1, 1, 2 * 5 * 6).reshape(2, 5, 6)
IDS = jnp.arange(6).reshape(2, 3) % 7
MODELS = {
    "compact": (Compact(), ROWS),
    "setup": (SetUp(), ROWS),
    "own_parameters": (OwnParameters(), ROWS),
    "hard_coded": (HardCoded(), ROWS),
    "dtype_is_a_property": (DtypeIsAProperty(), ROWS),
    "conv": (nn.Conv(4, (3, 3)), IMAGES),
    "conv_transpose": (nn.ConvTranspose(4, (3, 3)), IMAGES),
    "conv_local": (nn.ConvLocal(4, (3, 3)), IMAGES),
    "dense_general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), SEQUENCES),
    "dense_general_batched": (nn.DenseGeneral(3, batch_dims=(0,)), SEQUENCES),
    "einsum": (nn.Einsum((6, 3), "...i,ij->...j"), SEQUENCES),
    "embed_attend": (Tied(), IDS),
    "embed_by_hand": (TiedByHand(), IDS),
    "attention": (nn.MultiHeadDotProductAttention(2), SEQUENCES),
    "attention_with_precision": (nn.MultiHeadDotProductAttention(2, precision="highest"), SEQUENCES),
    "lstm": (nn.RNN(nn.LSTMCell(4)), SEQUENCES),
    "optimized_lstm": (nn.RNN(nn.OptimizedLSTMCell(4)), SEQUENCES),
    "gru": (nn.RNN(nn.GRUCell(4)), SEQUENCES),
    "mgu": (nn.RNN(nn.MGUCell(4)), SEQUENCES),
    "simple_cell": (nn.RNN(nn.SimpleCell(4)), SEQUENCES),
    "conv_lstm": (nn.RNN(nn.ConvLSTMCell(2, (3, 3))), jnp.ones((1, 2, 4, 4, 2))),
    "own_cell": (nn.RNN(OwnCell(4)), SEQUENCES),
    "bidirectional": (nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4))), SEQUENCES),
    "scan": (Scanned(3), ROWS),
    "lifted": (Lifted(), ROWS),
    "weight_norm": (nn.WeightNorm(nn.Dense(3)), ROWS),
    "sequential": (nn.Sequential([nn.Dense(4), nn.gelu, nn.LayerNorm(), nn.Dense(2)]), ROWS),
    "partitioned": (
        nn.Dense(
            3,
            kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, None)),
            bias_init=nn.with_partitioning(nn.initializers.zeros, (None,)),
        ),
        ROWS,
    ),
}


@functools.cache
def shapes_of(name):
    model, x = MODELS[name]
    return jax.eval_shape(model.init, KEY, x)


@functools.cache
def variables_of(name):
    model, x = MODELS[name]
    return jax.jit(model.init)(KEY, x)


@pytest.mark.few_variants
@pytest.mark.parametrize(("policy", "half"), HALF)
@pytest.mark.parametrize("name", MODELS)
def test_every_operand_of_every_product_is_half_forward_and_backward(name, policy, half):
    model, x = MODELS[name]
    variables = shapes_of(name)
    out = jax.eval_shape(with_policy(model.apply, parse_policy(policy)), variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
    jaxpr, grads = traced_gradient(model, policy, variables, x)
    assert {v.aval.dtype for e in products(jaxpr) for v in e.invars} == {jnp.dtype(half)}
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


# JAX builds ConvLocal's patches with a convolution whose precision no context reaches.
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"conv_local"}))
def test_float32_is_true_float32_in_every_product_forward_and_backward(name):
    model, x = MODELS[name]
    jaxpr, _ = traced_gradient(model, "float32", shapes_of(name), x)
    assert {precision for e in products(jaxpr) for precision in e.params["precision"]} == {Precision.HIGHEST}


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "attention", "lifted")),
        *("embed_by_hand", "einsum", "weight_norm"),
    ],
)
def test_float32_computes_what_the_model_computes_and_half_comes_close(name):
    model, x = MODELS[name]
    variables = variables_of(name)
    plain, wide, half = jax.jit(
        lambda v, x: (
            model.apply(v, x),
            *[with_policy(model.apply, parse_policy(p))(v, x) for p in ("f32", "16-mixed")],
        )
    )(variables, x)
    np.testing.assert_allclose(wide, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(half, plain, atol=1e-2)
    assert not np.array_equal(half, plain)


def test_a_matmul_algorithm_of_ones_own_reaches_every_product():
    jaxpr, _ = traced_gradient(Compact(), "f32,matmul=BF16_BF16_F32_X3", shapes_of("compact"), ROWS)
    assert {e.params["precision"] for e in products(jaxpr)} == {jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3}


def test_the_matmul_precision_of_a_policy_does_not_leak():
    strict = with_policy(Compact().apply, parse_policy("float32"))
    variables = shapes_of("compact")
    found = products(jax.make_jaxpr(lambda v, x: strict(v, x) @ jnp.ones((2, 2)))(variables, ROWS))
    assert [e.params["precision"] for e in found] == [(Precision.HIGHEST, Precision.HIGHEST)] * 2 + [None]
    with pytest.raises(TypeError):
        strict(variables, ROWS, no_such_argument=1)
    assert products(jax.make_jaxpr(jnp.dot)(ROWS, ROWS.T))[0].params["precision"] is None


# --- gradients that would be summed in half


def test_a_weight_used_1000_times_in_a_scan_gets_the_whole_gradient_t1():
    class AddWeight(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            return x + self.param("w", nn.initializers.zeros, (self.features,))

    x = jnp.zeros((1, 1))
    for body, leaf in ((nn.Dense, "bias"), (AddWeight, "w")):
        model = Scanned(1000, body)
        # the identity, so that the cotangent of the carry stays 1
        variables = {
            "params": {"body": {leaf: jnp.zeros(1)} | ({"kernel": jnp.ones((1, 1))} if leaf == "bias" else {})}
        }
        grads = gradient(model, "mixed_bfloat16", variables, x)(variables["params"])
        assert grads["body"][leaf] == 1000, (body, grads)


def test_the_grad_field_shows_what_one_cast_outside_of_all_uses_loses_t1():
    model, x = Scanned(1000), jnp.zeros((1, 1))
    variables = {"params": {"body": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}}
    naive = gradient(model, "mixed_bfloat16,grad=bf16", variables, x)(variables["params"])
    assert naive["body"]["bias"] == 256


@pytest.mark.slow
def test_a_weight_tied_between_1000_calls_gets_the_whole_gradient_t1():
    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(1, use_bias=False)
            return sum(layer(x).astype(jnp.float32) for _ in range(300))

    x = jnp.ones((1, 1))
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((1, 1))}}}
    assert gradient(Repeated(), "mixed_bfloat16", variables, x)(variables["params"])["Dense_0"]["kernel"] == 300


@pytest.mark.slow
@pytest.mark.parametrize("gate", "ifgo")
def test_the_biases_that_an_lstm_cell_joins_are_summed_in_float32_and_go_to_their_gates_t2(gate):
    cell, carry, x = nn.OptimizedLSTMCell(4), (jnp.full((3, 4), 0.5), jnp.full((3, 4), 0.25)), jnp.ones((3, 2))
    variables = cell.init(KEY, carry, x)
    variables["params"][f"h{gate}"]["bias"] += jnp.array([0.5, -1, 2, 0.25])
    found = with_policy(cell.apply, "mixed_bfloat16")(variables, carry, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(cell.apply(variables, carry, x)), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02)
    jaxpr, _ = traced_gradient(cell, "mixed_bfloat16", variables, carry, x)
    sums = [e.invars[0].aval for e in equations(jaxpr.jaxpr) if e.primitive.name == "reduce_sum"]
    assert len(sums) >= 4 and {aval.dtype for aval in sums if aval.ndim > 1} == {jnp.dtype(jnp.float32)}


@pytest.mark.few_variants
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dense(1), (10_000, 1)),
        (nn.DenseGeneral((1, 1)), (10_000, 1)),
        (nn.DenseGeneral(1, batch_dims=(0,)), (1, 10_000, 1)),
        (nn.Conv(1, (1,)), (10, 1_000, 1)),
        (nn.ConvTranspose(1, (1,)), (10, 1_000, 1)),
        (nn.ConvLocal(1, (1,)), (10_000, 1, 1)),
        (nn.Einsum((1, 1), "...i,ij->...j"), (10_000, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "x".join(map(str, value)),
)
def test_the_gradient_of_a_bias_over_10000_rows_is_10000_t2(layer, shape):
    x = jnp.zeros(shape)
    variables = jax.jit(layer.init)(KEY, x)
    exact = gradient(layer, "mixed_bfloat16", variables, x)(variables["params"])["bias"]
    naive = gradient(layer, "mixed_bfloat16,grad=bf16", variables, x)(variables["params"])["bias"]
    assert np.all(np.asarray(exact) == 10_000)
    assert np.all(np.asarray(naive) != 10_000), "grad=bf16 shows what plain half precision loses"


def test_the_gradient_of_an_embedding_is_summed_in_float32_t15():
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 3, (4096,)))
    cotangent = jnp.asarray(rng.uniform(0.5, 1, (4096, 8)), jnp.bfloat16)
    model = nn.Embed(3, 8)
    params = {"embedding": jnp.ones((3, 8))}
    exact = np.zeros((3, 8))
    np.add.at(exact, np.asarray(ids), np.asarray(cotangent, np.float64))

    def errors(policy):
        apply = with_policy(model.apply, parse_policy(policy))

        @jax.jit
        def pulled_back(params):
            _, pullback = jax.vjp(lambda p: apply({"params": p}, ids).astype(jnp.bfloat16), params)
            return pullback(cotangent)[0]["embedding"]

        return np.max(np.abs(pulled_back(params) / exact - 1))

    assert errors("mixed_bfloat16") < 1e-5
    assert errors("mixed_bfloat16,grad=bf16") > 0.1


def test_an_embedding_used_to_gather_and_to_attend_sums_both_in_float32():
    ids = jnp.zeros((2048,), jnp.int32)
    variables = {"params": {"embed": {"embedding": jnp.ones((7, 4)) * 0.5}}}
    wide = gradient(Tied(), "float32", variables, ids)(variables["params"])["embed"]["embedding"]
    half = gradient(Tied(), "mixed_bfloat16", variables, ids)(variables["params"])["embed"]["embedding"]
    np.testing.assert_allclose(half, wide, rtol=2e-2)


# --- norms

NORMS = [
    nn.LayerNorm(),
    nn.RMSNorm(),
    nn.GroupNorm(num_groups=2),
    nn.InstanceNorm(),
    nn.BatchNorm(use_running_average=False),
]


@pytest.mark.few_variants
@pytest.mark.parametrize(("policy", "half"), [pytest.param(*HALF[0], marks=pytest.mark.slow), *HALF[1:]])
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: type(n).__name__)
def test_norms_compute_in_float32_and_hand_on_the_compute_dtype(norm, policy, half):
    x = jax.random.normal(KEY, (4, 8, 6)) * 300  # squares do not fit float16
    variables = jax.jit(norm.init)(KEY, x)
    policy = parse_policy(f"{policy},o={policy.removeprefix('mixed_')}")
    apply = functools.partial(with_policy(norm.apply, policy), mutable=["batch_stats"])
    jaxpr = jax.make_jaxpr(apply)(variables, x.astype(half)).jaxpr
    reductions = [e for e in equations(jaxpr) if e.primitive.name in ("reduce_sum", "rsqrt", "mul", "sub", "psum")]
    assert reductions
    assert {v.aval.dtype for e in reductions for v in e.invars} == {jnp.dtype(jnp.float32)}
    (y, state), (expected, _) = jax.jit(lambda v, x: (apply(v, x), norm.apply(v, x, mutable=["batch_stats"])))(
        variables, x
    )
    assert y.dtype == half
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=5e-2)


class OwnState(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean = self.variable("stats", "mean", jnp.zeros, x.shape[-1:])
        mean.value = x.mean(0)
        self.variable("stats", "count", jnp.zeros, (), jnp.int32).value += 1
        return x - mean.value


def test_mutable_collections_keep_their_dtypes():
    variables = OwnState().init(KEY, ROWS)
    _, state = with_policy(OwnState().apply, parse_policy("mixed_bfloat16"))(variables, ROWS, mutable=["stats"])
    assert state["stats"]["mean"].dtype == jnp.float32
    assert state["stats"]["count"].dtype == jnp.int32
    _, sown = with_policy(OwnState().apply, parse_policy("mixed_bfloat16"))({}, ROWS, mutable=True)
    assert set(sown["stats"]) == {"mean", "count"}


def test_softmax_of_attention_is_in_float32_t4():
    model, x = MODELS["attention"]
    jaxpr = jax.make_jaxpr(with_policy(model.apply, parse_policy("mixed_float16")))(shapes_of("attention"), x).jaxpr
    assert {e.invars[0].aval.dtype for e in equations(jaxpr) if e.primitive.name == "exp"} == {jnp.dtype("float32")}


def test_decoding_works_with_a_cache_made_under_the_policy():
    model = nn.MultiHeadDotProductAttention(2, decode=True)
    params = {"params": shapes_of("attention")["params"]}
    apply = functools.partial(with_policy(model.apply, parse_policy("mixed_bfloat16")), mutable=["cache"])
    _, made = jax.eval_shape(apply, params, SEQUENCES)
    assert made["cache"]["cached_key"].dtype == jnp.bfloat16
    _, used = jax.eval_shape(apply, {**params, **made}, SEQUENCES[:, :1])
    assert jax.tree.map(lambda x: x.dtype, used) == jax.tree.map(lambda x: x.dtype, made)


# --- recurrent cells, lifted transformations, calling conventions


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell, OwnCell])
def test_a_cell_keeps_its_carry_and_hands_on_the_compute_dtype(make):
    cell = make(4)
    carry = cell.initialize_carry(KEY, (2, 6))
    variables = jax.eval_shape(cell.init, KEY, carry, jnp.ones((2, 6)))
    apply = with_policy(lambda v, x: cell.apply(v, carry, x), parse_policy("p=f32,c=f16,o=f16"))
    seen = {}

    def note(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.path == () and context.method_name == "__call__":
            seen["out"] = out
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(apply, variables, jnp.ones((2, 6)))
    carried, y = seen["out"]
    assert {leaf.dtype for leaf in jax.tree.leaves(carried)} == {jnp.dtype("float32")}
    assert y.dtype == jnp.float16


JittedDense = nn.jit(nn.Dense)  # once: what it has traced, it keeps


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JittedDense(2)(x)


def test_nn_jit_does_not_reuse_the_trace_of_another_policy():
    variables = jax.eval_shape(Jitted().init, KEY, ROWS)
    for policy, dtype in [("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16"), ("float32", "float32")] * 2:
        found = operand_dtypes(with_policy(Jitted().apply, parse_policy(policy)), variables, ROWS)
        assert found == {jnp.dtype(dtype)}
        assert operand_dtypes(Jitted().apply, variables, ROWS) == {jnp.dtype("float32")}


@pytest.mark.slow
def test_nn_jit_does_not_reuse_the_trace_of_a_policy_with_the_same_dtypes():
    x = jax.random.normal(KEY, (4, 5))
    variables = Jitted().init(KEY, x)
    (dense,) = variables["params"].values()
    for policy in ("c=e4m3", "c=e5m2") * 2:
        expected = with_policy(nn.Dense(2).apply, policy)({"params": dense}, x)
        np.testing.assert_array_equal(with_policy(Jitted().apply, policy)(variables, x), expected)


def test_a_jitted_apply_does_not_reuse_the_trace_of_another_policy():
    model = Compact()
    apply, variables = jax.jit(model.apply), variables_of("compact")
    outs = [with_policy(apply, parse_policy(p))(variables, ROWS) for p in ("mixed_float16", "mixed_bfloat16", "f32")]
    assert not np.array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[2], model.apply(variables, ROWS))


def test_a_policy_is_over_when_the_call_is():
    model = Compact()
    variables = variables_of("compact")
    with_policy(model.apply, parse_policy("mixed_float16"))(variables, ROWS)
    bound = model.bind(variables)
    assert bound(ROWS).dtype == jnp.float32
    np.testing.assert_array_equal(bound(ROWS), model.apply(variables, ROWS))


def test_inputs_of_any_kind_arrive_in_the_compute_dtype():
    seen = {}

    class Probe(nn.Module):
        @nn.compact
        def __call__(self, batch, *, scale, flag, ids):
            seen.update(x=batch["x"].dtype, scale=scale.dtype, flag=flag, ids=ids.dtype)
            return batch["x"] * scale

    out = with_policy(Probe().apply, parse_policy("p=f32,c=f16,o=bf16"))(
        {}, {"x": np.ones(3, np.float64)}, scale=jnp.float32(2), flag=0.5, ids=jnp.arange(3)
    )
    assert seen == {"x": jnp.float16, "scale": jnp.float16, "flag": 0.5, "ids": jnp.int32}
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("mutable", [False, [], "batch_stats", ["batch_stats"], True])
def test_mutable_means_what_it_means_in_flax(mutable):
    model = nn.BatchNorm(use_running_average=False) if mutable else nn.Dense(2)
    variables = jax.eval_shape(model.init, KEY, ROWS)
    theirs = jax.eval_shape(functools.partial(model.apply, mutable=mutable), variables, ROWS)
    apply = with_policy(model.apply, parse_policy("mixed_bfloat16"))
    ours = jax.eval_shape(functools.partial(apply, mutable=mutable), variables, ROWS)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(theirs)]


def test_methods_other_than_call_run_under_the_policy():
    model, variables = nn.Embed(7, 4), {"params": {"embedding": jnp.ones((7, 4))}}
    attend = functools.partial(with_policy(model.apply, parse_policy("mixed_float16")), method="attend")
    assert operand_dtypes(attend, variables, jnp.ones((2, 4))) == {jnp.dtype("float16")}


@pytest.mark.parametrize("policy", ["encoder=float32; mixed_float16", "@Compact=float32; mixed_float16"])
def test_a_rule_may_name_what_another_method_does_not_call(policy):
    class Coder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Sequential([Compact()]), nn.Dense(3)

        def __call__(self, x):
            return self.decode(self.encoder(x.reshape(-1, 6)))

        def decode(self, code):
            return self.decoder(code)

    model, code = Coder(), jnp.ones((2, 2))
    variables = jax.eval_shape(model.init, KEY, jnp.ones((2, 2, 3)))
    decode = functools.partial(with_policy(model.apply, policy), method="decode")
    assert operand_dtypes(decode, variables, code) == {jnp.dtype("float16")}


def test_parameters_may_be_made_under_the_policy():
    for name in ("compact", "embed_attend", "einsum", "lstm"):
        model, x = MODELS[name]
        apply = with_policy(model.apply, parse_policy("mixed_bfloat16"))
        _, made = jax.eval_shape(lambda x, apply=apply: apply({}, x, rngs={"params": KEY}, mutable=True), x)
        assert made == shapes_of(name), name


@pytest.mark.slow
def test_the_result_goes_into_jit_grad_vmap_scan_and_remat():
    model, x = MODELS["compact"]
    variables = variables_of("compact")
    apply = with_policy(model.apply, parse_policy("mixed_bfloat16"))
    plain = jax.jit(apply)(variables, x)
    by_rows = jax.jit(jax.vmap(apply, in_axes=(None, 0)))(variables, x[:, None])[:, 0]
    in_scan = jax.jit(lambda v, x: jax.lax.scan(lambda c, row: (c, apply(v, row)), 0, x)[1])(variables, x)
    np.testing.assert_allclose(by_rows, plain, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(in_scan, plain, rtol=2e-2, atol=2e-2)
    grad = jax.jit(jax.grad(jax.checkpoint(lambda v: apply(v, x).sum())))(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(grad)} == {jnp.dtype("float32")}


# --- explain


def test_explain_lists_every_module_with_its_parameters():
    policy = parse_policy("mixed_float16")
    rows = explain(Lifted(), policy, ROWS)
    assert rows[0].module == ""
    assert rows[0].type == "Lifted"
    assert {row.policy for row in rows} == {"p=f32,c=f16,o=f32"}
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes_of("lifted")["params"]))
    assert sum(row.parameters for row in rows) == total
    assert len({row.module for row in rows}) == len(rows)


@pytest.mark.parametrize("name", MODELS)
def test_explain_counts_all_parameters_of_any_model(name):
    model, x = MODELS[name]
    rows = explain(model, parse_policy("float32"), jax.ShapeDtypeStruct(x.shape, x.dtype))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(name)["params"]))
    assert sum(row.parameters for row in rows) == total


def test_explain_passes_arguments_on():
    rows = explain(nn.BatchNorm(), parse_policy("float32"), ROWS, use_running_average=True)
    assert [(row.type, row.parameters) for row in rows] == [("BatchNorm", 12)]


def test_a_model_in_the_place_of_its_apply_is_refused():
    with pytest.raises(InputError, match=r"takes the function model\.apply; Dense is the model itself"):
        with_policy(nn.Dense(3), "mixed_float16")
