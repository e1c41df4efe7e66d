"""The screen: every number, in lines that fit, on a terminal, in a notebook, and elsewhere."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from jaxmp.runs import console as module
from jaxmp.runs.console import Bar, Console, columns, flowed
from jaxmp.training.metrics import MetricSpec

SPECS = {"loss": MetricSpec("min"), "accuracy": MetricSpec("max", "%")}


def record(step, split="train", **fields):
    return {
        "step": step, "applied_steps": step - 1, "epoch": step / 10, "split": split, "loss": 1 / step, "accuracy": 0.5,
        "loss_scale": 32768.0, "skipped_steps": 1, "examples_per_second": 1234.5, "steps_per_second": 10.0,
    } | fields  # fmt: skip


def make(screen, specs=SPECS, *, steps=100, per_epoch=10, **how):
    console = Console(RichConsole(file=screen, **how))
    console.begin(steps, per_epoch, specs)
    return console


def frames(text):
    """What a terminal got, without colours: the lines of all frames."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()


def test_on_a_terminal_there_is_a_bar_with_the_numbers_and_a_line_for_each_evaluation():
    screen = io.StringIO()
    console = make(screen, force_terminal=True, width=150, color_system=None)
    console.write(record(20))
    console.write(record(20, "validation", accuracy=0.75))
    console.write(record(30, skipped_steps=2, loss_scale=16384.0))
    running = screen.getvalue()
    assert running.rindex("\x1b[?25h") > running.rindex("\x1b[?25l"), "a run that is killed leaves the cursor"
    console.close()
    shown = screen.getvalue()
    assert "\x1b[" in shown and "━" in shown
    last = [line for line in frames(shown) if "step 30/" in line][-1]
    for part in (
        "epoch 3/10",
        "step 30/100",
        "loss 0.0333",
        "accuracy 0.5000",
        "scale 16384",
        "skipped 2",
        "/s",
        "left",
    ):
        assert part in last
    assert len(re.findall(r"validation .*accuracy 0\.7500", shown)) == 1


MANY = {f"metric_number_{n}": MetricSpec() for n in range(12)} | {"指標": MetricSpec()}


@pytest.mark.parametrize("width", [80, 81, 120, 160])
@pytest.mark.parametrize("specs", [{}, SPECS, MANY])
def test_no_line_is_longer_than_the_terminal_is_wide_and_every_metric_is_there(width, specs):
    screen = io.StringIO()
    console = make(screen, specs, steps=1_000_000, per_epoch=7, force_terminal=True, width=width, height=40)
    values = dict.fromkeys(MANY, 123456.789)
    for step, split in ((999_991, "train"), (999_992, "validation"), (999_993, "train")):
        console.write(record(step, split, examples_per_second=1e7, **values))
    console.close()
    lines = frames(screen.getvalue())
    assert max(map(columns, lines)) <= width
    for name in specs:
        assert sum(bool(re.search(rf"\b{name} \d", line)) for line in lines) >= 2
    assert any("999992/1000000" in line for line in lines) and any("/s" in line for line in lines)


def test_the_bar_is_laid_out_for_any_width_and_leaves_out_what_a_low_terminal_has_no_lines_for():
    bar = Bar()
    bar.total = 10
    for doing in ("reading data", None):
        if doing is None:
            bar.show(5, ["epoch 1/2", "step 5/10"], [f"m{n} 0.5" for n in range(40)], ["5 examples/s"], 2.0)
        else:
            bar.doing = doing
        for width in range(1, 200):
            before, length, after, below = bar.layout(width, height=12)
            assert columns(before) + length + columns(after) <= width and max(map(columns, ["", *below])) <= width
            assert len(below) <= 4
    assert bar.layout(80, height=12).below[-1].endswith("…") and not bar.layout(80, height=60).below[-1].endswith("…")


def test_what_is_done_before_the_first_step_is_shown_on_a_terminal_alone():
    screen, file = io.StringIO(), io.StringIO()
    terminal, pipe = Console(RichConsole(file=screen, force_terminal=True, width=80)), Console(RichConsole(file=file))
    for console in (terminal, pipe):
        console.doing("reading data")
    assert terminal._bar.layout(80).before == "reading data  0 s"
    for console in (terminal, pipe):
        console.doing("compiling")
        console.begin(100, 10, SPECS, 40)
    assert terminal._bar.layout(80).before == "compiling  0 s"
    terminal.began()
    assert terminal._bar.layout(80).before.startswith("step 40/100")
    terminal.close()
    assert "step 40/100" in frames(screen.getvalue())[-1] and file.getvalue() == ""


def test_elsewhere_each_record_is_one_plain_line(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen = io.StringIO()
    console = make(screen, width=40)
    console.write(record(20))
    console.write({"step": 20, "split": "validation", "loss": float("nan"), "[bold]": 1.0})
    console.close()
    assert screen.getvalue().splitlines() == [
        "train       epoch 2/10  step 20/100  loss 0.0500  accuracy 0.5000  scale 32768  skipped 1  1,234 examples/s",
        "validation  step 20/100  loss nan",
    ]


def test_a_dumb_terminal_gets_lines_that_fit(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = io.StringIO()
    console = make(screen, force_terminal=True, width=80)
    console.write(record(20))
    console.close()
    assert screen.getvalue().splitlines() == [
        "train       epoch 2/10  step 20/100  loss 0.0500  accuracy 0.5000  scale 32768",
        "            skipped 1  1,234 examples/s",
    ]


def test_a_notebook_gets_one_output_that_is_replaced(monkeypatch):
    shown = []
    output = types.SimpleNamespace(update=lambda page: shown.append(page))
    display = types.SimpleNamespace(HTML=str, display=lambda page, display_id: (shown.append(page), output)[1])
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    console = make(io.StringIO(), force_jupyter=True)
    console.doing("reading data")
    for step in range(1, 31):
        console.write(record(step, **{"<b>": 1}))
    console.write(record(30, "validation", accuracy=0.75))
    console.close()
    assert len(shown) < 10, "it is not drawn for each record"
    before = f'<pre style="{module.PRE}">'
    assert "reading data" in shown[0] and shown[-1].startswith(f"{before}validation")
    assert "white-space: pre;" in before and "monospace" in before, "no notebook may break or stretch a line"
    assert "accuracy 0.7500" in shown[-1] and "step 30/100" in shown[-1] and "━" in shown[-1]
    assert max(columns(line) for page in shown for line in page.splitlines()) <= module.NOTEBOOK_WIDTH + len(before)
    shown.clear()
    console = make(io.StringIO(), force_jupyter=True)
    console.doing("reading data")
    console.close()
    assert shown[-1] == "", "nothing is left of what led to no step"


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0.05, "1/3"), (1.0, "1/3"), (1 + 1e-12, "1/3"), (1.1, "2/3"), (2.4, "3/3")]
)
def test_epochs_are_whole_where_steps_are_given(epoch, expected):
    screen = io.StringIO()
    make(screen, steps=24, per_epoch=10).write(record(1, epoch=epoch))
    assert f"epoch {expected} " in screen.getvalue()


def test_metrics_of_ones_own_are_shown_in_the_order_and_with_the_digits_of_their_specs():
    specs = {"loss": MetricSpec("min", digits=1), "perplexity": MetricSpec("min", digits=2), "undeclared": MetricSpec()}
    screen = io.StringIO()
    console = make(screen, specs)
    console.write({"step": 20, "split": "test", "undeclared": 0.5, "perplexity": 3.14159, "loss": 2.25, "other": 1.0})
    assert screen.getvalue() == "test        step 20/100  loss 2.2  perplexity 3.14  undeclared 0.5000\n"


def test_a_mean_over_no_applied_step_is_a_dash():
    screen = io.StringIO()
    make(screen).write(record(20, loss=float("nan"), accuracy=float("nan")))
    assert "loss -  accuracy -  scale" in screen.getvalue()


def test_the_numbers_of_each_objective_are_shown_and_a_dash_for_one_that_did_not_run():
    screen, specs = io.StringIO(), {"a/loss": MetricSpec("min"), "b/loss": MetricSpec("min")}
    of_two = {"a/loss": 0.5, "b/loss": float("nan"), "loss_scale/a": 8.0, "loss_scale/b": 2.0, "skipped_steps": 0}
    make(screen, specs, width=140).write({"step": 20, "split": "train", **of_two})
    assert "a/loss 0.5000  b/loss -  scale a 8  scale b 2  skipped 0" in screen.getvalue()


def test_the_time_left_is_told_by_the_speed_then_by_all_since_the_first_record():
    bar = Bar()
    bar.total = 1000
    bar.show(900, [], [], [], None)
    assert bar._left is None, "a resumed run does not count the steps before it as done in no time"
    bar = Bar()
    bar.total = 1000
    bar.show(900, [], [], [], 10.0)
    assert bar._left[1] == pytest.approx(10)
    time.sleep(0.05)  # an evaluation
    bar.show(901, [], [], [], 1e9)
    assert bar._left[1] > 0.05 * 99
    assert [module._clock(seconds) for seconds in (-1, 8.6, 754, 5025)] == ["0:00", "0:09", "12:34", "1:23:45"]


def test_a_field_is_never_broken_unless_it_is_longer_than_a_line():
    assert flowed(["aa 1", "bb 2", "c" * 12], 10, "x  ") == ["x  aa 1", "   bb 2", "   cccccc…"]
    assert flowed([], 10, "x") == ["x"]


def test_importing_the_module_imports_none_of_the_packages_behind_it():
    code = "import sys, jaxmp.runs.console; print({'rich', 'IPython', 'jax'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "set()\n", result.stderr
