from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmp
from jaxmp.errors import InputError
from jaxmp.scaling.float32_math import Float32MathState, clip_by_global_norm, float32_math, global_norm
from jaxmp.scaling.scalers import DynamicScaler
from jaxmp.scaling.state_format import state_format
from jaxmp.scaling.transform import loss_scaling

HALF = [jnp.float16, jnp.bfloat16]


def params(dtype=jnp.float32):
    return {"b": jnp.array([0.5, -2.0], dtype), "w": jnp.array([[1.0, -0.25], [3.0, 0.125]], dtype)}


def gradients(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params())


def types(tree):
    """What decides on a second compile: shape, dtype and weak type of each leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# Those of trap T14: a zero gradient in float16 gives NaN.
NAN_IN_FLOAT16 = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "nadam": lambda: optax.nadam(1e-3),
    "novograd": lambda: optax.novograd(1e-3),
    "adan": lambda: optax.adan(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
}
OTHERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda count: 0.1 / (1 + count))),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-3), 3),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1, b1=0.9),
    "masked": lambda: optax.masked(optax.adam(1e-3), {"b": True, "w": False}),
    "plateau": lambda: optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}


def slow_unless(quick, names):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_unless({"adam", "rmsprop", "novograd", "muon"}, NAN_IN_FLOAT16))
def test_a_zero_gradient_in_float16_gives_no_nan_t14(name):
    def step(tx):
        grads, half = jax.tree.map(jnp.zeros_like, params(jnp.float16)), params(jnp.float16)
        return jax.tree.leaves(tx.update(grads, tx.init(half), half)[0])

    assert any(np.any(np.isnan(u)) for u in step(NAN_IN_FLOAT16[name]()))
    assert all(np.all(np.isfinite(u)) for u in step(float32_math(NAN_IN_FLOAT16[name]())))


QUICK = {"adam", "adafactor", "muon", "multi_steps", "inject", "masked"}


@pytest.mark.few_variants
@pytest.mark.parametrize("dtype", HALF, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", slow_unless(QUICK, NAN_IN_FLOAT16 | OTHERS))
def test_it_computes_what_the_inner_optimizer_computes_in_float32(name, dtype):
    inner = (NAN_IN_FLOAT16 | OTHERS)[name]()
    ours, theirs = (
        float32_math(inner),
        optax.with_extra_args_support(
            inner if isinstance(inner, optax.GradientTransformation) else inner.gradient_transformation()
        ),
    )
    half, full = params(dtype), params()
    state, expected_state = ours.init(half), theirs.init(full)
    for seed in range(2):
        grads = gradients(seed, dtype)
        updates, state = ours.update(grads, state, half, value=jnp.float32(1))
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        expected, expected_state = theirs.update(wide, expected_state, full, value=jnp.float32(1))
        assert bits(updates) == bits(expected)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype(np.float32)}


@pytest.mark.few_variants
@pytest.mark.parametrize("store", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["adafactor", "multi_steps", "inject", "plateau", "noise", "mu_dtype"])
def test_no_dtype_in_the_state_ever_changes_t17(name, store):
    """In a loop, in bfloat16, with float32 gradients: optax's own state would be another after the first step."""
    bfloat16_mu = {"mu_dtype": lambda: optax.adam(1e-3, mu_dtype=jnp.bfloat16)}
    tx = float32_math((NAN_IN_FLOAT16 | OTHERS | bfloat16_mu)[name](), store)
    half = params(jnp.bfloat16)
    state = tx.init(half)
    before = types(state)
    assert not any(x.weak_type for x in jax.tree.leaves(jax.eval_shape(lambda: state)))

    def step(carry, _):
        updates, state = tx.update(gradients(0), carry[1], carry[0], value=jnp.float32(1))
        return (optax.apply_updates(carry[0], updates), state), None

    (_, state), _ = jax.lax.scan(step, (half, state), length=2)
    assert types(state) == before


def test_published_state_changes_its_dtype_t17():
    half, tx = params(jnp.bfloat16), optax.adam(1e-3)
    state = tx.init(half)
    assert types(tx.update(gradients(0), state, half)[1]) != types(state)


@pytest.mark.slow
def test_one_compile_a_run():
    tx = float32_math(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), jnp.bfloat16, seed=0)
    update, state = jax.jit(tx.update), tx.init(params(jnp.bfloat16))
    for seed in range(3):
        _, state = update(gradients(seed, jnp.bfloat16), state, params(jnp.bfloat16))
    assert update._cache_size() == 1 and state.steps == 3


def test_numbers_in_a_state_of_someone_elses_become_strongly_typed_arrays_t7():
    inner = optax.GradientTransformation(
        lambda p: {"number": 0.5, "weak": jnp.asarray(0.5), "array": 0.5 * jnp.ones(2)},
        lambda updates, state, params=None: (
            updates,
            {"number": 1.0, "weak": state["weak"] * 2, "array": state["array"]},
        ),
    )
    tx = float32_math(inner)
    state = tx.init(params())
    after = tx.update(gradients(0), state)[1]
    assert types(after) == types(state) and not any(x.weak_type for x in jax.tree.leaves((state, after)))
    assert after.inner_state["number"] == after.inner_state["weak"] == 1.0


def test_store_says_what_is_kept_and_scalars_and_counts_stay():
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    for store, mu, nu in [
        (None, "float32", "float32"),
        ("float16", "float16", "float16"),
        (jnp.bfloat16, "bfloat16", "bfloat16"),
        ({"mu": "bfloat16"}, "bfloat16", "float32"),
        ({"nu": jnp.float16, "mu": jnp.bfloat16}, "bfloat16", "float16"),
    ]:
        state = float32_math(inner, store).init(params(jnp.bfloat16))
        assert isinstance(state, Float32MathState)
        adam = state.inner_state.inner_state[0]
        assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {mu}
        assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {nu}
        assert adam.count.dtype == state.inner_state.count.dtype == jnp.int32
        assert state.inner_state.hyperparams["learning_rate"].dtype == jnp.float32


def test_stored_moments_are_float32_ones_rounded_once_a_step():
    """Against float64: one step from a stored state, its result rounded by ml_dtypes."""
    tx = float32_math(optax.trace(0.5), jnp.bfloat16)  # halving is exact, so that one rounding is left
    state = tx.init(params())
    trace = jax.tree.map(lambda p: np.zeros(p.shape), params())
    for seed in range(5):
        grads = gradients(seed, jnp.bfloat16)
        _, state = jax.jit(tx.update)(grads, state)
        exact = jax.tree.map(lambda t, g: 0.5 * t + np.asarray(g, np.float64), trace, grads)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
        for ours, expected in zip(jax.tree.leaves(state.inner_state), jax.tree.leaves(rounded), strict=True):
            np.testing.assert_array_equal(ours, expected)
        trace = jax.tree.map(lambda x: x.astype(np.float64), rounded)


@functools.cache
def decayed(store, seed):
    """Adam's second moment, 1.0 at first, after 300 gradients of 0 with b2 = 0.999; 0.999**300 is 0.741."""
    tx = float32_math(optax.scale_by_adam(b2=0.999), store, seed=seed)
    weights = jnp.zeros(1000, jnp.bfloat16)
    state = tx.init(weights)
    inner = state.inner_state._replace(nu=jnp.ones_like(state.inner_state.nu))

    def step(state, _):
        return tx.update(jnp.zeros_like(weights), state)[1], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, length=300)[0])(state._replace(inner_state=inner))
    return np.asarray(state.inner_state.nu, np.float64)


@pytest.mark.slow
def test_a_second_moment_decays_unless_it_is_rounded_to_nearest_in_bfloat16_t14():
    np.testing.assert_allclose(decayed(None, None), 0.999**300, rtol=300 * 2.0**-24)
    assert np.all(decayed(jnp.bfloat16, None) == 1.0)
    stochastic = decayed(jnp.bfloat16, 0)
    error = np.std(stochastic) / math.sqrt(stochastic.size)
    assert abs(np.mean(stochastic) - 0.999**300) < 3 * error < 0.01


def test_random_bits_are_a_function_of_seed_step_and_place():
    def state_after(seed, steps=2):
        tx = float32_math(optax.trace(0.9), jnp.bfloat16, seed=seed)
        grads = {"a": jnp.full(64, 1.001), "b": jnp.full(64, 1.001)}
        state, seen = tx.init(grads), []
        for _ in range(steps):
            seen.append(tx.update(grads, state)[1].inner_state.trace)
            state = state._replace(steps=state.steps + 1)  # the same sums again, in the next step
        return seen

    first, second = state_after(0)
    assert bits(first) == bits(state_after(0)[0])
    assert bits(first) != bits(second) and bits(first) != bits(state_after(1)[0])
    assert bits(first["a"]) != bits(first["b"])
    assert set(np.asarray(first["a"], np.float64)) == {1.0, 1.0078125}


def test_inside_loss_scaling_a_skipped_step_changes_no_stored_bit():
    tx = loss_scaling(float32_math(optax.adam(1e-3), jnp.bfloat16, seed=0), DynamicScaler())
    update, state = jax.jit(tx.update), tx.init(params())
    grads = jax.tree.map(lambda g: (g * jaxmp.loss_scale(state)).astype(jnp.float32), gradients(0))
    _, state = update(grads, state, params())
    _, skipped = update({**grads, "b": jnp.array([jnp.inf, 0.0])}, state, params())
    assert not jaxmp.last_step_finite(skipped)
    assert bits(skipped.inner_state) == bits(state.inner_state)
    assert types(skipped) == types(state) == types(tx.init(params()))


def test_leaves_that_are_no_floats_pass_untouched():
    seen = []

    def look(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    look = optax.GradientTransformation(lambda p: (), look)
    tree = {"i": jnp.arange(2), "k": jax.random.key(0), "m": jnp.array([True]), "h": jnp.ones(1, jnp.float16)}
    tx = float32_math(look)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    for got in (updates, *seen[0]):
        assert [got[name].dtype for name in "ikm"] == [tree[name].dtype for name in "ikm"]
        assert got["h"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("bflaot16", "store='bflaot16': expected one of float32, bfloat16, float16; did you mean 'bfloat16'"),
        (jnp.int32, "expected one of float32"),
        ("float8_e4m3fn", "expected one of float32"),
        ({"mu": "int8"}, "store='int8'"),
        ({"mu": "bfloat16", "nuu": "bfloat16"}, "store names 'nuu', which the state.*did you mean 'nu'"),
        ({"velocity": "bfloat16"}, "store names 'velocity'.*it has count, mu, nu"),
    ],
    ids=str,
)
def test_what_cannot_be_stored_is_refused(store, words):
    with pytest.raises(InputError, match=words):
        float32_math(optax.adam(1e-3), store).init(params())


# The norm.


def exact_norm(leaves):
    return math.sqrt(math.fsum(float(x) ** 2 for leaf in leaves for x in np.asarray(leaf, np.float64).ravel()))


def test_the_norm_of_half_precision_leaves_is_summed_in_float32_t5():
    tree = [jnp.full(4, 300.0, jnp.float16)]
    assert jnp.isinf(jnp.linalg.norm(tree[0]))
    assert global_norm(tree) == 600.0 and global_norm(tree).dtype == jnp.float32
    ones = [jnp.ones(10_000, jnp.bfloat16)]
    assert global_norm(ones) == 100.0


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5),
            st.sampled_from([np.float32, *HALF]),
        ),
        max_size=3,
    ),
    st.integers(-100, 126),
)
def test_the_norm_is_right_wherever_float32_can_hold_it(values, exponent):
    """Squares of 1e20 overflow and those of 1e-25 underflow; the norms themselves do not."""
    leaves = [np.asarray(v, np.float64) * (1 if d is jnp.float16 else 2.0**exponent) for v, d in values]
    leaves = [np.asarray(x, d) for x, (_, d) in zip(leaves, values, strict=True)]
    leaves = [np.where(np.abs(x.astype(np.float64)) < 2.0**-120, np.zeros_like(x), x) for x in leaves]  # T10
    with jax.disable_jit():
        norm = float(global_norm([jnp.asarray(x) for x in leaves]))
    assert norm == pytest.approx(exact_norm(leaves), rel=20 * 2.0**-24, abs=2.0**-126)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_the_norm_of_a_million_numbers(scale):
    x = np.random.default_rng(0).normal(size=10**6).astype(np.float32) * np.float32(scale)
    exact = np.linalg.norm(x.astype(np.float64))
    assert float(jax.jit(global_norm)({"x": jnp.asarray(x)})) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_the_norm_of_what_is_not_finite_is_not_finite(bad):
    assert not jnp.isfinite(global_norm({"a": jnp.ones(3), "b": jnp.array([1.0, bad], jnp.float16)}))


def test_the_norm_of_nothing_and_of_leaves_without_one():
    rest = [jnp.arange(3), jnp.array([True]), jax.random.key(0), np.zeros(2, jax.dtypes.float0), jnp.zeros(0)]
    for tree in ([], rest[:4], rest, [jnp.zeros(3)]):
        assert global_norm(tree) == 0
    assert global_norm([jnp.array([3.0 + 4.0j]), *rest]) == 5.0


@pytest.mark.slow
def test_the_derivative_of_the_norm_is_the_unit_vector():
    x = jnp.array([3.0, -4.0])
    np.testing.assert_allclose(jax.grad(global_norm)(x), [0.6, -0.8], rtol=2.0**-23)


@pytest.mark.parametrize("dtype", [jnp.float32, *HALF], ids=lambda d: d.__name__)
def test_clipping_by_the_norm_keeps_direction_and_dtype_t5(dtype):
    grads = {"a": jnp.array([300.0, 400.0], dtype), "i": jnp.arange(2)}
    tx = clip_by_global_norm(5.0)
    clipped, _ = tx.update(grads, tx.init(grads))
    assert clipped["a"].dtype == dtype and clipped["a"].tolist() == [3.0, 4.0]
    assert clipped["i"] is grads["i"]
    if dtype != jnp.bfloat16:  # each is a float16, their norm is not
        assert tx.update(jnp.array([60000.0, -45000.0], dtype), ())[0].tolist() == pytest.approx([4, -3], rel=2.0**-22)
    small = {"a": jnp.array([3.0, 4.0], dtype), "z": jnp.array([-0.0], dtype)}
    assert bits(tx.update(small, ())[0]) == bits(small)
    assert jnp.isnan(tx.update(jnp.array([1.0, jnp.nan], dtype), ())[0]).all()


def test_optax_clips_float16_gradients_to_zero_t5():
    grads = jnp.array([300.0, 400.0], jnp.float16)
    assert optax.clip_by_global_norm(5.0).update(grads, ())[0].tolist() == [0, 0]


def test_a_parameter_may_be_called_like_a_field_of_the_state():
    params = {"mu": jnp.ones(3), "sigma": jnp.ones(3)}
    adam = float32_math(optax.adam(1e-3), store={"mu": jnp.bfloat16}).init(params).inner_state[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.mu)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.nu)} == {"float32"}
    with pytest.raises(InputError, match="store names 'sigma'"):
        float32_math(optax.adam(1e-3), store={"sigma": jnp.bfloat16}).init(params)


def test_an_attribute_of_the_parameters_is_no_field_of_the_state():
    class Normal(NamedTuple):
        mu: jax.Array
        sigma: jax.Array

    adam = float32_math(optax.adam(1e-3), store={"mu": jnp.bfloat16}).init(Normal(jnp.ones(3), jnp.ones(3)))
    assert [x.dtype.name for x in jax.tree.leaves(adam.inner_state[0].mu)] == ["bfloat16"] * 2
    assert [x.dtype.name for x in jax.tree.leaves(adam.inner_state[0].nu)] == ["float32"] * 2


def test_what_is_packed_inside_keeps_its_dtypes():
    inner = state_format(optax.adam(1e-3), mu="e4m3:block128")
    params = {"w": jnp.ones((4, 128))}
    stored = [float32_math(inner, store).init(params).inner_state.inner_state[0] for store in (None, jnp.bfloat16)]
    assert len({str(jax.tree.map(lambda x: x.dtype, adam.mu)) for adam in stored}) == 1
    assert stored[1].nu["w"].dtype == jnp.bfloat16


def test_the_norm_of_a_python_number_is_its_magnitude():
    assert global_norm({"a": -3.0, "b": jnp.float32(4)}) == 5
