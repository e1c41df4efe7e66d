"""Tables and cells: the same content as the text, nothing that pushes a table off the page, both themes."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.html.elements import CELL_LETTERS, DARK, HEADING_LETTERS, LIGHT, Elements, Link, cell_of, shortened
from jaxmp.models.mlp import MLP
from jaxmp.testing.laws import Broken, Law, Laws
from jaxmp.text_table import table


class Words(HTMLParser):
    """The text of a fragment, without its style sheet; sees to it that elements are closed in order."""

    def __init__(self, fragment):
        super().__init__()
        self.open, self.words = [], []
        self.feed(fragment)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def test_long_names_are_cut_in_the_middle_and_are_whole_where_pointed_at():
    found, long = Elements(), "encoder/layer_0/attention/query=float32;" * 3
    found.table(("module", "words"), [(long, "a sentence that is long enough to be cut if it were one word")])
    found.table(("run",), [(Link("runs/" + "a" * 60, "a/report.html"),)])
    html = found.cell()
    texts = Words(html).words
    assert max(max(map(len, text.split()), default=0) for text in texts) <= CELL_LETTERS
    assert f'title="{long}"' in html and any("long enough to be cut if it were one word" in text for text in texts)
    assert '<a href="a/report.html">runs/aaa' in html
    (heading,) = (text for text in texts if text.startswith("encoder"))
    assert len(heading) == HEADING_LETTERS
    found.table(("a head of several words, which may wrap where they end",), [("1",)])
    assert "a head of several words, which may wrap where they end" in Words(found.cell()).words
    assert shortened("abcdefgh", 5) == "ab…gh" and shortened("abc", 3) == "abc"


def test_a_number_with_its_interval_stands_in_one_line_unless_longer_words_stand_below_it():
    found = Elements()
    rows = [("x", *["reference"] * 2), ("y", "-0.07 (-0.28 to +0.13)", "0.1 (none where all differences are equal)")]
    found.table(("a", "b", "c"), rows)
    assert '<td class="s">-0.07' in found.cell() and "<td>0.1 (none" in found.cell()


def test_a_cell_shows_the_words_of_the_text():
    numbers = table([("a", "1"), ("b<", "2")], header=("x", "y"))
    words = Words(cell_of([numbers, "line  of a value\nprecision   float32", "  indented"], "title")).words
    assert " ".join(words) == "title x y a 1 b< 2 line of a value precision float32 indented"


def test_a_cell_is_in_the_theme_of_its_notebook():
    html = cell_of(["x"])
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    dark = [rule for rule in style.split("}") if DARK in rule]
    assert len(dark) == 2 and "prefers-color-scheme: dark" in dark[0]
    for selector in ('[data-jp-theme-light="false"] .jaxmp', ".vscode-dark .jaxmp", 'html[theme="dark"] .jaxmp'):
        assert selector in dark[1]
    assert style.count(LIGHT) == 2  # by default, and where the notebook is light on a dark system
    # Nothing reaches beyond the cell: each rule is inside .jaxmp { } or names it.
    depth, outside = 0, ""
    for letter in re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        outside += letter if depth == 0 else ""
    assert depth == 0 and all("jaxmp" in s or "@media screen" in s for s in outside.split("}") if s.strip())


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(1)(nn.relu(nn.Dense(4)(x)))


def fail():
    raise Broken("1 != 2")


X = jnp.ones((4, 3), jnp.float16)
EXPERIMENT = jaxmp.Experiment(
    MLP((4,), 2), jaxmp.Arrays.of({"image": np.ones((8, 2, 2, 1)), "label": np.zeros(8, int)}), optimizer=optax.sgd(0.1)
)
LAWS = Laws("a subject", [Law("holds", "One is one.", lambda: None), Law("fails", "One is two.", fail)])
STATE = jaxmp.TrainState.create({"w": jnp.ones((3, 2))}, optax.sgd(0.1), key=jax.random.key(0))
SHOWN = {
    "experiment": (lambda: EXPERIMENT, ["model", "MLP(features=(4,), classes=2)", "optax transformation"]),
    "policy table": (lambda: jaxmp.explain(Net(), "mixed_float16", X), ["Dense_0", "(default)"]),
    "audit": (lambda: jaxmp.audit(lambda x: jnp.sum(x @ x.T), X), ["float16", "96", "findings"]),
    "memory": (lambda: jaxmp.memory(lambda w: jnp.sum(w**2), jnp.ones((1024, 1024))), ["gradients", "4.00"]),
    "blame": (lambda: jaxmp.blame(lambda x: jnp.exp(12 * x), X), ["first", "inf from exp"]),
    "laws": (lambda: LAWS, ["a subject", "broken", "One is two.", "1 != 2"]),
    "state": (lambda: STATE, ["TrainState of 6 parameters", "params/w", "float32", "3 x 2"]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_returned_shows_itself_in_a_notebook(name):
    make, expected = SHOWN[name]
    html = make()._repr_html_()
    words = " ".join(Words(html).words)
    assert html.startswith('<div class="jaxmp"><style>') and all(part in words for part in expected), words


def test_a_state_shows_shapes_and_no_values():
    lines = repr(STATE).splitlines()
    assert lines[0] == "TrainState of 6 parameters"
    assert [line.split(maxsplit=1) for line in lines[1:3]] == [["step", "int32[]"], ["params/w", "float32[3, 2]"]]
    jax.jit(lambda state: repr(state) and state.step)(STATE)  # of tracers too
