"""`Encoded`: the tokens of the texts of a split, encoded once, then memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmp.data.cache import cache_folder, prepare_once
from jaxmp.data.source import Source
from jaxmp.data.transforms import read_rows
from jaxmp.data.vocabulary import Vocabulary
from jaxmp.errors import InputError, nearest

CHUNK_ROWS = 4096
FORMAT = 1
"""number of the layout of the files; another one is encoded anew"""

MAPPED = 2**26
"""tokens of more bytes are memory-mapped rather than read"""


class Texts:
    """The texts of a column, to be iterated several times, a few thousand in memory at a time.

    Args:
      source: the rows.
      column: the column of the texts.
      where: the split's name, for messages.

    Raises: InputError if there is no such column, or it holds no texts.
    """

    def __init__(self, source: Source, column: str, where: str):
        first = read_rows(source, np.arange(1))
        if column not in first:
            raise InputError(
                f"data.column is {column!r}; the {where} split has {', '.join(first)}{nearest(column, first)}"
            )
        self.source, self.column, self._what = source, column, f"data.column is {column!r}, which"
        as_texts(first[column], self._what)

    def __len__(self) -> int:
        return len(self.source)

    def chunks(self) -> Iterator[list[str | bytes]]:
        """The texts in order, a few thousand at a time. Raises InputError for a row that is no text."""
        for start in range(0, len(self), CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, len(self)))
            yield as_texts(read_rows(self.source, rows)[self.column], self._what, first_row=start)

    def __iter__(self) -> Iterator[str | bytes]:
        for chunk in self.chunks():
            yield from chunk

    def identity(self) -> dict[str, Any]:
        """How many texts there are, and the digest of all of them as they are read, as JSON."""
        sha256 = hashlib.sha256()
        for text in self:
            content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            sha256.update(len(content).to_bytes(8, "little") + content)
        return {"rows": len(self), "sha256": sha256.hexdigest()}


def as_texts(column: np.ndarray, what: str, *, first_row: int = 0) -> list[str | bytes]:
    """The texts of a column.

    Args:
      column: texts, an array of strings, bytes or objects (rows,).
      what: the beginning of the message for a column that holds anything else.
      first_row: number of its first row, for the message.

    Raises: InputError if a row is no text.
    """
    if column.dtype.kind not in "OSTU" or column.ndim != 1:
        raise InputError(f"{what} holds {column.dtype}; expected texts")
    texts = column.tolist()
    for row, text in enumerate(texts, first_row):
        if not isinstance(text, str | bytes):
            raise InputError(f"{what} holds {text!r:.60} in row {row}; expected texts")
    return texts


class Encoded:
    """Tokens of texts, one after the other.

    Args:
      tokens: the tokens of all texts, unsigned or int32 (all tokens,).
      ends: where each text ends in `tokens`, int64 (texts,).
      folder: where both are stored, to be opened in another process; None if nowhere.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, folder: Path | None = None):
        self.tokens, self.ends, self.folder = tokens, ends, folder

    def __reduce__(self) -> Any:
        return (Encoded, (self.tokens, self.ends)) if self.folder is None else (_open, (self.folder,))

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text, int64 (texts,)."""
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, text: int) -> np.ndarray:
        """The tokens of one text, int32 (tokens,)."""
        start = self.ends[text - 1] if text else 0
        return self.tokens[start : self.ends[text]].astype(np.int32)


def encode_texts(texts: Texts, vocabulary: Vocabulary) -> Encoded:
    """The tokens of texts, encoded on first use into `cache_folder()`/tokens, or into memory if it cannot be written.

    Raises: InputError as `Vocabulary.encode` does.
    """
    dtype = np.uint8 if vocabulary.size <= 2**8 else np.uint16 if vocabulary.size <= 2**16 else np.int32
    identity = {"format": FORMAT, "texts": texts.identity(), "vocabulary": vocabulary.sha256}
    folder = cache_folder() / "tokens" / digest(identity)

    def build(draft: Path) -> None:
        lengths: list[int] = []
        with open(draft / "tokens.bin", "wb") as file:
            for chunk in texts.chunks():
                encoded = vocabulary.encode(chunk)
                lengths.extend(map(len, encoded))
                file.write(np.concatenate(encoded).astype(dtype).data)
        np.save(draft / "ends.npy", np.cumsum(lengths, dtype=np.int64))
        (draft / "dtype.json").write_text(json.dumps(np.dtype(dtype).name))

    with contextlib.suppress(OSError):
        return prepare_once(folder, build, _open)
    encoded = [tokens.astype(dtype) for chunk in texts.chunks() for tokens in vocabulary.encode(chunk)]
    return Encoded(np.concatenate(encoded), np.cumsum([len(tokens) for tokens in encoded], dtype=np.int64))


def _open(folder: Path) -> Encoded:
    """Reads what `encode_texts` wrote. Raises one of UNREADABLE if it is missing or cut off."""
    ends = np.load(folder / "ends.npy")
    dtype = np.dtype(json.loads((folder / "dtype.json").read_text()))
    count, file = int(ends[-1]), folder / "tokens.bin"
    if file.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, not {count} x {dtype.itemsize}")
    mapped = count * dtype.itemsize > MAPPED
    tokens = np.memmap(file, dtype, "r", shape=(count,)) if mapped else np.fromfile(file, dtype)
    return Encoded(tokens, ends, folder)


def cached_json(kind: str, identity: Mapping[str, Any], make: Any) -> Any:
    """What `make()` returns, JSON, kept in `cache_folder()`/kind under the digest of `identity`, if that can be."""
    folder = cache_folder() / kind / digest(identity)

    def build(draft: Path) -> None:
        (draft / "content.json").write_text(json.dumps(make()))

    with contextlib.suppress(OSError):
        return prepare_once(folder, build, lambda folder: json.loads((folder / "content.json").read_text()))
    return make()


def digest(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
