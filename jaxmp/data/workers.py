"""Sends a source of rows to other processes: with the code of its config, and with memory-mapped arrays by name."""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any

import cloudpickle
import numpy as np

from jaxmp.data.source import Source
from jaxmp.errors import InputError


def sendable(source: Source, workers: int) -> Source:
    """A source with the same rows, made for `workers` other processes.

    It is pickled here, once. Classes and functions of a config file, which other processes cannot import, go along with
    it. Of a memory-mapped array only the file's name and the place in it go along, so that it is in memory once.

    Raises: InputError if the source cannot be pickled, since it holds an open file, a lock or a connection, say.
    """
    _send_configs_by_value()
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(source)
    except Exception as error:  # pickling runs code of the source's own
        raise InputError(
            f"data.workers = {workers}: the source, a {type(source).__name__}, cannot be sent to other processes "
            f"({type(error).__name__}: {str(error)[:200]}); expected one that opens files and connections when it is "
            "first read, or data.workers = 0"
        ) from error
    return _Sent(source, buffer.getvalue())


class _Sent:
    """A source that is pickled already."""

    def __init__(self, source: Source, pickled: bytes):
        self.source, self.pickled = source, pickled
        self.thread_safe = getattr(source, "thread_safe", False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.source[indices]

    def __reduce__(self) -> Any:
        return pickle.loads, (self.pickled,)


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            place = _place_in_file(obj)
            return super().reducer_override(obj) if place is None else (_map, place)
        return super().reducer_override(obj)


def _place_in_file(array: np.ndarray) -> tuple[Any, ...] | None:
    """The file, offset, dtype, shape and strides of a memory-mapped array or of a view of one; None for any other."""
    root: Any = array
    mapped = None
    while isinstance(root, np.ndarray):
        mapped = root if isinstance(root, np.memmap) else mapped  # the last: the whole map, not a view
        root = root.base
    if mapped is None or mapped.filename is None or mapped.mode == "c" or array.dtype.hasobject or not array.size:
        return None  # "c": what was written to the map is not in the file
    least, _ = np.lib.array_utils.byte_bounds(array)
    start, _ = np.lib.array_utils.byte_bounds(mapped)
    first = array.__array_interface__["data"][0]  # of element 0, which negative strides put behind `least`
    lowest = mapped.offset + least - start
    return str(mapped.filename), lowest, first - least, array.dtype, array.shape, array.strides


def _map(file: str, lowest: int, first: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    whole = np.memmap(file, np.uint8, "r")
    return np.ndarray(shape, dtype, whole, lowest + first, strides)


def _send_configs_by_value() -> None:
    for module in list(sys.modules.values()):
        if "__source__" in getattr(module, "__dict__", {}):  # as `ConfigFile` leaves it in the modules that it makes
            cloudpickle.register_pickle_by_value(module)
