"""How well a model's pictures are told from real images: by their nearest neighbours, in a classifier's features.

Source: D. Lopez-Paz and M. Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017, https://arxiv.org/abs/1610.06545,
section 3; Q. Xu et al., An empirical study on evaluation metrics of generative adversarial networks, 2018,
https://arxiv.org/abs/1806.07755, section 2, for the two parts and the features of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.modules.linen import with_policy
from jaxmp.runs.run import Run
from jaxmp.tasks.samples import Sampling
from jaxmp.training.state import TrainState

BATCH = 500
"""images at a time"""


class RealImages:
    """Test images of a run of `jaxmp.models.cnn.CNN`, by its features; what pictures of a model are told apart from.

    Args:
      classifier: the run.
      count: test images, and as many pictures; the standard error of an accuracy near 0.5 is 0.5 / sqrt(2 count).
      seed: of the choice of images, and of the pictures that a model draws.
    """

    def __init__(self, classifier: Run, count: int = 2000, seed: int = 0):
        source, self.count, self.seed = classifier.source("test"), count, seed
        self._features = make_features(classifier)
        images = source[np.random.default_rng(seed).permutation(len(source))[: 2 * count]]["image"]
        self._real, self._others = self._features(images[:count]), self._features(images[count:])

    def from_others(self) -> dict[str, float]:
        """`nearest_neighbour_accuracy` of the images beside as many others, equally real."""
        return nearest_neighbour_accuracy(self._real, self._others)

    def from_pictures(self, run: Run, state: TrainState) -> dict[str, float]:
        """`nearest_neighbour_accuracy` of the images beside pictures that a run's model draws with this state."""
        pictures = run.sample(Sampling(self.count), seed=self.seed, state=state).pictures
        assert pictures is not None
        return nearest_neighbour_accuracy(self._real, self._features(np.round(255 * pictures).astype(np.uint8)))


def make_features(run: Run) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the features of a run of `jaxmp.models.cnn.CNN`: its last hidden Dense layer, after the activation.

    Returns:
      uint8 images (count, height, width, channels) -> float32 (count, width of the layer), under the run's policy.
    """
    experiment, state = run.experiment, run.state()
    model: Any = experiment.model
    prepared = experiment.data.prepare(train=False)
    layer, apply = f"Dense_{len(model.dense) - 1}", with_policy(model.apply, experiment.policy)
    variables = {"params": state.averaged_params, **state.model_state}

    @jax.jit
    def of_batch(images: jax.Array) -> jax.Array:
        batch = prepared({"image": images, "weight": jnp.ones(len(images))}, None)
        _, captured = apply(
            variables,
            batch["image"],
            capture_intermediates=lambda module, method: module.name == layer,
            mutable=["intermediates"],
        )
        (hidden,) = captured["intermediates"][layer]["__call__"]
        return model.activation(hidden.astype(jnp.float32))

    return lambda images: np.concatenate(
        [np.asarray(of_batch(images[at : at + BATCH])) for at in range(0, len(images), BATCH)]
    )


def nearest_neighbour_accuracy(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """The leave-one-out accuracy of 1-nearest-neighbour classification, of all rows and of both halves.

    It is 0.5 if both have one distribution, and 1 if they can be told apart; below 0.5 the generated ones are copies.

    Args:
      real: (count, features).
      generated: of the same shape: with other counts, chance would not be 0.5.
    """
    from sklearn.neighbors import NearestNeighbors

    labels = np.repeat([1, 0], [len(real), len(generated)])
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(np.concatenate([real, generated]))
    neighbours = search.kneighbors(return_distance=False)[:, 0]  # of each row, without itself
    right = labels[neighbours] == labels
    return {
        "accuracy": float(right.mean()),
        "on_real": float(right[labels == 1].mean()),
        "on_generated": float(right[labels == 0].mean()),
    }
