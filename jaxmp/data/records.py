"""The records of a TFDS dataset, serialized `tf.train.Example`s, as columns of arrays."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmp.errors import InputError


def decode_records(features: Any, records: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Decodes `records` to columns, by TFDS's `features`: an array each, for text an object array of bytes.

    Images, numbers and text are read straight from the protocol buffers, other features by TFDS (MNIST on one CPU core:
    a quarter of TFDS's time a row). Raises InputError if a feature's shape differs between rows.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    readers = {name: _reader(feature) for name, feature in features.items()}
    known = {name: read for name, read in readers.items() if read is not None}
    if known.keys() == readers.keys():
        examples = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
        return {name: read([example[name] for example in examples]) for name, read in known.items()}
    rows = [flatten(features.deserialize_example_np(record)) for record in records]
    return {name: _stack(name, [row[name] for row in rows]) for name in rows[0]}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to one, joining the names by "/"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _reader(feature: Any) -> Callable[[list], np.ndarray] | None:
    """The function that makes a column of one feature's protocol buffers; None if it takes TFDS's own decoder."""
    from tensorflow_datasets.core import features as kinds

    tensor, stored = feature.get_tensor_info(), feature.get_serialized_info()
    if type(feature) is kinds.Image:
        plain = tensor.np_dtype == np.uint8 and None not in tensor.shape and tensor.shape[-1] in (1, 2, 3, 4)
        return (lambda protos: decode_images(_bytes(protos), tensor.shape)) if plain else None
    if type(feature) is kinds.Text:
        return lambda protos: _objects(_bytes(protos))
    if type(feature) not in (kinds.ClassLabel, kinds.Scalar, kinds.Tensor) or stored.shape != ():
        return None
    dtype = np.dtype(stored.np_dtype)
    if dtype.kind in "iub":
        return lambda protos: np.array([proto.int64_list.value[0] for proto in protos], dtype)
    if dtype == np.float32:
        return lambda protos: np.array([proto.float_list.value[0] for proto in protos], dtype)
    return None


def decode_images(encoded: Sequence[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    """Images of one shape (height, width, channels) from their PNG or JPEG bytes: uint8 (len(encoded), *shape).

    Raises ValueError if an image has another shape or more than 8 bits, and OSError or SyntaxError if it is damaged.
    """
    from PIL import Image

    images = np.empty((len(encoded), *shape), np.uint8)
    for decoded, data in zip(images, encoded, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"an image is {pixels.dtype} {pixels.shape}, not uint8 {shape}")
        decoded[...] = pixels
    return images


def _bytes(protos: list) -> list[bytes]:
    return [proto.bytes_list.value[0] for proto in protos]


def _objects(values: list[bytes]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _stack(name: str, values: list) -> np.ndarray:
    if isinstance(values[0], bytes | str):
        return _objects([value.encode() if isinstance(value, str) else value for value in values])
    try:
        column = np.stack([np.asarray(value) for value in values])
    except ValueError as error:
        raise differing_shapes(name) from error
    if column.dtype == object:
        raise differing_shapes(name)
    return column


def differing_shapes(name: str) -> InputError:
    """The error for a feature whose rows cannot be stacked to one array."""
    return InputError(
        f"feature {name!r} has rows of different shapes; bring them to one, and give them by Arrays(load)"
    )
