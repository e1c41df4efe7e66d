"""Plots of a paper's results that many papers want: means, paired differences, and curves of arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from jaxmp.html.figure import Axis, Series, interval_figure, line_figure
from jaxmp.studies.claims import Results
from jaxmp.studies.paired import Paired, paired


def means(results: Results, arms: Sequence[str], metric: str, label: str) -> str:
    """Draws a metric of each arm: each seed, and the mean with its 95 % t interval. Arms without results are left out.

    Args:
      results: what was measured.
      arms: from top to bottom.
      metric: what is drawn.
      label: of the axis: quantity and unit.
    """
    values = {arm: [v for v in results.of(arm, metric).values() if v is not None] for arm in arms if arm in results}
    rows = [(arm, i, of, _interval(paired(of))) for i, (arm, of) in enumerate(values.items())]
    return interval_figure(Axis(label), rows, name=f"{metric} by arm")


def differences(results: Results, arms: Sequence[str], baseline: str, metric: str, label: str) -> str:
    """Draws the paired differences of arms to a baseline: each seed, and the mean with its 95 % t interval.

    A seed of which a run failed is no pair. Arms without results are left out.
    """
    rows = []
    for i, arm in enumerate(arm for arm in arms if arm in results):
        of, base = results.of(arm, metric), results.of(baseline, metric)
        pairs = [(value, base[seed]) for seed, value in of.items()]
        points = [value - other for value, other in pairs if value is not None and other is not None]
        rows.append((arm, i, points, _interval(results.difference(arm, baseline, metric))))
    return interval_figure(Axis(label), rows, name=f"{metric} minus that of {baseline}")


def curves(results: Results, arms: Sequence[str], x: str, y: str, horizontal: Axis, vertical: Axis) -> str:
    """Draws a curve of each seed and arm: the metrics `x` and `y` are lists of one length. One style for each arm."""
    series = []
    for i, arm in enumerate(arm for arm in arms if arm in results):
        drawn = [found for found in results[arm].values() if x in found]  # a run that failed has no curve
        for j, found in enumerate(drawn):
            values = [math.nan if value is None else value for value in found[y]]
            series.append(Series(arm if j == 0 else "", found[x], values, i, steps=True))
    return line_figure(horizontal, vertical, series, name=f"{y} over {x}, by arm")


def doses(
    results: Results,
    arms: Mapping[str, float],
    metric: str,
    horizontal: Axis,
    vertical: Axis,
    expected: Mapping[str, Callable[[float], float]],
) -> str:
    """Draws a metric over the dose of each arm: a line for each seed, and lines of what is expected.

    Args:
      results: what was measured. Arms without results are left out; a run without a finite value leaves a gap.
      arms: the dose of each arm, by name, in rising order.
      metric: what is drawn.
      horizontal: the axis of the dose.
      vertical: the axis of the metric.
      expected: the value expected at a dose, by the name of its line.
    """
    drawn = {arm: dose for arm, dose in arms.items() if arm in results}
    x, of = list(drawn.values()), {arm: results.of(arm, metric) for arm in drawn}
    seeds = list(dict.fromkeys(seed for values in of.values() for seed in values))
    series = [
        Series(name, x, [function(dose) for dose in x], i + 1) for i, (name, function) in enumerate(expected.items())
    ]
    for i, seed in enumerate(seeds):
        found = [values.get(seed) for values in of.values()]
        y = [math.nan if value is None else value for value in found]
        series.append(Series("each seed" if i == 0 else "", x, y, 0, faint=True))
    return line_figure(horizontal, vertical, series, name=f"{metric} by dose")


def _interval(found: Paired) -> tuple[float, float, float] | None:
    return None if math.isnan(found.low) else (found.mean, found.low, found.high)
