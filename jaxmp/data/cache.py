"""The cache: datasets that jaxmp prepares, and decoded splits, under $XDG_CACHE_HOME/jaxmp or ~/.cache/jaxmp.

A decoded split is a folder of .npy files, memory-mapped when read, and `columns.json`, which says what they hold.
A column of text is stored as two arrays: the bytes of all rows, and the position at which each row ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np

from jaxmp.data.source import Columns
from jaxmp.errors import local_path

T = TypeVar("T")
DESCRIPTION = "columns.json"
UNREADABLE = (OSError, ValueError, EOFError, LookupError)  # what json and NumPy raise for missing and damaged files


def cache_folder() -> Path:
    """The folder `$XDG_CACHE_HOME/jaxmp`, else `~/.cache/jaxmp`. It need not exist.

    Raises: InputError if there is no home folder.
    """
    return (
        local_path("cache folder, from $XDG_CACHE_HOME or HOME,", os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        / "jaxmp"
    )


def prepare_once(folder: Path, build: Callable[[Path], Any], read: Callable[[Path], T]) -> T:
    """Returns `read(folder)`; first builds the folder if it is missing or damaged.

    One process builds and the others wait for it. The folder appears whole or not at all, even if a process is killed.

    Args:
      folder: where the result is kept.
      build: `build(draft)` fills an empty folder, which is then renamed to `folder`.
      read: `read(folder)` raises one of UNREADABLE if the folder is missing or damaged.

    Raises:
      OSError: the folder cannot be written. Other exceptions of `build` are passed on.
    """
    with contextlib.suppress(*UNREADABLE):
        return read(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: two may build at once, the last one counts
            fcntl.flock(lock, fcntl.LOCK_EX)
        # A killed process loses the lock: a draft that is there now is nobody's.
        with contextlib.suppress(*UNREADABLE):
            return read(folder)
        draft = folder.with_name(folder.name + ".draft")
        for left_over in (draft, folder):
            shutil.rmtree(left_over, ignore_errors=True)
        draft.mkdir()
        try:
            build(draft)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return read(folder)


class Text:
    """Byte strings of any length as one array of bytes: `text[indices]` is an object array of bytes."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        self.content, self.ends = content, ends  # uint8 (bytes,), int64 (rows,)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        rows = np.arange(len(self))[indices]
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        found = np.empty(rows.shape, object)
        found[:] = [bytes(self.content[start:end]) for start, end in zip(starts, self.ends[rows], strict=True)]
        return found


class CachedColumns(Columns):
    """The columns of a folder, memory-mapped. Another process receives only the folder's name and maps them itself."""

    def __init__(self, folder: Path):
        """Raises one of UNREADABLE if a file is missing or short, or differs from what `columns.json` says."""
        self.folder = folder
        described = json.loads((folder / DESCRIPTION).read_text())
        super().__init__({name: _load(folder, name, **column) for name, column in described.items()})

    def __reduce__(self):
        return CachedColumns, (self.folder,)


def save_columns(folder: Path, rows: int, chunks: Iterable[dict[str, np.ndarray]]) -> None:
    """Writes `chunks`, of `rows` rows in total, into `folder`. One chunk, and all text, is in memory at a time.

    Raises OSError if the disk is full: the files are plain, since writing through a memory map would be a SIGBUS. And
    if a column has a dtype that .npy files lack, such as bfloat16.
    """
    described: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[bytes]] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for chunk in chunks:
            for name, array in chunk.items():
                if array.dtype == object:
                    texts.setdefault(name, []).extend(array)
                    continue
                if array.dtype.isbuiltin == 2:
                    raise OSError(f"column {name!r} is {array.dtype}, which .npy files do not hold")
                if name not in files:
                    described[name] = {"dtype": array.dtype.str, "shape": [rows, *array.shape[1:]]}
                    files[name] = stack.enter_context(open(_file(folder, name), "wb"))
                    _write_header(files[name], **described[name])
                files[name].write(np.ascontiguousarray(array).data)
    for name, strings in texts.items():
        np.save(_file(folder, name), np.frombuffer(b"".join(strings), np.uint8))
        np.save(_file(folder, name + ".ends"), np.cumsum([len(string) for string in strings], dtype=np.int64))
        described[name] = {"dtype": "bytes", "shape": [rows]}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1))


def _write_header(file: Any, dtype: str, shape: list[int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": tuple(shape)})


def _load(folder: Path, name: str, dtype: str, shape: list[int]) -> np.ndarray | Text:
    if dtype == "bytes":
        ends = _load_array(folder, name + ".ends", "<i8", shape)
        return Text(_load_array(folder, name, "|u1", [int(ends[-1])]), ends)
    return _load_array(folder, name, dtype, shape)


def _load_array(folder: Path, name: str, dtype: str, shape: list[int]) -> np.ndarray:
    array = np.load(_file(folder, name), mmap_mode="r")
    if (array.dtype.str, list(array.shape)) != (dtype, shape):
        raise ValueError(f"{name} is {array.dtype.str} {array.shape}, not {dtype} {shape}")
    return array


def _file(folder: Path, name: str) -> Path:
    return folder / f"{quote(name, safe='')}.npy"
