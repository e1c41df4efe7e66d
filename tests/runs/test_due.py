"""What is due when, and when a session stops."""

from __future__ import annotations

import time

import pytest

from jaxmp.experiment.settings import Loop
from jaxmp.runs.due import Due, Interruption


def stops(due: Due, most: int = 1000) -> list[int]:
    found = [0]
    while found[-1] < due.last:
        found.append(due.next_stop(found[-1], most))
    return found[1:]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (None, [10, 20, 25]),
        ((3, 4), [2, 3, 4, 10, 20, 25]),
        ((1, 1), [1, 10, 20, 25]),
        ((10, 11), [9, 10, 11, 20, 25]),
        ((24, 25), [10, 20, 23, 24, 25]),
    ],
)
def test_each_step_of_a_trace_is_a_dispatch_of_its_own(profile, expected):
    assert stops(Due(Loop(log_every=10), per_epoch=1000, last=25, profile=profile)) == expected


@pytest.mark.parametrize(
    ("signalled", "minutes", "asked", "why"),
    [
        (False, None, False, ""),
        (True, None, True, ""),
        (False, 2.5, True, " after 2.5 minutes (loop.max_minutes)"),
        (False, 3.5, False, ""),
    ],
)
def test_a_session_stops_after_a_signal_or_when_its_time_is_up(signalled, minutes, asked, why):
    stop = Interruption(lambda: signalled, time.monotonic() - 180, minutes)
    assert (stop.asked(), stop.why) == (asked, why)
