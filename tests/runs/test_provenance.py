"""What a result says of the tree that made it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxmp.runs.provenance import hardware, provenance, without_patch

ATTRIBUTES = Path(__file__).parents[2] / ".gitattributes"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with the attributes of this one, the working directory."""
    if not ATTRIBUTES.is_file():
        pytest.skip("this is no clone: it has no .gitattributes")
    shutil.copy(ATTRIBUTES, tmp_path)
    for name in ("experiments/a/results.json", "experiments/a/paper.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b commit -m a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_dirty():
    """Whether a result is, and a run that is read later."""
    git = provenance()["git"]
    (dirty,) = {of["dirty"] for of in (provenance(patch=False)["git"], without_patch(git), git)}
    return dirty


def test_results_that_a_tree_got_make_it_not_dirty_and_all_other_changes_do(tree, monkeypatch):
    assert not is_dirty()
    new = ("experiments/a/plot.svg", "experiments/b/c/digits.json", "experiments/b/README.md", "configs/results.json")
    for name in ("experiments/a/results.json", "README.md", *new):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("2\n")
    monkeypatch.chdir(tree / "experiments")
    assert not is_dirty() and "results.json" in provenance()["git"]["patch"]
    for name in ("experiments/a/paper.py", "configs/mine.py", "data.json"):
        before = (tree / name).read_text() if (tree / name).is_file() else None
        (tree / name).write_text("2\n")
        assert is_dirty(), name
        (tree / name).unlink() if before is None else (tree / name).write_text(before)
    assert not is_dirty()


def test_a_run_of_an_earlier_version_is_dirty_with_any_change():
    for patch, untracked, dirty in (("", [], False), ("diff", [], True), ("", ["x.json"], True)):
        git = {"revision": "a", "patch": patch, "untracked": untracked}
        assert without_patch(git) == {"revision": "a", "dirty": dirty}
    assert without_patch(None) is None


def test_a_result_names_its_hardware():
    host, found = {"processor": "AMD EPYC", "cores": 1}, provenance(patch=False)
    assert found["host"]["processor"] and found["host"]["cores"] == len(os.sched_getaffinity(0))
    assert f"{found['host']['processor']}, {found['host']['cores']} core" in hardware(found)
    for origin, words in (
        ({"devices": ["cpu"] * 8, "platform": "cpu", "host": host}, "8 x cpu (AMD EPYC, 1 core)"),
        ({"devices": ["H200"], "platform": "gpu", "host": host | {"cores": 16}}, "1 x H200 (gpu; AMD EPYC, 16 cores)"),
        ({"devices": ["cpu"], "platform": "cpu"}, "1 x cpu"),
        ({"devices": ["H200", "H100"]}, "1 x H200, 1 x H100 (unknown platform)"),
    ):
        assert hardware(origin) == words
