"""Ranges by block, beside blocks that are cut out by hand; and what `blame` says of them."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.instruments.block_ranges import block_operands, clipping_limit, is_clipped, make_block_ranges
from jaxmp.instruments.nonfinite import blame
from jaxmp.instruments.what_if import make_what_if, recipe_of
from jaxmp.modules.linen import init_delayed_scaling
from jaxmp.precision.policy import parse_policy
from jaxmp.precision.recipe import RecipeOperand, parse_operand

ROWS, K, N = 64, 96, 32


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(N, use_bias=False, name="dense")(x)


def loss_of(policy):
    apply = jaxmp.with_policy(Layer().apply, policy)

    def loss(params, model_state, batch, key):
        y = apply({"params": params}, batch["x"], rngs={"params": key})
        return jnp.sum(y * batch["cotangent"]), (jnp.float32(1), {}, model_state)

    return loss


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.normal(size=shape) * np.exp(rng.normal(size=shape)))  # noqa: E731
    return draw(ROWS, K), draw(K, N), draw(ROWS, N)


def measured(policy, operands, scale=1.0):
    x, w, g = map(jnp.asarray, operands)
    measure = make_block_ranges(loss_of(policy))
    arguments = {"dense": {"kernel": w}}, {}, jnp.float32(scale), {"x": x, "cotangent": g}, jax.random.key(0)
    return {(each.product, each.role): each for each in jax.jit(measure)(*arguments).read()}


def blocks_of(x, axis, length=32):
    """(blocks, length), in the order in which scales lie: those of a number's place along the other axes."""
    x = np.moveaxis(x, axis, -1)
    return np.abs(x.reshape(*x.shape[:-1], -1, length))


@pytest.mark.slow
def test_blocks_are_those_along_the_axis_that_each_product_sums_over(operands):
    x, w, g = operands
    found = measured("fprop=mxfp4,dgrad=mxfp4,wgrad=mxfp4,stochastic=wgrad", operands, scale=4.0)
    arrays = {"activations": x, "weights": w, "gradients": 4 * g}
    axis = {"fprop": (1, 0), "dgrad": (1, 1), "wgrad": (0, 0)}
    for product, roles in {
        "fprop": ("activations", "weights"),
        "dgrad": ("gradients", "weights"),
        "wgrad": ("activations", "gradients"),
    }.items():
        for role, along in zip(roles, axis[product], strict=True):
            own, blocks = found[product, role], blocks_of(arrays[role], along)
            amax = blocks.max(-1)
            scale = 2.0 ** np.floor(np.log2(amax / 4))
            exponents, counts = np.unique(np.log2(scale).astype(int), return_counts=True)
            assert own.scales.exponents == dict(zip(exponents.tolist(), counts.tolist(), strict=True))
            assert own.blocks == amax.size and own.numbers == arrays[role].size
            assert own.amax.largest == amax.max() and own.amax.smallest == amax.min()
            # 6 is the largest: from 7 on a number is clipped to it, and above it where rounding is stochastic.
            over = blocks > (6 if product == "wgrad" else 7) * scale[..., None]
            assert (own.clipped, own.clipped_blocks) == (over.sum(), over.any(-1).sum())
            first = own.first_clipped
            place = np.moveaxis(over.any(-1), -1, along)
            assert first.place == tuple(np.argwhere(place)[0])
            there = np.moveaxis(amax, -1, along)[first.place], np.moveaxis(scale, -1, along)[first.place]
            assert (first.amax, first.scale) == there
            assert own.first_nonfinite is None


@pytest.mark.parametrize(
    ("format", "limits"),
    {
        "mxfp4": (7 * 2.0**-20, 6 * 2.0**-20),  # a power of two times the largest number, exactly
        "mxfp8": (464 * 2.0**-126, 448 * 2.0**-126),
        "int4:tensor:e8m0": (7.5, 7),
        "e5m2": (61440, 57344),
        "block128": (464 * 1.3, 448 * 1.3 * (1 + 2.0**-20)),  # a rounded scale: not by its rounding error
        "e4m3:delayed": (464 * 1.3, 448 * 1.3 * (1 + 2.0**-20)),
        "mxfp6_e3m2": (np.nan, np.nan),
        "nvfp4": (np.inf, np.inf),
    }.items(),
)
def test_stochastic_rounding_clips_all_that_is_above_the_largest_number(format, limits):
    for rounding, limit in zip(("nearest", "stochastic"), limits, strict=True):
        operand = RecipeOperand("dgrad", "gradients", parse_operand(format), rounding, 0)
        found = float(clipping_limit(jnp.float32(limits[0]), operand))
        assert found == pytest.approx(limit, rel=0 if format[:2] in ("mx", "in", "e5") else 1e-7, abs=0, nan_ok=True)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_negative_numbers_of_mxint8_reach_one_further(rounding):
    operand = RecipeOperand("fprop", "activations", parse_operand("mxint8"), rounding, 0)
    x = np.float32([-1.9999, -1.5, 1.5, 1.99, 1.9999]) * np.float32(2.0**-30)
    limit = jnp.float32(2.0**-30 * (127.5 / 64))  # of a scale of 2^-30, under which 127/64 is the largest
    stochastic = rounding == "stochastic"
    assert is_clipped(x, limit, operand).tolist() == [False, False, False, stochastic, True]
    beyond = np.float32([-2.01, -2.001, -2]) * np.float32(2.0**-30)
    assert is_clipped(beyond, limit, operand).tolist() == [True, stochastic, False]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_block_of_mxint8_is_clipped_by_what_is_positive(sign):
    x = np.ones((2, 32), np.float32)
    x[1, 3] = sign * 1.999
    found = measured("fprop=mxint8", (x, np.ones((32, N), np.float32), np.ones((2, N), np.float32)))
    activations = found["fprop", "activations"]
    assert (activations.clipped, activations.clipped_blocks) == ((1, 1) if sign > 0 else (0, 0))
    assert activations.first_clipped == (((1, 0), np.float32(1.999), 1.0) if sign > 0 else None)
    rows = jax.jit(make_what_if(loss_of("float32"), {"mxint8": recipe_of("mxint8")}))
    arguments = {"dense": {"kernel": jnp.ones((32, N))}}, {}, jnp.float32(1), {"x": x, "cotangent": jnp.ones((2, N))}
    fprop = next(row for row in rows(*arguments, jax.random.key(0)).read().rows if row.product == "fprop")
    assert fprop.operands["activations"].clipped == (1 / 64 if sign > 0 else 0)


@pytest.mark.full_size
@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4", "block128", "fp8_current"])
def test_the_first_block_that_is_not_finite_is_named(operands, policy):
    x, w, g = (each.copy() for each in operands)
    g[40, 7] = np.inf
    found = measured(policy, (x, w, g))
    assert set(found) == {(each.product, each.role) for each in block_operands(parse_policy(policy).recipe)}
    for (_, role), each in found.items():
        assert (each.first_nonfinite is not None) == (role == "gradients")
        assert (each.scales.nan > 0) == (role == "gradients")
    row = {"mxfp8": 40, "nvfp4": 40, "block128": 40, "fp8_current": 0}[policy]
    assert found["dgrad", "gradients"].first_nonfinite.place[0] == row
    block = {"mxfp8": 32, "nvfp4": 16, "block128": 128, "fp8_current": 64}[policy]
    assert found["wgrad", "gradients"].first_nonfinite.place[0] == 40 // block


@pytest.mark.slow
def test_blame_names_operand_and_product_of_an_overflow_in_a_recipe(operands):
    x, w, g = operands
    policy = "fprop=e4m3/e4m3,dgrad=high/high,wgrad=high/e5m2"
    batch = {"x": jnp.asarray(x), "cotangent": jnp.asarray(g).at[3, 5].set(1e6)}
    gradient = jax.grad(lambda params: loss_of(policy)(params, {}, batch, jax.random.key(0))[0])
    found = blame(gradient, {"dense": {"kernel": jnp.asarray(w)}})
    assert found.primitive == "quantize_e5m2 of the gradients of wgrad"
    assert found.path == "Layer/dense" and found.backward


@pytest.mark.full_size
def test_ranges_and_blame_of_a_run_know_of_blocks(tmp_path):
    from jaxmp.experiment.config_file import ConfigFile

    options = ["--precision", "nvfp4", "--loop.steps", "2", "--loop.ranges-every", "1", "--model.features", "32"]
    file = ConfigFile.find("digits_mlp")
    experiment = file.experiment(options)
    fitted = jaxmp.fit(experiment, workdir=tmp_path, name="digits_mlp", origin=file.origin(options), log=lambda _: None)
    run = jaxmp.Run(fitted.path)
    kinds = run.ranges[0]["ranges"]
    assert (
        set(kinds["block_amax"]) == set(kinds["block_scales"]) >= {"Dense_0 fprop weights", "Dense_1 wgrad gradients"}
    )
    assert kinds["block_scales"]["Dense_1 fprop weights"]["size"] == 2 * 1  # (32, 10) in blocks of 16x16
    found = jaxmp.blame(run, 1)
    assert {each.role for each in found.blocks} <= {"activations", "weights", "gradients"}
    assert found.worst is None, found.worst
    assert ("clipped" in str(found)) == bool(found.blocks)


class One(nn.Module):
    """A model of one layer."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer.clone(name="one", parent=self)(x)


def measured_of(layer, x, policy):
    """The kernel, the blocks of the layer's operands, and its model state; the gradient of the result is ones."""
    model, x = One(layer), jnp.asarray(x)
    variables = model.init(jax.random.key(0), x)
    state, apply = init_delayed_scaling(model, policy, x), jaxmp.with_policy(model.apply, policy)

    def loss(params, model_state, batch, key):
        return jnp.sum(apply({"params": params, **model_state}, batch["x"])), (jnp.float32(1), {}, model_state)

    measure = make_block_ranges(loss)
    arguments = variables["params"], state, jnp.float32(1), {"x": x}, jax.random.key(0)
    found = {(each.product, each.role): each for each in jax.jit(measure)(*arguments).read()}
    return np.asarray(variables["params"]["one"]["kernel"]), found, state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "shape", "kernel_as_blocks"),
    [
        (nn.Einsum((4, 5, 48), "bik,ijn->bkjn", use_bias=False), (2, 4, 3), None),
        (nn.ConvTranspose(32, (2, 2), use_bias=False), (2, 3, 3, 64), lambda w: blocks_of(w, 2)),
        (
            nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False),
            (2, 4, 4, 64),
            lambda w: blocks_of(w, 2),  # 32 channels of a group are one block, for each of the 6 features
        ),
    ],
    ids=["Einsum", "ConvTranspose", "grouped Conv"],
)
def test_layers_without_a_place_for_another_product_have_blocks_too(layer, shape, kernel_as_blocks):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel, found, _ = measured_of(layer, x, "fprop=mxfp4")
    assert len(found) == 2 and all(each.layer == "one" for each in found.values())
    weights, activations = found["fprop", "weights"], found["fprop", "activations"]
    assert weights.numbers == kernel.size and activations.numbers == x.size
    assert weights.amax.largest == np.abs(kernel).max() and activations.amax.largest == np.abs(x).max()
    if kernel_as_blocks is not None:
        assert weights.blocks == kernel_as_blocks(kernel)[..., 0].size
        assert weights.amax.smallest == kernel_as_blocks(kernel).max(-1).min()


@pytest.mark.slow
def test_a_delayed_operand_is_one_block_with_the_scale_that_the_step_uses():
    x = np.float32(np.random.default_rng(0).normal(size=(8, 16)) * 300)
    kernel, found, state = measured_of(nn.Dense(4, use_bias=False), x, "fp8_delayed")
    assert {name for name, each in found.items() if each.blocks == 1} == set(found) and len(found) == 6
    activations = found["fprop", "activations"]
    assert state["delayed_scaling"]["one"]["activations_0"]["scale"] == 1
    assert activations.amax.largest == np.abs(x).max() and activations.scales.largest == 1
    assert activations.clipped == (np.abs(x) > 464).sum() > 0  # 448 is the largest; from 464 on a number is clipped
    assert activations.first_clipped.amax == np.abs(x).max()
    assert found["wgrad", "gradients"].clipped == 0 and found["fprop", "weights"].amax.largest == np.abs(kernel).max()
