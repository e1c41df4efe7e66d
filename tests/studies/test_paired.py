"""Paired differences: exact where everything can be enumerated, and honest about few seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jaxmp.studies.paired import EXACT_UP_TO, coverage, method, paired


@pytest.mark.parametrize("values", [[0.3, -0.1, 0.25], [1.0, 2.0, 4.0, 8.0], [0.5, 0.5, -0.5, 0.0, 0.1]])
def test_the_interval_is_that_of_all_resamples_one_by_one(values):
    means = np.sort([np.mean(resample) for resample in itertools.product(values, repeat=len(values))])
    tail = 0.025 * len(means)
    # The first resample from below up to which a share of 2.5 % lies, and likewise from above.
    low, high = means[math.ceil(tail - 1e-9) - 1], means[-math.ceil(tail - 1e-9)]
    found = paired(values)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.mean == pytest.approx(np.mean(values)) and found.pairs == len(values)


def test_the_sign_flip_test_counts_all_signings():
    values = [0.3, -0.1, 0.25, 0.4]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert paired(values).p == np.mean([s >= abs(sum(values)) - 1e-12 for s in sums])
    assert paired([1.0] * 5).p == 2 / 32 and paired([0.0] * 5).p == 1.0


def test_many_pairs_are_resampled_the_same_way_each_time_and_near_the_normal_interval():
    values = np.random.default_rng(0).normal(1.0, 2.0, 40)
    found = paired(values)
    assert found[:3] == paired(values)[:3] and math.isnan(found.p)
    half = 1.96 * values.std() / math.sqrt(40)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1)


def test_a_single_pair_has_no_interval():
    found = paired([0.5])
    assert found.mean == 0.5 and all(map(math.isnan, (found.low, found.high, found.p)))
    assert "One seed" in method(1)


def test_the_coverage_that_is_stated_is_what_two_and_three_pairs_have():
    # There the interval is from the least to the largest, which misses where all lie on one side: 2 / 2^n.
    assert coverage(2) == pytest.approx(1 - 2 / 4, abs=0.03)
    assert coverage(3) == pytest.approx(1 - 2 / 8, abs=0.03)
    assert coverage(3) < coverage(5) < coverage(EXACT_UP_TO) < 0.95


def test_the_words_say_what_few_seeds_cannot_show():
    assert "no result of 5 seeds is significant" in method(5) and "84%" in method(5)
    assert "no result" not in method(8)
