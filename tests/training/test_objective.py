from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp import DynamicScaler, Mean, Objective, TrainState, loss_scaling, make_train_step
from jaxmp.errors import InputError
from jaxmp.training.gradients import make_gradients
from jaxmp.training.metrics import compute
from jaxmp.training.objective import due_at, fill, trained_view
from jaxmp.training.optimizers import AdamW


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [np.asarray(x).tobytes() for x in leaves]


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "body": {"kernel": (4, 4), "bias": (4,)},
        "head": {"kernel": (4, 2), "bias": (2,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def batch(seed=0, **overflow):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(8, 4)), jnp.float32)
    factors = {name: jnp.float32(overflow.get(name, 1)) for name in ("body", "head")}
    return {"x": x, "weight": jnp.ones(8), **factors}


@jax.custom_vjp
def poison(x, factor):
    return x


poison.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


def loss_of(statistic="count", factor=None):
    """A loss of both layers, whose gradient of layer L, and of that alone, is multiplied by `batch[L]`."""

    def loss(params, model_state, batch, key):
        body, head = (
            jax.tree.map(lambda leaf, name=name: poison(leaf, batch[factor or name]), params[name])
            for name in ("body", "head")
        )
        noise = 0.1 * jax.random.normal(key, (4,))
        hidden = jnp.tanh(batch["x"] @ body["kernel"] + body["bias"] + noise)
        out = (hidden @ head["kernel"] + head["bias"]).astype(jnp.float32)
        rows = jnp.sum(out**2, axis=1)
        model_state = {**model_state, statistic: model_state[statistic] + 1} if model_state else model_state
        return jnp.sum(rows), (jnp.sum(batch["weight"]), {"size": Mean.of(rows, batch["weight"])}, model_state)

    return loss


def one(tx=None, **how):
    tx = optax.adam(0.1) if tx is None else tx
    return Objective(loss_of(), loss_scaling(tx, DynamicScaler(growth_interval=2)), **how)


def started(objective, dtype=jnp.float32, **how):
    return TrainState.create(params(dtype), objective, key=jax.random.key(1), **how)


# One objective: frozen parts.

KERNELS = {"body": {"kernel": True, "bias": False}, "head": {"kernel": True, "bias": False}}
LABELS = {"body": {"kernel": "a", "bias": "b"}, "head": {"kernel": "a", "bias": "b"}}


def kernels(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", tree)


TRANSFORMATIONS = {
    "sgd": lambda: optax.sgd(0.1, 0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "adamw_mask_tree": lambda: optax.adamw(0.1, mask=KERNELS),
    "adamw_mask_callable": lambda: optax.adamw(0.1, mask=kernels),
    "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1, mask=KERNELS), optax.sgd(0.1)),
    "masked": lambda: optax.chain(optax.masked(optax.scale_by_adam(), KERNELS), optax.sgd(0.1)),
    "masked_callable": lambda: optax.chain(optax.masked(optax.scale_by_adam(), kernels), optax.sgd(0.1)),
    "multi_transform": lambda: optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, LABELS),
    "partition": lambda: optax.partition({"a": optax.adamw(0.1), "b": optax.sgd(0.1, 0.9)}, LABELS),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "lamb": lambda: optax.lamb(0.1, mask=KERNELS),
    "lion": lambda: optax.lion(0.1, mask=kernels),
    "adafactor": lambda: optax.adafactor(0.1),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "named_chain": lambda: optax.named_chain(("trust", optax.scale_by_trust_ratio()), ("sgd", optax.sgd(0.1))),
    "of_jaxmp": lambda: AdamW(0.1, clip_norm=1.0).make(10),
}
QUICK = ("adamw_mask_tree", "multi_transform", "of_jaxmp")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMATIONS]
)
def test_what_is_not_trained_stays_to_the_bit_under_masks_and_labels_of_the_whole_tree_t26(name):
    objective = one(TRANSFORMATIONS[name](), trains=("head",))
    first = state = started(objective)
    step = jax.jit(make_train_step(objective))
    for seed in range(2):
        state, metrics = step(state, batch(seed, body=jnp.inf))  # of the untrained layer, every gradient would be inf
    assert not jaxmp.skipped_steps(state.opt_state)
    assert bits(state.params["body"]) == bits(first.params["body"])
    assert all(a != b for a, b in zip(bits(state.params["head"]), bits(first.params["head"]), strict=True))
    assert np.isfinite(compute(metrics)["loss"])
    assert step._cache_size() == 1
    assert all(leaf.shape not in ((4, 4), (4,)) for leaf in jax.tree.leaves(state.opt_state))


def test_the_gradient_of_what_is_not_trained_is_none_and_of_the_rest_that_of_the_whole():
    arguments = params(), {}, jnp.float32(8), batch(), jax.random.key(0)
    whole, *_ = jax.jit(make_gradients(loss_of()))(*arguments)
    for parts in (1, 2):
        inputs = {name: x for name, x in arguments[3].items() if x.shape}

        def loss(params, model_state, batch, key):
            return loss_of()(params, model_state, {**batch, "body": 1.0, "head": 1.0}, key)

        gradients = jax.jit(make_gradients(loss, trains=("**/bias",), accumulate_steps=parts))
        grads, *_ = gradients(*arguments[:3], inputs, arguments[4])
        assert grads["body"]["kernel"] is None and grads["head"]["kernel"] is None
        for layer in grads:
            np.testing.assert_allclose(grads[layer]["bias"], whole[layer]["bias"], rtol=1e-5)


@pytest.mark.slow
def test_kahan_and_average_are_of_what_is_trained_and_stochastic_rounding_counts_all_leaves():
    objective = one(optax.sgd(2.0**-9), trains=("head",), ema_decay=0.5)
    state = started(objective, jnp.bfloat16, rounding="kahan")
    assert state.compensation["body"] == {"kernel": None, "bias": None} == state.ema["body"]
    after, _ = jax.jit(make_train_step(objective, rounding="kahan"))(state, batch())
    assert bits(after.params["body"]) == bits(state.params["body"])
    assert bits(after.compensation) != bits(state.compensation) and bits(after.ema) != bits(state.ema)
    assert bits(after.averaged_params["body"]) == bits(state.params["body"])
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-10), params())
    whole = jaxmp.apply_updates(state.params, updates, "stochastic", key=jax.random.key(3))
    part = jaxmp.apply_updates(state.params, trained_view(updates, ("head",)), "stochastic", key=jax.random.key(3))
    assert bits(part["head"]) == bits(whole["head"]) and bits(part["body"]) == bits(state.params["body"])


def test_decay_patterns_are_checked_against_all_parameters_and_applied_to_the_trained():
    objective = one(AdamW(0.1, decay=("body/kernel",)).make(10), trains=("head",))
    started(objective)
    with pytest.raises(InputError, match=r"'body/kernal'.*did you mean 'body/kernel'"):
        started(one(AdamW(0.1, decay=("body/kernal",)).make(10), trains=("head",)))


def test_an_objective_refuses_patterns_that_match_nothing_and_values_out_of_range():
    with pytest.raises(InputError, match=r"'haed/\*\*' matches no parameter; .*head/kernel"):
        started(one(trains=("haed/**",)))
    for how in (
        {"trains": "head"},
        {"trains": ()},
        {"trains": ("@Dense",)},
        {"trains": ("a b",)},
        {"every": 0},
        {"every": True},
        {"ema_decay": 1.0},
    ):
        with pytest.raises(InputError, match=next(iter(how))):
            one(**how)
    assert one(ema_decay=np.float32(0.9)).ema_decay == np.float32(0.9)  # of `Trainer.numbers`
    with pytest.raises(InputError, match="ema_decay"):
        one(ema_decay=np.float32(1.5))


def test_a_single_objective_is_the_step_of_its_loss_and_optimizer():
    objective = one(ema_decay=0.9)
    state = TrainState.create(params(), objective.tx, key=jax.random.key(1), ema=True)
    assert bits(state) == bits(started(objective))
    steps = make_train_step(objective), make_train_step(objective.loss_fn, objective.tx, ema_decay=0.9)
    programs = [str(jax.make_jaxpr(step)(state, batch())) for step in steps]
    assert programs[0] == programs[1]
    for how in ({"order": "at_once"}, {"due": ("a",)}, {"ema_decay": 0.9}):
        with pytest.raises(InputError):
            make_train_step(objective, **how)


# Several objectives.


def two(every=1, body=("body",), head=("head",)):
    """Objectives a, of the body, and b, of the head; each counts its applied steps in the model state."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    return {
        "a": Objective(loss_of("a", "body"), loss_scaling(tx, DynamicScaler()), trains=body, ema_decay=0.9),
        "b": Objective(loss_of("b", "head"), loss_scaling(tx, DynamicScaler()), trains=head, every=every),
    }


def start_of_two(objectives):
    return started(objectives, model_state={"a": jnp.int32(0), "b": jnp.int32(0)})


@functools.cache
def program(order="in_turn", every=1, due=None):
    objectives = two(every)
    return start_of_two(objectives), jax.jit(make_train_step(objectives, order=order, due=due))


def own(state, name):
    """All that objective `name` changes when it is applied."""
    layer = {"a": "body", "b": "head"}[name]
    return state.params[layer], state.ema[layer], state.opt_state[name].inner_state, state.model_state[name]


@pytest.mark.slow
def test_in_turn_is_one_step_of_each_on_what_the_one_before_left():
    (state, step), objectives = program(), two()
    after, metrics = step(state, batch())
    key, between = jax.random.fold_in(state.key, state.step), state.params
    for name, of in objectives.items():
        key_of_name = jax.random.fold_in(key, zlib.crc32(name.encode()))
        gradients = jax.jit(make_gradients(of.loss_fn, trains=of.trains))
        scaling = state.opt_state[name]
        grads, measured, _ = gradients(between, state.model_state, scaling.scaler.scale, batch(), key_of_name)
        trained = trained_view(between, of.trains)
        updates, _ = of.tx.update(grads, scaling, trained, value=measured.loss)
        between = fill(jaxmp.apply_updates(trained, updates), between)
        np.testing.assert_allclose(compute(metrics)[f"{name}/loss"], measured.loss, rtol=1e-6)
    for new, expected in zip(jax.tree.leaves(after.params), jax.tree.leaves(between), strict=True):
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
    assert after.step == 1 and after.model_state == {"a": 1, "b": 1}
    assert set(metrics) == {"a/loss", "a/size", "b/loss", "b/size", "nan_loss/a", "nan_loss/b"}


@pytest.mark.parametrize("order", ["in_turn", "at_once"])
def test_an_overflow_in_one_objective_leaves_the_other_s_step_as_it_was(order):
    state, step = program(order)
    whole, _ = step(state, batch())
    later, metrics = step(state, batch(head=jnp.inf))
    assert bits(own(later, "a")) == bits(own(whole, "a")), "the earlier one's step, to the bit"
    assert bits(own(later, "b")) == bits(own(state, "b"))
    assert metrics["b/loss"].weight == 0 and metrics["a/loss"].weight == 8
    earlier, _ = step(state, batch(body=jnp.nan))
    assert bits(own(earlier, "a")) == bits(own(state, "a"))
    assert bits(own(earlier, "b")[0]) != bits(own(state, "b")[0]) and earlier.model_state["b"] == 1
    assert (bits(own(earlier, "b")) == bits(own(whole, "b"))) == (order == "at_once")
    assert jaxmp.loss_scale(earlier.opt_state["a"]) == jaxmp.loss_scale(state.opt_state["a"]) / 2
    assert step._cache_size() == 1


def test_readers_of_several_objectives_speak_of_the_last_attempt_of_each():
    state, step = program()
    for _ in range(3):
        state, _ = step(state, batch(head=jnp.inf))
    state, _ = step(state, batch(body=jnp.inf))
    opt_state = state.opt_state
    assert not jaxmp.last_step_finite(opt_state) and jaxmp.last_step_finite(opt_state["b"])
    assert jaxmp.skipped_steps(opt_state) == 4 and jaxmp.consecutive_skips(opt_state) == 1
    for read in (jaxmp.loss_scale, functools.partial(jaxmp.scale_loss, 1.0)):
        with pytest.raises(ValueError, match=r"'a', 'b'.*opt_state\[name\]"):
            read(opt_state)


@pytest.mark.slow
def test_every_second_step_chosen_by_a_conditional_or_by_a_program_for_each_set_gives_the_same_bits():
    state, step = program(every=2)
    objectives, other, skipped = two(2), state, 0
    for n in range(4):
        before, due = state, due_at(objectives, n)
        inputs = batch(n, head=jnp.inf if n == 2 else 1)
        state, metrics = step(state, inputs)
        other, chosen = program("in_turn", 2, due)[1](other, inputs)
        assert bits((state, metrics)) == bits((other, chosen))
        assert due == (("a", "b") if n % 2 == 0 else ("a",))
        if n in (1, 2, 3):
            assert bits(own(state, "b")) == bits(own(before, "b"))
            skipped += n == 2
        assert jaxmp.consecutive_skips(state.opt_state) == skipped, "that of b's last attempt stands at step 3"
    assert step._cache_size() == 1
    assert all(program("in_turn", 2, due)[1]._cache_size() == 1 for due in (("a",), ("a", "b")))


@pytest.mark.slow
def test_all_of_the_state_of_several_objectives_is_donated():
    objectives = two(2)
    state = start_of_two(objectives)
    step = jax.jit(make_train_step(objectives), donate_argnums=0)
    after, _ = step(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.slow
def test_two_objectives_may_train_one_leaf_each_with_its_own_moments():
    objectives = two(body=("**",))
    state = start_of_two(objectives)
    after, _ = jax.jit(make_train_step(objectives, order="at_once"))(state, batch())
    alone, _ = jax.jit(make_train_step(objectives, order="at_once", due=("a",)))(state, batch())
    assert bits(after.opt_state["a"]) == bits(alone.opt_state["a"])
    assert bits(after.params["body"]) == bits(alone.params["body"])
    assert bits(after.params["head"]) != bits(alone.params["head"])


def test_several_objectives_are_checked_before_the_first_step():
    good = two()
    for objectives, how, expected in (
        ({}, {}, "at least one"),
        ({"a/b": good["a"]}, {}, "'a/b'"),
        ({"a": loss_of()}, {}, "expected an Objective"),
        (good, {"order": "in_trun"}, "did you mean 'in_turn'"),
        (good, {"due": ("c",)}, "no objective 'c'"),
    ):
        with pytest.raises(InputError, match=expected):
            make_train_step(objectives, **how)


def test_each_of_several_objectives_needs_a_loss_scaling_of_its_own():
    """Otherwise the readers of skipped steps would overlook it, and speak of the others alone."""
    bare = Objective(loss_of("b"), optax.sgd(0.1))
    for tx in (optax.sgd(0.1), optax.chain(optax.clip(1.0), two()["b"].tx)):
        objectives = {**two(), "b": Objective(loss_of("b"), tx)}
        with pytest.raises(InputError, match="objective 'b': expected a tx made by loss_scaling"):
            start_of_two(objectives)
    assert jaxmp.last_step_finite(started(bare).opt_state), "one alone may go without"
