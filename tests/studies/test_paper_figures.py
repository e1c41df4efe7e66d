"""Plots of a paper's results: an arm is named even if its first run failed."""

from __future__ import annotations

from jaxmp.html.figure import Axis
from jaxmp.studies.claims import Results
from jaxmp.studies.paper_figures import curves


def test_an_arm_whose_first_run_failed_is_named_once_in_the_legend():
    curve = {"steps": [0, 1, 2], "scales": [1.0, 2.0, 4.0]}
    results = Results({"first arm": {0: {"failed": "NaN"}, 1: curve, 2: curve}})
    figure = curves(results, ["first arm"], "steps", "scales", Axis("step"), Axis("scale"))
    assert figure.count(">first arm</text>") == 1
