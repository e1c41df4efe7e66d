"""The versions of the datasets that jaxmp prepares itself, and the files that some are made from. Needs no TFDS."""

from __future__ import annotations

VERSIONS = {"digits": "1.0.0", "mnist": "3.0.1", "spoken_digits": "1.0.0"}
"""the current version of each dataset, by name"""

MANUAL = {
    "mnist": (
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        "the four files of http://yann.lecun.com/exdb/mnist, with .gz or without",
    ),
    "spoken_digits": (
        ("fsdd_recordings.tar.gz", "recordings"),
        "the folder recordings of https://github.com/Jakobovski/free-spoken-digit-dataset, or that folder packed as "
        "fsdd_recordings.tar.gz",
    ),
}
"""of each dataset that is made from files of one's own: names in the manual folder, and what they are"""
