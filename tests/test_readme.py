from __future__ import annotations

import re
from pathlib import Path

import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.runs.run import Run

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_file_of_ones_own_trains(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(\"\"\".*?)```", README, flags=re.DOTALL)
    (command,) = re.findall(r"uv run jaxmp (train wine\.py.*)", README)
    (tmp_path / "wine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--loop.eval-every", "120"]) == 0
    assert Run(tmp_path / "runs").summary["test"]["accuracy"] > 0.9


def test_the_readme_has_every_config(capsys):
    assert main(["configs"]) == 0
    configs = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    table = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", README.partition("## Reproduce")[2], flags=re.MULTILINE)
    assert set(table) == configs


def test_the_readme_has_every_public_name():
    section = README.partition("## All names")[2].partition("##")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert set(jaxmp.__all__) <= named
    assert all(hasattr(jaxmp, name) for name in named)
