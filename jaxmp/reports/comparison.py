"""`page` and `text`: a comparison of precisions as an HTML page and as a table for a terminal, from its JSON alone."""

from __future__ import annotations

import math
import os
import statistics
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmp.html.elements import NO_VALUE, Elements, Link
from jaxmp.html.figure import Axis, Series, bar_figure, interval_figure, line_figure
from jaxmp.reports import gate_report
from jaxmp.reports.page import Page, provenance_rows
from jaxmp.reports.run_report import loss_scales, number, policy_tables, shown
from jaxmp.runs.curves import Curve, curve_figures, metrics_of, title
from jaxmp.runs.provenance import hardware
from jaxmp.text_table import table
from jaxmp.training.metrics import MetricSpec, spec_of, specs_from_json

MIB = 2**20


def failures(comparison: dict[str, Any]) -> list[str]:
    """The runs that failed or ended with a test metric that is not finite, and why, a line each."""
    return [f"{r['precision']}, seed {r['seed']}: {why}" for r in comparison["runs"] if (why := _failure(r))]


def _failure(run: Mapping[str, Any]) -> str:
    """Why a run counts as failed; empty if it does not."""
    if run["failed"]:
        return str(run["failed"])
    lost = [name for name, value in run["summary"].get("test", {}).items() if value is None]
    return f"not finite on the test split: {', '.join(lost)}" if lost else ""


def text(comparison: dict[str, Any]) -> str:
    """The first table of the page as lines of text, narrower: of the metrics the monitored one and one more.

    Args:
      comparison: as for `page`.
    """
    specs, metrics = specs_from_json(comparison["metrics"]), _metrics(comparison)
    header, rows = _summary(comparison, specs)
    short = {label: label.removeprefix("test ") for label in header}
    short |= {"steps skipped": "skipped"} | {label: "difference" for label in header if label.startswith("difference")}
    left_out = {"ms a step", "temporaries, MiB"} | (set() if failures(comparison) else {"failed"})
    left_out |= {f"test {spec_of(specs, m).label(m)}" for m in metrics[2:]}
    seeds, versus = len(comparison["seeds"]), [d["difference"] for d in comparison["differences"] if d["difference"]]
    left_out |= set() if any(each["pairs"] < seeds for each in versus) else {"pairs"}
    columns = [i for i, label in enumerate(header) if label not in left_out]
    right = [i for i, column in enumerate(columns) if short[header[column]] not in ("precision", "difference")]
    lines = ["test split" + ("" if seeds == 1 else f", mean ± standard deviation over {seeds} seeds")]
    if metrics and len(comparison["precisions"]) > 1:
        what, unit = metrics[0].replace("_", " "), _difference_unit(spec_of(specs, metrics[0]))
        lines.append(f"difference: in {_with_unit(what, unit)}, to {comparison['precisions'][0]} (95 % t interval)")
    cells = [[row[i] for i in columns] for row in rows]
    return "\n".join([*lines, table(cells, header=[short[header[i]] for i in columns], right=right)])


def cell(comparison: dict[str, Any]) -> str:
    """The first table of the page and its first figures, as the HTML of a notebook's cell.

    Args:
      comparison: as for `page`.
    """
    specs, found = specs_from_json(comparison["metrics"]), Elements()
    found.table(*_summary(comparison, specs))
    for failure in failures(comparison):
        found.paragraph(f"Failed: {failure}", "bad")
    on_top, _ = _curves(comparison, specs)
    found.figures([*on_top, *_interval_figures(comparison, specs)])
    if len(comparison["precisions"]) > 1:
        found.paragraph(comparison["interval"], "note")
    return found.cell()


def _curves(comparison: dict[str, Any], specs: Mapping[str, MetricSpec]) -> tuple[list[Any], list[Any]]:
    """The figures of the loss and of the monitored metric, and all others, as `Elements.figures` takes them."""
    curves = _lines_of(comparison, specs)
    figures = curve_figures(curves)
    names = [title(metric) for metric in (*list(metrics_of(curves))[:1], comparison["monitor"])]
    main = {name for metric in names for name in (metric, f"{metric}, validation")}
    on_top = [figure for figure in figures if figure[0] in main]
    return on_top, [figure for figure in figures if figure[0] not in main]


def _lines_of(comparison: dict[str, Any], specs: Mapping[str, MetricSpec]) -> list[Curve]:
    return [Curve(r["precision"], r["seed"], r["metrics"], bool(_failure(r)), specs) for r in comparison["runs"]]


def page(comparison: dict[str, Any], reports: Mapping[str, str] | None = None) -> Page:
    """Draws the page of a comparison.

    Args:
      comparison: what `jaxmp.studies.compare.compare` returns, or the JSON that `jaxmp compare` wrote.
      reports: where the report of each run is, by its folder, relative to the page; those get a link.
    """
    precisions, seeds = comparison["precisions"], comparison["seeds"]
    specs = specs_from_json(comparison["metrics"])
    dot = "\N{MIDDLE DOT}"
    lead = (
        f"{' / '.join(precisions)} {dot} {_count(len(seeds), 'seed')} {dot} {hardware(comparison)}, JAX "
        f"{comparison['versions']['jax']}"
    )
    result = Page(f"{comparison['config']}, by precision", lead)
    result.paragraph(comparison["about"])
    result.table(*_summary(comparison, specs))
    for failure in failures(comparison):
        result.paragraph(f"Failed: {failure}", "bad")
    on_top, others = _curves(comparison, specs)
    result.figures([*on_top, *_interval_figures(comparison, specs)])
    if len(precisions) > 1:
        result.paragraph(comparison["interval"], "note")
    if "gate" in comparison:
        gate_report.add(result, comparison["gate"])
    result.section("Training")
    result.figures([*others, *_difference_curves(_lines_of(comparison, specs), precisions)])
    _cost(result, comparison)
    if comparison["gradients"]:
        several = comparison["gradients"].get("objectives")
        for name, errors in (several or {"": comparison["gradients"]}).items():
            _gradients(result, errors, f" of {name}" if several else "")
    _precision(result, comparison)
    _origin(result, comparison, specs, reports or {})
    result.data(comparison)
    return result


def _metrics(comparison: dict[str, Any]) -> list[str]:
    """The metrics on the test set: the monitored one first, then as the task declares them."""
    there = {d["metric"] for d in comparison["differences"]}
    order = dict.fromkeys([comparison["monitor"], *comparison["metrics"], *sorted(there)])
    return [metric for metric in order if metric in there]


def _difference_unit(spec: MetricSpec) -> str:
    return "percentage points" if spec.unit == "%" else spec.unit


def _with_unit(text: str, unit: str) -> str:
    return f"{text}, {unit}" if unit else text


def _summary(comparison: dict[str, Any], specs: Mapping[str, MetricSpec]) -> tuple[list[str], list[list[str]]]:
    metrics = _metrics(comparison)
    header = ["precision", *(f"test {spec_of(specs, m).label(m)}" for m in metrics)]
    first = f"difference in {metrics[0].replace('_', ' ')}" if metrics else "difference"
    header += [_with_unit(first, _difference_unit(spec_of(specs, metrics[0]))) if metrics else first]
    # From few seeds there is no p; then the note below the figures says so, and a column of dashes would not.
    has_p = any(d["difference"] and d["difference"]["p"] is not None for d in comparison["differences"])
    header += ["p"] if has_p else []
    header += ["pairs", "steps skipped", "failed", "ms a step", "temporaries, MiB"]
    rows = []
    for precision, measured in zip(comparison["precisions"], comparison["measured"], strict=True):
        runs = [r for r in comparison["runs"] if r["precision"] == precision]
        of = {d["metric"]: d for d in comparison["differences"] if d["precision"] == precision}
        versus = of[metrics[0]]["difference"] if metrics else None
        seconds = [r["seconds_per_step"] for r in runs if r["seconds_per_step"] is not None]
        rows.append(
            [
                precision,
                *(_mean_and_spread(of[m], spec_of(specs, m)) for m in metrics),
                _interval_text(versus, spec_of(specs, metrics[0])) if versus else "reference" if metrics else "",
                *([number(versus["p"], ".3g") if versus else ""] if has_p else []),
                f"{versus['pairs']} of {len(runs)}" if versus else "",
                f"{sum(_skipped(r) for r in runs):,}",
                f"{sum(bool(_failure(r)) for r in runs)} of {len(runs)}",
                number(1e3 * statistics.median(seconds) if seconds else None, ",.2f"),
                number(measured["memory"]["temporary_bytes"] / MIB, ",.2f"),
            ]
        )
    return header, rows


def _mean_and_spread(of: dict[str, Any], spec: MetricSpec) -> str:
    text, spread = shown(spec, of["mean"]), of["standard_deviation"]
    return text if spread is None else f"{text} ± {shown(spec, spread)}"


def _interval_text(versus: dict[str, Any], spec: MetricSpec) -> str:
    mean, low, high = (shown(spec, versus[name], sign="+") for name in ("mean", "low", "high"))
    if versus["low"] is not None:
        return f"{mean} ({low} to {high})"
    return NO_VALUE if versus["mean"] is None else f"{mean} ({versus['no_interval']})"


def _skipped(run: dict[str, Any]) -> int:
    lines = run["metrics"]
    return lines[-1]["skipped_steps"] if lines else 0


def _interval_figures(comparison: dict[str, Any], specs: Mapping[str, MetricSpec]) -> list[tuple[str, str, str]]:
    """The paired differences in each metric, as `Page.figures` takes them."""
    found = []
    reference = comparison["precisions"][0]
    for metric in _metrics(comparison):
        rows, missing, spec = [], [], spec_of(specs, metric)
        for style, precision in enumerate(comparison["precisions"]):
            (of,) = (d for d in comparison["differences"] if (d["metric"], d["precision"]) == (metric, precision))
            versus = of["difference"]
            if versus is None or versus["mean"] is None:
                continue
            points = [spec.factor * v for v in of["pairs"].values()]
            interval = None
            if versus["low"] is None:
                missing.append(f"{precision}: {versus['no_interval']}.")
            else:
                interval = tuple(spec.factor * versus[name] for name in ("mean", "low", "high"))
            rows.append((precision, style, points, interval))
        if not rows:
            continue
        name = f"Test {metric.replace('_', ' ')}, difference to {reference}"
        label = _with_unit(f"difference in {metric.replace('_', ' ')}", _difference_unit(spec))
        caption = " ".join(["Dots: each seed. Bar: mean and 95 % t interval.", *missing])
        found.append((name, interval_figure(Axis(label), rows, name=name), caption))
    return found


def _difference_curves(curves: Sequence[Curve], precisions: Sequence[str]) -> list[tuple[str, str, str]]:
    """The validation loss of each run minus that of the first precision's run with its seed."""
    spec = metrics_of(curves).get("loss")
    if len(precisions) < 2 or spec is None:
        return []
    reference = {curve.seed: dict(zip(*curve.of("loss", "validation"), strict=True)) for curve in curves
                 if curve.group == precisions[0]}  # fmt: skip
    series = []
    for style, precision in enumerate(precisions[1:], start=1):
        members, lines = [c for c in curves if c.group == precision], []
        failed = sum(curve.failed for curve in members)
        for curve in members:
            points = [(x, y - reference[curve.seed][x]) for x, y in zip(*curve.of("loss", "validation"), strict=True)
                      if x in reference[curve.seed]]  # fmt: skip
            lines += [] if curve.failed else [dict(points)]
            label = precision if len(members) == 1 else ""
            x, y = zip(*points, strict=True) if points else ((), ())
            series.append(Series(label, x, y, style, faint=not label, failed=curve.failed))
        if len(members) > 1:
            common = sorted(set.intersection(*map(set, lines))) if lines else []
            mean = [float(np.mean([line[x] for line in lines])) for x in common]
            series.append(Series(f"{precision} ({failed} failed)" if failed else precision, common, mean, style))
    name = f"Loss, validation, difference to {precisions[0]}"
    svg = line_figure(
        Axis("step", include=(0.0,)),
        Axis(_with_unit("difference in loss", _difference_unit(spec)), include=(0.0,)),
        series,
        name=name,
    )
    return [(name, svg, "Paired by seed: same initial weights, same batches.")]


def _cost(result: Page, comparison: dict[str, Any]) -> None:
    result.section("Time and memory")
    times, header = [], ["precision", "ms a step", "examples/s", "relative time", "arguments, MiB", "temporaries, MiB"]
    header += ["peak on the device, MiB"]
    rows, base = [], None
    memory = []
    for precision, measured in zip(comparison["precisions"], comparison["measured"], strict=True):
        runs = [r for r in comparison["runs"] if r["precision"] == precision]
        seconds = [r["seconds_per_step"] for r in runs if r["seconds_per_step"] is not None]
        median = statistics.median(seconds) if seconds else None
        base = median if precision == comparison["precisions"][0] else base
        peaks = [r["device_peak_bytes"] for r in runs if r["device_peak_bytes"] is not None]
        sizes = measured["memory"]
        rate = (
            statistics.median(r["examples_per_second"] for r in runs if r["examples_per_second"]) if seconds else None
        )
        rows.append(
            [
                precision,
                number(1e3 * median if median else None, ",.2f"),
                number(rate, ",.0f"),
                number(median / base if median and base else None, ".2f"),
                *(number(sizes[name] / MIB, ",.2f") for name in ("arguments_bytes", "temporary_bytes")),
                number(max(peaks) / MIB if peaks else None, ",.2f"),
            ]
        )
        if seconds:
            times.append((precision, [1e3 * s for s in seconds], 1e3 * statistics.fmean(seconds)))
        memory.append(
            (
                precision,
                [("arguments", sizes["arguments_bytes"] / MIB), ("temporaries", sizes["temporary_bytes"] / MIB)],
            )
        )
    result.table(header, rows)
    figures = []
    if times:
        bars = [(precision, [("median", statistics.median(values))]) for precision, values, _ in times]
        figures.append(("Time of a step", bar_figure(Axis("milliseconds, median over seeds"), bars, name="Time"), ""))
    caption = "Left part: arguments (state and batch). Right part: temporaries (activations, gradients)."
    figures.append(("Memory of a step", bar_figure(Axis("MiB"), memory, name="Memory of a step"), caption))
    result.figures(figures)
    note = "Time: the median of each run, over the last seconds before each of its lines. Reading data and writing "
    note += "metrics count; compiling, evaluating and saving do not. Memory: the compiler's own account of the step."
    if comparison["platform"] == "cpu":
        note += " CPUs compute half precision in float32 with casts around it: here neither time nor memory says what "
        note += "an accelerator would gain."
    result.paragraph(note, "note")


def _gradients(result: Page, errors: dict[str, Any], of: str) -> None:
    """The section on the gradients `of` an objective; of a single one, an empty text."""
    result.section(f"Gradients{of}", errors["method"])
    figures = []
    for key, label in (("relative_error", "relative error"), ("one_minus_cosine", "1 \N{MINUS SIGN} cosine")):
        series = [
            Series(precision, errors["steps"], [math.nan if v is None else v for v in rows[key]], style)
            for style, (precision, rows) in enumerate(errors["precisions"].items())
        ]
        name = f"Gradients{of}: {label} against {errors['against']}"
        figures.append((name, line_figure(Axis("step", include=(0.0,)), Axis(label, "log10"), series, name=name), ""))
    result.figures(figures)
    rows = []
    for precision, found in errors["precisions"].items():
        medians = [number(_median(found[name]), ".2e") for name in ("relative_error", "one_minus_cosine")]
        worst = found["worst"]
        error = "not finite" if worst["relative_error"] is None else number(worst["relative_error"], ".2e")
        rows.append([precision, *medians, worst["parameter"], error, str(worst["step"])])
    header = ["precision", "relative error, median", "1 \N{MINUS SIGN} cosine, median", "worst parameter", "its error"]
    result.table([*header, "at step"], rows)


def _median(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return statistics.median(there) if there else None


def _precision(result: Page, comparison: dict[str, Any]) -> None:
    result.section(
        "What ran in which dtype", "From the traced step (`jaxmp audit`): dots and convolutions by operands."
    )
    dtypes = list(dict.fromkeys(dtype for m in comparison["measured"] for dtype in m["dot_flops_share"]))
    rows = []
    for m in comparison["measured"]:
        shares = [number(m["dot_flops_share"].get(dtype, 0.0), ".1%") for dtype in dtypes]
        rows.append([m["precision"], *shares, f"{m['dot_flops']:,}", str(m["casts"]), str(len(m["findings"]))])
    header = ["precision", *(f"FLOPs in {dtype}" for dtype in dtypes), "FLOPs a step", "casts", "findings"]
    result.table(header, rows)
    for m in comparison["measured"]:
        for finding in m["findings"]:
            result.paragraph(f"{m['precision']}: {finding}", "bad")
    ended = {r["precision"]: r["summary"] for r in reversed(comparison["runs"]) if not r["failed"]}
    result.table(
        ["precision", "policy", "loss scaler"],
        [[m["precision"], m["policy"], m["scaler"]] for m in comparison["measured"]],
    )
    policy_tables(result, {precision: ended.get(precision) for precision in comparison["precisions"]})


def _origin(
    result: Page, comparison: dict[str, Any], specs: Mapping[str, MetricSpec], reports: Mapping[str, str]
) -> None:
    result.section("Runs")
    metrics = _metrics(comparison)
    rows = []
    for r in comparison["runs"]:
        test = r["summary"].get("test", {})
        rows.append(
            [
                r["precision"],
                str(r["seed"]),
                *(shown(spec_of(specs, m), test.get(m)) for m in metrics),
                f"{_skipped(r):,}",
                loss_scales(r["summary"]),
                Link(r["run"], urllib.parse.quote(os.fsencode(reports[r["run"]]))) if r["run"] in reports else r["run"],
                "failed" if _failure(r) else "",
            ]
        )
    labels = [f"test {spec_of(specs, m).label(m)}" for m in metrics]
    header = ["precision", "seed", *labels, "skipped", "last loss scale", "run", ""]
    result.table(header, rows)
    command_row = ["command", comparison["command"]]
    result.table(["", ""], [command_row, *map(list, provenance_rows(comparison))])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
