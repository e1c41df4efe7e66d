"""ONNX files, operation by operation and model by model, in ONNX Runtime."""

from __future__ import annotations

import builtins
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from deployed_runs import ROOT, Both, Sizes, images, predict_bare, trained, with_words
from jax import lax

import jaxmp
from jaxmp import Arrays, InputError, Loop
from jaxmp.deploy.forward import Forward, symbolic
from jaxmp.deploy.onnx import files
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.models.transformer import GPT2
from jaxmp.precision.recipe import RECIPES
from jaxmp.tasks.language import NextToken

pytest.importorskip("onnx", reason="ONNX files need onnx: pip install 'jaxmp[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="they are checked with onnxruntime: pip install 'jaxmp[onnx]'")

pytestmark = pytest.mark.xdist_group("deploy")  # one worker: the fixture trains


def converted(function, *examples):
    """A function of arrays with any number of rows, run by ONNX Runtime."""
    names = [f"x{index}" for index in range(len(examples))]
    rows = symbolic("b")
    specs = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in examples]
    shapes = jax.tree.leaves(jax.eval_shape(function, *specs))
    outputs = {f"y{index}": shape for index, shape in enumerate(shapes)}
    of = Forward(
        function=lambda weights, state, inputs: jax.tree.leaves(function(*inputs)),
        weights={},
        state={},
        inputs=dict(zip(names, specs, strict=True)),
        treedef=None,
        outputs=outputs,
    )
    session = onnxruntime.InferenceSession(files(of)["model.onnx"], providers=["CPUExecutionProvider"])
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((5, *shape)).astype(np.float32)


def counts(*shape, most=4, seed=0):
    return np.random.default_rng(seed).integers(0, most, (5, *shape)).astype(np.int32)


def last_of(carry, x):
    return carry * 0.5 + x, carry


TABLE = np.random.default_rng(9).standard_normal((5, 3)).astype(np.float32)


def table():
    return jnp.asarray(TABLE)


OPERATIONS = {
    "products": (
        lambda x, y: (x @ TABLE.T, jnp.einsum("bij,bkj->bik", x, y), x @ y.swapaxes(1, 2)),
        numbers(4, 3),
        numbers(4, 3),
    ),
    "elementary": (
        lambda x: (jnp.log1p(jnp.abs(x)), jnp.expm1(x), lax.erf(x), lax.rsqrt(x * x + 1), jnp.exp2(x), x**3),
        numbers(9),
    ),
    "small": (
        lambda x: (jnp.log1p(x * 1e-6), jnp.expm1(x * 1e-6), jnp.log1p(jnp.abs(x) * 1e6), jnp.expm1(x * 9)),
        numbers(9),
    ),
    "functions": (
        lambda x: (nn.gelu(x), nn.silu(x), nn.softmax(x), nn.softplus(x), nn.elu(x), nn.relu6(x), jnp.tan(x)),
        numbers(9),
    ),
    "rounding": (
        lambda x: (
            jnp.round(x * 2),
            jnp.floor(x),
            jnp.ceil(x),
            jnp.sign(x),
            lax.round(x * 2, lax.RoundingMethod.AWAY_FROM_ZERO),
        ),
        numbers(9),
    ),
    "comparisons": (
        lambda x, y: (x > y, x != y, jnp.logical_xor(x > 0, y > 0), jnp.isfinite(x / (y > 0)), (x > 0) >= (y > 0)),
        numbers(9),
        numbers(9, seed=1),
    ),
    "whole numbers": (
        lambda i, j: (i // (j + 1), i % (j + 1), i & j, i | j, i ^ j, ~i, -i, i.astype(jnp.uint32) << 3),
        counts(9, most=99),
        counts(9, seed=1),
    ),
    "reductions": (
        lambda x: (
            x.sum(1),
            x.max((1, 2)),
            x.min(2),
            x.prod(1),
            x.mean(),
            x.argmax(1),
            x.argmin(2),
            (x > 1).any(1),
            (x > -1).all(2),
        ),
        numbers(4, 3),
    ),
    "shapes": (
        lambda x: (
            x.reshape(x.shape[0], -1),
            x[:, ::-1],
            x[:, 1:3, ::2],
            jnp.pad(x, ((0, 0), (1, 2), (0, 0))),
            x.swapaxes(0, 1),
            x[:, None] + TABLE[0],
        ),
        numbers(4, 3),
    ),
    "joined": (
        lambda x: (
            jnp.concatenate([x, x * 2], 1),
            jnp.split(x, 2, axis=1),
            jnp.stack([x, x]),
            jnp.broadcast_to(jnp.float32(2), x.shape),
        ),
        numbers(4, 3),
    ),
    "chosen": (
        lambda x, i: (
            jnp.where(x > 0, x, 0),
            lax.select_n(i % 3, x, x * 2, x * 3),
            jnp.where(i > 1, x > 0, x < 1),
            jnp.clip(x, -1, 1),
        ),
        numbers(4),
        counts(4),
    ),
    "counted": (
        lambda x: (
            jnp.arange(x.shape[0]) * 2,
            jnp.cumsum(x, 1),
            jnp.tri(3) * x[0, 0],
            x.mean(0),
            jnp.float32(2 * x.shape[0] + 1),
        ),
        numbers(4, 3),
    ),
    "taken": (
        lambda i: (
            jnp.take(table(), i, axis=0),
            table()[i],
            jnp.take(table().T, i, axis=1),
            table().at[i].get(mode="clip"),
        ),
        counts(2, 3),
    ),
    "taken outside": (
        lambda i: (
            table().at[i].get(mode="fill", fill_value=-1),
            table().at[i].get(mode="clip"),
            jnp.take(table(), i, axis=0),
        ),
        counts(3, most=9),
    ),
    "taken by row": (
        lambda x, i: (jnp.take_along_axis(x, i, axis=1), jnp.take_along_axis(x, i.argmax(1)[:, None], axis=1)),
        numbers(4),
        counts(2),
    ),
    "one of each": (lambda i: (jax.nn.one_hot(i, 4), jax.nn.one_hot(i, 3)), counts(2)),
    "largest": (lambda x: lax.top_k(x, 3), numbers(7)),
    "moved": (
        lambda x, i: (
            lax.dynamic_slice_in_dim(x, i[0, 0], 2, 1),
            lax.dynamic_update_slice_in_dim(x, x[:, :2] * 9, i[0, 0], 1),
        ),
        numbers(6),
        counts(1, most=9),
    ),
    "convolutions": (
        lambda x: (
            lax.conv_general_dilated(
                x, jnp.ones((3, 3, 2, 4)), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            lax.conv_general_dilated(
                x,
                jnp.ones((2, 2, 1, 4)),
                (1, 1),
                "VALID",
                rhs_dilation=(2, 1),
                feature_group_count=2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ),
        ),
        numbers(8, 7, 2),
    ),
    "transposed convolutions": (
        lambda x: [
            lax.conv_transpose(
                x, jnp.asarray(np.random.default_rng(5).standard_normal((k, k, 2, 3)), jnp.float32), (s, s), pad
            )
            for k, s, pad in ((4, 2, "SAME"), (3, 2, "SAME"), (3, 1, "VALID"), (2, 2, "VALID"), (5, 3, "SAME"))
        ],
        numbers(4, 5, 2),
    ),
    "one axis": (
        lambda x: lax.conv_general_dilated(
            x, jnp.ones((3, 2, 4)), (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC")
        ),
        numbers(8, 2),
    ),
    "pooling": (
        lambda x: (
            nn.max_pool(x, (2, 3), (2, 1), "SAME"),
            nn.avg_pool(x, (2, 2), (2, 2)),
            nn.avg_pool(x, (3, 3), (1, 1), "SAME"),
        ),
        numbers(7, 8, 2),
    ),
    "scans": (
        lambda x: (
            lax.scan(last_of, x[:, 0], x.swapaxes(0, 1)),
            lax.scan(last_of, x[:, 0], x.swapaxes(0, 1), reverse=True),
        ),
        numbers(6, 3),
    ),
    "loops": (
        lambda x: (
            lax.fori_loop(0, 4, lambda i, y: y * 0.5 + i, x),
            lax.scan(lambda c, _: (c * 2, c.sum()), x, length=3),
        ),
        numbers(3),
    ),
    "conditionals": (
        lambda x: (
            lax.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, x),
            lax.cond(x.sum() < 0, lambda y: y * 2, lambda y: y - 1, x),
        ),
        numbers(3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_computes_in_onnx_runtime_what_it_does_in_jax(name):
    function, *examples = OPERATIONS[name]
    run = converted(function, *examples)
    for rows in (5, 1, 3):
        arrays = [x[:rows] for x in examples]
        expected = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(function)(*arrays))]
        found = run(*arrays)
        assert len(found) == len(expected)
        for index, (mine, right) in enumerate(zip(found, expected, strict=True)):
            assert (mine.shape, mine.dtype) == (right.shape, right.dtype), index
            if right.dtype.kind == "f":
                bound = 2e-6 * max(1.0, np.abs(right[np.isfinite(right)]).max(initial=0))
                if name == "small":  # near 0, too
                    bound = 4e-7 * np.abs(right)
                np.testing.assert_allclose(mine, right, rtol=2e-6, atol=0 if name == "small" else bound)
            else:
                assert np.array_equal(mine, right), index


FORMATS = {
    "casts": ("e4m3", "e5m2", "bf16", "float16"),
    "elements": ("e2m1", "e3m2", "e4m3ieee", "e5m2fnuz", "tf32", "e6m9"),
    "scales": ("int8:channel", "int4:block64", "e4m3:channel", "block128x128"),
    "blocks": ("mxfp8", "mxfp4:rceil", "mxfp6_e2m3:ceil", "mxfp4:even", "mxint8", "nvfp4", "nvfp4:torchao"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_value_is_rounded_as_in_jax_to_the_bit(kind):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 7, 70)) * np.exp2(rng.integers(-3, 4, (40, 7, 70)))).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 20, (40, 7, 1))).astype(np.float32)
    x[3], x[4, 2, 3], x[5, 1, 1] = 0, np.inf, np.nan
    x[0, 0, :8] = [0, -0.0, -np.inf, 1e30, 3e38, 448 * 1.03, 448 * 1.05, 1e-30]

    def function(x):
        return [jaxmp.quantize(x, format) for format in FORMATS[kind]]

    found, expected = converted(function, x)(x), jax.jit(function)(x)
    for format, mine, right in zip(FORMATS[kind], found, map(np.asarray, expected), strict=True):
        assert np.array_equal(mine, right, equal_nan=True), format
        assert np.mean(right != x) > 0.5, format


@pytest.mark.slow
@pytest.mark.parametrize("half", [ml_dtypes.bfloat16, np.float16])
def test_each_operation_on_halves_is_rounded_to_their_grid_to_the_bit(half):
    rng = np.random.default_rng(1)
    x, y = ((1 + rng.random((300, 8))).astype(np.float32) for _ in range(2))

    def steps(x, y, array):
        x, y = x.astype(half), y.astype(half)
        product = x * y
        total = product + x
        return [each.astype(array) for each in (product, total, total / y - x, -product)]

    found = converted(lambda x, y: steps(x, y, jnp.float32), x, y)(x, y)
    for mine, right in zip(found, steps(x, y, np.float32), strict=True):  # NumPy rounds after each operation
        assert np.array_equal(mine, right)
    exact = x.astype(half).astype(np.float64) * y.astype(half).astype(np.float64)
    assert np.mean(found[0] != exact) > 0.5  # and rounding changed most of them


class Sorted(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Dense(3)(image.reshape(image.shape[0], -1))
        return Inner(name="inner")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sort(nn.Dense(3)(x), axis=-1)


@pytest.mark.slow
def test_an_operation_that_onnx_has_not_is_named_with_its_module(tmp_path):
    run = trained(tmp_path, model=Sorted())
    for precision, expected in (
        ("float32", r"no operation for the primitive 'sort' in Sorted/inner .*test_onnx.py:\d+.*--format stablehlo"),
        ("nvfp4,stochastic=fprop", "no operation for random draws in Sorted/Dense_0"),
    ):
        with pytest.raises(InputError, match=expected):
            jaxmp.export(run, output=tmp_path / "out", format="onnx", precision=precision)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_blocks_along_axes_in_any_order_and_of_the_largest_numbers_are_those_of_jax():
    x = np.random.default_rng(0).standard_normal((6, 5, 40)).astype(np.float32)
    x[0, 0, :4] = [3.3e38, 2e38, 1e38, 3.3e38]

    def function(x):
        two = [jaxmp.quantize(x, "e4m3:block4x8", axis=axes) for axes in ((2, 1), (1, 2))]
        return [*two, jaxmp.quantize(x, "mxfp4:rceil"), jaxmp.quantize(x, "mxfp4:ceil")]

    found, expected = converted(function, x)(x), jax.jit(function)(x)
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, right)
    assert not np.array_equal(found[0], found[1])


def test_a_print_in_a_model_is_refused_as_what_onnx_has_not():
    with pytest.raises(InputError, match="no operation for the primitive 'debug_"):
        converted(lambda x: (jax.debug.print("{}", x), x + 1)[1], np.ones((2, 3), np.float32))


@pytest.mark.parametrize(("format", "saturate", "how"), [("e4m3", False, "unsaturated"), ("e5m9", True, "saturated")])
def test_a_quantiser_that_overflows_otherwise_than_by_default_is_refused(format, saturate, how):
    with pytest.raises(InputError, match=f"no operation for rounding to the emulated format {format}-{how}"):
        converted(lambda x: jaxmp.quantize(x, format, saturate=saturate), np.ones((2, 3), np.float32))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_message(monkeypatch, package):
    from jaxmp.deploy.onnx import require_packages

    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=rf"needs {package}: pip install 'jaxmp\[onnx\]'"):
        require_packages()


@pytest.mark.slow
def test_a_folder_of_onnx_needs_onnxruntime_and_numpy_alone(tmp_path):
    data = Arrays(with_words, batch_size=10, eval_batch_size=8)
    run = trained(tmp_path, model=Both(), data=data, task=Sizes())
    artefact = jaxmp.export(run, output=tmp_path / "out", format="onnx")
    assert artefact.manifest["programs"] == {} and artefact.manifest["expires"] is None
    batch = {"image": images(7), "words": (np.arange(35).reshape(7, 5) % 7).astype(np.int32)}
    np.savez(tmp_path / "rows.npz", **batch)
    blocked = ("jaxmp", "jax", "jaxlib", "flax", "optax", "flatbuffers", "onnx", "safetensors", "ml_dtypes")
    code, text = predict_bare(tmp_path / "out", tmp_path / "rows.npz", tmp_path / "found.npz", *blocked)
    assert code == 0, text
    found = np.load(tmp_path / "found.npz")
    right = run.apply(batch | {"label": np.zeros(7, int)}, "best")
    assert np.array_equal(found["size/parts/1"], right["size"]["parts"][1])
    largest = np.abs(right["logits"]).max()
    assert np.abs(found["logits"] - right["logits"]).max() < 2**-7 * largest
    with pytest.raises(InputError, match="one program for all"):
        jaxmp.export(run, output=tmp_path / "no", format="onnx", platforms=["cpu", "cuda"])


@pytest.mark.full_size
def test_a_decoder_in_onnx_keeps_its_cache(tmp_path):
    def tokens(split):
        text = np.random.default_rng(0).integers(0, 11, (20, 7)).astype(np.int32)
        return {"tokens": text[:, :-1], "target": text[:, 1:]}

    data = Arrays(tokens, batch_size=10, eval_batch_size=8)
    model, task = GPT2(vocabulary=11, context=6, layers=2, heads=2, width=8), NextToken(("tokens",), "target")
    for precision, bound in (("float32", 1e-5), ("mixed_bfloat16", 2**-6)):
        run = trained(tmp_path / precision, model=model, data=data, task=task, precision=precision)
        artefact = jaxmp.export(run, output=tmp_path / precision / "out", format="onnx", decode=True)
        against = artefact.certificate["against"]["run"]
        assert against["outputs"]["output"]["largest_relative"] < bound


@pytest.mark.full_size
@pytest.mark.parametrize("precision", [*RECIPES, "Conv_0=c=e3m2; Dense_1=c=e5m2; c=e4m3"])
def test_a_recipe_and_rules_of_formats_compute_in_onnx_what_they_do_in_jax(tmp_path, precision):
    run = trained(tmp_path, precision)
    artefact = jaxmp.export(run, output=tmp_path / "out", format="onnx")
    found = artefact.certificate["against"]["run"]
    # What is summed in another order is rounded to the other neighbour for a few numbers.
    assert found["outputs"]["output"]["median_relative"] < 1e-5 and found["decisions"]["agree"] >= 19


CONFIGS = [
    *(
        "digits_mlp",
        "mnist_cnn",
        "cifar10_cnn",
        "cifar10_resnet20",
        "cifar10_vit_tiny",
        "mnist_simple_rnn",
    ),
    *(
        "spoken_digits_lstm",
        "spoken_digits_ctc",
        "shakespeare_gpt",
        "sst2_bert_tiny",
        "sst2_lstm",
    ),
]


@pytest.mark.full_size
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "c=e4m3"])
def test_shipped_configs_in_onnx(tmp_path, made_up, name, precision):
    """float32 within 1e-5 of the largest output and the same decisions; halves near the policy's own error."""
    experiment = made_up(ConfigFile.find(str(ROOT / "configs" / f"{name}.py")).experiment(), 16)
    experiment = dataclasses.replace(experiment, loop=Loop(steps=1), precision=precision)
    jaxmp.fit(experiment, workdir=tmp_path / "runs", log=lambda text: None)
    run = jaxmp.Run(tmp_path / "runs", experiment)
    artefact = jaxmp.export(run, output=tmp_path / "out", format="onnx", weights="last")
    own, right = (artefact.certificate["against"][name] for name in ("run", "float32"))
    relative = {output: of["largest_relative"] for output, of in own["outputs"].items()}
    if precision == "float32":
        assert max(relative.values()) < 1e-5
        assert own.get("decisions", {"share": 1})["share"] == 1
    else:
        error = {output: of["largest_relative"] for output, of in right["outputs"].items()}
        policy = {"mixed_bfloat16": 2**-8, "bfloat16": 2**-8, "c=e4m3": 2**-4}.get(precision, 2**-11)
        assert all(error[output] < 64 * policy and relative[output] < 64 * policy for output in relative), (
            relative,
            error,
        )
    for count in (1, 7, 512):
        source = run.source("test")
        batch = source[np.arange(count) % len(source)]
        outputs = artefact.leaves(artefact(**{key: batch[key] for key in artefact.inputs}))
        assert {len(each) for each in outputs.values()} == {count}
