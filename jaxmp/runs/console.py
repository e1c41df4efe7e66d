"""`Console`: shows how a run goes on: a bar on a terminal and in a notebook, plain lines elsewhere.

On a terminal of 80 columns:

    validation  epoch 2/50  step 40/1000  loss 0.5051  accuracy 0.8630  scale 32768
                skipped 0
    epoch 3/50  step 50/1000  ━━━━━                     11,204 examples/s  0:06 left
      loss 0.4402  accuracy 0.8811  scale 32768  skipped 0

No line is longer than the terminal is wide: what does not fit goes to the next line, and is never broken.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import rich.console

    from jaxmp.training.metrics import MetricSpec

SPLIT_WIDTH = 10
"""columns of the name of the split at the beginning of a line"""
LEAST_BAR, LONGEST_BAR = 8, 40
"""columns of the bar"""
NOTEBOOK_WIDTH = 80
"""columns of the lines in a notebook: what a cell holds in a window of 800 pixels"""
PRE = "font-family: monospace; font-size: 13px; line-height: normal; white-space: pre; overflow-x: auto"
"""the style of the lines in a notebook: some notebooks break lines or have a proportional font"""


class Console:
    """Shows what a run is doing, then its records.

    On a terminal and in a notebook, a bar shows the last training record, and every evaluation leaves a line above it.
    On a dumb terminal, in a file or a pipe, each record is one line, and what is done before the first step is not
    shown.

    Args:
      console: rich's console; by default one on the standard output.
    """

    def __init__(self, console: rich.console.Console | None = None):
        from rich.console import Console as RichConsole

        self._console = console or RichConsole()
        self._bar = Bar()
        self._screen: _Terminal | _Notebook | None = None
        if self._console.is_jupyter:
            self._screen = _Notebook(self._bar)
        elif self._console.is_terminal and not self._console.is_dumb_terminal:
            self._screen = _Terminal(self._bar, self._console)

    def doing(self, what: str) -> None:
        """Says what is done before the first step: "reading data", "compiling"."""
        self._bar.doing, self._bar.since = what, time.monotonic()
        if self._screen is not None:
            self._screen.changed()

    def begin(self, total_steps: int, steps_per_epoch: int, metrics: Mapping[str, MetricSpec], step: int = 0) -> None:
        """Says how long the run is.

        Args:
          total_steps: the steps of the whole run.
          steps_per_epoch: for the number of epochs.
          metrics: the spec of each metric to show, in this order.
          step: the step that it goes on from.
        """
        self._bar.total, self._bar.step = total_steps, step
        self._bar.epochs = -(-total_steps // steps_per_epoch)
        self._metrics = metrics

    def began(self) -> None:
        """Says that steps are under way: what was compiled runs."""
        if self._bar.doing is not None:
            self._bar.begin()
            if self._screen is not None:
                self._screen.changed()

    def write(self, record: Mapping[str, Any]) -> None:
        """Shows the record; one of split "ranges" is not shown."""
        if record["split"] == "ranges":
            return
        where, numbers, speed = self._fields(record)
        if self._screen is not None and record["split"] == "train":
            self._bar.show(record["step"], where, numbers, speed, record.get("steps_per_second"))
            self._screen.changed()
            return
        name = f"{record['split']:{SPLIT_WIDTH}}  "
        fields = [*where, *numbers, *speed]
        if self._screen is not None:
            self._screen.print(lambda width: flowed(fields, width, name))
        elif self._console.is_terminal:  # a dumb one, which breaks what is too long anywhere
            self._print("\n".join(flowed(fields, self._console.width, name)))
        else:
            self._print(name + "  ".join(fields))

    def close(self) -> None:
        """Leaves the bar as it stands; what was done before the first step is taken away if there was none."""
        if self._screen is not None:
            self._screen.close()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _fields(self, record: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
        """What is shown of a record: where it stands, its numbers, its speed."""
        several = any(name.startswith("loss_scale/") for name in record)

        def mean(value: float, digits: int) -> str:
            # Skipped steps are no part of a mean over training, nor those in which one of several objectives did not
            # run: it is NaN where all steps were such.
            nothing = math.isnan(value) and record["split"] == "train" and (record.get("skipped_steps") or several)
            return "-" if nothing else f"{value:.{digits}f}"

        def metric(name: str, digits: int) -> Callable[[Any], str]:
            return lambda value: f"{name} {mean(value, digits)}"

        where: dict[str, Callable[[Any], str]] = {
            "epoch": lambda epoch: f"epoch {math.ceil(epoch - 1e-9)}/{self._bar.epochs}",
            "step": lambda step: f"step {step}/{self._bar.total}",
        }
        numbers: dict[str, Callable[[Any], str]] = {
            **{name: metric(name, spec.digits) for name, spec in self._metrics.items()},
            "loss_scale": lambda scale: f"scale {scale:g}",
            **{name: _scale_of(name) for name in record if name.startswith("loss_scale/")},
            "skipped_steps": lambda steps: f"skipped {steps}",
            "epsilon": lambda spent: f"epsilon {spent:.3g}",
        }
        speed: dict[str, Callable[[Any], str]] = {"examples_per_second": lambda rate: f"{rate:,.0f} examples/s"}
        if "mfu" in record:  # of a device that nothing is known of, the FLOPs alone say nothing
            speed |= {
                "tflops_per_second": lambda rate: f"{rate:,.1f} TFLOP/s",
                "mfu": lambda share: f"MFU {share:.1%}",
            }

        def shown(fields: Mapping[str, Callable[[Any], str]]) -> list[str]:
            return [show(record[name]) for name, show in fields.items() if name in record]

        return shown(where), shown(numbers), shown(speed)


def _scale_of(field: str) -> Callable[[Any], str]:
    objective = field.partition("/")[2]
    return lambda scale: f"scale {objective} {scale:g}"


def flowed(fields: Sequence[str], width: int, begin: str = "", indent: int | None = None) -> list[str]:
    """Fields, two blanks apart, in as many lines as they need; one that is longer than a line is cut.

    Args:
      fields: texts of one line each.
      width: columns of a line.
      begin: what the first line begins with.
      indent: blanks that later lines begin with; by default as many as `begin` has columns.

    >>> flowed(["loss 0.5", "accuracy 0.75"], 20, "train  ")
    ['train  loss 0.5', '       accuracy 0.75']
    """
    blanks = " " * (len(begin) if indent is None else indent)
    lines, line = [], begin
    for field in fields:
        longer = line + field if line in (begin, blanks) else f"{line}  {field}"
        if columns(longer) > width and line not in (begin, blanks):
            lines.append(line)
            longer = blanks + field
        line = cut(longer, width)
    return [*lines, line]


def columns(text: str) -> int:
    """The columns that a text takes on a terminal: two for each wide character."""
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, width: int) -> str:
    """A text in at most `width` columns, with … at its end if it was longer."""
    from rich.cells import set_cell_size

    return text if columns(text) <= width else f"{set_cell_size(text, max(width - 1, 0)).rstrip()}…"


class Bar:
    """What the bar shows; `lines` lays it out."""

    def __init__(self) -> None:
        self.doing: str | None = None
        """what is done before the first step; None since then"""
        self.since = time.monotonic()
        """when that began"""
        self.total, self.epochs, self.step = 0, 0, 0
        self._where: list[str] = []
        self._numbers: list[str] = []
        self._speed: list[str] = []
        self._began: tuple[float, int] | None = None  # time and step of the first record
        self._left: tuple[float, float] | None = None  # when it was reckoned, seconds left then

    def begin(self) -> None:
        """Shows the step that the run goes on from."""
        self.doing, self._where = None, [f"step {self.step}/{self.total}"]

    def show(
        self, step: int, where: list[str], numbers: list[str], speed: list[str], steps_per_second: float | None
    ) -> None:
        """Shows a training record. `steps_per_second` tells the time left at the first, later all since then does."""
        now, self.doing, self.step = time.monotonic(), None, step
        self._where, self._numbers, self._speed = where, numbers, speed
        if self._began is None:
            self._began, rate = (now, step), steps_per_second
        else:  # evaluations and checkpoints take time, too
            rate = (step - self._began[1]) / max(now - self._began[0], 1e-9)
        self._left = (now, (self.total - step) / rate) if rate else None

    def layout(self, width: int, height: int = 24) -> Layout:
        """Lays everything out in lines of at most `width` columns: in one if it fits, else in several.

        Numbers that do not fit into a third of `height` lines are left out.
        """
        now = time.monotonic()
        if self.doing is not None:
            return Layout(cut(f"{self.doing}  {int(now - self.since)} s", width), 0, "", [])
        left = []
        if self._left is not None:
            left = [f"{_clock(self._left[1] - (now - self._left[0]))} left"]
        head, right, below = "  ".join(self._where), "  ".join([*self._speed, *left]), list[str]()
        one = "  ".join([*self._where, *self._numbers])
        if columns(one) + columns(right) + LEAST_BAR + 4 <= width:
            head = one
        elif self._numbers:
            most = max(1, height // 3)
            below = flowed(self._numbers, width, "  ")
            if len(below) > most:
                below = [*below[: most - 1], cut(f"{below[most - 1]}  …", width)]
        bar = min(width - columns(head) - columns(right) - 4, LONGEST_BAR)
        if bar < LEAST_BAR:
            return Layout(cut(f"{head}  {right}", width), 0, "", below)
        return Layout(f"{head}  ", bar, f"  {right}", below)

    @property
    def share(self) -> float:
        """The share of the steps that is done."""
        return min(self.step / self.total, 1.0) if self.total else 0.0


class Layout(NamedTuple):
    """The lines of the bar. None is longer than the width that they were made for."""

    before: str
    """what the first line begins with"""
    bar: int
    """columns of the bar; 0 for none"""
    after: str
    """what follows the bar"""
    below: list[str]
    """the other lines"""


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:09, 12:34, 1:23:45."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Terminal:
    """Draws the bar on a terminal, below all that is printed meanwhile."""

    def __init__(self, bar: Bar, console: rich.console.Console):
        from rich.live import Live

        self._bar, self._console = bar, console
        self._live = Live(console=console, get_renderable=self._drawn, refresh_per_second=4)
        self._live.start()
        console.show_cursor(True)  # so that a run that is killed leaves it

    def print(self, lines: Callable[[int], list[str]]) -> None:
        """Prints the lines that `lines` makes for a number of columns above the bar."""
        for line in lines(self._console.width):
            self._console.print(line, markup=False, highlight=False, no_wrap=True)

    def changed(self) -> None:
        """Nothing to do: the bar is drawn four times a second."""

    def close(self) -> None:
        """Leaves the bar as it stands, if steps were made."""
        self._live.transient = self._bar.doing is not None
        self._live.stop()

    def _drawn(self) -> Any:
        from rich.text import Text

        before, bar, after, below = self._bar.layout(self._console.width, self._console.height)
        full, rest = ("━", "━") if self._console.encoding.startswith("utf") else ("#", "-")
        if not self._console.color_system:  # nothing else would tell the rest of the bar
            rest = " "
        done = round(bar * self._bar.share)
        text = Text(before, no_wrap=True)
        text.append(full * done, "green").append(rest * (bar - done), "bright_black")
        text.append("\n".join([after, *below]))
        return text


class _Notebook:
    """Draws the bar and the lines above it in one output of a notebook's cell, which is replaced as the run goes on."""

    def __init__(self, bar: Bar):
        self._bar, self._lines, self._output, self._drawn = bar, list[str](), None, 0.0

    def print(self, lines: Callable[[int], list[str]]) -> None:
        """Prints the lines that `lines` makes for a number of columns above the bar."""
        self._lines += lines(NOTEBOOK_WIDTH)
        self._draw()

    def changed(self) -> None:
        """Draws the bar, four times a second at most: a notebook keeps all that is sent."""
        if time.monotonic() - self._drawn > 0.25:
            self._draw()

    def close(self) -> None:
        """Leaves the bar as it stands, if steps were made."""
        if self._bar.doing is None:
            self._draw()
        elif self._output is not None:
            self._show("")

    def _draw(self) -> None:
        before, bar, after, below = self._bar.layout(NOTEBOOK_WIDTH)
        done = round(bar * self._bar.share)
        line = f"{before}{'━' * done}{' ' * (bar - done)}{after}"
        self._show(f'<pre style="{PRE}">{html.escape(chr(10).join([*self._lines, line, *below]))}</pre>')

    def _show(self, text: str) -> None:
        from IPython.display import HTML, display

        page = HTML(text)
        if self._output is None:
            self._output = display(page, display_id=True)
        else:
            self._output.update(page)
        self._drawn = time.monotonic()
