"""Writes the table of README.md from conformance.json: how many laws each system keeps, and which it breaks.

python experiments/conformance/summary.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- made by summary.py -->\n", "<!-- end -->\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a line for each system in `rows`, the rows of conformance.json."""
    lines = ["| system | version | laws that hold | laws broken |", "|---|---|---|---|"]
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        holds = sum(row["verdict"] == "holds" for row in own)
        broken = [f"`{row['law']}`" for row in own if row["verdict"] == "broken"]
        lines.append(f"| {system} | {own[0]['version']} | {holds} of {holds + len(broken)} | {', '.join(broken)} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, rows: list[dict[str, Any]]) -> str:
    """Returns the text `readme` with the table of `rows` between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + table(rows) + END + rest.partition(END)[2]


if __name__ == "__main__":
    rows = json.loads((FOLDER / "conformance.json").read_text())["rows"]
    readme = FOLDER / "README.md"
    readme.write_text(with_table(readme.read_text(), rows))
