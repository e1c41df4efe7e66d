"""The judges of claims: a verdict follows from the interval alone, and a failed run is never left out."""

from __future__ import annotations

import math

import pytest

from jaxmp.errors import InputError
from jaxmp.studies.claims import (
    CONTRADICTED,
    NOT_AT_THIS_SIZE,
    REPRODUCED,
    Paper,
    Results,
    above,
    below,
    differing,
    exact,
    higher,
    increasing,
    lower,
    near,
    only_first_fails,
    slope_near,
    within,
)

ZEROS, NOISE = [0.0] * 5, [0.01, -0.01, 0.02, -0.02, 0.0]


def seeds(values):
    return dict(enumerate(values))


def moved(by):
    return [by + noise for noise in NOISE]


@pytest.mark.parametrize(
    ("judge", "arms", "verdict"),
    [
        (higher, [moved(1), ZEROS], REPRODUCED),
        (higher, [moved(-1), ZEROS], CONTRADICTED),
        (higher, [moved(0.001), ZEROS], NOT_AT_THIS_SIZE),
        (higher, [[1.0], [0.0]], NOT_AT_THIS_SIZE),  # one seed decides nothing
        (higher, [[1 / 269] * 2, ZEROS[:2]], NOT_AT_THIS_SIZE),
        (higher, [[1.0] * 5, ZEROS], NOT_AT_THIS_SIZE),  # p of the sign test is 2/32
        (higher, [[1.0] * 6, [0.0] * 6], REPRODUCED),  # p is 2/64
        (higher, [ZEROS, ZEROS], NOT_AT_THIS_SIZE),  # equal, which is not above
        (lower, [moved(-1), ZEROS], REPRODUCED),
        (lower, [moved(1), ZEROS], CONTRADICTED),
        (lower, [[None, *moved(-1)[1:]], ZEROS], NOT_AT_THIS_SIZE),  # what fails alone is not better
        (lower, [[None, *moved(-1)[1:]], [None, *ZEROS[1:]]], NOT_AT_THIS_SIZE),
        (lower, [moved(-1), [None, *ZEROS[1:]]], NOT_AT_THIS_SIZE),
        (lower, [[None, *moved(1)[1:]], ZEROS], NOT_AT_THIS_SIZE),  # the failed run may have been the lowest
        (within(0.1), [moved(0), ZEROS], REPRODUCED),
        (within(0.01), [moved(0), ZEROS], NOT_AT_THIS_SIZE),  # an interval that holds 0 shows nothing
        (within(0.1), [moved(1), ZEROS], CONTRADICTED),
        (within(0.1), [[None, *moved(0)[1:]], ZEROS], NOT_AT_THIS_SIZE),
        (within(0.1), [moved(0), [None, *ZEROS[1:]]], NOT_AT_THIS_SIZE),
        (within(0.1), [[None, *moved(1)[1:]], ZEROS], NOT_AT_THIS_SIZE),
        (within(0.0), [ZEROS, ZEROS], NOT_AT_THIS_SIZE),
        (within(0.0), [[0.0] * 6, [0.0] * 6], REPRODUCED),
        (within(0.0, claims=2), [[0.0] * 6, [0.0] * 6], NOT_AT_THIS_SIZE),  # 2/64 is above 2.5 %
        (within(0.02), [moved(0), ZEROS], REPRODUCED),
        (within(0.02, claims=5), [moved(0), ZEROS], NOT_AT_THIS_SIZE),
        (near(1.0, 0.05), [moved(1)], REPRODUCED),
        (near(1.0, 0.01), [moved(1)], NOT_AT_THIS_SIZE),
        (near(1.0, 0.05), [moved(2)], CONTRADICTED),
        (near(1.0, 0.05), [[None, *moved(1)[1:]]], NOT_AT_THIS_SIZE),
        (above(0.5), [moved(1)], REPRODUCED),
        (above(0.5), [[None, None, None, 1.0, 1.01]], NOT_AT_THIS_SIZE),
        (below(0.5), [[None, None, None, 1.0, 1.01]], NOT_AT_THIS_SIZE),
        (above(0.5), [moved(0)], CONTRADICTED),
        (below(0.5), [moved(0)], REPRODUCED),
        (increasing, [moved(0), [1.0] * 5, moved(2)], REPRODUCED),
        (increasing, [moved(0), moved(2), [1.0] * 5], CONTRADICTED),
        (increasing, [moved(0), [0.01] * 5, moved(2)], NOT_AT_THIS_SIZE),
        (increasing, [moved(0), [None, *[1.0] * 4]], NOT_AT_THIS_SIZE),
        (increasing, [moved(0), moved(2), [None, *[1.0] * 4]], NOT_AT_THIS_SIZE),
        (slope_near((1, 2, 3), 0.5, 0.1), [ZEROS, moved(0.5), moved(1)[::-1]], REPRODUCED),
        (slope_near((1, 2, 3), 0.5, 0.1), [ZEROS, moved(1), moved(2)[::-1]], CONTRADICTED),
        (slope_near((1, 3), 0.5, 0.1), [ZEROS, moved(0.5)], CONTRADICTED),
        (slope_near((1, 2), 0.5, 0.1), [ZEROS, [None, *moved(0.5)[1:]]], NOT_AT_THIS_SIZE),
        (differing(0.05), [[1.0] * 8 + ZEROS, [0.0] * 8 + ZEROS], REPRODUCED),
        (differing(0.5), [[1.0] + [0.0] * 19, [0.0] * 20], CONTRADICTED),
        (differing(0.05), [[1.0] + [0.0] * 19, [0.0] * 20], NOT_AT_THIS_SIZE),
        (differing(0.05), [[None] + [1.0] * 8 + ZEROS, [0.0] * 9 + ZEROS], NOT_AT_THIS_SIZE),
        (differing(0.05), [[None], [1.0]], NOT_AT_THIS_SIZE),
        (only_first_fails(0.5), [[None] * 6, [0.0] * 6], REPRODUCED),
        (only_first_fails(0.5), [[None] * 5, ZEROS], NOT_AT_THIS_SIZE),  # the interval of 5 in 5 begins at 48 %
        (only_first_fails(0.5), [[None], [0.0]], NOT_AT_THIS_SIZE),
        (only_first_fails(0.5), [[], []], NOT_AT_THIS_SIZE),
        (only_first_fails(0.5), [[None] * 6, [None, *[0.0] * 5]], NOT_AT_THIS_SIZE),
        (only_first_fails(0.5), [[None, *ZEROS], [0.0] * 6], NOT_AT_THIS_SIZE),
        (only_first_fails(0.5), [[0.0] * 6, [0.0] * 6], CONTRADICTED),
        (exact(lambda value: value == 448), [[448.0]], REPRODUCED),  # one seed is enough
        (exact(lambda value: value == 448), [[449.0] * 6], CONTRADICTED),
        (exact(lambda value: value < 1), [[0.5] * 2], REPRODUCED),
        (exact(lambda value: value == 448), [[448.0, 449.0]], NOT_AT_THIS_SIZE),
        (exact(lambda value: value == 448), [[448.0, None]], NOT_AT_THIS_SIZE),
    ],
)
def test_a_verdict_follows_from_the_interval_and_a_failed_run_counts_against(judge, arms, verdict):
    assert judge([seeds(arm) for arm in arms]).verdict == verdict


def test_a_finding_says_how_many_runs_failed_and_which_step_of_an_order_is_least_certain():
    found = higher([seeds([None, 1.0, 1.1, 1.2]), seeds(ZEROS[:4])])
    assert (found.pairs, found.note) == (3, "1 of 8 runs failed")
    found = increasing([seeds(moved(0)), seeds([5.0] * 5), seeds(moved(5.5))])
    assert found.note == "step 2 of 2" and math.isclose(found.mean, 0.5)
    assert math.isclose(found.confidence, 0.975), "two steps hold together with 95 %"
    assert (
        higher([seeds([1.0] * 5), seeds(ZEROS)]).note
        == "no interval: all 5 differences are equal; fewer than 6 equal ones decide nothing"
    )


def test_flips_are_counted_by_direction_with_the_exact_interval():
    found = differing(0.05)([seeds([1.0] * 3 + [0.0] * 7), seeds([0.0] * 3 + [1.0] + [0.0] * 6)])
    assert found.note == "4 of 10: 3 against 1, McNemar p 0.62"
    # Clopper and Pearson of 4 in 10, by the quantiles of the beta distribution.
    assert (round(found.mean, 3), round(found.low, 3), round(found.high, 3)) == (0.4, 0.122, 0.738)


def test_results_pair_by_seed_and_refuse_an_unknown_metric_with_the_nearest():
    results = Results({"a": {0: {"loss": 2.0}, 1: {"failed": "NaN"}}, "b": {0: {"loss": 1.5}, 1: {"loss": 1.0}}})
    assert results.of("a", "loss") == {0: 2.0, 1: None}
    assert (results.difference("a", "b", "loss").mean, results.mean("b", "loss").pairs) == (0.5, 2)
    lacking = Results({"a": {0: {"loss": 2.0, "step": 1.0}, 1: {"loss": 3.0}, 2: {"failed": "NaN"}}})
    assert lacking.of("a", "step") == {0: 1.0, 1: None, 2: None}, "a run without the metric counts as failed"
    with pytest.raises(InputError, match=r"no arm 'c' in the results"):
        results.of("c", "loss")
    with pytest.raises(InputError, match=r"arm 'a' has no metric 'los'; did you mean 'loss'\?"):
        results.of("a", "los")


def test_a_paper_has_seeds():
    with pytest.raises(InputError, match=r"Paper.seeds = \(\): expected one or more"):
        Paper("", "", "", seeds=(), arms={}, claims=())
