"""experiments/precisions keeps what runs reached: results.py of many runs, curve.py of one as it went."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxmp.training.metrics import MetricSpec

FOLDER = Path(__file__).parents[2] / "experiments" / "precisions"


def program(name):
    spec = importlib.util.spec_from_file_location(f"precision_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    return program("results")


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


def test_a_curve_has_each_epoch_of_a_run_and_the_published_value_in_percent(tmp_path, monkeypatch):
    curve = program("curve")
    lines = [{"split": "train", "epoch": 0.5, "accuracy": 0.25, "step": 5}]
    lines += [
        {"split": "validation", "epoch": float(e), "accuracy": a, "step": 10 * e} for e, a in ((1, 0.5), (2, None))
    ]
    config = {"name": "net", "overrides": ["--loop.epochs", "2"], "git": {"revision": "r", "patch": "x"}}
    config |= {"versions": {}, "devices": ["cpu"], "platform": "cpu"}
    run = SimpleNamespace(
        path=tmp_path / "net" / "abc-s0",
        config=config,
        summary={"test": {"accuracy": 0.75}, "wall_seconds": 1.2},
        metrics=lines,
        metric_specs={"accuracy": MetricSpec("max", "%")},
    )
    monkeypatch.setattr(curve, "Run", lambda path: run)
    curve.main("runs/net", tmp_path / "out", published=0.9125, source="a paper")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["validation"] == {"epoch": [1.0, 2.0], "accuracy": [0.5, None]} and found["test"] == 0.75
    assert found["trained_by"] == "jaxmp train net --loop.epochs 2" and found["git"] == {"revision": "r", "dirty": True}
    drawn = (tmp_path / "out.svg").read_text()
    for points in ("50 nan", "25", "91.25 91.25"):
        assert f'data-y="{points}"' in drawn, points
    assert "75.00 %; published: 91.25 % (a paper)" in drawn
