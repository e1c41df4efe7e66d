"""Figures and tables of the magnitudes of single steps, as `loop.ranges_every` or `Run.look` measured them."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmp.html.elements import NO_VALUE
from jaxmp.html.figure import Axis, histogram_figure
from jaxmp.instruments.ranges import FORMATS
from jaxmp.precision.formats import parse_format
from jaxmp.reports.page import Page


def add_ranges(page: Page, looks: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Adds a section on the magnitudes of activation gradients, parameters, gradients and updates.

    The figure is that of Micikevicius et al. 2018, Mixed Precision Training (figure 3 there: activation gradients, most
    of which float16 would make 0 without a loss scale).

    Args:
      page: takes the section.
      looks: lines of `Run.ranges`, by the name of the run.
    """
    page.section(
        "Magnitudes",
        "Gradients of what each module hands on, under the loss scale that they were computed with, by power of two. "
        "Shaded: what float16 makes 0, keeps with fewer bits (subnormal), or cannot hold.",
    )
    page.figures([(f"Activation gradients, {name}", *gradient_histogram(lines, name)) for name, lines in looks.items()])
    for name, lines in looks.items():
        last = lines[-1]
        page.paragraph(f"{name}, step {last['step']}, loss scale {last['loss_scale']:g}; shares of non-zero numbers:")
        if any(not seen["exact"] for of in last["ranges"].values() for seen in of.values()):
            page.paragraph('Where it says "A to B", the smallest or largest is somewhere from A on, below B.', "note")
        page.table(*_table(last["ranges"]))


def gradient_histogram(lines: Sequence[dict[str, Any]], name: str) -> tuple[str, str]:
    """Draws the histogram of the activation gradients of lines of `Run.ranges`, as an `<svg>` element.

    Returns: the element, and its caption.
    """
    of = [seen for line in lines for seen in line["ranges"]["output_gradients"].values()]
    size, zeros = sum(seen["size"] for seen in of), sum(seen["zeros"] for seen in of)
    bars = [(float(e), 100 * n / size) for e, n in sorted(by_exponent(of).items()) if n]
    half = parse_format("float16")
    least, normal = math.log2(half.smallest_subnormal) - 1, float(half.min_exponent)
    top = float(half.max_exponent + 1)
    zones = [
        (-math.inf, least, "0 in float16"),
        (least, normal, "subnormal"),
        (normal, top, "normal"),
        (top, math.inf, "infinite"),
    ]
    scales = sorted({line["loss_scale"] for line in lines})
    marks = []
    if scales[-1] > 1:
        marks = [(least + math.log2(scales[-1]), "left of this, 0 without the scale")]
    svg = histogram_figure(
        Axis("base 2 logarithm of the magnitude"), bars, zones, 100 * zeros / size if size else 0.0, marks=marks,
        name=f"Activation gradients, {name}",
    )  # fmt: skip
    steps = f"step {lines[0]['step']}" if len(lines) == 1 else f"{len(lines)} steps from {lines[0]['step']} on"
    under = " to ".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1])))
    return svg, f"{size:,} values of {steps}, loss scale {under}. Bar on the left: zeros."


def by_exponent(ranges: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Adds up `Range.to_json`s: the number of elements with a magnitude in [2^e, 2^(e+1)), by e."""
    counts: collections.Counter[int] = collections.Counter()
    for seen in ranges:
        counts.update({seen["lowest_exponent"] + i: n for i, n in enumerate(seen["counts"])})
    return dict(counts)


def _table(ranges: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["", "", "numbers", "zeros", "smallest", "largest"]
    header += [f"0 in {name}" for name in FORMATS] + [f"infinite in {name}" for name in FORMATS] + ["lost_updates"]
    rows = []
    for kind, of in ranges.items():
        for name, seen in of.items():
            nonzero = seen["size"] - seen["zeros"]
            rows.append(
                [
                    kind.replace("_", " "),
                    name or "(model)",
                    f"{seen['size']:,}",
                    _share(seen["zeros"] / seen["size"] if seen["size"] else None),
                    _magnitude(seen["smallest"], seen["exact"]),
                    _magnitude(seen["largest"], seen["exact"]),
                    *(_share(seen["underflow"][format]) for format in FORMATS),
                    *(_share(seen["overflow"][format]) for format in FORMATS),
                    _share(seen["lost_updates"] / nonzero if "lost_updates" in seen and nonzero else None),
                ]
            )
    # Of most formats there is nothing to say.
    kept = [i for i in range(len(header)) if i < 6 or any(row[i] not in ("0", NO_VALUE) for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _share(share: float | None) -> str:
    if share is None:
        return NO_VALUE
    return "0" if not share else f"{share:.2%}" if share >= 1e-4 else "< 0.01%"


def _magnitude(value: float | None, exact: bool) -> str:
    """Formats a magnitude; one that is known to a power of two only as the interval that it lies in."""
    if value is None:
        return NO_VALUE
    text = f"{value:.2e}" if exact else f"{value:.2e} to {2 * value:.2e}"
    return text.replace("-", "\N{MINUS SIGN}")
