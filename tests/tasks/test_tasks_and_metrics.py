from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmp.commands.dry_run import dry_run
from jaxmp.data.arrays import Arrays
from jaxmp.data.source import Columns
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.models.mlp import MLP
from jaxmp.modules.model import mode_argument
from jaxmp.runs.fit import fit, steps
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.training.metrics import Mean, compute, merge, zeros_like

# --- metrics

values = st.lists(st.tuples(st.integers(-100, 100), st.integers(0, 3)), min_size=1, max_size=20)


@given(values, values)
def test_merged_means_are_the_mean_of_all(first, second):
    def mean(rows):  # padded to one shape, so that one compilation serves all examples
        numbers, weights = np.array(rows + [(7, 0)] * (20 - len(rows)), np.float32).T
        return {"x": Mean.of(jnp.asarray(numbers), jnp.asarray(weights))}

    rows = first + second
    merged = compute(merge(mean(first), mean(second)))["x"]
    weight = sum(w for _, w in rows)
    if weight:
        assert merged == pytest.approx(sum(v * w for v, w in rows) / weight, abs=1e-9)
    else:
        assert math.isnan(merged)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_of_weight_zero_counts_for_nothing_be_it_nan(bad):
    mean = Mean.of(jnp.array([1.0, bad, 3.0]), jnp.array([1.0, 0.0, 1.0]))
    assert mean.compute() == 2
    assert compute({"x": mean}) == {"x": 2.0}


def test_means_add_up_in_float32_t5():
    mean = Mean.of(jnp.full(4, 60000, jnp.float16), jnp.ones(4, jnp.float16))
    assert mean.total.dtype == mean.weight.dtype == jnp.float32
    assert mean.compute() == 60000
    assert Mean.of(jnp.array([True, False]), jnp.ones(2)).compute() == 0.5


def test_nothing_counted_is_nan_and_zeros_merge_to_nothing():
    metrics = {"x": Mean.of(jnp.arange(3.0), jnp.ones(3))}
    for like in (metrics, jax.eval_shape(lambda: metrics)):
        none = zeros_like(like)
        assert math.isnan(compute(none)["x"])
        assert compute(merge(none, metrics)) == compute(metrics)


def test_compute_divides_in_float64():
    assert compute({"x": Mean(jnp.float32(1), jnp.float32(3))}) == {"x": 1 / 3}


# --- classification


def example(dtype=jnp.float32, rows=6, classes=4):
    rng = np.random.default_rng(0)
    batch = {"label": jnp.asarray(rng.integers(0, classes, rows)), "weight": jnp.array([1.0, 1, 0, 2, 1, 0])}
    return jnp.asarray(rng.normal(size=(rows, classes)), dtype), batch


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_that_of_optax_with_smoothed_labels(smoothing):
    logits, batch = example()
    loss, metrics = Classification(label_smoothing=smoothing)(logits, batch)
    targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], 4), smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    np.testing.assert_allclose(loss.total, jnp.sum(losses * batch["weight"]), rtol=1e-6)
    assert loss.weight == 5
    right = (jnp.argmax(logits, -1) == batch["label"]) * batch["weight"]
    assert metrics["accuracy"].total == jnp.sum(right) and metrics["accuracy"].weight == 5


@pytest.mark.slow
def test_the_loss_of_half_logits_is_in_float32_t4():
    logits = jnp.zeros((1, 70_000), jnp.float16)
    loss, _ = Classification()(logits, {"label": jnp.zeros(1, int), "weight": jnp.ones(1)})
    assert loss.total.dtype == jnp.float32
    np.testing.assert_allclose(loss.total, math.log(70_000), rtol=1e-6)
    logits, batch = example(jnp.bfloat16)
    half, _ = Classification()(logits, batch)
    wide, _ = Classification()(logits.astype(jnp.float32), batch)
    assert half.total == wide.total


@pytest.mark.slow
def test_the_gradient_of_a_row_of_weight_zero_is_zero():
    logits, batch = example()
    grad = jax.grad(lambda x: Classification()(x, batch)[0].total)(logits)
    assert not np.any(np.asarray(grad)[np.asarray(batch["weight"]) == 0])
    assert np.all(np.any(np.asarray(grad)[np.asarray(batch["weight"]) != 0], axis=-1))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0, math.nan])
def test_a_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(InputError, match="label_smoothing"):
        Classification(label_smoothing=smoothing)


def labelled(label, **fields):
    """Training of a model of three classes on rows with these labels."""
    columns = {"image": np.zeros((len(label), 2, 2, 1), np.uint8), "label": label}
    return Trainer(Experiment(model=MLP(classes=3), data=Arrays(lambda split: columns, batch_size=2, **fields)))


@pytest.mark.parametrize(
    ("label", "holds"),
    [
        (["a", "b"], r"strings \('a', say\)"),
        ([["a", "b"], ["c", "d"]], r"strings \(.*'a'.*, say\)"),
        (np.array([b"a", b"b"], object), r"strings \(b'a', say\)"),
        (np.array([None, {}], object), r"objects that are no numbers \(None, say\)"),
    ],
)
def test_labels_that_are_no_numbers_are_refused_as_what_they_are(label, holds):
    expected = r"expected whole numbers, which a host transform can make of it \(data.host_transforms\)"
    with pytest.raises(InputError, match=f"^task.target names 'label', which holds {holds}; {expected}$"):
        _ = labelled(label).batch_spec


class Unreadable:
    def __getitem__(self, indices):
        raise AssertionError("the images were read")


class Everywhere(nn.Module):
    """Logits of three classes, at each of any number of positions where `positions` is not ()."""

    positions: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, image):
        return nn.Dense(3)(image.reshape(len(image), *self.positions, -1))


def check(label, model, split="train", task=None):
    columns = {"image": Unreadable(), "label": label}
    image, key = jax.ShapeDtypeStruct((2, 4), jnp.float32), jax.random.key(0)
    outputs = jax.eval_shape(lambda image: model.init_with_output(key, image)[0], image)
    (task or Classification()).check_rows(outputs, Columns(columns).columns, split)


@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("labels", "run"), [([0, -1], "-1 to 0"), ([1, 3], "1 to 3"), ([-100, 7], "-100 to 7")])
def test_labels_that_are_no_classes_are_refused_without_reading_images(tmp_path, positions, mapped, labels, run):
    label = np.array(labels, np.int32).reshape(2, *([1] * len(positions))) * np.ones((1, *positions), np.int32)
    if mapped:
        np.save(tmp_path / "label.npy", label)
        label = np.load(tmp_path / "label.npy", mmap_mode="r")
    with pytest.raises(InputError, match=f"^'label' of the test split: labels run from {run}; expected 0 to 2"):
        check(label, Everywhere(positions), "test")


def test_labels_that_are_classes_or_are_another_tasks_matter_are_let_be():
    check(np.array([0, 1]), Everywhere())
    check(np.array([2, 0], np.uint8), Everywhere())

    class Ignoring(Classification):
        """Leaves out the labels below 0."""

        def __call__(self, outputs, batch):
            kept = batch["weight"] * (batch[self.target] >= 0)
            return super().__call__(outputs, {**batch, self.target: abs(batch[self.target]), "weight": kept})

    check(np.array([-1, 2]), Everywhere(), task=Ignoring())


@pytest.mark.parametrize("device_limit", [0, 1024])
def test_labels_are_looked_at_before_the_first_step(tmp_path, device_limit):
    experiment = labelled([1, 2, 3, 3], device_limit=device_limit).experiment
    message = "'label' of the train split: labels run from 1 to 3; expected 0 to 2"
    for run in (
        lambda: next(steps(experiment)),
        lambda: fit(experiment, workdir=tmp_path),
        lambda: dry_run(experiment),
    ):
        with pytest.raises(InputError, match=message):
            run()
    assert not list(tmp_path.iterdir())


# --- make_loss


class Told(nn.Module):
    """Says by its output what it was told, in the logits of class 0."""

    def outputs(self, x, told):
        return jnp.zeros((x.shape[0], 4)).at[:, 0].set(float(told))


class ToldTrain(Told):
    def __call__(self, x, *, train):
        return self.outputs(x, train)


class ToldTraining(Told):
    def __call__(self, x, training=None):
        return self.outputs(x, training)


class ToldDeterministic(Told):
    def __call__(self, x, deterministic=None):
        return self.outputs(x, not deterministic)


class ToldNothing(Told):
    def __call__(self, x):
        return self.outputs(x, True)


@pytest.mark.slow
@pytest.mark.parametrize("model", [ToldTrain(), ToldTraining(), ToldDeterministic(), ToldNothing()])
@pytest.mark.parametrize("train", [True, False])
def test_a_model_is_told_whether_it_trains_in_its_own_word(model, train):
    batch = {"image": jnp.ones((1, 2)), "label": jnp.zeros(1, int), "weight": jnp.ones(1)}
    total, _ = make_loss(model, Classification(), "float32", train=train)({}, {}, batch, jax.random.key(0))
    told = train or isinstance(model, ToldNothing)
    np.testing.assert_allclose(total, -jax.nn.log_softmax(jnp.array([float(told), 0, 0, 0]))[0], rtol=1e-6)
    assert len(mode_argument(model, train)) == (not isinstance(model, ToldNothing))


class Noisy(nn.Module):
    """Dropout, another random collection, batch statistics and a sown value."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(image))
        if train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape).astype(x.dtype)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "x", x)
        return x


@pytest.fixture(scope="module")
def noisy():
    _, batch = example()
    batch = {**batch, "image": jnp.linspace(-1, 1, 30).reshape(6, 5)}
    params, model_state = jax.jit(lambda k: init_model(Noisy(), Classification(), batch, k))(jax.random.key(0))
    return params, model_state, batch


def test_params_and_model_state_are_apart_and_what_is_sown_is_no_state(noisy):
    params, model_state, batch = noisy
    assert set(params) == {"Dense_0", "BatchNorm_0"} and set(model_state) == {"batch_stats"}
    shapes = jax.eval_shape(lambda: batch)
    again = jax.eval_shape(lambda k: init_model(Noisy(), Classification(), shapes, k), jax.random.key(0))
    assert jax.tree.structure(again) == jax.tree.structure((params, model_state))


def test_what_is_sown_into_a_collection_of_ones_own_is_no_state_either():
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, image):
            self.sow("aux", "x", image)
            self.variable("aux", "n", jnp.zeros, ())
            return nn.Dense(4)(image)

    _, batch = example()
    batch = {**batch, "image": jnp.ones((6, 5))}
    params, state = init_model(Sower(), Classification(), batch, jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure({"aux": {"n": 0}})
    _, (_, _, new) = make_loss(Sower(), Classification(), "float32")(params, state, batch, jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.slow
def test_a_loss_is_a_float32_sum_and_a_weight_and_depends_on_the_key_alone(noisy):
    params, model_state, batch = noisy
    loss_fn = jax.jit(make_loss(Noisy(), Classification(), "mixed_float16"))
    total, (weight, metrics, new_state) = loss_fn(params, model_state, batch, jax.random.key(1))
    assert total.dtype == weight.dtype == jnp.float32 and weight == 5
    assert set(metrics) == {"accuracy"}
    assert jax.tree.structure(new_state) == jax.tree.structure(model_state)
    assert {x.dtype for x in jax.tree.leaves(new_state)} == {jnp.dtype("float32")}
    assert loss_fn(params, model_state, batch, jax.random.key(1))[0] == total
    assert loss_fn(params, model_state, batch, jax.random.key(2))[0] != total


@pytest.mark.slow
def test_evaluation_has_no_randomness_and_changes_no_state(noisy):
    params, model_state, batch = noisy
    loss_fn = make_loss(Noisy(), Classification(), "mixed_float16", train=False)
    total, (_, _, new_state) = loss_fn(params, model_state, batch, None)
    assert new_state is model_state
    assert total == loss_fn(params, model_state, batch, jax.random.key(5))[0]


def test_a_policy_may_be_given_by_its_text(noisy):
    params, model_state, batch = noisy
    by_text = jax.make_jaxpr(make_loss(Noisy(), Classification(), "mixed_bfloat16", train=False))
    assert "bf16" in str(by_text(params, model_state, batch, None))
    with pytest.raises(InputError, match="did you mean"):
        make_loss(Noisy(), Classification(), "mixed_bfloat61")


@pytest.mark.slow
def test_several_inputs_reach_the_model_in_order():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, left, right):
            return nn.Dense(4, use_bias=False)(left) - right

    task = Classification(inputs=("a", "b"), target="y")
    batch = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4)), "y": jnp.zeros(2, int), "weight": jnp.ones(2)}
    params, state = init_model(Two(), task, batch, jax.random.key(0))
    assert params["Dense_0"]["kernel"].shape == (3, 4) and state == {}
    total, (weight, _, _) = make_loss(Two(), task, "float32")(params, state, batch, jax.random.key(0))
    assert weight == 2 and jnp.isfinite(total)
