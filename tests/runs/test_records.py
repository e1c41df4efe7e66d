"""How fast the steps are."""

from __future__ import annotations

import math
import types

import pytest

from jaxmp.runs import records
from jaxmp.runs.curves import examples_per_second, steps_per_second
from jaxmp.runs.records import Pace


def result(*, ready):
    return [types.SimpleNamespace(is_ready=lambda: ready)]


@pytest.fixture
def clock(monkeypatch):
    """The time, which the test sets."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(records.time, "perf_counter", lambda: now.seconds)
    return now


@pytest.mark.parametrize(("ready", "speed"), [(False, 10.0), (True, None)])
def test_compiling_evaluating_and_saving_are_no_time_of_a_step(clock, ready, speed):
    pace = Pace()
    clock.seconds = 30.0  # it compiled, in the call that is back now
    pace.dispatched(0, 10, result(ready=ready))
    clock.seconds = 31.0
    assert pace.reached(10) == speed, "what ran within the call is not timed"
    pace.interrupted()
    clock.seconds = 100.0  # it evaluated
    pace.dispatched(10, 20, result(ready=False))
    clock.seconds = 101.0
    assert pace.reached(20) == 10.0


def test_the_speed_is_that_of_the_last_seconds_and_no_saw_tooth(clock):
    pace = Pace(seconds=5.0)
    pace.dispatched(0, 10, result(ready=False))
    found = []
    for line in range(1, 21):  # each second one is seen late, and the next one early
        clock.seconds = line + 0.8 * (line % 2)
        pace.dispatched(10 * line, 10 * line + 10, result(ready=False))
        found.append(pace.reached(10 * line))
    assert max(found[6:]) / min(found[6:]) < 1.4, "within a line, 1.8 seconds and 0.2 differ ninefold"
    for line in range(21, 41):
        clock.seconds = 20 + (line - 20) / 4
        speed = pace.reached(10 * line)
    assert speed == pytest.approx(40.0), "it forgets what is longer ago"


def test_the_speed_of_a_run_is_the_median_of_the_lines_that_have_one():
    lines = [{"step": 1}, *({"step": i, "examples_per_second": v} for i, v in ((2, 10.0), (3, 30.0), (4, 20.0)))]
    assert examples_per_second(lines) == 20.0 and examples_per_second(lines[:2]) == 10.0
    assert math.isnan(examples_per_second(lines[:1]))
    assert steps_per_second([{"steps_per_second": 4.0}, *lines]) == 4.0
