"""Draws figures as SVG text, for a page that has to be one file: no plotting library, no script, no font of its own.

Colours, dashes and text sizes are classes; the style sheet of `jaxmp.reports.page` gives them values, so that one
drawing serves a light screen, a dark one and paper. Series differ by colour and by dashes, and are named on the
right, in one order: of up to 6, none is told by colour alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxmp.html.elements import escape as _escape
from jaxmp.html.elements import shortened

STYLES = 6
"""colours, and dashes, of the style sheet; STYLES**2 lines can be told apart by both"""

WIDTH, HEIGHT = 560, 290
LEFT, TOP, BOTTOM = 66, 30, 40
LETTER = 8.0
"""width of a letter of a label, on average, where labels are largest: on paper, and in narrow windows"""
LABEL_HEIGHT = 17
NAME_LETTERS = 28
"""most letters of the name of a line, to leave room for the lines"""
ROW_LETTERS = 15
"""most letters of a name on the left of its row, on paper too, where letters are a quarter wider"""
LONG_LETTERS = 60
"""most letters of a name above its row, where names that are too long for the left are drawn"""
DOTS = 40
"""most points of a line for which each gets a dot, whose tooltip shows its numbers"""


@dataclass(frozen=True)
class Series:
    """One line of a figure."""

    label: str
    """name in the legend; "": none"""
    x: Sequence[float]
    y: Sequence[float]
    """values; NaN leaves a gap"""
    style: int = 0
    """index of its look: the first six differ by colour and dash, the next have the same colours with other dashes"""
    faint: bool = False
    """whether it is drawn thin, as a single run behind the mean of several"""
    steps: bool = False
    """whether a value holds until the next, as a loss scale does: drawn as stairs"""
    failed: bool = False
    """whether the run failed; a cross marks the end of the line"""


@dataclass(frozen=True)
class Axis:
    """The quantity on an axis, and its scale."""

    label: str
    """quantity and unit"""
    scale: Literal["linear", "log10", "log2"] = "linear"
    """log2: ticks are written as powers of two"""
    include: tuple[float, ...] = ()
    """values that the axis includes whatever the data"""
    whole: bool = False
    """whether ticks are whole numbers only"""


def line_figure(x: Axis, y: Axis, series: Sequence[Series], *, name: str) -> str:
    """Draws lines over a common axis, as an `<svg>` element.

    Args:
      x: the horizontal axis.
      y: the vertical axis. On a logarithmic one, what is not positive is left out, like NaN.
      series: the lines, back to front. Each path carries its points as data in its `data-x` and `data-y`.
      name: what the figure shows, for who cannot see it.
    """
    drawn = [_only_drawable(s, y) for s in series]
    right = WIDTH - 48 - LETTER * min(max((len(s.label) for s in drawn), default=0), NAME_LETTERS)
    across = _Scale(x, [v for s in drawn for v in s.x], LEFT, right)
    up = _Scale(y, [v for s in drawn for v in s.y if not math.isnan(v)], HEIGHT - BOTTOM, TOP, padded=True)
    parts = [_frame(across, up, LEFT, right, TOP, HEIGHT)]
    for s in drawn:
        parts += _line(s, across, up)
    named = [s for s in drawn if s.label and _last(s)]
    parts += _legend(named, right)
    if not any(_last(s) for s in drawn):
        parts.append(_text((LEFT + right) / 2, (TOP + HEIGHT - BOTTOM) / 2, "no finite value", "mute middle"))
    return _svg(parts, name, max(HEIGHT, TOP + LABEL_HEIGHT * len(named)))


def interval_figure(x: Axis, rows: Sequence[tuple[str, int, Sequence[float], Any]], *, name: str) -> str:
    """Draws rows of points with the interval of their mean, and a line at zero, as an `<svg>` element.

    Args:
      x: the horizontal axis.
      rows: name, style, values, and `(mean, low, high)` or None, from top to bottom.
      name: what the figure shows.
    """
    values = [v for _, _, points, interval in rows for v in (*points, *(interval or ()))]
    left, line = _rows([label for label, *_ in rows])
    across = _Scale(Axis(x.label, x.scale, (*x.include, 0.0)), values, left, WIDTH - 24, padded=True)
    height = TOP + (52 + line) * len(rows) + BOTTOM
    bottom = height - BOTTOM
    parts = [_vertical_grid(across, TOP, bottom, height), _rule(across(0), TOP, across(0), bottom, "zero")]
    for i, (label, style, points, interval) in enumerate(rows):
        y = TOP + (52 + line) * (i + 0.5) + line / 2
        parts.append(_row_name(y, label, line))
        parts += [
            f'<circle class="c{style % STYLES} dot faint" cx="{across(v):.1f}" cy="{y + 9:.1f}" r="3.5">'
            f"<title>{v:+.4g}</title></circle>"
            for v in points
        ]
        if interval:
            mean, low, high = interval
            tip = f"<title>{mean:+.4g} ({low:+.4g} to {high:+.4g})</title>"
            parts.append(
                f'<g class="c{style % STYLES}">{tip}<path class="bar" d="M{across(low):.1f} {y - 4:.1f}'
                f'H{across(high):.1f}M{across(low):.1f} {y - 9:.1f}v10M{across(high):.1f} {y - 9:.1f}v10"/>'
                f'<circle class="dot" cx="{across(mean):.1f}" cy="{y - 4:.1f}" r="5"/></g>'
            )
    return _svg(parts, name, height)


def bar_figure(x: Axis, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, name: str) -> str:
    """Draws horizontal bars, each of one or more parts end to end, as an `<svg>` element.

    Args:
      x: the horizontal axis.
      rows: name, and the names and lengths of its parts, from top to bottom.
      name: what the figure shows.
    """
    totals = [sum(value for _, value in parts) for _, parts in rows]
    left, line = _rows([label for label, _ in rows])
    across = _Scale(Axis(x.label, include=(0.0,)), totals, left, WIDTH - 70)
    height = TOP + (40 + line) * len(rows) + BOTTOM
    parts = [_vertical_grid(across, TOP, height - BOTTOM, height)]
    for i, ((label, lengths), total) in enumerate(zip(rows, totals, strict=True)):
        y, start = TOP + (40 + line) * (i + 0.5) + line / 2, 0.0
        parts.append(_row_name(y, label, line))
        for k, (part, value) in enumerate(lengths):
            left, right = across(start), across(start + value)
            parts.append(
                f'<rect class="p{k % STYLES}" x="{left:.1f}" y="{y - 11:.1f}" width="{max(right - left, 0):.1f}" '
                f'height="22"><title>{_escape(part)}: {value:,.4g}</title></rect>'
            )
            start += value
        parts.append(_text(across(total) + 6, y + 4, f"{total:,.3g}", "mute"))
    return _svg(parts, name, height)


def point_figure(
    x: Axis, y: Axis, points: Sequence[tuple[float, float, int, str]], *, names: Sequence[str] = (), name: str
) -> str:
    """Draws points that no line joins, as an `<svg>` element.

    Args:
      x: the horizontal axis.
      y: the vertical axis.
      points: x, y, style, and what its tooltip says. A point that an axis cannot show is left out.
      names: where the horizontal axis has values that are no numbers, their names: x is then 0 for the first of them.
      name: what the figure shows.
    """
    drawn = [
        (a, b, style, tip)
        for a, b, style, tip in points
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or x.scale == "linear") and (b > 0 or y.scale == "linear")
    ]
    right = WIDTH - 24
    across = _Names(x, names, LEFT, right) if names else _Scale(x, [a for a, *_ in drawn], LEFT, right, padded=True)
    up = _Scale(y, [b for _, b, *_ in drawn], HEIGHT - BOTTOM, TOP, padded=True)
    parts = [_frame(across, up, LEFT, right, TOP, HEIGHT)]
    parts += [
        f'<circle class="c{style % STYLES} dot" cx="{across(a):.1f}" cy="{up(b):.1f}" r="3.5" data-x="{a:.7g}" '
        f'data-y="{b:.7g}"><title>{_escape(tip)}</title></circle>'
        for a, b, style, tip in drawn
    ]
    if not drawn:
        parts.append(_text((LEFT + right) / 2, (TOP + HEIGHT - BOTTOM) / 2, "no finite value", "mute middle"))
    return _svg(parts, name, HEIGHT)


def histogram_figure(
    x: Axis,
    bars: Sequence[tuple[float, float]],
    zones: Sequence[tuple[float, float, str]],
    zeros: float,
    *,
    marks: Sequence[tuple[float, str]] = (),
    name: str,
) -> str:
    """Draws a histogram by power of two, over shaded zones that a format treats differently, as an `<svg>` element.

    Args:
      x: the horizontal axis; its values are exponents of two.
      bars: exponent and share in percent of each bar, in order. Each reaches from its exponent to the next.
      zones: from, to (exponents, infinity for no end) and name of each zone behind the bars, from left to right.
      zeros: share of zeros, in percent, which have a bar of their own on the left.
      marks: exponents at which a line stands, with what it says.
      name: what the figure shows.
    """
    borders = [e for zone in zones for e in zone[:2] if math.isfinite(e)]
    reached = [*borders, *(e for e, _ in bars), *(e + 1 for e, _ in bars), *(e for e, _ in marks)]
    low, high = min(reached, default=0) - 3, max(reached, default=1) + 3
    right, left, names = WIDTH - 16, LEFT + 50, TOP + 20
    top = names + 6 + (LABEL_HEIGHT if marks else 0)  # what marks say has a row of its own, above the bars
    height = HEIGHT + top - TOP
    bottom = height - BOTTOM
    across = _Scale(x, [low, high], left, right)
    up = _Scale(Axis("share of all values, %", include=(0.0,)), [share for _, share in bars], bottom, top, padded=True)
    parts = []
    for k, (start, end, label) in enumerate(zones):
        begin, finish = across(max(start, low)), across(min(end, high))
        parts.append(
            f'<rect class="zone z{k % 4}" x="{begin:.1f}" y="{top}" width="{finish - begin:.1f}" '
            f'height="{bottom - top}"><title>{_escape(label)}</title></rect>'
        )
        if finish - begin > LETTER * len(label):
            parts.append(_text((begin + finish) / 2, names, label, "mute middle small"))
    parts.append(_frame(across, up, LEFT, right, top, height))
    for exponent, share in bars:
        begin, finish, y = across(exponent), across(exponent + 1), up(share)
        parts.append(
            f'<rect class="c0 fill" x="{begin + 0.4:.1f}" y="{y:.1f}" width="{max(finish - begin - 0.8, 0.6):.1f}" '
            f'height="{bottom - y:.1f}" data-x="{exponent:g}" data-y="{share:.7g}">'
            f"<title>2^{exponent:g}: {share:.3g} %</title></rect>"
        )
    zero_top = max(up(zeros), top)  # they can be most of all values: then their bar is cut, and says how many
    parts.append(
        f'<rect class="c1 fill" x="{LEFT + 8}" y="{zero_top:.1f}" width="20" height="{bottom - zero_top:.1f}" '
        f'data-y="{zeros:.7g}"><title>zeros: {zeros:.3g} %</title></rect>'
    )
    parts.append(_text(LEFT + 18, bottom + 17, "zeros", "tick middle"))
    parts.append(_text(LEFT + 18, zero_top - 5, f"{zeros:.3g} %", "mute middle small"))
    for exponent, label in marks:
        place = across(exponent)
        end = place + 5 + LETTER * len(label) > WIDTH
        parts.append(_rule(place, top - LABEL_HEIGHT, place, bottom, "zero"))
        parts.append(_text(place + (-5 if end else 5), top - 5, label, f"mute small{' end' if end else ''}"))
    return _svg(parts, name, height)


class _Scale:
    """Maps values of an axis to coordinates of the drawing."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float, padded: bool = False):
        self.axis, self.start, self.end = axis, start, end
        inside = [self._position(v) for v in (*values, *axis.include)] or [0.0, 1.0]
        low, high = min(inside), max(inside)
        if low == high:
            margin = 1.0 if axis.scale != "linear" else abs(low) / 2 or 1.0
            low, high = low - margin, high + margin
            padded = False
        if padded:
            margin = 0.05 * (high - low)
            low, high = low - (margin if low != 0 or axis.scale != "linear" else 0), high + margin
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        return self.start + (self._position(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def _position(self, value: float) -> float:
        function: Callable[[float], float] = {"linear": float, "log10": math.log10, "log2": math.log2}[self.axis.scale]
        return function(value)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Coordinates and texts of about `count` ticks."""
        if self.axis.scale == "linear":
            return [(self(v), text) for v, text in _linear_ticks(self.low, self.high, count, self.axis.whole)]
        whole = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
        if self.axis.scale == "log2":
            every = max(1, -(-len(whole) // (count + 1)))
            return [(self(2.0**e), _power(2, e)) for e in whole if e % every == 0]
        mantissas = (1,) if len(whole) >= 3 else (1, 2, 5) if self.high - self.low > 0.5 else ()
        if not mantissas:
            linear = _linear_ticks(10**self.low, 10**self.high, count)
            return [(self(v), text) for v, text in linear if v > 0]
        every = max(1, -(-len(whole) // (count + 1)))
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [(m * 10.0**e, m, e) for e in decades if e % every == 0 for m in mantissas]
        inside = [(v, m, e) for v, m, e in values if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
        if all(-3 <= e <= 4 for _, _, e in inside):
            return [(self(v), f"{v:,.{max(0, -e)}f}") for v, _, e in inside]
        decades_inside = [(v, m, e) for v, m, e in inside if m == 1]
        shown = decades_inside if len(decades_inside) > 1 else inside  # one power of ten alone is no scale
        return [(self(v), ("" if m == 1 else f"{m}\N{MULTIPLICATION SIGN}") + _power(10, e)) for v, m, e in shown]

    def ticks_side_by_side(self) -> list[tuple[float, str]]:
        """Coordinates and texts of at most about 5 ticks, with a blank between their texts, on a horizontal axis."""
        for count in (5, 4, 3, 2):
            ticks = self.ticks(count)
            rooms = [LETTER * (1 + (len(a) + len(b)) / 2) for (_, a), (_, b) in itertools.pairwise(ticks)]
            if all(right - left >= room for (left, _), (right, _), room in zip(ticks, ticks[1:], rooms, strict=False)):
                break
        return ticks


class _Names(_Scale):
    """An axis of names, side by side."""

    def __init__(self, axis: Axis, names: Sequence[str], start: float, end: float):
        super().__init__(Axis(axis.label), [-0.5, len(names) - 0.5], start, end)
        self.names = names

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """The coordinate of each name, and the name, as short as its place is wide."""
        letters = max(3, int((self.end - self.start) / len(self.names) / LETTER) - 1)
        return [(self(i), shortened(name, letters)) for i, name in enumerate(self.names)]


def _linear_ticks(low: float, high: float, count: int, whole: bool = False) -> list[tuple[float, str]]:
    """Whole multiples of 1, 2 or 5 times a power of ten, with as many decimals as they need."""
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    if max(abs(low), abs(high)) >= 1e6:  # the room on the left is for 7 letters
        digits = max(6, math.floor(math.log10(max(abs(low), abs(high)))) - math.floor(math.log10(step) + 1e-9) + 1)
        return [(k * step, f"{k * step / 1e6:.{digits}g}M".replace("-", "\N{MINUS SIGN}")) for k in multiples]
    return [(k * step, f"{k * step:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")) for k in multiples]


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(base: int, exponent: int) -> str:
    return f"{base}{str(exponent).translate(_RAISED)}"


def _only_drawable(series: Series, y: Axis) -> Series:
    """Replaces values that the axis cannot show by NaN: infinite ones, and on a logarithmic axis those not positive."""
    values = [v if math.isfinite(v) and (v > 0 or y.scale == "linear") else math.nan for v in series.y]
    return Series(series.label, series.x, values, series.style, series.faint, series.steps, series.failed)


def _last(series: Series) -> tuple[float, float] | None:
    there = [(x, y) for x, y in zip(series.x, series.y, strict=True) if not math.isnan(y)]
    return there[-1] if there else None


def _line(series: Series, across: _Scale, up: _Scale) -> list[str]:
    """The path of a series, broken where values are missing; its dots, and the cross of a run that failed."""
    path, broken = [], True
    before = 0.0
    for x, y in zip(series.x, series.y, strict=True):
        if math.isnan(y):
            broken = True
            continue
        px, py = across(x), up(y)
        if broken:
            path.append(f"M{px:.1f} {py:.1f}")
        elif series.steps:
            path.append(f"H{px:.1f}" + (f"V{py:.1f}" if py != before else ""))
        else:
            path.append(f"L{px:.1f} {py:.1f}")
        broken, before = False, py
    last = _last(series)
    if last is None:
        return []
    data = f'data-x="{_numbers(series.x)}" data-y="{_numbers(series.y)}"'
    tip = f"<title>{_escape(series.label)}</title>" if series.label else ""
    style = f"c{series.style % STYLES}"
    parts = [f'<path class="{_look(series)}" {data} d="{"".join(path)}">{tip}</path>']
    if not series.faint and len(series.x) <= DOTS:
        parts += [
            f'<circle class="{style} dot" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.4"><title>{x:,g}: {y:.5g}</title>'
            "</circle>"
            for x, y in zip(series.x, series.y, strict=True)
            if not math.isnan(y)
        ]
    if series.failed:
        px, py = across(last[0]), up(last[1])
        parts.append(f'<path class="{style} cross" d="M{px - 5:.1f} {py - 5:.1f}l10 10m0 -10l-10 10"/>')
    return parts


def _look(series: Series) -> str:
    """The classes of a line; faint ones have no dashes."""
    around, style = divmod(series.style, STYLES)
    return f"c{style} line {'faint' if series.faint else f'd{(style + around) % STYLES}'}"


def _legend(named: Sequence[Series], edge: float) -> list[str]:
    """Draws a sample and the name of each line on the right, from top to bottom in the order of the series.

    The order is the same in all figures of a page, wherever the lines end.
    """
    parts = []
    for row, series in enumerate(named):
        y = TOP + 6 + LABEL_HEIGHT * row
        parts.append(f'<path class="{_look(series)}" d="M{edge + 14} {y:.1f}h20"/>')
        parts.append(_name(edge + 39, y + 4, series.label, "", NAME_LETTERS))
    return parts


def _frame(across: _Scale, up: _Scale, left: float, right: float, top: float, height: float) -> str:
    """Grid lines, ticks and the names of both axes."""
    parts = []
    for y, text in up.ticks():
        parts.append(_rule(left, y, right, y, "grid"))
        parts.append(_text(left - 8, y + 4, text, "tick end"))
    bottom = height - BOTTOM
    for x, text in across.ticks_side_by_side():
        parts.append(_rule(x, bottom, x, bottom + 4, "axis"))
        parts.append(_text(x, bottom + 17, text, "tick middle"))
    parts.append(_rule(left, bottom, right, bottom, "axis"))
    parts.append(_text(2, 12, up.axis.label, "name"))
    parts.append(_text(right, height - 5, across.axis.label, "name end"))
    return "".join(parts)


def _vertical_grid(across: _Scale, top: float, bottom: float, height: float) -> str:
    parts = []
    for x, text in across.ticks_side_by_side():
        parts.append(_rule(x, top - 8, x, bottom, "grid"))
        parts.append(_text(x, bottom + 17, text, "tick middle"))
    parts.append(_text(across.end, height - 5, across.axis.label, "name end"))
    return "".join(parts)


def _svg(parts: Sequence[str], name: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{_escape(name)}">'
        f"<title>{_escape(name)}</title>{''.join(parts)}</svg>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{_escape(text)}</text>'


def _rows(names: Sequence[str]) -> tuple[float, float]:
    """The left edge of rows with these names, and how much higher each row is if names are drawn above them."""
    above = any(len(name) > ROW_LETTERS for name in names)
    return (LEFT, LABEL_HEIGHT) if above else (LEFT + 76, 0)


def _row_name(y: float, name: str, above: float) -> str:
    return _name(LEFT, y - 16, name, "over", LONG_LETTERS) if above else _text(LEFT + 62, y + 4, name, "end")


def _name(x: float, y: float, name: str, kind: str, letters: int) -> str:
    """Draws a name of at most `letters` letters; a tooltip shows a longer one whole."""
    if len(name) <= letters:
        return _text(x, y, name, kind)
    short = shortened(name, letters)
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{_escape(short)}<title>{_escape(name)}</title></text>'


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{v:.7g}" for v in values)
