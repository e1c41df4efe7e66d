"""Plots of a paper's results: an arm is named even if its first run failed."""

from __future__ import annotations

from jaxmp.html.figure import Axis
from jaxmp.studies.claims import Results
from jaxmp.studies.paper_figures import curves, doses


def test_an_arm_whose_first_run_failed_is_named_once_in_the_legend():
    curve = {"steps": [0, 1, 2], "scales": [1.0, 2.0, 4.0]}
    results = Results({"first arm": {0: {"failed": "NaN"}, 1: curve, 2: curve}})
    figure = curves(results, ["first arm"], "steps", "scales", Axis("step"), Axis("scale"))
    assert figure.count(">first arm</text>") == 1


def test_each_seed_and_each_expected_line_is_drawn_over_the_doses_that_have_results():
    results = Results({"4 bits": {0: {"at": 3.0}, 1: {"at": None}}, "8 bits": {0: {"at": 6.0}, 1: {"at": 5.0}}})
    arms = {"4 bits": 4.0, "8 bits": 8.0, "not run": 16.0}
    figure = doses(results, arms, "at", Axis("bits"), Axis("nats"), {"p": lambda p: p, "p / 2": lambda p: p / 2})
    assert figure.count('data-x="') == 4 and ">p / 2</text>" in figure
    assert 'data-y="2 4"' in figure and 'data-y="nan 5"' in figure
