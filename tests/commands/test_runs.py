"""`jaxmp runs`: the table."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmp.cli import main
from jaxmp.commands import runs
from jaxmp.runs import listing

LONG = "model.features='512 512 512' optimizer.learning-rate=3e-4 precision=head=float32;mixed_float16"
RUN = listing.Listed(
    Path("w/net/a-s0"), "net", "", 0, "finished", 1000, 1000, "accuracy", "max", 0.5, 3, 59.0
)  # fmt: skip
RUNS = [
    RUN,
    dataclasses.replace(RUN, path=Path("w/net/b-s0"), differs=LONG, best=0.75, age=3 * 3600.0, step=20),
    dataclasses.replace(RUN, path=Path("w/cnn/c-s1"), config="cnn", state="failed", best=None, note="NaN", age=1e6),
]


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setattr(listing, "list_runs", lambda folder, now: RUNS)


def lines(capsys, *argv):
    assert main(["runs", "w", *argv]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["net/a-s0", "net/b-s0", "cnn/c-s1"]),
        (["--sort", "best"], ["cnn/c-s1", "net/b-s0", "net/a-s0"]),
        (["--sort", "config"], ["cnn/c-s1", "net/a-s0", "net/b-s0"]),
        (["--sort", "step"], ["net/a-s0", "cnn/c-s1", "net/b-s0"]),
        (["--config", "n*"], ["net/a-s0", "net/b-s0"]),
        (["--state", "failed"], ["cnn/c-s1"]),
        (["--differs", "precision=*float16"], ["net/b-s0"]),
        (["--differs", "nothing"], ["net/a-s0", "cnn/c-s1"]),
    ],
)
def test_runs_are_sorted_and_filtered(listed, capsys, argv, expected):
    assert lines(capsys, *argv) == expected


def test_the_table_is_whole_where_it_is_piped_and_why_a_run_failed_is_said(listed, capsys):
    assert main(["runs", "w"]) == 0
    out, err = capsys.readouterr()
    assert LONG in out and "best accuracy" in out and " 0.500 " in out and "1,000/1,000" in out
    assert [line.rsplit("  ", 1)[1].strip() for line in out.splitlines()[1:]] == ["59 s", "3 h", "11 d"]
    assert err == "w/cnn/c-s1: NaN\n"


def test_seeds_tell_runs_of_one_config_apart_and_none_is_a_bare_hash():
    other = dataclasses.replace(RUN, path=Path("w/net/a-s3"), seed=3)
    assert [runs.differs_in(run, [*RUNS, other]) for run in (other, RUNS[0], RUNS[2])] == [
        "seed=3",
        "seed=0",
        "(nothing)",
    ]
    assert runs.differs_in(RUNS[1], [*RUNS, other]) == f"{LONG} seed=0"


def test_listing_runs_imports_no_jax():
    code = "import sys; from jaxmp.runs import listing; print({'jax', 'flax', 'numpy', 'rich'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout == "set()\n", result.stderr


@pytest.mark.parametrize("columns", [80, 120, 400])
def test_a_terminal_gets_no_line_that_it_would_wrap(listed, capsys, monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda **_: os.terminal_size((columns, 24)))
    assert main(["runs", "w"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert (LONG in out) == (columns == 400)
    assert "512" in out and "float16" in out, "names and the middle are what is cut"


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (60, "precision=mixed_float16 optimizer.learning-rate=3e-4"),
        (45, "precision=mixed_float16 learning-rate=3e-4"),
        (25, "mixed_float16 3e-4"),
        (12, "mixed_… 3e-4"),
    ],
)
def test_names_are_cut_before_values(length, expected):
    assert runs._shortened("precision=mixed_float16 optimizer.learning-rate=3e-4", length) == expected


def test_a_folder_without_such_a_run_is_bad_input(listed, capsys):
    assert main(["runs", "w", "--config", "nothing"]) == 2
    assert "no such run, and 3 others" in capsys.readouterr().err
