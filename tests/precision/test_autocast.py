from __future__ import annotations

import functools
import gc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxmp.errors import InputError
from jaxmp.jaxprs import equations
from jaxmp.precision.autocast import APEX_O1, TORCH, OperationLists, autocast

BF16, F16, F32 = np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
NONE = OperationLists(low=(), float32=())
KEY = jax.random.key(0)


def traced(function, *args):
    """All equations of a function, those of inner functions included."""
    return [equation for equation, _ in equations(jax.make_jaxpr(function)(*args))]


def floats(atoms):
    return [v.aval.dtype for v in atoms if jnp.issubdtype(v.aval.dtype, jnp.floating)]


def dtypes_at(names, function, *args):
    """The dtypes of the operands of the named primitives, wherever in the function they are."""
    return {dtype for e in traced(function, *args) if e.primitive.name in names for dtype in floats(e.invars)}


def dots(function, *args):
    """The dtypes of operands and results of all products."""
    names = ("dot_general", "conv_general_dilated")
    return {d for e in traced(function, *args) if e.primitive.name in names for d in floats([*e.invars, *e.outvars])}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def half(x):
    """`x`, under autocast in half precision: a product with one, which changes nothing else."""
    return lax.dot_general(x, jnp.ones(()), (((), ()), ((), ())))


# The operation table. Names and groups: PyTorch documentation, torch.amp, "Autocast Op Reference", "CUDA Op-Specific
# Behavior" (docs/source/amp.rst of pytorch 2.x). Each is written as a JAX user would, with the primitives that make it
# (a product of an array with itself counts as `square`).

A, B, POSITIVE = normal(3, 3), normal(3, 3, seed=1), jnp.abs(normal(3, 3, seed=2)) / 4 + 0.1
BATCH = normal(2, 3, 3)


def conv(rank, transposed=False):
    x, w = normal(1, *[4] * rank, 2), normal(*[3] * rank, 2, 2)
    spatial = "DHW"[:rank]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    call = lax.conv_transpose if transposed else lax.conv_general_dilated
    return lambda: call(x, w, (1,) * rank, "SAME", dimension_numbers=numbers)


def lstm_cell(x, h, c, w, u, b):
    i, f, g, o = jnp.split(x @ w + h @ u + b, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_cell(x, h, w, u):
    r, z, n = jnp.split(x @ w, 3, axis=-1)
    a, b, c = jnp.split(h @ u, 3, axis=-1)
    z = jax.nn.sigmoid(z + b)
    return (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + a) * c) + z * h


TORCH_LOW = {
    "__matmul__": lambda: A @ B,
    "addbmm": lambda: A + jnp.einsum("bij,bjk->ik", BATCH, BATCH),
    "addmm": lambda: A + A @ B,
    "addmv": lambda: A[0] + A @ B[0],
    "addr": lambda: A + jnp.einsum("i,j->ij", A[0], B[0]),
    "baddbmm": lambda: BATCH + BATCH @ BATCH,
    "bmm": lambda: BATCH @ BATCH,
    "multi_dot": lambda: jnp.linalg.multi_dot([A, B, A]),
    "conv1d": conv(1),
    "conv2d": conv(2),
    "conv3d": conv(3),
    "conv_transpose1d": conv(1, transposed=True),
    "conv_transpose2d": conv(2, transposed=True),
    "conv_transpose3d": conv(3, transposed=True),
    "GRUCell": lambda: gru_cell(A, B, normal(3, 9), normal(3, 9)),
    "linear": lambda: A @ B + A[0],
    "LSTMCell": lambda: lstm_cell(A, B, B, normal(3, 12), normal(3, 12), normal(12)),
    "matmul": lambda: jnp.matmul(A, B),
    "mm": lambda: jnp.dot(A, B),
    "mv": lambda: A @ B[0],
    "RNNCell": lambda: jnp.tanh(A @ A + B @ B),
    # In torch's third group, though they are products, which torch's own kernels then run in half.
    "bilinear": lambda: jnp.einsum("bi,ijk,bk->bj", A, normal(3, 3, 3), B),
    "dot": lambda: jnp.dot(A[0], B[0]),
    "tensordot": lambda: jnp.tensordot(A, B, 1),
}


def norm(x):
    return jnp.linalg.norm(x, axis=-1)


def layer_norm(x, axis=-1):
    x = x - x.mean(axis, keepdims=True)
    return x * lax.rsqrt((x * x).mean(axis, keepdims=True) + 1e-5)


def cosine_similarity(x, y):
    return jnp.sum(x * y, -1) / (norm(x) * norm(y))


SUM, SQUARES, SOFTMAX = {"reduce_sum"}, {"reduce_sum", "square"}, {"reduce_max", "sub", "exp", "reduce_sum"}
SOFTPLUS = {"exp", "log1p"}

TORCH_FLOAT32 = {
    "__pow__": (lambda x, y: x**y, {"pow"}),
    "__rdiv__": (lambda x, y: 1 / x, {"div"}),
    "__rpow__": (lambda x, y: 2**x, {"pow|exp2"}),
    "__rtruediv__": (lambda x, y: 3.0 / x, {"div"}),
    "acos": (lambda x, y: jnp.acos(x), {"acos"}),
    "asin": (lambda x, y: jnp.asin(x), {"asin"}),
    "binary_cross_entropy_with_logits": (lambda x, y: -jnp.mean(y * jax.nn.log_sigmoid(x)), SOFTPLUS | SUM),
    "cosh": (lambda x, y: jnp.cosh(x), {"cosh"}),
    "cosine_embedding_loss": (lambda x, y: jnp.mean(1 - cosine_similarity(x, y)), SQUARES),
    "cdist": (lambda x, y: norm(x[:, None] - y), SQUARES),
    "cosine_similarity": (cosine_similarity, SQUARES),
    "cross_entropy": (lambda x, y: -jnp.sum(y * jax.nn.log_softmax(x)), SOFTMAX | {"log"}),
    "cumprod": (lambda x, y: jnp.cumprod(x), {"cumprod"}),
    "cumsum": (lambda x, y: jnp.cumsum(x), {"cumsum"}),
    "dist": (lambda x, y: jnp.linalg.norm(x - y), SQUARES),
    "erfinv": (lambda x, y: lax.erf_inv(x), {"erf_inv"}),
    "exp": (lambda x, y: jnp.exp(x), {"exp"}),
    "expm1": (lambda x, y: jnp.expm1(x), {"expm1"}),
    "group_norm": (lambda x, y: layer_norm(x, (0, 1)), SQUARES | {"rsqrt"}),
    "hinge_embedding_loss": (lambda x, y: jnp.mean(jax.nn.relu(1 - x)), SUM),
    "kl_div": (lambda x, y: jnp.sum(y * (jnp.log(y) - x)), SUM | {"log"}),
    "l1_loss": (lambda x, y: jnp.mean(jnp.abs(x - y)), SUM),
    "layer_norm": (lambda x, y: layer_norm(x), SQUARES | {"rsqrt"}),
    "log": (lambda x, y: jnp.log(x), {"log"}),
    "log_softmax": (lambda x, y: jax.nn.log_softmax(x), SOFTMAX | {"log"}),
    "log10": (lambda x, y: jnp.log10(x), {"log"}),
    "log1p": (lambda x, y: jnp.log1p(x), {"log1p"}),
    "log2": (lambda x, y: jnp.log2(x), {"log|log2"}),
    "margin_ranking_loss": (lambda x, y: jnp.mean(jax.nn.relu(y - x)), SUM),
    "mse_loss": (lambda x, y: jnp.mean((x - y) ** 2), SUM | {"integer_pow|square"}),
    "multilabel_margin_loss": (lambda x, y: jnp.sum(jax.nn.relu(1 - (y - x))), SUM),
    "multi_margin_loss": (lambda x, y: jnp.sum(jax.nn.relu(1 - y + x)), SUM),
    "nll_loss": (lambda x, y: -jnp.sum(x * y), SUM),
    "norm": (lambda x, y: jnp.linalg.norm(x), SQUARES),
    "normalize": (lambda x, y: x / norm(x)[:, None], SQUARES),
    "pdist": (lambda x, y: norm(x[:, None] - x), SQUARES),
    "poisson_nll_loss": (lambda x, y: jnp.mean(jnp.exp(x) - y * x), SUM | {"exp"}),
    "pow": (lambda x, y: jnp.power(x, y), {"pow"}),
    "prod": (lambda x, y: jnp.prod(x), {"reduce_prod"}),
    "reciprocal": (lambda x, y: jnp.reciprocal(x), {"integer_pow|div"}),
    "rsqrt": (lambda x, y: lax.rsqrt(x), {"rsqrt"}),
    "sinh": (lambda x, y: jnp.sinh(x), {"sinh"}),
    "smooth_l1_loss": (lambda x, y: jnp.mean(jnp.where(x < y, (x - y) ** 2, jnp.abs(x - y))), SUM | {"integer_pow"}),
    "soft_margin_loss": (lambda x, y: jnp.mean(jnp.log1p(jnp.exp(-x * y))), SUM | SOFTPLUS),
    "softmax": (lambda x, y: jax.nn.softmax(x), SOFTMAX),
    "softmin": (lambda x, y: jax.nn.softmax(-x), SOFTMAX),
    "softplus": (lambda x, y: jax.nn.softplus(x), SOFTPLUS),
    "sum": (lambda x, y: jnp.sum(x), SUM),
    "renorm": (lambda x, y: x * jnp.minimum(1, 1 / norm(x)), SQUARES | {"div"}),
    "tan": (lambda x, y: jnp.tan(x), {"tan"}),
    "triplet_margin_loss": (lambda x, y: jnp.mean(jax.nn.relu(norm(x - y) - norm(x - 2 * y) + 1)), SQUARES),
}

TORCH_WIDEST = {
    "addcdiv": (lambda x, y: x + 0.5 * (x / y), {"add", "div"}),
    "addcmul": (lambda x, y: x + 0.5 * (x * y), {"add", "mul"}),
    "atan2": (lambda x, y: jnp.atan2(x, y), {"atan2"}),
    "cross": (lambda x, y: jnp.cross(x, y), {"mul", "sub"}),
    "grid_sample": (lambda x, y: jax.scipy.ndimage.map_coordinates(x, [y, y], order=1), {"mul"}),
    "index_put": (lambda x, y: x.at[0].set(y[0]), {"scatter", "dynamic_update_slice"}),
    "scatter_add": (lambda x, y: x.at[jnp.array([0, 0])].add(y[:2]), {"scatter-add"}),
    # In torch's first group, but no product: with a slope in float32 it promotes here.
    "prelu": (lambda x, y: jnp.where(x > 0, x, y * x), {"mul", "select_n"}),
}


@pytest.mark.parametrize("name", TORCH_LOW)
def test_torch_operations_that_autocast_to_half(name):
    assert dots(autocast(TORCH_LOW[name], dtype=jnp.float16)) == {F16}


@pytest.mark.parametrize("name", TORCH_FLOAT32)
def test_torch_operations_that_autocast_to_float32(name):
    function, required = TORCH_FLOAT32[name]
    found: dict[str, set] = {}
    for e in traced(autocast(lambda x, y: function(half(x), half(y))), A, B):
        is_square = e.primitive.name == "mul" and e.invars[0] is e.invars[1]
        found.setdefault("square" if is_square else e.primitive.name, set()).update(floats(e.invars))
    for alternatives in required:  # versions of JAX differ in how they spell it
        assert [found[p] for p in alternatives.split("|") if p in found] == [{F32}], found


@pytest.mark.parametrize("name", TORCH_WIDEST)
def test_torch_operations_that_promote(name):
    function, primitives = TORCH_WIDEST[name]
    assert dtypes_at(primitives, autocast(lambda x, y: function(half(x), half(y))), A, B) == {BF16}
    assert dtypes_at(primitives, autocast(lambda x, y: function(half(x), y)), A, B) == {F32}


def test_the_table_is_torchs():
    # The three lists of the documentation, in its order.
    low = """__matmul__ addbmm addmm addmv addr baddbmm bmm multi_dot conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d GRUCell linear LSTMCell matmul mm mv prelu RNNCell"""
    float32 = """__pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cosh
    cosine_embedding_loss cdist cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm
    hinge_embedding_loss kl_div l1_loss layer_norm log log_softmax log10 log1p log2 margin_ranking_loss mse_loss
    multilabel_margin_loss multi_margin_loss nll_loss norm normalize pdist poisson_nll_loss pow prod reciprocal rsqrt
    sinh smooth_l1_loss soft_margin_loss softmax softmin softplus sum renorm tan triplet_margin_loss"""
    widest = "addcdiv addcmul atan2 bilinear cross dot grid_sample index_put scatter_add tensordot"
    assert set(TORCH_FLOAT32) == set(float32.split())
    # The two groups differ in what the comments above say.
    assert set(TORCH_LOW) == set(low.split()) - {"prelu"} | {"bilinear", "dot", "tensordot"}
    assert set(TORCH_WIDEST) == set(widest.split()) - {"bilinear", "dot", "tensordot"} | {"prelu"}


# Models in plain JAX: a loss, its parameters, and the products on the longest way from a parameter to the loss.


def weights(**shapes):
    rng = np.random.default_rng(3)
    return {name: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for name, s in shapes.items()}


IDS = np.random.default_rng(4).integers(0, 11, (2, 6))
X = np.random.default_rng(5).normal(size=(5, 4, 8)).astype(np.float32)


def transformer():
    """Two layers, causal, tied embedding: logits are a product with what the input was gathered from."""
    shapes = {
        "q": (8, 2, 4),
        "k": (8, 2, 4),
        "v": (8, 2, 4),
        "o": (2, 4, 8),
        "up": (8, 32),
        "down": (32, 8),
        "b": (32,),
    }

    def block(w, i, x):
        y = layer_norm(x)
        q, k, v = (jnp.einsum("btd,dhf->bthf", y, w[f"{name}{i}"]) for name in "qkv")
        scores = jnp.einsum("bthf,bshf->bhts", q, k) / 2
        scores = jnp.where(np.tril(np.ones((6, 6), bool)), scores, -1e30)
        x = x + jnp.einsum("bhts,bshf,hfd->btd", jax.nn.softmax(scores), v, w[f"o{i}"])
        return x + jax.nn.gelu(layer_norm(x) @ w[f"up{i}"] + w[f"b{i}"]) @ w[f"down{i}"]

    def loss(w):
        x = w["embedding"][IDS]
        for i in range(2):
            x = block(w, i, x)
        logits = jax.nn.log_softmax(layer_norm(x) @ w["embedding"].T)
        return -jnp.take_along_axis(logits, np.roll(IDS, -1)[..., None], -1).mean()

    return loss, weights(embedding=(11, 8), **{f"{k}{i}": s for i in range(2) for k, s in shapes.items()}), 2 * 6 + 1


def lstm():
    """One layer over five steps; its weights are used at each."""

    def loss(p):
        def step(carry, x):
            h, c = lstm_cell(x, *carry, p["w"], p["u"], p["b"])
            return (h, c), h

        zeros = jnp.zeros((4, 8), p["w"].dtype)
        _, hs = lax.scan(step, (zeros, zeros), X.astype(p["w"].dtype))
        return jnp.mean(hs**2)

    return loss, weights(w=(8, 32), u=(8, 32), b=(32,)), 5


@jax.custom_vjp
def sine_layer(x, w, flag):
    return jnp.sin(x @ w) * flag


sine_layer.defvjp(
    lambda x, w, flag: (jnp.sin(x @ w) * flag, (x, w, flag)),
    lambda r, g: (((g * r[2] * jnp.cos(r[0] @ r[1])) @ r[1].T), r[0].T @ (g * r[2] * jnp.cos(r[0] @ r[1])), None),
)


def custom_vjp():
    """Products in its backward rule too, and an integer among its arguments."""

    def loss(p):
        x = X.reshape(20, 8).astype(p["w"].dtype)
        return jnp.mean(sine_layer(sine_layer(x, p["w"], 1), p["u"], 2) ** 2)

    return loss, weights(w=(8, 8), u=(8, 8)), 2


def remat():
    """Two blocks that are computed again in the backward pass, inside a jit."""

    @jax.jit
    @jax.checkpoint
    def block(x, w, u, b):
        return x + jnp.tanh(layer_norm(x) @ w + b) @ u

    def loss(p):
        x = X.astype(p["w"].dtype)
        return jnp.mean(block(block(x, p["w"], p["u"], p["b"]), p["w"], p["u"], p["b"]) ** 2)

    return loss, weights(w=(8, 16), u=(16, 8), b=(16,)), 4


MODELS = [transformer, lstm, custom_vjp, remat]


@functools.cache
def reference(model):
    """The model's gradient in float64."""
    loss, params, _ = model()
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))({name: np.asarray(w, np.float64) for name, w in params.items()})
        return {name: np.asarray(g) for name, g in gradient.items()}


@pytest.mark.few_variants
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_dot_is_in_half_forward_and_backward(model, dtype):
    loss, params, _ = model()
    half_loss = autocast(loss, dtype=dtype)
    assert dots(half_loss, params) == {dtype}
    assert dots(jax.grad(half_loss), params) == {dtype}
    assert dots(autocast(jax.grad(loss), dtype=dtype), params) == {dtype}, "gradients taken inside"


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "model", [custom_vjp, *(pytest.param(m, marks=pytest.mark.slow) for m in (transformer, lstm, remat))]
)
def test_gradients_match_float64(model, dtype):
    # A product rounds two operands and a result. Over n products there and n back that is 6 n roundings, of random
    # sign, which add up like their square root (Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error
    # Analysis"): sqrt(6 n) u, relative to the norm of a parameter's gradient. Seen: up to 0.55 of that.
    loss, params, products = model()
    bound = np.sqrt(6 * products) * float(jnp.finfo(dtype).eps) / 2
    for name, gradient in jax.jit(jax.grad(autocast(loss, dtype=dtype)))(params).items():
        assert gradient.dtype == F32
        exact = reference(model)[name]
        assert exact.dtype == np.float64
        error = np.linalg.norm(np.float64(gradient) - exact) / np.linalg.norm(exact)
        assert error <= bound, f"{name}: {error / bound:.2f} of the bound"
        assert error > bound / 1000, "that is float32"


# Traps of the numerics contract.


@pytest.mark.slow
def test_t1_weight_used_in_a_scan_gets_the_sum_of_its_gradients():
    def loss(w, xs):
        return lax.scan(lambda c, x: (c + jnp.dot(x, w), None), jnp.float32(0), xs)[0]

    w, xs = jnp.ones(1), jnp.ones((1000, 1))
    assert dots(autocast(loss), w, xs) == {BF16}
    assert jax.jit(jax.grad(autocast(loss)))(w, xs) == 1000
    captured = jax.grad(lambda w: autocast(lambda xs: loss(w, xs))(xs))
    assert captured(w) == 1000, "the weight is a constant of the function"

    def cast_outside(w):
        w, half_xs = w.astype(BF16), xs.astype(BF16)
        return lax.scan(lambda c, x: (c + jnp.dot(x, w).astype(F32), None), jnp.float32(0), half_xs)[0]

    assert jax.grad(cast_outside)(w) == 256, "the trap"


def test_t1_tied_weights_add_up_in_float32():
    def loss(w):
        return sum(jnp.dot(jnp.ones(1), w) for _ in range(300))

    assert jax.jit(jax.grad(autocast(loss)))(jnp.ones(1)) == 300


def test_t2_bias_gradient_is_summed_in_float32():
    x, params = jnp.ones((10_000, 1)), {"w": jnp.ones((1, 1)), "b": jnp.ones(1)}

    def loss(p):
        return jnp.sum(x @ p["w"] + p["b"])

    assert dots(autocast(loss), params) == {BF16}
    assert jax.jit(jax.grad(autocast(loss)))(params)["b"] == 10_000


def test_t3_collectives_sum_in_float32():
    mean = autocast(jax.vmap(lambda x: lax.pmean(half(x), "i"), axis_name="i"), dtype=jnp.float16)
    assert np.all(mean(jnp.full(4, 40_000.0)) == jnp.float16(40_000))


def test_t4_softmax_of_many_equal_logits():
    values = autocast(lambda x: jax.nn.logsumexp(half(x)), dtype=jnp.float16)(jnp.zeros(65_536))
    assert abs(values - 16 * np.log(2)) <= 2**-20


def test_t5_norm_of_large_values():
    norm = autocast(lambda x: jnp.linalg.norm(half(x)), dtype=jnp.float16)
    assert norm(jnp.full(4, 300.0)) == 600


def test_t15_embedding_gradient_is_added_up_in_float32():
    ids = jnp.zeros(1000, int)
    loss = autocast(lambda table: jnp.sum(half(table[ids])))
    assert jax.jit(jax.grad(loss))(jnp.ones((2, 1)))[0, 0] == 1000


# Control flow, transformations.


def test_loops_and_branches_keep_their_types():
    w = normal(3, 3)

    def function(x):
        x = lax.while_loop(lambda c: jnp.sum(c @ w) > 100, lambda c: c @ w, x @ w)
        x = lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
        x = lax.switch(2, [lambda x: x, lambda x: x @ w, lambda x: 2 * x @ w], x)
        x, ys = lax.scan(lambda c, y: (c @ w, c @ w), x, jnp.zeros(3))
        return lax.fori_loop(0, 3, lambda i, x: x @ w, x), ys

    x = normal(3, 3, seed=1)
    assert dots(autocast(function), x) == {BF16}
    out, exact = jax.jit(autocast(function))(x), function(x)
    assert [x.dtype for x in out] == [F32, F32]
    for a, b in zip(out, exact, strict=True):
        assert np.linalg.norm(a - b) <= np.sqrt(3 * 10) * 2**-8 * np.linalg.norm(b)
    scan = next(e for e in traced(autocast(function), x) if e.primitive.name == "scan" and len(e.outvars) == 2)
    assert [v.aval.dtype for v in scan.outvars] == [F32, BF16], "stacked outputs stay as they were computed"


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")

    def local(x, w):
        return lax.psum(jnp.sum(jnp.tanh(x @ w)), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, jax.P()), out_specs=jax.P(), check_vma=check_vma)
    x, w = normal(4, 3), normal(3, 3, seed=1)
    for function in (mapped, jax.jit(mapped)):
        assert dots(jax.grad(autocast(function), argnums=1), x, w) == {BF16}
    assert dtypes_at({"psum", "psum_invariant"}, autocast(mapped), x, w) == {F32}
    value, exact = jax.jit(autocast(mapped))(x, w), jnp.sum(jnp.tanh(x @ w))
    assert abs(value - exact) <= 12 * 2**-8 * jnp.max(jnp.abs(jnp.tanh(x @ w)))
    inside = jax.shard_map(autocast(local), mesh=mesh, in_specs=(rows, jax.P()), out_specs=jax.P(), check_vma=check_vma)
    assert jax.jit(inside)(x, w) == value


def test_vmap_is_a_loop():
    x, w = normal(3, 2, 3), normal(3, 3, seed=1)
    gradient = jax.grad(autocast(lambda w, x: jnp.mean(jax.nn.softplus(sine_layer(x, w, 1)))))
    rows = jax.vmap(gradient, in_axes=(None, 0))
    assert dots(rows, w, x) == {BF16}
    one = jax.jit(gradient)
    for row, of_row in zip(x, jax.jit(rows)(w, x), strict=True):
        assert np.linalg.norm(of_row - one(w, row)) <= np.sqrt(6) * 2**-8 * np.linalg.norm(of_row)


@jax.custom_jvp
def cube(x, n):
    return x @ jnp.eye(2) * x * x + n


@cube.defjvp
def cube_jvp(primals, tangents):
    (x, n), (t, _) = primals, tangents
    return cube(x, n), 3 * ((x * x) @ jnp.eye(2)) * t


@jax.custom_jvp
def line(x):
    return x @ jnp.eye(2)


@line.defjvp
def line_jvp(primals, tangents):
    return line(*primals), tangents[0] * jnp.exp(0 * primals[0])


@pytest.mark.slow
def test_custom_jvp_rules_are_kept_and_cast():
    function = autocast(lambda x: cube(x, 2))
    x = jnp.full((2, 2), 3.0)
    out, tangent = jax.jvp(function, (x,), (jnp.ones_like(x),))
    assert np.all(out == 29) and np.all(tangent == 27)  # exact in bfloat16
    assert dots(lambda x: jax.jvp(function, (x,), (x,)), x) == {BF16}
    assert np.all(jax.jit(jax.grad(lambda x: jnp.sum(function(x))))(x) == 27)
    # A result in half and a tangent in float32: they must agree.
    assert np.all(jax.grad(autocast(lambda x: jnp.sum(line(x))))(x) == 1)


# What is left as it is.


def test_integers_bools_and_keys_are_untouched():
    def function(tree):
        return {**tree, "x": tree["x"] @ tree["x"], "sample": jax.random.normal(tree["key"], (4,))}

    tree = {"x": A, "ids": jnp.arange(3), "mask": jnp.array([True, False]), "key": KEY, "none": None}
    out = jax.jit(autocast(function))(tree)
    assert jax.tree.structure(out) == jax.tree.structure(function(tree))
    assert out["ids"].dtype == tree["ids"].dtype and out["mask"].dtype == bool
    assert jnp.array_equal(jax.random.key_data(out["key"]), jax.random.key_data(KEY))
    np.testing.assert_array_equal(out["sample"], jax.random.normal(KEY, (4,)), "random numbers do not change")
    assert (
        autocast(lambda x, i: i @ i + x.sum().astype(int))(A, jnp.eye(2, dtype=int)).dtype
        == jnp.eye(2, dtype=int).dtype
    )


@pytest.mark.slow
def test_float64_complex_and_linear_algebra_run_as_traced():
    x = A @ A.T + jnp.eye(3)
    functions = [
        jnp.linalg.cholesky,
        jnp.linalg.inv,
        lambda x: jnp.abs(jnp.fft.fft(x)),
    ]
    for function in functions:
        np.testing.assert_allclose(
            autocast(lambda x, f=function: f(half(x)))(x),
            function(half(x).astype(BF16).astype(F32)),
            rtol=1e-4,
            atol=1e-4,
        )
    with jax.enable_x64(True):
        assert dots(autocast(lambda x: x @ x), np.eye(3)) == {np.dtype(np.float64)}
    assert autocast(lambda x: jax.pure_callback(lambda x: np.asarray(x), jax.typeof(x), half(x)))(A).dtype == F32


def test_leaves_that_are_no_arrays_are_handed_over():
    def function(x, activation, power, *, name):
        return {"y": activation(x @ x) ** power, "name": name, "power": power}

    out = autocast(function)(A, jax.nn.relu, 2, name="layer")
    assert (out["name"], out["power"], out["y"].dtype) == ("layer", 2, F32)


@pytest.mark.slow
def test_results_have_the_dtypes_of_the_function():
    def function(x):
        return x @ x, jnp.sum(x), jnp.exp(x).astype(jnp.float16), 1.0

    for dtype in (BF16, F16, F32):
        out, plain = autocast(function)(A.astype(dtype)), function(A.astype(dtype))
        assert [jnp.result_type(x) for x in out] == [jnp.result_type(x) for x in plain]
    carry, _ = lax.scan(lambda c, _: (autocast(lambda c: c @ c)(c), None), A, length=2)
    assert carry.dtype == F32, "the body of a scan"


def test_nnx_module():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    assert dots(autocast(lambda state, x: nnx.merge(graph, state)(x)), state, A) == {BF16}
    np.testing.assert_array_equal(autocast(model)(A), autocast(lambda m, x: m(x))(model, A))


# Constants, explicit dtypes, lists.


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: 2 * x, F16),
        (lambda x: x + np.float32(3), F16),
        (lambda x: jnp.maximum(x, -jnp.inf), F16),
        (lambda x: jnp.where(x > 0, x, 0), F16),
        (lambda x: jnp.clip(x, -1, 1), F16),
        (lambda x: x + 1e-8, F32),  # would be x + 0
        (lambda x: x * 1e5, F32),  # would be inf
        (lambda x: jnp.where(x > 0, x, -1e30), F32),
        (lambda x: jnp.zeros(3) + x, F32),  # an accumulator
        (lambda x: x + jnp.arange(3.0), F32),
    ],
)
def test_constants_take_the_dtype_of_what_they_meet_where_it_can_hold_them(function, expected):
    names = {"mul", "add", "max", "min", "select_n", "clamp"}
    assert dtypes_at(names, autocast(lambda x: function(half(x)), dtype=jnp.float16), A) == {expected}


def test_wider_results_that_are_asked_for_are_kept():
    def function(x):
        return lax.dot(x, x, preferred_element_type=jnp.float32)

    def results(x):
        return [e.outvars[0].aval.dtype for e in traced(autocast(function), x) if e.primitive.name == "dot_general"]

    assert results(A.astype(BF16)) == [F32], "explicit: the operands are in half"
    assert results(A) == [BF16], "jnp.dot asks for the dtype of its operands too"


def test_precision_of_float32_products_does_not_stand_in_the_way():
    with jax.default_matmul_precision("F32_F32_F32"):
        (dot,) = [e for e in traced(autocast(jnp.dot), A, B) if e.primitive.name == "dot_general"]
        assert dot.params["precision"] is None
        assert dots(autocast(jnp.dot, NONE), A, B) == {F32}


def test_own_lists():
    lists = OperationLists(low=("tanh", "dot_general"), float32=("logistic",), name="mine")

    def function(x):
        return jnp.tanh(x) + jax.nn.sigmoid(half(x)) + jnp.sum(half(x))

    cast = autocast(function, lists, dtype=jnp.float16)
    assert dtypes_at({"tanh", "reduce_sum"}, cast, A) == {F16}
    assert dtypes_at({"logistic"}, cast, A) == {F32}
    assert dots(autocast(lambda x: x @ x, OperationLists(low=(), float32="dot_general")), A.astype(BF16)) == {F32}


def test_apex_differs_from_torch_as_its_lists_do():
    for function, name in ((jnp.log1p, "log1p"), (lambda x: 1 / x, "div")):
        for lists, dtype in ((TORCH, F32), (APEX_O1, BF16)):
            assert dtypes_at({name}, autocast(lambda x, f=function: f(half(x)), lists), A) == {dtype}


@pytest.mark.parametrize("model", MODELS)
def test_autocast_of_autocast_is_autocast(model):
    loss, params, _ = model()
    once, twice = autocast(loss), autocast(autocast(loss))
    assert str(jax.make_jaxpr(twice)(params)) == str(jax.make_jaxpr(once)(params))


def test_the_inner_autocast_decides():
    def function(x):
        return x @ x + autocast(lambda x: jax.jit(jnp.dot)(x, x), NONE)(x)

    found = Counter(e.outvars[0].aval.dtype for e in traced(autocast(function), A) if e.primitive.name == "dot_general")
    assert found == {BF16: 1, F32: 1}
    gradient = jax.grad(autocast(lambda x: jnp.sum(autocast(jnp.dot, NONE)(x, x))))
    assert dots(autocast(gradient), A) == {F32}


@pytest.mark.slow
def test_one_trace_and_one_jaxpr_for_equal_calls():
    traces = []

    def loss(w, x):
        traces.append(1)
        for _ in range(12):
            x = jax.nn.silu(x @ w)  # a jit of its own
        return jnp.sum(x)

    step = jax.jit(jax.grad(autocast(loss)))
    with jax.checking_leaks():
        step(A, B)
    traces.clear()
    for seed in range(3):
        step(A, normal(2, 3, seed=seed))
    assert len(traces) == 1
    inner = [e for e in jax.make_jaxpr(autocast(loss))(A, B).eqns if e.primitive.name == "jit"]
    assert len(inner) == 12
    assert len({id(e.params["jaxpr"]) for e in inner}) == 1


def test_names_and_lines_of_the_user_are_kept():
    def function(x):
        with jax.named_scope("attention"):
            return x @ x

    (dot,) = [e for e in jax.make_jaxpr(autocast(function))(A).eqns if e.primitive.name == "dot_general"]
    assert str(dot.source_info.name_stack) == "jaxmp.autocast/attention"
    assert any(frame.function_name.endswith("function") for frame in dot.source_info.traceback.frames)


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OperationLists(low="dot", float32=()), "low: 'dot' is no operation .*; did you mean"),
        (lambda: OperationLists(low=(), float32=("exps",)), "'own', float32: 'exps' .*did you mean 'exp'"),
        (lambda: OperationLists(low=("scan",), float32=()), "'scan' is no operation that can be listed"),
        (lambda: OperationLists(low=("exp",), float32=("exp",)), "'exp' is in low and in float32"),
        (lambda: autocast(jnp.sin, dtype=jnp.float32), "dtype=float32: expected bfloat16 or float16"),
        (lambda: autocast(jnp.sin, dtype="bfloat61"), "dtype=bfloat61: .*did you mean 'bfloat16'"),
        (
            lambda: autocast(jax.jit(lambda i: i + 1))(jnp.arange(3)),
            r"no float in it \(its arguments: int32\); expected",
        ),
        (lambda: autocast(lambda: None)(), "autocast of <lambda>: no float .*no arrays"),
    ],
)
def test_bad_input_is_one_message(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_what_was_made_of_a_function_goes_with_it():
    def once(i):
        big = jnp.full((256, 1024), i, jnp.float32)
        inner = jax.jit(lambda x: x @ big)
        autocast(lambda x: inner(x))(jnp.ones((2, 256))).block_until_ready()

    before = len([a for a in jax.live_arrays() if a.nbytes >= 2**20])
    for i in range(3):
        once(i)
    gc.collect()
    assert len([a for a in jax.live_arrays() if a.nbytes >= 2**20]) == before


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_t23_differences_from_one_under_a_logarithm_are_taken_in_float32(dtype):
    functions = {
        "sigmoid": (lambda w, x: jnp.log(1 - jax.nn.sigmoid(x @ w)), -8.000335406372896),
        "tanh": (lambda w, x: jnp.log(1 - jnp.tanh(x @ w / 2) ** 2), -6.614375938556405),
        "exp": (lambda w, x: jnp.log1p(-jnp.exp(-x @ w / 2)), -0.018486),
    }
    w, x = jnp.ones((1, 1)), jnp.array([[8.0]])
    for function, exact in functions.values():
        under = autocast(function, dtype=dtype)
        np.testing.assert_allclose(under(w, x)[0, 0], exact, rtol=2e-3)
        gradients = [jax.grad(lambda w, f=f: jnp.sum(f(w, x)))(w) for f in (under, function)]
        np.testing.assert_allclose(*gradients, rtol=2e-2)


def test_t20_an_outer_product_of_angles_is_not_in_half():
    position, rate = jnp.arange(1024.0), jnp.array([1.0, 0.1])
    found = autocast(lambda p, r: jnp.sin(jnp.einsum("t,f->tf", p, r)))(position, rate)
    exact = np.sin(np.outer(np.arange(1024.0), np.float64([1, np.float32(0.1)])))
    np.testing.assert_allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize("lists", [jnp.float16, "mixed_float16"])
def test_a_dtype_or_a_policy_in_the_place_of_the_lists_is_refused(lists):
    with pytest.raises(
        InputError, match=r"expected TORCH, APEX_O1 or OperationLists; .*autocast\(fn, dtype=jnp.float16\)$"
    ):
        autocast(jnp.sin, lists)
