"""Pruned weights are zero, exactly, and stay so; which they are is checked against NumPy's float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp import InputError, Objective, Pruning, TrainState, loss_scaling, magnitude_pruning, make_train_step
from jaxmp.training.pruning import masks_of, pruning_state
from jaxmp.trees import by_path

STEPS = 12
KERNELS = ("body/kernel", "conv/kernel", "head/kernel")


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {
        "body": {"kernel": (8, 6), "bias": (6,)},
        "conv": {"kernel": (3, 3, 4, 2)},
        "head": {"kernel": (12, 3), "bias": (3,)},
    }
    # Few values, so that many magnitudes are equal.
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.integers(-9, 9, shape) / 8, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def expected(weights, pruning, share):
    """The masks by NumPy in float64: of equal magnitudes, those before come first."""
    flat = {name: np.abs(np.asarray(weights[name], np.float64)) for name in KERNELS}
    if pruning.structure == "2:4":
        for name, magnitude in flat.items():
            last = np.moveaxis(magnitude, -2, -1)
            groups = last.reshape(*last.shape[:-1], -1, 4)
            order = np.argsort(groups, axis=-1, kind="stable")
            np.put_along_axis(groups, order[..., 2:], np.inf, axis=-1)
            flat[name] = np.moveaxis(groups.reshape(last.shape), -1, -2)
    groups = [KERNELS] if pruning.scope == "global" else [(name,) for name in KERNELS]
    found = {}
    for names in groups:
        joined = np.concatenate([flat[name].ravel() for name in names])
        kept = np.ones(joined.size, bool)
        kept[np.argsort(joined, kind="stable")[: int(np.floor(share * joined.size + 0.5))]] = False
        for name in names:
            found[name], kept = kept[: flat[name].size].reshape(flat[name].shape), kept[flat[name].size :]
    return found


PRUNINGS = {
    "layer": Pruning(0.9, end=0.0),
    "global": Pruning(0.6, end=0.0, scope="global"),
    "2:4": Pruning(structure="2:4", end=0.0),
    "2:4 global": Pruning(structure="2:4", scope="global", end=0.0),
}


@pytest.mark.few_variants
@pytest.mark.parametrize("name", PRUNINGS)
def test_the_smallest_magnitudes_are_pruned_and_as_many_as_the_sparsity_says(name):
    pruning, weights = PRUNINGS[name], params()
    tx = magnitude_pruning(optax.sgd(0.1), pruning, steps=STEPS)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, weights), tx.init(weights), weights)
    masks, after = by_path(state.masks), by_path(optax.apply_updates(weights, updates))
    right = expected(by_path(weights), pruning, pruning.share)
    for kernel in KERNELS:
        assert np.array_equal(masks[kernel], right[kernel]), kernel
        assert np.array_equal(after[kernel], np.where(right[kernel], by_path(weights)[kernel] - np.float32(0.1), 0))
        if pruning.structure == "2:4":
            groups = np.moveaxis(np.asarray(masks[kernel]), -2, -1).reshape(-1, 4)
            assert np.all(groups.sum(axis=1) == 2)
        if pruning.scope == "layer":
            assert np.sum(~masks[kernel]) == round(pruning.share * masks[kernel].size)
    assert set(masks) == set(KERNELS)


@pytest.mark.slow
def test_the_sparsity_grows_by_the_cubic_schedule_and_no_weight_comes_back():
    pruning, weights = Pruning(0.8, begin=0.2, end=0.8, rounds=3), params()
    schedule = pruning.schedule(30)
    assert schedule == [
        (12, pytest.approx(0.8 * (1 - (2 / 3) ** 3))),
        (18, pytest.approx(0.8 * (1 - (1 / 3) ** 3))),
        (24, 0.8),
    ]
    tx = magnitude_pruning(optax.chain(optax.trace(0.0), optax.adam(0.3)), pruning, steps=30)
    state, update, before = tx.init(weights), jax.jit(tx.update), None
    for step in range(30):
        grads = jax.tree.map(lambda x, step=step: jnp.cos(7.0 * x + step), weights)
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        share = next((of for at, of in reversed(schedule) if at <= step), 0.0)
        masks = {name: np.asarray(mask) for name, mask in by_path(state.masks).items()}
        for kernel in KERNELS:
            assert np.sum(~masks[kernel]) == int(np.floor(share * masks[kernel].size + 0.5))
            assert np.array_equal(np.asarray(by_path(weights)[kernel]) == 0, ~masks[kernel])
            assert before is None or not np.any(masks[kernel] & ~before[kernel])
            # Clipping and moments do not see what is pruned.
            assert not np.any(by_path(state.inner_state[0].trace)[kernel][~masks[kernel]])
        before = masks
        assert float(state.sparsity) == np.float32(share)


@pytest.mark.slow
def test_of_weights_that_became_zero_those_that_were_pruned_stay_pruned():
    pruning, weights = Pruning(0.5, end=0.5, rounds=2), {"kernel": jnp.arange(10.0, 0, -1).reshape(5, 2)}
    tx = magnitude_pruning(optax.sgd(1.0), pruning, steps=8)
    state = tx.init(weights)
    for _ in range(5):
        updates, state = tx.update({"kernel": jnp.zeros((5, 2))}, state, weights)
        weights = optax.apply_updates(weights, updates)
        pruned = ~np.asarray(state.masks["kernel"]).ravel()
        if pruned.sum() == 4:
            assert np.array_equal(np.flatnonzero(pruned), [6, 7, 8, 9])
            weights = {"kernel": jnp.zeros((5, 2))}
    assert np.array_equal(np.flatnonzero(pruned), [0, 6, 7, 8, 9])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["in_turn", "at_once"])
def test_what_one_of_several_objectives_pruned_no_other_that_trains_it_brings_back(order):
    def loss(params, model_state, batch, key):
        outs = [jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(params)]
        return sum(outs), (jnp.float32(1), {}, model_state)

    pruning = Pruning(0.7, begin=0.0, end=0.0)
    sparse = loss_scaling(magnitude_pruning(optax.adam(0.05), pruning, steps=STEPS))
    objectives = {
        "sparse": Objective(loss, sparse, trains=("body", "head"), ema_decay=0.9),
        "dense": Objective(loss, loss_scaling(optax.adam(0.05)), trains=("body", "conv"), ema_decay=0.9),
    }
    state = TrainState.create(params(), objectives, key=jax.random.key(0))
    step = jax.jit(make_train_step(objectives, order=order))
    for _ in range(3):
        before = state
        state, _ = step(state, {"weight": jnp.ones(1)})
        masks = by_path(masks_of(state.opt_state["sparse"]))
        for kernel in ("body/kernel", "head/kernel"):
            for tree in (state.params, state.ema):
                assert not np.any(np.asarray(by_path(tree)[kernel])[~np.asarray(masks[kernel])])
        assert np.all(np.asarray(state.params["conv"]["kernel"] != before.params["conv"]["kernel"]))
    assert not np.all(np.asarray(masks["body/kernel"]))


KINDS = {
    "scaled, skipping": (jnp.float32, "nearest", (0, 3, 4, 7)),
    "bf16, Kahan": (jnp.bfloat16, "kahan", (3,)),
    "bf16, stochastic": (jnp.bfloat16, "stochastic", (3,)),
    "fp16, Kahan": (jnp.float16, "kahan", (0, 5)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.full_size if "fp16" in kind else ()) for kind in KINDS]
)
def test_pruned_weights_are_zero_after_every_step_and_so_are_their_average_and_compensation(kind):
    dtype, rounding, skipped = KINDS[kind]

    def loss(params, model_state, batch, key):
        outs = [jnp.sum(jnp.sin(3 * leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params)]
        return batch["factor"] * sum(outs), (jnp.float32(1), {}, model_state)

    pruning = Pruning(0.7, begin=0.0, end=0.0 if dtype == jnp.float16 else 0.5, rounds=3)
    tx = loss_scaling(magnitude_pruning(optax.adam(0.05), pruning, steps=STEPS))
    state = TrainState.create(params(dtype), tx, key=jax.random.key(0), ema=True, rounding=rounding)
    if dtype == jnp.float16:  # less than half of its smallest number, so that the update that prunes loses it
        lost = jax.tree.map(lambda x: jnp.full_like(x, 2e-8), state.compensation)
        state = dataclasses.replace(state, compensation=lost)
    step = jax.jit(make_train_step(Objective(loss, tx, ema_decay=0.9), rounding=rounding))
    for number in range(STEPS):
        before = state
        factor = jnp.float32(jnp.inf if number in skipped else 1)
        state, _ = step(state, {"factor": factor})
        masks = by_path(masks_of(state.opt_state))
        for tree in (state.params, state.ema, *([state.compensation] if rounding == "kahan" else [])):
            for kernel in KERNELS:
                pruned = by_path(tree)[kernel][~np.asarray(masks[kernel])]
                assert np.all(np.asarray(pruned, np.float32) == 0), (number, kernel)
        if number in skipped:
            for was, now in zip(
                jax.tree.leaves((before.params, before.ema, before.compensation, masks_of(before.opt_state))),
                jax.tree.leaves((state.params, state.ema, state.compensation, masks_of(state.opt_state))),
                strict=True,
            ):
                assert np.asarray(was).tobytes() == np.asarray(now).tobytes()
    found = pruning_state(state.opt_state)
    assert int(found.step) == STEPS - len(skipped) and float(found.sparsity) == np.float32(0.7)
    assert sum(int(np.sum(~np.asarray(mask))) for mask in masks.values()) > 100
    assert int(jaxmp.skipped_steps(state.opt_state)) == len(skipped)


@pytest.mark.slow
def test_masks_of_several_prunings_side_by_side_are_joined():
    def loss(params, model_state, batch, key):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params)), (jnp.float32(1), {}, model_state)

    parts = {name: magnitude_pruning(optax.sgd(0.1), Pruning(of, end=0.0), steps=2) for name, of in SHARES.items()}
    tx = loss_scaling(optax.multi_transform(parts, {name: name for name in SHARES}))
    state = TrainState.create(params(), tx, key=jax.random.key(0), ema=True)
    state, _ = make_train_step(Objective(loss, tx, ema_decay=0.9))(state, {})
    for tree in (state.params, state.ema):
        zeros = {name: np.mean(np.asarray(by_path(tree)[f"{name}/kernel"]) == 0) for name in SHARES}
        assert zeros == pytest.approx(SHARES)


SHARES = {"body": 0.25, "conv": 0.5, "head": 0.75}


def test_what_is_not_pruned_is_said_with_the_reason_and_what_cannot_be_is_refused():
    classes = {"body": {"Dense"}, "conv": {"Conv"}, "head": {"DenseGeneral"}}
    for pruning, message in (
        (
            Pruning(0.5, where=("body/kernal",)),
            "where: the pattern 'body/kernal' matches no parameter; .*did you mean 'body/kernel'",
        ),
        (Pruning(0.5, keep=("@Norm",)), "pruning.keep: the pattern '@Norm' matches no parameter; there are @Conv"),
        (Pruning(0.5, where=("**/bias",)), r"no parameter is pruned: body/bias \(1 axis\)"),
        (Pruning(0.5, keep=("**",)), "no parameter is pruned"),
        (Pruning(structure="2:4", where=("body",)), None),
        (Pruning(structure="2:4", where=("odd",)), "odd/kernel of shape .6, 4. sums over 6 inputs, .*pruning.keep odd"),
        (Pruning(structure="2:4", where=("three",)), "three/kernel of shape .4, 4, 4. is of a DenseGeneral"),
        (Pruning(0.5, where=("@Conv", "head"), keep=("head",)), None),
    ):
        odd = {"odd": {"kernel": jnp.ones((6, 4))}, "three": {"kernel": jnp.ones((4, 4, 4))}}
        tx = magnitude_pruning(optax.sgd(1.0), pruning, steps=1, classes=classes | {"three": {"DenseGeneral"}})
        if message is None:
            (name,) = by_path(tx.init(params() | odd).masks)
            assert name == ("body/kernel" if pruning.structure == "2:4" else "conv/kernel")
            continue
        with pytest.raises(InputError, match=message):
            tx.init(params() | odd)
    for values, message in (
        ({"sparsity": 1.0}, "Pruning.sparsity = 1.0: expected a share, 0 or more and below 1"),
        ({"sparsity": "a"}, "Pruning.sparsity = 'a': expected a number"),
        ({"sparsity": 0.9, "structure": "2:4"}, "0.5, since structure 2:4 prunes two"),
        ({"structure": "2:8"}, "did you mean '2:4'"),
        ({"begin": 0.6}, "Pruning.end = 0.5: expected a share of the steps, begin .0.6. to 1"),
        ({"rounds": 0}, "Pruning.rounds = 0"),
        ({"where": ()}, "at least one pattern"),
        ({"keep": "a"}, "expected a tuple"),
        ({"keep": ("a//b",)}, "is no pattern"),
    ):
        with pytest.raises(InputError, match=message):
            Pruning(**values)


def test_half_of_the_weights_in_2_4_are_one_experiment_however_they_are_written():
    short, long = (Pruning(structure="2:4"), Pruning(0.5, structure="2:4"))
    assert short == long and short.share == long.share == 0.5
    assert Pruning(0.5).sparsity == 0.5 and Pruning(0.5) != long
