"""`text`, `add`: the answers of a gate, for a terminal and on the page of its comparison, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmp.html.elements import NO_VALUE
from jaxmp.reports.page import Page
from jaxmp.text_table import table

SKEWED = 1.0
"""skewness from which differences look as if a few seeds were far worse; of 10 normal ones, 1 in 20 has it"""


RISK = (
    "The test takes differences for normal. If 1 seed in 10 were far worse, what is worse by the margin would be "
    "accepted in more than 5 % of studies (experiments/benchmarks/gate_errors.py), and the seeds would seldom show it"
)
"""what no sample can show; said with every acceptance"""


def text(gate: Mapping[str, Any]) -> str:
    """The answer for each precision as lines of text."""
    header, rows = _table(gate)
    right = [i for i, label in enumerate(header) if label not in ("precision", "answer", "failed")]
    shown = table(rows, header=header, right=right)
    return "\n".join([_asked(gate), shown, *_warnings(gate), f"{'looks':<16} {gate['file']}"])


def add(page: Page, gate: Mapping[str, Any]) -> None:
    """Adds the section of a gate to a page."""
    page.section("Gate", _asked(gate))
    page.table(*_table(gate))
    for line in _warnings(gate):
        page.paragraph(line, "bad")
    looks = [f"{look['pairs']} pairs: {_answers(look['verdicts'])}" for look in gate["taken"]]
    page.paragraph(f"Looks, as planned before the first run: {'; '.join(looks)}. They are kept in {gate['file']}.")
    page.paragraph(
        "One-sided t test of the paired differences against the margin. What is worse by the margin it accepts in 5 % "
        "of studies if differences are normal, and in more if they are skewed or a few seeds are far worse "
        "(experiments/benchmarks/gate_errors.py). A seed that fails under this precision alone is never left out: "
        "nothing is accepted then, and how often it failed is tested apart, by the exact McNemar test. With a seed "
        "that fails under both precisions nothing is accepted either, nor with fewer than 3 pairs that ended.",
        "note",
    )


def trained_before(seeds: Sequence[int]) -> str:
    """What is said of seeds that had runs before the plan was made."""
    return (
        f"seeds {' '.join(map(str, seeds))} had finished runs before this plan: if they were looked at, the margin may "
        "have been chosen to fit; fresh --seeds decide without that doubt"
    )


def _warnings(gate: Mapping[str, Any]) -> list[str]:
    """A line for each precision with pairs that say nothing, or whose differences are not as the test wants them."""
    without = [
        f"{precision}: both runs failed in {verdict['both_failed']} of the planned pairs, so that nothing is "
        "accepted: the pairs left are not those that were planned"
        for precision, verdict in gate["verdicts"].items()
        if verdict["both_failed"]
    ]
    skewed = [
        f"{precision}: the differences are skewed (skewness {verdict['skewness']:.2g}), as if a few seeds were far "
        "worse"
        for precision, verdict in gate["verdicts"].items()
        if verdict["skewness"] is not None and verdict["skewness"] > SKEWED
    ]
    accepted = any(verdict["answer"] == "not inferior" for verdict in gate["verdicts"].values())
    before = [trained_before(gate["before"])] if gate["before"] else []
    return [*without, *skewed, *before, *([RISK] if accepted else [])]


def _asked(gate: Mapping[str, Any]) -> str:
    less = "more" if gate["direction"] == "min" else "less"
    return (
        f"Not inferior to {gate['precisions'][0]}: test {gate['metric'].replace('_', ' ')} at most {gate['margin']:g} "
        f"{less}, at one-sided p < {gate['p']:g}."
    )


def _answers(verdicts: Mapping[str, Any]) -> str:
    return ", ".join(f"{precision} {verdict['answer']}" for precision, verdict in verdicts.items())


def _table(gate: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["precision", "answer", "pairs", "worse by", "spread", "at most", "p", "failed"]
    rows = [
        [
            precision,
            verdict["answer"],
            str(verdict["pairs"]),
            *(_number(verdict[name]) for name in ("mean", "spread", "bound", "p")),
            f"alone {verdict['failed']}, the first {verdict['first_failed']}"
            + ("" if verdict["p_failed"] is None else f" (p {verdict['p_failed']:.3g})")
            + f", both {verdict['both_failed']}",
        ]
        for precision, verdict in gate["verdicts"].items()
    ]
    return header, rows


def _number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
