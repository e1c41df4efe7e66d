"""Trains configs under several precisions and seeds, and keeps what they reached in configs/results.json.

    python experiments/precisions/results.py mnist_mlp spoken_digits_rnn
    python experiments/precisions/results.py sst2_bert_tiny \
        --options="--init-from runs/sst2_bert_tiny_mlm --init-only tokens positions types embedding_norm 'blocks_*'"

The runs are those of `jaxmp train CONFIG --precision PRECISION --seed SEED`, in the same folders; a run that is already
finished is read and not repeated. What is kept is the monitored metric, of the last weights, on the test split, and the
git revision that trained each run. The file is written after each config, whose row takes the place of an older one of
the same config and options; of the older one, other precisions stay if they have the same seeds, versions and devices.
`jaxmp configs --markdown` makes a table of the file.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import tyro

from jaxmp import fit
from jaxmp.distributed.signals import stop_signals
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.provenance import provenance, without_patch
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.text_table import without_nan


def row(
    config: str, precisions: tuple[str, ...], seeds: tuple[int, ...], options: str, workdir: Path
) -> dict[str, Any]:
    """Returns what a config reached; trains the runs that do not exist yet."""
    file, reached, skipped, seconds, revisions = ConfigFile.find(config), {}, {}, {}, {}
    begins, fields = beginning(options)
    for precision in precisions:
        summaries, revisions[precision] = [], []
        for seed in seeds:
            overrides = ["--precision", precision, "--seed", str(seed), *fields]
            experiment = file.experiment(overrides)
            monitor = Trainer(experiment).monitor
            origin = {"source": file.source, "file": file.file, "overrides": overrides}
            how: dict[str, Any] = {"name": file.name, "origin": origin, "log": lambda message: None, **begins}
            with stop_signals() as stopped:  # a signal in the end of a run as well
                fitted = fit(experiment, workdir=workdir, **how)
            if fitted.stopped or stopped():
                raise SystemExit(75)
            summaries.append(fitted.summary)
            revisions[precision].append(without_patch(Run(fitted.path).config.get("git")))
        reached[precision] = [summary["test"][monitor.name] for summary in summaries]
        skipped[precision] = [summary["skipped_steps"] for summary in summaries]
        seconds[precision] = [round(summary["wall_seconds"], 1) for summary in summaries]
    found = {"config": config, "options": options, "metric": monitor.name, "seeds": list(seeds), "test": reached}
    made = provenance(patch=False)
    made["versions"] = {name: made["versions"][name] for name in ("python", "jaxmp", "jax", "flax", "optax")}
    made["command"] = dict.fromkeys(precisions, made["command"])
    return found | {"skipped_steps": skipped, "wall_seconds": seconds, **made, "git": revisions}


OF_A_PRECISION = ("test", "skipped_steps", "wall_seconds", "command", "git")
"""the parts of a row that have an entry for each precision"""


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the new row with the other precisions of the old one, if all that they have in common is equal."""
    if any(old[name] != new[name] for name in new if name not in OF_A_PRECISION):
        return new
    return new | {name: old[name] | new[name] for name in OF_A_PRECISION}


def beginning(options: str) -> tuple[dict[str, Any], list[str]]:
    """Splits options of `jaxmp train` into what a run begins with, for `fit`, and the fields of the experiment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--init-from")
    parser.add_argument("--init-only", nargs="+", default=())
    begins, fields = parser.parse_known_args(shlex.split(options))
    return {"init_from": begins.init_from, "init_only": tuple(begins.init_only)}, fields


def main(
    configs: tyro.conf.Positional[tuple[str, ...]],
    precisions: tuple[str, ...] = ("float32", "mixed_bfloat16", "mixed_float16"),
    seeds: tuple[int, ...] = (0, 1, 2),
    options: str = "",
    workdir: Path = Path("runs"),
    output: Path = Path("configs/results.json"),
) -> None:
    """Trains the runs that do not exist yet, and writes what they reached.

    Args:
        configs: Names of configs.
        precisions: Values of --precision.
        seeds: Seeds; one run for each.
        options: More options of `jaxmp train` for all runs, as one string.
        workdir: Folder that contains all runs.
        output: JSON file to write to.
    """
    for config in configs:
        rows = json.loads(output.read_text()) if output.exists() else []
        new = row(config, precisions, seeds, options, workdir)
        for old in rows:
            if (old["config"], old["options"]) == (config, options):
                new = merged(old, new)
        kept = [old for old in rows if (old["config"], old["options"]) != (config, options)]
        rows = sorted([*kept, new], key=lambda each: (each["config"], each["options"]))
        output.write_text(json.dumps(without_nan(rows), indent=1) + "\n")
        print(config, new["metric"], new["test"], flush=True)


if __name__ == "__main__":
    tyro.cli(main)
