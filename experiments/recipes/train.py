"""Trains configs under each recipe, paired by seed: the loss beside float32's and bfloat16's, with intervals.

    python experiments/recipes/train.py --config digits_cnn --output experiments/recipes/digits_cnn.json

The runs are those of `jaxmp train CONFIG --precision P --seed S` with the options that `SIZES` lists, in the same
folders: a run that is finished is read and not repeated, one that was stopped goes on, one that diverges is None.
`nvfp4` is also trained without each of its four parts: the Hadamard transform, stochastic rounding, blocks of 16x16 for
weights, and the layers that are kept high. Differences are of the loss on the test split, with 95 % t intervals over
the seeds (`jaxmp.studies.paired`, which is what `jaxmp compare` uses).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxmp import fit
from jaxmp.cli import script
from jaxmp.errors import RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.precision.recipe import RECIPES
from jaxmp.runs.provenance import provenance
from jaxmp.studies.paired import method, paired
from jaxmp.text_table import without_nan

REFERENCES = ("float32", "mixed_bfloat16")


class Size(NamedTuple):
    """How a config is made small enough to train many times on one core of a CPU."""

    options: tuple[str, ...]
    """options of `jaxmp train`"""
    high: str
    """rules of the policy tree for the layers that nvfp4 keeps high: the last ones and the head, as in its paper"""


# Steps, so that the reference has learnt most of what it will: digits_cnn is at 98.9 % of 98.9 %. The others are the
# configs themselves, trained for a part of their steps.
SIZES = {
    "digits_cnn": Size(("--loop.steps", "300", "--loop.eval-every", "150"), "Dense_1=float32"),
    "cifar10_cnn": Size(("--loop.steps", "400", "--loop.limit-batches", "40"), "Dense_0=float32"),
    "shakespeare_gpt": Size(("--loop.steps", "400", "--loop.eval-every", "400"), "blocks_3=float32; tokens=float32"),
}


def precisions(high: str) -> dict[str, str]:
    """Returns what `--precision` takes, by the name under which it is listed."""
    presets = {name: name for name in (*REFERENCES, *RECIPES)}
    without = {
        "nvfp4 with high layers": f"{high}; nvfp4",
        "nvfp4 with high layers, without Hadamard": f"{high}; nvfp4,hadamard=none",
        "nvfp4 with high layers, to nearest": f"{high}; nvfp4,stochastic=none",
        "nvfp4 with high layers, weights 1x16": f"{high}; nvfp4,fprop=nvfp4/nvfp4,dgrad=nvfp4/nvfp4",
    }
    return presets | without


def loss_of(file: ConfigFile, options: tuple[str, ...], precision: str, seed: int, workdir: Path) -> float | None:
    """Trains one run, or reads it if it is finished; returns its test loss, None if it failed."""
    overrides = ["--precision", precision, *options, "--seed", str(seed)]
    origin = {"source": file.source, "file": file.file, "overrides": overrides}
    start = time.perf_counter()
    try:
        fitted = fit(
            file.experiment(overrides), workdir=workdir, name=file.name, origin=origin, log=lambda message: None
        )
    except RunFailed as why:
        print(f"{file.name} {precision} {seed}: {why}", flush=True)
        return None
    if fitted.stopped:
        raise SystemExit(75)
    print(f"{file.name} {precision} {seed}: {fitted.summary['test']} {time.perf_counter() - start:.0f} s", flush=True)
    return fitted.summary["test"]["loss"]


def main(
    config: Literal["digits_cnn", "cifar10_cnn", "shakespeare_gpt"] = "digits_cnn",
    seeds: tuple[int, ...] = (0, 1, 2),
    workdir: Path = Path("runs"),
    output: Path | None = None,
) -> None:
    """Trains the runs that do not exist yet, and prints a table.

    Args:
      config: one of `SIZES`.
      seeds: one run of each precision each.
      workdir: folder of all runs.
      output: file for the results, as JSON.
    """
    file, size = ConfigFile.find(config), SIZES[config]
    names = precisions(size.high)
    own = "python experiments/recipes/train.py"
    how = f"{own} --config {config} --seeds {' '.join(map(str, seeds))} --output {output}"
    content = {**provenance(patch=False), "command": how, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    content |= {"options": list(size.options), "method": method(len(seeds))}
    losses: dict[str, dict[int, float | None]] = {}
    rows = []
    for name, precision in names.items():
        found = {seed: loss_of(file, size.options, precision, seed, workdir) for seed in seeds}
        losses[name] = found
        row: dict[str, Any] = {"name": name, "precision": precision, "loss": found}
        for reference in [each for each in REFERENCES if each in losses and each != name]:
            pairs = [(found[seed], losses[reference][seed]) for seed in seeds]
            differences = [own - other for own, other in pairs if own is not None and other is not None]
            row[f"difference to {reference}"] = paired(differences)._asdict()
        rows.append(row)
        print(json.dumps(without_nan(row)), flush=True)
        if output is not None:  # after each row: a run that is stopped leaves what it has
            text = json.dumps(without_nan({**content, "rows": rows}), indent=1, allow_nan=False)
            output.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
