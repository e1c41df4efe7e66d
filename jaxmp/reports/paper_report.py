"""What is shown of a paper's study: tables for README.md, plots as SVG files, lines for a terminal. Made from JSON."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmp.html.elements import DARK, LIGHT, element_style, escape
from jaxmp.html.figure import WIDTH
from jaxmp.runs.provenance import hardware
from jaxmp.text_table import Table, table

BEGIN, END = "<!-- made by jaxmp reproduce -->\n", "<!-- end -->\n"
NOT_RUN = "not run yet"
"""in the place of a verdict"""
CAPTION_LETTERS, CAPTION_LINE = 96, 14
"""letters and height of a line of a plot's caption"""


def text(results: Mapping[str, Any]) -> Table:
    """Returns the table of claims that the command prints."""
    rows = [
        (claim["id"], _plain(_published(claim)), _with_note(_figure(claim), claim), claim["verdict"])
        for claim in results["claims"]
    ]
    return table(rows, header=("claim", "paper", "ours (95 % interval)", "verdict"))


def block(results: Mapping[str, Any], metrics: Sequence[str], figures: Sequence[tuple[str, str, str]]) -> str:
    """Returns the part of a paper's README.md that is made from its results, as Markdown.

    Args:
      results: what results.json holds.
      metrics: those of which there is a table, arm by arm.
      figures: file name without .svg, title and caption of each plot.
    """
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("python", "jax", "jaxmp"))
    seeds = len(results["seeds"])
    claims = [
        (
            f"`{claim['id']}`: {claim['says']}",
            f"{claim['published']} ({claim['source']}{'' if claim['checked'] else '; not checked against the text'})",
            _with_note(f"{_figure(claim)}, {claim['measured']}", claim),
            f"**{claim['verdict']}**",
        )
        for claim in results["claims"]
    ]
    parts = [
        f"    {results['command']}\n",
        f"{seeds} seeds, {results['seconds']:.0f} s of runs on {hardware(results)}; {versions}.",
        _revisions(results),
        _confidence(results, seeds),
        _markdown(("claim", "paper", "ours", "verdict"), claims),
    ]
    remarks = [f"- `{claim['id']}`: {claim['remark']}" for claim in results["claims"] if claim["remark"]]
    if remarks:
        parts += ["\n".join(remarks) + "\n"]
    if metrics:
        rows = [
            (f"`{arm}`", *(_of_seeds(of["seeds"], metric) for metric in metrics), f"`{of['how']}`")
            for arm, of in results["arms"].items()
        ]
        parts += ["Mean and standard deviation over the seeds:\n", _markdown(("arm", *metrics, "how"), rows)]
    parts += [f"![{title}]({name}.svg)\n\n{title}. {caption}\n" for name, title, caption in figures]
    return "\n".join(parts)


def _confidence(results: Mapping[str, Any], seeds: int) -> str:
    """What the intervals of a paper's claims are, and how many of them chance may decide."""
    if seeds == 1:
        return "One seed has no interval.\n"
    counted = [claim for claim in results["claims"] if not claim["note"].startswith("exact")]
    return (
        f"Intervals have 95 %, if no other level is said, each by itself: of {len(counted)} claims that are judged by "
        f"them, chance may decide {0.05 * len(counted):.1g}.\n"
    )


def overview(papers: Sequence[Mapping[str, Any]]) -> str:
    """Returns one table of papers, claims and verdicts, as Markdown."""
    rows = [
        (
            f"[{of['title']}]({of['paper']}/README.md)" if i == 0 else "",
            f"`{claim['id']}`: {claim['says']}",
            _published(claim),
            *(
                (_with_note(f"{_figure(claim)}, {claim['measured']}", claim), claim["verdict"])
                if "verdict" in claim
                else ("", NOT_RUN)
            ),
        )
        for of in papers
        for i, claim in enumerate(of["claims"])
    ]
    return _markdown(("paper", "claim", "published", "ours", "verdict"), rows)


def has_marks(readme: str) -> bool:
    """Whether a README.md has the two marks between which tables go."""
    return BEGIN in readme and END in readme


def between_marks(readme: str, made: str) -> str:
    """Returns the text of a README.md with `made` between its marks; where it has none, they are added at the end."""
    if not has_marks(readme):
        readme = f"{readme}{BEGIN}{END}"
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def plot(svg: str, title: str, caption: str, command: str) -> str:
    """Makes a file of an `<svg>` element: with its style sheet, and title, caption and command in it."""
    head = re.match(r'<svg viewBox="0 0 [\d.]+ ([\d.]+)"', svg)
    assert head is not None, f"{svg[:60]}: expected an element of jaxmp.html.figure"
    height = float(head[1])
    lines = textwrap.wrap(caption, CAPTION_LETTERS) + textwrap.wrap(f"Made by: {command}", CAPTION_LETTERS)
    top = 22.0
    texts = [f'<text class="over strong" x="2" y="{top - 8:.0f}">{escape(title)}</text>']
    texts += [
        f'<text class="mute small" x="2" y="{top + height + CAPTION_LINE * (i + 1):.0f}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    total = top + height + CAPTION_LINE * (len(lines) + 1)
    style = (
        f"svg {{ --x: 0; {LIGHT} background: var(--paper); font-family: system-ui, sans-serif }}\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}\n{element_style()}\n"
        "svg .strong { font-weight: 600 } svg .over { stroke: none }"
    )
    inner = svg.replace("<svg ", f'<svg x="0" y="{top:.0f}" width="{WIDTH}" height="{height:g}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total:g}" width="{WIDTH}" '
        f'height="{total:g}" role="img" aria-label="{escape(title)}"><style>{escape(style)}</style>'
        f'<rect width="100%" height="100%" style="fill: var(--paper)"/>{inner}{"".join(texts)}</svg>\n'
    )


def _revisions(results: Mapping[str, Any]) -> str:
    """`Measured at b0bef79 (12 runs) ...`: the revisions of jaxmp that the runs say, and whether they had changes."""
    runs = [of for arm in results["arms"].values() for of in arm["seeds"].values()]
    said = Counter(_revision(of["git"]) for of in runs if of.get("git"))
    found = [f"{revision} ({count} runs)" for revision, count in said.items()]
    if silent := len(runs) - said.total():
        command = f"; the command says {_revision(results['git'])}" if results.get("git") else ""
        found.append(f"an unknown revision ({silent} runs{command})")
    return f"Measured at {', '.join(found)}."


def _revision(git: Mapping[str, Any]) -> str:
    return f"{git['revision'][:7]}{' with uncommitted changes' if git['dirty'] else ''}"


def _figure(claim: Mapping[str, Any]) -> str:
    """`0.0123 (0.0100 to 0.0146)`: our figure, its interval if there is one, and a level other than 95 %."""
    mean, low, high = (claim[end] for end in ("mean", "low", "high"))
    if mean is None:
        return "none"
    if low is None:
        whole = f"{mean:.12g}"  # 0.015625, say, which an exact claim is about
        return whole if claim["note"].startswith("exact") and float(whole) == mean else f"{mean:.4g}"
    # 4e-17 in an interval of 0.01 is 0 but for the rounding of a mean.
    mean, low, high = (value * (abs(value) >= 1e-12 * (high - low)) + 0.0 for value in (mean, low, high))
    level = 100 * claim["confidence"]
    return f"{mean:.4g} ({low:.4g} to {high:.4g}{'' if math.isclose(level, 95) else f', {level:.4g} %'})"


def _published(claim: Mapping[str, Any]) -> str:
    return claim["published"] + ("" if claim["checked"] else " (not checked)")


def _with_note(figure: str, claim: Mapping[str, Any]) -> str:
    return "; ".join(filter(None, [figure, claim["note"]]))


def _of_seeds(seeds: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """Mean and deviation of a metric. A run with a value that is not finite counts as failed, as judges count it."""
    values = [of[metric] for of in seeds.values() if not of.get("failed") and of.get(metric) is not None]
    failed = sum(bool(of.get("failed")) or (metric in of and of[metric] is None) for of in seeds.values())
    shown = "" if not values else f"{statistics.fmean(values):.4g}"
    if len(values) > 1:
        shown += f" ± {statistics.stdev(values):.2g}"
    return "; ".join(filter(None, [shown, f"{failed} of {len(seeds)} failed" if failed else ""]))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _plain(markdown: str) -> str:
    return markdown.replace("`", "")
