"""Sums in a program: which numbers they add up, and in which dtype."""

from __future__ import annotations

import math
from typing import Any

SUMS = ("reduce_sum", "cumsum", "cumlogsumexp", "scatter-add", "psum", "reduce_window_sum")
"""primitives that add numbers up"""


def terms(equation: Any) -> int:
    """Returns how many numbers a sum adds up for one number of its result, at most."""
    name, size = equation.primitive.name, equation.invars[0].aval.size
    if name == "reduce_window_sum":
        return math.prod(equation.params["window_dimensions"])
    if name == "scatter-add":  # of unique indices: one number a place
        return 1 if equation.params["unique_indices"] else equation.invars[-1].aval.size
    return size // max(1, equation.outvars[0].aval.size) if name == "reduce_sum" else size
