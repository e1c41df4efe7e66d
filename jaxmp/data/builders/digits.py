"""Handwritten digits of scikit-learn, as a TFDS dataset: 1,797 images of 8x8 pixels with 17 grey levels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxmp.data.builders.versions import VERSIONS

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
SPLIT_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """image (8, 8, 1) uint8 from 0 to 16, label 0 to 9; 1,258 train, 270 validation, 269 test.

    The split is drawn at random within each label: the file is ordered by writer, so that its last rows are of people
    whose hands the first rows do not show, and a split in file order measures something else.
    """

    VERSION = tfds.core.Version(VERSIONS["digits"])
    # Where TFDS looks for download checksums; it finds that with a package it needs and does not install.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits: the test set of UCI's Optical Recognition of Handwritten Digits, "
            "as scikit-learn ships it, in a stratified random split.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            citation="@misc{alpaydin1998optical,\n  title={Optical Recognition of Handwritten Digits},\n"
            "  author={Alpaydin, E. and Kaynak, C.},\n  year={1998},\n"
            "  howpublished={UCI Machine Learning Repository},\n  doi={10.24432/C50P49}\n}",
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits  # 3 s: only here

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8).astype(np.uint8)
        rows = stratified_split(labels, SHARES, SPLIT_SEED)
        return {name: self._generate_examples(images, labels, rows[name]) for name in rows}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Iterator:
        from PIL import Image

        for row in rows.tolist():  # as a Pillow image: TFDS encodes an array with TensorFlow
            yield row, {"image": Image.fromarray(images[row]), "label": int(labels[row])}


def stratified_split(labels: np.ndarray, shares: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Rows of each split, sorted: `shares` of every label's rows, drawn at random, alike with every NumPy version."""
    bits = np.random.Philox(key=seed).random_raw(len(labels))
    bounds = np.cumsum(list(shares.values()))[:-1]
    parts: list[list[np.ndarray]] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(bits[rows], kind="stable")]
        parts.append(np.split(rows, np.round(bounds * len(rows)).astype(int)))
    return {name: np.sort(np.concatenate(rows)) for name, rows in zip(shares, zip(*parts, strict=True), strict=True)}
