"""Weights of a few bits: packed and unpacked without a change, listed, measured, and chosen within a budget."""

from __future__ import annotations

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deployed_runs import images, trained

import jaxmp
from jaxmp import InputError
from jaxmp.data.source import Columns
from jaxmp.deploy import quantise as deploy
from jaxmp.deploy.contraction import summed_axes
from jaxmp.deploy.export import Measured
from jaxmp.deploy.forward import Forward, forward
from jaxmp.deploy.quantise import (
    FORMATS,
    Calibrated,
    Quantised,
    _Judge,
    _unrounded,
    packed_weight,
    quantise,
    why_kept,
)
from jaxmp.modules.linen import UnderPolicy
from jaxmp.modules.model import as_model
from jaxmp.trees import by_path

pytest.importorskip("flatbuffers", reason="exporting needs flatbuffers: pip install 'jaxmp[export]'")

pytestmark = pytest.mark.xdist_group("deploy")  # one worker: the fixture trains


@pytest.mark.full_size
@pytest.mark.parametrize("format", [*FORMATS.values(), "int3:group32"])
def test_a_packed_weight_holds_the_numbers_of_its_format_along_what_is_summed(format):
    rng = np.random.default_rng(0)
    block = jaxmp.parse_block_format(format)
    for name, shape, axis in (
        ("Dense_0/kernel", (70, 5), 0),
        ("Conv_0/kernel", (3, 3, 8, 5), 0),
        ("Embed_0/embedding", (7, 70), 1),
    ):
        weight = rng.standard_normal(shape).astype(np.float32)
        packed = packed_weight(name, weight, block, {})
        right = jaxmp.quantize(weight.reshape(-1, shape[-1]), block, axis=axis).reshape(shape)
        assert np.array_equal(packed.unpack(), right)
        assert packed.blocks.elements.dtype == jnp.uint8
        assert packed.blocks.elements.size <= -(-weight.size * block.element.bits // 8) + 2 * weight.size // 70 + 70
        # Each output has its own scale, which no other changes.
        others = weight.copy()
        others[(slice(None),) * (len(shape) - 1) + (0,) if axis == 0 else (0,)] *= 64
        same = packed_weight(name, others, block, {}).unpack()
        if block.scale != "e4m3":  # whose scale of the tensor all share
            rest = (..., slice(1, None)) if axis == 0 else (slice(1, None),)
            assert np.array_equal(same[rest], right[rest])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "axes"), [("Conv_0/kernel", (2, 4, 3), (0, 1)), ("Embed_0/embedding", (3, 8), (1,))]
)
def test_each_output_of_a_kernel_and_each_row_of_an_embedding_has_its_own_scale(name, shape, axes):
    block, rng = jaxmp.parse_block_format("int8:channel"), np.random.default_rng(0)
    weight = (rng.standard_normal(shape) * np.exp2(rng.integers(-6, 6, shape[-1]))).astype(np.float32)
    scale = np.abs(weight.astype(np.float64)).max(axis=axes, keepdims=True) / 127
    found = jax.jit(lambda x: packed_weight(name, x, block, {}).unpack())(weight)
    np.testing.assert_allclose(found, np.rint(weight / scale) * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_folder_computes_with_the_rounded_weights_to_the_bit(run, tmp_path):
    found = quantise(run, output=tmp_path / "out", weights="int4", keep=("Dense_1",))
    stays = {layer.path: layer.why for layer in found.layers if layer.format is None}
    assert stays.pop("Dense_1/kernel") == "--keep" and set(stays.values()) == {"1 axis"}
    assert {layer.path for layer in found.layers if layer.format} == {"Conv_0/kernel", "Dense_0/kernel"}
    state = run.state("best")
    of = forward(run, state, run.source("test"))
    block = jaxmp.parse_block_format(FORMATS["int4"])
    weights = [
        packed_weight(name, leaf, block, {}).unpack() if name in ("Conv_0/kernel", "Dense_0/kernel") else leaf
        for name, leaf in of.weights.items()
    ]
    artefact = jaxmp.load(tmp_path / "out")
    for rows in (1, 7, 512):
        (expected,) = jax.jit(of.function)(weights, [], [images(rows)])
        assert artefact(images(rows)).tobytes() == np.asarray(expected).tobytes()
    stored = sum(layer.nbytes for layer in found.layers)
    file = (tmp_path / "out" / "weights.safetensors").read_bytes()
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    assert len(file) - 8 - int.from_bytes(file[:8], "little") == stored == found.nbytes < found.nbytes_before
    assert header["Dense_0/kernel.elements"]["dtype"] == "U8"
    assert artefact.manifest["run"]["formats"]["Dense_0/kernel"] == FORMATS["int4"]
    assert not artefact.certificate["against"]["run"]["bit_equal"]


@pytest.mark.full_size
def test_a_budget_is_kept_with_the_fewest_bits_that_were_found(run, tmp_path, monkeypatch):
    judge = _Judge.__call__

    def by_divergence(self, weights):  # so few rows are all right in 2 bits, too: each bit of divergence is a point
        _, divergence = judge(self, weights)
        return 1 - divergence, divergence

    monkeypatch.setattr(_Judge, "__call__", by_divergence)
    monkeypatch.setattr(_Judge, "of_run", lambda self: 1.0)
    sizes, said = [], []
    for name, budget in (("loose", 1e6), ("middle", None), ("tight", 0.0)):
        budget = 0.5 * float(said[0].split(":")[1].split()[0]) if budget is None else budget
        said.clear()
        found = quantise(run, output=tmp_path / name, weights="int2:channel", budget=budget, log=said.append)
        assert float(said[-1].split(":")[1].split()[0]) <= budget + 0.005
        assert all(float(each.split(":")[1].split()[0]) > budget - 0.005 for each in said[:-1])
        sizes.append(found.nbytes)
    assert sizes[0] < sizes[1] < sizes[2] == found.nbytes_before
    assert found.trade is not None and found.trade.before.rows == 20
    change, low, high = found.trade.change
    assert change == pytest.approx(found.trade.after.share - found.trade.before.share) and low <= change <= high


def test_a_matrix_called_scale_is_quantised_where_a_product_sums_over_it():
    matrix = np.ones((8, 8), np.float32)
    assert why_kept("scale", matrix, (), {"scale": (0,)}) == ""
    assert why_kept("layers/norm/scale", matrix, (), {"scale": (0,)}) == "in no product"


@pytest.mark.full_size
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_method_rounds_kernels_of_dense_layers_such_that_outputs_are_nearer(run, tmp_path, method):
    found = quantise(run, output=tmp_path / "out", weights="int4", method=method, calibrate=2)
    stored = {layer.path: layer.stored for layer in found.layers if layer.format}
    assert stored["Conv_0/kernel"] == "int4:block64, to nearest: no inputs of a Dense layer were observed"
    assert {stored[f"Dense_{i}/kernel"] for i in (0, 1)} == {f"int4:block64, {method}"}
    assert found.artefact.manifest["run"]["methods"]["Dense_0/kernel"] == method
    plain = quantise(run, output=tmp_path / "plain", weights="int4")
    errors = [
        each.artefact.certificate["against"]["run"]["outputs"]["output"]["median_relative"] for each in (plain, found)
    ]
    assert errors[1] < errors[0]
    onnx = quantise(run, output=tmp_path / "onnx", weights="int4", method=method, calibrate=2, format="onnx")
    mine, right = onnx.artefact(images(7)), found.artefact(images(7))
    assert np.abs(mine - right).max() < 2**-7 * np.abs(right).max()  # mixed_bfloat16


@pytest.mark.full_size
@pytest.mark.parametrize("format", [*FORMATS, "int3:group32", "mxfp6_e2m3"])
def test_packed_weights_in_an_onnx_file_give_the_outputs_of_stablehlo(tmp_path, format):
    pytest.importorskip("onnxruntime", reason="ONNX files are run by onnxruntime: pip install 'jaxmp[onnx]'")
    run = trained(tmp_path, "float32")
    options = {"weights": format, "activations": {"int8": "int8", "e4m3": "e4m3"}.get(format)}
    found, right = (
        quantise(run, output=tmp_path / name, format=name, **options).artefact for name in ("onnx", "stablehlo")
    )
    rows = images(300)
    mine, other = found(rows), right(rows)
    assert np.abs(mine - other).max() < 1e-5 * np.abs(other).max()
    assert np.array_equal(mine.argmax(axis=1), other.argmax(axis=1))


@pytest.mark.full_size
def test_activations_are_rounded_row_by_row(run, tmp_path):
    found = quantise(run, output=tmp_path / "out", weights="int8", activations="int8")
    assert "activations      int8, a scale for each vector of each row; emulated" in str(found) and not found.unrounded
    assert "fprop=int8:channel/high" in found.artefact.manifest["precision"]
    many = images(7)
    together, alone = found.artefact(many), np.concatenate([found.artefact(row[None]) for row in many])
    assert np.abs(together - alone).max() < 1e-2 * np.abs(together).max()
    plain = quantise(run, output=tmp_path / "plain", weights="int8")
    errors = [
        each.artefact.certificate["against"]["float32"]["outputs"]["output"]["median_relative"]
        for each in (plain, found)
    ]
    assert errors[0] < errors[1] < 0.2


@pytest.mark.slow
def test_bad_input_is_one_message_and_nothing_is_written(run, tmp_path):
    out = tmp_path / "out"
    for options, expected in (
        ({"weights": "int9x"}, "--weights int9x: expected int8, int4, e4m3, mxfp8, nvfp4"),
        ({"weights": "nvpf4"}, "did you mean 'nvfp4'"),
        ({"activations": "int4"}, "--activations int4: expected int8, e4m3"),
        ({"keep": ("Dense_7",)}, "keep Dense_7: no such weight; there are"),
        ({"keep": ("**",)}, "has no weight that can be quantised"),
        ({"budget": -1.0}, "--budget -1.0"),
        ({"rows": 0}, "rows 0"),
        ({"method": "gtpq"}, "--method gtpq: expected nearest, gptq, awq; did you mean 'gptq'?"),
        ({"method": "awq"}, "--method awq looks at the inputs of layers; expected --calibrate N"),
        ({"method": "gptq", "calibrate": 1, "weights": "nvfp4"}, "--method gptq with --weights nvfp4: expected int8"),
        ({"method": "gptq", "calibrate": 1, "budget": 1.0}, "--budget 1 with --method gptq"),
        ({"method": "gptq", "calibrate": 0}, "--calibrate = 0"),
        ({"method": "gptq", "calibrate": 1, "keep": ("Dense_*/kernel",)}, "--method gptq: no weight to be quantised"),
        ({"checkpoint": "bset"}, "checkpoint 'bset': expected best, last, ema; did you mean 'best'?"),
    ):
        with pytest.raises(InputError) as error:
            quantise(run, output=out, **options)
        assert expected in str(error.value), options
    assert not any(tmp_path.iterdir())


class Heads(nn.Module):
    """Attention, a cell, layers in nn.scan, and an embedding that is tied to the head."""

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(11, 6, name="embed")
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(embed(words))
        x = nn.RNN(nn.OptimizedLSTMCell(6))(x)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        return embed.attend(nn.Conv(6, (3,), name="conv")(x))


class Gain(nn.Module):
    """A factor for each feature, which comes into the next product."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("gain", nn.initializers.ones, x.shape[-1:])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="dense")(x), None


def forward_of(model, *inputs, precision=None):
    """The forward function of a Linen module with its initial weights, or, under a policy, with their shapes."""
    init = model.init if precision is None else functools.partial(jax.eval_shape, model.init)
    params = init(jax.random.key(0), *inputs)["params"]

    def function(given, state, inputs):
        given = jax.tree.unflatten(jax.tree.structure(params), given)
        if precision is None:
            return [model.apply({"params": given}, *inputs)]
        return [under_policy.apply(given, {}, *inputs, key=jax.random.key(0))[0]]

    under_policy = as_model(model).under(UnderPolicy(jaxmp.PolicyTree.parse(precision or "float32")))
    specs = {f"x{index}": jax.ShapeDtypeStruct(x.shape, x.dtype) for index, x in enumerate(inputs)}
    return Forward(function, by_path(params), {}, specs, jax.tree.structure(0), {})


@pytest.mark.slow
def test_a_scale_for_a_channel_is_the_largest_magnitude_over_exactly_the_axes_that_a_product_sums_over():
    of = forward_of(Heads(), np.zeros((2, 5), np.int32))
    summed = summed_axes(of)
    expected = {
        **{f"attention/{name}/kernel": (0,) for name in ("query", "key", "value")},  # (features, heads, size)
        "attention/out/kernel": (0, 1),  # (heads, size, features)
        **{f"OptimizedLSTMCell_0/{kind}{gate}/kernel": (0,) for kind in "ih" for gate in "ifgo"},
        "layers/dense/kernel": (1,),  # (layers, inputs, outputs)
        "conv/kernel": (0, 1),
        "embed/embedding": (1,),
    }
    assert {name: axes for name, axes in summed.items() if np.ndim(of.weights[name]) > 1} == expected
    block = jaxmp.parse_block_format("int8:channel")
    for name, axes in expected.items():
        weight = np.random.default_rng(0).standard_normal(np.shape(of.weights[name])).astype(np.float32)
        packed = packed_weight(name, weight, block, summed)
        amax = np.abs(weight.astype(np.float64)).max(axis=axes)
        np.testing.assert_allclose(np.asarray(packed.blocks.scales).ravel(), amax.ravel() / 127, rtol=1e-6)
        scale = np.expand_dims(amax / 127, axes)
        np.testing.assert_allclose(packed.unpack(), np.rint(weight / scale) * scale, rtol=1e-5, atol=1e-7)


def test_activations_and_what_is_not_rounded_are_said_with_and_without_static_scales():
    layers = (deploy.Layer("kernel", (2, 2), "int8:channel", 4, 16, ""),)
    static = Calibrated("int8", 10, {"head": 0.5}, 0.25)
    for calibration, expected in (
        (None, "activations      int8, a scale for each vector of each row; emulated"),
        (static, "activations      int8, static scales from 10 training rows"),
    ):
        lines = str(Quantised(None, layers, None, calibration, "int8", ("", "head"), {})).splitlines()
        assert expected in lines and "not rounded      the inputs of (model), head" in lines
    assert "activations" not in str(Quantised(None, layers, None, None, None, (), {}))


@pytest.mark.slow
def test_layers_whose_inputs_are_not_rounded_are_named():
    words = np.zeros((1, 5), np.int32)
    policy = "conv=float32; layers=float32; float32,fprop=int8:channel/high"
    of = forward_of(Heads(), words, precision=policy)
    summed = summed_axes(forward_of(Heads(), words, precision="float32"))
    found = _unrounded(of, Measured("test", Columns({"x0": words}), 1), summed)
    joined = [f"OptimizedLSTMCell_0/{kind}{gate}" for kind in "hi" for gate in "fgio"]  # a cell that joins its gates
    assert sorted(found) == sorted([*joined, "conv", "layers/dense"])
    x = np.ones((1, 6), np.float32)
    normed = forward_of(
        nn.Sequential([nn.LayerNorm(), Gain(), nn.Dense(6)]), x, precision="float32,fprop=int8:channel/high"
    )
    assert {"layers_0/scale", "layers_1/gain"} < {*summed_axes(normed)}
    assert not _unrounded(normed, Measured("test", Columns({"x0": x}), 1), summed_axes(normed))
