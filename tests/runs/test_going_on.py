"""Going on with a run: under other settings in its own folder, and from its state or weights in another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.errors import RunFailed
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.runs.fit import Fitted, fit
from jaxmp.runs.run import Run
from jaxmp.tasks.classification import Classification
from jaxmp.training.optimizers import Adam

TIMING = {"wall_seconds", "examples_per_second"}


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


def rows(split):
    rng = np.random.default_rng(len(split))
    label = rng.integers(0, 2, 40)
    return {"x": (rng.normal(size=(40, 3)) + label[:, None]).astype(np.float32), "label": label}


BASE = Experiment(
    model=Small(),
    data=Arrays(rows, batch_size=10, images=()),  # 4 steps an epoch
    task=Classification(inputs=("x",)),
    optimizer=Adam(1e-2),
    precision="float32",
    loop=Loop(steps=8, log_every=4, save_every=4),
)


def changed(experiment: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(experiment, **{name: changed(getattr(experiment, name), rest, value) if rest else value})


def leaves(state):
    raw = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(state)
    ]
    return [np.asarray(x) for x in raw]


def bits(run: Fitted, experiment: Experiment) -> list[bytes]:
    return [leaf.tobytes() for leaf in leaves(Run(run.path, experiment).state())]


def lines(path, *splits):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name not in TIMING}
        for record in records
        if not splits or record["split"] in splits
    ]


def config(path):
    return json.loads((path / "config.json").read_text())


class Overflows(NamedTuple):
    scale: jax.Array
    updates: jax.Array


@dataclasses.dataclass(frozen=True)
class OverflowsInSteps5To7:
    def init(self):
        return Overflows(jnp.float32(1), jnp.int32(0))

    def update(self, state, finite, grad_max):
        updates = state.updates + 1
        return Overflows(jnp.where((updates >= 4) & (updates < 7), jnp.inf, 1).astype(jnp.float32), updates)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of BASE."""
    return fit(BASE, workdir=tmp_path_factory.mktemp("runs"), name="small")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it in `tmp_path`."""
    shutil.copytree(finished.path, tmp_path / "small" / finished.path.name)
    return tmp_path


def cut_back(workdir, finished, step):
    """Makes the run look as if it had been killed after `step`."""
    path = workdir / "small" / finished.path.name
    (path / "summary.json").unlink()
    for checkpoint in (path / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return path


# In the same folder.

OPERATES = [
    ("loop.log_every", 3),
    ("loop.save_every", 2),
    ("loop.keep", 3),
    ("loop.max_consecutive_skips", 3),
    ("loop.steps_per_dispatch", 1),
    ("loop.ranges_every", 2),
    ("data.workers", 1),
    ("data.device_limit", 0),
]
ROUNDS = [
    ("parallel.mode", "pmap"),
    ("parallel.shard", "zero1"),
    ("parallel.remat", ("@Dense",)),
    ("data.eval_batch_size", 7),
]


def slow_but(first, cases):
    return [pytest.param(*case, marks=() if case[0] in first else pytest.mark.slow, id=case[0]) for case in cases]


@pytest.mark.parametrize(("path", "value"), slow_but(("loop.keep", "loop.log_every"), OPERATES))
def test_another_operating_value_goes_on_in_the_same_folder_to_the_same_bits(copied, finished, path, value):
    run = cut_back(copied, finished, 4)
    said: list[str] = []
    other = changed(BASE, path, value)
    again = fit(other, workdir=copied, name="small", log=said.append)
    assert again.path == run and bits(again, other) == bits(finished, BASE)
    assert again.summary["test"] == finished.summary["test"]
    assert any(f"going on with {path} = {value}" in line and "no bit" in line for line in said)
    (session,) = config(run)["sessions"]
    assert session["step"] == 4 and session["changed"][path]["is"] == value


@pytest.mark.parametrize(("path", "value"), slow_but(("data.eval_batch_size",), ROUNDS))
def test_another_rounding_value_goes_on_in_the_same_folder_within_rounding(copied, finished, path, value):
    run = cut_back(copied, finished, 4)
    said: list[str] = []
    other = changed(BASE, path, value)
    again = fit(other, workdir=copied, name="small", log=said.append)
    assert again.path == run
    for mine, theirs in zip(leaves(Run(run, other).state()), leaves(Run(finished.path, BASE).state()), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert any(f"going on with {path}" in line and "last digits" in line for line in said)


@pytest.mark.parametrize(("path", "value"), [*OPERATES, *ROUNDS], ids=[path for path, _ in [*OPERATES, *ROUNDS]])
def test_a_finished_run_says_that_another_value_has_no_effect(copied, finished, path, value):
    said: list[str] = []
    again = fit(changed(BASE, path, value), workdir=copied, name="small", log=said.append)
    assert not again.trained and again.path.name == finished.path.name
    assert len(said) == 1 and said[0].startswith(f"{path} = ") and "no effect" in said[0]
    assert "sessions" not in config(again.path)


def test_the_value_of_the_session_before_is_what_the_next_is_compared_with(copied, finished):
    run = cut_back(copied, finished, 4)
    for value, step in ((3, 4), (3, None), (2, 4)):
        said: list[str] = []
        fit(changed(BASE, "loop.keep", value), workdir=copied, name="small", log=said.append)
        assert any("loop.keep" in line for line in said) == (step is not None)
        cut_back(copied, finished, 4)
    assert [session["changed"]["loop.keep"] for session in config(run)["sessions"]] == [
        {"was": 2, "is": 3},
        {"was": 3, "is": 2},
    ]


DECIDES_OR_CHOOSES = [("loop.eval_every", 2), ("loop.patience", 3), ("optimizer.learning_rate", 0.5), ("loop.steps", 9)]


@pytest.mark.parametrize(("path", "value"), slow_but(("loop.steps",), DECIDES_OR_CHOOSES))
def test_another_deciding_or_choosing_value_is_another_run_that_says_what_continue_does(copied, finished, path, value):
    said: list[str] = []
    other = fit(changed(BASE, path, value), workdir=copied, name="small", log=said.append)
    assert other.path.parent == copied / "small" and other.path.name != finished.path.name
    (word,) = (line for line in said if "differs from" in line)
    assert f"{path} = {value}" in word and "alone" in word
    assert f"--continue {copied / 'small' / finished.path.name} goes on from its step 8" in word


def test_a_run_that_differs_in_two_fields_says_nothing_of_the_other(copied):
    said: list[str] = []
    two = changed(changed(BASE, "loop.steps", 2), "loop.patience", 3)
    fit(two, workdir=copied, name="small", log=said.append)
    assert not any("differs" in line for line in said)


# What is recorded.


def test_the_best_weights_are_evaluated_on_the_test_split_as_well(tmp_path):
    experiment = changed(changed(BASE, "loop.eval_every", 1), "optimizer.learning_rate", 1.0)
    said: list[str] = []
    fitted = fit(experiment, workdir=tmp_path, log=said.append)
    best = fitted.summary["best"]
    run = Run(fitted.path, experiment)
    assert best["step"] < fitted.summary["steps"] and best["test"] != fitted.summary["test"]
    assert best["test"] == run.evaluate("test", run.state("best"))
    assert any(f"the best weights, of step {best['step']}, on the test split: accuracy" in line for line in said)
    assert [line["step"] for line in lines(fitted.path, "test")] == [8]


def test_a_row_of_skips_of_just_the_limit_is_not_overlooked(tmp_path):
    """The run is checked after steps 3, 4, 6 and 8: two skips are seen after step 6, and none after step 8."""
    loop = Loop(steps=8, eval_every=8, max_consecutive_skips=3)
    experiment = dataclasses.replace(BASE, scaler=OverflowsInSteps5To7(), loop=loop)
    with pytest.raises(RunFailed, match="3 steps in a row were skipped, before step 8"):
        fit(experiment, workdir=tmp_path)
    more = changed(experiment, "loop.max_consecutive_skips", 4)
    assert fit(more, workdir=tmp_path / "4").summary["skipped_steps"] == 3
