"""experiments/precisions keeps what runs reached: results.py of many runs, curve.py of one as it went."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxmp.errors import InputError
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


@pytest.fixture
def made_up(results, monkeypatch):
    """`made_up(train)` lets `train(cell, **more)` stand for training, and a run's seed for its git revision."""

    def use(train):
        def train_cell(cell, workdir, name, origin, log, **begins):
            summary = {"test": {"accuracy": 0.9}, "skipped_steps": 0, "wall_seconds": 1.0}
            run = {"run": str(cell.seed), "failed": None, "summary": summary, "metrics": []}
            changed = train(cell, origin=origin, **begins)
            return None if changed is None else run | changed

        git = {"patch": "", "untracked": ["x"]}
        monkeypatch.setattr(results, "train_cell", train_cell)
        monkeypatch.setattr(
            results, "Run", lambda path: SimpleNamespace(config={"git": {"revision": f"of seed {path}", **git}})
        )

    return use


def test_a_row_says_which_revision_trained_each_run_and_what_can_make_it_again(results, made_up, tmp_path):
    origins = []
    made_up(lambda cell, origin, **begins: origins.append(origin) or {})
    row = results.row("digits_mlp", ("float32", "mixed_float16"), (3, 4), "--optimizer.learning-rate 0.01", tmp_path)
    assert row["git"]["float32"] == [{"revision": f"of seed {seed}", "dirty": True} for seed in (3, 4)]
    assert row["test"] == {"float32": [0.9, 0.9], "mixed_float16": [0.9, 0.9]}
    assert {*origins[0]} == {"source", "file", "imports", "overrides"}
    other = results.row("digits_mlp", ("mixed_float16",), (3, 4), "--optimizer.learning-rate 0.01", tmp_path)
    assert other["identity"] == row["identity"]
    assert results.row("digits_mlp", ("float32",), (3,), "", tmp_path)["identity"] != row["identity"]


def test_a_run_that_failed_has_no_metric_and_a_signal_ends_it_all(results, made_up, tmp_path):
    lines = [{"step": s, "split": "train", "skipped_steps": s, "wall_seconds": 2.06 * s} for s in (1, 2)]
    failed = {"failed": "the loss is NaN", "summary": {}, "metrics": lines}
    made_up(lambda cell, **more: failed if cell.seed else {})
    row = results.row("digits_mlp", ("float32",), (0, 1), "", tmp_path)
    assert row["test"] == {"float32": [0.9, None]}
    assert (row["skipped_steps"], row["wall_seconds"]) == ({"float32": [0, 2]}, {"float32": [1.0, 4.1]})

    made_up(lambda cell, **more: None)
    with pytest.raises(SystemExit, match="75"):
        results.row("digits_mlp", ("float32",), (0,), "", tmp_path)


def test_precisions_that_are_not_trained_again_stay_if_all_else_is_equal(results):
    def row(reached, **others):
        each = {name: {precision: [name, values] for precision, values in reached.items()} for name in parts}
        return (
            {"config": "a", "options": "", "identity": "x", "seeds": [0, 1], "versions": {"jax": "1"}} | others | each
        )

    parts = results.OF_A_PRECISION
    old, new = row({"float32": 1, "float16": 2}), row({"float16": 3, "bfloat16": 4})
    assert results.merged(old, new) == row({"float32": 1, "float16": 3, "bfloat16": 4})
    for other in ({"seeds": [0, 1, 2]}, {"versions": {"jax": "2"}}, {"identity": "y"}):
        assert results.merged(old, row({"float16": 3}, **other)) == row({"float16": 3}, **other)
    del old["identity"]  # of before there was one
    assert results.merged(old, new) == new


def test_rows_that_another_process_wrote_meanwhile_are_kept_and_none_is_lost_in_writing(results, tmp_path, monkeypatch):
    output = tmp_path / "out" / "results.json"

    def row(config, *how):
        if config == "b":  # trained for hours, in which another process writes
            results.main(("a",), output=output)
        each = {name: {"float32": [1]} for name in results.OF_A_PRECISION}
        return {"config": config, "options": "", "metric": "accuracy", "seeds": [0], **each}

    monkeypatch.setattr(results, "row", row)
    results.main(("b", "c"), output=output)
    assert [row["config"] for row in json.loads(output.read_text())] == ["a", "b", "c"]
    assert list(output.parent.iterdir()) == [output]  # an untracked file would make the next revision dirty

    before = output.read_text()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        results.main(("c",), output=output)
    assert output.read_text() == before


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
