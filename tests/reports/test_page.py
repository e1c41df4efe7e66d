"""Pages in a browser: in windows of any width nothing reaches beyond its edge, and no word lies on another."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from jaxmp.html.figure import Axis, Series, bar_figure, interval_figure, line_figure
from jaxmp.reports.page import Page, command
from jaxmp.runs.provenance import provenance

WIDTHS = (400, 800, 1400)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync".split()
LONG = [f"encoder/layer_0=float32; rnn/*=mixed_float16; rnn=float32; mixed_{half}" for half in ("float16", "bfloat16")]
LOOK = """
const found = {};
const frames = [...document.querySelectorAll('iframe')];
const overlap = (a, b, low, high) => Math.min(a[high], b[high]) - Math.max(a[low], b[low]);
for (const frame of frames) frame.onload = () => {
  const view = frame.contentDocument, width = frame.clientWidth, wrong = [];
  const style = e => frame.contentWindow.getComputedStyle(e);
  const scrolls = e => e && (style(e).overflowX !== 'visible' || scrolls(e.parentElement));
  for (const e of view.querySelectorAll('body *'))
    if (e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
      wrong.push('beyond the edge: ' + e.textContent);
  for (const svg of view.querySelectorAll('svg')) {
    const edge = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')];
    const boxes = texts.map(text => text.getBoundingClientRect());
    const words = texts.map(text => text.firstChild.textContent);
    boxes.forEach((box, i) => {
      if (box.right > edge.right + 2 || box.left < edge.left - 2) wrong.push('out of its figure: ' + words[i]);
      boxes.slice(i + 1).forEach((other, j) => {
        if (overlap(box, other, 'left', 'right') > 1 && overlap(box, other, 'top', 'bottom') > 3)
          wrong.push('on each other: ' + words[i] + ' and ' + words[i + 1 + j]);
      });
    });
  }
  found[width] = wrong;
  document.getElementById('found').textContent = JSON.stringify(found);
};
"""


def seen(page, folder):
    """What is wrong with a page in windows of each width, by the width, as Chromium lays it out."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    (folder / "page.html").write_text(str(page))
    frames = "".join(f'<iframe style="width:{w}px;height:900px;border:0"></iframe>' for w in WIDTHS)
    go = "frames.forEach(frame => frame.src = 'page.html');"
    (folder / "frames.html").write_text(f'<pre id="found"></pre>{frames}<script>{LOOK}{go}</script>')
    files = ("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    shown = subprocess.run(
        [browser, *FLAGS, *files, f"--user-data-dir={folder / 'profile'}", (folder / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    return json.loads(html.unescape(re.search(r'id="found">(.*?)</pre>', shown.stdout, re.S)[1]))


@pytest.mark.slow
def test_nothing_reaches_beyond_its_edge_in_a_window_of_any_width(tmp_path):
    page = Page("a_config_with_a_name_of_its_own, by precision", " / ".join(LONG))
    rows = [(name, style, [1.0, 2.0], (1.0, 0.5, 1.5)) for style, name in enumerate(LONG)]
    lines = [Series(name, [0, 100_000], [1e-5, 123_456.0 + i], i) for i, name in enumerate(LONG)]
    page.figures(
        [
            ("intervals", interval_figure(Axis("difference in accuracy, percentage points"), rows, name="a"), ""),
            ("bars", bar_figure(Axis("MiB"), [(name, [("part", 1.0)]) for name in LONG], name="b"), "caption"),
            ("lines", line_figure(Axis("step"), Axis("loss, nats"), lines, name="c"), "Thin: each seed."),
        ]
    )
    page.table(
        ["precision", "a header of many words", "difference"],
        [(name, LONG[0], "+0.07 (-0.28 to +0.13)") for name in LONG],
    )
    assert seen(page, tmp_path) == {str(width): [] for width in WIDTHS}


def test_what_is_kept_of_a_command_has_no_password(monkeypatch):
    argv = ["/bin/jaxmp", "tune", "digits", "--storage", "postgresql+psycopg://me:secret@host/db?sslpassword=secret"]
    monkeypatch.setattr("sys.argv", argv)
    assert command().startswith("jaxmp tune digits --storage ") and "me@host/db" in command()
    assert "secret" not in command() + str(Page("a")) + json.dumps(provenance()["command"])
