"""`what_if`: what recipes would do to a layer's products, beside what is computed of its operands by hand."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.errors import InputError
from jaxmp.instruments.what_if import (
    STALL,
    Measurements,
    WhatIf,
    _bias_and_ratio,
    _Measure,
    _read,
    make_what_if,
    recipe_of,
)
from jaxmp.modules.products import ObservedProduct
from jaxmp.precision.blocks import parse_block_format, quantize, round_blocks
from jaxmp.precision.product import Matrices, random_bits
from jaxmp.precision.recipe import PRODUCTS

ROWS, K, N = 32, 64, 48


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(N, use_bias=False, name="dense")(x)


class Twice(nn.Module):
    """One layer that runs twice, in a scan."""

    @nn.compact
    def __call__(self, x):
        turn = nn.scan(
            lambda module, x, _: (module(x), None), variable_broadcast="params", split_rngs={"params": False}
        )
        return turn(nn.Dense(K, use_bias=False, name="dense"), jnp.zeros((ROWS, K)), jnp.zeros(2))[0] + x


def loss_of(model):
    apply = jaxmp.with_policy(model.apply, "float32")

    def loss(params, model_state, batch, key):
        y = apply({"params": params}, batch["x"])
        return jnp.sum(y * batch["cotangent"]), (jnp.float32(1), {}, model_state)

    return loss


@pytest.fixture(scope="module")
def operands():
    """Activations, weights, and the gradient of the result, with a spread of sizes."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.normal(size=shape) * np.exp(rng.normal(size=shape)))  # noqa: E731
    return draw(ROWS, K), draw(K, N), draw(ROWS, N)


def measured(operands, *recipes):
    x, w, g = map(jnp.asarray, operands)
    measure = jax.jit(make_what_if(loss_of(Layer()), {text: recipe_of(text) for text in recipes}))
    arguments = {"dense": {"kernel": w}}, {}, jnp.float32(2), {"x": x, "cotangent": g}, jax.random.key(0)
    return measure(*arguments).read()


@pytest.mark.slow
def test_losses_are_those_of_the_operands_that_each_product_multiplies(operands):
    x, w, g = operands
    g = 2 * g  # times the loss scale
    recipe = "fprop=mxfp4/mxfp4,dgrad=e5m2/high,wgrad=mxfp4:rceil/int4:channel,stochastic=weights"
    found = measured(operands, "mxfp4", recipe)
    assert [(row.recipe[:5], row.product) for row in found.rows] == [
        *(("mxfp4", product) for product in ("fprop", "dgrad", "wgrad")),
        *(("fprop", product) for product in ("fprop", "dgrad", "wgrad")),
    ]
    fprop, dgrad, wgrad = found.rows[3:]
    q = lambda a, format, axis=None: np.asarray(quantize(jnp.asarray(a), format, axis=axis), np.float64)  # noqa: E731
    noise = random_bits(jax.random.fold_in(jax.random.key(0), 1)[None], w.shape)  # of the second operand of fprop
    drawn = np.asarray(round_blocks(jnp.asarray(w), noise, parse_block_format("mxfp4"), (0,)), np.float64)
    cases = [
        (fprop, "activations", x, q(x, "mxfp4", 1)),
        (fprop, "weights", w, drawn),
        (dgrad, "gradients", g, q(g, "e5m2")),
        (dgrad, "weights", w, w),
        (wgrad, "activations", x, q(x, "mxfp4:rceil", 0)),
        (wgrad, "gradients", g, q(g, "int4:channel", 0)),
    ]
    rounded = {}
    for row, role, exact, quantised in cases:
        rounded[row.product, role] = quantised
        error, of = quantised - exact, row.operands[role]
        assert of.mse == pytest.approx(np.mean(error**2) / np.mean(exact.astype(np.float64) ** 2), rel=1e-3, abs=1e-12)
        assert of.bias == pytest.approx(np.sum(error * exact) / np.sum(exact.astype(np.float64) ** 2), abs=1e-5)
        assert of.underflow == pytest.approx(np.mean(quantised == 0))
    products = {
        "fprop": (x @ w, rounded["fprop", "activations"] @ rounded["fprop", "weights"]),
        "dgrad": (g @ w.T, rounded["dgrad", "gradients"] @ rounded["dgrad", "weights"].T),
        "wgrad": (x.T @ g, rounded["wgrad", "activations"].T @ rounded["wgrad", "gradients"]),
    }
    for row in (fprop, dgrad, wgrad):
        exact, approximate = (each.astype(np.float64) for each in products[row.product])
        error = approximate - exact
        assert row.signal_to_noise == pytest.approx(np.linalg.norm(exact) / np.linalg.norm(error), rel=1e-3)
        assert row.bias == pytest.approx(np.sum(error * exact) / np.sum(exact**2), abs=1e-5)
        assert row.low < row.bias < row.high
    # Under the floor rule, what is more than 7/8 of 8 times the scale is clipped to 6 of it; rounded up, nothing is.
    blocks = np.abs(x).reshape(ROWS, -1, 32)
    scale = 2.0 ** (np.floor(np.log2(blocks.max(-1, keepdims=True))) - 2)
    assert fprop.operands["activations"].clipped == pytest.approx(np.mean(blocks > 7 * scale))
    assert fprop.operands["activations"].clipped > 0
    assert wgrad.operands["activations"].clipped == 0
    blocks = np.abs(w.T).reshape(N, -1, 32)  # rounded stochastically, all that is above 6 times the scale is clipped
    of_weights = 2.0 ** (np.floor(np.log2(blocks.max(-1, keepdims=True))) - 2)
    assert fprop.operands["weights"].clipped == pytest.approx(np.mean(blocks > 6 * of_weights))
    assert fprop.operands["activations"].spread == pytest.approx(np.log2(scale).std(), abs=1e-3)
    assert dgrad.operands["weights"]._replace(bias=None, low=None, high=None).format == "high"
    assert fprop.operands["weights"].spread > 0 and dgrad.operands["gradients"].spread is None


@pytest.mark.slow
def test_a_layer_in_a_scan_is_measured_over_all_its_turns(operands):
    x, cotangent = jnp.asarray(operands[0]), jnp.asarray(operands[0][::-1])
    w = jnp.eye(K) / 4
    loss, recipes = loss_of(Twice()), {"mxfp4": recipe_of("mxfp4:rceil")}
    batch = {"x": x, "cotangent": cotangent}
    params = Twice().init(jax.random.key(0), x)["params"]
    sums = jax.jit(make_what_if(loss, recipes))(
        jax.tree.map(lambda _: w, params), {}, jnp.float32(1), batch, jax.random.key(0)
    )
    (path,) = sums.sums
    assert path.endswith("dense")
    numbers = sums.sums[path][0, 0, 2 * 16 + 1]  # of the first operand of fprop
    assert numbers == 2 * ROWS * K


def test_recipes_are_named_or_one_format_for_all_operands():
    assert recipe_of("nvfp4") == jaxmp.parse_policy("nvfp4").recipe
    assert {str(each.format) for each in recipe_of("e4m3:block32").operands()} == {"e4m3:block32"}
    for text, words in {
        "mxfp9": "did you mean 'mxfp8'",
        "nvfp4,hadamrd=16": "did you mean 'hadamard'",
        "float32,o=bf16": "rounds no operand",
        "e4m3,e5m2": "expected one of",
    }.items():
        with pytest.raises(InputError) as error:
            recipe_of(text)
        assert words in str(error.value), error.value


def test_a_bias_has_an_interval_and_what_is_not_finite_has_none():
    rng = np.random.default_rng(0)
    exact, inside = rng.normal(size=(200, 16, 400)), 0
    for numbers in exact:
        error = -0.02 * numbers + 0.3 * rng.normal(size=numbers.shape)
        sums = np.concatenate([(error * numbers).sum(1), (numbers**2).sum(1), [(error**2).sum()]])
        bias, low, high, ratio = _bias_and_ratio(sums)
        inside += low < -0.02 < high
        assert low < bias < high and ratio == pytest.approx(1 / math.hypot(0.3, 0.02), rel=0.05)
    assert 0.90 < inside / 200 < 0.99  # 95 % of them
    assert _bias_and_ratio(np.zeros(33)) == (None, None, None, None)
    # Of numbers this small, the squares of errors are 0 in float32: that would be no error at all.
    assert _bias_and_ratio(np.r_[np.zeros(16), np.full(16, 1e-30), 0]) == (None, None, None, None)
    assert _bias_and_ratio(np.r_[np.full(32, 1.0), np.inf]) == (None, None, None, None)
    assert _bias_and_ratio(np.r_[np.zeros(16), np.ones(16), 0])[3] == math.inf


COVERED = [  # recipe, product, (rows, K, N), whether both operands are the same array; all but the first in full size
    ("wgrad=int4:channel,stochastic=wgrad", "wgrad", (64, 16, 16), True),
    ("mxfp4", "dgrad", (256, 64, 10), False),
    ("mxfp4", "dgrad", (256, 64, 64), False),
    ("fprop=high/mxfp4:rceil,stochastic=weights", "fprop", (1024, 64, 10), False),
]


@pytest.mark.parametrize(
    ("text", "product", "shape", "same"),
    [pytest.param(*case, marks=[pytest.mark.full_size] if i else []) for i, case in enumerate(COVERED)],
)
def test_the_interval_of_a_products_bias_covers_that_of_unbiased_rounding_95_times_of_100(
    text, product, shape, same, monkeypatch
):
    recipe, draws, rng = recipe_of(text), 300, np.random.default_rng(0)
    measure, (rows, k, n) = _Measure((recipe,)), shape
    x, w, g = (np.float32(rng.normal(size=(draws, *each))) for each in ((rows, k), (k, n), (rows, n)))

    def sums(given):
        seed, x, w, g = given

        def noise(keys, shape):  # the measure's own is the same in each draw
            return random_bits(jax.vmap(lambda key: jax.random.fold_in(key, seed))(keys), shape)

        monkeypatch.setattr("jaxmp.instruments.what_if.random_bits", noise)
        return measure(ObservedProduct(Matrices(), x, w, x @ w), g)

    found = jax.device_get(jax.jit(lambda given: jax.lax.map(sums, given))((np.arange(draws), x, w, x if same else g)))
    place = list(PRODUCTS).index(product)
    rows = [_read(text, recipe, "dense", product, each[0, place]) for each in found]
    covered = sum(row.low < 0 < row.high for row in rows) / draws
    assert 0.91 < covered < 0.985, covered  # 3 standard deviations of 300 draws


def test_a_gradient_below_the_square_root_of_3_is_marked():
    recipe = recipe_of("mxfp4")
    sums = np.ones((1, 3, 2 * 40 + 513), np.float32)
    sums[:, :, -1] = 256 / 1.7**2  # signal to noise 1.7, of a square of 256
    found = Measurements({"dense": jnp.asarray(sums)}, (("mxfp4", recipe),)).read()
    assert STALL == pytest.approx(1.7321, abs=1e-4)
    assert [row.stalls for row in found.rows] == [False, True, True]
    assert "marked *: 2" in str(found) and str(found).count("1.7 *") == 2
    assert [row["signal_to_noise"] for row in found.to_json()] == pytest.approx([1.7] * 3)
    assert isinstance(found, WhatIf)


def test_a_loss_without_layers_that_are_measured_is_one_message():
    measure = make_what_if(lambda p, s, b, k: (jnp.sum(p), (jnp.float32(1), {}, s)), {"mxfp8": recipe_of("mxfp8")})
    with pytest.raises(InputError, match="no layer with a product"):
        measure(jnp.ones(2), {}, jnp.float32(1), {"x": jnp.ones((1, 2))}, jax.random.key(0))
