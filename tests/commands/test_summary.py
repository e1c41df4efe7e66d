"""The numbers of a run, one below the other."""

from __future__ import annotations

from jaxmp.commands.summary import print_summary


def test_values_stand_in_one_column_however_long_their_names_are(capsys):
    print_summary({"steps": 120, "best": {"test": {"accuracy": 0.9739776951}}, "skipped": [1], "run": "runs/a"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["steps              120", "best test accuracy 0.973978", "run                runs/a"]
