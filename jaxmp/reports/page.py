"""`Page`: one self-contained HTML file, for a light screen, a dark one and paper."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmp.errors import InputError
from jaxmp.html.elements import DARK, LIGHT, Elements, element_style, escape
from jaxmp.runs.provenance import hardware
from jaxmp.text_table import without_password


@dataclass
class Page(Elements):
    """One page, made of the parts of `Elements`."""

    title: str
    """title of the page"""
    lead: str = ""
    """line under the title"""

    def data(self, value: Any) -> None:
        """Adds the numbers behind the page as JSON, for programs."""
        # In a script element `</script` would end it, and `<!--` would make it go on beyond its end.
        text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        self.parts.append(f'<script type="application/json" id="data">{text}</script>')

    def __str__(self) -> str:
        style = f":root {{ color-scheme: light dark; {LIGHT} }}\n"
        style += f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n{element_style()}"
        style += (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
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


def require_html(where: str, path: Path) -> None:
    """Raises InputError if a page has the name of the JSON file that is written beside it, with the suffix .json."""
    if path.suffix == ".json":
        raise InputError(f"{where} {str(path)!r}: the page would replace the JSON beside it; expected a name in .html")


def command() -> str:
    """The command line of this process, with the program's name without its folder, and without passwords."""
    words = [Path(sys.argv[0]).name, *map(without_password, sys.argv[1:])]
    return shlex.join(words).replace("__main__.py", "jaxmp", 1)


def provenance_rows(origin: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The device, versions and git revision that `jaxmp.runs.provenance` recorded, as rows of a table."""
    git = origin.get("git")
    dirty = git and git.get("dirty", bool(git.get("patch")))
    return [
        ("device", hardware(origin)),
        ("versions", ", ".join(f"{name} {number}" for name, number in origin.get("versions", {}).items() if number)),
        ("git revision", f"{git['revision']}{' and changes' if dirty else ''}" if git else "none"),
    ]
