"""Each historical scaler against its original's rule, written here in plain Python from the original's source."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmp
from jaxmp.errors import InputError
from jaxmp.scaling.historical import (
    ApexScaler,
    DeepSpeedScaler,
    FairseqScaler,
    FlaxScaler,
    JmpScaler,
    MegatronScaler,
    TorchScaler,
    scaler_exhausted,
)
from jaxmp.scaling.scalers import DynamicScaler, HeadroomScaler
from jaxmp.scaling.transform import loss_scaling

# The originals. They know no bounds but their own; `replay` adds ours around them.


class Torch:
    def __init__(self, s):
        self.scale, self.tracker, self.s = s.init_scale, 0, s

    def step(self, overflow):
        if overflow:
            self.scale, self.tracker = self.scale * self.s.backoff_factor, 0
            return
        self.tracker += 1
        if self.tracker == self.s.growth_interval:
            self.scale, self.tracker = self.scale * self.s.growth_factor, 0


class Jmp:
    def __init__(self, s):
        self.scale, self.counter, self.s = s.init_scale, 0, s

    def step(self, overflow):
        period, counter = self.s.growth_interval, self.counter
        self.counter = 0 if overflow else (counter + 1) % period
        if overflow:
            self.scale = max(self.s.min_scale, self.scale * self.s.backoff_factor)
        elif counter == period - 1:
            self.scale *= self.s.growth_factor


class Flax:
    def __init__(self, s):
        self.scale, self.fin_steps, self.s = s.init_scale, 0, s

    def step(self, overflow):
        grow = self.fin_steps == self.s.growth_interval
        self.fin_steps = 0 if grow or overflow else self.fin_steps + 1
        if overflow:
            self.scale = max(self.scale * self.s.backoff_factor, self.s.min_scale)
        elif grow:
            self.scale *= self.s.growth_factor


class Apex:
    def __init__(self, s):
        self.scale, self.unskipped, self.hysteresis, self.s = s.init_scale, 0, s.hysteresis, s

    def step(self, overflow):
        if overflow:
            self.unskipped = 0
            self.hysteresis -= 1
            if self.hysteresis <= 0:
                self.scale *= self.s.backoff_factor
            return
        self.hysteresis = self.s.hysteresis
        self.unskipped += 1
        if self.unskipped == self.s.growth_interval:
            self.scale, self.unskipped = min(self.s.max_scale, self.scale * self.s.growth_factor), 0


class Megatron:
    def __init__(self, s):
        self.scale, self.growth, self.hysteresis, self.s = s.init_scale, 0, s.hysteresis, s

    def step(self, overflow):
        if overflow:
            self.growth = 0
            self.hysteresis -= 1
            if self.hysteresis <= 0:
                self.scale = max(self.scale * self.s.backoff_factor, self.s.min_scale)
            return
        self.growth += 1
        if self.growth == self.s.growth_interval:
            self.growth, self.hysteresis = 0, self.s.hysteresis
            self.scale *= self.s.growth_factor


class AtTheFloor(Exception):
    pass


class DeepSpeed:
    def __init__(self, s):
        self.scale, self.s = s.init_scale, s
        self.iteration, self.last_overflow, self.hysteresis = 0, -1, s.delayed_shift

    def step(self, overflow):
        if overflow:
            if self.s.delayed_shift == 1 or self.hysteresis == 1:
                if self.scale == self.s.min_scale:
                    raise AtTheFloor
                self.scale = max(self.scale * self.s.backoff_factor, self.s.min_scale)
            else:
                self.hysteresis -= 1
            self.last_overflow = self.iteration
        else:
            if self.s.consecutive_hysteresis:
                self.hysteresis = self.s.delayed_shift
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % self.s.growth_interval == 0:
                if not self.s.consecutive_hysteresis:
                    self.hysteresis = self.s.delayed_shift
                self.scale *= self.s.growth_factor
        self.iteration += 1


class Fairseq:
    min_loss_scale = 1e-4

    def __init__(self, s):
        self.scale, self.s = s.init_scale, s
        self.iteration, self.last_overflow, self.last_rescale, self.overflows = 0, -1, -1, 0
        if s.min_scale != FairseqScaler.min_scale:
            self.min_loss_scale = s.min_scale * 0.75  # any number that lies below it, and above the next power of two

    def step(self, overflow):
        if overflow:
            before, since = self.scale, self.iteration - self.last_rescale
            self.last_overflow = self.iteration
            self.overflows += 1
            if self.overflows / float(since) >= self.s.tolerance:
                self.scale *= self.s.backoff_factor
                self.last_rescale, self.overflows = self.iteration, 0
            if self.scale <= self.min_loss_scale:
                self.scale = before
                raise AtTheFloor
        elif (self.iteration - self.last_overflow) % self.s.growth_interval == 0:
            self.scale *= self.s.growth_factor
            self.last_rescale = self.iteration
        self.iteration += 1


ORIGINALS = {
    TorchScaler: Torch,
    JmpScaler: Jmp,
    FlaxScaler: Flax,
    ApexScaler: Apex,
    MegatronScaler: Megatron,
    DeepSpeedScaler: DeepSpeed,
    FairseqScaler: Fairseq,
}


def replay(scaler, trace):
    """The original's scale after each step, within our bounds; NaN from where it raises."""
    original, scales = ORIGINALS[type(scaler)](scaler), np.full(len(trace), np.nan)
    for i, finite in enumerate(trace):
        before = original.scale
        try:
            original.step(overflow=not finite)
        except AtTheFloor:
            break
        if original.scale > scaler.max_scale:
            original.scale = before
        original.scale = max(original.scale, scaler.min_scale)
        scales[i] = original.scale
    return scales


def follow(scaler, traces):
    """The states after each step of each trace, [traces, steps]: one scan over a batch of scalers."""
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, len(traces)), scaler.init())

    def step(state, finite):
        state = jax.vmap(scaler.update)(state, finite, jnp.where(finite, jnp.float32(1), jnp.inf))
        return state, state

    states = jax.lax.scan(step, state, traces.T)[1]
    return jax.tree.map(jnp.transpose, states)


@functools.cache
def random_traces(count=1000, steps=100):
    """Traces that overflow rarely, now and then, and most of the time."""
    rng = np.random.default_rng(0)
    return rng.uniform(size=(count, steps)) < rng.uniform(0.2, 1.0, size=(count, 1)) ** 0.5


def check(scaler, states, traces):
    scales, expected = np.asarray(states.scale), np.stack([replay(scaler, trace) for trace in traces.tolist()])
    ended = np.isnan(expected)
    np.testing.assert_array_equal(scales[~ended], expected[~ended])
    np.testing.assert_array_equal(getattr(states, "exhausted", np.zeros_like(ended)), ended)
    assert np.all(np.frexp(scales)[0] == 0.5)
    assert np.all((scaler.min_scale <= scales) & (scales <= scaler.max_scale))
    return ended


def kind(scaler):
    return type(scaler).__name__


# First, each with an interval that traces of 100 steps reach; then some that meet their bounds and their quirks.
SCALERS = [
    TorchScaler(growth_interval=7),
    JmpScaler(growth_interval=7),
    FlaxScaler(growth_interval=7),
    ApexScaler(growth_interval=7),
    MegatronScaler(growth_interval=7),
    DeepSpeedScaler(growth_interval=7),
    FairseqScaler(growth_interval=7),
]
MORE = [
    TorchScaler(growth_interval=1, max_scale=2.0**20, min_scale=2.0**10, growth_factor=4.0),
    JmpScaler(growth_interval=2, init_scale=2.0, max_scale=2.0**5),
    FlaxScaler(growth_interval=1, init_scale=2.0**-120, backoff_factor=2.0**-4),
    ApexScaler(growth_interval=3, hysteresis=3, growth_factor=8.0),
    MegatronScaler(growth_interval=4, hysteresis=3, init_scale=4.0),
    DeepSpeedScaler(growth_interval=3, delayed_shift=3, consecutive_hysteresis=True),
    DeepSpeedScaler(growth_interval=1, delayed_shift=1, init_scale=2.0**8, max_scale=2.0**20),
    FairseqScaler(growth_interval=6, tolerance=0.3, min_scale=1.0),
    FairseqScaler(growth_interval=20, tolerance=0.1, min_scale=2.0**-20, backoff_factor=0.25),
]


@pytest.mark.few_variants
@pytest.mark.parametrize("scaler", [*SCALERS, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE)], ids=str)
def test_a_historical_scaler_is_its_original_on_1000_random_traces(scaler):
    traces = random_traces()
    states = jax.jit(follow, static_argnums=0)(scaler, traces)
    ended = check(scaler, states, traces)
    if hasattr(scaler.init(), "exhausted"):
        assert 0 < np.sum(ended[:, -1]) < len(traces)  # both ways of ending are there
    assert len(np.unique(np.asarray(states.scale))) > 4


@pytest.mark.slow
@pytest.mark.parametrize("scaler", SCALERS, ids=kind)
def test_jit_scan_and_pmap_agree(scaler):
    """Step by step under jit, in one scan, and under pmap; the last two on all 1000 traces."""
    traces = random_traces()
    scanned = jax.jit(follow, static_argnums=0)(scaler, traces)
    mapped = jax.pmap(follow, static_broadcasted_argnums=0)(scaler, traces[None])
    for a, b in zip(scanned, mapped, strict=True):
        np.testing.assert_array_equal(a, b[0])
    step, state = jax.jit(jax.vmap(scaler.update)), jax.tree.map(lambda x: jnp.broadcast_to(x, 1000), scaler.init())
    for i in range(30):
        finite = traces[:, i]
        state = step(state, finite, jnp.where(finite, jnp.float32(1), jnp.inf))
        for a, b in zip(scanned, state, strict=True):
            np.testing.assert_array_equal(a[:, i], b)
    assert step._cache_size() == 1


@st.composite
def any_scaler(draw):
    kind = draw(st.sampled_from(sorted(ORIGINALS, key=lambda c: c.__name__)))
    low, init, high = (2.0**e for e in sorted(draw(st.tuples(*[st.integers(-126, 126)] * 3))))
    fields = {
        "min_scale": low,
        "init_scale": init,
        "max_scale": high,
        "growth_factor": draw(st.sampled_from([1.0, 2.0, 4.0, 2.0**100])),
        "backoff_factor": draw(st.sampled_from([1.0, 0.5, 0.25, 2.0**-100])),
        "growth_interval": draw(st.integers(1, 4)),
    }
    if kind is ApexScaler:
        fields["growth_factor"] = draw(st.sampled_from([1.0, 2.0]))  # its own cap cuts, where the others' skips
    if kind in (ApexScaler, MegatronScaler):
        fields["hysteresis"] = draw(st.integers(1, 3))
    if kind is DeepSpeedScaler:
        fields["delayed_shift"] = draw(st.integers(1, 3))
        fields["consecutive_hysteresis"] = draw(st.booleans())
    if kind is FairseqScaler:
        fields["tolerance"] = float(draw(st.fractions(0, 1, max_denominator=1000)))
    return kind(**fields)


@pytest.mark.slow
@settings(max_examples=25)
@given(any_scaler(), st.lists(st.booleans(), min_size=1, max_size=20))
def test_any_historical_scaler_on_any_trace(scaler, trace):
    states, state = [], scaler.init()
    with jax.disable_jit():  # nothing compiles
        for finite in trace:
            state = scaler.update(state, jnp.bool_(finite), jnp.float32(1))
            states.append(state)
    check(scaler, jax.tree.map(lambda *x: np.stack(x)[None], *states), np.array([trace]))


def run(scaler, trace):
    """The scales after each step of one trace."""
    return follow(scaler, np.asarray(trace)[None]).scale[0].tolist()


def test_defaults_are_the_originals():
    """The table of the numerics contract."""
    rows = {
        TorchScaler: (2.0**16, 2.0, 0.5, 2000),
        JmpScaler: (2.0**15, 2.0, 0.5, 2000),
        FlaxScaler: (2.0**16, 2.0, 0.5, 2000),
        ApexScaler: (2.0**16, 2.0, 0.5, 2000),
        MegatronScaler: (2.0**32, 2.0, 0.5, 1000),
        DeepSpeedScaler: (2.0**16, 2.0, 0.5, 1000),
        FairseqScaler: (2.0**15, 2.0, 0.5, 2000),
    }
    for kind, row in rows.items():
        s = kind()
        assert (s.init_scale, s.growth_factor, s.backoff_factor, s.growth_interval) == row
    assert JmpScaler().min_scale == MegatronScaler().min_scale == DeepSpeedScaler().min_scale == 1
    assert FlaxScaler().min_scale == np.finfo(np.float32).tiny
    assert FairseqScaler().min_scale / 2 <= 1e-4 < FairseqScaler().min_scale
    assert ApexScaler().max_scale == 2.0**24
    assert MegatronScaler().hysteresis == DeepSpeedScaler().delayed_shift == 2
    assert not DeepSpeedScaler().consecutive_hysteresis


# The installed libraries themselves.


def test_jmp_grows_after_n_good_steps_and_flax_after_n_plus_one():
    trace = [True] * 9 + [False] + [True] * 9
    ours, scale = run(JmpScaler(growth_interval=3), trace), jmp.DynamicLossScale(jnp.float32(2.0**15), period=3)
    for finite, expected in zip(trace, ours, strict=True):
        scale = scale.adjust(jnp.bool_(finite))
        assert float(scale.loss_scale) == expected
    assert ours[:6] == [2.0**15, 2.0**15, 2.0**16, 2.0**16, 2.0**16, 2.0**17]

    ours, scale = run(FlaxScaler(growth_interval=3), trace), DynamicScale(growth_interval=3, scale=jnp.float32(2.0**16))
    grad = jax.jit(lambda scale, x: scale.value_and_grad(lambda p: p * x)(jnp.float32(1))[:2])
    for finite, expected in zip(trace, ours, strict=True):
        scale, was_finite = grad(scale, jnp.where(finite, jnp.float32(1), jnp.inf))
        assert bool(was_finite) == finite and float(scale.scale) == expected
    assert ours[:8] == [2.0**16] * 3 + [2.0**17] * 4 + [2.0**18]


def test_the_floor_survives_a_jit_boundary_b1():
    published = jmp.DynamicLossScale(jnp.float32(2.0**-3), min_loss_scale=jnp.float32(2.0**-4))
    scaler, adjust = JmpScaler(init_scale=2.0**-3, min_scale=2.0**-4), jax.jit(lambda s: s.adjust(jnp.bool_(False)))
    state, update = scaler.init(), jax.jit(scaler.update)
    for _ in range(3):
        published = adjust(published)
        state = update(state, jnp.bool_(False), jnp.float32(jnp.inf))
    assert published.loss_scale == 1.0  # an overflow has raised the scale to the floor that it should not have
    assert state.scale == 2.0**-4


def test_the_scale_is_float32_whatever_the_gradients_are_b2():
    with pytest.raises(TypeError):
        jmp.DynamicLossScale(jnp.float16(2.0**15)).adjust(jnp.bool_(True))
    scaler = JmpScaler()
    state = scaler.update(scaler.init(), jnp.bool_(True), jnp.float16(1))
    assert state.scale.dtype == jnp.float32


@pytest.mark.few_variants
@pytest.mark.parametrize("scaler", SCALERS, ids=kind)
def test_the_scale_stays_between_floor_and_cap_b10(scaler):
    published = {True: np.float32(2.0**16), False: np.float32(2.0**16)}
    with np.errstate(over="ignore", under="ignore"):
        for _ in range(400):  # jaxamp and Keras: no cap, and Keras no floor
            published[True] *= np.float32(2)
            published[False] *= np.float32(0.5)
    assert published == {True: np.inf, False: 0}
    for finite in (True, False):
        scale = np.float32(run(scaler, [finite] * 1200)[-1])
        assert scale == (scaler.max_scale if finite else scaler.min_scale)
        assert 0 < np.float32(1) / scale < np.inf


def test_the_first_float16_step_is_not_skipped_and_one_program_is_compiled_b11():
    def grad(p, scale, x):
        return jax.grad(lambda p: (p * x).astype(jnp.float16).astype(jnp.float32) * scale)(p)

    published = jax.jit(lambda s, p: s.value_and_grad(lambda p: p.astype(jnp.float16) ** 2)(p)[:2])
    scale, finite = published(DynamicScale(), jnp.float32(1))
    published(scale, jnp.float32(1))
    assert not finite  # 65536 as a weak type became a float16: inf
    assert published._cache_size() == 2

    tx = loss_scaling(optax.sgd(1.0), FlaxScaler())
    update, state = jax.jit(tx.update), tx.init(jnp.float32(1))
    for _ in range(2):
        loss = jnp.float32(1).astype(jnp.float16) ** 2
        assert jaxmp.scale_loss(loss, state) == 2.0**16
        _, state = update(jaxmp.loss_scale(state) * 2, state, jnp.float32(1))
        assert jaxmp.last_step_finite(state)
    assert update._cache_size() == 1


def test_every_counter_is_in_the_state_b18():
    """fairseq's checkpoint has the scale alone: when it was written decides when the scale grows next."""
    scaler, trace = FairseqScaler(growth_interval=7, tolerance=0.3), ([True] * 5 + [False]) * 3 + [True] * 30
    whole = replay(scaler, trace)
    restarted = Fairseq(scaler)
    for finite in trace[:20]:
        restarted.step(overflow=not finite)
    scale, restarted = restarted.scale, Fairseq(scaler)
    restarted.scale = scale
    published = []
    for finite in trace[20:]:
        restarted.step(overflow=not finite)
        published.append(restarted.scale)
    assert published != whole[20:].tolist()


@pytest.mark.few_variants
@pytest.mark.parametrize("scaler", [*SCALERS, HeadroomScaler(half_life=5), DynamicScaler(growth_interval=3)], ids=kind)
def test_a_restart_between_any_two_steps_changes_no_bit_b18(scaler):
    trace = random_traces()[500, :40]
    update, state = jax.jit(scaler.update), scaler.init()
    restored = state
    for finite in trace:
        state = update(state, jnp.bool_(finite), jnp.where(finite, jnp.float32(100), jnp.inf))
        restored = update(restored, jnp.bool_(finite), jnp.where(finite, jnp.float32(100), jnp.inf))
        leaves, structure = jax.tree.flatten(restored)
        saved = [np.asarray(leaf) for leaf in leaves]
        restored = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved])
        assert jax.tree.leaves(restored) == jax.tree.leaves(state)
    assert update._cache_size() == 1


@pytest.mark.parametrize("scaler", [*SCALERS, HeadroomScaler()], ids=kind)
def test_the_state_is_strongly_typed_and_keeps_its_types_b11(scaler):
    state = scaler.init()
    after = jax.eval_shape(scaler.update, state, jnp.bool_(True), jnp.float32(1))
    assert [(x.shape, x.dtype) for x in state] == [(x.shape, x.dtype) for x in after]
    assert not any(x.weak_type for x in (*state, *after))
    assert state.scale.dtype == jnp.float32 and state.scale.shape == ()
    buffers = [x.unsafe_buffer_pointer() for x in state]
    assert len(set(buffers)) == len(buffers)
    jax.lax.scan(lambda s, f: (scaler.update(s, f, jnp.float32(1)), None), state, jnp.array([True, False]))


# What the originals raise, our states say.


@pytest.mark.parametrize("scaler", [DeepSpeedScaler(init_scale=2.0), FairseqScaler(init_scale=2.0**-12)], ids=str)
def test_a_loop_can_read_that_the_scaler_is_at_its_end(scaler):
    tx = optax.chain(loss_scaling(optax.sgd(1.0), scaler))
    update, state = jax.jit(tx.update), tx.init(jnp.float32(1))
    seen = []
    for _ in range(6):
        _, state = update(jnp.float32(jnp.inf), state, jnp.float32(1))
        seen.append(bool(scaler_exhausted(state)))
    assert seen == sorted(seen) and seen[-1] and not seen[0]
    _, state = update(jnp.float32(1), state, jnp.float32(1))
    assert scaler_exhausted(state) and jaxmp.loss_scale(state) == scaler.min_scale
    assert update._cache_size() == 1


@pytest.mark.parametrize("state", [None, loss_scaling(optax.sgd(1.0)).init(jnp.float32(1))], ids=["none", "dynamic"])
def test_other_scalers_are_never_at_their_end(state):
    assert not scaler_exhausted(state) and scaler_exhausted(state).dtype == jnp.bool_


@pytest.mark.slow
def test_at_its_end_the_rule_goes_on():
    scaler = DeepSpeedScaler(init_scale=1.0, delayed_shift=1, growth_interval=3)
    assert run(scaler, [False, False, *[True] * 7, False]) == [1, 1, 1, 1, 1, 2, 2, 2, 4, 2]
    scaler = FairseqScaler(init_scale=2.0**-13, growth_interval=3)
    assert run(scaler, [False, False, *[True] * 6]) == [2.0**-13] * 4 + [2.0**-12] * 3 + [2.0**-11]
    assert run(FairseqScaler(init_scale=2.0**-12, backoff_factor=0.25), [False, False]) == [2.0**-12] * 2


def test_a_share_of_overflows_is_compared_exactly():
    """3 overflows in 10 steps are a share of 0.3, and one in 3 is a share of 1/3, however a product is rounded."""
    assert np.float32(0.508) * np.float32(250) > 127  # as floats, 127 overflows in 250 steps would be too few
    for tolerance in (Fraction(n, d) for d in (3, 7, 10, 49, 250, 997, 1000) for n in (1, 127, d - 1) if n < d):
        scaler = FairseqScaler(tolerance=float(tolerance), growth_interval=10**6)
        n, d = tolerance.numerator, tolerance.denominator
        at = scaler.init()._replace(steps=jnp.int32(d - 1), overflows=jnp.int32(n - 1))
        below = scaler.init()._replace(steps=jnp.int32(d), overflows=jnp.int32(n - 1))
        with jax.disable_jit():
            at, below = (scaler.update(s, jnp.bool_(False), jnp.float32(1)) for s in (at, below))
        assert (n / float(d) >= scaler.tolerance, n / float(d + 1) >= scaler.tolerance) == (True, False)
        assert (at.scale, below.scale) == (2.0**14, 2.0**15)


def test_counts_do_not_run_over():
    scaler = FairseqScaler(tolerance=0.999, growth_interval=2**30)
    state = scaler.init()._replace(steps=jnp.int32(2**20), overflows=jnp.int32(2**20 - 1))
    state = scaler.update(state, jnp.bool_(False), jnp.float32(1))
    assert state.scale == 2.0**14 and state.steps == 0


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (TorchScaler, {"init_scale": 65504.0}, r"TorchScaler\.init_scale=65504\.0.*such as 32768"),
        (FlaxScaler, {"growth_factor": 0.5}, "FlaxScaler: growth_factor=0.5 must be at least 1"),
        (JmpScaler, {"init_scale": 0.5}, r"JmpScaler: init_scale=0.5 is outside \[min_scale=1"),
        (JmpScaler, {"growth_interval": 0}, r"JmpScaler\.growth_interval=0: expected a whole number"),
        (ApexScaler, {"hysteresis": 0}, r"ApexScaler\.hysteresis=0"),
        (MegatronScaler, {"hysteresis": 1.5}, r"MegatronScaler\.hysteresis=1\.5"),
        (DeepSpeedScaler, {"delayed_shift": 0}, r"DeepSpeedScaler\.delayed_shift=0"),
        (FairseqScaler, {"min_scale": 1e-4}, r"FairseqScaler\.min_scale=0\.0001"),
        (FairseqScaler, {"tolerance": 1.5}, r"FairseqScaler\.tolerance=1\.5: expected a share"),
        (FairseqScaler, {"tolerance": math.pi / 10}, "denominator of at most 1000, such as 0.314"),
        (HeadroomScaler, {"headroom": -1}, r"HeadroomScaler\.headroom=-1: expected a whole number from 0 to 30"),
        (HeadroomScaler, {"half_life": 0}, r"HeadroomScaler\.half_life=0: expected a whole number from 1 to 100000"),
        (HeadroomScaler, {"max_scale": 3.0}, r"HeadroomScaler\.max_scale=3\.0: expected a power of two"),
        (HeadroomScaler, {"min_scale": 2.0**16}, "HeadroomScaler: init_scale=32768 is outside"),
    ],
    ids=str,
)
def test_values_that_break_the_contract_are_refused(kind, values, words):
    with pytest.raises(InputError, match=words):
        kind(**values)


# Our own: headroom instead of overflows.


def overflows(scaler, gradients, hidden=1.0):
    """Scales, and overflows, along traces of the largest unscaled gradient, [traces, steps].

    A step overflows where the scaled gradient, times `hidden` inside the network, exceeds float16's largest number.
    """

    def step(state, largest):
        scaled = state.scale * largest
        finite = scaled * hidden <= 65504
        after = jax.vmap(scaler.update)(state, finite, jnp.where(finite, scaled, jnp.inf))
        return after, (state.scale, ~finite)

    state = jax.tree.map(lambda x: jnp.broadcast_to(x, len(gradients)), scaler.init())
    scales, overflowed = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(state, jnp.float32(gradients).T)[1]
    return np.asarray(scales).T, np.asarray(overflowed).T


def headroom_reference(scaler, gradients):
    scale = ceiling = np.float32(scaler.init_scale)
    limit, growth, scales = np.float32(65504 / 2**scaler.headroom), np.float32(2 ** (1 / scaler.half_life)), []
    for largest in gradients:
        scales.append(scale)
        scaled = scale * largest
        if scaled <= 65504:
            ceiling = min(ceiling * growth, scale * (limit / scaled)) if scaled else ceiling * growth
        else:
            ceiling = scale / np.float32(2)
        ceiling = min(max(ceiling, np.float32(scaler.min_scale)), np.float32(scaler.max_scale))
        scale = np.float32(2.0 ** (math.frexp(ceiling)[1] - 1))
    return scales


@pytest.mark.slow
@pytest.mark.few_variants
@pytest.mark.parametrize(
    "scaler",
    [
        HeadroomScaler(half_life=9),
        HeadroomScaler(half_life=1, headroom=0, init_scale=1.0),
        HeadroomScaler(half_life=40, headroom=8, max_scale=2.0**20, min_scale=1.0),
    ],
    ids=str,
)
def test_the_headroom_scaler_is_its_rule_on_1000_random_traces(scaler):
    rng = np.random.default_rng(0)
    steps = rng.normal(scale=rng.uniform(0, 3, size=(1000, 1)), size=(1000, 100))
    gradients = np.exp2(np.cumsum(steps, axis=1) - 4).astype(np.float32)
    gradients[rng.uniform(size=gradients.shape) < 0.02] = 0
    scales, overflowed = overflows(scaler, gradients)
    np.testing.assert_array_equal(scales, [headroom_reference(scaler, g) for g in gradients])
    assert np.any(overflowed)
    assert np.all(np.frexp(scales)[0] == 0.5)
    assert np.all((scaler.min_scale <= scales) & (scales <= scaler.max_scale))
    # The law of the class, in float64: after a finite step the scale leaves the headroom, where the floor lets it.
    scaled = scales[:, 1:].astype(np.float64) * gradients[:, :-1]
    kept = scaled <= 65504 / 2**scaler.headroom * (1 + 2**-22)
    assert np.all(kept | overflowed[:, :-1] | (scales[:, 1:] == scaler.min_scale))


def test_headroom_on_growing_gradients_has_no_overflow_where_the_dynamic_rule_has_several():
    gradients = 1e-3 * 2 ** (np.arange(1000) / 50)[None]
    scales, ours = overflows(HeadroomScaler(), gradients)
    assert np.sum(overflows(DynamicScaler(), gradients)[1]) >= 9
    assert np.sum(ours) == 0
    # And no more room than that is given away: the next larger scale would not leave it.
    assert np.all(2 * scales[0, 350:] * gradients[0, 349:-1] > 65504 / 2**4)


def test_no_growth_within_the_headroom_overflows():
    rng = np.random.default_rng(1)
    steps = rng.uniform(-4.5, 4, size=(1000, 200))
    steps[:, 0] = 0
    gradients = np.exp2(np.clip(np.cumsum(steps, axis=1), -40, 25))
    assert not np.any(overflows(HeadroomScaler(), gradients)[1])


def test_the_scale_grows_back_by_one_bit_each_half_life():
    scales, _ = overflows(HeadroomScaler(half_life=10, init_scale=1.0, max_scale=2.0**8), np.full((1, 120), 1e-6))
    changes = np.flatnonzero(np.diff(scales[0]))
    assert np.all(np.abs(np.diff(changes) - 10) <= 1) and scales[0, -1] == 2.0**8


def test_what_overflows_inside_the_network_halves_the_scale_once_each_half_life():
    scales, overflowed = overflows(HeadroomScaler(half_life=50), np.full((1, 500), 1e-2), hidden=2.0**12)
    settled = overflowed[0, 100:]
    assert 0 < np.sum(settled) <= 9 and not np.any(settled[1:] & settled[:-1])
    assert len(np.unique(scales[0, 100:])) == 2


def test_no_gradient_and_a_loss_that_is_not_finite():
    scaler = HeadroomScaler(half_life=1)
    state = scaler.update(scaler.init(), jnp.bool_(True), jnp.float32(0))
    assert state.scale == state.ceiling == 2.0**16
    state = scaler.update(state, jnp.bool_(False), jnp.float32(0))  # the loss was NaN, the gradients were not
    assert state.scale == state.ceiling == 2.0**15
