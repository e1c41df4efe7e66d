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
import scipy.special
from deployed_runs import ROOT, Both, Sizes, images, predict_bare, trained, with_words
from jax import lax

import jaxmp
from jaxmp import Arrays, InputError, Loop
from jaxmp.deploy import onnx as onnx_module
from jaxmp.deploy.export import assemble
from jaxmp.deploy.forward import Forward, symbolic
from jaxmp.deploy.onnx import files
from jaxmp.deploy.onnx_graph import Graph
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.jaxprs import Place
from jaxmp.models.transformer import GPT2
from jaxmp.precision.recipe import RECIPES
from jaxmp.tasks.language import NextToken

pytest.importorskip("onnx", reason="ONNX files need onnx: pip install 'jaxmp[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="they are checked with onnxruntime: pip install 'jaxmp[onnx]'")

pytestmark = pytest.mark.xdist_group("deploy")  # one worker: the fixture trains


def model_files(function, *examples):
    """The ONNX file of a function of arrays `x0`, `x1`, ... with any number of rows."""
    rows = symbolic("b")
    specs = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in examples]
    shapes = jax.tree.leaves(jax.eval_shape(function, *specs))
    of = Forward(
        function=lambda weights, state, inputs: jax.tree.leaves(function(*inputs)),
        weights={},
        state={},
        inputs={f"x{index}": spec for index, spec in enumerate(specs)},
        treedef=None,
        outputs={f"y{index}": shape for index, shape in enumerate(shapes)},
    )
    return files(of)


def converted(function, *examples):
    """A function of arrays with any number of rows, run by ONNX Runtime."""
    content = model_files(function, *examples)["model.onnx"]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda *arrays: session.run(None, {f"x{index}": array for index, array in enumerate(arrays)})


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


def test_a_dimension_is_computed_by_its_formula_for_any_number_of_rows():
    (rows,) = {"b": symbolic("b")}.values()
    less = jax.core.min_dim(rows, 8)
    formulas = {
        "quarter": lambda b: b // 4,
        "rest": lambda b: b % 8,
        "at most 8": lambda b: min(b, 8) if isinstance(b, int) else less,
        "at least 4": lambda b: max(b, 4) if isinstance(b, int) else jax.core.max_dim(b, 4),
        "square": lambda b: 2 * b * b + 3,
        "up to a multiple": lambda b: (b + 3) // 4 * 4 - b,
        "below zero": lambda b: (2 - b) // 3 + (1 - b) % 5 - b,
    }

    def function(x):
        return [jnp.int32(formula(x.shape[0])) for formula in formulas.values()] + [x[: x.shape[0] // 4]]

    run = converted(function, np.ones((3, 2), np.float32))
    for count in (1, 3, 4, 7, 8, 9, 100, 1000):
        x = np.arange(2.0 * count, dtype=np.float32).reshape(count, 2)
        *sizes, quarter = run(x)
        assert dict(zip(formulas, map(int, sizes), strict=True)) == {
            name: formula(count) for name, formula in formulas.items()
        }
        assert np.array_equal(quarter, x[: count // 4])
    graph = Graph()
    graph.place = Place("Net/head")
    with pytest.raises(InputError, match=r"no operation for a dimension of log2\(b\) in Net/head"):
        graph.size("log2(b)")


SPECIAL = np.array(
    [300, -5, 2.5, np.nan, 255.9, np.inf, -np.inf, 3e9, -3e9, 2147483520, 0.49999997, 8388609], np.float32
)
SMALL = np.array([2.0**-14 * k for k in (1, 0.5, 1 - 2.0**-12, 1 - 2.0**-11, -0.9, 1 + 2.0**-11, 2.0**30)], np.float32)
WHOLE = np.array([0, -1, 3, 7, 100, 2**31 - 1, -(2**31), 12, -(2**31)], np.int32)
NANS = np.array([[1, np.nan, 3, 2, 0, 5], [4, 3, 2, 1, 0, 6], [1, 2, 3, 4, np.nan, np.nan]], np.float32)
IMAGE = np.random.default_rng(0).standard_normal((2, 6, 7, 3)).astype(np.float32)
TOKENS = np.array([[0, 2, 5, 9, -1, -9]] * 2, np.int32)


def narrow(i):
    """Operations that ONNX Runtime lacks for these dtypes."""
    (a, b), (c, d), (e, f) = ((i.astype(t), i[:, ::-1].astype(t)) for t in (jnp.int16, jnp.uint32, jnp.int8))
    found = [jnp.maximum(a, b), jnp.where(i > 3, a, b), jnp.pad(a, ((0, 0), (1, 2))), a.max(1), jnp.cumsum(a, 1)]
    found += [lax.div(a, b), lax.rem(a, b), a.at[:, 2].add(1), lax.argmin(a, 1, jnp.int32)]
    found += [
        -c,
        c.sum(1),
        c.min(1),
        c.argmax(1),
        lax.top_k(c, 3),
        lax.div(c, d),
        lax.dot(c, jnp.ones((9, 2), c.dtype)),
    ]
    found += [lax.rem(e, f), lax.div(e, f), e**3, lax.reduce_prod(e, (1,)), lax.clamp(jnp.int8(2), e, jnp.int8(9))]
    zero = np.array(0, np.int16)
    return [*found, lax.reduce_window(a, zero, lax.add, (1, 3), (1, 2), ((0, 0), (2, -1)))]


def windows(x):
    """Pooling over windows of every kind."""
    one = {"window_strides": (1, 2, 1, 1), "padding": ((0, 0), (1, 0), (0, 0), (0, 0))}
    found = [nn.max_pool(x, (1, 2), (1, 2)), nn.avg_pool(x, (2, 1), (2, 1)), nn.max_pool(x, (1, 1))]
    found += [-nn.max_pool(-x, (2, 2)), lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 1, 1), **one)]
    found += [lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")]
    dilated = {"window_strides": (1, 1, 1, 1), "padding": "VALID", "window_dilation": (1, 2, 3, 1)}
    found += [lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), **dilated)]
    found += [lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), **dilated)]
    far = ((0, 0), (4, -1), (0, 3), (0, 0))
    found += [lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 3, 2), (1, 1, 1, 1), far), nn.max_pool(x, (2, 2))]
    gaps = {"window_strides": (1, 1, 1, 1), "padding": "SAME", "window_dilation": (1, 5, 6, 1)}
    found += [lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), **gaps)]
    return found


def updated(x, i):
    """Updates of slices."""
    row, rows = i[0], jnp.arange(3)
    found = [x.at[:, 2].set(0), x.at[:, jnp.array([1, 9, -1])].add(2.0), x.at[0, 1].multiply(2.0)]
    found += [x.at[:, row].subtract(1.0), x.at[:, row].max(0.5), x.at[:, row, 1:3].min(x[:, 3:, :2])]
    found += [
        x.at[:, jnp.array([1, 9])].set(5.0, mode="clip"),
        (x > 0).at[:, 1:3].set(True),
        x.at[:, rows, rows].set(-1.0),
    ]
    found += [jax.vmap(lambda a, j: a.at[j].set(7.0))(x[:, :, 0], i[:, :2])]
    found += [lax.dynamic_update_slice(x, jnp.ones((x.shape[0], 2, 2)), (0, i[0, 1], i[0, 2]))]
    return found


AS_IN_JAX = {
    "floats to integers": (
        lambda x: [x.astype(dtype) for dtype in (jnp.int8, jnp.uint8, jnp.uint32, jnp.int32)],
        SPECIAL[None],
    ),
    "rounding away from zero": (
        lambda x: (lax.round(x), lax.round(-x)),
        np.append(SPECIAL, np.float32([0.5, 1.5]))[None],
    ),
    "float16 by reduce_precision": (lambda x: lax.reduce_precision(x, 5, 10), SMALL[None]),
    "logarithms of infinities": (lambda x: jnp.log1p(x), np.float32([[-np.inf, np.inf, -1, 0, -2]])),
    "any of no axes": (lambda x: (jnp.any(x > 0, axis=()), jnp.all(x > 0, axis=())), NANS),
    "extremes of NaN": (
        lambda x: (x.max(1), x.min(1), x.max(), x.argmax(1), x.argmin(1), jnp.maximum(x, 2), jnp.clip(x, 1, 2)),
        NANS,
    ),
    "integer divisions": (
        lambda i: [each(a, b) for each in (lax.div, lax.rem) for a in (i, i * 0 + 12) for b in (i[:, ::-1], i * 0 - 1)],
        WHOLE[None],
    ),
    "guarded division": (lambda i: jnp.where(i > 0, 100 // i, 0), WHOLE[None]),
    "places outside": (
        lambda i: (table()[i], table().at[i].get(mode="promise_in_bounds"), jax.vmap(lambda j: table()[j, j])(i)),
        TOKENS,
    ),
    "narrow integers": (narrow, WHOLE[None]),
    "bools": (
        lambda i: ((i > 3).argmax(1), (i > 3).sum(1), jnp.cumsum(i > 3, 1), jnp.tile(i > 3, (1, 2))),
        WHOLE[None],
    ),
    "products of int8": (
        lambda i: (
            lax.dot(i.astype(jnp.int8), jnp.ones((9, 2), jnp.int8), preferred_element_type=jnp.int32),
            jnp.einsum("bi,ci->bc", i.astype(jnp.int8), i.astype(jnp.int8)),
        ),
        WHOLE[None],
    ),
    "windows": (windows, IMAGE),
    "updates": (updated, np.where(IMAGE > 1.5, np.nan, IMAGE)[..., 0], TOKENS[:, :3]),
    "tiles": (lambda x: (jnp.tile(x, (2, 1)), jnp.tile(x, (3, 1, 2))), NANS),
    "pads below zero": (lambda x: lax.pad(x, 9.0, ((0, 0, 0), (-1, 2, 0))), NANS),
    "pads between": (
        lambda x: (
            lax.pad(x, 9.0, ((0, 0, 1), (2, -1, 2))),
            lax.associative_scan(lambda a, b: a * 0.5 + b, jnp.nan_to_num(x), axis=1),
        ),
        NANS,
    ),
}


@pytest.mark.parametrize("name", AS_IN_JAX)
def test_an_edge_of_an_operation_is_that_of_jax(name):
    function, *arrays = AS_IN_JAX[name]
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(function)(*arrays))]
    for index, (mine, right) in enumerate(zip(converted(function, *arrays)(*arrays), expected, strict=True)):
        assert (mine.shape, mine.dtype) == (right.shape, right.dtype), index
        same = np.allclose if name == "windows" else np.array_equal
        assert same(mine.astype(np.float64), right.astype(np.float64), equal_nan=True), (index, mine, right)


def test_a_maximum_over_a_window_with_a_nan_is_nan():
    # Not by JAX on CPU, whose maximum over a window takes no notice of some.
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    x[0, 3, 3, 0], x[0, 0, 0, 0] = np.nan, np.nan
    most, least = converted(lambda x: (nn.max_pool(x, (2, 2), (2, 2)), -nn.max_pool(-x, (2, 2), (2, 2))), x)(x)
    np.testing.assert_array_equal(most[0, :, :, 0], [[np.nan, 7], [13, np.nan]])
    np.testing.assert_array_equal(least[0, :, :, 0], [[np.nan, 2], [8, np.nan]])


def test_a_maximum_over_infinities_alone_is_one_over_any_number_of_axes():
    x = np.full((2, 4, 4, 4, 1), -np.inf, np.float32)
    x[0, 3, 3, 3, 0] = 1
    for axes in (1, 2, 3):
        window = (2,) * axes + (1,) * (3 - axes)
        both = converted(lambda x, w=window: (nn.max_pool(x, w, w), -nn.max_pool(-x, w, w), -nn.max_pool(x, w, w)), x)(
            x
        )
        expected = nn.max_pool(x, window, window), -nn.max_pool(-x, window, window), -nn.max_pool(x, window, window)
        for mine, right in zip(both, expected, strict=True):
            np.testing.assert_array_equal(mine, right)
    least = converted(lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID"), x)
    np.testing.assert_array_equal(least(-x)[0][0, 1, 1, 1], -1)
    np.testing.assert_array_equal(least(-x)[0][1], np.inf)


def test_the_tail_of_erfc_is_that_of_float64():
    x = np.concatenate([np.linspace(-4, 9, 500), [0, 1e-20, 40, np.inf, -np.inf]]).astype(np.float32)[None]
    erfc, logcdf = converted(lambda x: (lax.erfc(x), jax.scipy.stats.norm.logcdf(-x)), x)(x)
    np.testing.assert_allclose(erfc, scipy.special.erfc(x.astype(np.float64)), rtol=1e-6, atol=1e-38)
    near = x < 12  # beyond, jax.scipy's own series
    np.testing.assert_allclose(logcdf[near], scipy.special.log_ndtr(-x[near].astype(np.float64)), rtol=2e-6, atol=1e-7)


def test_names_of_weights_columns_and_outputs_may_be_any():
    rows = jax.ShapeDtypeStruct((symbolic("b"), 2), jnp.float32)
    weights = {name: jnp.full(2, value, jnp.float32) for value, name in enumerate(("v2", "v3", "image", "y"), 1)}
    of = Forward(
        function=lambda weights, state, inputs: [sum(weights) * inputs[0] + inputs[1], inputs[0] * 2],
        weights=weights,
        state={},
        inputs={"v1": rows, "image": rows},
        treedef=None,
        outputs={"image": rows, "v4": rows},
    )
    session = onnxruntime.InferenceSession(files(of)["model.onnx"], providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["v1", "image"]
    x = np.ones((3, 2), np.float32)
    first, second = session.run(None, {"v1": x, "image": x * 5})
    assert np.array_equal(first, x * 15) and np.array_equal(second, x * 2)
    with pytest.raises(InputError, match="'v1' names an array of the cache and a column"):
        files(dataclasses.replace(of, state={"v1": rows}))


def test_what_onnx_runtime_refuses_is_a_message_that_names_the_module(monkeypatch):
    monkeypatch.setitem(onnx_module._SINGLE, "neg", lambda graph, eqn, operands, place: graph.add("Not", operands[0]))

    def function(x):
        with jax.named_scope("Net/head"):
            return -x

    x = np.ones((2, 3), np.float32)
    with pytest.raises(InputError, match=r"onnxruntime .* does not load model.onnx .*Net/head.*--format stablehlo"):
        assemble({"format": "onnx"}, model_files(function, x), "out")


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
        halves = [jaxmp.quantize((x * 2.0**-112).astype(jnp.float16), "mxfp4:rceil").astype(jnp.float32)]
        return [*two, jaxmp.quantize(x, "mxfp4:rceil"), jaxmp.quantize(x, "mxfp4:ceil"), *halves]

    found, expected = converted(function, x)(x), jax.jit(function)(x)
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, right)
    assert not np.array_equal(found[0], found[1])


REFUSED = {
    "a print": (lambda x: (jax.debug.print("{}", x), x + 1)[1], r"the primitive 'debug_"),
    "an update by a function": (lambda x: x.at[:, 1].apply(jnp.sin), r"an update by a function, `.at\[...\].apply`"),
    "a convolution of integers": (
        lambda x: lax.conv(x[:, :, None].astype(jnp.int8), jnp.ones((2, 3, 1), jnp.int8), (1,), "VALID"),
        "a convolution of int8",
    ),
    "padding of unknown sign": (
        lambda x: lax.pad(x, 0.0, ((0, x.shape[0] // 2 - 1, 0), (0, 0, 0))),
        "pad of sizes that depend so on the number of rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_is_not_written_is_refused_with_its_line(name):
    function, expected = REFUSED[name]
    with pytest.raises(
        InputError, match=rf"no operation for {expected}.* \(.*test_onnx.py:\d+\); .*--format stablehlo"
    ):
        converted(function, np.ones((2, 3), np.float32))


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
    with pytest.raises(InputError, match=rf"needs {package}: .*pip install 'jaxmp\[onnx\]'"):
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
