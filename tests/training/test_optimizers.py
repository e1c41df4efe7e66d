from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from jaxmp.errors import InputError
from jaxmp.scaling.transform import loss_scaling
from jaxmp.training.optimizers import (
    DPSGD,
    KERNELS_AND_EMBEDDINGS,
    LAMB,
    SGD,
    Adam,
    AdamW,
    DPAdam,
    Lion,
    decay_mask,
    make_optimizer,
    optimizer_numbers,
)
from jaxmp.training.schedules import ConstantRate, CosineDecay, LinearDecay, StepDecay, make_schedule, schedule_numbers

PEAK, STEPS = 0.3, 1000


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0).standard_normal
    return {
        "Dense_0": {"kernel": np.float32(draw((4, 3))), "bias": np.float32(draw(3))},
        "LayerNorm_0": {"scale": np.float32(draw(4)), "bias": np.float32(draw(4))},
        "tokens": {"embedding": np.float32(draw((11, 4)))},
    }


# What decays of it by default.
MASK = {
    "Dense_0": {"kernel": True, "bias": False},
    "LayerNorm_0": {"scale": False, "bias": False},
    "tokens": {"embedding": True},
}


def after(tx, params, steps=3):
    """The parameters after some steps with random gradients."""
    state, draw = tx.init(params), np.random.default_rng(1).standard_normal
    for _ in range(steps):
        gradients = jax.tree.map(lambda p: np.float32(draw(p.shape)), params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# The formulas of the docstrings, in Python's float64.
def warmup(t, steps):
    return min(1.0, (t + 1) / steps)


def progress(t, warmup_steps=0):
    return min(max((t - warmup_steps) / max(STEPS - warmup_steps, 1), 0.0), 1.0)


SCHEDULES = {
    ConstantRate(): lambda t: 1.0,
    ConstantRate(warmup_steps=10): lambda t: warmup(t, 10),
    CosineDecay(): lambda t: (1 + math.cos(math.pi * progress(t))) / 2,
    CosineDecay(warmup_steps=100, final=0.1): lambda t: (
        warmup(t, 100) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress(t, 100))) / 2)
    ),
    CosineDecay(warmup_steps=STEPS): lambda t: warmup(t, STEPS) * (t <= STEPS),
    LinearDecay(): lambda t: 1 - progress(t),
    LinearDecay(warmup_steps=7, final=0.25): lambda t: warmup(t, 7) * (1 - 0.75 * progress(t, 7)),
    StepDecay(): lambda t: 0.1 ** ((t >= 500) + (t >= 750)),
    StepDecay(warmup_steps=20, boundaries=(1, 100, 900), drop=0.5): lambda t: (
        warmup(t, 20) * 0.5 ** ((t >= 1) + (t >= 100) + (t >= 900))
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_is_its_formula(schedule):
    counts = np.arange(STEPS + 50)
    rates = jax.jit(jax.vmap(schedule.make(PEAK, STEPS)))(jnp.array(counts, jnp.int32))
    expected = [PEAK * SCHEDULES[schedule](int(t)) for t in counts]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=2e-7 * PEAK)


@pytest.mark.parametrize("schedule", [ConstantRate(), CosineDecay(), LinearDecay(), StepDecay()], ids=repr)
def test_a_learning_rate_is_a_strong_float32_scalar(schedule):
    for count in (3, jnp.int32(3)):
        rate = schedule.make(PEAK, STEPS)(count)
        assert (rate.dtype, rate.shape, rate.weak_type) == (jnp.float32, (), False)


def test_a_run_never_trains_a_step_at_rate_zero():
    for schedule in (
        ConstantRate(warmup_steps=10),
        CosineDecay(warmup_steps=10),
        LinearDecay(),
        StepDecay(boundaries=(100, 200)),
    ):
        rates = jax.vmap(schedule.make(PEAK, STEPS))(jnp.arange(STEPS))
        assert rates.min() > 0 and rates.max() == jnp.float32(PEAK)


def test_the_optimizer_follows_its_schedule():
    tx = SGD(PEAK, momentum=0.0, schedule=LinearDecay(warmup_steps=2)).make(5)
    state, moved = tx.init(jnp.zeros(())), []
    for _ in range(5):
        update, state = tx.update(jnp.ones(()), state, jnp.zeros(()))
        moved.append(-float(update) / PEAK)
    np.testing.assert_allclose(moved, [1 / 2, 1, 1, 2 / 3, 1 / 3], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.1), optax.sgd(0.1, 0.9)),
        (SGD(0.1, momentum=0.0), optax.sgd(0.1)),
        (
            SGD(0.1, nesterov=True, weight_decay=0.1),
            optax.chain(optax.add_decayed_weights(0.1, MASK), optax.sgd(0.1, 0.9, nesterov=True)),
        ),
        (Adam(1e-3), optax.adam(1e-3)),
        (Adam(1e-3, weight_decay=0.1), optax.chain(optax.add_decayed_weights(0.1, MASK), optax.adam(1e-3))),
        (AdamW(1e-3, b1=0.8, b2=0.95, eps=1e-6), optax.adamw(1e-3, 0.8, 0.95, 1e-6, weight_decay=0.01, mask=MASK)),
        (LAMB(1e-3), optax.lamb(1e-3, weight_decay=0.01, mask=MASK)),
        (LAMB(1e-3, weight_decay=0.0), optax.lamb(1e-3)),
        (Lion(1e-4), optax.lion(1e-4, weight_decay=0.1, mask=MASK)),
        (
            AdamW(1e-3, decay=("LayerNorm_0/*", "**/bias"), weight_decay=0.5),
            optax.adamw(1e-3, weight_decay=0.5, mask=jax.tree.map(lambda kernel: not kernel, MASK)),
        ),
        (Adam(1e-3, clip_norm=0.5), optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))),
    ],
    ids=lambda value: repr(value) if hasattr(value, "make") else "",
)
def test_an_optimizer_is_optax_with_kernels_and_embeddings_decaying(ours, theirs, params):
    a, b = after(ours.make(STEPS), params), after(theirs, params)
    # The rate is float32 from a schedule and a Python float in optax's alias, and XLA fuses the two differently.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)


@pytest.mark.slow
def test_weight_decay_shrinks_what_it_names_and_nothing_else(params):
    still = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    for optimizer in (SGD(1.0), Adam(1.0), AdamW(1.0), LAMB(1.0), Lion(1.0)):
        tx = type(optimizer)(1.0, weight_decay=0.5).make(STEPS)
        updates, _ = tx.update(still, tx.init(ones), ones)
        shrunk = jax.tree.map(lambda update: bool((update < 0).all()), updates)
        unmoved = jax.tree.map(lambda update: bool((update == 0).all()), updates)
        assert shrunk == MASK and unmoved == jax.tree.map(lambda decays: not decays, MASK)


def test_a_decay_pattern_that_matches_nothing_is_an_error_with_the_nearest_path(params):
    with pytest.raises(InputError, match=r"'\*\*/kernal'.*there are .*did you mean '\*\*/kernel'"):
        AdamW(decay=("**/*embedding", "**/kernal")).make(STEPS).init(params)
    with pytest.raises(InputError, match=r"'\*\*/\*kernel'.*there are embeding, w"):
        AdamW().make(STEPS).init({"w": jnp.ones(3), "embeding": jnp.ones(3)})
    AdamW().make(STEPS).init({"kernel": jnp.ones(3)})
    AdamW(weight_decay=0.0, decay=("*nothing",)).make(STEPS).init(params)


def test_a_star_in_a_decay_pattern_ends_at_a_slash():
    params = {"Dense_0": {"kernel": 0.0}, "kernel": 0.0, "query_kernel": 0.0, "bias": 0.0}
    at_the_top = {"Dense_0": {"kernel": False}, "kernel": True, "query_kernel": True, "bias": False}
    assert decay_mask(params, patterns=("*kernel",)) == at_the_top
    everywhere = {**at_the_top, "Dense_0": {"kernel": True}}
    assert decay_mask(params, patterns=KERNELS_AND_EMBEDDINGS) == everywhere
    assert decay_mask(params, patterns=("**/kernel",)) == {**everywhere, "query_kernel": False}


def test_clipping_comes_before_the_optimizer():
    tx = SGD(1.0, momentum=0.0, clip_norm=1.0).make(STEPS)
    updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_allclose(updates, [-0.6, -0.8], rtol=1e-6)
    updates, _ = tx.update(jnp.array([3e20, 4e20]), tx.init(jnp.zeros(2)), jnp.zeros(2))  # whose squares are inf
    np.testing.assert_allclose(updates, [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Adam(-1.0), "Adam.learning_rate = -1.0"),
        (lambda: Adam(math.nan), "Adam.learning_rate = nan"),
        (lambda: Adam(b2=1.0), "Adam.b2 = 1.0"),
        (lambda: Adam(eps=0.0), "Adam.eps = 0.0"),
        (lambda: Lion(b1=-0.1), "Lion.b1 = -0.1"),
        (lambda: AdamW(weight_decay=-0.1), "AdamW.weight_decay = -0.1"),
        (lambda: AdamW(decay=()), "AdamW.decay = ()"),
        (lambda: AdamW(decay=("kernel/",)), "AdamW.decay = ('kernel/',): expected paths of parameters"),
        (lambda: AdamW(decay=("@Dense",)), "AdamW.decay = ('@Dense',): expected paths of parameters"),
        (lambda: LAMB(clip_norm=0.0), "LAMB.clip_norm = 0.0"),
        (lambda: SGD(momentum=1.0), "SGD.momentum = 1.0"),
        (lambda: SGD(momentum=0.0, nesterov=True), "SGD.nesterov = True"),
        (lambda: SGD(schedule="cosine"), "SGD.schedule = 'cosine'"),
        (lambda: Adam(optax.constant_schedule(1e-3)), "Adam.learning_rate is a function"),
        (lambda: Adam(1e-3, schedule=lambda t: 1e-3 * t / t).make(9), "schedule test_optimizers.<lambda> gives values"),
        (lambda: Adam(schedule=lambda t: jnp.ones(2)).make(9), "schedule test_optimizers.<lambda> gives shape (2,)"),
        (lambda: Adam(schedule=lambda t: t.real()).make(9), "schedule test_optimizers.<lambda> raised"),
        (
            lambda: Adam(schedule=optax.cosine_decay_schedule(1e-3, 9)).make(9),
            "schedule cosine_decay_schedule reaches 0.001 at most, and a schedule multiplies",
        ),
        (lambda: make_optimizer(lambda steps: 3, 9), "optimizer: test_optimizers.<lambda>(9) is a int"),
        (lambda: make_optimizer(lambda: 3, 9), "optimizer: test_optimizers.<lambda>(9) raised TypeError"),
        (
            lambda: make_optimizer(lambda steps: optax.MultiSteps(optax.sgd(1.0), 2), 9),
            "optimizer: test_optimizers.<lambda>(9) is a MultiSteps; expected an optax transformation (.gradient_",
        ),
        (lambda: make_optimizer(loss_scaling(optax.sgd(1.0)), 9), "the optimizer scales the loss"),
        (lambda: CosineDecay(warmup_steps=-1), "CosineDecay.warmup_steps = -1"),
        (lambda: CosineDecay(final=2.0), "CosineDecay.final = 2.0"),
        (lambda: LinearDecay(final=-0.1), "LinearDecay.final = -0.1"),
        (lambda: StepDecay(boundaries=(0.5, 0.5)), "StepDecay.boundaries = (0.5, 0.5)"),
        (lambda: StepDecay(boundaries=(0.5, 100)), "StepDecay.boundaries = (0.5, 100)"),
        (lambda: StepDecay(boundaries=()), "StepDecay.boundaries = ()"),
        (lambda: StepDecay(drop=0.0), "StepDecay.drop = 0.0"),
        (
            lambda: Adam(schedule=CosineDecay(warmup_steps=11)).make(10),
            "CosineDecay.warmup_steps = 11: expected at most the 10",
        ),
    ],
)
def test_bad_values_name_the_field_and_what_was_expected(make, names):
    with pytest.raises(InputError) as error:
        make()
    text = re.sub(r"\S*<lambda>", "test_optimizers.<lambda>", str(error.value))
    assert text.startswith(names) and "expected" in text


def test_optax_schedules_multiply_the_learning_rate():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100)
    for given, peak in ((schedule, 0.5), (optax.cosine_decay_schedule(3e-4, 100), 1.0)):
        made = make_schedule(given, peak, 100)
        for step in (0, 5, 10, 60):
            assert float(made(step)) == pytest.approx(peak * float(given(step)))
    # A run shorter than its warm-up does not look like one of learning rates.
    assert float(make_schedule(optax.linear_schedule(0.0, 1.0, 1000), 1e-3, 2)(1)) == pytest.approx(1e-6, rel=1e-4)


def test_a_transformation_is_taken_as_it_is_and_a_function_is_told_the_number_of_steps():
    tx = optax.adam(1e-3)
    assert make_optimizer(tx, 9) is tx
    assert make_optimizer(lambda steps: tx if steps == 9 else None, 9) is tx
    assert isinstance(make_optimizer(Adam(), 9), optax.GradientTransformation)


# Numbers that may be arguments of a compiled step.

ON = {"weight_decay": 0.1, "clip_norm": 1.0, "schedule": CosineDecay(warmup_steps=1)}
OTHER = {
    "learning_rate": 0.02,
    "weight_decay": 0.3,
    "clip_norm": 0.5,
    "schedule": CosineDecay(warmup_steps=2, final=0.1),
}
LINEAR = {"schedule": LinearDecay(warmup_steps=1)}, {"schedule": LinearDecay(warmup_steps=2, final=0.1)}
DROPS = {"schedule": StepDecay()}, {"schedule": StepDecay(warmup_steps=3, boundaries=(0.001, 0.9), drop=0.5)}
ALL_ON = [
    (SGD(0.1, momentum=0.9, **ON), {**OTHER, "momentum": 0.7}),
    (Adam(0.1, **ON), {**OTHER, "eps": 0.1}),
    (AdamW(0.1, **ON | LINEAR[0]), {**OTHER | LINEAR[1], "eps": 0.1}),
    (LAMB(0.1, **ON | DROPS[0]), {**OTHER | DROPS[1], "eps": 0.1}),
    (Lion(0.1, **ON), OTHER),
    (DPSGD(0.1, weight_decay=0.1), {"learning_rate": 0.02, "weight_decay": 0.3, "momentum": 0.7}),
    (DPAdam(0.1, weight_decay=0.1), {"learning_rate": 0.02, "weight_decay": 0.3, "eps": 0.1}),
]


@pytest.mark.parametrize(
    ("optimizer", "other"),
    [
        pytest.param(*each, id=type(each[0]).__name__, marks=[pytest.mark.slow] if i else [])
        for i, each in enumerate(ALL_ON)
    ],
)
def test_numbers_take_the_place_of_fields_to_the_bit_and_each_is_read(params, optimizer, other):
    changed = dataclasses.replace(optimizer, **other)
    numbers = changed.numbers(STEPS // 2)
    assert jax.tree.structure(optimizer.numbers(STEPS)) == jax.tree.structure(numbers)
    assert set(numbers) == {*other, "schedule"}
    assert_same_bits(after(optimizer.make(STEPS, numbers), params, 2), after(changed.make(STEPS // 2), params, 2))

    def update(numbers):
        tx = optimizer.make(STEPS, numbers)
        return tx.update(params, tx.init(params), params)[0]

    jaxpr = jax.make_jaxpr(update)(numbers).jaxpr
    _, read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert all(read) and len(read) == len(jax.tree.leaves(numbers))


def test_a_number_that_is_off_or_decides_something_is_no_argument():
    own = type("Own", (), {"make": lambda self, peak, steps: optax.cosine_decay_schedule(peak, steps)})()
    of_optax = optax.cosine_decay_schedule(1.0, 9)
    assert SGD(0.1, momentum=0, schedule=of_optax).numbers(9) == {"learning_rate": 0.1, "schedule": {}}
    assert AdamW(0.1, weight_decay=0, schedule=own).numbers(9) == {"eps": 1e-8}  # it may look at the peak
    assert optimizer_numbers(optax.sgd(0.1), 9) == optimizer_numbers(lambda steps: optax.sgd(0.1), 9) == {}


class Halved(SGD):
    def make(self, steps):
        return optax.sgd(self.learning_rate / 2)


class Risen(SGD):
    def rate(self, steps):
        return lambda count: jnp.float32(2 * self.learning_rate)


@pytest.mark.parametrize("kind", [Halved, Risen])
def test_a_subclass_with_a_make_or_a_rate_of_its_own_is_told_the_number_of_steps_alone(kind):
    optimizer = kind(0.25, momentum=0)
    numbers = optimizer_numbers(optimizer, 9)
    assert numbers == {}
    tx = make_optimizer(optimizer, 9, numbers)
    update, _ = tx.update({"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)}), {"w": jnp.ones(1)})
    assert update["w"] == (-0.125 if kind is Halved else -0.5)
    assert optimizer.rate_of(9, {"ema_decay": 0.9})(0) == (0.25 if kind is Halved else 0.5)


class NoNumbers(SGD):
    def _rule(self, learning_rate):
        return optax.sgd(learning_rate)


class OfSteps(ConstantRate):
    def _factor(self, t, steps):
        return t / steps


class OwnNumbers(ConstantRate):
    def numbers(self, steps):
        return {"power": 2.0}

    def _factor(self, t, numbers):
        return t ** numbers["power"]


def test_a_subclass_is_told_what_arguments_its_methods_have_and_may_leave_out_the_numbers_of_the_base():
    with pytest.raises(InputError, match=r"NoNumbers\._rule\(self, learning_rate\): expected _rule\(.*, numbers\)"):
        NoNumbers().make(9)
    with pytest.raises(InputError, match=r"OfSteps\._factor\(self, t, steps\): expected _factor\(self, t, numbers\)"):
        SGD(schedule=OfSteps()).make(9)
    schedule = OwnNumbers(warmup_steps=8)
    for numbers in (None, schedule_numbers(schedule, 9)):
        assert make_schedule(schedule, 1.0, 9, numbers)(3) == 9 * 4 / 8


@pytest.mark.slow
def test_a_float32_argument_changes_the_dtype_of_no_update():
    optimizer = SGD(0.1, weight_decay=0.1, decay=("*",), clip_norm=0.3)

    def updates(numbers, gradients):
        tx = optimizer.make(STEPS, numbers)
        return tx.update(gradients, tx.init(gradients), gradients)[0]

    with jax.enable_x64(True):
        gradients = {"double": np.linspace(-1, 1, 5), "single": np.linspace(-1, 1, 5, dtype=np.float32)}
        found = jax.jit(updates)(jax.tree.map(np.float32, optimizer.numbers(STEPS)), gradients)
        for name, expected in updates(None, gradients).items():
            assert found[name].dtype == gradients[name].dtype == expected.dtype
            np.testing.assert_allclose(found[name], expected, rtol=2**-22)
