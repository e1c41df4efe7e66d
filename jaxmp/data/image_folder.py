"""`ImageFolder`, a dataset of image files in folders, one a class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxmp.data.dataset import Prepare, Split
from jaxmp.data.images import Images
from jaxmp.data.source import Columns
from jaxmp.data.transforms import apply_transforms
from jaxmp.errors import InputError, local_path, nearest, require, whole_number

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""of the files that are taken for images"""

CROP = 0x63726F70
"""folded into the key of the step's data for `crop`"""


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Images):
    """Image files, a folder for each split and in it one for each class: `folder/train/cat/1.jpg`.

    A batch has `image`, uint8 (rows, height, width, channels), and `label`, the number of the class among the sorted
    names of the folders of the training split, from 0 on. Files are read when a batch needs them, in several threads,
    and kept nowhere.
    """

    folder: str
    """Folder with a folder for each split."""
    train: str = "train"
    """Folder in it with the images to train on."""
    validation: str = "validation"
    """Folder in it with the images to validate on; it may be missing."""
    test: str = "test"
    """Folder in it with the images to test on; it may be missing."""
    size: tuple[int, int] | None = None
    """Height and width that images are brought to, after they are cropped to this shape around their middle; by default
    all have to have one size."""
    channels: Literal[1, 3] = 3
    """Channels that images are brought to: 1 (grey) or 3 (red, green, blue)."""
    crop: Any = None
    """RandomResizedCrop(size=224), say: a random part of each image in training, its middle in evaluation, at last."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        require(self, "crop", self.crop is None or callable(self.crop), "RandomResizedCrop(size=224), say, or None")
        require(self, "channels", self.channels in (1, 3), "1 or 3")
        if self.size is not None:
            require(self, "size", isinstance(self.size, tuple) and len(self.size) == 2, "(height, width), or None")
            object.__setattr__(self, "size", tuple(whole_number("data.size", side, 1) for side in self.size))

    def prepare(self, *, train: bool) -> Prepare:
        """As `Images.prepare`, and then `crop`."""
        whole = super().prepare(train=train)
        if self.crop is None:
            return whole

        def apply(batch: dict[str, Any], key: Any, global_index: jax.Array | None = None) -> dict[str, Any]:
            of_crop = jax.random.fold_in(key, CROP) if train else None
            return apply_transforms((self.crop,), whole(batch, key, global_index), of_crop, global_index)

        return apply

    def source(self, split: Split) -> Columns | None:
        """The images of a split, read when they are indexed, and their labels, int32; None if it has no folder.

        Raises InputError if there are no training images, or a folder is of a class that the training split lacks. When
        rows are read: if a file is no image, is damaged, has more than 8 bits a channel, or, without `size`, is of
        another size than the first.
        """
        name = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        folder = local_path("data.folder", self.folder) / name
        if not folder.is_dir():
            if split != "train":
                return None
            there = sorted(path.name for path in folder.parent.glob("*/")) if folder.parent.is_dir() else []
            raise InputError(
                f"data.folder {self.folder!r}: no folder {name!r} in it, with the images to train on"
                + (f"; there is {', '.join(there[:9])}{nearest(name, there)}" if there else "")
            )
        classes = {each: number for number, each in enumerate(self.classes())}
        files: list[Path] = []
        labels: list[int] = []
        for of_class in _folders(folder):
            if of_class.name not in classes:
                raise InputError(
                    f"{of_class}: {self.train!r} has no class {of_class.name!r}, only {', '.join(classes)}"
                    f"{nearest(of_class.name, classes)}"
                )
            of_images = sorted(file for file in of_class.iterdir() if file.suffix.lower() in SUFFIXES)
            files += of_images
            labels += [classes[of_class.name]] * len(of_images)
        if not files:
            raise InputError(f"{folder} has no images in folders of classes; expected {name}/CLASS/IMAGE.png, say")
        return Columns({"image": _Images(files, self.size, self.channels), "label": np.array(labels, np.int32)})

    def classes(self) -> list[str]:
        """The classes, in the order of their numbers: the names of the folders of the training split."""
        return [folder.name for folder in _folders(local_path("data.folder", self.folder) / self.train)]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


class _Images:
    """A column of image files: `column[indices]` is uint8 (n, height, width, channels)."""

    def __init__(self, files: list[Path], size: tuple[int, int] | None, channels: int):
        self.files, self.channels = files, channels
        self.size = size or read_image(files[0], None, channels).shape[:2]
        self.resize = size is not None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        images = np.empty((len(indices), *self.size, self.channels), np.uint8)
        for image, index in zip(images, indices, strict=True):
            file = self.files[index]
            found = read_image(file, self.size if self.resize else None, self.channels)
            if found.shape != image.shape:
                raise InputError(
                    f"{file} is {found.shape[0]} x {found.shape[1]} pixels, and {self.files[0]} {self.size[0]} x "
                    f"{self.size[1]}; expected images of one size, or data.size, which all are brought to"
                )
            image[...] = found
        return images


def read_image(file: Path, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """The pixels of an image file, uint8 (height, width, channels); cropped and resized to `size`, unless it is None.

    The crop is the largest around the middle that has the shape of `size`; the resampling is bilinear, with
    antialiasing. Raises InputError, with the file's name, if it is damaged, no image, or of more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            mode = _stored_mode(opened)
            if mode in ("I", "F") or ";16" in mode:
                raise InputError(
                    f"{file} has pixels of Pillow's mode {mode}, which 8 bits do not hold; expected 8 bits a "
                    "channel: scale its values to 0 to 255, and save it again"
                )
            image = opened.convert("L" if channels == 1 else "RGB")
            if size is not None:
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(image.height, image.width, channels)
    except InputError:  # of the mode
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as an image ({error}); copy it again, or remove it") from error


def _stored_mode(image: Any) -> str:
    """Pillow's mode of the pixels in a file, with ;16 where `image.mode` has several channels of 8 bits for them."""
    for tile in image.tile:
        codec, arguments = tile[0], tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if codec.startswith("ppm") and arguments[1] > 255:
            return f"{image.mode};16"
        if re.search(r";16[BLN]", str(arguments[:1])):  # but "BGR;16" has 5 or 6 bits a channel
            return arguments[0]
    return image.mode
