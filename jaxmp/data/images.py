"""`Images`, the base of datasets with image columns: scaled, normalised and augmented on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp.data.augment import Augment
from jaxmp.data.dataset import Dataset, Prepare
from jaxmp.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class Images(Dataset):
    """A dataset that may have columns of images, each (rows, height, width, channels)."""

    images: tuple[str, ...] | None = None
    """Columns that hold images, to be scaled, normalised and augmented; by default `image`, if the data has it."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from images, after uint8 is scaled to 0 to 1: one number, or one per channel."""
    std: tuple[float, ...] = (1.0,)
    """Divides images, after the mean is subtracted: one number, or one per channel."""
    augment: Augment = Augment()
    """Random changes of training images."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        for name, alone in (("images", str), ("mean", float | int), ("std", float | int)):
            value = getattr(self, name)
            if isinstance(value, alone):
                raise InputError(f"data.{name} is {value!r}; expected a tuple, ({value!r},)")
        if not all(value > 0 for value in self.std):
            raise InputError(f"data.std is {self.std}; expected numbers above 0")

    def prepare(self, *, train: bool) -> Prepare:
        """As `Dataset.prepare`, with the images prepared before the `transforms` see them.

        Each column of `images` becomes float32: uint8 is divided by 255, then the mean is subtracted and the result
        divided by the standard deviation, and, if `train`, it is augmented. The images of one row are changed alike.
        Raises InputError if a column named in `images` is missing or holds no images, or if mean, std or augment is set
        although there are no images.
        """
        transform = super().prepare(train=train)
        augment = self.augment if train else Augment()

        def apply(batch: dict[str, Any], key: Any, global_index: jax.Array | None = None) -> dict[str, Any]:
            images = {name: self._normalise(name, batch) for name in self._image_columns(batch)}
            if images and augment != Augment():
                index = global_index
                if index is None:
                    index = jnp.arange(len(next(iter(images.values()))))
                keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
                images = {name: jax.vmap(augment)(keys, image) for name, image in images.items()}
            return transform({**batch, **images}, key, global_index)

        return apply

    def _image_columns(self, batch: dict[str, Any]) -> tuple[str, ...]:
        if self.images is not None:
            return self.images
        if "image" in batch:
            return ("image",)
        for name, unused in (("mean", (0.0,)), ("std", (1.0,)), ("augment", Augment())):
            if getattr(self, name) != unused:
                raise InputError(
                    f"data.{name} is {getattr(self, name)}, and the data has no column 'image', only "
                    f"{', '.join(batch)}; expected data.images to name the columns that hold images"
                )
        return ()

    def _normalise(self, name: str, batch: dict[str, Any]) -> jax.Array:
        if name not in batch:
            raise InputError(f"data.images names {name!r}; the data has {', '.join(batch)}{nearest(name, batch)}")
        image = batch[name]
        channels = image.shape[-1] if image.ndim == 4 else None
        if channels is None or {len(self.mean), len(self.std)} - {1, channels}:
            raise InputError(
                f"{self._which(name)}, of shape {image.shape}; expected (batch, height, width, channels), with "
                f"data.mean {self.mean} and data.std {self.std} one number, or one per channel"
                + ("" if channels else "; data.images=() if no column holds images")
            )
        scale = 255.0 if image.dtype == jnp.uint8 else 1.0
        return (image.astype(jnp.float32) / scale - jnp.float32(self.mean)) / jnp.float32(self.std)

    def _which(self, name: str) -> str:
        return f"data.images names {name!r}" if self.images is not None else f"data.images is by default {name!r}"
