"""`TextBytes`: running text, cut into windows of bytes for language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmp.data.dataset import Dataset, Split
from jaxmp.data.source import Columns
from jaxmp.data.tfds import TFDS
from jaxmp.errors import InputError, nearest, whole_number


@dataclass(frozen=True)
class TextBytes(Dataset):
    """The texts of a dataset that TFDS has prepared, in windows of bytes that do not overlap.

    A row is a window of one text: `tokens`, its bytes, and `next_tokens`, for each of them the byte that follows, both
    int32 (length,). So each byte of a text but the first is a target once. A text's last window is filled up with bytes
    0, whose `next_tokens` are -1.
    """

    name: str = "tiny_shakespeare"
    """Name of a prepared dataset with texts. See `jaxmp data list`."""
    column: str = "text"
    """Column of the texts."""
    length: int = 64
    """Bytes in a window."""
    train: str = "train"
    """Texts to train on, in TFDS's split syntax."""
    validation: str = "validation"
    """Texts to validate on, in the same syntax."""
    test: str = "test"
    """Texts to test on, in the same syntax."""
    version: str | None = None
    """Version of the dataset, such as "1.0.0"; by default the newest that is prepared."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        object.__setattr__(self, "length", whole_number("data.length", self.length, 1))

    def source(self, split: Split) -> Columns:
        """The windows of one split, texts of less than two bytes left out.

        Raises InputError as `TFDS.source` does, or if there is no such column, it holds no texts, or all are too short.
        """
        texts = TFDS(
            name=self.name, train=self.train, validation=self.validation, test=self.test, version=self.version
        ).source(split)
        if self.column not in texts.columns:
            has = ", ".join(texts.columns)
            raise InputError(
                f"data.column is {self.column!r}; {self.name} has {has}{nearest(self.column, texts.columns)}"
            )
        column = texts[np.arange(len(texts))][self.column]
        if column.dtype != object or not isinstance(column[0], bytes | str):
            raise InputError(f"data.column is {self.column!r}, which holds {column.dtype}; expected texts")
        columns = [windows(_bytes(text), self.length) for text in column if len(text) > 1]
        if not columns:
            raise InputError(f"{self.name}, {split}: no text of {self.column!r} has two bytes or more")
        return Columns({name: np.concatenate([each[name] for each in columns]) for name in columns[0]})


def windows(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Windows of a sequence of tokens, int (n,), n at least 2, that do not overlap.

    Returns:
      `tokens` and `next_tokens`, both int32 (windows, length). The last window is filled up with 0 and -1.
    """
    rows = -(-(len(tokens) - 1) // length)
    inputs, targets = np.zeros(rows * length, np.int32), np.full(rows * length, -1, np.int32)
    inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return {"tokens": inputs.reshape(rows, length), "next_tokens": targets.reshape(rows, length)}


def _bytes(text: Any) -> np.ndarray:
    return np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8)
