"""Paired differences: what a few seeds can say about the difference between two ways to train.

Two runs with the same seed start from the same weights and see the same batches, so that their difference is freer of
chance than that of two means.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
EXACT_UP_TO = 7
"""pairs up to which all n^n resamples are counted, as the multisets that they are: 1,716 of 7"""
RESAMPLES = 20_000
"""resamples drawn for more pairs"""
SEED = 0
FLIPS_UP_TO = 16
"""pairs up to which all 2^n signs are tried"""


class Paired(NamedTuple):
    """The mean of paired differences, and how sure it is."""

    mean: float
    low: float
    """lower end of the percentile interval; NaN of a single pair"""
    high: float
    p: float
    """two-sided p of the sign-flip test: the share of the 2^n signings of the differences with a mean at least as far
    from 0; NaN of a single pair or of more than 16"""
    pairs: int


def paired(differences: Sequence[float], confidence: float = CONFIDENCE) -> Paired:
    """The mean of `differences`, its percentile bootstrap interval over pairs, and the p of the sign-flip test.

    Up to 7 pairs the bootstrap distribution is exact: every resample counts with its probability, and none is drawn at
    random. With more, 20,000 resamples are drawn, from a fixed seed. (Not BCa: its acceleration is a third moment,
    which a handful of pairs does not give.)

    Sources: Efron 1979, Bootstrap Methods: Another Look at the Jackknife; Fisher 1935, The Design of Experiments,
    section 21 (the sign-flip test).

    >>> paired([1.0, 2.0, 3.0])
    Paired(mean=2.0, low=1.0, high=3.0, p=0.25, pairs=3)
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if n < 2:
        return Paired(float(values.mean()) if n else math.nan, math.nan, math.nan, math.nan, n)
    shares, probability = _resamples(n)
    low, high = _interval(shares @ values, probability, confidence)
    return Paired(float(values.mean()), low, high, _sign_flip(values), n)


def coverage(pairs: int, confidence: float = CONFIDENCE) -> float:
    """How often the interval of `paired` holds the true mean, where differences are normal; by simulation, fixed seed.

    Less than `confidence`: a percentile interval knows neither that n points spread less than what they come from, by
    sqrt((n - 1) / n), nor the wider tails of Student's t.

    >>> round(coverage(3), 2)  # from the least to the largest of three: all but both on one side, 1 - 2 / 2^3
    0.75
    """
    shares, probability = _resamples(pairs)
    trials = 2000 if pairs <= EXACT_UP_TO else 300
    samples = np.random.Generator(np.random.Philox(SEED)).standard_normal((trials, pairs))
    intervals = [_interval(shares @ sample, probability, confidence) for sample in samples]
    return float(np.mean([low <= 0 <= high for low, high in intervals]))


def method(pairs: int) -> str:
    """How `paired` makes an interval of so many pairs, and what it can and cannot show, in words."""
    if pairs < 2:
        return "One seed has no interval: it cannot tell a difference between precisions from chance."
    how = (
        f"all {pairs**pairs:,} resamples counted exactly"
        if pairs <= EXACT_UP_TO
        else f"{RESAMPLES:,} resamples from a fixed seed"
    )
    least = 2.0 ** (1 - pairs)
    verdict = (
        f"so that no result of {pairs} seeds is significant at 5 %, however large"
        if least > 0.05
        else "if all differences have one sign"
    )
    return (
        f"Intervals: {CONFIDENCE:.0%} percentile bootstrap of the mean paired difference over {pairs} seeds "
        f"({how}). From so few seeds it is too narrow: it holds the true mean in {coverage(pairs):.0%} of cases where "
        f"differences are normal. p: two-sided sign-flip test over all {2**pairs} signs; the least that {pairs} seeds "
        f"can reach is {least:.2g}, {verdict}. Seeds vary initial weights, order and noise, not the data: nothing here "
        "says how the difference would come out on other images."
    )


@functools.lru_cache(maxsize=4)
def _resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each pair in each resample, float64 (resamples, n), and the probability of each resample."""
    if n > EXACT_UP_TO:
        counts = np.random.Generator(np.random.Philox(SEED)).multinomial(n, [1 / n] * n, size=RESAMPLES)
        return counts / n, np.full(RESAMPLES, 1 / RESAMPLES)
    multisets = itertools.combinations_with_replacement(range(n), n)
    counts = np.array([np.bincount(multiset, minlength=n) for multiset in multisets])
    ways = [math.factorial(n) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
    return counts / n, np.array(ways) / n**n


def _interval(means: np.ndarray, probability: np.ndarray, confidence: float) -> tuple[float, float]:
    """The numbers beyond which less than half of what `confidence` leaves lies, on either side."""
    tail = (1 - confidence) / 2

    def lower(values: Any) -> float:
        order = np.argsort(values, kind="stable")
        return float(values[order][np.searchsorted(np.cumsum(probability[order]), tail)])

    return lower(means), -lower(-means)


def _sign_flip(values: np.ndarray) -> float:
    if len(values) > FLIPS_UP_TO:
        return math.nan
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    means = np.abs(signs @ values)
    return float(np.mean(means >= abs(values.sum()) * (1 - 1e-12)))
