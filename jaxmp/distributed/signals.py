"""Turns SIGTERM and Ctrl-C into a flag that the training loop reads."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxmp.distributed import processes

SAME_SIGNAL_SECONDS = 10
"""seconds within which the same signal may reach one of several processes a second time"""


@dataclass(eq=False)
class _Flag:
    """The flag of one context."""

    received: threading.Event = field(default_factory=threading.Event)
    acts_from: float = math.inf
    """time from which a further signal has its default effect"""


_open: list[_Flag] = []
"""flags of all contexts that are entered, the outer ones first"""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Context manager in which the first SIGTERM or Ctrl-C sets a flag; a later one has its default effect.

    Yields a function that returns whether the flag is set.

    A signal sets the flags of all contexts around it, and a context inside one whose flag is set begins with it set: a
    loop of runs ends as well, whichever of the two was looking.

    A second signal that follows immediately (with several processes: within SAME_SIGNAL_SECONDS) is ignored, since it
    is the same signal again: Slurm sends it to all processes of a step, and the parent (parent.py) forwards it too.
    With several processes, the handlers stay installed after the context if the flag is set: the repeated signal may
    arrive while the process waits for the others to end.
    """
    flag = _Flag()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield flag.received.is_set
        return
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if not flag.received.is_set():
            acts_from = time.monotonic() + (SAME_SIGNAL_SECONDS if processes.several() else 1)
            for each in _open:
                each.acts_from = acts_from
                each.received.set()
        elif time.monotonic() > flag.acts_from:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    _open.append(flag)  # before it looks at the others: a signal in between sets it, too
    try:
        for outer in _open:
            if outer.received.is_set():
                flag.acts_from = outer.acts_from
                flag.received.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            before[each] = signal.signal(each, handle)
        yield flag.received.is_set
    finally:
        _open.remove(flag)
        if not (flag.received.is_set() and processes.several()):
            for number, handler in before.items():
                signal.signal(number, handler)
