"""What a user adds in one file of their own, trained by `jaxmp train my.py` and by `fit`, without touching jaxmp."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import re
import textwrap

import jax
import numpy as np
import pytest

from jaxmp import Run, fit
from jaxmp.cli import main
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.reports.run_report import report

pytestmark = pytest.mark.xdist_group("in one file")  # one worker: the fixture trains

LINE = """
    class Line(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))


    def load(split):
        x = np.random.default_rng(len(split)).normal(size=(48, 3)).astype(np.float32)
        return {"x": x, "y": x @ np.float32([1.0, -2.0, 0.5])}


    @dataclasses.dataclass(frozen=True)
    class Regression(Task):
        inputs: tuple[str, ...] = ("x",)
        target: str = "y"
        metrics = {"loss": MetricSpec("min", "kg^2"), "deviation": MetricSpec("min", "kg", digits=3)}
        monitor = "deviation"

        def __call__(self, outputs, batch):
            error = outputs[:, 0].astype(jnp.float32) - batch[self.target]
            metrics = {"deviation": Mean.of(abs(error), batch["weight"])}
            return Mean.of(error**2, batch["weight"]), metrics
"""

FILES = {
    "an optimizer": LINE
    + """
    @dataclasses.dataclass(frozen=True)
    class SignedMomentum:
        learning_rate: float = 0.02

        def make(self, steps):
            schedule = optax.linear_schedule(self.learning_rate, 0.0, steps)
            return optax.chain(optax.trace(0.9), optax.scale_by_sign(), optax.scale_by_learning_rate(schedule))


    def get_config():
        return Experiment(Line(), Arrays(load, batch_size=16), Regression(), SignedMomentum(), loop=Loop(steps=24))
    """,
    "a regression": LINE
    + """
    def get_config():
        return Experiment(Line(), Arrays(load, batch_size=16), Regression(), AdamW(0.05), loop=Loop(steps=24))
    """,
    "a scaler": LINE
    + """
    class State(NamedTuple):
        scale: jax.Array
        calm: jax.Array


    @dataclasses.dataclass(frozen=True)
    class Impatient:
        \"\"\"Doubles the scale after every second finite step, and halves it after an overflow.\"\"\"

        def init(self):
            return State(jnp.float32(2.0**22), jnp.int32(0))

        def update(self, state, finite, grad_max):
            calm = jnp.where(finite, state.calm + 1, 0)
            grown = jnp.where(finite & (calm % 2 == 0), state.scale * 2, state.scale)
            return State(jnp.where(finite, jnp.minimum(grown, 2.0**24), state.scale / 2), calm)


    def get_config():
        return Experiment(
            Line(), Arrays(load, batch_size=16), Regression(), Adam(0.05), scaler=Impatient(), loop=Loop(steps=24)
        )
    """,
    "a language model": """
    TEXT = "the cat sat on the mat and the dog sat on the log while the rat ran round the vat "


    def load(split):
        rng = np.random.default_rng(len(split))
        starts = rng.integers(0, len(TEXT) - 17, 64)
        return {"text": np.array([TEXT[start : start + 17] for start in starts])}


    def letters(rows):
        codes = [[ord(letter) - ord("a") if letter.isalpha() else 26 for letter in text] for text in rows["text"]]
        return {"letters": np.array(codes, np.int32)}


    class GPT(nn.Module):
        \"\"\"One causal block over letters.\"\"\"

        width: int = 32

        @nn.compact
        def __call__(self, letters):
            x = nn.Embed(27, self.width)(letters[:, :-1])
            x = x + self.param("positions", nn.initializers.normal(0.02), (x.shape[1], self.width)).astype(x.dtype)
            mask = nn.make_causal_mask(letters[:, :-1])
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
            return nn.Dense(27)(nn.LayerNorm()(x))


    @dataclasses.dataclass(frozen=True)
    class NextLetter(Task):
        inputs: tuple[str, ...] = ("letters",)
        metrics = {"loss": MetricSpec("min", "nats"), "bits_per_letter": MetricSpec("min", "bits", digits=3)}
        monitor = "bits_per_letter"

        def __call__(self, outputs, batch):
            targets = batch["letters"][:, 1:]
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)
            weights = jnp.broadcast_to(batch["weight"][:, None], losses.shape)
            return Mean.of(losses, weights), {"bits_per_letter": Mean.of(losses / jnp.log(2.0), weights)}


    def get_config():
        return Experiment(
            GPT(),
            Arrays(load, batch_size=16, host_transforms=(letters,)),
            NextLetter(),
            Adam(0.01),
            loop=Loop(steps=24),
        )
    """,
    "a dataset": LINE
    + """
    @dataclasses.dataclass(frozen=True)
    class Measurements(Dataset):
        \"\"\"Rows of text such as "0.5;-1.2;3.0", as an instrument writes them.\"\"\"

        rows: int = 48

        def source(self, split):
            data = load(split)
            lines = [";".join(f"{number:.4f}" for number in row) for row in data["x"]]
            return Columns({"line": np.array(lines, object)[: self.rows], "y": data["y"][: self.rows]})


    def read_numbers(rows):
        return {"x": np.array([line.split(";") for line in rows["line"]], np.float32), "y": rows["y"]}


    def jitter(key, row):
        if key is None:
            return row
        return {**row, "x": row["x"] + 0.01 * jax.random.normal(key, row["x"].shape)}


    def get_config():
        data = Measurements(batch_size=16, host_transforms=(read_numbers,), transforms=(jitter,))
        return Experiment(Line(), data, Regression(), Adam(0.05), loop=Loop(steps=24))
    """,
}

HEAD = '''"""Something of one's own, in one file."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import Adam, AdamW, Arrays, Dataset, Experiment, Loop, Mean, MetricSpec, Task
from jaxmp.data.source import Columns

'''


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name == "a dataset" else pytest.mark.slow) for name in FILES],
    ids=lambda name: name.replace(" ", "-"),
)
def trained(request, tmp_path_factory):
    """The name, its file, the run that `jaxmp train` made of it, and what that printed."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my.py").write_text(HEAD + textwrap.dedent(FILES[request.param]))
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        assert main(["train", "my.py", "--loop.log-every", "8", "--loop.eval-every", "12"]) == 0
    return request.param, folder / "my.py", Run(folder / "runs"), out.getvalue()


@pytest.mark.slow
def test_what_is_of_ones_own_needs_one_file_and_only_public_names(trained):
    _, file, _, _ = trained
    names = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("jaxmp")
        for alias in node.names
    ]
    assert {name for name in names if name.count(".") > 1} == {"jaxmp.data.source.Columns"}


def test_it_trains_and_is_read_back(trained):
    name, _, run, _ = trained
    _, losses = run.curve("loss")
    assert len(losses) == 4 and losses[-1] < losses[np.isfinite(losses)][0], name
    data = run.experiment.data
    assert np.all(np.isfinite(run.apply(data.source("test")[np.arange(3)])))


@pytest.mark.slow
def test_fit_makes_the_same_run_of_it(trained, tmp_path):
    _, file, run, _ = trained
    experiment = ConfigFile.find(str(file)).experiment()
    loop = dataclasses.replace(experiment.loop, log_every=8, eval_every=12)
    fitted = fit(dataclasses.replace(experiment, loop=loop), workdir=tmp_path, log=lambda message: None)
    assert fitted.path.name == run.path.name
    assert fitted.summary["test"] == run.summary["test"]
    again = Run(fitted.path, dataclasses.replace(experiment, loop=loop))
    jax.tree.map(np.testing.assert_array_equal, again.state().params, run.state().params)


@pytest.mark.slow
def test_its_metrics_are_on_the_console_monitored_and_in_the_report(trained):
    _, _, run, printed = trained
    monitor = run.config["monitor"]
    spec = run.metric_specs[monitor]
    assert spec.best == "min"
    _, values = run.curve(monitor, "validation")
    assert run.summary["best"][monitor] == pytest.approx(min(values))
    lines = [line for line in printed.splitlines() if "  epoch " in line]
    assert len(lines) == 4 + 2 + 1
    for line in lines:  # a dash: no step was applied since the last line
        assert re.search(rf"  {monitor} (-|\d+\.\d{{{spec.digits}}})(  |$)", line), line
    page = str(report([run]))
    assert spec.label(monitor) in page
    assert (run.metric_specs["loss"].label("loss")) in page
