"""Draws how a metric of a run went beside what a paper reached, and keeps its numbers.

    jaxmp train cifar10_resnet20 --loop.steps 5280
    python experiments/precisions/curve.py runs/cifar10_resnet20 --published 0.9125 \
        --source "He et al. 2016, table 6: test, 182 epochs" --output experiments/precisions/cifar10_resnet20

Writes OUTPUT.svg and OUTPUT.json: the metric on the training and the validation split by epoch, what the last weights
reach on the test split, and how and from which revision the run was trained.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import tyro

from jaxmp.cli import script
from jaxmp.html.figure import Axis, Series, line_figure
from jaxmp.reports.page import write
from jaxmp.reports.paper_report import plot
from jaxmp.runs.provenance import without_patch
from jaxmp.runs.run import Run
from jaxmp.text_table import without_nan
from jaxmp.training.metrics import spec_of


def curve(run: Run, metric: str) -> dict[str, Any]:
    """Returns the metric of a run by epoch, and how the run was trained."""
    config, summary = run.config, run.summary
    found: dict[str, Any] = {
        "run": Path(run.path.parent.name, run.path.name).as_posix(),
        "trained_by": shlex.join(["jaxmp", "train", config["name"], *config["overrides"]]),
        "wall_seconds": round(summary["wall_seconds"]),
        "git": without_patch(config.get("git")),
        **{name: config[name] for name in ("versions", "devices", "platform")},
        "metric": metric,
        "test": summary["test"][metric],
    }
    for split in ("train", "validation"):
        lines = [line for line in run.metrics if line["split"] == split and metric in line]
        found[split] = {"epoch": [round(line["epoch"], 3) for line in lines], metric: [line[metric] for line in lines]}
    return found


def draw(found: dict[str, Any], run: Run) -> str:
    """Draws a curve, and the published value as a level, as the text of an SVG file."""
    metric, published = found["metric"], found.get("published")
    spec = spec_of(run.metric_specs, metric)

    def line(label: str, split: str, style: int) -> Series:
        values = [math.nan if value is None else value * spec.factor for value in found[split][metric]]
        return Series(label, found[split]["epoch"], values, style)

    lines = [line("validation", "validation", 0), line("training", "train", 1)]
    last = found["validation"]["epoch"][-1]
    if published:
        lines.append(Series("published", [0.0, last], [published["value"] * spec.factor] * 2, 2))
    figure = line_figure(Axis("epoch", include=(0.0,)), Axis(spec.label(metric)), lines, name=f"{metric} by epoch")
    unit = f" {spec.unit}" if spec.unit else ""
    source = f"; published: {spec.text(published['value'])}{unit} ({published['source']})" if published else ""
    caption = f"{found['run']}. Test split, last weights: {spec.text(found['test'])}{unit}{source}."
    return plot(figure, f"{found['run'].partition('/')[0]}: {spec.label(metric)}", caption, found["command"])


def main(
    run: tyro.conf.Positional[str],
    output: Path,
    metric: str = "accuracy",
    published: float | None = None,
    source: str = "",
) -> None:
    """Draws the curve of a run.

    Args:
        run: A finished run: its folder, or the one above.
        output: The files to write, without .json and .svg.
        metric: Name of a metric.
        published: What a paper reached.
        source: Where that is published, and what it was measured on.
    """
    read = Run(run)
    found = curve(read, metric) | {"command": shlex.join(["python", *sys.argv])}
    if published is not None:
        found["published"] = {"value": published, "source": source}
    write(output.with_suffix(".json"), json.dumps(without_nan(found), indent=1) + "\n")
    write(output.with_suffix(".svg"), draw(found, read))


if __name__ == "__main__":
    sys.exit(script(main))
