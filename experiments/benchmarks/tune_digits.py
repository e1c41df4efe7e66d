"""A study of 40 trials of `digits_mlp`: how long it takes, and whether its best beats the default on fresh seeds.

    python experiments/benchmarks/run.py tune_digits

The study chooses by the validation loss of seed 0. The best and the default are then trained on five seeds that the
study did not see, and compared pair by pair, on the validation and on the test split.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.fit import fit
from jaxmp.runs.provenance import provenance
from jaxmp.runs.run import Run
from jaxmp.studies.paired import paired
from jaxmp.studies.tune_study import StudyFolder, study_to_json

SPACE = ("optimizer.learning-rate=log:1e-4:1e-1", "model.features=256,512,1024", "model.dropout=linear:0:0.6")
FRESH = (1001, 1002, 1003, 1004, 1005)


def main(
    config: str = "digits_mlp", trials: int = 40, jobs: int = 2, workdir: str = "runs", output: Path | None = None
) -> None:
    """Runs the study, then the best and the default on fresh seeds, and prints what came out.

    Args:
      config: what is tuned.
      trials: number of trials.
      jobs: number of workers.
      workdir: folder of the runs; a study that is there is gone on with, and its time not measured.
      output: file for the results, as JSON.
    """
    folder = StudyFolder(Path(workdir) / config / "tune")
    measured = None if StudyFolder.is_one(folder.path) else time.perf_counter()
    command = ["tune", config, "--space", *SPACE, "--trials", str(trials), "--metric", "loss", "--jobs", str(jobs)]
    subprocess.run([sys.executable, "-m", "jaxmp", *command, "--workdir", workdir], check=True)
    found: dict[str, Any] = {"command": " ".join(["jaxmp", *command]), "cores": os.cpu_count(), "load": os.getloadavg()}
    if measured is not None:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found |= {"wall_seconds": time.perf_counter() - measured, "cpu_seconds": used.ru_utime + used.ru_stime}
    study = study_to_json(folder)
    best = next(trial for trial in study["trials"] if trial["number"] == study["best"])
    found |= {
        "states": [trial["state"] for trial in study["trials"]],
        "best": {"trial": best["number"] + 1, "params": best["params"], "validation_loss": best["value"]},
        "importance": study["importance"],
    }
    source, losses = ConfigFile.find(config), {}
    for name, arguments in (("default", []), ("best", best["arguments"])):
        for seed in FRESH:
            words = [*arguments, "--seed", str(seed)]
            fitted = fit(
                source.experiment(words), workdir=workdir, name=config, origin=source.origin(words), progress="none"
            )
            validation = min(Run(fitted.path).curve("loss", "validation")[1])
            losses.setdefault(name, []).append({"validation": validation, "test": fitted.summary["test"]["loss"]})
    for split in ("validation", "test"):
        pairs = [b[split] - d[split] for b, d in zip(losses["best"], losses["default"], strict=True)]
        found[f"{split}_loss"] = {
            "seeds": FRESH,
            **{name: [each[split] for each in of] for name, of in losses.items()},
            "best_minus_default": paired(pairs)._asdict() | {"p": None},  # no sign-flip test of five pairs
        }
    origin = provenance(patch=False)
    found |= {"provenance": {name: value for name, value in origin.items() if name != "command"}}
    print(json.dumps({name: value for name, value in found.items() if name != "provenance"}, indent=1))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
