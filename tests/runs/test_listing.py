"""The list of runs, from their files alone."""

from __future__ import annotations

import fcntl
import json
import os

import pytest

from jaxmp import InputError
from jaxmp.runs.listing import list_runs

NOW = 1_000_000.0


def make(folder, name="net", *, overrides=(), experiment=None, lines=(), summary=None, **more):
    """A run's files."""
    folder.mkdir(parents=True)
    config = {
        "name": name, "hash": folder.name, "seed": 3, "overrides": list(overrides), "versions": {}, "steps": 20,
        "monitor": "error", "mode": "min", "metrics": {"error": {"best": "min", "unit": "", "digits": 1}},
        "experiment": {"seed": 3, **(experiment or {})},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({"steps": 20, "test": {}, "policy": [], **summary}))
    for file in folder.iterdir():
        os.utime(file, (NOW - 90, NOW - 90))
    return folder


def evaluated(step, error):
    return {"step": step, "split": "validation", "error": error}


def test_a_run_is_listed_with_its_best_value_step_and_age(tmp_path):
    lines = [{"step": 5, "split": "train", "error": 0.0}, evaluated(5, 2.0), evaluated(10, 1.5), evaluated(15, None)]
    make(tmp_path / "net" / "a", lines=lines)
    (run,) = list_runs(tmp_path, now=NOW)
    assert (run.path, run.config, run.seed) == (tmp_path / "net" / "a", "net", 3)
    assert (run.state, run.step, run.steps) == ("unfinished", 15, 20)
    assert (run.metric, run.mode, run.best, run.digits) == ("error", "min", 1.5, 1), "the least of the validation split"
    assert run.age == 90


def test_the_state_is_told_by_the_files_and_the_lock(tmp_path):
    make(tmp_path / "finished", summary={"best": {"step": 10, "error": 1.25}}, lines=[evaluated(20, 9.0)])
    (make(tmp_path / "failed") / "failed.json").write_text(json.dumps({"step": 3, "reason": "the loss is NaN"}))
    (make(tmp_path / "broken") / "summary.json").write_text("{")
    (make(tmp_path / "alien") / "config.json").write_text("{}")
    make(tmp_path / "unfinished")
    with (make(tmp_path / "running") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {run.path.name: run for run in list_runs(tmp_path, now=NOW)}
    states = {name: run.state for name, run in found.items()}
    assert states == {name: name for name in ("failed", "finished", "running", "unfinished")} | {
        "alien": "unreadable", "broken": "unreadable"
    }  # fmt: skip
    assert found["finished"].best == 1.25, "of the summary"
    assert found["failed"].note == "the loss is NaN"
    assert "lacks" in found["alien"].note and "delete this file alone" in found["broken"].note
    assert list_runs(tmp_path / "running", now=NOW)[0].state == "unfinished", "the lock went with the process"


def test_what_differs_is_told_by_the_arguments_then_by_what_no_argument_tells(tmp_path):
    model = {"class": "Net", "width": 8}
    wide = {"class": "Net", "width": 9}
    arguments = ("--precision", "float32", "--seed", "3", "--model.features", "4", "5", "--loop.wandb")
    make(tmp_path / "a", overrides=arguments, experiment={"model": model})
    make(tmp_path / "b", experiment={"model": model})
    make(tmp_path / "c", experiment={"model": wide}, parent="/runs/net/b")
    make(tmp_path / "d", "other", experiment={"model": wide})
    differs = {run.path.name: run.differs for run in list_runs(tmp_path, now=NOW)}
    assert differs == {
        "a": "precision=float32 model.features='4 5' loop.wandb",
        "b": "model.width=8",
        "c": "model.width=9 after net/b",
        "d": "",
    }


def test_nothing_below_a_run_and_nothing_half_deleted_is_a_run(tmp_path):
    make(tmp_path / "deep" / "er" / "run")
    make(tmp_path / "deep" / "er" / "run" / "checkpoints" / "copy")
    make(tmp_path / "old.deleted")
    assert [run.path.name for run in list_runs(tmp_path, now=NOW)] == ["run"]
    assert [run.path.name for run in list_runs(tmp_path / "deep" / "er" / "run", now=NOW)] == ["run"]


def test_a_config_of_another_program_hides_no_run_below_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    make(tmp_path / "runs" / "net" / "a")
    states = {run.path.name: run.state for run in list_runs(tmp_path, now=NOW)}
    assert states == {tmp_path.name: "unreadable", "a": "unfinished"}


def test_what_was_measured_before_the_best_began_anew_is_not_the_best(tmp_path):
    make(tmp_path / "a", lines=[evaluated(5, 1.0), evaluated(10, 2.0)], best_since=5)
    assert list_runs(tmp_path, now=NOW)[0].best == 2.0


@pytest.mark.parametrize(
    ("name", "expected"), [("nothing", "no such folder"), ("file", "this is a file"), ("", "path")]
)
def test_a_folder_that_is_none_is_bad_input(tmp_path, name, expected):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=expected):
        list_runs(tmp_path / name if name else "", now=NOW)
