from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.errors import InputError
from jaxmp.precision.blocks import parse_block_format, quantize
from jaxmp.scaling.scalers import StaticScaler
from jaxmp.scaling.state_format import PackedArray, parse_state_format, state_format
from jaxmp.scaling.transform import loss_scaling, skipped_steps


def params(dtype=jnp.float32):
    """A matrix whose rows are whole blocks of 128, one whose rows are not, a vector, and two parameters apart."""
    rng = np.random.default_rng(0)
    shapes = {"rows": (3, 256), "kernel": (3, 3, 5, 7), "bias": (10,), "scalar": ()}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def gradients(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape) * np.exp(rng.normal(size=p.shape)), dtype), params()
    )


def adam(**how):
    return state_format(optax.adam(1e-2), **({"mu": "block128", "nu": "block128"} | how))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def types(tree):
    """What decides on a second compile: shape, dtype and weak type of each leaf, and the formats."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree))


def packed(tree):
    return [
        x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, PackedArray)) if isinstance(x, PackedArray)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["block128", "mxfp4:rceil", "int8:group64"])
def test_the_state_is_that_of_float32_rounded_once_a_step(format):
    inner, tx = optax.adam(1e-2), state_format(optax.adam(1e-2), mu=format, nu=format, rounding="nearest")
    state, plain = tx.init(params()), inner.init(params())
    (length,) = parse_block_format(format).block
    for seed in range(2):
        updates, state = jax.jit(tx.update)(gradients(seed), state, params())
        expected, plain = jax.jit(inner.update)(gradients(seed), plain, params())

        def rounded(x):
            if not x.ndim:
                return x
            flat = x if x.shape[-1] % length == 0 else x.ravel()
            return quantize(flat, format).reshape(x.shape)

        plain = jax.tree.map(rounded, plain)
        unpacked = jax.tree.map(
            lambda x: x.unpack() if isinstance(x, PackedArray) else x,
            state.inner_state,
            is_leaf=lambda x: isinstance(x, PackedArray),
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
        same = [
            np.mean(np.asarray(a) == np.asarray(b))
            for a, b in zip(*map(jax.tree.leaves, (unpacked, plain)), strict=True)
        ]
        assert min(same) > 0.99  # another last digit before rounding, by XLA's fusion, may round to the other neighbour


@pytest.mark.slow
def test_elements_and_scales_take_as_many_bytes_as_the_format_says():
    state = jax.eval_shape(adam(expand_range=True, mu="block128", nu="int4:block32").init, params()).inner_state[0]
    for name, shape in {"rows": (3, 256), "kernel": (3, 3, 5, 7), "bias": (10,)}.items():
        size = math.prod(shape)
        mu, nu = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(of[name])) for of in (state.mu, state.nu))
        assert mu == size + 6 * math.ceil(size / 128)  # a float32 scale and a bfloat16 power for each block
        assert nu == math.ceil(size / 2) + 6 * math.ceil(size / 32)
    assert (state.mu["scalar"].dtype, state.count.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_no_dtype_in_the_state_ever_changes_and_updates_are_float32(dtype):
    tx = adam(expand_range=True)
    state = jax.eval_shape(tx.init, params(dtype))
    updates, new = jax.eval_shape(tx.update, gradients(0, dtype), state, params(dtype))
    assert types(new) == types(state) and jax.tree.structure(new) == jax.tree.structure(state)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


WIDE = np.float32(np.exp2(np.random.default_rng(1).uniform(-24, 0, 1024)) * np.tile([1, -1], 512))


def stored(x, **how):
    """`x` as it is stored, as the momentum of a fresh optimizer."""
    tx = state_format(optax.trace(0.0), trace="block128", **how)
    (trace,) = packed(jax.jit(lambda x: tx.update(x, tx.init(x))[1])(x))
    return trace


@pytest.mark.slow
def test_an_expanded_range_loses_no_small_number():
    x = jnp.array(WIDE)
    plain, expanded = (stored(x, rounding="nearest", expand_range=on).unpack() for on in (False, True))
    assert jnp.sum(plain == 0) > 100 and not jnp.any(expanded == 0)
    # Of a range of 24 binades in the 17.8 of e4m3, the spacing and so the largest error are 24 / 17.8 times as large;
    # below, where 3 of the 17.8 are subnormal, larger.
    error = jnp.abs(expanded / x - 1)
    assert jnp.max(jnp.where(jnp.abs(x) > 2.0**-19, error, 0)) < 24 / 17.8 * 2**-4 * 1.1 and jnp.max(error) < 0.6
    assert jnp.array_equal(jnp.sign(expanded), jnp.sign(x))
    narrow = 1 + jnp.arange(128.0) / 128  # of less range than the format's, the error is smaller than the format's
    assert jnp.max(jnp.abs(stored(narrow, rounding="nearest", expand_range=True).unpack() / narrow - 1)) < 2**-7


@pytest.mark.slow
def test_blocks_without_range_or_with_none_that_is_finite():
    for values, expected in (([0.0, -0.0], [0, 0]), ([3, -3], [3, -3]), ([1, math.inf], [math.nan] * 2)):
        found = stored(jnp.array(values, jnp.float32), expand_range=True).unpack()
        np.testing.assert_array_equal(found, np.float32(expected))
    found = stored(jnp.array([1, math.nan] + [0.0] * 200), expand_range=True).unpack()
    assert jnp.all(jnp.isnan(found[:128])) and jnp.all(found[128:] == 0)  # the blocks beside it are as they were


@pytest.mark.slow
@pytest.mark.parametrize("expand_range", [False, True])
def test_stochastic_rounding_is_unbiased_with_and_without_an_expanded_range(expand_range):
    # Over 60 binades, rounding the raised numbers without bias would leave the numbers themselves 0.7 % too large.
    binades = np.random.default_rng(2).uniform(-60, 0, 200)
    x, count = jnp.array(np.float32(2.0**binades) if expand_range else np.abs(WIDE[:200])), 2000
    tx = state_format(optax.trace(0.0), trace="block128", expand_range=expand_range)

    @jax.jit
    @jax.vmap
    def rounded(step):
        (trace,) = packed(tx.update(x, tx.init(x)._replace(steps=step))[1])
        return trace.unpack()

    found = np.asarray(rounded(jnp.arange(count)), np.float64)
    error, spread = found.mean(0) - np.asarray(x, np.float64), found.std(0) / math.sqrt(count)
    assert np.abs(error[spread > 0] / spread[spread > 0]).max() < 4.5
    assert (spread > 0).mean() > 0.95
    x = np.asarray(x, np.float64)
    assert abs((error / x).sum()) < 4.5 * math.sqrt(((spread / x) ** 2).sum())


@pytest.mark.slow
def test_random_bits_are_a_function_of_seed_step_and_place():
    x = jnp.full(128, 0.3).at[0].set(1.0)  # 0.3 lies between two numbers of the format

    def after(seed):
        tx = state_format(optax.trace(0.0), trace="int4:block128", seed=seed)
        first = jax.jit(lambda: tx.update((x, x), tx.init((x, x)))[1])()
        return [np.asarray(each.unpack()) for each in packed((first, jax.jit(tx.update)((x, x), first)[1]))]

    found = [*after(0), *after(1)]  # two places, two steps and two seeds
    np.testing.assert_array_equal(found[:4], after(0))
    assert all((a != b).any() for i, a in enumerate(found) for b in found[:i])
    assert len(np.unique(found[0])) == 3


class Moments(NamedTuple):
    mu: Any
    nu: Any


def keeping():
    """An optimizer whose two moments are the gradients, and before the first step the parameters."""
    return optax.GradientTransformation(lambda p: Moments(p, p), lambda g, state, p=None: (g, Moments(g, g)))


BETWEEN = jnp.full(128, 0.3).at[0].set(1.0)  # 0.3 lies between two numbers of int4:block128


def test_each_of_nested_state_formats_rounds_the_fields_that_it_stores():
    nested = state_format(keeping(), mu="int4:block128", rounding="nearest")
    nested = state_format(nested, nu="int4:block128", rounding="stochastic")
    tx = state_format(optax.chain(nested, keeping()), mu="int4:block128", rounding="nearest")

    @jax.jit
    def after_each_step():
        states = [tx.init(BETWEEN)]
        for _ in range(2):
            states.append(tx.update(BETWEEN, states[-1])[1])
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[2])
        return [[x.unpack() for x in packed(state)] for state in states]

    before, *after = after_each_step()
    for found in (before, *after):
        assert [len(np.unique(x)) for x in found] == [2, 3, 2]  # to nearest, all 0.3 become one number
    assert (before[1] != after[0][1]).any(), "the first step draws the bits of init"


@functools.partial(jax.tree_util.register_dataclass, data_fields=("mu", "nu"), meta_fields=())
@dataclasses.dataclass
class Gaussian:
    mu: Any
    nu: Any


@pytest.mark.parametrize("node", [Gaussian, Moments])
def test_attributes_of_parameters_are_no_fields_of_the_state(node):
    inner = node(jnp.ones(256), jnp.ones(256))
    params = {"outer": node(inner, inner)}
    masked = optax.masked(optax.adam(1e-3), {"outer": node(node(True, True), False)})
    for optimizer in (optax.adam(1e-3), optax.MultiSteps(optax.adam(1e-3), 2), masked):
        state = jax.eval_shape(state_format(optimizer, mu="block128").init, params)
        moments = [optax.tree_utils.tree_get_all_with_path(state, name) for name in ("mu", "nu")]
        mu, nu = (next(v for path, v in found if path[-1].tuple_name == "ScaleByAdamState") for found in moments)
        assert len(packed(mu)) == len(packed(state)) > 0 and not packed(nu)
    with pytest.raises(InputError, match="no arrays in a field 'mu'; it has trace"):
        state_format(optax.sgd(0.1, momentum=0.9), mu="block128").init(params)


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0,)])
def test_arrays_of_size_0_are_stored(shape):
    tx = adam(expand_range=True)
    state = jax.eval_shape(tx.init, jnp.ones(shape))
    updates, new = jax.eval_shape(tx.update, jnp.ones(shape), state)
    assert updates.shape == shape and types(new) == types(state)
    assert [jax.eval_shape(PackedArray.unpack, x).shape for x in packed(new)] == [shape] * 2


@pytest.mark.slow
def test_a_second_moment_decays_with_stochastic_rounding_and_not_to_nearest():
    size = 64 * 128
    # The largest of each block keeps growing; the others decay by a thousandth a step, less than half a unit.
    gradient = jnp.where(jnp.arange(size) % 128 == 0, 1.0, 0.0)

    def after(rounding):
        tx = state_format(optax.scale_by_adam(b2=0.999), nu="block128", rounding=rounding)

        @jax.jit
        def decayed():
            _, state = tx.update(jnp.ones(size), tx.init(jnp.ones(size)))
            state, _ = jax.lax.scan(lambda state, _: (tx.update(gradient, state)[1], None), state, length=200)
            return jnp.mean(state.inner_state.nu.unpack(), where=gradient == 0) / 1e-3

        return float(decayed())

    assert after("nearest") > 0.99
    assert after("stochastic") == pytest.approx(0.999**200, rel=0.02)  # four standard deviations


@pytest.mark.slow
def test_inside_loss_scaling_a_skipped_step_changes_no_stored_bit():
    tx = loss_scaling(adam(expand_range=True), StaticScaler(2.0))
    step = jax.jit(tx.update)
    _, state = step(gradients(0), jax.jit(tx.init)(params()), params())
    bad = gradients(1)
    bad["rows"] = bad["rows"].at[1, 7].set(jnp.inf)
    _, skipped = step(bad, state, params())
    assert skipped_steps(skipped) == 1 and bits(skipped.inner_state) == bits(state.inner_state)
    _, applied = step(gradients(1), state, params())
    assert bits(applied.inner_state) != bits(state.inner_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "formats", "there"),
    [
        (optax.sgd(0.1, momentum=0.9), {"trace": "mxfp8:rceil"}, 3),
        (optax.lion(1e-3), {"mu": "block128x128"}, 3),
        (optax.rmsprop(1e-3), {"nu": "int8:channel"}, 3),
        (optax.MultiSteps(optax.adam(1e-3), 2), {"mu": "int8", "acc_grads": "nvfp4"}, 6),
        (
            optax.masked(optax.adam(1e-3), {"rows": True, "kernel": True, "bias": False, "scalar": False}),
            {"mu": "mxfp4"},
            2,
        ),
        (optax.adafactor(1e-3, min_dim_size_to_factor=128), {"v_row": "mxfp8", "v_col": "mxfp8", "v": "mxfp8"}, None),
    ],
    ids=["sgd", "lion", "rmsprop", "multi_steps", "masked", "adafactor"],
)
def test_any_optimizer_stores_the_fields_that_are_named(inner, formats, there):
    tx = state_format(inner, **formats)
    state = jax.eval_shape(tx.init, params())
    updates, new = jax.eval_shape(tx.update, gradients(0), state, params())
    assert jax.tree.structure(new) == jax.tree.structure(state) and types(new) == types(state)
    assert there is None or len(packed(state)) == there
    assert types(updates) == types(params())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: adam(mu="blok128"), "mu='blok128' did you mean 'block128'"),
        (lambda: adam(mu="e4m3"), "mu='e4m3' no block format"),
        (lambda: adam(mu="mxfp8:flor"), "mu='mxfp8:flor' no block, scale format or scale rule did you mean 'floor'"),
        (lambda: adam(rounding="nearst"), "rounding='nearst' stochastic or nearest did you mean 'nearest'"),
        (lambda: adam(mu="mxfp8", expand_range=True), "mu='mxfp8_e4m3' range expansion float32 scales"),
        (lambda: adam(mu="block128x128", expand_range=True), "mu='block128x128' range expansion one length"),
        (lambda: state_format(optax.adam(1e-3)), "no field mu='e4m3:block128'"),
        (lambda: state_format(optax.adam(1e-3), mi="mxfp4").init(params()), "mi='mxfp4' no arrays did you mean 'mu'"),
        (lambda: state_format(optax.adam(1e-3), count="mxfp4").init(params()), "count='mxfp4' no arrays it has mu, nu"),
        (lambda: state_format(optax.sgd(0.1), mu="mxfp4").init(params()), "mu='mxfp4' no arrays it has none"),
        (lambda: parse_state_format("mu=mxfp4,expandde"), "'expandde' FIELD=FORMAT did you mean 'expanded'"),
        (lambda: parse_state_format("mu=mxfp4,mu=mxfp8"), "'mu=mxfp8' a second mu"),
        (lambda: parse_state_format("nearest"), "no field"),
        (lambda: parse_state_format(""), "'' FIELD=FORMAT"),
    ],
)
def test_what_cannot_be_stored_is_one_message(make, words):
    with pytest.raises(InputError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    for word in words.split(" did you mean "):
        assert all(part in message for part in word.split()), (word, message)


def test_an_optimizer_of_an_experiment_asks_for_it_in_one_text():
    from jaxmp.training.optimizers import Adam, Lion

    text = "mu=e4m3:block128, nu=e4m3:block128, expanded, nearest"
    state = jax.eval_shape(Adam(state_format=text, clip_norm=1.0).make(10).init, params())
    assert [x.format.name for x in packed(state)] == ["block128"] * 6 and all(
        x.powers is not None for x in packed(state)
    )
    with pytest.raises(InputError, match="did you mean 'expanded'"):
        Adam(state_format="mu=block128,expand")
    with pytest.raises(InputError, match=r"no arrays in a field 'nu'.*did you mean 'mu'"):
        Lion(state_format="nu=block128").make(10).init(params())
