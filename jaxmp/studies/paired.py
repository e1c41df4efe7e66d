"""Paired results: what a few seeds, or yes/no results on the same examples, say about two ways to train.

Two runs with the same seed start from the same weights and see the same batches, so their difference varies less by
chance than that of two means.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
FLIPS_FROM, FLIPS_UP_TO = 6, 16
"""numbers of pairs for which a sign-flip test is made: with 5 its least p is 2/32, above 5 %; with 16 it tries 65,536
signings"""
EQUAL = 1e-9
"""relative difference below which two differences are equal but for rounding"""


class Paired(NamedTuple):
    """The mean of paired differences, and how sure it is."""

    mean: float
    low: float
    """lower end of the t interval; NaN where there is none"""
    high: float
    p: float
    """two-sided p of the sign-flip test; NaN for fewer than 6 pairs and for more than 16"""
    pairs: int
    no_interval: str
    """why there is no interval, in words; "" if there is one"""


def paired(differences: Sequence[float], confidence: float = CONFIDENCE) -> Paired:
    """Computes the mean of `differences`, its t interval, and the p of the exact sign-flip test.

    The interval is Student's: of normal differences it holds the true mean as often as `confidence` says, from two
    pairs on; of log-normal ones (sigma 1) a 95 % interval holds it in 82 to 90 % of cases. (A percentile bootstrap over
    so few pairs is too narrow: its 95 % interval holds the mean of normal differences in 49, 75, 84 and 88 % of cases
    at 2, 3, 5 and 7 pairs.) Where all differences are equal, their spread is 0 and an interval would claim certainty,
    so there is none.

    p is the share of the 2^n signings of the differences whose mean is at least as far from 0.

    Sources: Student 1908, The Probable Error of a Mean; Fisher 1935, The Design of Experiments, section 21 (the
    sign-flip test).

    >>> found = paired([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 3), round(found.high, 3), found.p
    (2.0, -0.484, 4.484, nan)
    >>> paired([0.5, 0.5]).no_interval
    'no interval: both differences are equal'
    """
    from scipy import stats  # here: importing it takes longer than `jaxmp --help` may

    values = np.asarray(differences, np.float64)
    n, mean = len(values), float(values.mean()) if len(values) else math.nan
    p = _sign_flip(values) if FLIPS_FROM <= n <= FLIPS_UP_TO else math.nan
    if n < 2:
        return Paired(mean, math.nan, math.nan, p, n, f"no interval: {'one pair' if n else 'no pair'}")
    if np.allclose(values, values[0], rtol=EQUAL, atol=0):
        which = "both" if n == 2 else f"all {n}"
        return Paired(mean, math.nan, math.nan, p, n, f"no interval: {which} differences are equal")
    low, high = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    return Paired(mean, float(low), float(high), p, n, "")


class McNemar(NamedTuple):
    """On how many examples exactly one of two models is right, and the exact p of that."""

    only_first: int
    only_second: int
    p: float
    """two-sided p that both models are right equally often; 1 where they never differ"""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compares two models by their yes/no results on the same examples, with the exact McNemar test.

    Only examples on which exactly one model is right say anything: under the hypothesis that both are equally good,
    each of the two is that one with probability 1/2. The test speaks of other examples, not of other seeds.

    Args:
      first: whether the first model is right, bool (examples,).
      second: whether the second model is, on the same examples in the same order.

    Raises: ValueError if the lengths differ.

    Source: McNemar 1947, Note on the sampling error of the difference between correlated proportions; exact by the
    binomial distribution.

    >>> mcnemar([True, True, True, True, False, True], [False, False, False, True, True, False])
    McNemar(only_first=4, only_second=1, p=0.375)
    """
    from scipy import stats

    right, other = np.asarray(first, bool), np.asarray(second, bool)
    if right.shape != other.shape or right.ndim != 1:
        raise ValueError(f"results of shapes {right.shape} and {other.shape}: expected two of one shape (examples,)")
    only_first, only_second = int(np.sum(right & ~other)), int(np.sum(other & ~right))
    discordant = only_first + only_second
    p = stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    return McNemar(only_first, only_second, float(p))


def method(pairs: int) -> str:
    """Says how `paired` makes an interval and a p of so many pairs, and what they can and cannot show."""
    if pairs < 2:
        return "One seed has no interval: it cannot tell a difference between precisions from chance."
    if pairs < FLIPS_FROM:
        test = f"p: none; the sign-flip test can reach 5 % only from {FLIPS_FROM} seeds on."
    elif pairs > FLIPS_UP_TO:
        test = f"p: none; the sign-flip test tries all signs, of {FLIPS_UP_TO} seeds at most."
    else:
        test = (
            f"p: exact two-sided sign-flip test over all {2**pairs:,} signings; the least that {pairs} seeds can reach "
            f"is {2.0 ** (1 - pairs):.2g}, if all differences have one sign."
        )
    return (
        f"Intervals: {100 * CONFIDENCE:g} % t interval of the mean paired difference over {pairs} seeds; none where "
        "all differences are equal. It holds the true mean in 94 to 96 % of cases where differences are normal, and in "
        f"82 to 90 % where they are skewed (log-normal). {test} Seeds vary initial weights, order and noise, not the "
        "data: nothing here says how the difference would come out on other examples."
    )


def _sign_flip(values: np.ndarray) -> float:
    # Not by scipy.stats.permutation_test: sums that are equal in exact arithmetic (differences of accuracies are
    # multiples of one over the number of examples) differ by more than its tolerance of 100 units of rounding.
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) - EQUAL * np.abs(values).sum()))
