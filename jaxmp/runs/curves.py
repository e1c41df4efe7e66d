"""`Curve`: the lines of a run, and the figures that are drawn of one or of several."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmp.data.dataset import Split
from jaxmp.html.figure import Axis, Series, line_figure
from jaxmp.training.metrics import MetricSpec, is_bookkeeping, spec_of


@dataclass(frozen=True)
class Curve:
    """The lines of one run, as they are drawn."""

    group: str
    """its name beside others; runs of one group differ by their seed alone"""
    seed: int
    lines: Sequence[dict[str, Any]]
    """lines of its metrics.jsonl"""
    failed: bool = False
    """whether the run failed"""
    specs: Mapping[str, MetricSpec] = field(default_factory=dict)
    """how metrics are shown, by name, in the order of the page; the same for all curves of a page"""

    def of(self, metric: str, split: Split) -> tuple[list[int], list[float]]:
        """Steps and values as they are shown (a share in percent); NaN for a value that was not finite."""
        factor = spec_of(self.specs, metric).factor
        lines = [line for line in self.lines if line["split"] == split and metric in line]
        values = [math.nan if line[metric] is None else line[metric] * factor for line in lines]
        return [line["step"] for line in lines], values


def curve_figures(curves: Sequence[Curve]) -> list[tuple[str, str, str]]:
    """Draws each metric, the loss scale, skipped steps and speed, as `Page.figures` takes them."""
    found = []
    for metric in metrics_of(curves):
        name = title(metric)
        if len(curves) == 1:
            found.append((name, _both_splits(curves[0], metric), ""))
            continue
        for split in ("validation", "train"):
            what = f"{name}, {'training' if split == 'train' else split}"
            found.append((what, grouped_figure(curves, metric, split, what), _legend(curves)))
    for kind in ("loss_scale", "skipped_steps"):
        for name in _of_objectives(curves, kind):
            objective = name.partition("/")[2]
            what = title(kind) + (f", {objective}" if objective else "")
            said = _in_words(curves, name)
            svg = "" if said else grouped_figure(curves, name, "train", what)
            found.append((what, svg, said))
    speed = grouped_figure(curves, "examples_per_second", "train", "Speed")
    found.append(("Speed", speed, "Of the steps alone: compiling, evaluating and saving do not count."))
    return found


def _in_words(curves: Sequence[Curve], name: str) -> str:
    """What a figure of loss scales or of skipped steps would show where nothing happened; "" where it shows more."""
    of_each = [set(curve.of(name, "train")[1]) for curve in curves]
    if not any(of_each) or any(len(values) > 1 for values in of_each) or any(v != v for of in of_each for v in of):
        return ""
    groups: dict[float, list[str]] = {}
    for curve, values in zip(curves, of_each, strict=True):
        for value in values:
            groups.setdefault(value, []).append(curve.group)
    if name.partition("/")[0] == "skipped_steps":
        return "no step was skipped." if set(groups) == {0.0} else ""
    if len(groups) == 1:
        (value,) = groups
        return f"{value:,g} in every line{'' if len(curves) == 1 else ', of all'}."
    parts = [f"{value:,g} ({', '.join(dict.fromkeys(names))})" for value, names in groups.items()]
    return f"the same in every line: {'; '.join(parts)}."


def _of_objectives(curves: Sequence[Curve], kind: str) -> list[str]:
    """The fields of a kind, `loss_scale/generator` and so on of several objectives, else the plain one."""
    names = {name for curve in curves for line in curve.lines for name in line if name.startswith(f"{kind}/")}
    return sorted(names) or [kind]


def title(metric: str) -> str:
    """A metric's name as the title of its figure."""
    name = metric.replace("_", " ")
    return name[0].upper() + name[1:]


def metrics_of(curves: Sequence[Curve]) -> dict[str, MetricSpec]:
    """The specs of all metrics that any of the curves has in training: the loss first, then in the order of `specs`."""
    present = {name for curve in curves for line in curve.lines if line["split"] == "train" for name in line}
    specs = curves[0].specs if curves else {}
    order = dict.fromkeys(["loss", *specs, *sorted(present)])
    return {name: spec_of(specs, name) for name in order if name in present and not is_bookkeeping(name)}


def grouped_figure(curves: Sequence[Curve], metric: str, split: Split, name: str) -> str:
    """Draws a metric on a split: each run, and the mean of each group that has several."""
    groups = list(dict.fromkeys(curve.group for curve in curves))
    faint: list[Series] = []
    bold: list[Series] = []
    held = metric.partition("/")[0] in ("loss_scale", "skipped_steps")
    for style, group in enumerate(groups):
        members = [curve for curve in curves if curve.group == group]
        alone = len(members) == 1
        for curve in members:
            x, y = curve.of(metric, split)
            label = group if alone else ""
            line = Series(label, x, y, style, faint=not alone, steps=held, failed=curve.failed)
            (bold if alone else faint).append(line)
        if not alone:
            failed = sum(curve.failed for curve in members)
            label = f"{group} ({failed} failed)" if failed else group
            bold.append(_mean([c.of(metric, split) for c in members if not c.failed], label, style, held))
    series = [*faint, *bold]
    return line_figure(Axis("step", include=(0.0,)), _value_axis(metric, series, curves[0]), series, name=name)


def _both_splits(curve: Curve, metric: str) -> str:
    series = [
        Series("training", *curve.of(metric, "train"), 1, failed=curve.failed),
        Series("validation", *curve.of(metric, "validation"), 0, failed=curve.failed),
    ]
    return line_figure(Axis("step", include=(0.0,)), _value_axis(metric, series, curve), series, name=metric)


def _value_axis(metric: str, series: Sequence[Series], curve: Curve) -> Axis:
    values = [v for s in series for v in s.y if math.isfinite(v)]
    kind = metric.partition("/")[0]
    if kind == "loss_scale":
        return Axis("loss scale", "log2", (1.0,) if not values else ())
    if kind == "skipped_steps":
        return Axis("steps skipped so far", include=(0.0, 1.0), whole=True)
    if metric == "examples_per_second":
        return Axis("examples a second", include=(0.0,))
    spec = spec_of(curve.specs, metric)
    wide = bool(values) and min(values) > 0 and max(values) > 8 * min(values) and spec.unit != "%"
    return Axis(spec.label(metric), "log10" if wide else "linear")


def _mean(lines: Sequence[tuple[list[int], list[float]]], label: str, style: int, held: bool) -> Series:
    """The mean at the steps that all lines have."""
    by_step = [dict(zip(*line, strict=True)) for line in lines]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return Series(label, steps, [float(np.mean([line[step] for line in by_step])) for step in steps], style, steps=held)


def _legend(curves: Sequence[Curve]) -> str:
    groups = [curve.group for curve in curves]
    return "Thin: each seed. Thick: their mean." if len(set(groups)) < len(groups) else ""


def examples_per_second(lines: Iterable[dict[str, Any]]) -> float:
    """Returns the median speed of the lines that have one, of steps alone: see `records.Pace`. NaN if none has."""
    return _median(lines, "examples_per_second")


def steps_per_second(lines: Iterable[dict[str, Any]]) -> float:
    """Returns the same in steps, whose last of an epoch may have fewer rows."""
    return _median(lines, "steps_per_second")


def _median(lines: Iterable[dict[str, Any]], name: str) -> float:
    values = [line[name] for line in lines if name in line]
    return statistics.median(values) if values else math.nan
