"""`Page`: one self-contained HTML file, for a light screen, a dark one and paper."""

from __future__ import annotations

import base64
import html
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmp.errors import InputError

NO_VALUE = "\N{EN DASH}"
"""text of a table cell without a number"""


@dataclass
class Page:
    """The parts of a page, shown in the order in which they are added."""

    title: str
    """title of the page"""
    lead: str = ""
    """line under the title"""
    parts: list[str] = field(default_factory=list)
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
        """Adds figures, side by side where they fit: `(title, <svg> element, caption)` each, the caption plain text."""
        items = [
            f"<figure><h3>{escape(title)}</h3>{svg}"
            + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
            for title, svg, caption in figures
        ]
        self.parts.append(f'<div class="figures">{"".join(f"{item}</figure>" for item in items)}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, first: bool = True) -> None:
        """Adds a table of plain text, columns of numbers aligned right. `first`: the first column holds headings."""
        right = ["n" if all(_is_number(row[i]) for row in rows) else "" for i in range(len(header))]
        head = "".join(_cell("th", text, kind) for text, kind in zip(header, right, strict=True))
        body = "".join(
            "<tr>"
            + "".join(
                _cell("th" if first and i == 0 else "td", text, kind)
                for i, (text, kind) in enumerate(zip(row, right, strict=True))
            )
            + "</tr>"
            for row in rows
        )
        self.parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

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

    def data(self, value: Any) -> None:
        """Adds the numbers behind the page as JSON, for programs."""
        # In a script element `</script` would end it, and `<!--` would make it go on beyond its end.
        text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        self.parts.append(f'<script type="application/json" id="data">{text}</script>')

    def __str__(self) -> str:
        style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'  # or the browser asks for /favicon.ico
            f"<title>{escape(self.title)}</title><style>{style}</style></head>\n"
            f"<body><main><header><h1>{escape(self.title)}</h1>{lead}</header>\n"
            + "\n".join(self.parts)
            + f"\n<footer><p>Made by <code>{escape(command())}</code></p></footer></main></body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Writes the page, whole or not at all. Raises InputError if it cannot be written."""
        write(path, str(self))


def write(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all. Raises InputError if it cannot be written."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A path that is not UTF-8 has surrogates in it, which no file can hold.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another file") from error


def command() -> str:
    """The command line of this process, with the program's name without its folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace("__main__.py", "jaxmp", 1)


def provenance_rows(origin: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The device, versions and git revision that `jaxmp.runs.provenance` recorded, as rows of a table."""
    git, devices = origin.get("git"), list(origin.get("devices", ()))
    dirty = git and git.get("dirty", bool(git.get("patch")))
    counted = [f"{devices.count(device)} x {device}" for device in dict.fromkeys(devices)]
    return [
        ("device", f"{', '.join(counted)} ({origin.get('platform', 'unknown platform')})"),
        ("versions", ", ".join(f"{name} {number}" for name, number in origin.get("versions", {}).items() if number)),
        ("git revision", f"{git['revision']}{' and changes' if dirty else ''}" if git else "none"),
    ]


def escape(text: str) -> str:
    """Escapes plain text for HTML."""
    return html.escape(text, quote=True)


def _cell(tag: str, text: str, kind: str) -> str:
    return f'<{tag} class="{kind}">{escape(text)}</{tag}>' if kind else f"<{tag}>{escape(text)}</{tag}>"


def _is_number(text: str) -> bool:
    return not text or (text[0] in "+-<0123456789.\N{MINUS SIGN}\N{EN DASH}" and not text[1:2].isalpha())
