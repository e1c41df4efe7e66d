"""A study of 40 trials of `digits_mlp`: how long it takes, and whether its best beats the default on fresh seeds.

    python experiments/benchmarks/run.py tune_digits

The study chooses by the validation loss of seed 0. The best and the default are then trained on five seeds that the
study did not see, and compared pair by pair, on the validation and on the test split.

A second study, of numbers alone and by one worker, says what a study costs beside its training: after each of its
trials, the same run is trained again by `fit`, as `jaxmp train` does, in another folder of the same process, which has
compiled the program by then. Of each trial but the first, three times are added up: that of the trial, from the end of
the one before; that of the second `fit`; and what the trial's run says its training took, `wall_seconds` in its
summary: from the first dispatch, compiled or loaded, to the end, with its evaluations and checkpoints.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.fit import fit
from jaxmp.runs.provenance import provenance
from jaxmp.runs.run import Run
from jaxmp.studies.paired import paired
from jaxmp.studies.tune import tune
from jaxmp.studies.tune_study import StudyFolder, study_to_json

NUMBERS = ("optimizer.learning-rate=log:1e-4:1e-1", "optimizer.weight-decay=log:1e-6:1e-2")
SPACE = (*NUMBERS, "model.features=256,512,1024", "model.dropout=0,0.2,0.4,0.6")
FRESH = (1001, 1002, 1003, 1004, 1005)


def cost(config: str, trials: int) -> dict[str, Any]:
    """Seconds of the trials of a study beside those of their training, the first trial left out."""
    source = ConfigFile.find(config)
    began, seconds, again, training = time.perf_counter(), [], [], []
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"

        def trained(message: str) -> None:
            nonlocal began
            ended = time.perf_counter()
            (run,) = set(study.glob(f"{config}/*-s*")) - seen
            seen.add(run)
            words = Run(run).config["overrides"]
            how: dict[str, Any] = {"workdir": Path(folder) / "alone", "progress": "none", "log": lambda message: None}
            fit(source.experiment(words), name=config, origin=source.origin(words), **how)
            seconds.append(ended - began)
            again.append(time.perf_counter() - ended)
            training.append(Run(run).summary["wall_seconds"])
            began = time.perf_counter()

        seen: set[Path] = set()
        tune(source, NUMBERS, trials=trials, metric="loss", workdir=str(study), log=trained)
    sums = {"trials": sum(seconds[1:]), "fit": sum(again[1:]), "training": sum(training[1:])}
    return {
        "space": NUMBERS,
        "counted_trials": len(seconds) - 1,
        "first_trial_seconds": seconds[0],
        "seconds": sums,
        "trials_to_fit": sums["trials"] / sums["fit"],
        "trials_to_training": sums["trials"] / sums["training"],
        "load": os.getloadavg(),
    }


def main(
    config: str = "digits_mlp",
    trials: int = 40,
    jobs: int = 2,
    cost_trials: int = 11,
    workdir: str = "runs",
    output: Path | None = None,
) -> None:
    """Runs the study, then the best and the default on fresh seeds, then what a study costs, and prints what came out.

    Args:
      config: what is tuned.
      trials: number of trials.
      jobs: number of workers.
      cost_trials: number of trials of the study whose cost is measured.
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
    found["cost"] = cost(config, cost_trials)
    origin = provenance(patch=False)
    found |= {"provenance": {name: value for name, value in origin.items() if name != "command"}}
    print(json.dumps({name: value for name, value in found.items() if name != "provenance"}, indent=1))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
