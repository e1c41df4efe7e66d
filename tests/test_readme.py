from __future__ import annotations

import collections
import contextlib
import functools
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
from jaxmp.commands import configs
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


SHORTER = {
    "train digits_cnn": "--loop.epochs 2",
    "compare digits_cnn": "--loop.epochs 2",
    "find-policy digits_cnn": "--batches 2 --warmup-steps 20",
}
"""what makes a command short that nothing below looks at but its exit code, and further commands need no result of"""


def shortened(command):
    for begins, options in SHORTER.items():
        if command.startswith(begins):
            return f"{command} {options}".replace("--seeds 0 1 2 3 4", "--seeds 0 1")
    return command


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
        code, printed = run(shortened(command))
        assert code == (1 if "--scaler.kind static" in command else 0), f"{command}\n{printed}"
        if command == "train digits_mlp":
            assert Run("runs").summary["test"]["accuracy"] >= 0.97
        for line in filter(None, map(without_numbers, shown.partition("[...]")[0].splitlines())):
            assert line in without_numbers(printed), f"{command} printed\n{printed}"
        for place in re.findall(r"\S+\.py:\d+", shown):
            assert place in printed, f"{command} shows {place}, and printed\n{printed}"
    sys.modules.pop("wine", None)
    assert [command.split()[0] for command in commands] == [
        *("train", "doctor", "train", "train", "compare", "train", "train", "blame", "audit", "find-policy"),
        *("train", "what-if", "tune", "export"),
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


LIBRARIES = ["Keras 3", "Lightning 2", "HF Trainer", "kauldron", "jaxmp"]


def table_rows(text, *, first):
    """The rows, without their first two lines, of the tables whose header begins with `first`; a list of cells each."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[1:] == LIBRARIES:
            inside = cells[0].startswith(first) and bool(first) == bool(cells[0])
        elif not cells:
            inside = False
        elif inside and set(line) - set("|-"):
            rows.append(cells)
    return rows


@functools.cache
def functions(file):
    """The names of the functions of a Python file; none if there is no such file.

    By their text: to parse the 45 files that are named takes a second of the quick suite.
    """
    return set(re.findall(r"^def (\w+)\(", file.read_text(), re.M)) if file.exists() else set()


def wrong_comforts(text):
    """What is wrong with the table of comforts, a sentence each."""
    rows, wrong = table_rows(text, first=""), []
    for name, *others, own in rows:
        if not all(re.fullmatch(r"Y|(partly|no)( \([1-9]\d*\))?", cell) for cell in others):
            wrong.append(f"{name}: expected Y, partly or no, with a number of lines: {others}")
        shown = re.fullmatch(r"Y `(tests/[\w/]+\.py)::(test_\w+)`", own)
        if not shown:
            if not re.fullmatch(r"(partly|no)( \([1-9]\d*\))?: .{20,}", own):
                wrong.append(f"{name}: expected Y and its test, or partly or no and the reason: {own}")
            continue
        if shown[2] not in functions(ROOT / shown[1]):
            wrong.append(f"{name}: there is no {shown[1]}::{shown[2]}")
    counts = [collections.Counter(row[i].split()[0].strip(":") for row in rows) for i in range(1, 6)]
    for answer, *stated in table_rows(text, first="of "):
        if stated != [str(count[answer]) for count in counts]:
            wrong.append(f"{answer}: expected {[count[answer] for count in counts]}, the table above says {stated}")
    return wrong


def test_comforts_are_shown_by_tests_that_exist():
    assert wrong_comforts(GUIDE) == []
    assert len(table_rows(GUIDE, first="")) >= 72 and len(table_rows(GUIDE, first="of ")) == 3
    assert f"| of {len(table_rows(GUIDE, first=''))} |" in GUIDE


@pytest.mark.parametrize(
    ("there", "instead", "message"),
    [
        ("::test_a_schedule_is_its_formula", "::test_a_schedule_is_its_formulae", "there is no"),
        ("tests/training/test_optimizers.py::", "tests/training/optimizers.py::", "there is no"),
        (" `tests/training/test_optimizers.py::test_a_schedule_is_its_formula`", "", "Y and its test"),
        ("Y `tests/training/test_optimizers.py::test_a_schedule_is_its_formula`", "no (2)", "the reason"),
        ("| Gradient clipping | Y |", "| Gradient clipping | yes |", "Y, partly or no"),
        ("| Gradient clipping | Y |", "| Gradient clipping | no (3) |", "the table above says"),
    ],
)
def test_what_is_wrong_with_the_table_of_comforts_is_found(there, instead, message):
    assert GUIDE.count(there) == 1 or there.startswith("tests/")
    assert any(message in sentence for sentence in wrong_comforts(GUIDE.replace(there, instead)))


def test_configs_have_their_page():
    code, printed = run("configs --markdown")
    assert code == 0
    assert (ROOT / "configs" / "README.md").read_text() == printed
    alternative = "`; at epsilon 8: `jaxmp train mnist_dpsgd --optimizer.noise-multiplier 0.69`"
    assert f"- Command: `jaxmp data prepare mnist && jaxmp train mnist_dpsgd{alternative}" in printed


def test_the_page_of_configs_has_a_table_of_what_they_reached():
    row = {"config": "a", "options": "", "metric": "loss", "seeds": [0, 1]}
    test = {"float32": [1.0, 3.0], "mixed_float16": [1.0, None]}
    text = configs.page(
        {"a": "A.\n\nMore."}, [row | {"test": test}, row | {"options": "--seed 5", "test": {"float32": [1.0]}}]
    )
    assert "| config | metric | seeds | `float32` | `mixed_float16` |" in text
    assert "| `a` | loss | 2 | 2.0000 ± 1.4142 | 1 of 2 diverged |" in text
    assert "| `a` `--seed 5` | loss | 2 | 1.0000 |  |" in text


def summary_of(folder):
    """The module summary.py of a folder, which writes the tables of its page."""
    spec = importlib.util.spec_from_file_location("summary", folder / "summary.py")
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    return summary


def test_recipes_have_their_tables():
    folder = ROOT / "experiments" / "recipes"
    summary, readme = summary_of(folder), (folder / "README.md").read_text()
    assert summary.with_tables(readme) == readme
    diverged = {"mean": None, "low": None, "high": None}
    assert summary.difference(diverged) == summary.difference(None) == ""


def test_conformance_has_its_table():
    folder = ROOT / "experiments" / "conformance"
    summary, readme = summary_of(folder), (folder / "README.md").read_text()
    rows = json.loads((folder / "conformance.json").read_text())["rows"]
    assert summary.with_table(readme, rows) == readme
    assert "| jaxmp, DynamicScaler |" in readme


def test_the_traps_and_defects_that_code_names_are_listed():
    listed = set(re.findall(r"^\| ([TB]\d+) \|", (ROOT / "experiments/conformance/traps.md").read_text(), re.M))
    code = [path.read_text() for folder in ("jaxmp", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = {name for text in code for name in re.findall(r"\b(?:[Tt]rap|[Dd]efect) ([TB]\d+)\b", text)}
    assert named and named <= listed


def test_help_names_every_public_name():
    named = set(re.findall(r"\w+", jaxmp.__doc__))
    assert set(jaxmp.__all__) <= named
