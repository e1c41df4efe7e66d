"""`Elements`: sections, tables and figures as HTML, for a page (`jaxmp.reports.page`) and for a notebook's cell."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxmp.text_table import Table

NO_VALUE = "\N{EN DASH}"
"""text of a table cell without a number"""
CELL_LETTERS = 44
"""most letters of a word in a table's cell; of a longer one the middle is left out, and a tooltip shows it whole"""
HEADING_LETTERS = 34
"""most letters of a cell that heads a row, which does not wrap"""
INTERVAL_LETTERS = 24
"""most letters of a number with its interval, for it to stand in one line"""

# Those of Okabe and Ito 2008 (Color Universal Design), darkened where they stand on white, lightened on a dark screen;
# each comes with dashes of its own.
LIGHT = (
    "--paper: #fff; --ink: #1a1e24; --mute: #5a6472; --rule: #c3cad3; --grid: #e4e9ef; --panel: #f6f8fa; "
    "--shade: #dde5ee; --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #a8458f; --c4: #8c6d00; --c5: #4a5568;"
)
DARK = (
    "--paper: #0f1318; --ink: #e6eaef; --mute: #9aa6b4; --rule: #445060; --grid: #252e38; --panel: #161b22; "
    "--shade: #232d39; --c0: #56b4e9; --c1: #ff9a4d; --c2: #34d0a0; --c3: #e79bd6; --c4: #f0dc5a; --c5: #b6c2d0;"
)

# JupyterLab, VS Code and Colab have themes of their own, whatever the system's is.
IN_LIGHT = '[data-jp-theme-light="true"] .jaxmp, .vscode-light .jaxmp, html[theme="light"] .jaxmp'
IN_DARK = '[data-jp-theme-light="false"] .jaxmp, .vscode-dark .jaxmp, html[theme="dark"] .jaxmp'


class Link(str):
    """The text of a table's cell that leads to a file or an address."""

    href: str
    """where it leads"""

    def __new__(cls, text: str, href: str) -> Link:
        """Makes the link `text` to `href`, a relative path or an address."""
        link = super().__new__(cls, text)
        link.href = href
        return link


@dataclass
class Elements:
    """Parts of a page or of a cell, shown in the order in which they are added."""

    parts: list[str] = field(default_factory=list, kw_only=True)
    """HTML of each part"""

    def section(self, title: str, text: str = "") -> None:
        """Begins a section with a title and a paragraph of plain text."""
        self.parts.append(f"<h2>{escape(title)}</h2>")
        self.paragraph(text)

    def paragraph(self, text: str, kind: str = "") -> None:
        """Adds a paragraph of plain text; `kind` is its class in the style sheet."""
        if text:
            self.parts.append(f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")

    def figures(self, figures: Sequence[tuple[str, str, str]]) -> None:
        """Adds figures, side by side where they fit: `(title, <svg> element, caption)` each, the caption plain text.

        One without an `<svg>` element says nothing that its caption does not: it is a sentence below the others.
        """
        items = [
            f"<figure><h3>{escape(title)}</h3>{svg}"
            + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
            for title, svg, caption in figures
            if svg
        ]
        if items:
            self.parts.append(f'<div class="figures">{"".join(f"{item}</figure>" for item in items)}</div>')
        for title, svg, caption in figures:
            if not svg:
                self.paragraph(f"{title}: {caption}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, first: bool = True) -> None:
        """Adds a table of plain text, columns of numbers aligned right. `first`: the first column holds headings."""
        count = len(header or rows[0])
        right = ["n" if all(_is_number(row[i]) for row in rows) else "" for i in range(count)]
        kinds = [kind or _interval_kind([row[i] for row in rows]) for i, kind in enumerate(right)]
        head = "".join(_cell("th", text, kind) for text, kind in zip(header or [""] * count, right, strict=True))
        body = "".join(
            "<tr>"
            + "".join(
                _cell("th" if first and i == 0 else "td", text, kind, wraps=not (first and i == 0))
                for i, (text, kind) in enumerate(zip(row, kinds, strict=True))
            )
            + "</tr>"
            for row in rows
        )
        head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
        self.parts.append(f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>')

    def quote(self, text: str) -> None:
        """Adds preformatted text."""
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def picture(self, png: bytes, text: str) -> None:
        """Adds a picture, a PNG file; `text` says what it shows."""
        encoded = base64.b64encode(png).decode()
        self.parts.append(f'<p><img src="data:image/png;base64,{encoded}" alt="{escape(text)}"></p>')

    def details(self, title: str, text: str) -> None:
        """Adds preformatted text, folded away."""
        self.parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def cell(self) -> str:
        """The HTML of a notebook's cell, in the notebook's theme, with all that it needs."""
        return f'<div class="jaxmp"><style>{_cell_style()}</style>{"".join(self.parts)}</div>'


def cell_of(blocks: Iterable[str], title: str = "") -> str:
    """The HTML of a notebook's cell that shows what a terminal shows.

    Args:
      blocks: the text that is printed, in parts: each a `Table`, or lines. Lines of a name, spaces and a text are rows
        of a table.
      title: the first line, if there is one.
    """
    elements, pairs = Elements(), list[tuple[str, str]]()
    if title:
        elements.parts.append(f"<h3>{escape(title)}</h3>")

    def add_pairs() -> None:
        if pairs:
            elements.table(("", ""), list(pairs))
            pairs.clear()

    for block in blocks:
        if isinstance(block, Table):
            add_pairs()
            if block.rows:
                elements.table(block.header, block.rows)
            continue
        for line in block.splitlines():
            pair = re.fullmatch(r"(\S(?:.*?\S)?) {2,}(\S.*)", line)
            if pair:
                pairs.append((pair[1], pair[2]))
                continue
            add_pairs()
            elements.paragraph(line.strip(), "note" if line.startswith(" ") else "")
    add_pairs()
    return elements.cell()


def element_style() -> str:
    """The style sheet of sections, tables and figures."""
    return (Path(__file__).parent / "elements.css").read_text(encoding="utf-8")


def _cell_style() -> str:
    base = "background: var(--paper); color: var(--ink); padding: 2px 12px; font: 14px/1.5 system-ui, sans-serif"
    return (
        f".jaxmp {{ {LIGHT} }} @media screen and (prefers-color-scheme: dark) {{ .jaxmp {{ {DARK} }} }} "
        f"{IN_LIGHT} {{ {LIGHT} }} {IN_DARK} {{ {DARK} }} "
        # Named three times, so that no rule of the notebook's own for tables is more specific.
        f".jaxmp.jaxmp.jaxmp {{ {base}; {element_style()} }}"
    )


def shortened(text: str, letters: int) -> str:
    """A text of at most `letters` letters; of a longer one the middle is left out.

    Two precisions mostly differ in the module that they begin with, or in the default that they end with.

    >>> shortened("encoder/layer_0/Dense_0=float32; mixed_float16", 21)
    'encoder/la…ed_float16'
    """
    if len(text) <= letters:
        return text
    head = letters // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[head + 1 - letters :]}"


def escape(text: str) -> str:
    """Escapes plain text for HTML."""
    return html.escape(text, quote=True)


def _cell(tag: str, text: str, kind: str, *, wraps: bool = True) -> str:
    # Where a line may not break at spaces, the whole text is one word.
    longest, letters = (max(map(len, text.split()), default=0), CELL_LETTERS) if wraps else (len(text), HEADING_LETTERS)
    shown = shortened(text, letters) if longest > letters else text
    content = escape(shown)
    if isinstance(text, Link):
        content = f'<a href="{escape(text.href)}">{content}</a>'
    attributes = (f' class="{kind}"' if kind else "") + (f' title="{escape(text)}"' if shown != text else "")
    return f"<{tag}{attributes}>{content}</{tag}>"


def _interval_kind(texts: Sequence[str]) -> str:
    """The class of a column of numbers with their intervals, which stand in one line each; else the empty text."""
    intervals = any(" (" in text and _is_number(text) for text in texts)
    return "s" if intervals and max(map(len, texts)) <= INTERVAL_LETTERS else ""


def _is_number(text: str) -> bool:
    return not text or (text[0] in "+-<0123456789.\N{MINUS SIGN}\N{EN DASH}" and not text[1:2].isalpha())
