"""Studies of many trials: the space, the lock rule, trials that are runs of `train`, workers that are killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxmp.cli import main
from jaxmp.commands.tune import READY, RESTARTS, _Workers
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP
from jaxmp.reports import study_report
from jaxmp.runs.fit import Fitted, fit
from jaxmp.runs.folder import FolderInUse, RunFolder
from jaxmp.runs.run import Run
from jaxmp.studies.tune import tune
from jaxmp.studies.tune_compiled import shared_compiles
from jaxmp.studies.tune_space import Choices, Range, Space, Subject
from jaxmp.studies.tune_study import (
    JOURNAL_LINE,
    Definition,
    StudyFolder,
    drop_torn_line,
    make_sampler,
    open_study,
    study_to_json,
)
from jaxmp.training.optimizers import SGD, Adam
from jaxmp.training.pruning import Pruning

optuna = pytest.importorskip("optuna", minversion="5", reason="the extra tune is not installed")
pytestmark = pytest.mark.xdist_group("tune")

CONFIG = '''\
"""Blobs of two classes."""
import numpy as np
from jaxmp import SGD, Arrays, Experiment, Loop
from jaxmp.models.mlp import MLP


def blobs(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 2, 48)
    image = rng.integers(0, 100, (48, 4, 4, 1)) + 60 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


def get_config():
    loop = Loop(steps=STEPS, log_every=3, eval_every=6, save_every=6, steps_per_dispatch=3)
    return Experiment(MLP((4,), 2), Arrays(blobs, batch_size=4), optimizer=SGD(0.1), precision="float32", loop=loop)
'''


def blobs(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 2, 48)
    image = rng.integers(0, 100, (48, 4, 4, 1)) + 60 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


BASE = Experiment(
    MLP((4,), 2),
    Arrays(blobs, batch_size=4),
    optimizer=SGD(0.1),
    precision="float32",
    loop=Loop(steps=12, log_every=3, eval_every=6),
)
SUBJECT = Subject(BASE, "experiment")


def write_config(folder, steps=12):
    path = folder / "blobs.py"
    path.write_text(CONFIG.replace("STEPS", str(steps)))
    return path


def quiet(text):
    """A log that shows nothing."""


def bits(run, experiment=None):
    state = Run(run, experiment).state()
    leaves = jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


# The space.


def test_a_space_names_leaves_as_the_command_line_and_python_do():
    texts = ["optimizer.learning-rate=log:1e-4:1e-1", "data.batch-size=linear:4:8", "precision=float32|p=f32,c=bf16"]
    space = Space.parse([*texts, "model.features=4,8 4", "optimizer.clip-norm=log:0.1:10"], SUBJECT)
    assert space.leaves["optimizer.learning_rate"] == Range(1e-4, 0.1, True, False)
    assert space.leaves["data.batch_size"] == Range(4, 8, False, True)
    assert space.leaves["precision"].texts == ("float32", "p=f32,c=bf16")
    drawn = {"optimizer.learning_rate": 0.012345678901234567, "data.batch_size": 6, "model.features": "8 4"}
    made = space.point(SUBJECT, drawn | {"precision": "p=f32,c=bf16", "optimizer.clip_norm": 0.5}, 3).experiment
    assert (made.optimizer.learning_rate, made.data.batch_size) == (0.012345678901234567, 6)
    assert (made.model.features, made.optimizer.clip_norm, made.seed) == ((8, 4), 0.5, 3)

    space = Space.parse({"optimizer": (SGD(0.1), Adam(1e-3)), "data.batch_size": (4, 8)}, SUBJECT)
    assert space.to_json() == {"optimizer": "SGD(),Adam()", "data.batch-size": "4,8"}
    assert [point["data.batch_size"] for point in space.points()] == ["4", "8", "4", "8"]
    assert space.point(SUBJECT, {"optimizer": "Adam()", "data.batch_size": "8"}, 0).experiment.optimizer == Adam(1e-3)


def test_a_field_of_floats_is_one_though_it_is_written_as_a_whole_number():
    subject = Subject(dataclasses.replace(BASE, optimizer=SGD(1, weight_decay=0)), "experiment")
    leaves = Space.parse(["optimizer.weight-decay=log:1e-5:1e-1", "optimizer.learning-rate=linear:1:8"], subject).leaves
    assert leaves["optimizer.weight_decay"] == Range(1e-5, 0.1, True, False)
    assert leaves["optimizer.learning_rate"] == Range(1, 8, False, False)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([], "nothing to vary"),
        ({}, "nothing to vary"),
        ("optimizer.learning_rate=log:1:2", "expected {"),
        (["optimizer.learning-rate"], "expected LEAF=log"),
        (["optimizer.lerning-rate=log:1:2"], "did you mean 'optimizer.learning-rate'"),
        (["learning-rate=log:1:2"], "did you mean 'optimizer.learning-rate'"),
        (["optimizer=1,2"], "has fields of its own; expected one of optimizer.learning-rate"),
        (["precision=log:1:2"], "is no number, it is 'float32'"),
        (["optimizer.nesterov=log:1:2"], "is no number, it is False"),
        (["optimizer.learning-rate=log:1:1e-3"], "expected LOW below HIGH"),
        (["optimizer.learning-rate=log:0:1"], "expected LOW above 0, or linear:0:1"),
        (["optimizer.learning-rate=log:a:1"], "expected two numbers"),
        (["optimizer.learning-rate=lgo:1:2"], "'lgo:1:2' is no value of this field, which is 0.1"),
        (["optimizer.learning-rate=log:1e-3:1", "optimizer.learning_rate=1,2"], "given twice"),
        (["data.batch-size=log:1.5:3"], "is a whole number"),
        (["data.batch-size=4,4"], "4 is given twice"),
        (["data.batch-size=4,0"], "0 is refused: data.batch_size = 0"),
        (["data.batch-size=4,"], "expected log:LOW:HIGH, linear:LOW:HIGH or VALUE,VALUE"),
        (["optimizer.momentum=linear:0:2"], "2.0 is refused"),
        (["precision=float32,floot16"], "did you mean 'float16'"),
        (["seed=0,1"], "expected --seeds 3"),
        (["loop.log-every=1,2"], "changes no result"),
        (["parallel.remat=none,layers"], "changes no result"),
        ({"data.batch_size": 4}, "expected a list of values"),
        ({"optimizer": (SGD(0.1),), "optimizer.learning_rate": (0.1, 0.2)}, "optimizer is varied as a whole"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_the_leaf_and_what_was_expected(space, message):
    with pytest.raises(InputError) as error:
        Space.parse(space, SUBJECT)
    assert message in str(error.value), error.value


def test_a_value_that_is_allowed_beside_another_leaf_alone_is_none_to_refuse():
    base = dataclasses.replace(BASE, optimizer=SGD(0.1, decay=()))  # weight decay wants a pattern
    space = {"optimizer.weight_decay": (0.0, 0.1), "optimizer.decay": ((), ("**/kernel",))}
    subject = Subject(base, "experiment")
    with pytest.raises(InputError, match=r"0\.1 is refused"):
        Space.parse({"optimizer.weight_decay": space["optimizer.weight_decay"]}, subject)
    parsed = Space.parse(space, subject)
    *_, both = parsed.points()
    assert parsed.point(subject, both, 0).experiment.optimizer == SGD(0.1, weight_decay=0.1, decay=("**/kernel",))
    refused = both | {"optimizer.decay": "()"}
    with pytest.raises(InputError, match="at least one pattern"):
        parsed.point(subject, refused, 0)


# The trials of a study, without training.

ASKED = Definition("c", "h", 0, [], {"x": "0,1,2"}, 3, 1, "loss", "min", "grid", "none")
POINTS = [{"x": text} for text in "012"]


def queue(path, definition=ASKED, points=POINTS, **how):
    return open_study(StudyFolder(path), definition, points, more={"metrics": {}}, **how)


def test_a_running_trial_is_taken_over_if_its_lock_is_free_and_only_then(tmp_path):
    first, second = queue(tmp_path / "study"), queue(tmp_path / "study")
    with first.take() as a, second.take() as b:
        assert (a.trial.number, a.again, b.trial.number, b.again) == (0, False, 1, False)
    # Neither told the study what came out: both are dead workers' now.
    with second.take() as c, first.take() as d, first.take() as e, second.take() as f:
        assert (c.trial.number, c.again, d.trial.number, d.again) == (0, True, 1, True)
        assert (e.trial.number, e.again, f) == (2, False, None)
        for taken in (c, d, e):
            assert taken.trial.suggest_categorical("x", tuple("012")) == str(taken.trial.number)
            first.study.tell(taken.trial.number, 0.0)
        with first.take() as nothing:
            assert nothing is None
    assert first.finished() and len(first.study.trials) == 3


def test_workers_of_another_folder_are_left_to_it(tmp_path):
    journal = str(tmp_path / "journal")
    said = []
    here, there = queue(tmp_path / "a/s", storage=journal), queue(tmp_path / "b/s", storage=journal, log=said.append)
    with here.take():
        pass
    for number in (1, 2):
        with there.take() as taken:
            assert (taken.trial.number, taken.again) == (number, False)
            there.study.tell(number, 0.0)
    with there.take() as nothing:
        assert nothing is None
    with here.take() as again:
        assert (again.trial.number, again.again) == (0, True)
    assert len(said) == 1 and "--heartbeat" in said[0]


def test_a_trial_that_another_machine_takes_first_is_not_trained_twice_and_none_is_made_anew(tmp_path):
    journal = str(tmp_path / "journal")
    here, there = (queue(tmp_path / name / "s", storage=journal, log=quiet) for name in "ab")
    ask, raced = here.study.ask, []

    def slow():  # each time, the other machine has taken the trial that this one saw waiting
        if len(raced) < 2:
            raced.append(there.study.ask())
        return ask()

    here.study.ask = slow
    with here.take() as taken:
        assert [trial.number for trial in raced] == [0] and taken.trial.number == 1
    with here.take() as again, here.take() as nothing:  # what was left behind first; then the last, which is gone
        assert (again.trial.number, again.again, nothing) == (1, True, None)
    states = [trial.state.name for trial in here.study.trials]
    assert states == ["RUNNING", "RUNNING", "RUNNING", "FAIL"]
    found = study_to_json(StudyFolder(tmp_path / "a/s"))
    assert [trial["state"] for trial in found["trials"]] == ["running"] * 3


def test_a_study_gets_those_trials_that_are_missing_and_no_other_question(tmp_path):
    chosen = ASKED._replace(sampler="random", space={"x": "linear:0:1"}, trials=2)
    assert len(queue(tmp_path / "s", chosen, None).study.trials) == 2
    assert len(queue(tmp_path / "s", chosen._replace(trials=5), None).study.trials) == 5
    said = []
    again = queue(tmp_path / "s", chosen, None, log=said.append)
    assert (len(again.study.trials), again.definition.trials) == (5, 5)
    assert said == ["--trials 2: the study has 5, and goes on with all"]
    with pytest.raises(InputError, match=r"space x is linear:0:2 \(was linear:0:1\); metric is accuracy \(was loss\)"):
        queue(tmp_path / "s", chosen._replace(space={"x": "linear:0:2"}, metric="accuracy"), None)
    with pytest.raises(InputError, match="expected the same --storage"):
        queue(tmp_path / "s", chosen, None, storage=str(tmp_path / "journal"))


def test_what_a_sampler_draws_depends_on_the_trial_and_on_no_worker():
    def drawn(number, seed=0):
        study = optuna.create_study(sampler=make_sampler(ASKED._replace(sampler="random", seed=seed), number))
        return study.ask().suggest_float("x", 0, 1)

    values = [drawn(0), drawn(1), drawn(0, seed=1)]
    assert len(set(values)) == 3 and [drawn(0), drawn(1), drawn(0, seed=1)] == values


def test_a_line_that_a_kill_tore_is_dropped_before_the_next_is_written(tmp_path):
    first = queue(tmp_path / "s")
    journal = tmp_path / "s" / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker')
    first.study.enqueue_trial({"x": "0"})
    assert journal.read_bytes().startswith(whole + b'{"op_code"') and len(queue(tmp_path / "s").study.trials) == 4
    (tmp_path / "empty").touch()
    drop_torn_line(tmp_path / "empty")
    drop_torn_line(tmp_path / "missing")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"storage": "nosuch://host/db"}, "expected a journal file, or a URL"),
        ({"storage": "postgresql+psycopg2cffi://h/db"}, "psycopg2cffi is not installed: pip install psycopg2cffi"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "tried for 0.1 s and not reached"),
        ({"storage": "journal", "heartbeat": 5.0}, "only with a database"),
        ({"storage": "sqlite://", "heartbeat": float("nan")}, "--heartbeat nan: expected 1 second or more"),
        ({"storage": "sqlite://", "heartbeat": float("inf")}, "--heartbeat inf: expected 1 second or more"),
        ({"storage": "sqlite://", "heartbeat": -60.0}, "--heartbeat -60: expected 1 second or more"),
        ({"storage": "nosuch://me:secret@host/db"}, "--storage nosuch://me@host/db: expected"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_message(how, message, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmp.studies.tune_study.REACH_SECONDS", 0.1)
    with pytest.raises(InputError, match=message):
        queue(tmp_path / "s", **how)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"step": 1, "loss": 2.0}\n', "; expected another file"),
        ('{"op_code":0,"worker\n{"op_code":4,"worker_id":"a"}\n', "; expected another file"),
        ('["op_code", "worker_id"]\n', "; expected another file"),
        ('{"a": 1}', ": its first line has no end"),
        ('{"op_code":0,"worker_id":"a","study', ": its first line has no end"),
        ("{", ": its first line has no end"),
        pytest.param(f'{{"a": "{"x" * JOURNAL_LINE}"}}\n', "; expected another file", id="a long line"),
        ("\0binary", ": its first line has no end"),
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_stays_as_it_is(tmp_path, text, why):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^--storage .*: is there and no journal of Optuna{why}"):
        queue(tmp_path / "s", storage=str(path))
    assert path.read_text() == text


def test_a_study_is_made_in_its_own_journal_of_which_a_kill_left_half_a_line_and_in_an_empty_file(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/journal.log").write_text('{"op_c')
    (tmp_path / "empty").touch()
    for how in ({}, {"storage": str(tmp_path / "empty")}):
        made = queue(tmp_path / ("t" if how else "s"), **how)
        assert len(made.study.trials) == 3
    assert len(queue(tmp_path / "t", storage=str(tmp_path / "empty")).study.trials) == 3


def test_what_fit_raises_is_a_result_or_a_reason_and_no_end_of_the_study(tmp_path, monkeypatch):
    raised = {
        0.1: TypeError("shapes (4,) and (8,)"),
        0.2: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nby 1 GiB"),
        0.3: RunFailed("the loss is NaN"),
    }

    def fails(experiment, **how):
        raise raised[experiment.optimizer.learning_rate]

    monkeypatch.setattr("jaxmp.studies.tune.fit", fails)
    space = {"optimizer.learning_rate": tuple(raised)}
    found = tune(BASE, space, sampler="grid", workdir=str(tmp_path), log=quiet)
    refused, no_memory, diverged = found["trials"]
    assert (refused["state"], refused["reason"]) == (
        "pruned", "no experiment allows this: TypeError: shapes (4,) and (8,)"
    )  # fmt: skip
    assert (no_memory["state"], no_memory["reason"]) == (
        "failed", "seed 0: out of memory: RESOURCE_EXHAUSTED: Out of memory"
    )  # fmt: skip
    assert (diverged["state"], diverged["reason"]) == ("failed", "seed 0: the loss is NaN")
    assert "importance" not in found  # for which Optuna imports scikit-learn: only a page and a cell show it
    assert found.best is None and "best             none" in str(found) and "no finite value" in found._repr_html_()

    def bug(experiment, **how):  # no fault of the values
        raise OSError("disk full")

    monkeypatch.setattr("jaxmp.studies.tune.fit", bug)
    with pytest.raises(OSError, match="disk full"):
        tune(BASE, space, sampler="grid", study="other", workdir=str(tmp_path), log=quiet)
    assert study_to_json(StudyFolder(tmp_path / "experiment/other"))["trials"][0]["state"] == "running"


def test_a_run_that_failed_before_is_not_trained_on_and_one_that_a_hook_ended_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmp.studies.tune.recorded_failure", lambda folder, experiment, log: "the loss is NaN")
    monkeypatch.setattr("jaxmp.studies.tune.fit", lambda *args, **how: pytest.fail("it was trained on"))
    how = {"sampler": "grid", "workdir": str(tmp_path), "log": quiet}
    (trial,) = tune(BASE, {"optimizer.learning_rate": (0.1,)}, **how)["trials"]
    assert (trial["state"], trial["reason"]) == ("failed", "seed 0: the loss is NaN")

    ended = Fitted(tmp_path, {"steps": 3, "stopped_because": "enough (hook early)"}, stopped=False)
    monkeypatch.setattr("jaxmp.studies.tune.recorded_failure", lambda folder, experiment, log: None)
    monkeypatch.setattr("jaxmp.studies.tune.fit", lambda *args, **how: ended)
    with pytest.raises(InputError, match="a hook ended this run early, after step 3: enough"):
        tune(BASE, {"optimizer.learning_rate": (0.2,)}, study="other", **how)


# The processes of `--jobs`.


def workers(folder, does, jobs=2):
    """The exit code of workers that run `does` in Python, and how often one was started."""
    ready = f"import os, signal\nopen({str(folder / 'started')!r}, 'a').write('x')\nfd = os.environ[{READY!r}]\n"
    code = _Workers([sys.executable, "-S", "-c", ready + does], jobs, ()).run()
    return code, len((folder / "started").read_text())


@pytest.mark.slow
def test_a_worker_that_was_killed_is_started_again_and_bad_input_is_said_once(tmp_path, capfd):
    say, gone = "if fd: os.write(int(fd), b'1')\n", tmp_path / "gone"
    kill = f"if not os.path.exists({str(gone)!r}):\n open({str(gone)!r}, 'w')\n os.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "a").mkdir()
    assert workers(tmp_path / "a", say) == (0, 2)
    assert workers(tmp_path, say + kill) == (0, 3)
    assert "killed by signal 9, and is started again" in capfd.readouterr().err
    (tmp_path / "b").mkdir()
    assert workers(tmp_path / "b", "raise SystemExit(2)") == (2, 1)
    (tmp_path / "c").mkdir()
    assert workers(tmp_path / "c", say + "raise SystemExit(75 if fd else 0)") == (75, 2)
    (tmp_path / "d").mkdir()
    assert workers(tmp_path / "d", say + "if not fd: os.kill(os.getpid(), 9)") == (1, 1 + 1 + 2 * RESTARTS)


def test_what_a_trial_compiles_is_kept_for_the_next_and_deleted_with_the_study(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    try:
        for over in (False, True):
            hits.clear()
            with shared_compiles("study", lambda over=over: over):
                jax.jit(lambda x: x * 3 + 1)(np.arange(7.0))
                assert list(tmp_path.glob("jaxmp/compiled/*/study/*"))
            assert bool(hits) == over
            assert jax.config.jax_compilation_cache_dir is None
        assert not list(tmp_path.glob("jaxmp/compiled/*/study"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


# Studies that train.


@pytest.mark.slow
def test_trials_that_differ_in_numbers_alone_compile_nothing_after_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before, compiled, seen = jax.config.jax_compilation_cache_dir, [], []
    jax.config.update("jax_compilation_cache_dir", None)
    jax.monitoring.register_event_listener(lambda event, **_: compiled.append(event) if "cache_misses" in event else 0)
    space = {"optimizer": [SGD(rate, weight_decay=rate, clip_norm=10 * rate) for rate in (0.1, 0.2, 0.3)]}
    how = {"sampler": "grid", "metric": "loss", "workdir": str(tmp_path), "log": lambda _: seen.append(len(compiled))}
    try:
        tune(BASE, space, seeds=2, **how)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert len(seen) == 3 and 0 < seen[0] == seen[-1]


@pytest.mark.slow
def test_each_trial_is_the_run_that_train_makes_and_what_goes_wrong_is_a_result(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path)
    study = ["tune", str(config), "--sampler", "grid", "--metric", "loss", "--workdir", str(tmp_path / "runs")]
    # 96 rows do not exist; a learning rate of 1e30 diverges.
    study += ["--space", "optimizer.learning-rate=0.1,1e30", "data.batch-size=4,96", "--loop.steps", "10"]
    assert main(study) == 0
    shown = capsys.readouterr().out
    assert "[trial 1/4] optimizer.learning-rate 0.1, data.batch-size 4: loss 0." in shown
    folder = StudyFolder(tmp_path / "runs/blobs/tune")
    found = study_to_json(folder)
    assert [trial["state"] for trial in found["trials"]] == ["done", "pruned", "failed", "pruned"]
    best, refused, diverged, _ = found["trials"]
    assert "no experiment allows this: " in refused["reason"] and "96" in refused["reason"]
    assert diverged["reason"].startswith("seed 0: ") and "loss" in diverged["reason"]
    assert best["seeds"]["0"] == best["value"] == min(Run(best["runs"][0]).curve("loss", "validation")[1])

    # The command of the best makes the same run elsewhere, to the bit.
    command = study_report.command_of(found, best)
    assert command in shown
    words = command.split()[1:]
    words[words.index("--workdir") + 1] = str(tmp_path / "alone")
    assert main(words) == 0
    (alone,) = (tmp_path / "alone/blobs").iterdir()
    assert alone.name == Path(best["runs"][0]).name and bits(alone) == bits(best["runs"][0])

    # The same command only reads; another space is refused, and so is other code.
    assert main(study) == 0 and study_to_json(folder) == found
    capsys.readouterr()
    for arguments, message in (
        ([*study, "--space", "data.batch-size=4,8"], "is another study: space optimizer.learning-rate is not varied"),
        ([*study, "--metric", "los"], "did you mean 'loss'"),
        ([*study, "--trials", "3"], "a grid has its 4 points"),
        ([*study, "--jobs", "0"], "--jobs 0"),
        ([*study, "--study", "a/b"], "--study 'a/b'"),
        ([*study, "--storage", "sqlite:///x.db"], "expected the same --storage"),
        ([*study, "--pruner", "wilcoxon"], "expected 5 or more"),
        ([*study, "--sampler", "cmaes"], "expected two or more"),
        ([*study, "--workdir", ""], "workdir"),
        ([*study, "--data.batch-size", "8"], "the study varies it"),
        (["report", str(folder.path), best["runs"][0]], "expected it alone"),
        (["report", best["runs"][0], "--storage", "x"], "is no study"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    config.write_text(config.read_text().replace("60 * label", "61 * label"))
    assert main(study) == 2 and "has changed since" in capsys.readouterr().err

    # The page has all of it.
    assert main(["report", str(folder.path)]) == 0
    page = (folder.path / "report.html").read_text()
    assert command in page.replace("&#x27;", "'") and refused["reason"][:40] in page and "History" in page
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(folder.path)]) == 2 and "pip install 'jaxmp[tune]'" in capsys.readouterr().err


@pytest.mark.slow
def test_pruned_trials_are_saved_and_train_goes_on_with_them(tmp_path):
    base = dataclasses.replace(BASE, loop=dataclasses.replace(BASE.loop, steps=24))
    space = {"optimizer.learning_rate": (0.1, 0.2, 0.3, 0.4, 0.5, 1e-9)}
    found = tune(base, space, sampler="grid", pruner="median", metric="loss", workdir=str(tmp_path), log=quiet)
    *others, last = found["trials"]
    assert last["state"] == "pruned" and last["curve"][0][0] == 25 and len(last["curve"]) < 4
    assert {trial["state"] for trial in others[:5]} <= {"done", "pruned"} and found.best in others
    assert str(found).splitlines()[0].startswith("trial") and "<svg" in found._repr_html_()
    found.save(tmp_path / "page.html")
    assert json.loads((tmp_path / "page.json").read_text())["best"] == found["best"]

    slow = dataclasses.replace(base, optimizer=SGD(1e-9))
    fitted = fit(slow, workdir=tmp_path, log=quiet)
    alone = fit(slow, workdir=tmp_path / "alone", log=quiet)
    assert str(fitted.path) == last["runs"][0] and bits(fitted.path, slow) == bits(alone.path, slow)


@pytest.fixture
def made_up(monkeypatch):
    """`made_up(loss)` lets `loss(experiment)` be the validation loss of a run, which nothing trains."""

    def use(loss):
        def fits(experiment, workdir, name, **how):
            folder = RunFolder.of(experiment, workdir, name)
            folder.create()
            folder.write_lines([{"step": 12, "split": "validation", "loss": loss(experiment)}])
            return Fitted(folder.path, {}, stopped=False)

        monkeypatch.setattr("jaxmp.studies.tune.fit", fits)

    return use


def test_a_trial_with_pruning_is_judged_by_pruned_weights(tmp_path, monkeypatch):
    def fits(experiment, workdir, name, **how):
        folder = RunFolder.of(experiment, workdir, name)
        folder.create()
        line = {"split": "validation", "skipped_steps": 0}
        dense, pruned = {"step": 6, "loss": 0.1, "sparsity": 0.0}, {"step": 12, "loss": 0.7, "sparsity": 0.5}
        folder.write_lines([line | dense, line | pruned])
        return Fitted(folder.path, {}, stopped=False)

    monkeypatch.setattr("jaxmp.studies.tune.fit", fits)
    base = dataclasses.replace(BASE, pruning=Pruning(0.5))
    space = {"optimizer.learning_rate": (0.1,)}
    found = tune(base, space, sampler="grid", metric="loss", workdir=str(tmp_path), log=quiet)
    assert found.best["value"] == 0.7


@pytest.mark.parametrize(
    ("when", "runs", "states"),
    [
        ("the folder is in use", [0], ["running", "waiting"]),
        ("the first seed ends", [0], ["running", "waiting"]),
        ("the last seed ends", [0, 1], ["done", "waiting"]),
    ],
)
def test_a_signal_stops_a_worker_wherever_it_is(tmp_path, made_up, when, runs, states):
    trained, said = [], []

    def loss(run):
        trained.append(run.seed)
        if when != "the last seed ends" or run.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if when == "the folder is in use":
            raise FolderInUse("another process trains in it")
        return 1.0

    made_up(loss)
    space = {"optimizer.learning_rate": (0.1, 0.2)}
    found = tune(BASE, space, sampler="grid", seeds=2, metric="loss", workdir=str(tmp_path), log=said.append)
    assert found is None and said[-1] == "stopped, and the run is saved; the same command goes on"
    trials = study_to_json(StudyFolder(tmp_path / "experiment/tune"))["trials"]
    assert (trained, [trial["state"] for trial in trials]) == (runs, states)


def test_a_trial_that_another_worker_took_over_ends_no_worker(tmp_path, made_up):
    said = []

    def loss(run):
        if run.optimizer.learning_rate == 0.1:
            study = open_study(folder, folder.read()["definition"], POINTS).study
            study.tell(0, state=optuna.trial.TrialState.FAIL)
        return 1.0

    made_up(loss)
    folder = StudyFolder(tmp_path / "experiment/tune")
    space = {"optimizer.learning_rate": (0.1, 0.2)}
    found = tune(BASE, space, sampler="grid", metric="loss", workdir=str(tmp_path), log=said.append)
    assert [trial["state"] for trial in found["trials"]] == ["done"]
    assert said[0] == "trial 1: another worker took it over; its run is kept"


def test_a_config_varied_from_python_has_a_command_with_each_value_or_none(tmp_path, made_up):
    made_up(lambda run: run.optimizer.learning_rate + len(run.model.features))
    config = ConfigFile.find(str(write_config(tmp_path)))
    space = {"model.features": ((4, 3),), "optimizer.nesterov": (False,)}
    found = tune(config, space, sampler="grid", metric="loss", workdir=str(tmp_path / "runs"), log=quiet)
    command = study_report.command_of(found, found.best)
    assert "--model.features 4 3 --optimizer.no-nesterov --seed 0" in command
    made = config.experiment(command.partition("--workdir")[0].split()[3:])
    assert str(RunFolder.of(made, tmp_path / "runs", "blobs").path) == found.best["runs"][0]
    assert any(">(4, 3)<" in svg for _, svg, _ in study_report._slices(found))

    of_file = Subject(config, "blobs")
    space = Space({"optimizer": Choices(("Adam()",), (Adam(1e-3),))})
    point = space.point(of_file, {"optimizer": "Adam()"}, 0)
    assert (point.experiment.optimizer, point.arguments, of_file.origin([])) == (Adam(1e-3), [], None)


def test_a_flag_is_varied_as_the_command_line_spells_it():
    subject = Subject(dataclasses.replace(BASE, optimizer=SGD(0.1, momentum=0.9)), "experiment")
    space = Space.parse(["optimizer.nesterov=True,False"], subject)
    made = [space.point(subject, point, 0).experiment.optimizer.nesterov for point in space.points()]
    assert made == [True, False]
    config = ConfigFile(
        "flags", CONFIG.replace("STEPS", "3").replace("SGD(0.1)", "SGD(0.1, momentum=0.9)"), "/flags.py"
    )
    with pytest.raises(InputError, match=r"--optimizer\.nesterov: the study varies it"):
        Space.parse(["optimizer.nesterov=True,False"], Subject(config, "flags", ("--optimizer.no-nesterov",)))


@pytest.mark.slow
def test_wilcoxon_ends_a_trial_over_paired_seeds_and_the_best_has_all_of_them(tmp_path, made_up):
    # What a seed adds is far more than what the rate does.
    made_up(lambda run: run.seed % 5 + 0.1 * run.optimizer.learning_rate)
    space = {"optimizer.learning_rate": (0.2, 0.5, 0.1)}
    how = {"sampler": "grid", "seeds": 8, "pruner": "wilcoxon", "metric": "loss"}
    found = tune(BASE, space, **how, workdir=str(tmp_path), log=quiet)
    first, worse, best = found["trials"]
    assert (len(first["seeds"]), len(worse["seeds"]), len(best["seeds"])) == (8, 5, 8) and found.best == best
    assert worse["state"] == "pruned" and worse["reason"] == "worse than the best trial on the same 5 seeds (Wilcoxon)"
    # Over four seeds it is worse by p = 1/16, but its mean of them, 1.55, would have been the best of the study.
    assert worse["value"] == pytest.approx(2 + 0.05) and best["value"] == pytest.approx(13 / 8 + 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random"])
def test_each_sampler_makes_the_number_of_trials_and_draws_again_what_it_drew(tmp_path, made_up, sampler):
    made_up(lambda run: (run.optimizer.momentum - 0.5) ** 2 + abs(np.log10(run.optimizer.learning_rate) + 1))
    space = {"optimizer.learning_rate": "log:1e-3:1", "optimizer.momentum": "linear:0:0.9"}
    count = 25 if sampler == "tpe" else 8
    how = {"sampler": sampler, "trials": count, "metric": "loss", "log": quiet}
    found, again = (tune(BASE, space, **how, workdir=str(tmp_path / name)) for name in "ab")
    assert [trial["state"] for trial in found["trials"]] == ["done"] * count
    drawn = [trial["params"] for trial in found["trials"]]
    assert len({json.dumps(params) for params in drawn}) == count
    assert drawn == [trial["params"] for trial in again["trials"]]
    assert "History" in study_report.cell(found) and len(found["importance"]) == 2
    if sampler == "tpe":  # it learned where the loss is less; CMA-ES needs 60 trials for that
        values = [trial["value"] for trial in found["trials"]]
        assert np.median(values[15:]) < np.median(values[:10])


# Workers.


def start(config, workdir, *arguments):
    """A process of `jaxmp tune`; what it says goes to a file."""
    command = [sys.executable, "-m", "jaxmp", "tune", str(config), "--workdir", str(workdir), *arguments]
    with config.with_name("said").open("a") as said:
        return subprocess.Popen(command, stdout=said, stderr=said)


def finish(worker, config, code=0):
    assert worker.wait() == code, config.with_name("said").read_text()[-3000:]


def results(folder):
    """What is the same whoever trained it: state, value and parameters of each trial, and the weights of its run."""
    trials = study_to_json(StudyFolder(folder))["trials"]
    return [(trial["state"], trial["value"], trial["params"], bits(trial["runs"][0])) for trial in trials]


@pytest.mark.slow
def test_two_jobs_give_the_grid_results_of_one_to_the_bit(tmp_path):
    config = write_config(tmp_path)
    grid = ("--sampler", "grid", "--space", "optimizer.learning-rate=0.1,0.2,0.3", "data.batch-size=4")
    for jobs in ("1", "2"):
        finish(start(config, tmp_path / jobs, *grid, "--jobs", jobs), config)
    one, two = (results(tmp_path / jobs / "blobs/tune") for jobs in "12")
    assert len(one) == 3 and one == two


STEPS = 6_000
LONG = (
    *("--sampler", "grid", "--loop.eval-every", "1500", "--loop.save-every", "300"),
    *("--space", "optimizer.learning-rate=0.1,0.2,0.3,0.4,0.5,0.6", "data.batch-size=4,8"),
)


class Killed:
    """A study whose workers are killed at random moments, beside one of a single worker that is left alone."""

    def __init__(self, folder, *more):
        self.config, self.workdir, self.more = write_config(folder, STEPS), folder / "killed", more
        began = time.monotonic()
        finish(start(self.config, folder / "plain", *LONG), self.config)
        self.seconds = time.monotonic() - began
        self.plain = results(folder / "plain/blobs/tune")

    def start(self):
        return start(self.config, self.workdir, *LONG, *self.more)

    def trials(self):
        return study_to_json(StudyFolder(self.workdir / "blobs/tune"), *self.more[1:2])["trials"]

    def run(self, workers, kills):
        """Kills one of so many workers so many times, each time starts another, and waits for all."""
        rng, running = random.Random(0), [self.start() for _ in range(workers)]
        while not list(self.workdir.glob("blobs/*-s0/checkpoints/*")):  # some kills shall meet a trial
            time.sleep(0.2)
        for _ in range(kills):
            living = [i for i, worker in enumerate(running) if worker.poll() is None]
            assert living, "the study had ended before the kills had; expected a longer one"
            index = rng.choice(living)
            running[index].send_signal(signal.SIGKILL)
            running[index].wait()
            running[index] = self.start()
            time.sleep(rng.uniform(0, self.seconds / 10))
        for worker in running:
            finish(worker, self.config)
        finish(self.start(), self.config)  # if the last to live was killed

    def check(self):
        """Every point is there once, with the value and the weights of `plain`, and each step has one line."""
        assert results(self.workdir / "blobs/tune") == self.plain
        assert len(self.trials()) == len(self.plain) == 12
        for trial in self.trials():
            lines = [line["step"] for line in Run(trial["runs"][0]).metrics if line["split"] == "train"]
            assert lines == list(range(3, STEPS + 1, 3))
        assert "goes on where another worker left it" in self.config.with_name("said").read_text()


@pytest.mark.full_size
@pytest.mark.parametrize("workers", [2, 4])
def test_a_study_whose_workers_are_killed_ten_times_ends_as_if_none_was(tmp_path, workers):
    study = Killed(tmp_path)
    study.run(workers, kills=10)
    study.check()


@pytest.mark.full_size
def test_jobs_that_are_stopped_save_and_the_same_command_goes_on(tmp_path):
    config = write_config(tmp_path, STEPS)
    jobs = start(config, tmp_path / "runs", *LONG, "--jobs", "2")
    while not list((tmp_path / "runs").glob("blobs/*-s0/checkpoints/*")):
        time.sleep(0.2)
    jobs.terminate()
    finish(jobs, config, 75)
    states = [trial["state"] for trial in study_to_json(StudyFolder(tmp_path / "runs/blobs/tune"))["trials"]]
    assert "running" in states and "failed" not in states
    finish(start(config, tmp_path / "runs", *LONG), config)
    assert {t["state"] for t in study_to_json(StudyFolder(tmp_path / "runs/blobs/tune"))["trials"]} == {"done"}


@pytest.fixture
def postgres(tmp_path):
    """The URL of a PostgreSQL server that this test started."""
    pytest.importorskip("psycopg", reason="psycopg, the driver of PostgreSQL, is not installed")
    homes = [Path(path) for path in ("/usr/lib/postgresql", "/usr/pgsql") if Path(path).is_dir()]
    found = [shutil.which("initdb"), *(str(path) for home in homes for path in sorted(home.glob("*/bin/initdb")))]
    initdb = next((path for path in reversed(found) if path), None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed: there is no initdb")
    folder = Path("/tmp") / f"jaxmp-postgres-{os.getpid()}"  # its socket's path has to be short
    folder.mkdir()
    as_user = {}
    if os.getuid() == 0:  # which PostgreSQL refuses
        as_user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run([initdb, "-D", folder / "data", "-A", "trust"], check=True, capture_output=True, **as_user)
    options = ["-k", folder, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen(
        [Path(initdb).resolve().with_name("postgres"), "-D", folder / "data", *options],
        stderr=subprocess.DEVNULL,
        cwd=folder,
        **as_user,
    )
    try:
        yield f"postgresql+psycopg://{'postgres' if as_user else os.environ.get('USER', '')}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder)


@pytest.mark.full_size
def test_two_workers_share_a_study_in_postgresql_and_one_that_is_killed_loses_nothing(tmp_path, postgres):
    study = Killed(tmp_path, "--storage", postgres)
    study.run(2, kills=4)
    study.check()
    assert not (study.workdir / "blobs/tune/journal.log").exists()


@pytest.mark.full_size
def test_by_signs_of_life_in_a_database_a_dead_workers_trial_is_gone_on_with(tmp_path, postgres):
    study = Killed(tmp_path, "--storage", postgres, "--heartbeat", "5")
    study.run(1, kills=1)
    time.sleep(25)  # more than four signs of life that did not come
    finish(study.start(), study.config)
    study.check()
