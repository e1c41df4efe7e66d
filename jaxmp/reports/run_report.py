"""`report`: curves, tables and provenance of one or more runs, as one self-contained HTML file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmp.html.elements import NO_VALUE
from jaxmp.reports.page import Page, provenance_rows
from jaxmp.reports.ranges import add_ranges
from jaxmp.runs.curves import Curve, curve_figures, examples_per_second, metrics_of
from jaxmp.runs.folder import how_to_blame
from jaxmp.runs.run import Run
from jaxmp.training.metrics import MetricSpec


def report(runs: Sequence[Run], *, look: bool = False) -> Page:
    """Draws a page about runs: curves, loss scale, skipped steps, speed, policies and provenance.

    Runs that differ by their seed alone are drawn in one colour, with their mean. Of a run that has not ended, the
    lines so far are drawn.

    Args:
      runs: one or more, in the order of the page.
      look: whether to measure ranges for runs that kept none, by repeating a step from their last checkpoint.
    """
    names = _names(runs)
    specs: dict[str, MetricSpec] = {}
    for run in runs:  # where runs declare a metric differently, the first counts
        specs |= {name: spec for name, spec in run.metric_specs.items() if name not in specs}
    curves = [
        Curve(name, run.config["seed"], run.metrics, run.failure is not None, specs)
        for name, run in zip(names, runs, strict=True)
    ]
    heading = runs[0].config["name"] if len({run.config["name"] for run in runs}) == 1 else "Runs"
    only = runs[0] if len(runs) == 1 else None
    lead = f"{only.config['experiment']['precision']}, seed {only.config['seed']}" if only else f"{len(runs)} runs"
    page = Page(heading, f"{lead} \N{MIDDLE DOT} {_devices(runs)}")
    page.table(*_summary(curves, runs))
    for run in runs:
        if run.failure:
            page.paragraph(f"Failed: {run.path}: {run.failure}", "bad")
            if how := how_to_blame(run.path, run.config):
                page.paragraph(f"What made it, and what would have prevented it: {how}")
    unfinished = [str(run.path) for run in runs if not _ended(run) and not run.failure]
    if unfinished:
        page.paragraph(f"Not ended, and shown as far as it is: {', '.join(unfinished)}", "note")

    page.section("Training")
    page.figures(curve_figures(curves))
    looks = [run.ranges or (run.count_ranges() if look else []) for run in runs]
    labels = _apart(names, [f"seed {curve.seed}" for curve in curves], [str(run.path) for run in runs])
    if any(looks):
        add_ranges(page, _by_objective(dict(zip(labels, looks, strict=True))))
    _samples(page, dict(zip(labels, runs, strict=True)))
    _policies(page, runs, names)
    _origin(page, runs)
    data = zip(runs, looks, strict=True)
    page.data({"runs": [{"run": str(run.path), "metrics": run.metrics, "ranges": lines} for run, lines in data]})
    return page


def _by_objective(looks: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Lines of ranges by the name of the run; of several objectives, by run and objective."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, lines in looks.items():
        for line in lines:
            found.setdefault(f"{name}, {line['objective']}" if "objective" in line else name, []).append(line)
    return found


# Tables and words.


def _names(runs: Sequence[Run]) -> list[str]:
    """Names each run after the fields, other than the seed, in which it differs from the others."""
    flat = [
        {"config": run.config["name"], "from": _began(run.config), **_leaves(run.config["experiment"])} for run in runs
    ]
    keys = list(dict.fromkeys(key for leaves in flat for key in leaves))
    apart = [key for key in keys if key != "seed" and len({json.dumps(leaves.get(key)) for leaves in flat}) > 1]
    if not apart:
        return [run.config["experiment"]["precision"] for run in runs]
    short = {key: f"{key.rpartition('.')[2]} " if key not in ("precision", "config") else "" for key in apart}
    return [", ".join(f"{short[key]}{leaves.get(key)}" for key in apart) for leaves in flat]


def _began(config: Mapping[str, Any]) -> str:
    """What a run began with, in words: the same for all seeds of the run that it is from."""
    begins = config.get("begins_with")
    if begins is None:
        return "new weights"
    if "sha256" in begins:
        return Path(config.get("weights_file", begins["sha256"][:12])).name
    return f"{Path(config['parent']).parent.name}/{begins['hash']}@{begins['step']} ({begins['how']})"


def _apart(names: Sequence[str], *more: Sequence[str]) -> list[str]:
    """The names, each with as many of `more` behind it as it takes until no two are the same."""
    found = list(names)
    for each in more:
        if len(set(found)) < len(found):
            found = [f"{name}, {text}" for name, text in zip(found, each, strict=True)]
    return found


def _leaves(value: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {where: value}
    return {k: v for name, item in value.items() for k, v in _leaves(item, f"{where}.{name}".lstrip(".")).items()}


def _ended(run: Run) -> bool:
    return run.has_ended


def _devices(runs: Sequence[Run]) -> str:
    kinds = dict.fromkeys(f"{len(run.config['devices'])} x {run.config['devices'][0]}" for run in runs)
    return ", ".join(kinds)


def _summary(curves: Sequence[Curve], runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    metrics = metrics_of(curves)
    header = ["run", "seed", "steps", "skipped", "loss scale"]
    header += [f"test {spec.label(metric)}" for metric, spec in metrics.items()]
    header += ["best step", "examples/s", "wall time, s", "parameters"]
    rows = []
    for curve, run in zip(curves, runs, strict=True):
        summary = run.summary if _ended(run) else {}
        last: dict[str, Any] = curve.lines[-1] if curve.lines else {}
        known = {**last, **summary}
        rows.append(
            [
                curve.group,
                str(curve.seed),
                number(summary.get("steps", last.get("step")), ",d"),
                number(known.get("skipped_steps"), ",d"),
                loss_scales(known),
                *(shown(spec, summary.get("test", {}).get(metric)) for metric, spec in metrics.items()),
                number(summary.get("best", {}).get("step"), ",d"),
                number(examples_per_second(curve.lines), ",.0f"),
                number(known.get("wall_seconds"), ",.1f"),
                number(summary.get("parameters"), ",d"),
            ]
        )
    return header, rows


def loss_scales(values: Mapping[str, Any]) -> str:
    """The loss scale of a line or summary; those of several objectives by name."""
    of_each = [f"{name.partition('/')[2]} {of:,g}" for name, of in values.items() if name.startswith("loss_scale/")]
    return ", ".join(of_each) or number(values.get("loss_scale"), ",g")


def shown(spec: MetricSpec, value: float | None, *, sign: str = "") -> str:
    """Formats a metric's value, without its unit; a dash for None and NaN. `sign` is "+" to show a plus too."""
    if value is None or value != value:
        return NO_VALUE
    return spec.text(value, sign=sign).replace("-", "\N{MINUS SIGN}")


def number(value: float | None, form: str) -> str:
    """Formats a number; a dash for None and NaN."""
    return NO_VALUE if value is None or value != value else format(value, form).replace("-", "\N{MINUS SIGN}")


def _samples(page: Page, runs: Mapping[str, Run]) -> None:
    """Adds the texts and pictures drawn from the model, the files of each run by the step of the weights."""
    found = {name: run.samples for name, run in runs.items() if run.samples}
    if found:
        page.section("Samples")
    for name, paths in found.items():
        for path in paths:
            page.paragraph(f"{name}: {path.name}" if len(runs) > 1 else path.name)
            if path.suffix == ".png":
                page.picture(path.read_bytes(), f"pictures drawn from {name}, {path.stem}")
            else:
                page.quote(path.read_text(encoding="utf-8"))


def _policies(page: Page, runs: Sequence[Run], names: Sequence[str]) -> None:
    page.section("Precision")
    policy_tables(page, {name: run.summary for name, run in zip(names, runs, strict=True) if _ended(run)})
    for run in runs:
        if not _ended(run):
            page.paragraph(f"{run.path}: {run.config['experiment']['precision']}")


def policy_tables(page: Page, summaries: Mapping[str, dict[str, Any] | None]) -> None:
    """Adds tables of the policy of each module, side by side for runs of one model.

    Args:
      page: takes the tables.
      summaries: the content of summary.json by the name of the run; None for a run that failed and has none.
    """
    tables: dict[str, dict[str, list[str]]] = {}
    for name, summary in summaries.items():
        if summary is None:
            continue
        rows = summary["policy"]
        model = json.dumps([[row["module"] or "(model)", row["type"], f"{row['parameters']:,}"] for row in rows])
        tables.setdefault(model, {})[name] = [row["policy"] + _by_rule(row["rule"]) for row in rows]
    for model, policies in tables.items():
        modules = json.loads(model)
        failed = {name: ["failed"] * len(modules) for name, summary in summaries.items() if summary is None}
        columns = {name: (policies | failed)[name] for name in summaries if name in policies | failed}
        rows = [[*module, *row] for module, *row in zip(modules, *columns.values(), strict=True)]
        page.table(["module", "class", "parameters", *columns], rows)


def _by_rule(rule: str) -> str:
    return f" (rule {rule})" if rule else ""


def _origin(page: Page, runs: Sequence[Run]) -> None:
    page.section("Provenance")
    for run in runs:
        if len(runs) > 1 and run is not runs[0] and _same_origin(run, runs[0]):
            continue
        page.table(["", ""], [["run", str(run.path)], *map(list, provenance_rows(run.config))])
    rows = [[str(run.path), _command(run)] for run in runs]
    page.table(["run", "command"], rows)
    page.details("The first experiment, as resolved", json.dumps(runs[0].config["experiment"], indent=1))


def _same_origin(a: Run, b: Run) -> bool:
    return provenance_rows(a.config) == provenance_rows(b.config)


def _command(run: Run) -> str:
    words = run.config.get("command") or []
    return shlex.join([Path(words[0]).name, *words[1:]]) if words else "(from Python)"
