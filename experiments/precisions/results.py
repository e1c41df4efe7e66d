"""Trains configs under several precisions and seeds, and keeps what they reached in configs/results.json.

    python experiments/precisions/results.py mnist_mlp spoken_digits_rnn
    python experiments/precisions/results.py sst2_bert_tiny \
        --options="--init-from runs/sst2_bert_tiny_mlm --init-only tokens positions types embedding_norm 'blocks_*'"

The runs are those of `jaxmp train CONFIG --precision PRECISION --seed SEED`, in the same folders; a run that is already
finished or failed is read and not repeated. What is kept is the monitored metric, of the last weights, on the test
split, null if the run failed, and the git revision that trained each run. The file is read and written after each
config, whose row takes the place of an older one of the same config and options; of the older one, other precisions
stay if they have the same settings, seeds, versions and devices. `jaxmp configs --markdown` makes a table of the file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.identity import identity_hash
from jaxmp.reports.page import write
from jaxmp.runs.fit import parent_of
from jaxmp.runs.provenance import provenance, without_patch
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.compare import train_cell
from jaxmp.studies.grid import Cell
from jaxmp.text_table import without_nan


def row(
    config: str, precisions: tuple[str, ...], seeds: tuple[int, ...], options: str, workdir: Path
) -> dict[str, Any]:
    """Returns what a config reached; trains the runs that do not exist yet. Raises SystemExit after a signal."""
    file, reached, skipped, seconds = ConfigFile.find(config), {}, {}, {}
    revisions: dict[str, list[Any]] = {}
    begins, fields = beginning(options)
    of_all = dataclasses.replace(file.experiment(fields), precision="float32", seed=0)
    monitor = Trainer(of_all).monitor.name
    for precision in precisions:
        summaries, revisions[precision] = [], []
        for seed in seeds:
            overrides = ["--precision", precision, "--seed", str(seed), *fields]
            cell = Cell(precision, seed, file.experiment(overrides), overrides)
            result = train_cell(cell, str(workdir), file.name, file.origin(overrides), why_failed, **begins)
            if result is None:
                raise SystemExit(75)
            summaries.append(summary_of(result, monitor))
            revisions[precision].append(without_patch(Run(result["run"]).config.get("git")))
        reached[precision] = [summary["test"][monitor] for summary in summaries]
        skipped[precision] = [summary["skipped_steps"] for summary in summaries]
        seconds[precision] = [round(summary["wall_seconds"], 1) for summary in summaries]
    parent = parent_of(**begins)
    found: dict[str, Any] = {"config": config, "options": options}
    found["identity"] = identity_hash(of_all, None if parent is None else parent.begins_with)
    found |= {"metric": monitor, "seeds": list(seeds), "test": reached}
    made = provenance(patch=False)
    made["versions"] = {name: made["versions"][name] for name in ("python", "jaxmp", "jax", "flax", "optax")}
    for name in ("command", "host"):
        made[name] = dict.fromkeys(precisions, made[name])
    return found | {"skipped_steps": skipped, "wall_seconds": seconds, **made, "git": revisions}


def why_failed(message: str) -> None:
    """The log of the runs: only why one failed."""
    if message.startswith("failed: "):
        print(message, flush=True)


def summary_of(result: dict[str, Any], metric: str) -> dict[str, Any]:
    """Returns the summary of a run; of one that failed no metric, and the steps skipped and seconds until then."""
    names = ("skipped_steps", "wall_seconds")
    so_far = {name: max((line.get(name, 0) for line in result["metrics"]), default=0) for name in names}
    return {"test": {metric: None}, **so_far, **result["summary"]}


OF_A_PRECISION = ("test", "skipped_steps", "wall_seconds", "command", "host", "git")
"""the parts of a row that have an entry for each precision"""


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the new row with the other precisions of the old one, if all that they have in common is equal.

    A row without `identity`, of before there was one, is replaced whole.
    """
    if any(old.get(name) != new[name] for name in new if name not in OF_A_PRECISION):
        return new
    return new | {name: old.get(name, {}) | new[name] for name in OF_A_PRECISION}


def beginning(options: str) -> tuple[dict[str, Any], list[str]]:
    """Splits options of `jaxmp train` into what a run begins with, for `fit`, and the fields of the experiment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--init-from")
    parser.add_argument("--init-only", nargs="+", default=())
    begins, fields = parser.parse_known_args(shlex.split(options))
    return {"init_from": begins.init_from, "init_only": tuple(begins.init_only)}, fields


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager: no other process is in it for the same folder. The folder itself is locked: no file is left."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


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
        new = row(config, precisions, seeds, options, workdir)
        with locked(output.parent):  # for hours another process may have written rows: read after training
            rows = json.loads(output.read_text()) if output.exists() else []
            for old in rows:
                if (old["config"], old["options"]) == (config, options):
                    new = merged(old, new)
            kept = [old for old in rows if (old["config"], old["options"]) != (config, options)]
            rows = sorted([*kept, new], key=lambda each: (each["config"], each["options"]))
            write(output, json.dumps(without_nan(rows), indent=1, allow_nan=False) + "\n")
        print(config, new["metric"], new["test"], flush=True)


if __name__ == "__main__":
    sys.exit(script(main))
