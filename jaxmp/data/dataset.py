"""What every dataset is: named splits of rows, and how they are batched, scaled and augmented."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

from jaxmp.data.augment import Augment
from jaxmp.data.source import Source
from jaxmp.errors import InputError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Dataset(abc.ABC):
    """Rows with a split for training, one for validation and one for testing."""

    batch_size: int = 64
    """Rows of a training batch, over all devices together."""
    eval_batch_size: int = 512
    """Rows of an evaluation batch, over all devices together."""
    images: tuple[str, ...] = ("image",)
    """Keys that hold images: scaled (uint8 / 255), normalised, and augmented while training."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from scaled images: one number, or one a channel."""
    std: tuple[float, ...] = (1.0,)
    """Divides scaled images: one number, or one a channel."""
    augment: Augment = Augment()
    """Random changes of training images."""
    device_limit: int = 1024
    """MiB up to which a split is kept on the device; a larger one is streamed."""
    workers: int = 0
    """Processes that read a streamed split; 0 reads in threads."""

    def __post_init__(self):
        for name, alone in (("images", str), ("mean", float | int), ("std", float | int)):
            value = getattr(self, name)
            if isinstance(value, alone):
                raise InputError(f"data.{name} is {value!r}; expected a tuple, ({value!r},)")
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("device_limit", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"data.{name} is {getattr(self, name)}; expected {least} or more")
        if not all(value > 0 for value in self.std):
            raise InputError(f"data.std is {self.std}; expected numbers above 0")

    @abc.abstractmethod
    def source(self, split: Split) -> Source:
        """The rows of one split. Raises InputError where it is missing or cannot be read."""
