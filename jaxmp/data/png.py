"""Many small PNG images at once: one zlib call an image, then NumPy over all images together.

Sets of small images (MNIST, CIFAR) are PNG inside their records. Pillow takes 60 us for one of MNIST's, most of it to
open it, and longer in threads, which share the GIL; this takes 14, half of it zlib's (110 and 104 for CIFAR-10; one CPU
core). What is not a plain 8-bit image of the expected shape (palette, interlaced, 16 bits, JPEG) goes to Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels; PNG specification, section 11.2.1


def decode_images(encoded: Sequence[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    """Images of one shape (height, width, channels) from their PNG or JPEG bytes: (len(encoded), *shape) uint8.

    Raises ValueError where an image has another shape, and zlib.error or OSError where one cannot be read.
    """
    height, width, channels = shape
    header = struct.pack(">II5B", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    plain = [data[:8] == SIGNATURE and data[16:29] == header for data in encoded]
    if not all(plain):
        return np.stack([_by_pillow(data, shape) for data in encoded])
    content = b"".join(zlib.decompress(_compressed(data)) for data in encoded)
    rows = np.frombuffer(content, np.uint8).reshape(len(encoded), height, 1 + width * channels)
    return _unfilter(rows[..., 0], rows[..., 1:].reshape(-1, height, width, channels))


def _compressed(png: bytes) -> bytes:
    """The image data of one PNG: its IDAT chunks, joined."""
    found, start = [], len(SIGNATURE)
    while start < len(png):
        (length,) = struct.unpack_from(">I", png, start)
        if png[start + 4 : start + 8] == b"IDAT":
            found.append(png[start + 8 : start + 8 + length])
        start += length + 12
    return b"".join(found)


def _unfilter(filters: np.ndarray, filtered: np.ndarray) -> np.ndarray:
    """Undo the row filters (specification, section 9.2): filters (n, height), filtered (n, height, width, channels)."""
    images = filtered.copy()
    above = np.zeros_like(images[:, 0])
    for y in range(images.shape[1]):
        row = images[:, y]
        by_filter = [np.flatnonzero(filters[:, y] == number) for number in range(5)]
        _, sub, up, average, paeth = by_filter
        row[sub] = np.cumsum(row[sub], axis=1, dtype=np.uint8)
        row[up] += above[up]
        row[average] = _from_left(row[average], above[average], _mean)
        row[paeth] = _from_left(row[paeth], above[paeth], _paeth)
        above = row
    return images


def _from_left(row: np.ndarray, above: np.ndarray, predict) -> np.ndarray:
    """Undo a filter that predicts a pixel from its decoded left neighbour: row, above (n, width, channels) uint8."""
    if not len(row):
        return row
    # Width first, so that a column is contiguous; int16, so that the predictors' differences do not wrap.
    row, above = (np.ascontiguousarray(part.swapaxes(0, 1), np.int16) for part in (row, above))
    left = above_left = np.zeros_like(row[0])
    for x in range(len(row)):
        row[x] = (row[x] + predict(left, above[x], above_left)) & 255
        left, above_left = row[x], above[x]
    return row.swapaxes(0, 1).astype(np.uint8)


def _mean(left: np.ndarray, above: np.ndarray, above_left: np.ndarray) -> np.ndarray:
    return (left + above) >> 1


def _paeth(left: np.ndarray, above: np.ndarray, above_left: np.ndarray) -> np.ndarray:
    """The neighbour nearest to left + above - above_left; ties go to left, then above."""
    horizontal, vertical = above - above_left, left - above_left
    to_left, to_above, to_corner = abs(horizontal), abs(vertical), abs(horizontal + vertical)
    return np.where(
        (to_left <= to_above) & (to_left <= to_corner), left, np.where(to_above <= to_corner, above, above_left)
    )


def _by_pillow(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(f"an image is {pixels.dtype} {pixels.shape}, not uint8 {shape}")
    return pixels
