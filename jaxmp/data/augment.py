"""Augmentation of images: pure functions of (key, image), image float32 (height, width, channels).

They see normalised images, in which 0 is the mean: pixels from outside the image, and cut-out pixels, are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jaxmp.errors import InputError, require, whole_number


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image, applied in the order of the fields. 0 or False switches one off."""

    rotation: float = 0.0
    """Rotate by a random angle of at most this many degrees, either way."""
    scale: float = 0.0
    """Zoom by a random factor between 1 - scale and 1 + scale."""
    crop_padding: int = 0
    """Pad by this many pixels on each side, then crop to the original size at a random place."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    cutout: int = 0
    """Set a square with sides of this many pixels to zero, around a random pixel."""

    def __post_init__(self):
        for name in ("rotation", "crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise InputError(f"data.augment.{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.scale < 1:
            raise InputError(f"data.augment.scale is {self.scale}; expected a fraction, 0 <= scale < 1")

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Changes `image`, float32 (height, width, channels), at random, by `key`. Keeps shape and dtype."""
        # A key for each, whether it is used or not: switching one on leaves the draws of the others as they were.
        to_warp, to_crop, to_flip, to_cut = jax.random.split(key, 4)
        if self.rotation or self.scale:
            image = random_warp(to_warp, image, self.rotation, self.scale)
        if self.crop_padding:
            image = random_crop(to_crop, image, self.crop_padding)
        if self.flip:
            image = random_flip(to_flip, image)
        if self.cutout:
            image = cutout(to_cut, image, self.cutout)
        return image


def random_warp(key: jax.Array, image: jax.Array, rotation: float, scale: float) -> jax.Array:
    """Rotate by up to `rotation` degrees and zoom by up to a fraction `scale`, both uniform, in one interpolation."""
    to_rotate, to_scale = jax.random.split(key)
    degrees = jax.random.uniform(to_rotate, minval=-rotation, maxval=rotation)
    factor = jax.random.uniform(to_scale, minval=1 - scale, maxval=1 + scale)
    return warp(image, degrees, factor)


def warp(image: jax.Array, degrees: jax.Array | float, factor: jax.Array | float) -> jax.Array:
    """`image` turned anticlockwise by `degrees` and enlarged by `factor` about its centre: bilinear, 0 outside."""
    height, width, _ = image.shape
    angle = jnp.deg2rad(jnp.float32(degrees))
    cosine, sine = jnp.cos(angle) / factor, jnp.sin(angle) / factor
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - middle_y, jnp.arange(width) - middle_x, indexing="ij")
    # Where each pixel comes from: the inverse map. y points down.
    sources = [cosine * y + sine * x + middle_y, cosine * x - sine * y + middle_x]
    by_channel = jax.vmap(lambda channel: map_coordinates(channel, sources, order=1), in_axes=2, out_axes=2)
    return by_channel(image)


def random_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Pad by `padding` on each side and crop to the old size, uniformly: a shift of up to `padding` pixels each way."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirror left and right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def cutout(key: jax.Array, image: jax.Array, size: int) -> jax.Array:
    """Zero the part inside the image of a square of side `size` around a random pixel (DeVries & Taylor 2017)."""
    height, width, _ = image.shape
    to_y, to_x = jax.random.split(key)
    top = jax.random.randint(to_y, (), 0, height) - size // 2
    left = jax.random.randint(to_x, (), 0, width) - size // 2
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (y >= top) & (y < top + size) & (x >= left) & (x < left + size)
    return jnp.where(inside[..., None], 0.0, image)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random part of an example's `image`, resized to `size` x `size` pixels, as a transform.

    In evaluation it is the middle of the image, `size` pixels high and wide, as it is. Source: C. Szegedy et al., Going
    deeper with convolutions, CVPR 2015, https://arxiv.org/abs/1409.4842, section 6.
    """

    size: int = 224
    """Height and width of the result, in pixels."""
    area: float = 0.08
    """Least share of the image's area; a part's share is uniform from this to 1."""
    ratio: float = 4 / 3
    """Largest ratio of the sides of a part; its logarithm is uniform, either way."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", whole_number("RandomResizedCrop.size", self.size, 1))
        require(self, "area", 0 < self.area <= 1, "a fraction above 0, at most 1")
        require(self, "ratio", 1 <= self.ratio < math.inf, "1 or more")

    def __call__(self, key: Any, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """`row` with `image`, float32 (height, width, channels), of at least `size` pixels, brought to `size`."""
        image = row["image"]
        height, width, channels = image.shape
        if min(height, width) < self.size:
            raise InputError(f"an image of {height} x {width} pixels; expected at least {self.size} x {self.size}")
        shape = (self.size, self.size, channels)
        if key is None:
            middle = ((height - self.size) // 2, (width - self.size) // 2, 0)
            return {**row, "image": jax.lax.dynamic_slice(image, middle, shape)}
        to_area, to_ratio, to_place = jax.random.split(key, 3)
        area = jax.random.uniform(to_area, minval=self.area, maxval=1.0) * (height * width)
        bound = math.log(self.ratio)
        ratio = jnp.exp(jax.random.uniform(to_ratio, minval=-bound, maxval=bound))
        # A part that is higher or wider than the image is cut to it.
        sides = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)]), jnp.float32([height, width]))
        corner = jax.random.uniform(to_place, (2,)) * (jnp.float32([height, width]) - sides)
        factor = self.size / sides
        resized = jax.image.scale_and_translate(image, shape, (0, 1), factor, -corner * factor, "linear")
        return {**row, "image": resized}
