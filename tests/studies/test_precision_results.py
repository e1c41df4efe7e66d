"""experiments/precisions/results.py keeps the revision that trained a run, and not that of the day it is read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = Path(__file__).parents[2] / "experiments" / "precisions" / "results.py"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("precision_results", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_run_begins_with_is_told_from_the_fields_of_its_experiment(results):
    begins, fields = results.beginning(
        "--init-from runs/a --init-only tokens 'blocks_*' --optimizer.learning-rate 1e-4"
    )
    assert begins == {"init_from": "runs/a", "init_only": ("tokens", "blocks_*")}
    assert fields == ["--optimizer.learning-rate", "1e-4"]
    assert results.beginning("") == ({"init_from": None, "init_only": ()}, [])


def test_a_row_says_which_revision_trained_each_run(results, tmp_path, monkeypatch):
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
    row = results.row("digits_mlp", ("float32",), (3, 4), "--init-from runs/a", tmp_path)
    assert row["git"] == {"float32": [{"revision": f"of seed {seed}", "dirty": True} for seed in (3, 4)]}
    assert row["test"] == {"float32": [0.9, 0.9]}


def test_precisions_that_are_not_trained_again_stay_if_all_else_is_equal(results):
    def row(reached, **others):
        each = {name: {precision: [name, values] for precision, values in reached.items()} for name in parts}
        return {"config": "a", "options": "", "seeds": [0, 1], "versions": {"jax": "1"}, **others, **each}

    parts = results.OF_A_PRECISION
    old, new = row({"float32": 1, "float16": 2}), row({"float16": 3, "bfloat16": 4})
    assert results.merged(old, new) == row({"float32": 1, "float16": 3, "bfloat16": 4})
    for other in ({"seeds": [0, 1, 2]}, {"versions": {"jax": "2"}}):
        assert results.merged(old, row({"float16": 3}, **other)) == row({"float16": 3}, **other)
