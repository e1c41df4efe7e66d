from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.errors import InputError
from jaxmp.scaling.scalers import DynamicScaler, StaticScaler
from jaxmp.scaling.transform import loss_scaling
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.training.evaluation import make_eval_step
from jaxmp.training.metrics import Mean, compute
from jaxmp.training.state import TrainState
from jaxmp.training.step import make_train_step


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


def schedule(count):
    return 0.1 / (1 + count)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))


def batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(rows, 5)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, rows)),
        "weight": jnp.ones(rows),
    }


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [np.asarray(x).tobytes() for x in leaves]


def with_overflow(loss_fn, name="overflow"):
    """The loss function, with an infinite gradient (and a finite loss) where the batch says so."""

    @jax.custom_vjp
    def poison(x, factor):
        return x

    poison.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))

    def loss(params, model_state, batch, key):
        leaves, structure = jax.tree.flatten(params)
        leaves = [poison(leaf, batch[name][i]) for i, leaf in enumerate(leaves)]
        return loss_fn(jax.tree.unflatten(structure, leaves), model_state, batch, key)

    return loss


@functools.cache
def training():
    """(state, jitted step) of a net with BatchNorm, EMA, AdamW and a schedule."""
    task = Classification()
    tx = loss_scaling(optimizer(), DynamicScaler(growth_interval=2))

    @jax.jit
    def init():
        params, model_state = init_model(Net(), task, batch(), jax.random.key(1))
        return TrainState.create(params, tx, key=jax.random.key(2), model_state=model_state, ema=True)

    step = make_train_step(with_overflow(make_loss(Net(), task, "mixed_float16")), tx, ema_decay=0.99)
    return init(), jax.jit(step)


LEAVES = 6  # of Net's parameters


def poisoned(seed=0, leaf=None, value=jnp.inf):
    factors = jnp.ones(LEAVES)
    return {**batch(seed=seed), "overflow": factors if leaf is None else factors.at[leaf].set(value)}


def kept(state):
    """All that a skipped step must leave as it was."""
    return state.params, state.model_state, state.opt_state.inner_state, state.ema, state.key


@pytest.mark.parametrize("value", [jnp.inf, jnp.nan])
def test_a_skipped_step_rolls_back_everything_but_step_scaler_and_counters_b13(value):
    state, step = training()
    for attempt in range(2 * LEAVES):
        skipped, metrics = step(state, poisoned(attempt, attempt % LEAVES, value))
        assert bits(kept(skipped)) == bits(kept(state))
        assert skipped.step == state.step + 1
        assert jaxmp.loss_scale(skipped.opt_state) == jaxmp.loss_scale(state.opt_state) / 2
        assert jaxmp.skipped_steps(skipped.opt_state) == jaxmp.skipped_steps(state.opt_state) + 1
        assert np.isfinite(compute(metrics)["loss"])
        applied, _ = step(skipped, poisoned(attempt))
        assert all(a != b for a, b in zip(bits(applied.params), bits(skipped.params), strict=True))
        assert all(a != b for a, b in zip(bits(applied.ema), bits(skipped.ema), strict=True))
        assert bits(applied.model_state) != bits(skipped.model_state)
        assert jaxmp.consecutive_skips(applied.opt_state) == 0
        state = applied
    assert step._cache_size() == 1
    assert state.step == 4 * LEAVES and jaxmp.skipped_steps(state.opt_state) == 2 * LEAVES


def test_a_loss_that_is_not_finite_skips_the_step_and_the_batch_statistics():
    state, step = training()
    bad = poisoned()
    after, _ = step(state, {**bad, "image": bad["image"].at[0, 0].set(jnp.inf)})
    assert bits(kept(after)) == bits(kept(state))
    assert jaxmp.skipped_steps(after.opt_state) == 1


def test_commit_keeps_subnormals_negative_zeros_and_leaves_without_a_gradient():
    params = {
        "w": jnp.array([-0.0, 1e-40, 1.0]),
        "n": jnp.arange(2),
        "k": jax.random.key(0),
        "h": jnp.ones(2, jnp.bfloat16),
    }
    tx = loss_scaling(optax.sgd(1.0))
    state = TrainState.create(params, tx, key=jax.random.key(0), ema=True)
    updates = {"w": jnp.full(3, jnp.nan), "n": jnp.zeros(2, int), "k": params["k"], "h": jnp.full(2, 2.0**-12)}
    commit = jax.jit(
        lambda state, finite, updates: state.commit(
            finite, updates=updates, model_state={}, opt_state=state.opt_state, ema_decay=0.9
        )
    )
    assert bits(dataclasses.replace(commit(state, False, updates), step=state.step)) == bits(state)
    after = commit(state, True, {**updates, "w": jnp.ones(3)})
    np.testing.assert_array_equal(after.params["w"], [1, 1, 2])
    assert bits((after.params["n"], after.params["k"])) == bits((params["n"], params["k"]))
    assert after.params["h"].dtype == jnp.bfloat16


def test_the_sum_of_parameter_and_update_is_rounded_once():
    state = TrainState.create({"h": jnp.full(1, 256.0, jnp.bfloat16)}, optax.sgd(1.0), key=jax.random.key(0))
    after = state.commit(jnp.bool_(True), updates={"h": jnp.full(1, 1.5)}, model_state={}, opt_state=())
    assert after.params["h"] == 258  # 257.5 to the nearest; an update rounded first would do the same, 1.5 is exact


@pytest.mark.slow
def test_the_moving_average_follows_its_formula():
    state, step = training()
    ema = jax.tree.map(lambda p: np.asarray(p, np.float64), state.params)
    state, _ = step(state, poisoned(9, leaf=0))  # a skipped step does not count
    for n in range(4):
        state, _ = step(state, poisoned(n))
        decay = min(0.99, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p, np.float64), ema, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, ema)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounding", "expected", "error"), [("nearest", 1, 0), ("kahan", 1.1, 2**-8), ("stochastic", 1.1, 0)]
)
def test_updates_reach_bfloat16_parameters_by_the_rounding_of_the_step(rounding, expected, error):
    """100 updates of 1e-3, each an eighth of a unit in the last place; one more is skipped, and changes no bit."""

    def loss(params, model_state, batch, key):
        return -jnp.sum(params["w"].astype(jnp.float32)) * batch, (jnp.float32(1), {}, model_state)

    tx = loss_scaling(optax.sgd(1.0))
    params = {"w": jnp.ones(4096, jnp.bfloat16)}
    state = TrainState.create(params, tx, key=jax.random.key(3), rounding=rounding)
    step = jax.jit(make_train_step(loss, tx, rounding=rounding))
    for _ in range(100):
        state, _ = step(state, 1e-3)
    w = np.asarray(state.params["w"], np.float64)
    assert state.params["w"].dtype == jnp.bfloat16
    assert np.abs(w.mean() - expected) <= error + 3 * w.std() / 64
    skipped, _ = step(state, jnp.inf)
    assert bits((skipped.params, skipped.compensation)) == bits((state.params, state.compensation))


def test_step_n_draws_from_fold_in_of_key_and_n():
    def loss(params, model_state, batch, key):
        return jnp.sum(params["w"] * jax.random.normal(key, (4,))), (jnp.float32(1), {}, model_state)

    tx = loss_scaling(optax.sgd(1.0))
    state = TrainState.create({"w": jnp.zeros(4)}, tx, key=jax.random.key(3))
    step, total = jax.jit(make_train_step(loss, tx)), np.zeros(4)
    for n in range(3):
        state, _ = step(state, {})
        total -= jax.random.normal(jax.random.fold_in(jax.random.key(3), n), (4,))
        np.testing.assert_allclose(state.params["w"], total, rtol=1e-6)
    assert state.step == 3 and state.step.dtype == jnp.int32
    assert bits(state.key) == bits(jax.random.key(3))


# --- gradients


def regression(params, model_state, batch, key):
    """Least squares whose rows have weights."""
    errors = batch["x"].astype(params["w"].dtype) @ params["w"] - batch["y"]
    weight = batch["weight"]
    return jnp.sum(weight * errors**2), (jnp.sum(weight), {"error": Mean.of(errors, weight)}, model_state)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(count, 4)), "y": rng.normal(size=count), "weight": np.ones(count)}


def test_a_padded_row_counts_for_nothing_in_gradient_loss_and_metrics():
    """In float64, but for the weight, which divides in float32: 1/5 is the same number with and without padding."""
    with jax.enable_x64(True):
        tx = loss_scaling(optax.sgd(1.0), StaticScaler(2.0**10))
        state = TrainState.create({"w": jnp.zeros(4, jnp.float64)}, tx, key=jax.random.key(0))
        step = jax.jit(make_train_step(regression, tx))
        plain = rows(5)
        padded = {name: np.concatenate([column, 100 * rows(3, 1)[name]]) for name, column in plain.items()}
        padded["weight"][5:] = 0
        (expected, metrics), (out, padded_metrics) = step(state, plain), step(state, padded)
        by_hand = 2 * plain["x"].T @ plain["y"] / 5
        np.testing.assert_allclose(out.params["w"], by_hand, rtol=1e-7)
        np.testing.assert_allclose(out.params["w"], expected.params["w"], rtol=1e-14)
        assert compute(metrics) == pytest.approx(compute(padded_metrics), rel=1e-7)
        assert compute(metrics)["loss"] == pytest.approx(np.mean(plain["y"] ** 2), rel=1e-6)


def test_a_batch_of_total_weight_zero_changes_nothing_harmful():
    state, step = training()
    empty = {**poisoned(), "weight": jnp.zeros(8)}
    after, metrics = step(state, empty)
    assert all(
        np.all(np.isfinite(np.asarray(x, np.float64))) for x in jax.tree.leaves((after.params, after.model_state))
    )
    assert jaxmp.skipped_steps(after.opt_state) == 0
    assert metrics["loss"].total == metrics["loss"].weight == 0
    no_scaling = optax.sgd(0.1)
    start = TrainState.create({"w": jnp.ones(4)}, no_scaling, key=jax.random.key(0))
    same, _ = make_train_step(regression, no_scaling)(start, {**rows(4), "weight": np.zeros(4)})
    np.testing.assert_array_equal(same.params["w"], start.params["w"])


@pytest.mark.slow
def test_on_the_growth_step_the_parameters_equal_an_unscaled_float32_control_b7():
    loss_fn = make_loss(Net(), Classification(), "float32")
    plain = optax.sgd(0.1, momentum=0.9)  # unlike Adam, not blind to a gradient that is twice too large
    start, _ = training()
    states, steps = [], []
    for tx in (loss_scaling(plain, DynamicScaler(growth_interval=1)), plain):
        states.append(TrainState.create(start.params, tx, key=start.key, model_state=start.model_state))
        steps.append(jax.jit(make_train_step(loss_fn, tx)))
    for i in range(3):
        states = [step(state, batch(seed=i))[0] for step, state in zip(steps, states, strict=True)]
        assert jaxmp.loss_scale(states[0].opt_state) == 2.0 ** (16 + i)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), states[0].params, states[1].params
        )


def test_leaves_without_a_gradient_go_through_the_step_untouched_b4():
    params = {"w": jnp.ones(4), "n": jnp.arange(3), "key": jax.random.key(7), "fp8": jnp.ones(2, jnp.float8_e4m3fn)}
    tx = loss_scaling(optax.adamw(0.1))
    state = TrainState.create(params, tx, key=jax.random.key(0), ema=True)
    step = jax.jit(make_train_step(regression, tx, ema_decay=0.9))
    for i in range(2):
        state, _ = step(state, rows(4, i))
    assert step._cache_size() == 1
    assert bits([state.params[name] for name in ("n", "key", "fp8")]) == bits(
        [params[name] for name in ("n", "key", "fp8")]
    )
    assert not np.any(state.params["w"] == 1)


def test_the_loss_is_formed_in_float32_and_scaled_there():
    def half_loss(params, model_state, batch, key):
        return jnp.float16(60000) * params["w"][0].astype(jnp.float16), (jnp.float16(1), {}, model_state)

    tx = loss_scaling(optax.sgd(1.0), StaticScaler(1.0))
    state = TrainState.create({"w": jnp.ones(1)}, tx, key=jax.random.key(0))
    after, metrics = make_train_step(half_loss, tx)(state, {})
    assert jaxmp.last_step_finite(after.opt_state)
    assert metrics["loss"].total.dtype == metrics["loss"].weight.dtype == jnp.float32


# --- what the program is


def test_the_step_has_no_callbacks_and_gives_back_what_it_takes():
    """No callback: nothing waits for the host. The same types out as in, weak types included: one compile (T7)."""
    state, step = training()
    jaxpr, (after, _) = jax.make_jaxpr(step, return_shape=True)(state, poisoned())
    assert not any(word in str(jaxpr) for word in ("callback", "infeed", "outfeed"))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(described, after) == jax.tree.map(described, jax.eval_shape(lambda: state))


def described(x):
    return x.shape, x.dtype, x.weak_type


def test_all_bytes_of_the_state_are_donated():
    state, step = training()
    compiled = jax.jit(step, donate_argnums=0).lower(state, poisoned()).compile()
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(state)
    ]
    assert compiled.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("jitted", [False, True])
def test_no_two_leaves_of_a_fresh_state_share_a_buffer(jitted):
    tx = loss_scaling(optax.chain(optax.ema(0.9), optax.adamw(schedule)))

    def create():
        params = {"w": jnp.zeros(3), "v": jnp.zeros(3), "k": jax.random.key(0)}
        return TrainState.create(params, tx, key=params["k"], model_state={"s": params["w"]}, ema=True)

    state = jax.jit(create)() if jitted else create()
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(state)
    ]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)
    jax.jit(lambda s: s, donate_argnums=0)(state)


def test_a_fresh_state_does_not_own_the_parameters_it_was_made_from():
    params = {"w": jnp.zeros(3)}
    state = TrainState.create(params, loss_scaling(optax.sgd(0.1)), key=jax.random.key(0))
    assert state.params["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()
    assert state.model_state == {} and state.ema is None


# --- refusals

OUTSIDE = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "after": lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
    "named_chain": lambda tx: optax.named_chain(("scaling", tx), ("decay", optax.add_decayed_weights(0.1))),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "inject": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(rate=0.1),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_changes_gradients_outside_of_loss_scaling_is_refused_b16(name):
    with pytest.raises(InputError, match=r"Put all of it inside: loss_scaling"):
        make_train_step(regression, OUTSIDE[name](loss_scaling(optax.sgd(0.1))))


def test_what_can_only_be_seen_with_parameters_is_refused_at_the_first_trace_b16():
    tx = optax.masked(loss_scaling(optax.sgd(0.1)), {"w": True})
    step = make_train_step(regression, tx)
    state = TrainState.create({"w": jnp.ones(4)}, tx, key=jax.random.key(0))
    with pytest.raises(InputError, match="MaskedState"):
        step(state, rows(4))


def test_an_optimizer_without_loss_scaling_is_applied_as_it_is():
    tx = optax.sgd(1.0)
    state = TrainState.create({"w": jnp.zeros(4)}, tx, key=jax.random.key(0))
    plain = rows(5)
    after, _ = make_train_step(regression, tx)(state, plain)
    np.testing.assert_allclose(after.params["w"], 2 * plain["x"].T @ plain["y"] / 5, rtol=1e-5)


def test_an_evaluation_reads_the_state_and_counts_exactly():
    state, _ = training()
    step = jax.jit(make_eval_step(make_loss(Net(), Classification(), "mixed_bfloat16", train=False)))
    padded = {**batch(), "weight": jnp.array([1.0] * 5 + [0.0] * 3)}
    metrics = step(state.params, state.model_state, padded)
    part = step(state.params, state.model_state, {name: column[:5] for name, column in batch().items()})
    assert metrics["accuracy"].weight == metrics["loss"].weight == 5
    assert metrics["accuracy"].total == part["accuracy"].total
    assert compute(metrics)["loss"] == pytest.approx(compute(part)["loss"], rel=1e-6)


def plain_loss(params, model_state, batch, key):
    return jnp.sum(params["w"] * batch["x"]), (jnp.float32(batch["x"].size), {}, model_state)


def test_a_python_number_among_the_parameters_compiles_once_t7():
    tx = loss_scaling(optax.sgd(0.1))
    state = TrainState.create({"w": jnp.asarray(1.0)}, tx, key=jax.random.key(0), model_state={"n": jnp.asarray(1.0)})
    step = jax.jit(make_train_step(plain_loss, tx))
    for _ in range(3):
        state, _ = step(state, {"x": jnp.ones(4)})
    assert step._cache_size() == 1


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_fp8_leaves_are_set_aside_and_a_batch_needs_no_weight(accumulate_steps):
    tx = loss_scaling(optax.sgd(1.0))
    params = {"w": jnp.zeros(()), "q": jnp.ones(3, jnp.float8_e4m3fn)}
    state = TrainState.create(params, tx, key=jax.random.key(0))
    step = jax.jit(make_train_step(plain_loss, tx, accumulate_steps=accumulate_steps))
    state, _ = step(state, {"x": jnp.ones(4)})
    assert state.params["w"] == -1 and state.params["q"].dtype == jnp.float8_e4m3fn
    assert state.params["q"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_steps": 0}, "accumulate_steps=0: expected a whole number of at least 1"),
        (
            {"accumulate_steps": 3},
            "accumulate_steps=3: a batch of 4 rows has no so many equal microbatches",
        ),
        ({"accumulate_overflow": "typo"}, "accumulate_overflow='typo': expected window or microbatch"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(options, words):
    tx = loss_scaling(optax.sgd(1.0))
    state = TrainState.create({"w": jnp.zeros(())}, tx, key=jax.random.key(0))
    with pytest.raises(InputError, match=words):
        make_train_step(plain_loss, tx, **options)(state, {"x": jnp.ones(4)})


@pytest.mark.parametrize("scale", [1.0, 2.0**20])
def test_norms_are_those_of_the_unscaled_gradients_before_clipping_and_of_the_update(scale):
    def loss_fn(params, model_state, batch, key):
        return jnp.sum(params["w"] * batch["x"]) + 3e20 * params["b"], (jnp.float32(1), {}, model_state)

    params = {"w": jnp.zeros(3), "b": jnp.float32(0)}
    tx = loss_scaling(optax.chain(jaxmp.clip_by_global_norm(5.0), optax.sgd(0.5)), StaticScaler(scale))
    step = make_train_step(loss_fn, tx, norms=("gradient_norm", "update_norm"))
    state = TrainState.create(params, tx, key=jax.random.key(0))
    x = jnp.array([1e20, 2e20, 2e20])
    _, metrics = step(state, {"x": x, "weight": jnp.ones(1)})
    expected = np.linalg.norm(np.array([1e20, 2e20, 2e20, 3e20]))  # its square is no float32
    assert float(metrics["gradient_norm"].compute()) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["update_norm"].compute()) == pytest.approx(2.5, rel=1e-5)


def test_a_step_without_norms_is_the_program_that_it_was():
    def program(**how):
        tx = loss_scaling(optax.sgd(0.1), StaticScaler(8.0))
        step = make_train_step(lambda p, s, b, k: (jnp.sum(p * b["x"]), (jnp.float32(1), {}, s)), tx, **how)
        state = TrainState.create(jnp.ones(3), tx, key=jax.random.key(0))
        return str(jax.make_jaxpr(step)(state, {"x": jnp.ones(3), "weight": jnp.ones(1)}))

    assert program() == program(norms=())
    assert "sqrt" not in program() and "sqrt" in program(norms=("update_norm",))
