"""Trains configs under several precisions and seeds, and prints a table of test accuracies.

    python experiments/precisions/accuracy.py --output digits.json
    python experiments/precisions/accuracy.py --configs mnist_mlp mnist_cnn --precisions float32 mixed_bfloat16 \
        mixed_float16 --seeds 0 --output mnist.json

The runs are those of `jaxmp train CONFIG --precision PRECISION --seed SEED`, in the same folders; a run that is already
finished is read and not repeated. The last column of the table is the mean minus that of the first precision, in
percentage points.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from jaxmp import fit
from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.provenance import provenance


def accuracies(config: str, precision: str, seeds: tuple[int, ...], options: list[str], workdir: Path) -> list[float]:
    """Returns the test accuracy of one run per seed; trains runs that do not exist yet."""
    file, found = ConfigFile.find(config), []
    for seed in seeds:
        overrides = ["--precision", precision, "--seed", str(seed), *options]
        origin = {"source": file.source, "file": file.file, "overrides": overrides}
        fitted = fit(
            file.experiment(overrides), workdir=workdir, name=file.name, origin=origin, log=lambda message: None
        )
        if fitted.stopped:
            raise SystemExit(75)
        found.append(fitted.summary["test"]["accuracy"])
    return found


def row(config: str, precision: str, found: list[float], reference: float) -> dict[str, Any]:
    """Returns a row of the table: mean and sample standard deviation (None for a single run), in percent."""
    mean = statistics.mean(found)
    return {
        "config": config,
        "precision": precision,
        "accuracies": found,
        "mean": 100 * mean,
        "spread": 100 * statistics.stdev(found) if len(found) > 1 else None,
        "difference": 100 * (mean - reference),
    }


def line(row: dict[str, Any]) -> str:
    """Formats a row as a line of a Markdown table."""
    spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
    return f"| `{row['config']}` | `{row['precision']}` | {row['mean']:.2f}{spread} | {row['difference']:+.2f} |"


def main(
    configs: tuple[str, ...] = ("digits_mlp", "digits_cnn"),
    precisions: tuple[str, ...] = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    options: str = "",
    workdir: Path = Path("runs"),
    output: Path | None = None,
) -> None:
    """Trains the runs that do not exist yet, and prints the table.

    Args:
        configs: Names of configs, or paths of Python files.
        precisions: Values of --precision; the others are compared with the first.
        seeds: Seeds; one run for each.
        options: More options of `jaxmp train` for all runs, as one string: --options="--optimizer.learning-rate 1e-4"
        workdir: Folder that contains all runs.
        output: JSON file to write; none by default.
    """
    rows: list[dict[str, Any]] = []
    for config in configs:
        reference = None
        for precision in precisions:
            found = accuracies(config, precision, seeds, shlex.split(options), workdir)
            reference = statistics.mean(found) if reference is None else reference
            rows.append(row(config, precision, found, reference))
    print("| config | precision | test accuracy, % | difference, points |\n|---|---|---|---|")
    print("\n".join(map(line, rows)))
    if output is not None:
        output.write_text(json.dumps(provenance(patch=False) | {"seeds": seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
