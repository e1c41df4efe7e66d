from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxmp.errors import InputError
from jaxmp.precision.rounding import apply_updates, init_compensation

HALVES = [jnp.bfloat16, jnp.float16]
ROUNDINGS = ["nearest", "stochastic", "kahan"]


def raw(tree):
    """Every leaf as bytes: -0.0 is not 0.0, NaN is NaN."""
    keys = jax.dtypes.prng_key
    leaves = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x for x in jax.tree.leaves(tree)]
    return [np.asarray(x).tobytes() for x in leaves]


def step(params, updates, rounding, *, key=None, compensation=None):
    """(params, compensation) after one step, whatever the rounding."""
    if rounding == "kahan":
        return apply_updates(params, updates, rounding, compensation=compensation)
    return apply_updates(params, updates, rounding, key=key), compensation


@functools.partial(jax.jit, static_argnames=("rounding", "steps"))
def repeated(params, updates, rounding, *, steps):
    """`steps` equal updates, in one loop."""

    def body(i, carry):
        key = jax.random.fold_in(jax.random.key(0), i)
        return step(carry[0], updates, rounding, key=key, compensation=carry[1])

    start = params, init_compensation(params) if rounding == "kahan" else None
    return jax.lax.fori_loop(0, steps, body, start)


@pytest.mark.slow
def test_1000_small_updates_of_a_bfloat16_one_are_lost_to_nearest_and_kept_by_kahan_and_on_average_by_stochastic():
    one, update = jnp.bfloat16(1), jnp.float32(1e-3)
    assert float(repeated(one, update, "nearest", steps=1000)[0]) == 1.0
    assert float(repeated(one, update, "kahan", steps=1000)[0]) == 2.0

    draws = 10_000
    ones, updates = jnp.full(draws, one), jnp.full(draws, update)
    y = np.asarray(repeated(ones, updates, "stochastic", steps=1000)[0]).astype(np.float64)
    exact = 1 + 1000 * float(np.float32(1e-3))
    assert abs(y.mean() - exact) < 3 * y.std() / math.sqrt(draws)
    assert y.std() > 0


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_kahan_follows_the_exact_sum_to_the_rounding_of_its_compensation(half, size):
    # With 1e-3 in float16, what is lost is below float16's smallest number: the compensation has bfloat16's range.
    steps, start, update = 1000, float(jnp.asarray(size, half)), float(np.float32(size * 1e-4))
    params, compensation = repeated(jnp.asarray(size, half), jnp.float32(update), "kahan", steps=steps)
    exact = start + steps * update
    unit = float(ml_dtypes.finfo(half).eps) * 2.0 ** math.floor(math.log2(exact))
    lost = steps * 2.0**-9 * unit / 2  # at most half a unit is kept, to 8 bits
    assert abs(float(params) + float(compensation) - exact) < lost
    assert abs(float(params) - exact) < lost + unit / 2
    assert abs(start - exact) > 4 * (lost + unit / 2)  # where nearest would have stayed


@pytest.mark.few_variants
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("half", [pytest.param(HALVES[0], marks=pytest.mark.slow), *HALVES[1:]])
def test_the_bits_are_the_same_in_and_out_of_jit_when_steps_are_fused_t6(rounding, half):
    params = jnp.linspace(-3, 3, 64).astype(half)
    updates = jnp.linspace(-1e-2, 2e-2, 64)
    compensation = init_compensation(params) if rounding == "kahan" else None

    def four_steps(params, compensation):
        for i in range(4):  # unrolled: XLA sees each step beside the next
            key = jax.random.key(i)
            params, compensation = step(params, updates * (i + 1), rounding, key=key, compensation=compensation)
        return params, compensation

    one_at_a_time = params, compensation
    jitted = jax.jit(lambda p, u, key, c: step(p, u, rounding, key=key, compensation=c))
    for i in range(4):
        one_at_a_time = jitted(one_at_a_time[0], updates * (i + 1), jax.random.key(i), one_at_a_time[1])
    assert raw(four_steps(params, compensation)) == raw(jax.jit(four_steps)(params, compensation)) == raw(one_at_a_time)


@pytest.mark.slow
@given(st.sampled_from(HALVES), st.integers(0, 2**32 - 1))
def test_nearest_is_the_float32_sum_rounded_once(half, seed):
    rng = np.random.default_rng(seed)
    params = rng.normal(size=64).astype(half)
    updates = (rng.normal(size=64) * 10.0 ** rng.integers(-4, 1, 64)).astype(np.float32)
    want = (params.astype(np.float32) + updates).astype(half)
    assert raw(apply_updates(params, updates)) == raw(want)


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_stochastic_rounding_takes_the_neighbours_of_the_float32_sum_without_bias(half):
    draws = 10_000
    y = apply_updates(jnp.full(draws, 0.75, half), jnp.full(draws, -3.3e-5), "stochastic", key=jax.random.key(2))
    y = np.asarray(y).astype(np.float64)
    exact = float(np.float32(0.75) + np.float32(-3.3e-5))
    unit = float(ml_dtypes.finfo(half).eps) / 2
    assert set(np.unique(y)) == {0.75 - unit, 0.75}
    share = (exact - (0.75 - unit)) / unit
    assert abs(y.mean() - exact) < 3 * unit * math.sqrt(share * (1 - share) / draws)


@pytest.mark.slow
def test_each_leaf_draws_from_a_key_of_its_own_and_replicas_with_one_key_agree():
    params = {"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(256, jnp.bfloat16)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-9), params)
    new = apply_updates(params, updates, "stochastic", key=jax.random.key(0))
    assert raw(new["a"]) != raw(new["b"])

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = PartitionSpec()
    sharded = jax.shard_map(
        lambda p, u, k: apply_updates(p, u, "stochastic", key=k),
        mesh=mesh,
        in_specs=(replicated, replicated, replicated),
        out_specs=replicated,
    )
    assert raw(jax.jit(sharded)(params, updates, jax.random.key(0))) == raw(new)


@pytest.mark.few_variants
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_an_update_of_minus_zero_changes_no_bit_of_parameter_or_compensation(rounding):
    codes = np.arange(2**16, dtype=np.uint16)
    finite = codes[(codes & 0x7F80) != 0x7F80]  # any selection of bfloat16 may change which NaN a NaN is
    params = {
        "bf16": finite.view(jnp.bfloat16),
        "f16": codes.view(np.float16),
        "f32": np.float32([1e-40, -0.0, np.nan]),
    }
    params = jax.tree.map(jnp.asarray, params)
    updates = jax.tree.map(lambda x: jnp.full(x.shape, -0.0), params)
    compensation = jax.tree.map(
        lambda c: jnp.asarray(np.resize(finite[::-1], c.shape).view(c.dtype)) if c.shape else c,
        init_compensation(params),
    )
    compensation = compensation if rounding == "kahan" else None
    run = jax.jit(lambda p, u, c: step(p, u, rounding, key=jax.random.key(0), compensation=c))
    assert raw(run(params, updates, compensation)) == raw((params, compensation))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_leaves_without_a_gradient_are_not_touched_and_float32_is_summed_as_it_is_b4_b5(rounding):
    params = {
        "w": jnp.ones(3, jnp.bfloat16),
        "master": jnp.float32(1.0),
        "count": jnp.int32(7),
        "mask": jnp.array([True, False]),
        "key": jax.random.key(1),
        "fp8": jnp.ones(2, jnp.float8_e4m3fn),
        "none": None,
    }
    updates = {
        "w": jnp.full(3, 1.0, jnp.bfloat16),
        "master": jnp.float32(2.0**-20),
        "count": np.zeros((), jax.dtypes.float0),
        "mask": jnp.array([True, True]),
        "key": params["key"],
        "fp8": jnp.ones(2, jnp.float8_e4m3fn),
        "none": None,
    }
    compensation = init_compensation(params) if rounding == "kahan" else None
    new, new_compensation = step(params, updates, rounding, key=jax.random.key(0), compensation=compensation)
    assert new["w"].tolist() == [2, 2, 2] and new["w"].dtype == jnp.bfloat16
    assert float(new["master"]) == 1 + 2.0**-20
    for name in ("count", "mask", "key", "fp8"):
        assert raw(new[name]) == raw(params[name]), name
    assert jax.tree.structure(new) == jax.tree.structure(params)
    if rounding == "kahan":
        assert jax.tree.map(jnp.shape, new_compensation) == jax.tree.map(jnp.shape, compensation)
        assert {x.dtype for x in jax.tree.leaves(new_compensation)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.few_variants
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_types_never_change_and_empty_trees_are_allowed(rounding):
    params = {"w": jnp.ones(3, jnp.float16), "b": jnp.float32(1.0)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), params)
    compensation = init_compensation(params) if rounding == "kahan" else None
    old = params, compensation
    new = step(params, updates, rounding, key=jax.random.key(0), compensation=compensation)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), old)
    assert not any(x.weak_type for x in jax.tree.leaves(new))
    empty = step({}, {}, rounding, key=jax.random.key(0), compensation={} if rounding == "kahan" else None)
    assert empty == ({}, {} if rounding == "kahan" else None)


def test_overflow_is_infinite_not_the_largest_number():
    assert float(apply_updates(jnp.float16(65504), jnp.float32(100))) == np.inf


def test_the_update_can_be_differentiated_through():
    def loss(learning_rate):
        return apply_updates(jnp.bfloat16(1), -learning_rate * 3).astype(jnp.float32) ** 2

    assert float(jax.grad(loss)(jnp.float32(0.25))) == 2 * 0.25 * -3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "stochastik"}, "did you mean 'stochastic'"),
        ({"rounding": "stochastic"}, "without a key"),
        ({"rounding": "kahan"}, "without a compensation"),
        ({"compensation": jnp.bfloat16(0)}, "'nearest' with a compensation"),
    ],
)
def test_what_is_missing_or_misspelt_is_said(options, message):
    with pytest.raises(InputError, match=message):
        apply_updates(jnp.bfloat16(1), jnp.float32(1), **options)


def test_a_tiny_negative_float64_update_is_no_skipped_step():
    with jax.enable_x64(True):
        update = jnp.array([-1e-50, 1e-50])
        assert apply_updates(jnp.zeros(2), update).tolist() == update.tolist()
