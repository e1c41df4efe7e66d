"""SIGTERM and Ctrl-C as a flag that training reads."""

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
"""how much later the same signal can reach one of several processes once more"""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within: SIGTERM and Ctrl-C only set a flag, which the yielded function reads; a later one acts as ever.

    What comes at once is the same signal again: Slurm sends it to all processes of a step, and a parent
    (parent.py) hands it on. It may come as late as on the way out, where the other processes are waited for.
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
