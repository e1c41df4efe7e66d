"""Sources that are sent to other processes, and sources that one thread alone may read."""

import gc
import os
import signal
import sqlite3
import sys
import threading
import weakref

import cloudpickle
import numpy as np
import pytest

from jaxmp import InputError, RunFailed
from jaxmp.data.pipeline import Batches, stream
from jaxmp.data.source import Columns
from jaxmp.data.transforms import HostTransformed
from jaxmp.data.workers import sendable


def sent(columns):
    """The columns as another process gets them, and the number of bytes that were sent."""
    rebuild, (pickled,) = sendable(Columns(columns), 1).__reduce__()
    return rebuild(pickled).columns, len(pickled)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[100:],
        lambda x: np.asarray(x)[::-2],
        lambda x: x[:, 3],
        lambda x: x.T[:, ::3].T,
        lambda x: x.view(np.uint32),
        lambda x: x[5:500].reshape(-1, 5),
    ],
)
def test_a_memory_mapped_array_is_sent_by_name(view, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(1000, 10)).astype(np.float32))
    x = view(np.load(tmp_path / "x.npy", mmap_mode="r"))
    columns, size = sent({"x": x})
    assert size < 2000
    assert columns["x"].dtype == x.dtype and np.array_equal(columns["x"], x)


def test_arrays_whose_values_are_not_in_a_file_are_sent_whole(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(1000, np.float32))
    changed = np.load(tmp_path / "x.npy", mmap_mode="c")
    changed[3] = 7
    columns, _ = sent({"x": changed, "y": np.arange(3)})
    assert columns["x"][3] == 7 and columns["y"].tolist() == [0, 1, 2]


class Rows:
    def __init__(self, held):
        self.held = held

    def __len__(self):
        return 10

    def __getitem__(self, indices):
        return {"thread": np.full(len(indices), threading.get_ident() % 2**31)}


@pytest.mark.parametrize("held", [lambda path: open(path, "w"), lambda path: threading.Lock(), sqlite3.connect])
def test_a_source_that_cannot_be_sent_is_one_message(held, tmp_path):
    source = Rows(held(tmp_path / "rows"))
    with pytest.raises(InputError, match=r"data.workers = 2: the source, a Rows, cannot be sent .*data.workers = 0"):
        next(stream(source, Batches(10, 5, 0), 0, 2, workers=2))
    getattr(source.held, "close", lambda: None)()


def test_a_source_is_read_by_the_thread_that_trains_unless_it_says_otherwise():
    here = threading.get_ident() % 2**31
    assert {int(n) for b in stream(Rows(None), Batches(10, 5, 0), 0, 6) for n in b["thread"]} == {here}

    class Safe(Rows):
        thread_safe = True

    assert here not in {int(n) for b in stream(Safe(None), Batches(10, 5, 0), 0, 6) for n in b["thread"]}


class Killed(Rows):
    def __getitem__(self, indices):
        if os.getpid() != self.held[0] and 7 in indices:
            self.held[1](*self.held[2:])
        return {"x": np.ones(len(indices))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "killed by SIGKILL, as the system does when memory runs out",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "was killed by SIGTERM"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
)
def test_a_killed_worker_is_one_message_and_leaves_no_shared_memory(ends, message):
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(RunFailed, match=message):
        list(stream(Killed((os.getpid(), ends)), Batches(10, 5, 0), 0, 20, workers=2))
    cloudpickle.unregister_pickle_by_value(module)
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")} == set()


def test_what_an_earlier_stream_left_in_cycles_is_freed_before_processes_are_made(monkeypatch):
    class Left:
        pass

    left, seen = Left(), []
    left.itself, freed = left, weakref.ref(left)

    def sends(source, workers):
        seen.append(freed())
        raise InputError("not sent")

    monkeypatch.setattr("jaxmp.data.pipeline.sendable", sends)
    gc.disable()
    try:
        del left
        with pytest.raises(InputError, match="not sent"):
            next(stream(Rows(None), Batches(10, 5, 0), 0, 2, workers=2))
    finally:
        gc.enable()
    assert seen == [None]


def fails(indices):
    raise OSError("bad sector")


READS = {
    "raises": (fails, r"Reads\[indices\] raised OSError: bad sector \(test_workers.py, line \d+\)"),
    "no dict": (lambda indices: [indices], r"Reads\[indices\] returned list; expected a dict of arrays"),
    "None": (lambda indices: None, "returned None; expected a dict"),
    "a list": (lambda indices: {"x": list(indices)}, "returned list as 'x'; expected an array"),
    "one row": (
        lambda indices: {"x": indices[:1]},
        r"returned 'x' of shape \(1,\) for 5 indices; expected a row for each",
    ),
    "a number": (lambda indices: {"x": np.float32(1)}, r"returned 'x' of shape \(\) for 1 indices"),
    "out of range": (lambda indices: {"x": np.arange(3)[indices]}, "raised IndexError"),
}


class Reads(Rows):
    def __getitem__(self, indices):
        return self.held(indices)


@pytest.mark.parametrize("kind", READS)
def test_a_source_that_cannot_be_read_is_one_message_with_its_own_line(kind):
    read, message = READS[kind]
    for wrapped in (lambda source: source, lambda source: HostTransformed(source, ())):
        with pytest.raises(InputError, match=message):
            list(stream(wrapped(Reads(read)), Batches(10, 5, 0), 0, 2))


def test_a_source_without_memory_is_no_bad_input():
    def read(indices):
        raise MemoryError("10 GiB")

    with pytest.raises(MemoryError):
        list(stream(Reads(read), Batches(10, 5, 0), 0, 2))
