from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.cnn import CNN
from jaxmp.models.dcgan import DCGAN, Judged
from jaxmp.modules.linen import with_policy
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.adversarial import Adversarial
from jaxmp.tasks.loss import make_loss
from jaxmp.tasks.samples import Sampling, Trained
from jaxmp.tasks.task import sample
from jaxmp.training.metrics import compute

MODEL = DCGAN((4, 4, 1), (8, 4), noise=3, kernel=3)


def load(split):
    return {"image": np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1)).astype(np.uint8)}


EXPERIMENT = Experiment(
    model=MODEL,
    data=Arrays(load, batch_size=8, mean=(0.5,), std=(0.25,)),
    task=Adversarial(),
    optimizer=jaxmp.Adam(2e-4, b1=0.5),
    precision="mixed_float16",
    loop=Loop(steps=4),
)


def bits(tree):
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(tree)]
    leaves = zip(jax.tree.leaves(tree), keys, strict=True)
    return [np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes() for leaf, is_key in leaves]


def outputs(dtype=jnp.float32):
    real, generated = jnp.asarray([3.0, -1.0, 9.0], dtype), jnp.asarray([-20.0, 0.5, 9.0], dtype)
    return Judged(real, generated, jnp.zeros((3, 4, 4, 1)))


@pytest.mark.slow
def test_the_losses_are_those_of_their_formulas_in_float64_from_half_logits_too_t23():
    weight = jnp.array([1.0, 2.0, 0.0])
    share = np.array([1.0, 2.0]) / 3
    real, fake = np.array([3.0, -1.0]), np.array([-20.0, 0.5])
    d, g = 1 / (1 + np.exp(-real)), 1 / (1 + np.exp(-fake))
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        loss, metrics = Adversarial()(outputs(dtype), {"weight": weight}, "discriminator")
        assert float(loss.compute()) == pytest.approx(-share @ (np.log(d) + np.log1p(-g)), rel=1e-5)
        assert compute(metrics) == {"accuracy": pytest.approx(1 / 3)}
        loss, metrics = Adversarial()(outputs(dtype), {"weight": weight}, "generator")
        assert float(loss.compute()) == pytest.approx(-share @ np.log(g), rel=1e-5)
        assert compute(metrics) == {"taken_for_real": pytest.approx(2 / 3)}
    # That saturates: where the discriminator is sure, the generator's gradient is -1, and not 0.
    gradient = jax.grad(lambda x: Adversarial()(Judged(None, x, x), {"weight": jnp.ones(1)}, "generator")[0].total)
    assert float(gradient(jnp.full(1, -20.0))[0]) == pytest.approx(-1, abs=1e-6)


@functools.cache
def trainer():
    return Trainer(EXPERIMENT)


@functools.cache
def step():
    return jax.jit(trainer().train_step)


@pytest.mark.slow
def test_a_row_that_is_not_finite_skips_the_discriminator_and_changes_no_bit_of_the_generator_s_step():
    state = trainer().init()
    batch = {"image": jnp.ones((8, 4, 4, 1)), "weight": jnp.ones(8)}
    bad = {**batch, "image": batch["image"].at[3].set(jnp.nan)}
    skipped, _ = step()(state, bad)
    assert jaxmp.skipped_steps(skipped.opt_state["discriminator"]) == 1
    assert jaxmp.skipped_steps(skipped.opt_state["generator"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((skipped.params, skipped.model_state)))
    assert bits(skipped.params["discriminator"]) == bits(state.params["discriminator"])
    assert bits(skipped.params["generator"]) != bits(state.params["generator"])

    alone = jax.jit(trainer()._make_step(("generator",)))
    images = batch["image"], bad["image"], 9 * batch["image"]
    others = [alone(state, {**batch, "image": image})[0] for image in images]
    assert bits(others[0]) == bits(others[1]) == bits(others[2])
    assert bits(others[0].model_state["batch_stats"]["discriminator"]) != bits(
        state.model_state["batch_stats"]["discriminator"]
    )


@pytest.mark.slow
def test_the_latent_variables_are_a_function_of_the_key_that_the_loss_is_given():
    state, batch = trainer().init(), {"image": jnp.ones((8, 4, 4, 1)), "weight": jnp.ones(8)}
    loss_fn = jax.jit(make_loss(MODEL, Adversarial(), "float32", objective="generator"))
    first, again, other = (loss_fn(state.params, state.model_state, batch, jax.random.key(key)) for key in (0, 0, 1))
    assert bits(first) == bits(again) and first[0] != other[0]


def test_the_generator_takes_every_kth_step_and_what_it_calls_is_part_of_the_identity():
    (_, own), (_, other) = Adversarial(discriminator_steps=5).objectives.items()
    assert (own.every, own.method, other.every, other.method) == (1, None, 5, "judge_generated")
    changed = [Adversarial(), Adversarial(discriminator_steps=5), Adversarial(order="at_once")]
    assert len({dataclasses.replace(EXPERIMENT, task=task).hash for task in changed}) == 3
    assert EXPERIMENT.to_json()["objectives"]["of"][1]["method"] == "judge_generated"


def trained(**changed):
    state = trainer().init()
    apply = with_policy(MODEL.apply, "mixed_float16")
    variables = {"params": state.params, **state.model_state}
    return dataclasses.replace(Trained(MODEL, apply, variables, EXPERIMENT.data), **changed)


@pytest.mark.slow
def test_pictures_are_a_function_of_key_and_number_in_the_range_of_the_data(monkeypatch):
    of = trained()

    def draw(seed, count):
        return sample(Adversarial(), of, jax.random.key(seed), Sampling(count)).pictures

    few, more, other = draw(0, 2), draw(0, 5), draw(1, 2)
    assert few.shape == (2, 4, 4, 1) and few.dtype == np.float32 and few.min() >= 0 and few.max() <= 1
    np.testing.assert_array_equal(few, draw(0, 2))
    np.testing.assert_allclose(few, more[:2], atol=2e-3)
    assert (few != other).any() and (more[0] != more[1]).any()
    assert sample(Adversarial(), of, jax.random.key(0), Sampling()).pictures.shape == (64, 4, 4, 1)
    # By hand, from the model: the images times the standard deviation of the data, plus their mean.
    images = of.apply(of.variables, 2, method="draw", rngs={"noise": jax.random.fold_in(jax.random.key(0), 0)})
    np.testing.assert_allclose(few, np.clip(np.asarray(images, np.float64) * 0.25 + 0.5, 0, 1), atol=2e-3)
    # In parts, each of other keys.
    monkeypatch.setattr("jaxmp.tasks.samples.AT_A_TIME", 2)
    parts = draw(0, 5)
    assert parts.shape == more.shape and len({picture.tobytes() for picture in parts}) == 5


@pytest.mark.parametrize(
    ("act", "names"),
    [
        (lambda: Adversarial(inputs="image"), "task.inputs = 'image': expected a tuple"),
        (lambda: Adversarial(discriminator_steps=0), "task.discriminator_steps = 0: expected a whole number"),
        (lambda: Adversarial(order="first"), "task.order = 'first': expected in_turn or at_once"),
        (lambda: jaxmp.ObjectiveSpec(method="a b"), "ObjectiveSpec.method = 'a b': expected the name of a method"),
        (
            lambda: Adversarial().check(jnp.zeros(3), {"weight": jnp.zeros(3)}),
            "type ArrayImpl; expected logits called real and generated",
        ),
        (
            lambda: Adversarial().check(outputs()._replace(real=jnp.zeros((3, 1))), {"weight": jnp.zeros(3)}),
            "the logits called real are float32[3, 1]; expected one for each row, [3]",
        ),
        (
            lambda: make_loss(CNN(), Adversarial(), "float32", objective="generator")(
                {}, {}, {"image": jnp.zeros((1, 4, 4, 1)), "weight": jnp.ones(1)}, None
            ),
            "CNN has no method 'judge_generated'; expected a model that has it",
        ),
        (
            lambda: sample(Adversarial(), trained(), None, Sampling(prompt="a")),
            "prompt = 'a': only texts have one, and DCGAN draws pictures",
        ),
        (
            lambda: sample(Adversarial(), trained(), None, Sampling(temperature=0.5)),
            "temperature = 0.5: only texts have one",
        ),
        (
            lambda: sample(Adversarial(), trained(model=CNN()), None, Sampling()),
            "CNN has no method draw(count), which draws images; expected a model such as DCGAN or VAE",
        ),
        (
            lambda: sample(
                Adversarial(), trained(apply=lambda *_, **__: jnp.zeros((1, 4, 4, 2))), jax.random.key(0), Sampling(1)
            ),
            "DCGAN.draw returned float32[1, 4, 4, 2]; expected images (count, height, width, channels) with 1 or 3",
        ),
    ],
)
def test_what_is_no_adversarial_network_is_refused_by_name(act, names, monkeypatch):
    # No parameters are made for a message.
    nothing = types.SimpleNamespace(params={}, model_state={})
    monkeypatch.setattr("jaxmp.runs.trainer.Trainer.init", lambda self: nothing)
    with pytest.raises(InputError) as error:
        act()
    assert names in str(error.value)
