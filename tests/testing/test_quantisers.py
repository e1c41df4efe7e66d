"""The laws of quantisers find the defects of published ones (numerics.md, B20 to B28) and mutants, and no others."""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.linen import fp8_ops

from jaxmp.errors import InputError
from jaxmp.precision.blocks import PRESETS, quantize
from jaxmp.testing import quantizer_laws

OURS = ["mxfp8", "mxfp6_e2m3", "mxfp4:rceil", "mxint8", "nvfp4", "block128", "int4:channel", "e2m1:block16x16:e8m0"]
UNBIASED = [*PRESETS, *(f"{name}:rceil" for name in PRESETS if name.startswith("mx")), "nvfp4:torchao", "mxfp8:even"]


def nearest_as(name):
    return lambda x: quantize(x, name)


def stochastic_as(name):
    return lambda x, key: quantize(x, name, rounding="stochastic", key=key)


# No false alarm


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_our_quantisers_obey_all_laws(name):
    for quantiser in (nearest_as(name), stochastic_as(name)):
        laws = quantizer_laws(quantiser, name)
        assert laws.broken == [], str(laws)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "bf16", "e3m4"])
def test_our_float_formats_obey_all_laws(name):
    for rounding in ({}, {"rounding": "stochastic"}):
        if rounding:
            laws = quantizer_laws(lambda x, key: quantize(x, name, saturate=False, key=key, **rounding), name)  # noqa: B023
        else:
            laws = quantizer_laws(lambda x: quantize(x, name, saturate=False), name)
        assert laws.broken == [], str(laws)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"]
)
def test_casts_of_ml_dtypes_obey_all_laws(name):
    """In e2m1, e2m3 and e3m2 a NaN becomes -0: those formats have none, and the law is skipped."""
    laws = quantizer_laws(lambda x: np.asarray(x).astype(getattr(ml_dtypes, name)).astype(np.float32), name)
    assert laws.broken == [], str(laws)
    skipped = [law.law for law in laws if law.verdict == "skipped"]
    assert ("not_finite_survives" in skipped) == (name[5] in "46")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gfloat") is None, reason="gfloat is not installed")
def test_gfloat_obeys_all_laws():
    from gfloat import RoundMode, formats, round_ndarray
    from gfloat.block import compute_scale_amax

    format = formats.format_info_mxfp4_e2m1

    def mxfp4(x):
        padded = np.pad(np.asarray(x, np.float64), [(0, 0), (0, -x.shape[1] % 32)])
        blocks = padded.reshape(-1, 32)
        with np.errstate(all="ignore"):
            scale = np.array([compute_scale_amax(2, b) if np.isfinite(b).all() else np.nan for b in blocks])[:, None]
        # What is not finite makes no scale: gfloat leaves it to the caller.
        rounded = round_ndarray(format.etype, np.nan_to_num(blocks / scale), RoundMode.TiesToEven, sat=True) * scale
        return rounded.reshape(padded.shape)[:, : x.shape[1]].astype(np.float32)

    laws = quantizer_laws(mxfp4, "mxfp4")
    assert laws.broken == [], str(laws)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in UNBIASED if name not in OURS])
def test_stochastic_rounding_is_unbiased_in_every_format_and_under_both_scale_rules(name):
    laws = quantizer_laws(stochastic_as(name), name)
    for law in ("between_neighbours", "unbiased", "uncorrelated"):
        assert laws[law].verdict == "holds", laws[law].words


@pytest.mark.slow
def test_blocks_may_run_along_rows_and_infinities_may_be_counted():
    def counting(x):
        return quantize(jnp.nan_to_num(x), "mxfp4", axis=0), (~jnp.isfinite(x)).sum()

    laws = quantizer_laws(counting, "mxfp4", axis=0)
    for law in ("scale_by_rule", "nearest", "ragged_shapes", "same_in_jit_vmap_and_scan", "not_finite_survives"):
        assert laws[law].verdict == "holds", laws[law].words


# Mutants: each is found by the law that is about it


def by_block(x, length, function, axis=1):
    """Applies a function to blocks of a row (or of a column), (..., blocks, length)."""
    x = x.T if axis == 0 else x
    padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % length)])
    y = function(padded.reshape(padded.shape[0], -1, length)).reshape(padded.shape)[:, : x.shape[1]]
    return y.T if axis == 0 else y


def power_of_two(x):
    """The largest power of two that is not above x."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(x, 2.0**-126), jnp.uint32) & 0x7F800000
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def e4m3(x):
    return quantize(x, "e4m3")


def mxfp8(block, element=e4m3, largest=256.0):
    """MXFP8 in a few lines; `element` rounds, with its largest power of two."""
    scale = power_of_two(jnp.abs(block).max(-1, keepdims=True)) / largest
    bad = ~jnp.isfinite(block).all(-1, keepdims=True)
    return jnp.where(bad, jnp.nan, element(block / scale) * scale)


def with_element(element):
    return lambda x: by_block(x, 32, functools.partial(mxfp8, element=element))


def truncated(x):
    """e4m3 by truncation."""
    near = e4m3(x)
    bits = jax.lax.bitcast_convert_type(near, jnp.int32)
    lower = e4m3(jax.lax.bitcast_convert_type(bits - (1 << 19), jnp.float32))
    return jnp.where((jnp.abs(near) > jnp.abs(x)) & (jnp.abs(x) > 2.0**-6), lower, near)


def ties_away(x):
    return e4m3(jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) + (x != 0), jnp.float32))


def stochastic(element):
    """A stochastic quantiser in MXFP4, given how to round scaled numbers between two whole quanta with a key."""

    def quantiser(x, key):
        scale = power_of_two(x_max(x)) / 2  # rounded up, so that nothing is clipped
        scaled = x / scale
        quantum = jnp.maximum(power_of_two(jnp.abs(scaled)), 1) / 2
        below = jnp.floor(jnp.abs(scaled) / quantum)
        share = jnp.abs(scaled) / quantum - below
        up = element(share, key, x)
        return jnp.sign(x) * (below + up) * quantum * scale

    def x_max(x):
        padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % 32)]).reshape(x.shape[0], -1, 32)
        amax = jnp.abs(padded).max(-1)
        return (
            jnp.where(amax > power_of_two(amax), 1, 0.5)[..., None]
            .repeat(32, -1)
            .reshape(x.shape[0], -1)[:, : x.shape[1]]
            * power_of_two(amax)[..., None].repeat(32, -1).reshape(x.shape[0], -1)[:, : x.shape[1]]
        )

    return quantiser


def wrong_in_jit(x):
    largest = 449.0 if isinstance(x, jax.core.Tracer) else 448.0
    return jnp.clip(e4m3(x * (448 / largest)), -448, 448)


def nan_of_zeros(x):
    def block(b):
        return quantize(b, "mxfp8") * jnp.where(jnp.abs(b).max(-1, keepdims=True) > 0, 1, jnp.nan)

    return by_block(x, 32, block)


def nan_of_subnormals(x):
    def block(b):
        bits = jax.lax.bitcast_convert_type(jnp.abs(b), jnp.int32).max(-1, keepdims=True)
        return jnp.where((bits > 0) & (bits < 1 << 23), jnp.nan, quantize(b, "mxfp8"))

    return by_block(x, 32, block)


def amax_with_a_floor(x):
    def block(b):
        scale = power_of_two(jnp.maximum(jnp.abs(b).max(-1, keepdims=True), 1e-4)) / 256
        return e4m3(b / scale) * scale

    return by_block(x, 32, block)


def filled_up_with_100(x):
    padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % 32)], constant_values=100.0)
    return quantize(padded, "mxfp4")[:, : x.shape[1]]


def off_at_key_0(x, key):
    nearest, drawn = quantize(x, "mxfp4:ceil"), quantize(x, "mxfp4:ceil", rounding="stochastic", key=key)
    return jnp.where((jax.random.key_data(key) == 0).all(), nearest, drawn)


state = np.random.default_rng(0)


def noise_from_a_state(x, key):
    number = jax.ShapeDtypeStruct((), np.int32)
    seed = jax.pure_callback(lambda: np.int32(state.integers(2**31)), number, vmap_method="sequential")
    return quantize(x, "mxfp4", rounding="stochastic", key=jax.random.fold_in(key, seed))


def repeated_noise(share, key, x):
    noise = jax.random.uniform(key, (x.shape[0], 4))
    return jnp.tile(noise, (1, -(-x.shape[1] // 4)))[:, : x.shape[1]] < share


def exact_numbers_move(dtype, count, block=None):
    """Rounds stochastically, in NumPy, but moves a number that its block has to the next larger magnitude."""
    numbers = np.arange(count, dtype=np.uint8).view(dtype).astype(np.float64)

    def quantiser(x, key):
        x, scale = np.asarray(x, np.float64), 1.0
        if block:
            amax = np.abs(x).reshape(x.shape[0], -1, block).max(-1)
            scale = np.exp2(np.ceil(np.log2(amax / numbers[-1]))).repeat(block, 1)
        scaled = np.abs(x) / scale
        below = np.searchsorted(numbers, scaled, "right") - 1
        above = np.minimum(below + 1, count - 1)
        share = (scaled - numbers[below]) / np.maximum(numbers[above] - numbers[below], numbers[1])
        noise = np.random.default_rng(np.asarray(jax.random.key_data(key))).random(x.shape)
        up = (noise < share) | ((share == 0) & (scaled > 0))
        return np.float32(np.copysign(numbers[np.where(up, above, below)] * scale, x))

    return quantiser


NEAREST = {
    "B27: all numbers are 0": (lambda x: x * 0, "nvfp4", "nearest"),
    "B28: rounded twice, first to bfloat16": (
        lambda x: quantize(x.astype(jnp.bfloat16) * 1.0, "e4m3").astype(jnp.float32),
        "e4m3",
        "nearest",
    ),
    "B28: NaN of a block of zeros": (nan_of_zeros, "mxfp8", "zeros"),
    "the scale is rounded up": (nearest_as("mxfp8:ceil"), "mxfp8", "scale_by_rule"),
    "the rule is another": (nearest_as("mxfp4"), "mxfp4:rceil", "scale_by_rule"),
    "blocks run along the other axis": (lambda x: quantize(x, "mxfp4", axis=0), "mxfp4", "scale_by_rule"),
    "blocks are shorter": (nearest_as("e2m1:block16:e8m0"), "mxfp4", "scale_by_rule"),
    "blocks are longer": (nearest_as("e2m1:block64:e8m0"), "mxfp4", "blocks_are_independent"),
    "the scale is no power of two": (nearest_as("e2m1:block32"), "mxfp4", "on_grid"),
    "truncated": (with_element(truncated), "mxfp8", "nearest"),
    "ties go away from zero": (with_element(ties_away), "mxfp8", "ties_to_even"),
    "the largest number is too small": (with_element(lambda x: jnp.clip(e4m3(x), -240, 240)), "mxfp8", "nearest"),
    "subnormal elements are flushed": (
        with_element(lambda x: jnp.where(jnp.abs(x) < 2.0**-6, 0, e4m3(x))),
        "mxfp8",
        "nearest",
    ),
    "overflow wraps": (with_element(lambda x: jnp.where(jnp.abs(x) > 480, x / 2, e4m3(x))), "mxfp8", "monotone"),
    "the step depends on the sign": (with_element(lambda x: jnp.where(x < 0, truncated(x), e4m3(x))), "mxfp8", "odd"),
    "a mean is subtracted first": (lambda x: quantize(x - x.mean(), "mxfp8") + x.mean(), "mxfp8", "on_grid"),
    "some headroom is left at each call": (lambda x: quantize(x, "block128") * 0.99, "block128", "idempotent"),
    "infinity is clipped": (lambda x: quantize(jnp.clip(x, -3e38, 3e38), "mxfp8"), "mxfp8", "not_finite_survives"),
    "NaN becomes 0": (lambda x: quantize(jnp.nan_to_num(x, posinf=jnp.inf), "mxfp8"), "mxfp8", "not_finite_survives"),
    "-0 becomes 0": (lambda x: jnp.where((y := quantize(x, "mxfp8")) == 0, 0.0, y), "mxfp8", "negative_zero"),
    "amax has a floor": (amax_with_a_floor, "mxfp8", "scale_equivariant"),
    "a ragged block is filled up with large numbers": (filled_up_with_100, "mxfp4", "ragged_shapes"),
    "square blocks are not square": (nearest_as("e2m1:block8x32:e8m0"), "e2m1:block16x16:e8m0", "transposes"),
    "jit gives other numbers": (wrong_in_jit, "e4m3", "same_in_jit_vmap_and_scan"),
    "the result is bfloat16": (lambda x: quantize(x, "mxfp8").astype(jnp.bfloat16), "mxfp8", "keeps_shape_and_dtype"),
    "what is subnormal becomes NaN": (nan_of_subnormals, "mxfp8", "subnormals"),
    "infinities are not counted": (lambda x: (quantize(x, "e4m3"), jnp.isnan(x).sum()), "e4m3", "not_finite_survives"),
}

STOCHASTIC = {
    "B20: the key is ignored": (lambda x, key: quantize(x, "mxfp4"), "mxfp4", "keys"),
    "B21: noise is drawn once a row": (
        stochastic(lambda share, key, x: jax.random.uniform(key, (x.shape[0], 1)) < share),
        "mxfp4:ceil",
        "uncorrelated",
    ),
    "B28: key 0 turns stochastic rounding off": (off_at_key_0, "mxfp4:ceil", "keys"),
    "noise has 2 bits": (
        stochastic(lambda share, key, x: jax.random.bits(key, x.shape, jnp.uint32) % 4 / 4 < share),
        "mxfp4:ceil",
        "unbiased",
    ),
    "noise is as often up as down": (
        stochastic(lambda share, key, x: jax.random.bernoulli(key, shape=x.shape) & (share > 0)),
        "mxfp4:ceil",
        "unbiased",
    ),
    "noise reaches beyond the neighbours": (
        stochastic(lambda share, key, x: jnp.floor(share + 2 * jax.random.uniform(key, x.shape) - 0.5)),
        "mxfp4:ceil",
        "between_neighbours",
    ),
    "a number of the format moves": (exact_numbers_move(ml_dtypes.float8_e4m3fn, 127), "e4m3", "between_neighbours"),
    "a number of its block moves": (
        exact_numbers_move(ml_dtypes.float4_e2m1fn, 8, 32),
        "mxfp4:rceil",
        "between_neighbours",
    ),
    "noise is drawn from a state": (noise_from_a_state, "mxfp4", "keys"),
    "noise repeats along a row": (stochastic(repeated_noise), "mxfp4:ceil", "uncorrelated"),
}
MUTANTS = {**NEAREST, **STOCHASTIC}


# Published quantisers


def flax_qdq(x):
    return fp8_ops.qdq(x, jnp.float8_e4m3fn, jnp.ones(1), jnp.float32)


def scaled_dot(x, mode):
    """jax.nn's product with the identity, whose numbers every format has: what it makes of `x`."""
    configs = [jax.nn.get_scaled_dot_general_config(mode)] * 3
    return jax.nn.scaled_dot_general(x, jnp.eye(x.shape[1]), (((1,), (1,)), ((), ())), configs=configs)


def scaled_dot_backward(g, mode):
    """What the gradient of that product makes of the cotangent `g`."""
    return jax.vjp(lambda x: scaled_dot(x, mode), jnp.ones_like(g))[1](g)[0]


def qwix_rounded(x, qtype, block=None, key=None):
    from qwix._src.core import qarray, stochastic_rounding

    noise = None if key is None else stochastic_rounding.get_noise_fn("uniform", key)
    tiles = {1: block} if block else {}
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=[0], tiled_axes=tiles, noise_fn=noise)
    return qarray.dequantize(qarray.quantize(x, how))


PUBLISHED = {
    "B20 qwix, mxfp4": (lambda x, key: qwix_rounded(x, "mxfp4", 32, key), "mxfp4:rceil", "keys"),
    "B20 qwix, int3": (lambda x, key: qwix_rounded(x, "int3", key=key), "int3:channel", "keys"),
    "B21 qwix, int8": (lambda x, key: qwix_rounded(x, jnp.int8, key=key), "int8:channel", "uncorrelated"),
    "B22 qwix, nvfp4": (lambda x: qwix_rounded(x, "nvfp4", 16), "nvfp4", "scale_equivariant"),
    "B23 qwix, nvfp4": (lambda x: qwix_rounded(x, "nvfp4", 16), "nvfp4", "not_finite_survives"),
    "B23 jax.nn, nvfp4": (lambda x: scaled_dot(x, "nvfp4"), "nvfp4", "not_finite_survives"),
    "B24 jax.nn, nvfp4": (lambda x: scaled_dot(x, "nvfp4"), "nvfp4", "scale_equivariant"),
    "B24 jax.nn, nvfp4 backward": (lambda g: scaled_dot_backward(g, "nvfp4"), "nvfp4", "on_grid"),
    "B25 jax.nn, mxfp8 backward": (lambda g: scaled_dot_backward(g, "mxfp8"), "mxfp8:rceil", "ragged_shapes"),
    "B26 Flax, fp8_ops.qdq": (flax_qdq, "e4m3", "not_finite_survives"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(PUBLISHED))
def test_the_defects_of_published_quantisers_are_found(case):
    if "qwix" in case:
        pytest.importorskip("qwix")
    fn, format, law = PUBLISHED[case]
    if "jax.nn" in case:
        try:
            jax.jit(fn).lower(jnp.ones((64, 64)))  # blocks that B25, which asserts their lengths, has no word about
        except NotImplementedError:
            pytest.skip(f"JAX {jax.__version__} runs its scaled product on GPUs alone")
    result = quantizer_laws(fn, format, title=case)[law]
    assert result.verdict == "broken"
    assert ("raised AssertionError" in result.words) == ("B25" in case) and "NameError" not in result.words
    assert "NotImplementedError" not in result.words


@pytest.mark.slow
@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_each_mutant_breaks_the_law_that_is_about_it(mutant):
    fn, format, law = MUTANTS[mutant]
    result = quantizer_laws(fn, format, title=mutant)[law]
    assert result.verdict == "broken" and "raised" not in result.words, result.words


def test_a_scale_that_is_rounded_up_where_the_format_rounds_down_is_found():
    assert "by the rule the scale is" in quantizer_laws(nearest_as("mxfp4:ceil"), "mxfp4")["scale_by_rule"].words


def small_scales_flushed(x):
    """nvfp4, but a block whose scale is below e4m3's normal numbers, 2^-6, becomes zeros."""
    amax = by_block(x, 16, lambda b: jnp.broadcast_to(jnp.abs(b).max(-1, keepdims=True), b.shape))
    return jnp.where(amax / jnp.abs(x).max() < 2.0**-6 / 448, 0, quantize(x, "nvfp4"))


@pytest.mark.parametrize("fn", [nearest_as("nvfp4:torchao"), small_scales_flushed], ids=["clamped", "flushed"])
def test_scales_of_blocks_that_are_small_beside_others_are_looked_at(fn):
    laws = quantizer_laws(fn, "nvfp4")
    assert laws["scale_by_rule"].verdict == "broken"
    assert laws["nearest"].verdict == "broken"


def test_a_block_with_a_subnormal_scale_need_not_stay_as_it_is_when_it_is_rounded_again():
    x = np.zeros((16, 32), np.float32)
    x[0, 0], x[0, 16] = 448 * 6 * 512, 9  # in units of the smallest scale: 9 / 6 is rounded to 2, and 8 / 6 to 1
    once = np.asarray(quantize(x, "nvfp4"))
    assert once[0, 16] == 8 and np.asarray(quantize(once, "nvfp4"))[0, 16] == 6
    assert quantizer_laws(nearest_as("nvfp4_16x16"), "nvfp4_16x16")["idempotent"].verdict == "holds"


def test_what_no_laws_can_be_made_of_is_said():
    with pytest.raises(InputError, match="f32 has 32 bits; expected at most 16"):
        quantizer_laws(np.round, "float32")
    with pytest.raises(InputError, match="axis=1; expected -1 or 0"):
        quantizer_laws(np.round, "mxfp4", axis=1)
    assert quantizer_laws(np.round, "mxint8")["keys"].verdict == "skipped"
