"""MNIST as a TFDS dataset, from its four idx files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxmp.data.builders.versions import VERSIONS
from jaxmp.errors import InputError


class Mnist(tfds.core.GeneratorBasedBuilder):
    """image (28, 28, 1) uint8, label 0 to 9; 60,000 train, 10,000 test: the rows and the order of TFDS's own builder.

    Args:
      manual: folder of the four idx files.
    """

    VERSION = tfds.core.Version(VERSIONS["mnist"])
    name = "mnist"
    code_path = None  # where TFDS would look for download checksums

    def __init__(self, *, manual: Path, **options: Any):
        self._manual = manual
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The MNIST database of handwritten digits.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://yann.lecun.com/exdb/mnist/",
            citation="@article{lecun2010mnist,\n  title={MNIST handwritten digit database},\n"
            "  author={LeCun, Yann and Cortes, Corinna and Burges, CJ},\n  year={2010}\n}",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(prefix) for split, prefix in (("train", "train"), ("test", "t10k"))}

    def _generate_examples(self, prefix: str) -> Iterator:
        from PIL import Image

        images, labels = read_pair(self._manual, prefix)
        for row in range(len(images)):  # as a Pillow image: TFDS encodes an array with TensorFlow
            yield row, {"image": Image.fromarray(images[row]), "label": int(labels[row])}


def read_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 (rows, 28, 28), and labels, uint8 (rows,), of the files that begin with `prefix`.

    Raises: InputError as `read_idx` does, or if the two files do not belong together.
    """
    image_file, label_file = (folder / f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.shape != (*labels.shape, 28, 28):
        raise InputError(
            f"{image_file} holds images of shape {images.shape} and {label_file.name} labels of shape {labels.shape}; "
            "expected images of 28 x 28 pixels, and as many labels"
        )
    if labels.size and labels.max() > 9:
        raise InputError(f"{label_file} holds the label {labels.max()}; expected 0 to 9")
    return images, labels


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of bytes, uint8; of `path` or of `path`.gz, whichever is there.

    Source: http://yann.lecun.com/exdb/mnist: two zero bytes, the type (8: unsigned bytes), the number of axes, the
    length of each axis as a big-endian int32, the values.

    Raises: InputError if there is neither file, or it is truncated, too long, or no idx file of bytes.
    """
    packed = path.with_name(f"{path.name}.gz")
    file = path if path.exists() else packed
    try:
        data = file.read_bytes() if file == path else gzip.decompress(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is not there, nor {packed.name}; expected one of them") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read ({error}); copy it again") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise InputError(f"{file} begins with {data[:4].hex()}; expected 000008 and the number of axes: an idx file")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start][: len(data[4:start]) // 4 * 4], ">i4").tolist()
    if len(shape) != data[3] or min(shape, default=0) < 0 or len(data) - start != np.prod(shape, dtype=np.int64):
        raise InputError(
            f"{file} holds {len(data)} bytes; its header says {' x '.join(map(str, shape))} of them after the first "
            f"{start}: it is truncated or damaged; copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
