"""Hooks: which are called with what, where in the loop, and what becomes of the run that they end."""

from __future__ import annotations

import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP
from jaxmp.runs.fit import fit, steps
from jaxmp.runs.hooks import Evaluated, HookFailed, Hooks, Pause, StepInfo, Stop
from jaxmp.runs.run import Run

pytestmark = pytest.mark.xdist_group("hooks")  # one worker: the fixture trains

TIMING = {"wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second"}


def blobs(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 2, 48)
    return {
        "image": (rng.integers(0, 100, (48, 4, 4, 1)) + 60 * label[:, None, None, None]).astype(np.uint8),
        "label": label,
    }


BASE = Experiment(
    MLP((4,), 2), Arrays(blobs, batch_size=4), loop=Loop(steps=12, log_every=3, eval_every=6, ema_decay=0.9)
)


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: of for name, of in record.items() if name not in TIMING} for record in records]


def bits(state):
    leaves = jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without hooks."""
    return fit(BASE, workdir=tmp_path_factory.mktemp("runs"), log=lambda text: None)


def test_hooks_see_each_dispatch_and_evaluation_in_the_fixed_order_and_change_no_bit(plain, tmp_path):
    seen = []

    def on_step(info: StepInfo):
        # The line of the dispatch before is on disk; that of this one is not.
        written = [line["step"] for line in lines(folder) if line["split"] == "train"]
        seen.append(("step", info.step, written[-1:], sorted(info.values())))

    def on_evaluation(evaluated: Evaluated):
        last = lines(evaluated.path)[-1]
        assert (last["split"], last["accuracy"]) == (evaluated.split, evaluated.metrics["accuracy"])
        saved = (evaluated.path / "checkpoints" / str(evaluated.step)).exists()
        seen.append((evaluated.split, evaluated.step, saved, int(evaluated.state.step)))

    folder = tmp_path / "experiment" / plain.path.name
    hooks = (on_step, on_evaluation, lambda either: seen.append(type(either).__name__))
    assert fit(BASE, workdir=tmp_path, hooks=hooks).path == folder
    names = ["accuracy", "loss"]
    assert [each for each in seen if not isinstance(each, str)] == [
        ("step", 3, [], names),
        ("step", 6, [3], names),
        ("validation", 6, False, 6),
        ("step", 9, [6], names),
        ("step", 12, [9], names),
        ("validation", 12, False, 12),
        ("test", 12, True, 12),
    ]
    assert seen.count("StepInfo") == 4 and seen.count("Evaluated") == 3
    assert lines(folder) == lines(plain.path)
    assert bits(Run(folder, BASE).state()) == bits(Run(plain.path, BASE).state())


def test_a_run_and_what_fit_returns_show_their_curves_in_a_notebook(plain):
    html = plain._repr_html_()
    assert html == Run(plain.path)._repr_html_() and html.startswith('<div class="jaxmp">')
    for part in ("finished", "mixed_float16", "test accuracy, %", "Skipped steps: no step was skipped.", "<svg"):
        assert part in html


@pytest.mark.slow
def test_a_hook_that_raises_leaves_a_run_that_is_saved_and_goes_on_to_the_same_bits(plain, tmp_path):
    def plotting(info: StepInfo):
        if info.step == 9:
            raise KeyError("axis")

    with pytest.raises(
        RunFailed, match=r"hook .*plotting raised KeyError: 'axis', after step 9.*saved.*the same call"
    ) as error:
        fit(BASE, workdir=tmp_path, hooks=(plotting,))
    assert isinstance(error.value.__cause__, KeyError)
    folder = tmp_path / "experiment" / plain.path.name
    assert Run(folder, BASE).state().step == 9 and "plotting" in Run(folder, BASE).failure
    assert not fit(BASE, workdir=tmp_path).stopped
    assert lines(folder) == lines(plain.path) and Run(folder, BASE).failure is None
    assert bits(Run(folder, BASE).state()) == bits(Run(plain.path, BASE).state())


@pytest.mark.slow
def test_a_hook_that_deletes_the_state_is_named_and_the_run_goes_on_from_the_last_checkpoint(plain, tmp_path):
    def deleting(info: StepInfo):
        if info.step == 9:
            jax.tree.leaves(info.state.params)[0].delete()

    with pytest.raises(RunFailed, match=r"deleting deleted or donated arrays.*goes on from the last checkpoint"):
        fit(BASE, workdir=tmp_path, hooks=(deleting,))
    folder = tmp_path / "experiment" / plain.path.name
    assert Run(folder, BASE).state().step == 6
    fit(BASE, workdir=tmp_path)
    assert lines(folder) == lines(plain.path)
    assert bits(Run(folder, BASE).state()) == bits(Run(plain.path, BASE).state())


@pytest.mark.slow
def test_a_hook_of_the_last_evaluation_that_raises_leaves_a_run_that_ends_by_the_same_call(plain, tmp_path):
    def tracking(evaluated: Evaluated):
        assert evaluated.split != "test", "offline"

    with pytest.raises(RunFailed, match="tracking raised AssertionError: offline"):
        fit(BASE, workdir=tmp_path, hooks=(tracking,))
    fit(BASE, workdir=tmp_path)
    folder = tmp_path / "experiment" / plain.path.name
    assert lines(folder) == lines(plain.path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StepInfo, Evaluated])
def test_a_hook_ends_the_run_with_its_reason_and_a_killed_one_still_ends_there(plain, tmp_path, kind):
    def early(info):
        return Stop("enough") if type(info) is kind and info.step >= 9 - 3 * (kind is Evaluated) else None

    at = 9 if kind is StepInfo else 6
    said = []
    summary = fit(BASE, workdir=tmp_path, hooks=(early,), log=said.append).summary
    assert (summary["steps"], summary["stopped_early"]) == (at, True)
    assert summary["stopped_because"].startswith("enough (hook ") and "early" in summary["stopped_because"]
    assert any(f"stopped after step {at}: enough" in text for text in said)
    folder = tmp_path / "experiment" / plain.path.name
    whole = lines(folder)
    assert [(line["step"], line["split"]) for line in whole[-3:]] == [
        (at, "train"), (at, "validation"), (at, "test")
    ]  # fmt: skip
    (folder / "summary.json").unlink()  # as a kill before it was written leaves the folder
    again = fit(BASE, workdir=tmp_path).summary
    assert lines(folder) == whole and {**again, "wall_seconds": 0} == {**summary, "wall_seconds": 0}


def two(info, more):
    """Takes too much."""


def named(value: jaxmp.StepInfo | jaxmp.Evaluated):
    """Takes both."""


def test_a_pause_saves_a_run_that_ends_by_the_same_call_with_the_same_bits(plain, tmp_path):
    said = []

    def pause(evaluated: Evaluated):
        return Pause("enough for now")

    paused = fit(BASE, workdir=tmp_path, hooks=(pause,), log=said.append)
    assert paused.stopped and not (paused.path / "summary.json").exists() and paused.summary == {}
    assert any("stopped at step 6 (enough for now (hook " in text for text in said)
    ended = fit(BASE, workdir=tmp_path, log=said.append)
    assert not ended.stopped and "stopped_because" not in ended.summary
    assert lines(ended.path) == lines(plain.path)
    assert bits(Run(ended.path, BASE).state()) == bits(Run(plain.path, BASE).state())


def test_a_stop_counts_before_a_pause_of_the_same_step():
    both = Hooks((lambda info: Pause("later"), lambda info: Stop("enough")))
    found = both.call(StepInfo(1, None, {}))
    assert isinstance(found, Stop) and found.why.startswith("enough (hook ")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (print, r"expected a tuple of functions, \(function,\)"),
        ((3,), r"hooks\[0\] = 3: expected a function of a StepInfo"),
        ((named, two), r"hooks\[1\] = two: takes 2 arguments; expected one"),
        ((lambda: None,), "takes no argument"),
        ((functools.partial(two, more=1), StepInfo), r"hooks\[1\] = StepInfo: expected a function"),
    ],
)
def test_what_is_no_hook_is_refused_before_anything_is_written(hooks, message, tmp_path):
    with pytest.raises(InputError, match=message):
        fit(BASE, workdir=tmp_path / "runs", hooks=hooks)
    assert not (tmp_path / "runs").exists()


def test_the_annotation_says_what_a_hook_is_called_with():
    def of(annotation):
        def hook(value): ...

        hook.__annotations__["value"] = annotation
        return hook

    info, evaluated = (kind(*[None] * len(kind._fields)) for kind in (StepInfo, Evaluated))
    for annotation, expected in [
        (StepInfo, (1, 0)),
        ("StepInfo", (1, 0)),
        ("missing.Evaluated", (0, 1)),
        (StepInfo | Evaluated, (1, 1)),
        ("missing.StepInfo | missing.Evaluated", (1, 1)),
    ]:
        hooks = Hooks((of(annotation),))
        counted = tuple(sum(type(value) in kinds for _, _, kinds in hooks._hooks) for value in (info, evaluated))
        assert counted == expected, annotation
    Hooks((functools.partial(lambda value, more: None, more=0),))  # takes one argument
    with pytest.raises(InputError, match=r"annotated int; expected jaxmp.StepInfo"):
        Hooks((of(int),))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (Stop, "the class Stop"),
        (Pause, "the class Pause"),
        (True, "returned True"),
        ("delete", "deleted or donated"),
    ],
)
def test_what_a_hook_must_not_do_is_said(returned, message):
    state = jnp.ones(3)

    def hook(info: StepInfo):
        return state.delete() if returned == "delete" else returned

    with pytest.raises(HookFailed, match=message):
        Hooks((hook,)).call(StepInfo(1, state, {}))


def test_no_hooks_cost_less_than_a_hundredth_of_a_step_of_2_5_ms():
    hooks, info = Hooks(), StepInfo(1, None, {})
    started = time.perf_counter()
    for _ in range(1000):
        hooks.call(info)
    assert time.perf_counter() - started < 1000 * 25e-6


@pytest.mark.slow
def test_steps_yield_what_hooks_are_called_with():
    last = list(steps(dataclasses.replace(BASE, loop=Loop(steps=6, log_every=3))))[-1]
    assert type(last) is StepInfo and last.step == 6 and 0 <= last.values()["accuracy"] <= 1
