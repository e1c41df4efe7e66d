"""`Paper`, `Claim` and the judges: what a paper says, as data that a study can check.

    Paper(
        name="bfloat16_training",
        ...
        seeds=(0, 1, 2, 3, 4),
        arms={"float32": Train("digits_mlp", ("--precision", "float32")), "bfloat16": Train("digits_mlp", ...)},
        claims=(Claim("nearest-loses", ..., arms=("bfloat16", "float32"), metric="loss", judge=higher),),
    )

A judge sees the values of the claim's arms by seed, and says the figure, its interval and the verdict. Values of one
seed are paired: they come from the same initial weights, batches and random numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxmp.errors import InputError, nearest, require
from jaxmp.experiment.experiment import Experiment
from jaxmp.studies.paired import CONFIDENCE, Paired, mcnemar, paired

if TYPE_CHECKING:
    from jaxmp.runs.run import Run

REPRODUCED, NOT_AT_THIS_SIZE, CONTRADICTED = "reproduced", "not at this size", "contradicted"
"""The verdicts. Not at this size: the interval does not decide, which more seeds or a larger task might."""

Values = Sequence[Mapping[int, float | None]]
"""The metric of each arm of a claim, in the order of its arms, by seed; None where the run failed."""


class Finding(NamedTuple):
    """What a judge says about a claim."""

    verdict: str
    """one of the three verdicts"""
    mean: float
    """our figure: what it is of is the claim's `measured`; NaN without a value"""
    low: float
    """lower end of its interval; NaN where there is none"""
    high: float
    pairs: int
    """number of seeds, or of pairs of runs that both ended, behind it"""
    note: str = ""
    """what the numbers do not say: failed runs, or why there is no interval"""
    confidence: float = CONFIDENCE
    """confidence level of the interval, a share"""


Judge = Callable[[Values], Finding]


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and how it is checked."""

    id: str
    """short name, in lower case with hyphens"""
    says: str
    """what the paper claims, in a sentence"""
    published: str
    """the paper's figure, with its unit"""
    source: str
    """where the figure stands: section, table, figure or page"""
    checked: bool
    """whether the figure was compared with the paper's text"""
    arms: tuple[str, ...]
    """names of the arms that the judge sees, in its order"""
    metric: str
    """what is measured of each arm"""
    measured: str
    """what our figure is, with its unit: `test loss, bfloat16 minus float32`"""
    judge: Judge
    """says figure, interval and verdict"""
    remark: str = ""
    """where ours and theirs differ: the probable reason, and what was tried"""


@dataclass(frozen=True)
class Train:
    """An arm that trains: for each seed an ordinary run folder, that of `jaxmp train CONFIG OPTIONS --seed S`."""

    subject: str | Experiment
    """name of a config, path of a config file relative to the paper's folder, or an experiment"""
    options: tuple[str, ...] = ()
    """options of `jaxmp train`, for a config"""
    measure: Callable[[Run], Mapping[str, Any]] | None = None
    """further metrics of a finished run, beside those of its test split; `skipped_steps` is always there"""


@dataclass(frozen=True)
class Compute:
    """An arm that is computed without a run: for each seed a JSON file with the metrics that `function` returns."""

    function: Callable[..., Mapping[str, Any]]
    """called as `function(seed, **arguments)`; returns JSON by name of metric. Code that it reaches and all of
    jaxmp's are its identity: after an edit it is computed anew"""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """its other arguments, JSON"""


Arm = Train | Compute


class Results(dict[str, dict[int, dict[str, Any]]]):
    """The metrics of each arm by seed: `results["float32"][0]["loss"]`. A run that failed has `failed`, its message."""

    def of(self, arm: str, metric: str) -> dict[int, float | None]:
        """Returns the metric of an arm by seed; None where a run failed, or has no finite value, or none at all.

        Raises: InputError with the nearest name if there is no such arm, or none of its runs that ended has the metric.
        """
        if arm not in self:
            raise InputError(f"no arm {arm!r} in the results{nearest(arm, self)}; run the study again")
        ended = [metrics for metrics in self[arm].values() if not metrics.get("failed")]
        if ended and not any(metric in metrics for metrics in ended):
            raise InputError(f"arm {arm!r} has no metric {metric!r}{nearest(metric, ended[0])}")
        return {seed: None if of.get("failed") else of.get(metric) for seed, of in self[arm].items()}

    def mean(self, arm: str, metric: str) -> Paired:
        """Returns the mean of the metric over the seeds that ended, with its t interval."""
        return paired([value for value in self.of(arm, metric).values() if value is not None])

    def difference(self, arm: str, baseline: str, metric: str) -> Paired:
        """Returns the mean of arm minus baseline over the seeds in which both ended, with its t interval."""
        return paired(_differences(self.of(arm, metric), self.of(baseline, metric)))


@dataclass(frozen=True)
class Figure:
    """A plot of a paper's results."""

    name: str
    """name of its file, without .svg"""
    title: str
    caption: str
    """what it shows; plain text"""
    draw: Callable[[Results], str]
    """returns an `<svg>` element, of `jaxmp.html.figure`"""


@dataclass(frozen=True)
class Paper:
    """A paper, its claims, and the study that checks them."""

    title: str
    authors: str
    """authors and year"""
    url: str
    seeds: tuple[int, ...]
    """seeds of every arm"""
    arms: Mapping[str, Arm]
    """by name, in the order in which they are listed; the first is run first in each seed"""
    claims: tuple[Claim, ...]
    tables: tuple[str, ...] = ()
    """metrics of which the README has a table: mean and interval of each arm"""
    figures: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        """Raises InputError if there are no seeds, of which judges could say nothing."""
        require(self, "seeds", bool(self.seeds), "one or more")


# --- judges: a failed run in any arm of a claim leaves its verdict at NOT_AT_THIS_SIZE, as the runs that ended are not
# a sample of all.


def higher(values: Values) -> Finding:
    """Judges that the first arm is above the second: by the interval of the mean paired difference."""
    return _by_sign(values, 1)


def lower(values: Values) -> Finding:
    """Judges that the first arm is below the second."""
    return _by_sign(values, -1)


def higher_by(least: float) -> Judge:
    """Returns a judge that the first arm is above the second by more than `least`, in the unit of the metric.

    Differences that are all 0 contradict it, where there are enough of them; `higher` could not decide.
    """

    def judge(values: Values) -> Finding:
        found = paired(_differences(values[0], values[1]))
        return _finding(_sided(found, least, 1), found, values)

    return judge


def within(margin: float, *, claims: int = 1) -> Judge:
    """Returns a judge of equality: the mean paired difference of the first two arms is within +-margin.

    Reproduced if the whole interval is inside, contradicted if it is outside. An interval that only holds 0 shows
    nothing: few seeds always give one.

    Args:
      margin: in the unit of the metric.
      claims: number of claims that are judged together. The intervals are as wide as all of them need to hold with
        95 % (Bonferroni).
    """
    confidence = _together(claims)

    def judge(values: Values) -> Finding:
        found = paired(_differences(values[0], values[1]), confidence)
        return _finding(_inside(found, -margin, margin, confidence), found, values, confidence)

    return judge


def near(published: float, tolerance: float) -> Judge:
    """Returns a judge of a published number: the mean of the arm is within a relative `tolerance` of it."""
    margin = abs(published) * tolerance

    def judge(values: Values) -> Finding:
        found = _of_one(values)
        return _finding(_inside(found, published - margin, published + margin), found, values)

    return judge


def above(threshold: float) -> Judge:
    """Returns a judge that the mean of the arm is above a threshold."""
    return lambda values: _beyond(values, threshold, 1)


def below(threshold: float) -> Judge:
    """Returns a judge that the mean of the arm is below a threshold."""
    return lambda values: _beyond(values, threshold, -1)


def increasing(values: Values) -> Finding:
    """Judges an order: each arm is above the one before it. The figure is the step that is least certain.

    The intervals are as wide as k of them need to hold together with 95 % (Bonferroni).
    """
    confidence = _together(len(values) - 1)
    steps = [paired(_differences(after, before), confidence) for before, after in itertools.pairwise(values)]
    verdicts = [_sided(step, 0.0, 1, confidence) for step in steps]
    order = (CONTRADICTED, NOT_AT_THIS_SIZE, REPRODUCED)
    worst = min(range(len(steps)), key=lambda i: (order.index(verdicts[i]), steps[i].mean))
    return _finding(verdicts[worst], steps[worst], values, confidence, f"step {worst + 1} of {len(steps)}")


def differing(least: float) -> Judge:
    """Returns a judge of flips: the share of seeds whose values under the first two arms differ is above `least`.

    The figure: that share, with its exact interval (Clopper and Pearson 1934, The use of confidence or fiducial limits
    illustrated in the case of the binomial). Of yes/no values, 0 and 1, the note has how many are 1 under just one of
    the arms, and the exact p of McNemar that both are equally frequent.
    """

    def judge(values: Values) -> Finding:
        both = [(value, values[1].get(seed)) for seed, value in values[0].items()]
        pairs = [(first, second) for first, second in both if first is not None and second is not None]
        flipped, failed = sum(first != second for first, second in pairs), len(both) - len(pairs)
        notes = [f"{flipped} of {len(pairs)}"]
        if all(value in (0, 1) for pair in pairs for value in pair):
            found = mcnemar([first == 1 for first, _ in pairs], [second == 1 for _, second in pairs])
            notes = [f"{notes[0]}: {found.only_first} against {found.only_second}, McNemar p {found.p:.2g}"]
        notes += [f"{failed} of {len(both)} pairs failed"] if failed else []
        if not pairs:
            return Finding(NOT_AT_THIS_SIZE, math.nan, math.nan, math.nan, 0, "; ".join(notes))
        low, high = _exact_interval(flipped, len(pairs))
        verdict = NOT_AT_THIS_SIZE if failed else _over(low, high, least)
        return Finding(verdict, flipped / len(pairs), low, high, len(pairs), "; ".join(notes))

    return judge


def share_above(least: float) -> Judge:
    """Returns a judge of yes/no values: the share of seeds whose value is above 0 is above `least`.

    The figure: that share, with its exact interval (Clopper and Pearson 1934).
    """

    def judge(values: Values) -> Finding:
        found = [value > 0 for value in values[0].values() if value is not None]
        failed = len(values[0]) - len(found)
        note = f"{sum(found)} of {len(found)} seeds" + (f"; {failed} of {len(values[0])} runs failed" if failed else "")
        share, low, high = _share(found)
        return Finding(NOT_AT_THIS_SIZE if failed else _over(low, high, least), share, low, high, len(found), note)

    return judge


def prevents(most: float, least: float) -> Judge:
    """Returns a judge of a cure: no seed of the first arm has an event, while seeds of the second arm have them.

    Args:
      most: the exact 95 % interval of the share of seeds with an event (Clopper and Pearson 1934) must end below it.
      least: and that of the second arm, without the cure, must begin above it: else there was nothing to prevent.

    The metric counts events. A third arm, where there is one, is the reference: only events beyond its own in the same
    seed count, as those that it has itself no cure can prevent. The effect needs a paired test as well: the exact
    McNemar test of the seeds with an event under just one of the two arms has a p below 0.05, which takes 6 seeds.

    The figure: the share of seeds of the first arm with an event, and its interval. One such seed contradicts that
    there are none. Fewer events are not none.
    """

    def judge(values: Values) -> Finding:
        reference = values[2] if len(values) > 2 else dict.fromkeys(values[0], 0.0)
        cured, uncured = ({seed: n > 0 for seed, n in _minus(of, reference).items()} for of in values[:2])
        both = [seed for seed in cured if seed in uncured]
        p = mcnemar([cured[seed] for seed in both], [uncured[seed] for seed in both]).p
        failed = sum(value is None for of in values for value in of.values())
        (share, low, high), (_, least_uncured, _) = (_share(list(of.values())) for of in (cured, uncured))
        prevented = high < most and least_uncured > least and p < 1 - CONFIDENCE
        verdict = CONTRADICTED if share > 0 else REPRODUCED if prevented else NOT_AT_THIS_SIZE
        counts = [f"{sum(of.values())} of {len(of)} seeds" for of in (cured, uncured)]
        note = f"{counts[0]}, without the cure {counts[1]}, McNemar p {p:.2g}"
        note += f"; {failed} runs failed" if failed else ""
        return Finding(NOT_AT_THIS_SIZE if failed else verdict, share, low, high, len(values[0]), note)

    return judge


def recovers(margin: float) -> Judge:
    """Returns a judge of a cure of a loss: the first arm is less than `margin` above the third, and below the second.

    Args:
      margin: in the unit of the metric, of which less is better.

    The arms: with the cure, without it, and the reference. Decided only where the second arm is above the reference, by
    the interval of their paired difference: else there was nothing to recover. Reproduced if the interval of the first
    minus the reference is below the margin and that of the first minus the second below 0, contradicted if the former
    is above the margin. The figure: the first minus the reference.
    """

    def judge(values: Values) -> Finding:
        cured, uncured, reference = values
        found, gained = (paired(_differences(cured, of)) for of in (reference, uncured))
        lost = paired(_differences(uncured, reference))
        has_lost, has_gained = _sided(lost, 0.0, 1) == REPRODUCED, _sided(gained, 0.0, -1) == REPRODUCED
        verdict = _sided(found, margin, -1)
        if not has_lost or (verdict == REPRODUCED and not has_gained):
            verdict = NOT_AT_THIS_SIZE
        note = f"without the cure {lost.mean:.3g}{'' if has_lost else ', which may be chance'}"
        return _finding(verdict, found, values, note=note)

    return judge


def slope_near(doses: Sequence[float], published: float, tolerance: float) -> Judge:
    """Returns a judge of a dose-response: the slope of the arms' values over `doses` is within a relative `tolerance`.

    Args:
      doses: one for each arm of the claim, in its order.
      published: the slope, in units of the metric by units of the dose.
      tolerance: relative, as that of `near`.

    The figure: the mean over the seeds of the least-squares slope of each. A seed with a failed run has none.
    """
    centred = [dose - math.fsum(doses) / len(doses) for dose in doses]  # the same in Python 3.12
    margin = abs(published) * tolerance

    def judge(values: Values) -> Finding:
        rows = [[of.get(seed) for of in values] for seed in values[0]]
        whole = [[value for value in row if value is not None] for row in rows]
        slopes = [
            math.fsum(c * value for c, value in zip(centred, row, strict=True)) / math.fsum(c * c for c in centred)
            for row in whole
            if len(row) == len(doses)
        ]
        found = paired(slopes)
        return _finding(_inside(found, published - margin, published + margin), found, values)

    return judge


def only_first_fails(least: float) -> Judge:
    """Returns a judge that training fails under the first arm, in a share of seeds above `least`, and under no other.

    The figure: that share in %, with its exact interval (Clopper and Pearson 1934). A failed run of another arm leaves
    it undecided.
    """

    def judge(values: Values) -> Finding:
        first, *others = values
        share, low, high = _share([value is None for value in first.values()])
        others_failed = sum(value is None for of in others for value in of.values())
        verdict = NOT_AT_THIS_SIZE if others_failed else _over(low, high, least)
        note = f"{others_failed} runs of the other arms failed"
        return Finding(verdict, 100 * share, 100 * low, 100 * high, len(first), note)

    return judge


def exact(holds: Callable[[float], bool]) -> Judge:
    """Returns a judge of an arm that no seed changes: its one value is as claimed, or contradicts the claim.

    Nothing is left to chance, so that there is no interval, and no number of seeds it would take. Values that differ
    between seeds, or a failed run, decide nothing.

    Args:
      holds: whether a value is as claimed.
    """

    def judge(values: Values) -> Finding:
        found = {value for value in values[0].values() if value is not None}
        failed = sum(value is None for value in values[0].values())
        if failed or len(found) != 1:
            note = f"{failed} of {len(values[0])} runs failed" if failed else "it differs between seeds: not exact"
            return Finding(NOT_AT_THIS_SIZE, math.nan, math.nan, math.nan, len(values[0]), note)
        (value,) = found
        verdict = REPRODUCED if holds(value) else CONTRADICTED
        return Finding(verdict, value, math.nan, math.nan, len(values[0]), "exact: the same for every seed")

    return judge


def _by_sign(values: Values, sign: int) -> Finding:
    found = paired(_differences(values[0], values[1]))
    return _finding(_sided(found, 0.0, sign), found, values)


def _beyond(values: Values, threshold: float, sign: int) -> Finding:
    found = _of_one(values)
    return _finding(_sided(found, threshold, sign), found, values)


def _of_one(values: Values) -> Paired:
    return paired([value for value in values[0].values() if value is not None])


def _minus(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> dict[int, float]:
    """First minus second by seed, where both runs ended."""
    pairs = {seed: (value, second.get(seed)) for seed, value in first.items()}
    return {seed: value - other for seed, (value, other) in pairs.items() if value is not None and other is not None}


def _differences(first: Mapping[int, float | None], second: Mapping[int, float | None]) -> list[float]:
    return list(_minus(first, second).values())


def _together(claims: int) -> float:
    """The confidence that each of so many intervals needs (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(claims, 1)


def _equal_pairs(confidence: float) -> int:
    """The least number of equal values that decide: of n, the p of the two-sided sign test is 2^(1 - n)."""
    return 1 + math.ceil(-math.log2(1 - confidence))


def _ends(found: Paired, confidence: float) -> tuple[float, float]:
    """The interval; where all values are equal and there are enough of them, their value."""
    if found.no_interval and found.pairs >= _equal_pairs(confidence):
        return found.mean, found.mean
    return found.low, found.high


def _sided(found: Paired, threshold: float, sign: int, confidence: float = CONFIDENCE) -> str:
    low, high = _ends(found, confidence)
    if math.isnan(low):
        return NOT_AT_THIS_SIZE
    if sign < 0:
        low, high, threshold = -high, -low, -threshold
    return REPRODUCED if low > threshold else CONTRADICTED if high < threshold else NOT_AT_THIS_SIZE


def _inside(found: Paired, least: float, most: float, confidence: float = CONFIDENCE) -> str:
    low, high = _ends(found, confidence)
    if math.isnan(low):
        return NOT_AT_THIS_SIZE
    if least <= low and high <= most:
        return REPRODUCED
    return CONTRADICTED if high < least or low > most else NOT_AT_THIS_SIZE


def _finding(verdict: str, found: Paired, values: Values, confidence: float = CONFIDENCE, note: str = "") -> Finding:
    failed = sum(value is None for of in values for value in of.values())
    notes = [note, f"{failed} of {sum(map(len, values))} runs failed" if failed else "", found.no_interval]
    needed = _equal_pairs(confidence)
    if found.no_interval and 1 < found.pairs < needed:
        notes.append(f"fewer than {needed} equal ones decide nothing")
    verdict = NOT_AT_THIS_SIZE if failed else verdict
    return Finding(verdict, found.mean, found.low, found.high, found.pairs, "; ".join(filter(None, notes)), confidence)


def _over(low: float, high: float, least: float) -> str:
    """Whether an interval is above `least`; undecided where it is NaN."""
    return REPRODUCED if low > least else CONTRADICTED if high < least else NOT_AT_THIS_SIZE


def _share(flags: Sequence[bool]) -> tuple[float, float, float]:
    """The share of flags that are set, and its exact interval; NaN of no flags."""
    if not flags:
        return math.nan, math.nan, math.nan
    return sum(flags) / len(flags), *_exact_interval(sum(flags), len(flags))


def _exact_interval(count: int, of: int) -> tuple[float, float]:
    """The interval of a share by Clopper and Pearson, to the digits in which versions of SciPy agree."""
    from scipy import stats  # a slow import

    found = stats.binomtest(count, of).proportion_ci(CONFIDENCE, method="exact")
    return float(f"{found.low:.9g}"), float(f"{found.high:.9g}")
