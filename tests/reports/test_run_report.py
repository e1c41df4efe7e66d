"""Curves of runs: gaps, units and axes.

Whole pages of real runs are drawn in tests/studies/test_compare.py and tests/tasks/test_task.py.
"""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from jaxmp.reports.run_report import _apart, _names
from jaxmp.runs.curves import Curve, curve_figures, grouped_figure, metrics_of
from jaxmp.training.metrics import MetricSpec


def test_numbers_that_are_not_finite_leave_a_gap():
    lines = [
        {"step": s, "split": "train", "loss": v} for s, v in [(1, 0.5), (2, 0.25), (3, None), (4, 0.125), (5, None)]
    ]
    figure = ElementTree.fromstring(grouped_figure([Curve("a", 0, lines, True)], "loss", "train", "Loss"))
    (path,) = [p for p in figure.iter("path") if p.get("data-x")]
    assert path.get("d").count("M") == 2 and path.get("data-y") == "0.5 0.25 nan 0.125 nan"
    assert any("cross" in p.get("class", "") for p in figure.iter("path"))


def lines(**metrics):
    fixed = {"loss_scale": 1.0, "skipped_steps": 0, "examples_per_second": 1.0, "epoch": 0.1, "wall_seconds": 1.0}
    return [{"step": s, "split": split, **fixed, **metrics} for s in (1, 2) for split in ("train", "validation")]


def labels(figure):
    return [text.text for text in ElementTree.fromstring(figure).iter("text")]


def test_a_share_is_drawn_in_percent_whatever_its_name_and_an_accuracy_of_no_share_is_not():
    specs = {"loss": MetricSpec("min", "nats"), "recall": MetricSpec("max", "%"), "accuracy_in_mm": MetricSpec("min")}
    curve = Curve("a", 0, lines(loss=0.5, recall=0.25, accuracy_in_mm=3.0), specs=specs)
    assert curve.of("recall", "train") == ([1, 2], [25.0, 25.0])
    assert curve.of("accuracy_in_mm", "train") == ([1, 2], [3.0, 3.0])
    figures = {name: labels(svg) for name, svg, _ in curve_figures([curve]) if svg}
    assert "recall, %" in figures["Recall"] and "loss, nats" in figures["Loss"]
    assert "accuracy in mm" in figures["Accuracy in mm"]


def test_a_chart_that_says_nothing_is_a_sentence():
    def words(*values, steps=(0, 0)):
        curves = [
            Curve(f"p{i}", 0, [{**line, "loss_scale": scale, "skipped_steps": skipped} for line, scale, skipped in zip(
                lines(loss=1.0)[::2], of, steps, strict=True
            )])
            for i, of in enumerate(values)
        ]  # fmt: skip
        return {name: caption for name, svg, caption in curve_figures(curves) if not svg}

    assert words((8.0, 8.0)) == {
        "Loss scale": "8 in every line.", "Skipped steps": "no step was skipped."
    }  # fmt: skip
    assert words((1.0, 1.0), (1.0, 1.0))["Loss scale"] == "1 in every line, of all."
    assert words((1.0, 1.0), (8.0, 8.0))["Loss scale"] == "the same in every line: 1 (p0); 8 (p1)."
    assert words((8.0, 4.0), (1.0, 1.0), steps=(0, 1)) == {}
    assert words((8.0, 8.0), steps=(1, 1)) == {"Loss scale": "8 in every line."}


def test_runs_that_began_with_other_weights_are_no_seeds_of_each_other():
    experiment = {"precision": "float32", "seed": 0}
    new = {"name": "net", "experiment": experiment}
    begins = {"how": "init", "hash": "abc", "seed": 0, "step": 9}
    trained = new | {"begins_with": begins, "parent": "/runs/before/abc-s0"}
    other_seed = new | {"begins_with": begins | {"seed": 1}, "parent": "/runs/before/abc-s1"}
    file = new | {"begins_with": {"sha256": "f" * 64}, "weights_file": "/data/bert.safetensors"}
    found = _names([SimpleNamespace(config=config) for config in (new, trained, other_seed, file)])
    assert found == ["from new weights", *["from before/abc@9 (init)"] * 2, "from bert.safetensors"]


def test_labels_are_told_apart_by_as_much_as_it_takes():
    assert _apart(["a", "b"], ["seed 0", "seed 0"], ["p", "q"]) == ["a", "b"]
    assert _apart(["a", "a"], ["seed 0", "seed 1"], ["p", "q"]) == ["a, seed 0", "a, seed 1"]
    assert _apart(["a", "a"], ["seed 0", "seed 0"], ["p", "q"]) == ["a, seed 0, p", "a, seed 0, q"]


def test_names_stand_in_one_order_wherever_lines_end():
    def ends(*values):
        curves = [Curve(name, 0, lines(loss=v)) for name, v in zip("abc", values, strict=True)]
        return [text for text in labels(grouped_figure(curves, "loss", "train", "Loss")) if text in "abc"]

    assert ends(1.0, 2.0, 3.0) == ends(3.0, 1.0, 2.0) == list("abc")


def test_metrics_are_drawn_in_the_order_of_their_specs_and_bookkeeping_is_none():
    specs = {"loss": MetricSpec("min"), "zeal": MetricSpec(), "absent": MetricSpec()}
    assert list(metrics_of([Curve("a", 0, lines(loss=1.0, zeal=1.0, alpha=1.0), specs=specs)])) == [
        "loss", "zeal", "alpha"
    ]  # fmt: skip


@pytest.mark.parametrize(("spec", "logarithmic"), [(MetricSpec("min", "nats"), True), (MetricSpec("max", "%"), False)])
def test_a_wide_range_is_drawn_logarithmically_but_for_a_share(spec, logarithmic):
    wide = [{"step": s, "split": "train", "x": 10.0**-s} for s in range(1, 7)]
    figure = grouped_figure([Curve("a", 0, wide, specs={"x": spec})], "x", "train", "X")
    places = [circle.get("cy") for circle in ElementTree.fromstring(figure).iter("circle")]
    steps = {round(float(b) - float(a), 0) for a, b in itertools.pairwise(places)}
    assert (len(steps) == 1) == logarithmic
