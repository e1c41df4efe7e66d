"""`page`, `text`, `cell`: a study of many trials for a browser, a terminal and a notebook, from its JSON alone.

The JSON is what `jaxmp.studies.tune_study.study_to_json` returns.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmp.html.elements import NO_VALUE, Elements
from jaxmp.html.figure import DOTS, Axis, Series, bar_figure, line_figure, point_figure
from jaxmp.reports.page import Page, provenance_rows
from jaxmp.reports.run_report import shown
from jaxmp.runs.provenance import hardware
from jaxmp.text_table import table
from jaxmp.training.metrics import MetricSpec, spec_of, specs_from_json

SHOWN = 10
"""trials in the table of a terminal"""
CURVES = 12
"""trials whose curves are drawn: the best ones"""


def best_of(study: Mapping[str, Any]) -> dict[str, Any] | None:
    """The best of the trials that have all seeds; None if there is none."""
    return next((trial for trial in study["trials"] if trial["number"] == study["best"]), None)


def command_of(study: Mapping[str, Any], trial: Mapping[str, Any]) -> str | None:
    """The command that makes the first run of a trial again; None where no arguments make it."""
    if not trial["arguments"]:
        return None
    definition = study["definition"]
    words = [*definition["overrides"], *trial["arguments"], "--workdir", study["workdir"]]
    return shlex.join(["jaxmp", "train", study["source"], *words])


def note_of(study: Mapping[str, Any]) -> str | None:
    """What the command of a trial does otherwise than the study did; None if it makes the same bits."""
    if not study["definition"].get("seeds_together"):
        return None
    return "it trains one seed alone: last digits differ from those of seeds that were trained together"


def text(study: Mapping[str, Any]) -> str:
    """The best trials as lines of text, and the command of the best."""
    spec, ranked = _spec(study), _ranked(study)
    header, rows = _table(study, ranked[:SHOWN])
    lines: list[str] = [table(rows, header=header, right=[0, 1])] if rows else []
    if len(ranked) > SHOWN:
        lines.append(f"and {len(ranked) - SHOWN} more trials; `jaxmp report {study['folder']}` shows all")
    lines.append(f"{'trials':<16} {_counts(study)}")
    best = best_of(study)
    if best is None:
        lines.append(f"{'best':<16} none: no trial ended with all its seeds")
    else:
        metric = study["definition"]["metric"].replace("_", " ")
        value = f"validation {metric} {shown(spec, best['value'])} {spec.unit}".rstrip()
        lines.append(f"{'best':<16} trial {best['number'] + 1}, {value}")
        for run in best["runs"]:
            lines.append(f"{'run':<16} {run}")
        if command := command_of(study, best):
            lines.append(f"{'command':<16} {command}")
            if note := note_of(study):
                lines.append(f"{'':<16} {note}")
    return "\n".join(lines)


def cell(study: Mapping[str, Any]) -> str:
    """The table of the best trials and the figures, as the HTML of a notebook's cell."""
    found = Elements()
    found.paragraph(_counts(study))
    found.table(*_table(study, _ranked(study)[:SHOWN]))
    found.figures(_figures(study))
    return found.cell()


def page(study: Mapping[str, Any]) -> Page:
    """Draws the page of a study: the best trial and its command, history, slices, importance, curves, all trials."""
    definition, spec = study["definition"], _spec(study)
    dot = "\N{MIDDLE DOT}"
    made = f"{'most' if definition['direction'] == 'max' else 'least'} {_label(study, spec)} on the validation split"
    lead = f"{made} {dot} {definition['sampler']} {dot} {_counts(study)} {dot} {hardware(study)}"
    result = Page(f"{definition['config']}: a study of {len(definition['space'])} fields", lead)
    best = best_of(study)
    if best is None:
        result.paragraph("No trial has ended with all its seeds and a finite value yet.", "note")
    else:
        result.table(
            ["", ""],
            [
                ["best trial", str(best["number"] + 1)],
                [f"validation {_label(study, spec)}", shown(spec, best["value"])],
                *([leaf.replace("_", "-"), _param(value)] for leaf, value in best["params"].items()),
                *(["run", run] for run in best["runs"]),
            ],
        )
        if command := command_of(study, best):
            result.quote(command)
            if note := note_of(study):
                result.paragraph(f"{note[0].upper()}{note[1:]}.", "note")
        result.paragraph(
            "The best of many trials looks better on its validation split than it is: chance has chosen it, too. Train "
            "it and the default on fresh seeds before you believe in it.",
            "note",
        )
    result.figures(_figures(study))
    result.section("Each field", "Every point is a trial: its value of the field, and the metric that came out.")
    result.figures(_slices(study))
    if curves := _curves(study):
        saw = "of the first seed of each trial; a cross ends a pruned one."
        if definition["pruner"] == "wilcoxon":
            saw = "of each seed of each trial, beside those of the best trial; a cross ends a pruned one."
        result.section("Curves", f"What the pruner saw {saw}")
        result.figures(curves)
    result.section("Trials")
    result.table(*_table(study, _ranked(study)))
    without = [trial for trial in study["trials"] if trial["reason"]]
    if without:
        result.section("Failed, refused or pruned")
        result.table(["trial", "state", "reason"], [[str(t["number"] + 1), t["state"], t["reason"]] for t in without])
    result.section("Provenance")
    asked = [(name.replace("_", " "), value) for name, value in definition.items() if name != "space"]
    result.table(
        ["", ""],
        [
            *([leaf, values] for leaf, values in definition["space"].items()),
            *([name, " ".join(value) if isinstance(value, list) else str(value)] for name, value in asked),
            ["storage", study["storage"] or "journal.log in the study's folder"],
            ["command", study["command"]],
            *map(list, provenance_rows(study)),
        ],
    )
    result.paragraph(
        f"TensorBoard's hyper-parameter tab has a row for each run: tensorboard --logdir {study['workdir']}"
    )
    result.data({key: value for key, value in study.items() if key != "made_by"})
    return result


def _spec(study: Mapping[str, Any]) -> MetricSpec:
    return spec_of(specs_from_json(study["metrics"]), study["definition"]["metric"])


def _label(study: Mapping[str, Any], spec: MetricSpec) -> str:
    return spec.label(study["definition"]["metric"])


def _param(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _counts(study: Mapping[str, Any]) -> str:
    """`40 trials: 31 done, 6 pruned, 3 failed`."""
    trials = study["trials"]
    states = ("done", "pruned", "failed", "running", "waiting")
    counted = [(sum(trial["state"] == state for trial in trials), state) for state in states]
    return f"{len(trials)} trials: {', '.join(f'{count} {state}' for count, state in counted if count)}"


def _ranked(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials that have begun: those with a value and all seeds from the best to the worst, then the others."""
    sign = 1 if study["definition"]["direction"] == "min" else -1
    seeds = study["definition"]["seeds"]

    def rank(trial: dict[str, Any]) -> tuple[bool, bool, float, int]:
        value = trial["value"]
        return value is None, len(trial["seeds"]) < seeds, math.inf if value is None else sign * value, trial["number"]

    return sorted((trial for trial in study["trials"] if trial["state"] != "waiting"), key=rank)


def _table(study: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    spec, leaves, seeds = _spec(study), list(study["definition"]["space"]), study["definition"]["seeds"]
    header = ["trial", _label(study, spec), *(["seeds"] if seeds > 1 else []), *leaves, "state"]
    rows = []
    for trial in trials:
        row = [str(trial["number"] + 1), shown(spec, trial["value"])]
        if seeds > 1:
            values = [value for value in trial["seeds"].values() if value is not None]
            spread = f"{shown(spec, min(values))} to {shown(spec, max(values))}" if len(values) > 1 else NO_VALUE
            row.append(f"{len(values)}: {spread}")
        params = {name.replace("_", "-"): value for name, value in trial["params"].items()}
        row += [_param(params[leaf]) if leaf in params else NO_VALUE for leaf in leaves]
        rows.append([*row, trial["state"]])
    return header, rows


def _figures(study: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The history, and the importance of each field where there are trials enough."""
    found = [("History", _history(study), "Points: trials. Stairs: the best so far of those with all seeds.")]
    if importance := study["importance"]:
        rows = [(leaf.replace("_", "-"), [("share", 100 * share)]) for leaf, share in importance.items()]
        svg = bar_figure(Axis("share of the importance, %"), rows, name="importance of each field")
        caption = "How much a field decides whether a trial is among the best (PED-ANOVA, Watanabe et al. 2023)."
        found.append(("Importance", svg, caption))
    return found


def _ended(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [trial for trial in study["trials"] if trial["value"] is not None]


def _history(study: Mapping[str, Any]) -> str:
    spec, ended = _spec(study), _ended(study)
    sign, best, stairs = 1 if study["definition"]["direction"] == "min" else -1, math.inf, []
    for trial in ended:
        if len(trial["seeds"]) == study["definition"]["seeds"]:  # the mean of fewer is of other seeds
            best = min(best, sign * trial["value"])
        stairs.append(sign * best * spec.factor if math.isfinite(best) else math.nan)
    x = [trial["number"] + 1 for trial in ended]
    y = [trial["value"] * spec.factor for trial in ended]
    lines = [Series("best", x, stairs, 0, steps=True)]
    for first in range(0, len(x), DOTS // 2):  # a longer line has no dots
        last = first + DOTS // 2
        # A gap after each point, so that no line joins them.
        gaps = [value for point in y[first:last] for value in (point, math.nan)]
        lines.append(Series("" if first else "trial", [n for n in x[first:last] for _ in "ab"], gaps, 1))
    return line_figure(Axis("trial", whole=True), _axis(study, spec), lines, name="value of each trial")


def _axis(study: Mapping[str, Any], spec: MetricSpec) -> Axis:
    values = [trial["value"] for trial in _ended(study)]
    wide = bool(values) and min(values) > 0 and max(values) > 8 * min(values) and spec.unit != "%"
    return Axis(f"validation {_label(study, spec)}", "log10" if wide else "linear")


def _slices(study: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A figure for each field: its value in every trial, and the metric."""
    spec, found = _spec(study), []
    for leaf, values in study["definition"]["space"].items():
        ended = [
            (trial, {name.replace("_", "-"): value for name, value in trial["params"].items()})
            for trial in _ended(study)
        ]
        names = study["choices"].get(leaf, ())
        points = []
        for trial, params in ended:
            if leaf in params:
                x = names.index(params[leaf]) if names else params[leaf]
                tip = f"trial {trial['number'] + 1}: {_param(params[leaf])}, {shown(spec, trial['value'])}"
                points.append((float(x), trial["value"] * spec.factor, 0, tip))
        axis = Axis(leaf, "log10" if values.startswith("log:") and not names else "linear")
        found.append((leaf, point_figure(axis, _axis(study, spec), points, names=names, name=f"slice of {leaf}"), ""))
    return found


def _curves(study: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The curves that a pruner saw; of no other study, whose runs have them."""
    if study["definition"]["pruner"] == "none":
        return []
    spec = _spec(study)
    drawn = [trial for trial in _ranked(study) if len(trial["curve"]) > 1]
    kept = [*drawn[:CURVES], *(trial for trial in drawn[CURVES:] if trial["state"] == "pruned")]
    if not kept:
        return []
    by_seed = study["definition"]["pruner"] == "wilcoxon"
    series = [
        Series(
            f"trial {trial['number'] + 1}" if i < 3 else "",
            [x for x, _ in trial["curve"]],
            [y * spec.factor for _, y in trial["curve"]],
            min(i, 5),
            faint=i >= 3,
            failed=trial["state"] == "pruned",
        )
        for i, trial in reversed(list(enumerate(kept)))
    ]
    x = Axis("seed, by its index", whole=True) if by_seed else Axis("share of the run, %", include=(0.0,))
    return [("Seen by the pruner", line_figure(x, _axis(study, spec), series, name="curves of trials"), "")]
