"""`jaxmp compare CONFIG`: one experiment under several precisions and seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxmp.commands.command import ConfigCommand, require_path
from jaxmp.errors import DONE, FAILED, STOPPED, InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.overrides import named_fields

if TYPE_CHECKING:
    from jaxmp.experiment.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """The options of `jaxmp compare`."""

    precision: tuple[str, ...] = ("float32", "mixed_bfloat16", "mixed_float16")
    """Precisions to train under; each is compared with the first."""
    seeds: tuple[int, ...] | None = None
    """Seeds to train with, under every precision; by default 0 1 2, and with --margin 0 to 9."""
    margin: float | None = None
    """Non-inferiority test: exit code 0 only if every precision is shown to be worse than the first by less than this,
    on the test split. The seeds are planned before the first run."""
    metric: str | None = None
    """With --margin: the metric that it is about; by default the one that the config monitors."""
    looks: bool = False
    """With --margin: decide after 5, 10 and 20 pairs of seeds, at p < .0206 each, instead of once."""
    output: str | None = None
    """HTML file to write, with a JSON file next to it; by default WORKDIR/CONFIG/compare.html."""
    workdir: str = "runs"
    """Folder for the runs; runs that exist are resumed, or read if they are finished."""
    gradients: int = 0
    """Number of steps of the first run at which gradients are compared as well."""
    gradients_against: Literal["float64", "float32"] = "float64"
    """Precision of the reference gradients: float64 (without dropout) or float32 (with dropout, as in training)."""


def compare(config: ConfigFile, options: Options, experiment: Experiment, overrides: list[str]) -> int:
    """Trains a config under several precisions and seeds, and compares them on an HTML page."""
    require_path(workdir=options.workdir, output=options.output)
    if "seed" in named_fields(overrides):
        raise InputError("--seed: a comparison has several; expected --seeds 0 1 2")
    from jaxmp.reports import gate_report
    from jaxmp.reports.comparison import failures, text
    from jaxmp.reports.page import require_html
    from jaxmp.studies import compare as study
    from jaxmp.studies.gate import Gate, gate

    seeds: Sequence[int] = (0, 1, 2) if options.seeds is None else options.seeds
    study.require_gradients(options.gradients)
    output = Path(options.output or Path(options.workdir) / config.name / "compare.html").expanduser()
    require_html("output", output)
    found: Gate | None = None
    if options.margin is None:
        for name in ("metric", "looks"):
            if getattr(options, name):
                raise InputError(f"--{name}: only with --margin, which is not given")
    else:
        found = gate(
            config,
            options.precision,
            margin=options.margin,
            metric=options.metric,
            seeds=options.seeds,
            looks=options.looks,
            overrides=overrides,
            workdir=options.workdir,
        )
        if found is None:
            return STOPPED
        seeds = found.common_seeds
    comparison = study.compare(
        config,
        options.precision,
        seeds,
        overrides=overrides,
        workdir=options.workdir,
        gradients=options.gradients,
        gradients_against=options.gradients_against,
    )
    if comparison is None:
        return STOPPED
    if found is not None:
        comparison["gate"] = dict(found)
    study.save(comparison, output)
    print(text(comparison))
    print(f"{'report':<16} {output}")
    failed = failures(comparison)
    for failure in failed:
        print(f"jaxmp: failed: {failure}", file=sys.stderr)
    if found is not None:
        print(gate_report.text(found))
        return DONE if found.is_open else FAILED
    return FAILED if failed else DONE


COMMAND = ConfigCommand("compare", Options, compare)
