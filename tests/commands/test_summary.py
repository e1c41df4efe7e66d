"""The numbers of a run, one below the other."""

from __future__ import annotations

from jaxmp.commands.summary import print_summary


def test_values_stand_in_one_column_however_long_their_names_are(capsys):
    best = {"step": 100, "accuracy": 0.975, "test": {"accuracy": 0.9739776951}}
    print_summary({"steps": 120, "test": {"accuracy": 0.97}, "best": best, "skipped": [1], "run": "runs/a"})
    assert capsys.readouterr().out.splitlines() == [
        "steps                       120",
        "test accuracy               0.97",
        "best step                   100",
        "best validation accuracy    0.975",
        "at best step, test accuracy 0.973978",
        "run                         runs/a",
    ]
