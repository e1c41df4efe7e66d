"""Figures: names stay inside the drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from jaxmp.html.figure import (
    LETTER,
    STYLES,
    WIDTH,
    Axis,
    Series,
    bar_figure,
    interval_figure,
    line_figure,
    point_figure,
)

LONG = [f"encoder/layer_0=float32; rnn/*=mixed_float16; rnn=float32; mixed_{half}" for half in ("float16", "bfloat16")]


def test_long_names_stay_in_their_panel_and_are_whole_where_pointed_at():
    rows = [(name, style, [1.0], (1.0, 0.5, 1.5)) for style, name in enumerate(LONG)]
    figures = [
        interval_figure(Axis("x"), rows, name="a"),
        bar_figure(Axis("x"), [(name, [("part", 1.0)]) for name in LONG], name="b"),
        line_figure(Axis("x"), Axis("y"), [Series(name, [0, 1], [0, 1]) for name in LONG], name="c"),
    ]
    for figure in map(ElementTree.fromstring, figures):
        texts = list(figure.iter("text"))
        assert [text.findtext("title") for text in texts if text.findtext("title")] == LONG
        assert len({text.text for text in texts if text.findtext("title")}) == 2
        for text in texts:
            width = LETTER * len(text.text)
            left = float(text.get("x")) - (width if "end" in text.get("class") else 0)
            assert left >= 0 and left + width <= WIDTH


def test_a_logarithmic_axis_of_small_values_within_a_decade_has_a_scale():
    def ticks(*values):
        figure = line_figure(Axis("step"), Axis("error", "log10"), [Series("a", [1, 2], list(values))], name="a")
        return [text.text for text in ElementTree.fromstring(figure).iter("text") if "10" in (text.text or "")]

    assert ticks(2e-6, 8e-6) == ["2\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT SIX}",
                                 "5\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT SIX}"]  # fmt: skip
    assert all("\N{MULTIPLICATION SIGN}" not in text for text in ticks(2e-8, 8e-5))


def test_points_stand_at_their_values_or_names_and_what_an_axis_cannot_show_is_left_out():
    points = [(1e-3, 0.5, 0, "first"), (1e-1, 0.25, 0, "second"), (0.0, 0.1, 0, "third"), (1e-2, float("nan"), 0, "no")]
    figure = ElementTree.fromstring(point_figure(Axis("rate", "log10"), Axis("loss"), points, name="a"))
    circles = list(figure.iter("circle"))
    assert [circle.findtext("title") for circle in circles] == ["first", "second"]
    (x1, y1), (x2, y2) = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in circles]
    assert x1 < x2 and y1 < y2 and circles[0].get("data-x") == "0.001"

    named = point_figure(Axis("batch"), Axis("loss"), [(1.0, 0.5, 0, "b")], names=("32", LONG[0]), name="b")
    figure = ElementTree.fromstring(named)
    (circle,) = figure.iter("circle")
    ticks = [text for text in figure.iter("text") if text.get("class") == "tick middle"]
    assert ticks[0].text == "32" and len(ticks[1].text) < len(LONG[0]) and ticks[1].get("x") == circle.get("cx")
    assert "no finite value" in point_figure(Axis("x"), Axis("y"), [], name="c")


def test_every_line_looks_otherwise_than_all_others_and_its_name_is_inside():
    lines = [Series(f"arm {i}", [0, 1], [i, i], i) for i in range(STYLES**2)]
    figure = ElementTree.fromstring(line_figure(Axis("x"), Axis("y"), lines, name="a"))
    paths = [path.get("class") for path in figure.iter("path") if "line" in path.get("class")]
    drawn, legend = paths[: len(lines)], paths[len(lines) :]
    assert drawn == legend and len(set(drawn)) == len(lines)
    names = {text.text: float(text.get("y")) for text in figure.iter("text")}
    assert max(names[line.label] for line in lines) <= float(figure.get("viewBox").split()[3])


def test_no_two_ticks_of_large_numbers_have_one_text():
    for low, high in ((1_234_560, 1_234_569), (999_999_990.0, 1_000_000_010.0), (-2e6, -1.99999e6)):
        figure = line_figure(Axis("x"), Axis("y"), [Series("a", [0, 1], [low, high])], name="a")
        texts = [text.text for text in ElementTree.fromstring(figure).iter("text") if (text.text or "").endswith("M")]
        assert len(set(texts)) == len(texts) >= 3, texts
    huge = line_figure(Axis("x"), Axis("y"), [Series("a", [0, 1], [0.0, 8e14])], name="a")
    assert ">8e+08M</text>" in huge
