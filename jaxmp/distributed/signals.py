"""Turns SIGTERM and Ctrl-C into a flag that the training loop reads."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxmp.distributed import processes

SAME_SIGNAL_SECONDS = 10
"""seconds within which the same signal may reach one of several processes a second time"""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Context manager in which the first SIGTERM or Ctrl-C sets a flag; a later one has its default effect.

    Yields a function that returns whether the flag is set.

    A second signal that follows immediately (with several processes: within SAME_SIGNAL_SECONDS) is ignored, since it
    is the same signal again: Slurm sends it to all processes of a step, and the parent (parent.py) forwards it too.
    With several processes, the handlers stay installed after the context if the flag is set: the repeated signal may
    arrive while the process waits for the others to end.
    """
    received = threading.Event()
    acts_from = math.inf
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield received.is_set
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal acts_from
        if not received.is_set():
            acts_from = time.monotonic() + (SAME_SIGNAL_SECONDS if processes.several() else 1)
            received.set()
        elif time.monotonic() > acts_from:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received.is_set
    finally:
        if not (received.is_set() and processes.several()):
            for number, handler in before.items():
                signal.signal(number, handler)
