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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from jaxmp import fit
from jaxmp.distributed.signals import stop_signals
from jaxmp.errors import RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.identity import identity_hash
from jaxmp.reports.page import write
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.going_on import Parent
from jaxmp.runs.provenance import provenance, without_patch
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.runs.weights_file import WeightsFile
from jaxmp.studies.outcome import recorded_failure, require_all_steps
from jaxmp.text_table import without_nan


def row(
    config: str, precisions: tuple[str, ...], seeds: tuple[int, ...], options: str, workdir: Path
) -> dict[str, Any]:
    """Returns what a config reached; trains the runs that do not exist yet."""
    file, reached, skipped, seconds = ConfigFile.find(config), {}, {}, {}
    revisions: dict[str, list[Any]] = {}
    begins, fields = beginning(options)
    origin = identity_of_beginning(**begins)
    of_all = dataclasses.replace(file.experiment(fields), precision="float32", seed=0)
    for precision in precisions:
        summaries, revisions[precision] = [], []
        for seed in seeds:
            overrides = ["--precision", precision, "--seed", str(seed), *fields]
            experiment = file.experiment(overrides)
            monitor = Trainer(experiment).monitor
            folder = RunFolder.of(experiment, workdir, file.name, origin)
            how = {"workdir": workdir, "name": file.name, "origin": file.origin(overrides), **begins}
            summaries.append(summary_of(experiment, folder, how) or failed_summary(folder, monitor.name))
            revisions[precision].append(without_patch(Run(folder.path).config.get("git")))
        reached[precision] = [summary["test"][monitor.name] for summary in summaries]
        skipped[precision] = [summary["skipped_steps"] for summary in summaries]
        seconds[precision] = [round(summary["wall_seconds"], 1) for summary in summaries]
    found: dict[str, Any] = {"config": config, "options": options, "identity": identity_hash(of_all, origin)}
    found |= {"metric": monitor.name, "seeds": list(seeds), "test": reached}
    made = provenance(patch=False)
    made["versions"] = {name: made["versions"][name] for name in ("python", "jaxmp", "jax", "flax", "optax")}
    made["command"] = dict.fromkeys(precisions, made["command"])
    return found | {"skipped_steps": skipped, "wall_seconds": seconds, **made, "git": revisions}


def summary_of(experiment: Experiment, folder: RunFolder, how: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the summary of a run, trained by `fit(experiment, **how)` unless it is finished; None if it failed.

    Raises SystemExit after a signal.
    """
    if recorded_failure(folder, experiment, print) is not None:
        return None
    with stop_signals() as stopped:  # a signal in the end of a run as well
        try:
            fitted = fit(experiment, **how, log=lambda message: None)
        except RunFailed as error:
            print(f"failed: {error}", flush=True)
            fitted = None
    if stopped() or (fitted is not None and fitted.stopped):
        raise SystemExit(75)
    if fitted is None:
        return None
    require_all_steps(fitted)
    return fitted.summary


def failed_summary(folder: RunFolder, metric: str) -> dict[str, Any]:
    """What stands for the summary of a run that failed: no metric, and the steps skipped and seconds so far."""
    lines = folder.read_lines()
    so_far = {name: max((line.get(name, 0) for line in lines), default=0) for name in ("skipped_steps", "wall_seconds")}
    return {"test": {metric: None}, **so_far}


OF_A_PRECISION = ("test", "skipped_steps", "wall_seconds", "command", "git")
"""the parts of a row that have an entry for each precision"""


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the new row with the other precisions of the old one, if all that they have in common is equal.

    A row without `identity`, of before there was one, is replaced whole.
    """
    if any(old.get(name) != new[name] for name in new if name not in OF_A_PRECISION):
        return new
    return new | {name: old[name] | new[name] for name in OF_A_PRECISION}


def beginning(options: str) -> tuple[dict[str, Any], list[str]]:
    """Splits options of `jaxmp train` into what a run begins with, for `fit`, and the fields of the experiment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--init-from")
    parser.add_argument("--init-only", nargs="+", default=())
    begins, fields = parser.parse_known_args(shlex.split(options))
    return {"init_from": begins.init_from, "init_only": tuple(begins.init_only)}, fields


def identity_of_beginning(init_from: str | None, init_only: tuple[str, ...]) -> dict[str, Any] | None:
    """What identifies the weights that a run begins with, as its folder's name has it; None if it begins afresh."""
    if init_from is None:
        return None
    if WeightsFile.is_named_by(init_from):
        return WeightsFile.find(init_from, init_only).begins_with
    return Parent.find(init_from, "init", init_only).begins_with


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
    tyro.cli(main)
