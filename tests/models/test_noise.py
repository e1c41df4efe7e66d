from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.experiment.experiment import Experiment
from jaxmp.models.dcgan import DCGAN, uniform
from jaxmp.models.noise import Noise
from jaxmp.models.vae import VAE
from jaxmp.modules.dropout import DropoutByExample
from jaxmp.modules.interventions import intervene
from jaxmp.modules.linen import UnderPolicy
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.regression import Regression
from jaxmp.training.metrics import compute

KEY = {"noise": jax.random.key(0)}


def draw(rows, policy="mixed_float16", index=None, model=None):
    model = Noise(5) if model is None else model
    by_example = DropoutByExample(index, rows)
    return intervene(model.apply, UnderPolicy(policy), by_example)({}, rows, rngs=KEY)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_the_numbers_of_a_row_are_float32_and_of_its_place_alone_in_every_part_of_a_batch(policy):
    whole = draw(8, policy)
    assert whole.dtype == jnp.float32 and len(np.unique(whole)) == 40  # t19
    np.testing.assert_array_equal(whole[:3], Noise(5).apply({}, 3, rngs=KEY))
    for rows in ([4, 5, 6, 7], [1, 3, 5, 7]):
        np.testing.assert_array_equal(whole[np.array(rows)], draw(4, policy, jnp.array(rows, jnp.int32)))


@pytest.mark.slow
def test_the_numbers_have_the_distribution_that_is_asked_for():
    normal, even = draw(4000), draw(4000, model=Noise(5, uniform))
    assert float(normal.mean()) == pytest.approx(0, abs=0.03) and float(normal.std()) == pytest.approx(1, abs=0.02)
    assert float(even.mean()) == pytest.approx(0, abs=0.02) and float(even.std()) == pytest.approx(3**-0.5, abs=0.01)
    assert float(jnp.abs(even).max()) <= 1
    correlation = np.corrcoef(np.asarray(normal, np.float64).T) - np.eye(5)
    assert abs(correlation).max() < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("model", [DCGAN((4, 4, 1), (8, 4), noise=3, kernel=3), VAE((4, 4, 1), (8,), 2)])
def test_the_images_of_a_model_do_not_depend_on_how_a_batch_is_cut(model):
    image = jnp.full((8, 4, 4, 1), 0.5)
    variables = jax.jit(model.init)(jax.random.key(1), image)

    @jax.jit
    def run(image, index):
        return intervene(model.apply, DropoutByExample(index, len(image)))(variables, image, rngs=KEY)

    def made(out):
        return out.images if hasattr(out, "images") else out.logits

    whole = made(run(image, jnp.arange(8, dtype=jnp.int32)))
    for half in (np.arange(4, 8), np.arange(4)):
        np.testing.assert_allclose(
            made(run(image[half], jnp.asarray(half, jnp.int32))), whole[half], rtol=1e-5, atol=1e-6
        )
    assert (whole[0] != whole[1]).any()


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x) + Noise(1)(len(x))


def test_what_is_drawn_for_a_row_in_evaluation_does_not_depend_on_the_size_of_its_batches():
    rows = {"x": np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2), "y": np.ones((10, 1), np.float32)}

    def trainer(size):
        data = Arrays(lambda split: rows, batch_size=5, eval_batch_size=size, images=())
        return Trainer(Experiment(Noisy(), data, Regression(inputs=("x",)), precision="float32"))

    few, all_at_once = trainer(3), trainer(10)
    state = few.devices.get(few.devices.put_state(few.init()))
    found = [compute(each.evaluation(state, each.source()))["loss"] for each in (few, all_at_once)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
