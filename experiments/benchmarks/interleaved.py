"""Times several functions in one process, in interleaved rounds, so that other load affects all of them alike.

Compare the ratios rather than the times: that of the fastest rounds, and the median of the ratios of single rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Run = Callable[[int], float]
"""runs a number of steps, waits for them, and returns the seconds of one"""


def timed(steps: Callable[[int], Any]) -> Run:
    """Times a function that makes a number of steps, and waits for them."""

    def run(count: int) -> float:
        began = time.perf_counter()
        steps(count)
        return (time.perf_counter() - began) / count

    return run


def runs_here(name: str, run: Run, steps: int = 1) -> bool:
    """Whether first steps run; says so where they cannot, as torch's LSTM and Keras's attention in float16 on a CPU."""
    try:
        run(steps)
    except (RuntimeError, ValueError) as error:
        print(f"left out: {name}, {str(error).partition(chr(10))[0]}", flush=True)
        return False
    return True


def interleave(runs: Mapping[str, Run], *, rounds: int, seconds: float, most: int = 5000) -> dict[str, list[float]]:
    """Runs all of `runs` in every round, in alternating order; returns the seconds of a step in each round, by name.

    Args:
      runs: what to time, by name. Each is warmed up first.
      rounds: number of rounds.
      seconds: about how long the fastest of them runs in a round.
      most: the most steps in a round.
    """
    for run in runs.values():
        run(2)
    steps = max(1, min(most, int(seconds / min(run(2) for run in runs.values()))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            times[name].append(runs[name](steps))
    return times


def summary(times: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Returns of each name the least and the median microseconds, and the same as a ratio to those of `baseline`."""
    base = times[baseline]
    return {
        name: {
            "min_us": round(1e6 * min(each), 2),
            "median_us": round(1e6 * statistics.median(each), 2),
            "ratio": round(min(each) / min(base), 4),
            "median_ratio": round(statistics.median(a / b for a, b in zip(each, base, strict=True)), 4),
        }
        for name, each in times.items()
    }


def load() -> list[float]:
    """Returns how many processes wanted a core in the last 1 and 5 minutes; more than the cores is a busy machine."""
    return [round(each, 2) for each in os.getloadavg()[:2]]
