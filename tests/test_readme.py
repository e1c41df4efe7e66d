from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.runs.run import Run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "experiments" / "README.md").read_text()


def snippets(text):
    """The Python blocks and the commands of `text`, in order.

    A command, indented or in one pair of backticks, is a pair: its arguments after `jaxmp`, and the text that is shown
    as its output.
    """
    found = []
    for match in re.finditer(r"```python\n(.*?)```|^    ([^\n]*)$|`uv run\s+jaxmp ([^`]*)`", text, re.M | re.S):
        python, line, inline = (match[i] for i in (1, 2, 3))
        if python:
            found.append(python)
        elif inline:
            found.append((" ".join(inline.split()), ""))
        elif command := re.match(r"(?:\$ )?uv run jaxmp (.*)", line):
            found.append((command[1], ""))
        elif found and isinstance(found[-1], tuple):
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{line}")
    return found


def without_numbers(text):
    """`text` in one line, each number replaced by #: the digits of a loss differ between machines."""
    return re.sub(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", "#", " ".join(text.split()))


def run(command):
    """The exit code of a command line, and what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(shlex.split(command, comments=True))
    return code, output.getvalue().replace(f"{ROOT}/", "")


@pytest.mark.slow
def test_every_command_and_snippet_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands, namespaces = [], []
    for snippet in snippets(README):
        if isinstance(snippet, str):
            if snippet.startswith(">>>"):  # pytest runs the doctests of README.md
                continue
            if snippet.startswith('"""'):
                (tmp_path / "wine.py").write_text(snippet)
            namespaces.append({"__name__": "builtins"})
            exec(compile(snippet, "README.md", "exec", dont_inherit=True), namespaces[-1])
            continue
        command, shown = snippet
        commands.append(command)
        code, printed = run(command)
        assert code == (1 if "--scaler.kind static" in command else 0), f"{command}\n{printed}"
        for line in filter(None, map(without_numbers, shown.partition("[...]")[0].splitlines())):
            assert line in without_numbers(printed), f"{command} printed\n{printed}"
    sys.modules.pop("wine", None)
    assert [command.split()[0] for command in commands] == [
        *("train", "doctor", "train", "train", "compare", "train", "train", "train", "blame", "audit", "find-policy"),
        *("train", "what-if"),
    ]
    assert Run(tmp_path / "runs" / "wine").summary["test"]["accuracy"] > 0.9
    assert namespaces[-1]["test_policy"].broken == []


@pytest.mark.slow
def test_the_task_of_ones_own_learns(tmp_path):
    import numpy as np
    from flax import linen as nn

    namespace = {"__name__": "builtins"}  # dataclasses looks for the module of a class
    (source,) = (snippet for snippet in snippets(GUIDE) if isinstance(snippet, str) and "class Laplace" in snippet)
    exec(compile(source, "experiments/README.md", "exec", dont_inherit=True), namespace)

    def load(split):
        x = np.random.default_rng(len(split)).normal(size=(128, 3)).astype(np.float32)
        return {"x": x, "target": x @ np.float32([1, -2, 3])}

    experiment = jaxmp.Experiment(
        model=nn.Dense(2),
        data=jaxmp.Arrays(load, batch_size=16),
        task=namespace["Laplace"](),
        optimizer=jaxmp.Adam(3e-2),
        loop=jaxmp.Loop(epochs=30),
    )
    summary = jaxmp.fit(experiment, workdir=tmp_path).summary
    assert summary["test"]["absolute_error"] < 0.2


def test_the_page_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 127 and not line.lstrip().startswith(("<", "|"))]


def test_links_lead_to_files_and_headings():
    for page in ROOT.glob("**/README.md"):
        if any(part.startswith(".") for part in page.relative_to(ROOT).parts):
            continue
        for target in re.findall(r"\]\(([^)#:]*(?:#[^)]*)?)\)", page.read_text()):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), f"{page}: {target}"
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if anchor else []
            anchors = {re.sub(r"\]\([^)]*\)|[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{page}: {target}"


def test_configs_have_their_page():
    code, printed = run("configs --markdown")
    assert code == 0
    assert (ROOT / "configs" / "README.md").read_text() == printed


def test_conformance_has_its_table():
    folder = ROOT / "experiments" / "conformance"
    spec = importlib.util.spec_from_file_location("summary", folder / "summary.py")
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    readme = (folder / "README.md").read_text()
    rows = json.loads((folder / "conformance.json").read_text())["rows"]
    assert summary.with_table(readme, rows) == readme
    assert "| jaxmp, DynamicScaler |" in readme


def test_help_names_every_public_name():
    named = set(re.findall(r"\w+", jaxmp.__doc__))
    assert set(jaxmp.__all__) <= named
