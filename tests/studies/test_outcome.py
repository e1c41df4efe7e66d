"""What a study takes of a run that is there already: a failure of its numbers stays one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.models.mlp import MLP
from jaxmp.runs.fit import Fitted, fit
from jaxmp.runs.folder import RunFolder
from jaxmp.scaling.scalers import Scaling
from jaxmp.studies import compare, reproduce
from jaxmp.studies.claims import Train
from jaxmp.studies.grid import Cell
from jaxmp.studies.outcome import recorded_failure, require_all_steps

BRIGHTNESS = {"of class 1": 60}


def blobs(split):
    label = np.arange(48) % 2
    image = BRIGHTNESS["of class 1"] * label[:, None, None, None] + np.zeros((1, 4, 4, 1))
    return {"image": image.astype(np.uint8), "label": label}


EXPERIMENT = Experiment(
    MLP((4,), 2),
    Arrays(blobs, batch_size=4),
    precision="mixed_float16",
    scaler=Scaling("static", init_scale=2.0**30),
    loop=Loop(steps=6, log_every=2, eval_every=6, max_consecutive_skips=2),
)
CELL = Cell("mixed_float16", 0, EXPERIMENT, [])


def quiet(text):
    """A log that shows nothing."""


def with_loop(**changes):
    return dataclasses.replace(EXPERIMENT, loop=dataclasses.replace(EXPERIMENT.loop, **changes))


def trains_nothing(*args, **how):
    raise AssertionError("a run that had failed was trained on")


@pytest.mark.slow
def test_a_study_run_twice_has_the_failure_of_its_numbers_twice(tmp_path, monkeypatch):
    first = compare.train_cell(CELL, str(tmp_path), "blobs", None, quiet)
    folder = RunFolder.of(EXPERIMENT, tmp_path, "blobs")
    steps, said = folder.checkpoint_steps(), []
    assert "in a row were skipped" in first["failed"] and steps == [4]
    with monkeypatch.context() as patched:
        patched.setattr("jaxmp.studies.compare.fit", trains_nothing)
        again = compare.train_cell(CELL, str(tmp_path), "blobs", None, said.append)
    assert first["failed"].startswith(again["failed"]) and again["failed"] == folder.read_failure()
    assert (again["summary"], again["metrics"]) == ({}, first["metrics"])
    assert said[0] == f"{folder.path} failed before, and is not trained on; only jaxmp train goes on with it"

    # Settings that change no bit do not take it away, but for a larger limit of skips.
    for same in (with_loop(log_every=1), with_loop(max_consecutive_skips=1)):
        assert recorded_failure(folder, same, quiet) == again["failed"]
    more = with_loop(max_consecutive_skips=5)
    assert recorded_failure(folder, more, quiet) is None
    folder.write_failure(2, "the loss is NaN, at or before step 2")
    assert recorded_failure(folder, more, quiet) == "the loss is NaN, at or before step 2"
    # What a hook raised is mended in the hook, and `jaxmp train` goes on with any of them.
    folder.write_failure(2, "hook watch raised OSError: disk full, after step 2")
    assert recorded_failure(folder, EXPERIMENT, quiet) is None
    # Of other data or code it says nothing.
    folder.write_failure(2, "the loss is NaN, at or before step 2")
    with monkeypatch.context() as patched, pytest.raises(InputError, match=r"BRIGHTNESS.* has changed since"):
        patched.setitem(BRIGHTNESS, "of class 1", 61)
        recorded_failure(folder, EXPERIMENT, quiet)
    config = folder.read_config()
    folder.write_config(config | {"rows": {"train": config["rows"]["train"]}})
    with pytest.raises(InputError, match="the data have changed since"):
        recorded_failure(folder, EXPERIMENT, quiet)
    folder.write_config(config)
    with pytest.raises(RunFailed, match="in a row were skipped"):
        fit(EXPERIMENT, workdir=tmp_path, name="blobs", progress="none", log=quiet)
    assert folder.checkpoint_steps()[-1] > 4


def test_a_run_that_never_began_has_no_failure(tmp_path):
    assert recorded_failure(RunFolder(tmp_path / "none"), EXPERIMENT, quiet) is None


def test_a_run_that_a_hook_ended_is_refused_and_one_that_a_signal_stopped_is_not(tmp_path):
    require_all_steps(Fitted(tmp_path, {}, stopped=True))
    with pytest.raises(InputError, match="a hook ended this run early, after step 3: enough"):
        require_all_steps(Fitted(tmp_path, {"steps": 3, "stopped_because": "enough"}, stopped=False))


@pytest.fixture
def no_memory(monkeypatch):
    """`fit` runs out of memory before it has made a folder."""

    def fails(*args, **how):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nby 1 GiB")

    monkeypatch.setattr("jaxmp.studies.compare.fit", fails)


def test_a_run_without_memory_for_its_first_state_is_a_failed_one(tmp_path, no_memory):
    found = jaxmp.compare(EXPERIMENT, ["mixed_float16"], [0, 1], workdir=tmp_path, log=quiet)
    for run in found["runs"]:
        assert run["failed"] == "out of memory: RESOURCE_EXHAUSTED: Out of memory"
        assert (run["summary"], run["metrics"], run["devices"]) == ({}, [], [])
    assert found["monitor"] == "accuracy" and "loss" in found["metrics"]
    found.save(tmp_path / "c.html")
    assert "out of memory" in (tmp_path / "c.html").read_text()


def test_an_arm_without_memory_for_its_first_state_is_a_failed_one(tmp_path, no_memory):
    found = reproduce._trained(Train(EXPERIMENT), tmp_path, "paper", 0, str(tmp_path), quiet)
    assert found["failed"].startswith("out of memory") and found["seconds"] == 0.0
    assert found["run"].startswith("paper/") and "git" in found


def test_the_step_that_is_measured_is_the_one_that_was_trained(monkeypatch):
    class Seen(Exception):
        """Carries what a Trainer was made of."""

    def trainer(experiment):
        raise Seen(experiment.parallel)

    monkeypatch.setattr(compare, "Trainer", trainer)
    parallel = Parallel("pmap", remat=("Dense_*",), remat_policy="dots_saveable")
    with pytest.raises(Seen) as seen:
        compare._of_precision(CELL._replace(experiment=dataclasses.replace(EXPERIMENT, parallel=parallel)))
    assert seen.value.args[0] == dataclasses.replace(parallel, mode="jit")


def test_a_page_does_not_take_the_name_of_its_json(tmp_path):
    from jaxmp.studies.tune import Tuning

    for made in (compare.Comparison(runs=[]), Tuning(importance=None)):
        with pytest.raises(InputError, match=r"x\.json': the page would replace the JSON beside it; expected"):
            made.save(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
