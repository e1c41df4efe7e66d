"""Writes the tables of README.md from the JSON files of train.py.

python experiments/recipes/summary.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- made by summary.py -->\n", "<!-- end -->\n"


def table(content: dict[str, Any]) -> str:
    """Returns a Markdown table of one config: mean test loss, and its differences with their intervals."""
    lines = ["| precision | test loss | beside float32 | beside mixed_bfloat16 |", "|---|---|---|---|"]
    for row in content["rows"]:
        losses = [loss for loss in row["loss"].values() if loss is not None]
        mean = f"{sum(losses) / len(losses):.4f}" if len(losses) == len(row["loss"]) else "diverged"
        cells = [difference(row.get(f"difference to {name}")) for name in ("float32", "mixed_bfloat16")]
        lines.append(f"| {row['name']} | {mean} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference(paired: dict[str, Any] | None) -> str:
    """Formats a mean difference with its 95 % interval, bold where that leaves out 0; "" if no pair converged."""
    if paired is None or paired["mean"] is None:
        return ""
    if paired["low"] is None:
        return f"{paired['mean']:+.4f}"
    text = f"{paired['mean']:+.4f} ({paired['low']:+.4f} to {paired['high']:+.4f})"
    return f"**{text}**" if paired["low"] > 0 or paired["high"] < 0 else text


def with_tables(readme: str) -> str:
    """Returns the text `readme` with a table for each JSON file between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    parts = []
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text())
        seeds = len(content["rows"][0]["loss"])
        parts.append(f"### {path.stem}, {seeds} seeds\n\n    {content['command']}\n\n{table(content)}")
    return before + BEGIN + "\n".join(parts) + END + rest.partition(END)[2]


if __name__ == "__main__":
    file = FOLDER / "README.md"
    file.write_text(with_tables(file.read_text()))
