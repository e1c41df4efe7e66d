"""Tells generated digits from real ones by their nearest neighbours, in the features of a trained mnist_cnn.

    python experiments/generative/nearest_neighbour.py runs/mnist_dcgan runs/mnist_vae --features runs/mnist_cnn \
        --output nearest_neighbour.json

As many pictures as test images are drawn. The class of each of both, real or generated, is predicted to be that of its
nearest neighbour among all others, by the Euclidean distance of the last hidden layer. The share of right predictions
is 0.5 if both have one distribution, and 1 if they can be told apart; below 0.5 the pictures are copies.

Source: D. Lopez-Paz and M. Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017, https://arxiv.org/abs/1610.06545,
section 3; Q. Xu et al., An empirical study on evaluation metrics of generative adversarial networks, 2018,
https://arxiv.org/abs/1806.07755, section 2, for the two parts and the features of a classifier.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from sklearn.neighbors import NearestNeighbors

from jaxmp import Run, with_policy
from jaxmp.cli import script
from jaxmp.runs.folder import parse_step
from jaxmp.runs.provenance import provenance
from jaxmp.tasks.samples import Sampling

BATCH = 500
"""images at a time"""


def make_features(run: Run) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the features of a run of `jaxmp.models.cnn.CNN`: its last hidden Dense layer, after the activation.

    Returns:
      uint8 images (count, height, width, channels) -> float32 (count, width of the layer), under the run's policy.
    """
    experiment, state = run.experiment, run.state()
    model, prepared = experiment.model, experiment.data.prepare(train=False)
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

    Args:
      real: (count, features).
      generated: of the same shape: with other counts, chance would not be 0.5.
    """
    labels = np.repeat([1, 0], [len(real), len(generated)])
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(np.concatenate([real, generated]))
    neighbours = search.kneighbors(return_distance=False)[:, 0]  # of each row, without itself
    right = labels[neighbours] == labels
    return {
        "accuracy": float(right.mean()),
        "on_real": float(right[labels == 1].mean()),
        "on_generated": float(right[labels == 0].mean()),
    }


def main(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional],
    features: Path,
    count: int = 2000,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Prints the accuracy of each run as a line of JSON, and that of real images beside other real images.

    Args:
        runs: Runs of mnist_dcgan and mnist_vae: RUN for the last weights, RUN@best, or RUN@STEP.
        features: A run of mnist_cnn.
        count: Test images, and as many pictures; the standard error of an accuracy near 0.5 is 0.5 / sqrt(2 count).
        seed: Seed of the draws.
        output: JSON file to write; none by default.
    """
    classifier = Run(features)
    source, in_features = classifier.source("test"), make_features(classifier)
    images = source[np.random.default_rng(seed).permutation(len(source))[: 2 * count]]["image"]
    real, others = in_features(images[:count]), in_features(images[count:])
    rows: list[dict[str, Any]] = [{"pictures": "real", **nearest_neighbour_accuracy(real, others)}]
    print(json.dumps(rows[0]), flush=True)
    for text in runs:
        path, _, at = text.partition("@")
        run = Run(path)
        state = run.state(parse_step(at or "last", text))
        pictures = run.sample(Sampling(count), seed=seed, state=state).pictures
        assert pictures is not None
        of_run = {"config": run.config["name"], "precision": run.config["experiment"]["precision"]}
        of_run |= {"seed": run.config["seed"], "step": int(state.step), "steps": run.config["steps"]}
        generated = in_features(np.round(255 * pictures).astype(np.uint8))
        rows.append({"pictures": "generated", **of_run, **nearest_neighbour_accuracy(real, generated)})
        print(json.dumps(rows[-1]), flush=True)
    if output is not None:
        summary = classifier.summary
        of_features = {"config": classifier.config["name"], "steps": summary["steps"], "test": summary["test"]}
        found = {"count": count, "seed": seed, "features": of_features, "rows": rows}
        output.write_text(json.dumps(provenance(patch=False) | found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
