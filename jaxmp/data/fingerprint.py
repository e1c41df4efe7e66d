"""`fingerprint`: what the rows of a split are, in a few numbers, and in what two splits differ."""

from __future__ import annotations

import datetime
import hashlib
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from jaxmp.data.pipeline import read_whole
from jaxmp.data.source import Source
from jaxmp.data.transforms import HostTransformed, read_rows

WHOLE_BYTES = 64 * 2**20
"""a split of at most so many bytes goes by all of them"""

SAMPLED_ROWS = 256
"""rows of a larger split that stand for it, spread evenly"""

CHUNK_ROWS = 4096


def fingerprint(source: Source, *, workers: int = 0) -> dict[str, Any]:
    """Describes the rows of a split as JSON.

    Args:
      source: the rows, before the host transforms: those are code.
      workers: processes that read a split that goes by all of its bytes; 0 reads in this thread.

    Returns:
      `rows`, the number of rows; `sampled`, the number of rows that were read, None if all; and `columns`: the dtype,
      the shape of a row and a digest of the bytes of each column, by name. Of texts that were split into tokens,
      `vocabulary`, the digest of the vocabulary.
    """
    source = source.source if isinstance(source, HostTransformed) else source
    rows = len(source)
    spread = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(np.int64))
    sample = read_rows(source, spread)
    size = sum(map(_nbytes, sample.values())) / len(spread) * rows
    digests = {name: hashlib.sha256() for name in sample}
    for part in (sample,) if size > WHOLE_BYTES else read_whole(source, CHUNK_ROWS, workers=workers):
        for name, column in part.items():
            digests[name].update(_bytes(column))
    columns = {
        name: {
            "dtype": "text" if column.dtype.kind in "OSTU" else column.dtype.name,
            "shape": list(column.shape[1:]),
            "sha256": digests[name].hexdigest()[:16],
        }
        for name, column in sorted(sample.items())
    }
    found = {"rows": rows, "sampled": len(spread) if size > WHOLE_BYTES else None, "columns": columns}
    vocabulary = getattr(source, "vocabulary_sha256", None)
    return found if vocabulary is None else {**found, "vocabulary": vocabulary}


def digest(column: np.ndarray) -> str:
    """The SHA-256 of a column's content, 64 hexadecimal digits; of text and objects too."""
    return hashlib.sha256(_bytes(column)).hexdigest()


def changed_rows(split: str, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what a split differs from the recorded one, a sentence each; empty if in nothing that was compared."""
    before, after = recorded.get("vocabulary"), now.get("vocabulary")
    if before != after:
        return [f"the tokens of {split} are of another vocabulary: its digest is {after} (was {before})"]
    if recorded["rows"] != now["rows"]:
        return [f"{split} has {now['rows']} rows (was {recorded['rows']})"]
    was, is_, found = recorded["columns"], now["columns"], []
    for name in sorted({*was, *is_}):
        if name not in is_:
            found.append(f"{split} has no column {name!r} any more")
        elif name not in was:
            found.append(f"{split} has a new column {name!r}")
        elif _kind(was[name]) != _kind(is_[name]):
            found.append(f"column {name!r} of {split} is {_kind(is_[name])} (was {_kind(was[name])})")
        elif was[name] != is_[name]:
            found.append(f"column {name!r} of {split} has other values")
    return found


def _kind(column: Mapping[str, Any]) -> str:
    return f"{column['dtype']}{column['shape']}"


def _nbytes(column: np.ndarray) -> int:
    return len(_bytes(column))


def _bytes(column: np.ndarray) -> bytes:
    """The bytes of a column that mean something, the same in every process."""
    if column.dtype.names is not None:  # with gaps between the fields, perhaps
        return b"".join(_bytes(column[name]) for name in column.dtype.names)
    if column.dtype.char in "gG":  # longdouble: 10 bytes in 16
        high = column.astype(np.complex128 if column.dtype.kind == "c" else np.float64)
        return high.tobytes() + (column - high).astype(high.dtype).tobytes()
    if column.dtype.kind not in "OT":
        return np.ascontiguousarray(column).tobytes()
    return _framed(map(_of_object, column.ravel().tolist()))


def _of_object(value: Any) -> bytes:
    """The bytes of a number, a text, or of a container of them; of any other object its class alone."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray):  # not its repr, which leaves out what is in the middle
        return f"{value.dtype.name}{value.shape}".encode() + _bytes(value)
    if isinstance(value, list | tuple):
        return _framed(map(_of_object, value))
    if isinstance(value, Mapping):
        return _framed(map(_of_object, value.items()))
    if isinstance(value, Set):
        return _framed(sorted(map(_of_object, value)))
    if value is None or isinstance(value, str | numbers.Number | datetime.date | datetime.time | datetime.timedelta):
        return repr(value).encode()
    return type(value).__qualname__.encode()  # a repr may hold an address


def _framed(parts: Iterable[bytes]) -> bytes:
    """Joins parts, each with its length."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
