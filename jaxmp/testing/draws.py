"""Whether a step draws random numbers that depend on what it is given."""

from __future__ import annotations

from typing import Any

from jax.extend.core import jaxprs_in_params

from jaxmp.jaxprs import bare, scan_counts


def draws_from_state(jaxpr: Any) -> bool:
    """Returns whether a function draws random bits with a key that depends on its arguments."""
    jaxpr = bare(jaxpr)
    return _follow(jaxpr, [True] * len(jaxpr.invars))[1]


def _follow(jaxpr: Any, given: list[bool]) -> tuple[list[bool], bool]:
    """Returns which outputs depend on the inputs marked in `given`, and whether a draw does."""
    depends = {v for v, mark in zip(jaxpr.invars, given, strict=True) if mark}
    marked = lambda v: not hasattr(v, "val") and v in depends  # noqa: E731  (a literal has a value)
    draws = False
    for eqn in jaxpr.eqns:
        inputs = [marked(v) for v in eqn.invars]
        outputs = [any(inputs)] * len(eqn.outvars)
        draws |= eqn.primitive.name == "random_bits" and any(inputs)
        inner = [bare(sub) for sub in jaxprs_in_params(eqn.params)]
        for sub in inner:
            if len(sub.invars) == len(inputs):
                marks = list(inputs)
            elif len(sub.invars) == len(inputs) - 1 and eqn.primitive.name == "cond":
                marks = inputs[1:]
            else:
                marks = [any(inputs)] * len(sub.invars)
            while True:
                found, drawn = _follow(sub, marks)
                if eqn.primitive.name != "scan":
                    break
                # What a scan carries comes back as its input.
                first, count = scan_counts(eqn.params)
                again = [*marks[:first], *(a or b for a, b in zip(marks[first:][:count], found, strict=False))]
                again += marks[len(again) :]
                if again == marks:
                    break
                marks = again
            draws |= drawn
            if len(inner) == 1 and len(found) == len(outputs):
                outputs = found
        depends.update(v for v, mark in zip(eqn.outvars, outputs, strict=True) if mark)
    return [marked(v) for v in jaxpr.outvars], draws
