"""`compare`: one experiment under several precisions, paired by seed, as one HTML report and one JSON file.

Every cell of the grid is a run folder of its own, the one that `jaxmp train CONFIG --precision P --seed S` has. So a
comparison that was killed goes on where it was, and runs that are there already are only read.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments.audit import audit
from jaxmp.instruments.gradient_error import gradient_errors
from jaxmp.reports.figure import Axis, Series, bar_figure, interval_figure, line_figure
from jaxmp.reports.page import Page, command, provenance_rows, write
from jaxmp.reports.run_report import (
    Curve,
    curve_figures,
    examples_per_second,
    metrics_of,
    number,
    policy_tables,
    scaled,
    unit,
)
from jaxmp.runs.fit import fit
from jaxmp.runs.provenance import provenance
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Training
from jaxmp.studies.paired import method, paired
from jaxmp.text_table import without_nan

MIB = 2**20


class Cell(NamedTuple):
    """One run of the grid, before it runs."""

    precision: str
    seed: int
    experiment: Experiment
    overrides: list[str]


def grid(
    config: ConfigFile, precisions: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Cell]:
    """The cells, seed by seed, so that runs that are compared stand close in time as well.

    Raises: InputError for an empty list, an unknown precision, or one that is there twice, however it is spelled.
    """
    for name, values in (("--precision", precisions), ("--seeds", seeds)):
        if not values:
            raise InputError(f"{name}: nothing to compare; expected one value or more")
        twice = [value for value, count in collections.Counter(values).items() if count > 1]
        if twice:
            raise InputError(f"{name}: {twice[0]} is given twice")
    cells = []
    for seed in seeds:
        for precision in precisions:
            arguments = [*overrides, "--precision", precision, "--seed", str(seed)]
            cells.append(Cell(precision, seed, config.experiment(arguments), arguments))
    first: dict[str, str] = {}
    for cell in cells[: len(precisions)]:
        same = first.setdefault(cell.experiment.hash, cell.precision)
        if same != cell.precision:
            raise InputError(f"--precision: {same} and {cell.precision} are one policy, {cell.experiment.policy}")
    return cells


def compare(
    config: ConfigFile,
    precisions: Sequence[str],
    seeds: Sequence[int],
    *,
    overrides: Sequence[str] = (),
    workdir: str = "runs",
    gradients: int = 0,
    gradients_against: str = "float64",
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Trains the grid, as far as it is not trained yet, and measures what it shows.

    Args:
      config: what to train.
      precisions: what `--precision` takes; all others are compared with the first.
      seeds: one run of each precision each.
      overrides: further arguments of `jaxmp train` for all runs.
      workdir: folder of all runs.
      gradients: at how many states of the first run to compare gradients; see `gradient_errors`.
      gradients_against: `float64`, or `float32` with the random masks of training.
      log: takes each message to the user.

    Returns:
      The comparison as JSON, for `page`; None where a signal stopped a run, which is saved. A run that failed is in it,
      with its message.

    Raises: InputError as `grid` and `fit` do, before anything is trained.
    """
    if gradients < 0:
        raise InputError(f"gradients at {gradients} steps: expected a whole number of at least 0")
    cells, results = grid(config, precisions, seeds, overrides), []
    for i, cell in enumerate(cells):
        log(f"[{i + 1}/{len(cells)}] {cell.precision}, seed {cell.seed}")
        result = _train(config, cell, workdir, log)
        if result is None:
            return None
        results.append(result)
    log("measuring memory and operations")
    of_precision = [_of_precision(cell) for cell in cells[: len(precisions)]]
    errors = None
    if gradients:
        log("measuring gradients")
        experiments = {cell.precision: cell.experiment for cell in cells[: len(precisions)]}
        errors = gradient_errors(experiments, gradients, against=gradients_against)
    return {
        "config": config.name,
        "about": config.docstring.partition("\n")[0],
        "overrides": list(overrides),
        "precisions": list(precisions),
        "seeds": list(seeds),
        "command": command(),
        **{name: value for name, value in provenance(patch=False).items() if name != "command"},
        "interval": method(len(seeds)),
        "differences": differences(results, precisions),
        "measured": of_precision,
        "gradients": errors,
        "runs": results,
    }


def _train(config: ConfigFile, cell: Cell, workdir: str, log: Callable[[str], None]) -> dict[str, Any] | None:
    """One cell as JSON; None where it was stopped."""
    experiment, failed = cell.experiment, None
    before = _peak()
    try:
        fitted = fit(experiment, workdir=workdir, name=config.name, origin=config.origin(cell.overrides), log=log)
    except RunFailed as error:
        failed = str(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failed = f"out of memory: {str(error).partition(chr(10))[0]}"
    else:
        if fitted.stopped:
            return None
    if failed:
        log(f"failed: {failed}")
    folder = Path(workdir) / config.name / f"{experiment.hash}-s{experiment.seed}"
    run = Run(folder)
    summary = {} if failed else run.summary
    after = _peak()
    return {
        "precision": cell.precision,
        "seed": cell.seed,
        "run": str(folder),
        "failed": failed,
        "summary": summary,
        "examples_per_second": without_nan(examples_per_second(run.metrics)),
        "seconds_per_step": without_nan(experiment.data.batch_size / examples_per_second(run.metrics)),
        # A process has one peak, for all that it ran: only a run that raised it is known by it.
        "device_peak_bytes": after if after is not None and after > (before or 0) else None,
        "devices": run.config["devices"],
        "metrics": run.metrics,
    }


def _peak() -> int | None:
    """The most memory that this process has held on a device, in bytes; None where the device does not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _of_precision(cell: Cell) -> dict[str, Any]:
    """What a precision's step is, as compiled and as traced: no matter of the seed."""
    # pmap runs the same step, which wants its arrays stacked.
    training = Training(dataclasses.replace(cell.experiment, parallel=Parallel("jit")))
    step: Any = training.devices.compile(training.train_step, (0, 0))
    memory = step.lower(*training.arguments).compile().memory_analysis()
    seen = audit(step, *training.arguments, policy=cell.experiment.policy, modules=training.explain())
    flops = seen.dot_flops_by_dtype
    return {
        "precision": cell.precision,
        "policy": str(cell.experiment.policy),
        "scaler": str(cell.experiment.make_scaler()),
        "memory": {
            "arguments_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        },
        "dot_flops": sum(flops.values()),
        "dot_flops_share": {dtype: n / sum(flops.values()) for dtype, n in flops.items()},
        "casts": sum(cast.times for cast in seen.casts),
        "findings": [str(finding) for finding in seen.findings],
    }


def differences(results: Sequence[dict[str, Any]], precisions: Sequence[str]) -> list[dict[str, Any]]:
    """Each metric on the test set by precision, and its paired differences to the first precision.

    Only seeds with which both runs ended are pairs.
    """
    ended = {(r["precision"], r["seed"]): r["summary"]["test"] for r in results if not r["failed"]}
    metrics = sorted({name for test in ended.values() for name in test}, key=lambda name: (name == "loss", name))
    found = []
    for metric in metrics:
        for precision in precisions:
            values = {
                seed: test[metric] for (p, seed), test in ended.items() if p == precision and test[metric] is not None
            }
            reference = {seed: ended.get((precisions[0], seed), {}).get(metric) for seed in values}
            pairs = {seed: v - r for seed, v in values.items() if (r := reference[seed]) is not None}
            versus = paired(list(pairs.values())) if precision != precisions[0] else None
            found.append(
                {
                    "metric": metric,
                    "precision": precision,
                    "values": values,
                    "mean": statistics.fmean(values.values()) if values else None,
                    "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "pairs": pairs if versus else None,
                    "difference": versus and without_nan(versus._asdict()),
                }
            )
    return found


def failures(comparison: dict[str, Any]) -> list[str]:
    """What failed, a line each."""
    return [f"{r['precision']}, seed {r['seed']}: {r['failed']}" for r in comparison["runs"] if r["failed"]]


def save(comparison: dict[str, Any], output: Path) -> None:
    """Writes the page to `output` and the JSON beside it. Raises InputError where that cannot be done."""
    write(output.with_suffix(".json"), json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    page(comparison).write(output)


# The page.


def page(comparison: dict[str, Any]) -> Page:
    """The comparison as a page."""
    precisions, seeds = comparison["precisions"], comparison["seeds"]
    curves = [Curve(r["precision"], r["seed"], r["metrics"], bool(r["failed"])) for r in comparison["runs"]]
    devices = comparison["devices"]
    dot = "\N{MIDDLE DOT}"
    lead = (
        f"{' / '.join(precisions)} {dot} {_count(len(seeds), 'seed')} {dot} {len(devices)} x {devices[0]}, JAX "
        f"{comparison['versions']['jax']}"
    )
    result = Page(f"{comparison['config']}, by precision", lead)
    result.paragraph(comparison["about"])
    result.table(*_summary(comparison))
    for failure in failures(comparison):
        result.paragraph(f"Failed: {failure}", "bad")
    figures = curve_figures(curves)
    main = metrics_of(curves)[-1] if curves else "loss"
    intervals = _interval_figures(comparison)
    result.figures([*figures[:1], *[f for f in figures if f[0] == f"{main.capitalize()}, validation"], *intervals])
    if len(precisions) > 1:
        result.paragraph(comparison["interval"], "note")
    result.section("Training")
    shown = {figures[0][0], f"{main.capitalize()}, validation"}
    result.figures([*[figure for figure in figures if figure[0] not in shown], *_difference_curves(curves, precisions)])
    _cost(result, comparison)
    if comparison["gradients"]:
        _gradients(result, comparison["gradients"])
    _precision(result, comparison)
    _origin(result, comparison)
    result.data(comparison)
    return result


def _summary(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metrics = list(dict.fromkeys(d["metric"] for d in comparison["differences"]))
    header = ["precision", *(f"test {unit(m)[1]}" for m in metrics)]
    header += [f"difference in {metrics[0].replace('_', ' ')}, points" if metrics else "difference", "p"]
    header += ["steps skipped", "failed", "ms a step", "temporaries, MiB"]
    rows = []
    for precision, measured in zip(comparison["precisions"], comparison["measured"], strict=True):
        runs = [r for r in comparison["runs"] if r["precision"] == precision]
        of = {d["metric"]: d for d in comparison["differences"] if d["precision"] == precision}
        versus = of[metrics[0]]["difference"] if metrics else None
        seconds = [r["seconds_per_step"] for r in runs if r["seconds_per_step"] is not None]
        rows.append(
            [
                precision,
                *(_mean_and_spread(of[m]) for m in metrics),
                _interval_text(metrics[0], versus) if versus else "reference" if metrics else "",
                number(versus["p"], ".3g") if versus else "",
                f"{sum(_skipped(r) for r in runs):,}",
                f"{sum(bool(r['failed']) for r in runs)} of {len(runs)}",
                number(1e3 * statistics.median(seconds) if seconds else None, ",.2f"),
                number(measured["memory"]["temporary_bytes"] / MIB, ",.2f"),
            ]
        )
    return header, rows


def _mean_and_spread(of: dict[str, Any]) -> str:
    metric, spread = of["metric"], of["standard_deviation"]
    digits = ".2f" if "accuracy" in metric else ".4f"
    text = number(scaled(metric, of["mean"]), digits)
    return text if spread is None else f"{text} ± {number(scaled(metric, spread), digits)}"


def _interval_text(metric: str, versus: dict[str, Any]) -> str:
    digits = "+.2f" if "accuracy" in metric else "+.4f"
    mean, low, high = (number(scaled(metric, versus[name]), digits) for name in ("mean", "low", "high"))
    return mean if versus["low"] is None else f"{mean} ({low} to {high})"


def _skipped(run: dict[str, Any]) -> int:
    lines = run["metrics"]
    return lines[-1]["skipped_steps"] if lines else 0


def _interval_figures(comparison: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    reference = comparison["precisions"][0]
    for metric in dict.fromkeys(d["metric"] for d in comparison["differences"]):
        rows = []
        for style, precision in enumerate(comparison["precisions"]):
            (of,) = (d for d in comparison["differences"] if (d["metric"], d["precision"]) == (metric, precision))
            versus, factor = of["difference"], unit(metric)[0]
            if versus is None or versus["mean"] is None:
                continue
            points = [factor * v for v in of["pairs"].values()]
            numbers = [versus["mean"], versus["low"], versus["high"]]
            interval = None if versus["low"] is None else tuple(factor * v for v in numbers)
            rows.append((precision, style, points, interval))
        if not rows:
            continue
        name = f"Test {metric.replace('_', ' ')}, difference to {reference}"
        label = f"difference, {'percentage points' if 'accuracy' in metric else 'loss'}"
        caption = "Dots: each seed. Bar: mean and 95 % interval."
        found.append((name, interval_figure(Axis(label), rows, name=name), caption))
    return found


def _difference_curves(curves: Sequence[Curve], precisions: Sequence[str]) -> list[tuple[str, str, str]]:
    """The validation loss of each run less that of the first precision's run with its seed."""
    if len(precisions) < 2 or "loss" not in metrics_of(curves):
        return []
    reference = {curve.seed: dict(zip(*curve.of("loss", "validation"), strict=True)) for curve in curves
                 if curve.group == precisions[0]}  # fmt: skip
    series = []
    for style, precision in enumerate(precisions[1:], start=1):
        lines = []
        for curve in (c for c in curves if c.group == precision):
            points = [(x, y - reference[curve.seed][x]) for x, y in zip(*curve.of("loss", "validation"), strict=True)
                      if x in reference[curve.seed]]  # fmt: skip
            lines.append(dict(points))
            label = precision if sum(c.group == precision for c in curves) == 1 else ""
            series.append(Series(label, list(lines[-1]), list(lines[-1].values()), style, faint=not label))
        common = sorted(set.intersection(*map(set, lines)))
        if len(lines) > 1:
            series.append(
                Series(precision, common, [float(np.mean([line[x] for line in lines])) for x in common], style)
            )
    name = f"Loss, validation, difference to {precisions[0]}"
    svg = line_figure(Axis("step", include=(0.0,)), Axis("difference in loss", include=(0.0,)), series, name=name)
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
        base = median if base is None else base
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
    note = "Time: of each run the median over its lines but the first, which includes compiling; data and writing of "
    note += "metrics included. Memory: the compiler's own account of the step."
    if comparison["platform"] == "cpu":
        note += " CPUs compute half precision in float32 with casts around it: here neither time nor memory says what "
        note += "an accelerator would gain."
    result.paragraph(note, "note")


def _gradients(result: Page, errors: dict[str, Any]) -> None:
    result.section("Gradients", errors["method"])
    figures = []
    for key, label in (("relative_error", "relative error"), ("one_minus_cosine", "1 \N{MINUS SIGN} cosine")):
        series = [
            Series(precision, errors["steps"], [math.nan if v is None else v for v in rows[key]], style)
            for style, (precision, rows) in enumerate(errors["precisions"].items())
        ]
        name = f"Gradients: {label} against {errors['against']}"
        figures.append((name, line_figure(Axis("step", include=(0.0,)), Axis(label, "log10"), series, name=name), ""))
    result.figures(figures)
    rows = []
    for precision, of in errors["precisions"].items():
        medians = [number(_median(of[name]), ".2e") for name in ("relative_error", "one_minus_cosine")]
        worst = of["worst"]
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


def _origin(result: Page, comparison: dict[str, Any]) -> None:
    result.section("Runs")
    metrics = list(dict.fromkeys(d["metric"] for d in comparison["differences"]))
    rows = []
    for r in comparison["runs"]:
        test = r["summary"].get("test", {})
        rows.append(
            [
                r["precision"],
                str(r["seed"]),
                *(number(scaled(m, test.get(m)), ".4g") for m in metrics),
                f"{_skipped(r):,}",
                number(r["summary"].get("loss_scale"), ",g"),
                r["run"],
                "failed" if r["failed"] else "",
            ]
        )
    header = ["precision", "seed", *(f"test {unit(m)[1]}" for m in metrics), "skipped", "last loss scale", "run", ""]
    result.table(header, rows)
    command_row = ["command", comparison["command"]]
    result.table(["", ""], [command_row, *map(list, provenance_rows(comparison))])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
