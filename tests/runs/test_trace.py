"""`--profile`: which steps are traced, and that the trace can be read."""

from __future__ import annotations

import pytest

from jaxmp.errors import InputError
from jaxmp.runs.trace import StepRange


@pytest.mark.parametrize("text", ["", "5", "5:", "a:b", "0:3", "4:3", "-1:3", "1:2:3"])
def test_what_is_no_range_of_steps_is_bad_input(text):
    with pytest.raises(InputError, match="expected FIRST:LAST, two steps counted from 1"):
        StepRange.parse(text)


@pytest.mark.parametrize(
    ("text", "begin", "fits"), [("1:20", 0, True), ("20:20", 0, True), ("20:21", 0, False), ("5:6", 5, False)]
)
def test_a_range_has_to_be_among_the_steps_of_the_session(text, begin, fits):
    if fits:
        StepRange.parse(text).check(begin, 20)
    else:
        with pytest.raises(InputError, match=f"--profile {text}: the run has 20 steps.* within {begin + 1}:20"):
            StepRange.parse(text).check(begin, 20)
