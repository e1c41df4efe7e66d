"""Tells generated digits from real ones by their nearest neighbours, in the features of a trained mnist_cnn.

    python experiments/generative/nearest_neighbour.py runs/mnist_dcgan runs/mnist_vae --features runs/mnist_cnn \
        --output nearest_neighbour.json

As many pictures as test images are drawn. The class of each of both, real or generated, is predicted to be that of its
nearest neighbour among all others, by the Euclidean distance of the last hidden layer (`jaxmp.studies.two_sample`). The
share of right predictions is 0.5 if both have one distribution, and 1 if they can be told apart; below 0.5 the pictures
are copies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxmp import Run
from jaxmp.cli import script
from jaxmp.runs.folder import parse_step
from jaxmp.runs.provenance import provenance
from jaxmp.studies.two_sample import RealImages


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
    images = RealImages(classifier, count, seed)
    rows: list[dict[str, Any]] = [{"pictures": "real", **images.from_others()}]
    print(json.dumps(rows[0]), flush=True)
    for text in runs:
        path, _, at = text.partition("@")
        run = Run(path)
        state = run.state(parse_step(at or "last", text))
        of_run = {"config": run.config["name"], "precision": run.config["experiment"]["precision"]}
        of_run |= {"seed": run.config["seed"], "step": int(state.step), "steps": run.config["steps"]}
        rows.append({"pictures": "generated", **of_run, **images.from_pictures(run, state)})
        print(json.dumps(rows[-1]), flush=True)
    if output is not None:
        summary = classifier.summary
        of_features = {"config": classifier.config["name"], "steps": summary["steps"], "test": summary["test"]}
        found = {"count": count, "seed": seed, "features": of_features, "rows": rows}
        output.write_text(json.dumps(provenance(patch=False) | found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
