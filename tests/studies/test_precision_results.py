"""experiments/precisions/results.py keeps the revision that trained a run, and not that of the day it is read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

PROGRAM = Path(__file__).parents[2] / "experiments" / "precisions" / "results.py"


def test_a_row_says_which_revision_trained_each_run(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("precision_results", PROGRAM)
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)

    def fit(experiment, **options):  # what is finished is read, and how it was made is in its folder
        summary = {"test": {"accuracy": 0.9}, "skipped_steps": 0, "wall_seconds": 1.0}
        return SimpleNamespace(path=experiment.seed, summary=summary, stopped=False)

    def run(seed):
        return SimpleNamespace(config={"git": {"revision": f"of seed {seed}", "patch": "", "untracked": ["x"]}})

    monkeypatch.setattr(results, "fit", fit)
    monkeypatch.setattr(results, "Run", run, raising=False)
    monkeypatch.setattr(
        results, "Trainer", lambda experiment: SimpleNamespace(monitor=SimpleNamespace(name="accuracy"))
    )
    row = results.row("digits_mlp", ("float32",), (3, 4), "", tmp_path)
    assert row["git"] == {"float32": [{"revision": f"of seed {seed}", "dirty": True} for seed in (3, 4)]}
    assert row["test"] == {"float32": [0.9, 0.9]}
