"""A digits_mlp of a tenth of the size, with a teacher and without one, by paired seeds.

    jaxmp train digits_mlp
    python experiments/compression/distilled.py runs/digits_mlp --output experiments/compression/distilled.json

Source: G. Hinton, O. Vinyals and J. Dean, Distilling the Knowledge in a Neural Network, 2015,
https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jaxmp
from jaxmp.cli import script
from jaxmp.models.mlp import MLP
from jaxmp.runs.provenance import provenance
from jaxmp.runs.teacher import Teacher
from jaxmp.studies.paired import paired
from jaxmp.tasks.distillation import Distillation
from jaxmp.text_table import without_nan

HIDDEN = 50
"""units of the student: 3,760 parameters beside the teacher's 38,410"""


def student(teacher: jaxmp.Run, *, share: float, seed: int) -> jaxmp.Experiment:
    """The teacher's experiment with a smaller model; `share` is the teacher's weight in the loss, 0 for none."""
    experiment = teacher.experiment
    return dataclasses.replace(
        experiment,
        model=MLP(features=(HIDDEN,), classes=10),
        task=Distillation(teacher=Teacher(str(teacher.path)), temperature=4.0, teacher_weight=share),
        seed=seed,
    )


def main() -> None:
    """Trains two students for each seed, and writes their accuracies and the paired difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="run folder of digits_mlp")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", default="distilled.json")
    options = parser.parse_args()
    teacher = jaxmp.Run(options.teacher)
    found: dict[str, list[float]] = {"with the teacher": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name, share in (("with the teacher", 0.9), ("without", 0.0)):
                experiment = student(teacher, share=share, seed=seed)
                jaxmp.fit(experiment, workdir=folder, name=f"{share:g}", progress="none", log=lambda text: None)
                run = jaxmp.Run(Path(folder) / f"{share:g}" / f"{experiment.hash}-s{seed}", experiment)
                found[name].append(100 * run.summary["best"]["test"]["accuracy"])
                parameters = run.trainer.parameter_counts["parameters"]
                print(f"seed {seed} {name:<18} {found[name][-1]:.2f} %", flush=True)
    difference = paired([a - b for a, b in zip(*found.values(), strict=True)])
    print(f"difference {difference.mean:+.2f} points, 95 % interval {difference.low:+.2f} to {difference.high:+.2f}")
    result = {
        "accuracy": found,
        "difference": difference._asdict(),
        "parameters": {"teacher": teacher.trainer.parameter_counts["parameters"], "student": parameters},
        "teacher": 100 * teacher.summary["best"]["test"]["accuracy"],
        "provenance": {name: value for name, value in provenance(patch=False).items() if name != "command"},
    }
    Path(options.output).write_text(json.dumps(without_nan(result), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
