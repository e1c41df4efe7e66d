"""Pictures told from real images by their nearest neighbours, on features whose answer is known."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.cnn import CNN
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.studies.two_sample import make_features, nearest_neighbour_accuracy


@pytest.mark.slow
def test_the_accuracy_is_a_half_for_one_distribution_one_for_two_and_none_for_copies():
    accuracy, rng = nearest_neighbour_accuracy, np.random.default_rng(0)
    one, other = rng.normal(size=(2, 1000, 4))
    assert accuracy(one, other)["accuracy"] == pytest.approx(0.5, abs=0.04)
    assert set(accuracy(one, other + 9).values()) == {1.0}
    assert set(accuracy(one, one + 1e-6).values()) == {0.0}
    # By hand: the neighbours of the real points are 1.1, 2 and 11.1, those of the generated ones 1.1, 12 and 11.1.
    by_hand = accuracy(np.array([[0.0], [1.1], [10.0]]), np.array([[2.0], [11.1], [12.0]]))
    assert by_hand == {"accuracy": pytest.approx(3 / 6), "on_real": pytest.approx(1 / 3), "on_generated": 2 / 3}


@pytest.mark.slow
def test_the_features_are_the_last_hidden_layer_of_the_run_on_images_as_its_data_has_them(tmp_path):
    def load(split):
        rng = np.random.default_rng(0)
        return {"image": rng.integers(0, 256, (8, 4, 4, 1)).astype(np.uint8), "label": np.arange(8) % 2}

    model = CNN(channels=(), dense=(5, 3), classes=2, dropout=0.5)
    data = Arrays(load, batch_size=4, mean=(0.5,), std=(0.25,))
    experiment = Experiment(model=model, data=data, precision="float32", loop=Loop(steps=1))
    run = Run(fit(experiment, workdir=tmp_path, log=lambda text: None).path, experiment)
    image = load("test")["image"]
    found = make_features(run)(image)
    x = ((image / 255 - 0.5) / 0.25).reshape(8, -1)
    params = jax.tree.map(np.float64, run.state().params)
    for name in ("Dense_0", "Dense_1"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
