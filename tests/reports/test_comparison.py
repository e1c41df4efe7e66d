"""The page of a comparison: drawn from its JSON alone, whatever the task measures."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import jaxmp
from jaxmp.reports.comparison import failures, page, text
from jaxmp.studies.compare import differences
from jaxmp.training.metrics import MetricSpec, specs_to_json

PRECISIONS = ["float32", "mixed_bfloat16"]
SPECS = {
    "loss": MetricSpec("min", "bits"),
    "perplexity": MetricSpec("min", digits=1),
    "recall": MetricSpec("max", "%"),
}


def run(precision, seed, perplexity, failed=None):
    metrics = {"loss": 2.0, "perplexity": perplexity, "recall": 0.5, "skipped_steps": 0, "loss_scale": 1.0}
    lines = [
        {"step": s, "split": split, "examples_per_second": 100.0, **metrics}
        for s in (1, 2)
        for split in ("train", "validation")
    ]
    test = {name: metrics[name] for name in SPECS}
    summary = {} if failed else {"test": test, "loss_scale": 1.0, "policy": []}
    return {
        "precision": precision, "seed": seed, "run": f"runs/{precision}-{seed}", "failed": failed, "summary": summary,
        "examples_per_second": 100.0, "seconds_per_step": 0.1, "device_peak_bytes": None, "devices": ["cpu"],
        "metrics": lines,
    }  # fmt: skip


def comparison(perplexities):
    """Of perplexities by precision and seed."""
    runs = [
        run(precision, seed, value)
        for precision, values in zip(PRECISIONS, perplexities, strict=True)
        for seed, value in enumerate(values)
    ]
    measured = [
        {
            "precision": precision, "policy": precision, "scaler": "none", "dot_flops": 1, "casts": 0, "findings": [],
            "memory": {"arguments_bytes": 2**20, "temporary_bytes": 2**20}, "dot_flops_share": {"float32": 1.0},
        }
        for precision in PRECISIONS
    ]  # fmt: skip
    seeds = list(range(len(perplexities[0])))
    found = {
        "config": "lm", "about": "", "overrides": [], "precisions": PRECISIONS, "seeds": seeds,
        "command": "jaxmp compare lm", "devices": ["cpu"], "platform": "cpu", "versions": {"jax": "0"}, "git": None,
        "metrics": specs_to_json(SPECS), "monitor": "perplexity", "interval": "how", "gradients": None,
        "differences": differences(runs, PRECISIONS), "measured": measured, "runs": runs,
    }  # fmt: skip
    return json.loads(json.dumps(found, allow_nan=False))


def visible(found):
    text = re.sub(r"<(script|style).*?</\1>", "", str(page(found)), flags=re.DOTALL)
    return text, [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>.*?</t[hd]>", text)]


def test_metrics_are_named_with_their_units_and_shown_with_their_digits(monkeypatch):
    monkeypatch.setattr("sys.argv", ["jaxmp", "compare"])  # the page has the command line, which may name an accuracy
    text, cells = visible(comparison([[30.0, 31.0], [31.0, 31.5]]))
    assert cells[1:5] == ["test perplexity", "test loss, bits", "test recall, %", "difference in perplexity"]
    assert {"30.5 ± 0.7", "2.0000 ± 0.0000", "50.00 ± 0.00"} <= set(cells)
    for axis in ("difference in perplexity", "difference in recall, percentage points", "difference in loss, bits"):
        assert f">{axis}</text>" in text, axis
    assert "accuracy" not in text


def test_a_run_that_failed_is_in_no_mean_of_differences_and_is_counted():
    found = comparison([[30.0, 31.0, 32.0], [31.0, 31.5, 32.5]])
    found["runs"][4] |= {"failed": "the loss is NaN", "metrics": []}
    text, _ = visible(found)
    figure = text.partition("<h3>Loss, validation, difference to float32</h3>")[2].partition("</figure>")[0]
    assert "mixed_bfloat16 (1 failed)" in figure


def test_the_figure_of_the_monitored_metric_is_on_top():
    text, _ = visible(comparison([[30.0, 31.0], [31.0, 31.5]]))
    top, rest = text.split("<h2>Training</h2>")
    assert "Perplexity, validation" in top and "Loss, validation" in top and "Recall, validation" not in top
    assert "Recall, validation" in rest and "<h3>Perplexity, validation</h3>" not in rest


@pytest.mark.parametrize(
    ("perplexities", "words"),
    [
        ([[30.0, 31.0], [31.0, 32.0]], "+1.0 (no interval: both differences are equal)"),
        ([[30.0], [31.0]], "+1.0 (no interval: one pair)"),
        ([[30.0, 31.0], [31.0, 31.5]], "+0.8 (\N{MINUS SIGN}2.4 to +3.9)"),
    ],
)
def test_an_interval_is_shown_or_it_is_said_why_there_is_none(perplexities, words):
    text, cells = visible(comparison(perplexities))
    assert words in cells
    figure = text.partition("<h3>Test perplexity, difference to float32</h3>")[2].partition("</figure>")[0]
    assert "mean and 95 % t interval" in figure
    assert ("mixed_bfloat16: no interval: " in figure) == ("no interval" in words)


def test_a_column_of_p_is_there_only_where_there_is_a_p():
    few, many = (visible(comparison([[30.0] * n, [31.0, *[32.0] * (n - 1)]]))[1] for n in (5, 6))
    assert "p" not in few and many[many.index("p") - 1] == "difference in perplexity" and "0.0312" in many


def test_what_failed_is_a_line_each():
    found = comparison([[30.0], [31.0]])
    found["runs"][1]["failed"] = "diverged"
    assert failures(found) == ["mixed_bfloat16, seed 0: diverged"]
    assert "Failed: mixed_bfloat16, seed 0: diverged" in visible(found)[0]


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_report_imports_a_study():
    files = list((Path(jaxmp.__file__).parent / "reports").glob("*.py"))
    assert len(files) >= 5
    for file in files:
        assert not [name for name in imported(file) if name.startswith("jaxmp.studies")], file


def test_the_terminal_shows_the_first_table_of_the_page_within_80_columns():
    shown = text(comparison([[10.0, 12.0, 11.0], [10.5, 12.5, 11.0]]))
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "over 3 seeds" in shown and "difference: in perplexity, to float32 (95 % t interval)" in shown
    first, second = shown.splitlines()[-2:]
    assert first.split()[:4] == ["float32", "11.0", "±", "1.0"] and "reference" in first
    assert "+0.3 (\N{MINUS SIGN}0.4 to +1.1)" in second, "by hand: 1/3, and 4.303 standard errors"
    assert "failed" not in shown and "pairs" not in shown
    assert "3 of 3" in visible(comparison([[10.0, 12.0, 11.0], [10.5, 12.5, 11.0]]))[1]


def test_the_terminal_has_a_column_of_failures_where_a_run_failed():
    found = comparison([[10.0, 12.0], [10.5, 12.5]])
    found["runs"][3] = run("mixed_bfloat16", 1, 12.5, failed="it diverged")
    found["differences"] = differences(found["runs"], PRECISIONS)
    assert text(found).splitlines()[-1].endswith("1 of 2")


def test_a_run_that_ended_without_a_finite_metric_counts_as_failed_and_the_pairs_left_are_shown():
    found = comparison([[10.0, 12.0, 11.0], [10.5, 12.5, 11.0]])
    found["runs"][4]["summary"]["test"]["perplexity"] = None
    found["differences"] = differences(found["runs"], PRECISIONS)
    assert failures(found) == ["mixed_bfloat16, seed 1: not finite on the test split: perplexity"]
    row = text(found).splitlines()[-1]
    assert "2 of 3" in row and row.endswith("1 of 3")
    shown, cells = visible(found)
    assert "Failed: mixed_bfloat16, seed 1: not finite" in shown and cells.count("failed") >= 2


def test_relative_time_is_that_to_the_first_precision_or_none():
    found, dash = comparison([[30.0], [31.0]]), "\N{EN DASH}"
    for first, expected in ((0.2, ["1.00", "0.50"]), (None, [dash, dash])):
        found["runs"][0]["seconds_per_step"] = first
        cells = visible(found)[1]
        place, columns = cells.index("relative time"), 7
        assert [cells[place + columns], cells[place + 2 * columns]] == expected


def test_a_link_to_a_report_is_percent_encoded():
    shown = str(page(comparison([[30.0], [31.0]]), {"runs/float32-0": "a b#1/50%?/report.html"}))
    assert '<a href="a%20b%231/50%25%3F/report.html">runs/float32-0</a>' in shown
