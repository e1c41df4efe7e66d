"""`fingerprint`: what the rows of a split are, in a few numbers, and in what two splits differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxmp.data.source import Source

WHOLE_BYTES = 64 * 2**20
"""a split of at most so many bytes goes by all of them"""

SAMPLED_ROWS = 256
"""rows of a larger split that stand for it, spread evenly"""

CHUNK_ROWS = 4096


def fingerprint(source: Source) -> dict[str, Any]:
    """Describes the rows of a split as JSON.

    Args:
      source: the rows, before the host transforms: those are code.

    Returns:
      `rows`, the number of rows; `sampled`, the number of rows that were read, None if all; and `columns`: the dtype,
      the shape of a row and a digest of the bytes of each column, by name.
    """
    source = getattr(source, "source", source)  # of HostTransformed
    rows = len(source)
    spread = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(np.int64))
    sample = source[spread]
    size = sum(map(_nbytes, sample.values())) / len(spread) * rows
    digests = {name: hashlib.sha256() for name in sample}
    for part in (sample,) if size > WHOLE_BYTES else _chunks(source, rows):
        for name, column in part.items():
            digests[name].update(_bytes(column))
    columns = {
        name: {
            "dtype": "text" if column.dtype.kind in "OSU" else column.dtype.name,
            "shape": list(column.shape[1:]),
            "sha256": digests[name].hexdigest()[:16],
        }
        for name, column in sorted(sample.items())
    }
    return {"rows": rows, "sampled": len(spread) if size > WHOLE_BYTES else None, "columns": columns}


def changed_rows(split: str, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what a split differs from the recorded one, a sentence each; empty if in nothing that was compared."""
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


def _chunks(source: Source, rows: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, rows, CHUNK_ROWS):
        yield source[np.arange(start, min(start + CHUNK_ROWS, rows))]


def _nbytes(column: np.ndarray) -> int:
    return len(_bytes(column))


def _bytes(column: np.ndarray) -> bytes:
    """The bytes of a column; of text and objects, with the length of each row."""
    if column.dtype.kind != "O":
        return np.ascontiguousarray(column).tobytes()
    parts = [of if isinstance(of, bytes) else repr(of).encode() for of in column.ravel()]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
