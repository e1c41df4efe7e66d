from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmp.errors import InputError
from jaxmp.scaling.scalers import DynamicScaler, NoScaler, ScalerState, StaticScaler


def reference(scaler, trace):
    """torch's rule with floor, cap and hysteresis, in plain Python: the scale after each step."""
    scale, good, overflows, scales = scaler.init_scale, 0, 0, []
    for finite in trace:
        if finite:
            good, overflows = good + 1, 0
            if good == scaler.growth_interval:
                good = 0
                if scale * scaler.growth_factor <= scaler.max_scale:
                    scale *= scaler.growth_factor
        else:
            good, overflows = 0, overflows + 1
            if overflows >= scaler.hysteresis:
                scale = max(scale * scaler.backoff_factor, scaler.min_scale)
        scales.append(scale)
    return scales


@functools.partial(jax.jit, static_argnums=0)
def run(scaler, trace):
    """The states after each step, in one scan."""

    def step(state, finite):
        state = scaler.update(state, finite, jnp.where(finite, 1.0, jnp.inf))
        return state, state

    return jax.lax.scan(step, scaler.init(), trace)[1]


powers = st.integers(-126, 126).map(lambda e: 2.0**e)


@st.composite
def dynamic_scalers(draw):
    low, init, high = sorted(draw(st.tuples(powers, powers, powers)))
    return DynamicScaler(
        init_scale=init,
        min_scale=low,
        max_scale=high,
        growth_factor=draw(st.sampled_from([1.0, 2.0, 4.0, 2.0**100])),
        backoff_factor=draw(st.sampled_from([1.0, 0.5, 0.25, 2.0**-100])),
        growth_interval=draw(st.integers(1, 4)),
        hysteresis=draw(st.integers(1, 3)),
    )


# Few scalers, since each compiles; long random traces, in runs, since those are what a scaler reacts to.
SCALERS = [
    DynamicScaler(growth_interval=3),
    DynamicScaler(growth_interval=1, max_scale=2.0**16),
    DynamicScaler(growth_interval=2, hysteresis=2, init_scale=1.0),
    DynamicScaler(growth_interval=4, hysteresis=3, growth_factor=4.0, backoff_factor=0.25, min_scale=1.0),
    DynamicScaler(
        init_scale=2.0**-126, min_scale=2.0**-126, max_scale=2.0**126, growth_interval=1, growth_factor=2.0**100
    ),
    DynamicScaler(growth_factor=1.0, backoff_factor=1.0, growth_interval=1),
]


@pytest.mark.parametrize("scaler", SCALERS, ids=str)
@pytest.mark.parametrize("share_finite", [0.5, 0.8, 0.95])
def test_dynamic_scaler_follows_the_rule_of_torch_with_floor_cap_and_hysteresis(scaler, share_finite):
    trace = np.random.default_rng(0).uniform(size=500) < share_finite
    np.testing.assert_array_equal(run(scaler, trace).scale, np.float32(reference(scaler, trace.tolist())))


@pytest.mark.slow
@pytest.mark.few_variants
@pytest.mark.parametrize("scaler", [SCALERS[0], SCALERS[3], StaticScaler(2.0**10), NoScaler()], ids=str)
def test_jit_scan_and_pmap_follow_the_rule_on_1000_random_traces(scaler):
    rng = np.random.default_rng(1)
    traces = rng.uniform(size=(1000, 60)) < rng.uniform(0.2, 1.0, size=(1000, 1)) ** 0.5
    if isinstance(scaler, DynamicScaler):
        expected = np.float32([reference(scaler, trace) for trace in traces.tolist()])
        assert len(np.unique(expected)) > 4
    else:
        expected = np.full(traces.shape, 2.0**10 if isinstance(scaler, StaticScaler) else 1, np.float32)

    many = jax.vmap(functools.partial(run, scaler))
    np.testing.assert_array_equal(many(traces).scale, expected)
    np.testing.assert_array_equal(jax.pmap(many)(traces[None]).scale[0], expected)
    step = jax.jit(jax.vmap(scaler.update))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, len(traces)), scaler.init())
    for i, finite in enumerate(traces.T):
        state = step(state, finite, jnp.where(finite, jnp.float32(1), jnp.inf))
        np.testing.assert_array_equal(state.scale, expected[:, i])
    assert step._cache_size() == 1


@given(dynamic_scalers(), st.lists(st.booleans(), max_size=30))
def test_any_dynamic_scaler_on_any_trace(scaler, trace):
    state = scaler.init()
    for finite, expected in zip(trace, reference(scaler, trace), strict=True):
        state = update(scaler, state, finite)
        assert float(state.scale) == expected
        assert math.frexp(float(state.scale))[0] == 0.5
        assert scaler.min_scale <= state.scale <= scaler.max_scale
        assert np.isfinite(np.float32(1) / np.float32(state.scale))


def update(scaler, state, finite):
    """One step outside of jit, on NumPy scalars: nothing compiles."""
    with jax.disable_jit():
        return scaler.update(state, jnp.bool_(finite), jnp.float32(1))


@pytest.mark.parametrize("finite", [True, False])
def test_min_and_max_scale_hold_for_ever_b1_b10(finite):
    states = run(SCALERS[0], np.full(300, finite))
    assert np.all(np.isfinite(states.scale))
    assert states.scale[-1] == (SCALERS[0].max_scale if finite else SCALERS[0].min_scale)
    assert np.max(states.overflows) <= SCALERS[0].hysteresis


def test_the_floor_survives_a_jit_boundary_b1():
    scaler = DynamicScaler(init_scale=2.0**-3, min_scale=2.0**-4)
    step = jax.jit(scaler.update)
    state = scaler.init()
    for _ in range(3):
        state = step(state, jnp.bool_(False), jnp.float32(jnp.inf))
    assert state.scale == 2.0**-4


@pytest.mark.parametrize("scaler", [DynamicScaler(), StaticScaler(2.0**10), NoScaler()], ids=str)
def test_the_state_is_strongly_typed_and_keeps_its_types_b2_b11(scaler):
    state = scaler.init()
    after = jax.eval_shape(scaler.update, state, jnp.bool_(True), jnp.float32(1))
    for x in (*state, *after):
        assert not x.weak_type
    assert [x.dtype for x in state] == [x.dtype for x in after] == [jnp.float32, jnp.int32, jnp.int32]
    step = jax.jit(scaler.update)
    for finite in (True, False, True):
        state = step(state, jnp.bool_(finite), jnp.float32(1))
    assert step._cache_size() == 1
    buffers = [x.unsafe_buffer_pointer() for x in scaler.init()]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("scaler", [StaticScaler(2.0**10), NoScaler()], ids=str)
def test_a_static_scale_never_changes(scaler):
    expected = scaler.init()
    for finite in (True, False):
        state = scaler.update(scaler.init(), jnp.bool_(finite), jnp.float32(jnp.nan))
        assert isinstance(state, ScalerState)
        assert state == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"init_scale": 65504.0}, "power of two, such as 32768"),  # defect B9
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"init_scale": -2.0}, "init_scale=-2.0"),
        ({"init_scale": math.nan}, "init_scale=nan"),
        ({"init_scale": math.inf}, "init_scale=inf"),
        ({"init_scale": 1.7e308}, r"init_scale=1\.7e\+308: expected a power of two, such as 1 or 2"),
        ({"growth_factor": 1.5}, "growth_factor=1.5: expected a power of two, such as 1 or 2"),
        ({"backoff_factor": 0.3}, "power of two, such as 0.25"),
        ({"growth_factor": 0.5}, "growth_factor=0.5 must be at least 1"),
        ({"backoff_factor": 2.0}, "backoff_factor=2 at most 1"),
        ({"min_scale": 2.0**-127}, r"2\*\*-126"),  # trap T10
        ({"max_scale": 2.0**127}, r"2\*\*126"),
        ({"min_scale": 2.0**20}, "outside"),
        ({"max_scale": 2.0**10}, "outside"),
        ({"growth_interval": 0}, "growth_interval=0"),
        ({"growth_interval": 2.5}, "growth_interval=2.5"),
        ({"hysteresis": 0}, "hysteresis=0"),
    ],
    ids=str,
)
def test_values_that_break_the_contract_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        DynamicScaler(**values)


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0, 65504.0, math.inf, math.nan, 2.0**127, 2.0**-127])
def test_a_static_scale_that_would_round_gradients_is_refused_b9(scale):
    with pytest.raises(InputError, match=r"StaticScaler\.scale"):
        StaticScaler(scale)


@pytest.mark.parametrize("value", [math.inf, math.nan, 2**31, 1.5, 0])
def test_a_count_that_int32_cannot_hold_is_refused(value):
    with pytest.raises(InputError, match=r"DynamicScaler.growth_interval=.*: expected a whole number from 1 to"):
        DynamicScaler(growth_interval=value)
