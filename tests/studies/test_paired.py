"""Paired results: exact where everything can be enumerated, and honest about few seeds."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxmp.studies.paired import mcnemar, method, paired


@pytest.mark.parametrize("values", [[0.3, -0.1], [0.3, -0.1, 0.25], [0.5, 0.5, -0.5, 0.0, 0.1], list(range(40))])
def test_the_interval_is_students(values):
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    found = paired(values)
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert found.mean == pytest.approx(np.mean(values)) and found.pairs == n and found.no_interval == ""
    narrower = paired(values, confidence=0.5)
    assert found.low < narrower.low < narrower.high < found.high


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "no pair"),
        ([0.5], "one pair"),
        ([0.5, 0.5], "both differences are equal"),
        ([0.0] * 5, "all 5 differences are equal"),
        ([-2.0] * 7, "all 7 differences are equal"),
        # One image of 269 each, which binary fractions do not show as equal.
        ([(k + 1) / 269 - k / 269 for k in range(250, 256)], "all 6 differences are equal"),
    ],
)
def test_without_spread_there_is_no_interval_and_it_is_said(values, why):
    found = paired(values)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.no_interval == f"no interval: {why}"
    assert math.isnan(found.mean) if not values else found.mean == pytest.approx(values[0])


def test_small_differences_are_not_taken_for_equal_ones():
    assert paired([1e-9, 2e-9, 3e-9]).no_interval == ""
    assert paired([0.0, 1e-12]).no_interval == ""


def signings(n):
    return itertools.product((1, -1), repeat=n)


def test_the_sign_flip_test_counts_all_signings_from_6_pairs_to_16():
    values = [0.3, -0.1, 0.25, 0.4, 0.2, -0.05]
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in signings(6)]
    assert paired(values).p == np.mean([s >= abs(sum(values)) - 1e-12 for s in sums])
    assert paired([1.0] * 6).p == 2 / 64 and paired([0.0] * 6).p == 1.0
    assert paired([1.0] * 16).p == 2.0**-15
    assert math.isnan(paired([1.0] * 5).p) and math.isnan(paired([1.0] * 17).p)


def test_sums_that_are_equal_but_for_rounding_count_as_equal():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        images, before = draw.integers(-4, 5, 6), draw.integers(240, 260, 6)
        exact = np.mean([abs(np.dot(signs, images)) >= abs(images.sum()) for signs in signings(6)])
        assert paired((before + images) / 269 - before / 269).p == exact


def test_mcnemar_is_binomial_on_the_examples_where_one_is_right():
    draw = np.random.default_rng(0)
    first, second = draw.random(200) < 0.9, draw.random(200) < 0.8
    found = mcnemar(first, second)
    assert found.only_first == sum(first & ~second) and found.only_second == sum(second & ~first)
    n, least = found.only_first + found.only_second, min(found.only_first, found.only_second)
    assert found.p == pytest.approx(min(1, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n))
    assert mcnemar(second, first).p == found.p
    assert mcnemar(first, first) == (0, 0, 1.0)
    assert mcnemar([True] * 6, [False] * 6).p == 2 / 64
    with pytest.raises(ValueError, match="expected two of one shape"):
        mcnemar(first, second[:-1])


PAIRS = (2, 3, 5, 7)


def holds(samples, mean):
    """In which share of samples (trials, pairs) the interval holds the mean."""
    found = stats.ttest_1samp(samples, 0, axis=1).confidence_interval(0.95)
    low, high = paired(samples[0])[1:3]
    assert (found.low[0], found.high[0]) == pytest.approx((low, high))  # what is simulated is what `paired` does
    return np.mean((found.low <= mean) & (mean <= found.high))


def test_the_coverage_that_is_stated_is_that_of_normal_and_of_log_normal_differences():
    draw = np.random.default_rng(0)
    normal = [holds(draw.standard_normal((40_000, n)), 0) for n in PAIRS]
    skewed = [holds(draw.lognormal(size=(40_000, n)), math.exp(0.5)) for n in PAIRS]
    assert all(0.94 <= share <= 0.96 for share in normal)
    assert [round(share, 2) for share in (min(skewed), max(skewed))] == [0.82, 0.9]
    assert "94 to 96 %" in method(3) and "82 to 90 %" in method(3)


@pytest.mark.slow
def test_a_percentile_bootstrap_holds_the_mean_less_often_as_its_docstring_says():
    shares = []
    for n in PAIRS:
        multisets = list(itertools.combinations_with_replacement(range(n), n))
        counts = np.array([np.bincount(multiset, minlength=n) for multiset in multisets])
        ways = [math.factorial(n) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
        means = np.random.default_rng(0).standard_normal((4000, n)) @ (counts / n).T
        order = np.argsort(means, axis=1)
        below = np.cumsum((np.array(ways) / n**n)[order], axis=1)  # exact distribution over all n^n resamples
        ordered = np.take_along_axis(means, order, axis=1)
        low = ordered[np.arange(4000), np.argmax(below >= 0.025 - 1e-9, axis=1)]
        high = ordered[np.arange(4000), np.argmax(below >= 0.975 - 1e-9, axis=1)]
        shares.append(np.mean((low <= 0) & (0 <= high)))
    assert shares == pytest.approx([0.49, 0.75, 0.84, 0.88], abs=0.02)
    assert "49, 75, 84 and 88 %" in " ".join(paired.__doc__.split())


def test_the_words_say_what_few_seeds_cannot_show():
    assert "One seed has no interval" in method(1)
    assert "only from 6 seeds on" in method(5) and "signings" not in method(5)
    assert "64 signings" in method(6) and "0.031" in method(6)
    assert "of 16 seeds at most" in method(17)


def test_scipy_is_imported_only_when_something_is_computed():
    code = "import sys, jaxmp.studies.paired; print('scipy' in sys.modules)"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout == "False\n", result.stderr
