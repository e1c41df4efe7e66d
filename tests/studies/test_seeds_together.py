"""Seeds that are trained by one program: places, slices, runs that end, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop
from jaxmp.models.mlp import MLP
from jaxmp.runs.fit import fit
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.studies import seeds_together
from jaxmp.studies.seeds_together import NotTogether, SeedsTogether, require_together
from jaxmp.studies.tune import tune
from jaxmp.studies.tune_study import Definition
from jaxmp.training.feed import Resident
from jaxmp.training.optimizers import SGD

pytest.importorskip("optuna", minversion="5", reason="the extra tune is not installed")
pytestmark = pytest.mark.xdist_group("tune")

SEEDS = 3


def blobs(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 2, 48)
    image = rng.integers(0, 100, (48, 4, 4, 1)) + 60 * label[:, None, None, None]
    return {"image": image.astype(np.uint8), "label": label}


BASE = Experiment(
    MLP((4,), 2, dropout=0.2),
    Arrays(blobs, batch_size=5),
    optimizer=SGD(0.1, momentum=0.9),
    precision="float32",
    loop=Loop(steps=24, log_every=3, eval_every=6, keep=9),
)
SPACE = {"optimizer.learning_rate": (0.1,)}


def quiet(text):
    """A log that shows nothing."""


def study(workdir, base=BASE, together=True, **how):
    how = {"sampler": "grid", "metric": "loss", "seeds": SEEDS, "log": quiet} | how
    return tune(base, SPACE, seeds_together=together, workdir=str(workdir), **how)


def paths(workdir):
    return [next(workdir.glob(f"experiment/*-s{seed}")) for seed in range(SEEDS)]


def bits(run):
    state = Run(run, dataclasses.replace(BASE, seed=int(run.name.rpartition("-s")[2]))).state()
    leaves = jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def lines(run):
    timed = ("seconds", "per_second", "utilization", "memory", "time")
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in Run(run).metrics]


# The meeting of the threads, without training.


class Counting(Resident):
    """A feed whose state is (steps done, sum of what it drew), for which a step adds its run's own number."""

    devices = SimpleNamespace(compile=lambda program, in_axes: jax.jit(program, donate_argnums=0))
    columns: ClassVar = {}

    def __init__(self, own, dispatched):
        self.own = own

        def many_steps(state, metrics, columns, rows, own, count):
            dispatched.append(count)  # once: when it is traced
            return jax.lax.fori_loop(0, count, lambda _, s: (s[0] + 1, s[1] + own * rows[s[0] % 4]), state), metrics

        self.many_steps = many_steps

    def data(self, first):
        return {}, jnp.arange(4.0) + self.own, jnp.float32(self.own)


def counted(group, place, own, stops, first=0, dispatched=None):
    """The state of a run that dispatches to each of `stops`."""
    feed = seeds_together._SharedFeed(place, Counting(own, [] if dispatched is None else dispatched))
    state, metrics = (jnp.int32(first), jnp.float32(0)), {"loss": jnp.float32(own)}
    for stop in stops:
        state, metrics = feed.run(state, metrics, first, stop - first)
        first = stop
    return int(state[0]), float(state[1]), float(metrics["loss"])


def alone(own, first, last):
    return last, float(sum(own * (step % 4 + own) for step in range(first, last))), float(own)


def test_each_run_receives_its_own_slice_whatever_the_others_do():
    traced = []
    stops = [(3, 6, 7, 12), (5, 12), (12,)]  # as of runs that go on from other checkpoints
    firsts, owns = (0, 2, 9), (1, 10, 100)

    def train(place):
        i = place.index
        if i == 1:
            time.sleep(0.02)
            place.leave()  # it waits for its folder
            time.sleep(0.02)
        return counted(group, place, owns[i], stops[i], firsts[i], traced)

    group = SeedsTogether(SEEDS)
    assert group.run(train) == [alone(own, first, 12) for own, first in zip(owns, firsts, strict=True)]
    assert len(traced) == 1  # one program for all, also after some have ended


def test_a_run_that_fails_stops_no_other_and_one_that_raises_pauses_them():
    def train(place):
        if place.index == 1:
            return "failed"
        found = counted(group, place, place.index + 1, (4, 8))
        return found if place.end(None) is None else "paused"

    group = SeedsTogether(SEEDS)
    assert group.run(train) == [alone(1, 0, 8), "failed", alone(3, 0, 8)]

    def raises(place):
        if place.index == 1:
            raise OSError("disk full")
        while place.end(None) is None:
            counted(group, place, 1, (1,))
        return "paused"

    group = SeedsTogether(SEEDS)
    first, error, last = group.run(raises)
    assert (first, last) == ("paused", "paused") and isinstance(error, OSError)


def test_a_run_sees_the_settings_of_the_thread_that_asked_for_it():
    with jax.default_matmul_precision("highest"), jax.enable_x64(True), jax.debug_nans(True):
        seen = SeedsTogether(2).run(lambda place: (jax.config.jax_default_matmul_precision, jnp.float64(1).dtype.name))
    assert seen == [("highest", "float64")] * 2


def test_an_error_after_the_first_dispatch_is_raised_as_it_is():
    def train(place):
        feed = Counting(1, [])
        shared = seeds_together._SharedFeed(place, feed)
        state = shared.run((jnp.int32(0), jnp.float32(0)), {}, 0, 3)[0]
        feed.data = lambda first: ({}, jnp.arange(5.0), jnp.float32(place.index))  # of another shape
        return shared.run((*state[:1], jnp.ones(place.index + 1)), {}, 3, 3)

    for error in SeedsTogether(2).run(train):
        assert isinstance(error, ValueError | TypeError) and not isinstance(error, NotTogether)


def test_a_program_that_cannot_be_made_is_a_reason_for_every_run():
    def train(place):
        feed = Counting(1, [])
        if place.index == 0:
            feed.many_steps = lambda *args: (_ for _ in ()).throw(NotImplementedError("Batching rule for 'x'"))
        shared = seeds_together._SharedFeed(place, feed)
        return shared.run((jnp.int32(0), jnp.float32(0)), {}, 0, 3)

    for error in SeedsTogether(2).run(train):
        assert isinstance(error, NotTogether) and "2 seeds cannot be made (Batching rule for 'x')" in str(error)


def test_a_study_that_trained_seeds_one_by_one_is_another_question():
    was = Definition("c", "h", 0, [], {"x": "0,1"}, 2, 3, "loss", "min", "grid", "none")
    assert was.differences(was._replace(seeds_together=True)) == ["seeds_together is true (was false)"]


@pytest.mark.parametrize(
    ("base", "how", "message"),
    [
        (BASE, {"seeds": 1}, "with --seeds 1 there is nothing to run together"),
        (BASE, {"seeds": 5, "pruner": "wilcoxon"}, "expected median, hyperband or none"),
        ({"is_streamed": True}, {}, "is streamed"),
        ({"fuse_steps": False}, {}, "the model has convolutions"),
        ({"devices": SimpleNamespace(count=4, mode="jit")}, {}, "there are 4; expected a worker for each"),
        ({"devices": SimpleNamespace(count=1, mode="pmap")}, {}, "parallel.mode is pmap"),
        ({"keys": "rbg"}, {}, "random keys are 'rbg'"),
    ],
)
def test_what_brings_nothing_or_cannot_be_together_is_refused_with_the_reason(tmp_path, base, how, message):
    with pytest.raises(InputError, match=f"--seeds-together: .*{message}"):
        if isinstance(base, dict):
            fits = {"devices": SimpleNamespace(count=1, mode="jit"), "is_streamed": False, "fuse_steps": True}
            with jax.default_prng_impl(base.pop("keys", "threefry2x32")):
                require_together(SimpleNamespace(**{**fits, **base}))
        else:
            study(tmp_path, base, **how)


def test_runs_that_differ_in_more_than_the_seed_or_in_their_rows_are_refused():
    group = SeedsTogether(2)
    group.refuse_other_program(Trainer(BASE))
    group.refuse_other_program(Trainer(dataclasses.replace(BASE, seed=1)))
    with pytest.raises(NotTogether, match=r"optimizer\.momentum = 0\.5 "):
        group.refuse_other_program(Trainer(dataclasses.replace(BASE, optimizer=SGD(0.1, momentum=0.5))))
    rows = {"image": jnp.zeros((4, 2))}
    assert group.share_columns(rows) is rows and group.share_columns({"image": jnp.zeros((4, 2))}) is rows
    for other in ({"image": jnp.ones((4, 2))}, {"image": jnp.zeros((5, 2))}, {"label": jnp.zeros((4, 2))}):
        with pytest.raises(NotTogether, match="rows of the seeds differ"):
            group.share_columns(other)


# Studies that train.

BOUND = 2e-4
"""Largest difference of a loss from that of a run alone: sums of at most 48 products and 24 steps, each of which rounds
by up to 2**-24 of a term, 7e-5 for values around 1; three times that, for the momentum, which adds up 10 steps."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of three seeds, one by one and together, and the rows that each place of the program was given."""
    folder, rows = tmp_path_factory.mktemp("studies"), {seed: [] for seed in range(SEEDS)}
    batched = seeds_together._batched

    def watched(many_steps):
        program = batched(many_steps)

        def together(states, metrics, columns, given, own, count):
            for seed in range(SEEDS):
                jax.debug.callback(
                    lambda step, x, seed=seed: rows[seed].append((int(step), x)), states[seed].step, given[seed]
                )
            return program(states, metrics, columns, given, own, count)

        return together

    one = study(folder / "one", together=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds_together, "_batched", watched)
        both = study(folder / "together")
    jax.effects_barrier()
    return one, both, folder, rows


@pytest.mark.slow
def test_seeds_together_are_the_runs_of_one_by_one_within_rounding(trained):
    one, both, folder, rows = trained
    for run, other in zip(paths(folder / "together"), paths(folder / "one"), strict=True):
        mine, theirs = lines(run), lines(other)
        assert run.name == other.name and len(mine) == len(theirs)
        for line, alone in zip(mine, theirs, strict=True):
            assert line.keys() == alone.keys()
            for name, value in line.items():
                near = pytest.approx(alone[name], abs=BOUND) if isinstance(value, float) else alone[name]
                assert value == near, (name, line, alone)
        config = RunFolder(run).read_config()
        assert config["seeds_together"] == f"{config['seed'] + 1} of 3"
        assert (run / "summary.json").is_file() and "seeds_together" not in RunFolder(other).read_config()
        # The rows of each step are those of the seed, to the bit.
        batches, per_epoch = Trainer(dataclasses.replace(BASE, seed=config["seed"])).batches, 10
        seen = sorted(rows[config["seed"]], key=lambda pair: pair[0])
        assert [step for step, _ in seen] == sorted({0, 3, 6, 9, 10, 12, 15, 18, 20, 21})
        for step, given in seen:
            assert np.array_equal(given, batches.epoch_rows(step // per_epoch))
    (trial,), (plain,) = both["trials"], one["trials"]
    assert trial["value"] == pytest.approx(plain["value"], abs=BOUND) and trial["state"] == "done"
    assert list(trial["seeds"]) == ["0", "1", "2"] and trial["runs"] == [
        str(path) for path in paths(folder / "together")
    ]
    assert both.best == trial
    losses = list(plain["seeds"].values())  # seeds are further apart than the bound, so that a mix-up shows
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 10 * BOUND


@pytest.mark.slow
def test_a_seed_that_diverges_leaves_the_others_as_they_are_to_the_bit(trained, tmp_path, monkeypatch):
    init = Trainer.init

    def broken(trainer):
        state = init(trainer)
        if trainer.experiment.seed != 1:
            return state
        return dataclasses.replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))

    monkeypatch.setattr(Trainer, "init", broken)
    (trial,) = study(tmp_path)["trials"]
    assert trial["state"] == "failed" and trial["reason"].startswith("seed 1: ")
    first, failed, last = paths(tmp_path)
    assert RunFolder(failed).read_failure() and not (failed / "summary.json").exists()
    for run in (first, last):
        assert bits(run) == bits(trained[2] / "together/experiment" / run.name)
        assert (run / "summary.json").is_file()


@pytest.mark.full_size
def test_runs_that_are_stopped_or_lie_at_other_steps_end_with_the_same_bits(trained, tmp_path, monkeypatch):
    whole = trained[2] / "together/experiment"
    step, seen = SeedsTogether._step, []

    def stops(group, asking):
        step(group, asking)
        seen.append(asking)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SeedsTogether, "_step", stops)
    assert study(tmp_path) is None
    monkeypatch.undo()
    runs = paths(tmp_path)
    assert not any((run / "summary.json").exists() for run in runs)
    stopped = [max(RunFolder(run).checkpoint_steps()) for run in runs]
    assert 0 < min(stopped) and max(stopped) < 24
    # As kills can leave them: one run lost its last checkpoint, one has not begun.
    if stopped[0] > 6:
        shutil.rmtree(runs[0] / "checkpoints" / str(stopped[0]))
    shutil.rmtree(runs[2])
    assert [trial["state"] for trial in study(tmp_path)["trials"]] == ["done"]
    for run in paths(tmp_path):
        assert bits(run) == bits(whole / run.name) and lines(run) == lines(whole / run.name)


@pytest.mark.slow
def test_a_run_of_several_seeds_goes_on_alone_and_says_so(trained, tmp_path):
    run = tmp_path / "experiment" / paths(trained[2] / "together")[0].name
    shutil.copytree(paths(trained[2] / "together")[0], run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints/24")
    said = []
    assert not fit(BASE, workdir=tmp_path, progress="none", log=said.append).stopped
    assert "this run goes on alone, after as 1 of 3 seeds in one program: sums are rounded in another order" in said
    assert RunFolder(run).read_config()["sessions"][0]["changed"]["seeds_together"] == {"was": "1 of 3", "is": None}


@pytest.mark.full_size
def test_a_pruned_trial_stops_all_its_seeds_which_are_saved(tmp_path):
    space = {"optimizer.learning_rate": (0.1, 0.2, 0.3, 0.4, 0.5, 1e-9)}
    how = {"sampler": "grid", "pruner": "median", "metric": "loss", "seeds": 2, "log": quiet}
    base = dataclasses.replace(BASE, loop=dataclasses.replace(BASE.loop, steps=60))
    last = tune(base, space, seeds_together=True, workdir=str(tmp_path), **how)["trials"][-1]
    assert last["state"] == "pruned" and "worse than other trials after" in last["reason"]
    assert len(last["runs"]) == 2
    for run in last["runs"]:
        assert not (Path(run) / "summary.json").exists() and RunFolder(Path(run)).checkpoint_steps()


CONFIG = """\"\"\"Blobs of two classes.\"\"\"
import numpy as np
from jaxmp import SGD, Arrays, Experiment, Loop
from jaxmp.models.mlp import MLP


def blobs(split):
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    return {"image": rng.integers(0, 100, (48, 4, 4, 1)).astype(np.uint8), "label": rng.integers(0, 2, 48)}


def get_config():
    loop = Loop(steps=3000, log_every=3, eval_every=1500, save_every=300)
    return Experiment(MLP((4,), 2), Arrays(blobs, batch_size=4), optimizer=SGD(0.1), precision="float32", loop=loop)
"""


@pytest.mark.full_size
def test_seeds_that_are_killed_together_end_with_the_bits_of_those_that_were_not(tmp_path):
    config = tmp_path / "blobs.py"
    config.write_text(CONFIG)

    def start(workdir):
        space = ["--sampler", "grid", "--space", "optimizer.learning-rate=0.1", "--seeds", "3", "--seeds-together"]
        command = [sys.executable, "-m", "jaxmp", "tune", str(config), *space, "--workdir", str(tmp_path / workdir)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert start("plain").wait() == 0
    for saved in (300, 1200, 2100):
        worker = start("killed")
        while not list((tmp_path / "killed").glob(f"blobs/*-s1/checkpoints/{saved}")):
            assert worker.poll() is None, "the study had ended before the kills had; expected a longer one"
            time.sleep(0.02)
        worker.kill()
        worker.wait()
    assert start("killed").wait() == 0
    for run in sorted((tmp_path / "plain/blobs").glob("*-s*")):
        killed = tmp_path / "killed/blobs" / run.name
        states = [jax.tree.leaves(Run(path).state().params) for path in (run, killed)]
        assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))
        assert lines(run) == lines(killed)
