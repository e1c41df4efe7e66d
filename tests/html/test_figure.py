"""Figures: names stay inside the drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from jaxmp.html.figure import LETTER, WIDTH, Axis, Series, bar_figure, interval_figure, line_figure

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
