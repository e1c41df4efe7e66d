"""The loop: one order of side effects, whatever stops it; and `fit`, which leaves a run."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import linecache
import math
import os
import shutil
import signal
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.augment import Augment
from jaxmp.distributed import signals
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.models.mlp import MLP
from jaxmp.runs import fit as loop
from jaxmp.runs.fit import fit, steps
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.hooks import StepInfo, Stop
from jaxmp.runs.replay import Past
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.historical import DeepSpeedScaler
from jaxmp.scaling.scalers import DynamicScaler, Scaling, StaticScaler
from jaxmp.scaling.transform import find_state, loss_scale, loss_scaling
from jaxmp.studies.overflow import blame_run
from jaxmp.tasks.classification import Classification
from jaxmp.training.metrics import compute
from jaxmp.training.optimizers import SGD, Adam, AdamW
from jaxmp.training.pruning import Pruning
from jaxmp.trees import by_path

pytestmark = pytest.mark.xdist_group("fit")  # one worker: the fixtures train

TIMING = {"wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second"}


def blobs(split):
    """100 images of two kinds, bright on the left or on the right."""
    rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
    label = rng.integers(0, 2, 100)
    image = rng.integers(0, 100, (100, 6, 6, 1))
    image[label == 1, :, :3] += 60
    return {"image": image.astype(np.uint8), "label": label}


def nothing(split):
    return None


class Normed(nn.Module):
    """Batch statistics and dropout: state and randomness that have to survive a restart."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8)(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(2)(nn.Dropout(0.2, deterministic=not train)(x))


BASE = Experiment(
    model=Normed(),
    data=Arrays(blobs, batch_size=16, augment=Augment(flip=True)),
    loop=Loop(steps=20, log_every=4, eval_every=10, save_every=5, ema_decay=0.9),
    optimizer=Adam(1e-2),
    scaler=Scaling(growth_interval=6),
)


def with_loop(experiment=BASE, **fields):
    return dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, **fields))


def bits(tree):
    leaves = jax.tree.leaves(tree)
    raw = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in raw]


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def final_state(folder, experiment):
    return Run(folder, experiment).state()


def run_of(last, loop_):
    for info in steps(with_loop(**loop_)):
        last = info
    return last


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of BASE."""
    return fit(BASE, workdir=tmp_path_factory.mktemp("runs"), name="blobs")


def cut_back(folder, to):
    """The folder as a `kill -9` leaves it between the checkpoint of step `to` and the next: lines are ahead of it."""
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name) > to:
            shutil.rmtree(checkpoint)


def damage(checkpoint):
    """Cuts a byte off the largest file of a checkpoint."""
    largest = max((checkpoint / "arrays").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def test_a_run_leaves_config_metrics_events_checkpoints_and_summary(finished):
    folder = finished.path
    assert folder.name == f"{BASE.hash}-s0" and folder.parent.name == "blobs"
    config = json.loads((folder / "config.json").read_text())
    assert config["hash"] == BASE.hash and config["versions"]["jax"] == jax.__version__
    assert [(r["step"], r["split"]) for r in lines(folder)] == [
        *[(s, "train") for s in (4, 5, 8, 10)],
        (10, "validation"),
        *[(s, "train") for s in (12, 15, 16, 20)],
        (20, "validation"),
        (20, "test"),
    ]
    assert json.loads((folder / "summary.json").read_text()) == finished.summary
    assert finished.summary["steps"] == 20 and not finished.stopped
    assert finished.summary["test"]["accuracy"] == lines(folder)[-1]["accuracy"]
    timed = [line for line in Run(folder).metrics if "steps_per_second" in line]
    speeds = [(line["examples_per_second"], line["steps_per_second"] * 100 / 7) for line in timed]  # rows of an epoch
    assert timed and all(examples == pytest.approx(of_steps) for examples, of_steps in speeds)
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [10, 15, 20]  # best, and the last two
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_finished_run_is_only_read(finished, monkeypatch):
    def gone(*_):
        raise FileNotFoundError("blobs.npz")

    monkeypatch.setattr(Arrays, "source", gone)  # the data are not needed, and may be gone
    before = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*")}
    said = []
    unread = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data))
    again = fit(unread, workdir=finished.path.parent.parent, name="blobs", log=said.append)
    assert len(said) == 1 and "blobs.npz" in said[0] and "whether the data have changed" in said[0]
    assert again.summary == finished.summary and not again.trained and finished.trained
    assert {p: p.stat().st_mtime_ns for p in finished.path.rglob("*")} == before


@pytest.mark.few_variants
@pytest.mark.parametrize("last_checkpoint", [15, 10, 0])
def test_a_killed_run_goes_on_to_the_same_bits_and_lines(finished, tmp_path, last_checkpoint):
    folder = tmp_path / "blobs" / finished.path.name
    shutil.copytree(finished.path, folder)
    cut_back(folder, last_checkpoint)
    resumed = fit(BASE, workdir=tmp_path, name="blobs")
    assert lines(folder) == lines(finished.path)
    assert bits(final_state(folder, BASE)) == bits(final_state(finished.path, BASE))
    assert resumed.summary["best"] == finished.summary["best"]


@pytest.mark.slow
def test_a_run_whose_optimizer_state_is_packed_goes_on_to_the_same_bits(tmp_path):
    optimizer = Adam(1e-2, state_format="mu=block128,nu=block128,expanded")
    experiment = with_loop(dataclasses.replace(BASE, optimizer=optimizer), steps=12)
    whole = fit(experiment, workdir=tmp_path / "whole", name="blobs")
    folder = tmp_path / "cut" / "blobs" / whole.path.name
    shutil.copytree(whole.path, folder)
    cut_back(folder, 5)
    fit(experiment, workdir=tmp_path / "cut", name="blobs")
    assert lines(folder) == lines(whole.path)
    state = final_state(folder, experiment)
    assert bits(state) == bits(final_state(whole.path, experiment))
    assert {"uint8", "bfloat16"} <= {str(x.dtype) for x in jax.tree.leaves(state.opt_state)}


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before_and_says_so(finished, tmp_path):
    folder = tmp_path / "blobs" / finished.path.name
    shutil.copytree(finished.path, folder)
    (folder / "summary.json").unlink()
    damage(folder / "checkpoints/20")
    said = []
    fit(BASE, workdir=tmp_path, name="blobs", log=said.append)
    assert "checkpoint 20" in said[0] and "is damaged" in said[0] and "from step 15" in said[1]
    assert lines(folder) == lines(finished.path)
    assert bits(final_state(folder, BASE)) == bits(final_state(finished.path, BASE))


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on_to_the_same_bits_and_lines(finished, tmp_path, monkeypatch):
    dispatches = loop._dispatches

    def interrupted(*args):
        for info in dispatches(*args):
            if info.step == 7:  # neither a line nor a checkpoint is due after this step
                os.kill(os.getpid(), signal.SIGTERM)
            yield info

    experiment = with_loop(steps_per_dispatch=1)  # so that a dispatch ends at step 7; it changes no bit
    monkeypatch.setattr(loop, "_dispatches", interrupted)
    said = []
    stopped = fit(experiment, workdir=tmp_path, log=said.append)
    assert stopped.stopped and "stopped at step 7" in said[-1]
    assert not (stopped.path / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    resumed = fit(experiment, workdir=tmp_path, log=said.append)
    assert any("from step 7" in line for line in said) and not resumed.stopped
    assert lines(resumed.path) == lines(finished.path)
    assert bits(final_state(resumed.path, experiment)) == bits(final_state(finished.path, BASE))


class Ended(Exception):
    """What a signal does that nobody handles."""


@pytest.fixture
def unhandled():
    """Signals that stop a run raise Ended, other than in the loop."""

    def end(number, frame):
        raise Ended

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("again", ["at once", "on the way out"])
def test_a_signal_that_comes_twice_ends_no_process_before_the_others(unhandled, monkeypatch, again):
    monkeypatch.setattr(signals.processes, "several", lambda: True)
    with signals.stop_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        if again == "at once":
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    os.kill(os.getpid(), signal.SIGTERM)
    now = signals.time.monotonic()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now + signals.SAME_SIGNAL_SECONDS)
    with pytest.raises(Ended):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_acts_as_ever(unhandled, monkeypatch):
    with pytest.raises(Ended), signals.stop_signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # of its parent process, too
        assert asked()
        now = signals.time.monotonic()
        monkeypatch.setattr(signals.time, "monotonic", lambda: now + 1)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_sets_the_flags_of_all_contexts_around_it_and_of_those_that_follow(unhandled, monkeypatch):
    with pytest.raises(Ended), signals.stop_signals() as outer:
        with signals.stop_signals() as first:
            assert not first() and not outer()
        with signals.stop_signals() as second:
            os.kill(os.getpid(), signal.SIGTERM)
            assert second() and outer() and not first()
        with signals.stop_signals() as third:
            assert third()
            now = signals.time.monotonic()
            monkeypatch.setattr(signals.time, "monotonic", lambda: now + 2)
            os.kill(os.getpid(), signal.SIGTERM)
    with signals.stop_signals() as after:
        assert not after()


@pytest.mark.slow
def test_a_policy_without_float32_master_weights_is_said(tmp_path):
    said = []
    fit(with_loop(dataclasses.replace(BASE, precision="bfloat16"), steps=1), workdir=tmp_path, log=said.append)
    assert said == [
        "precision p=bf16,c=bf16,o=bf16: no float32 master weights; an update of less than half a unit in the last "
        "place of a weight is lost"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3])
def test_how_steps_are_split_into_dispatches_changes_no_bit(most):
    whole, split = run_of(None, {}), run_of(None, {"steps_per_dispatch": most})
    assert bits(whole.state) == bits(split.state) and bits(whole.metrics) == bits(split.metrics)


@pytest.mark.slow
def test_a_streamed_set_gives_the_same_run_as_a_resident_one():
    resident = run_of(None, {})
    streamed = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, device_limit=0))
    for info in steps(streamed):
        last = info
    assert bits(last.state) == bits(resident.state)


def test_the_data_position_wraps_over_epochs_and_pads_the_last_batch():
    trainer = Trainer(BASE)
    feed = trainer.feed(fuse=True)
    weights = [int(feed.batch(step)["weight"].sum()) for step in range(8)]
    assert weights == [16, 16, 16, 16, 16, 16, 4, 16]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_nan_loss_fails_the_run_and_names_the_leaf(precision, tmp_path):
    """Under a dynamic scaler too: the loss is NaN before it is multiplied by any scale."""
    diverging = dataclasses.replace(BASE, precision=precision, optimizer=SGD(1e30, momentum=0.0))
    with pytest.raises(
        RunFailed, match=r"the loss is NaN, at or before step \d+; not finite in step \d+, .*: the loss, which is nan"
    ):
        fit(diverging, workdir=tmp_path)
    state = final_state(next(tmp_path.glob("*/*")), diverging)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_a_row_of_skips_between_two_lines_is_not_overlooked(tmp_path):
    scaler = Scaling(init_scale=2.0**24)  # eight steps overflow, then all is well
    experiment = with_loop(
        dataclasses.replace(BASE, scaler=scaler), log_every=20, save_every=None, eval_every=20, max_consecutive_skips=3
    )
    with pytest.raises(RunFailed, match=r"\d steps in a row were skipped"):
        fit(experiment, workdir=tmp_path)
    assert fit(with_loop(experiment, max_consecutive_skips=20), workdir=tmp_path).summary["skipped_steps"] > 3


@pytest.mark.slow
def test_a_failed_run_keeps_all_of_its_lines(tmp_path):
    """Two dispatches are under way when a failure shows; what the second one measured is neither lost nor cut."""
    scaler = Scaling(kind="static", init_scale=2.0**24)
    failing = with_loop(dataclasses.replace(BASE, scaler=scaler), log_every=2, save_every=None, max_consecutive_skips=4)
    for _ in range(2):
        with pytest.raises(RunFailed):
            fit(failing, workdir=tmp_path)
    written = lines(next(tmp_path.glob("*/*")))
    steps_written = [line["step"] for line in written if line["split"] == "train"]
    assert steps_written == list(range(2, steps_written[-1] + 1, 2))


@pytest.mark.slow  # tests/test_cli.py has a quick one
def test_too_many_skips_in_a_row_fail_the_run_and_name_the_leaf(tmp_path):
    scaler = Scaling(kind="static", init_scale=2.0**24)
    overflowing = with_loop(dataclasses.replace(BASE, scaler=scaler), max_consecutive_skips=5)
    with pytest.raises(
        RunFailed, match=r"5 steps in a row were skipped.*step 5; not finite.*gradient of \w+/(kernel|bias|scale)"
    ):
        fit(overflowing, workdir=tmp_path)
    last = lines(next(tmp_path.glob("*/*")))[-1]
    assert last["applied_steps"] == 0 and last["skipped_steps"] == last["step"] == 5
    assert last["loss"] is None  # the mean over no applied step


@pytest.mark.slow
def test_a_failure_names_the_step_at_hand_and_its_loss_scale_as_blame_does(tmp_path):
    """The dispatch that is under way when a failure shows ends two steps later, where no line is due."""
    scaler = Scaling(init_scale=2.0**24)
    failing = dataclasses.replace(BASE, data=Arrays(blobs, batch_size=20), scaler=scaler)  # 5 batches an epoch
    failing = with_loop(failing, max_consecutive_skips=3, log_every=3, eval_every=20, save_every=None)
    with pytest.raises(RunFailed, match=r"^5 steps in a row were skipped, the last of them step 5; ") as failed:
        fit(failing, workdir=tmp_path)
    assert "not finite in step 5, at loss scale 1.04858e+06: the gradient of" in str(failed.value)
    (run,) = tmp_path.glob("*/*")
    assert [(line["step"], line["skipped_steps"]) for line in lines(run)] == [(3, 3), (5, 5)]
    metrics = run / "metrics.jsonl"  # blame takes the checkpoint where there is no line of it, as a stopped run has it
    metrics.write_text(metrics.read_text().partition("\n")[0] + "\n")
    found = blame_run(Run(tmp_path, failing))
    assert (found.step, found.scale) == (5, 2.0**20)
    reason = json.loads((run / "failed.json").read_text())["reason"]
    assert str(failed.value).startswith(reason)


@pytest.mark.parametrize(
    ("scaler", "in_a_row", "after", "of_the_last"),
    [
        (DynamicScaler(init_scale=1.0), 1, 0.5, 1.0),
        (DynamicScaler(init_scale=1.0), 5, 2.0**-5, 2.0**-4),
        (DynamicScaler(init_scale=2.0, hysteresis=2), 1, 2.0, 2.0),
        (DynamicScaler(init_scale=2.0, hysteresis=2), 2, 1.0, 2.0),
        (DynamicScaler(init_scale=2.0, min_scale=1.0), 50, 1.0, 1.0),
        (DynamicScaler(init_scale=2.0**20, backoff_factor=0.25), 3, 2.0**14, 2.0**16),
        (StaticScaler(8.0), 7, 8.0, 8.0),
    ],
)
def test_the_scale_of_the_last_skipped_step_is_kept(scaler, in_a_row, after, of_the_last):
    tx, params = loss_scaling(optax.sgd(0.1), scaler), jnp.ones(3)
    opt_state = tx.init(params)
    assert find_state(opt_state).skipped_scale == loss_scale(opt_state)
    for _ in range(in_a_row):
        _, opt_state = tx.update(jnp.full(3, jnp.inf), opt_state, params)
    assert (loss_scale(opt_state), find_state(opt_state).skipped_scale) == (after, of_the_last)
    _, opt_state = tx.update(jnp.ones(3), opt_state, params)  # a step that is applied is not the last skipped one
    assert find_state(opt_state).skipped_scale == of_the_last


@pytest.mark.slow
def test_a_run_that_goes_on_has_not_failed_any_more(finished, tmp_path):
    folder = shutil.copytree(finished.path, tmp_path / "blobs" / finished.path.name)
    cut_back(folder, 15)
    (folder / "failed.json").write_text("{}")
    assert fit(BASE, workdir=tmp_path, name="blobs").trained
    assert not (folder / "failed.json").exists()


@pytest.mark.slow
def test_a_scaler_that_gives_up_at_its_floor_fails_the_run(tmp_path):
    scaler = DeepSpeedScaler(init_scale=2.0**24, min_scale=2.0**24, delayed_shift=1)
    with pytest.raises(RunFailed, match="came to its floor, where DeepSpeedScaler gives up, at or before step 5"):
        fit(dataclasses.replace(BASE, scaler=scaler), workdir=tmp_path)


@pytest.mark.slow
def test_training_stops_when_patience_is_out_and_a_resumed_run_knows(tmp_path):
    experiment = with_loop(steps=100, eval_every=5, patience=2, save_every=None, ema_decay=None)
    experiment = dataclasses.replace(experiment, model=MLP(features=(2,)), optimizer=SGD(1e-30))  # nothing gets better
    ended = fit(experiment, workdir=tmp_path)
    assert ended.summary["stopped_early"] and ended.summary["best"]["step"] == 5 and ended.summary["steps"] == 15
    (ended.path / "summary.json").unlink()  # killed after the last checkpoint
    assert fit(experiment, workdir=tmp_path).summary["steps"] == 15


@pytest.mark.parametrize(
    "stops", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.full_size)]
)
def test_the_last_evaluation_counts_though_the_run_is_not_pruned_as_far_as_it_should_be(tmp_path, stops):
    skipping = {"scaler": Scaling(init_scale=2.0**24)} if not stops else {}  # eight steps overflow
    experiment = dataclasses.replace(BASE, pruning=Pruning(0.9, end=1.0), **skipping)
    hooks = [lambda info: Stop("enough") if isinstance(info, StepInfo) and info.step >= 12 else None] if stops else []
    said: list[str] = []
    run = fit(experiment, workdir=tmp_path, hooks=hooks, log=said.append)
    last, sparsity, skipped = run.summary["steps"], run.summary["sparsity"], run.summary["skipped_steps"]
    assert run.summary["best"]["step"] == last and 0 < sparsity < 0.9
    why = f"the run was stopped after step {last}" if stops else f"{skipped} of the steps were skipped"
    assert f"pruned to {sparsity:.2%}, not 90.00%, since {why}" in said
    (run.path / "summary.json").unlink()
    assert fit(experiment, workdir=tmp_path, hooks=hooks).summary["best"] == run.summary["best"]


def test_averaged_weights_are_what_is_evaluated(finished):
    state = final_state(finished.path, BASE)
    trainer = Trainer(BASE)
    of_average = compute(trainer.evaluation(state, trainer.source("test")))
    of_last = compute(trainer.evaluation(dataclasses.replace(state, ema=None), trainer.source("test")))
    assert of_average == pytest.approx(finished.summary["test"]) and of_last["loss"] != of_average["loss"]


def test_one_compile_a_run_and_all_of_the_state_is_donated():
    trainer = Trainer(BASE)
    feed = trainer.feed(fuse=True)
    state, metrics = trainer.devices.put(trainer.init()), trainer.devices.put(trainer.no_metrics)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    rows = trainer.devices.put(trainer.batches.epoch_rows(0))
    args = (state, metrics, feed.columns, rows, feed.arguments, np.int32(1))
    compiled = feed.program.lower(*args).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == size
    if jax.default_backend() == "cpu":  # where XLA, left to itself, copies the moments in each turn
        plain = jax.jit(feed.program.__wrapped__, donate_argnums=0).lower(*args).compile()
        assert compiled.as_text().count(" copy(") < plain.as_text().count(" copy(")
    for first, count in ((0, 3), (3, 4), (7, 7), (14, 1)):
        state, metrics = feed.run(state, metrics, first, count)
    assert feed.program._cache_size() == 1


@pytest.mark.slow
def test_the_loop_waits_for_nothing_between_lines(monkeypatch):
    fetched = []
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree))
    monkeypatch.setattr(jax.Array, "__float__", lambda self: fetched.append(self), raising=False)
    assert sum(1 for _ in steps(with_loop(steps_per_dispatch=1))) == 20
    assert not fetched


@pytest.mark.slow
def test_many_steps_in_one_dispatch_are_four_times_faster_where_dispatch_is_all(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    step_time = importlib.import_module("step_time")
    case = dataclasses.replace(step_time.DISPATCH_BOUND, examples=1)
    found = step_time.compare_dispatch(case, "mixed_float16", rounds=7, seconds=0.2)
    assert found["ratio"]["step by step / in one dispatch"]["median"] >= 4


def test_a_convolution_is_dispatched_singly_on_a_cpu():
    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Conv(2, (3, 3))(x).reshape(len(x), -1))

    assert Trainer(BASE).fuse_steps
    assert Trainer(dataclasses.replace(BASE, model=Conv())).fuse_steps == (jax.default_backend() != "cpu")


def test_a_run_killed_before_its_summary_has_one_line_of_the_test(finished, tmp_path):
    folder = tmp_path / "blobs" / finished.path.name
    shutil.copytree(finished.path, folder)
    (folder / "summary.json").unlink()
    again = fit(BASE, workdir=tmp_path, name="blobs")
    assert lines(folder) == lines(finished.path)
    assert {**again.summary, "wall_seconds": 0} == {**finished.summary, "wall_seconds": 0}


def test_a_run_whose_best_checkpoint_is_damaged_ends_without_its_test_and_says_so(finished, tmp_path):
    folder = tmp_path / "blobs" / finished.path.name
    shutil.copytree(finished.path, folder)
    (folder / "summary.json").unlink()
    best = finished.summary["best"]
    damage(folder / f"checkpoints/{best['step']}")
    said: list[str] = []
    again = fit(BASE, workdir=tmp_path, name="blobs", log=said.append)
    assert again.summary["best"] == best | {"test": None} and again.summary["test"] == finished.summary["test"]
    (word,) = (line for line in said if line.startswith(f"the best weights, of step {best['step']}, are not measured"))
    assert "damaged" in word


@pytest.mark.slow
def test_a_kill_while_a_folder_is_made_or_overwritten_leaves_one_that_can_be_used(tmp_path):
    short = with_loop(steps=1)
    folder = tmp_path / "experiment" / f"{short.hash}-s0"
    folder.mkdir(parents=True)
    (folder / "config.partial").write_text("{")
    (folder / "lock").touch()
    first = fit(short, workdir=tmp_path)
    (folder.parent / f"{folder.name}.deleted").mkdir()
    assert fit(short, workdir=tmp_path, overwrite=True).summary["test"] == first.summary["test"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_two_processes_do_not_train_in_one_folder(finished, tmp_path):
    folder = tmp_path / "blobs" / finished.path.name
    shutil.copytree(finished.path, folder)
    (folder / "summary.json").unlink()
    with RunFolder(folder).locked(print):
        for overwrite in (False, True):
            with pytest.raises(InputError, match="another process is training in"):
                fit(BASE, workdir=tmp_path, name="blobs", overwrite=overwrite)
    assert lines(folder) == lines(finished.path)


PROGRAM = """
import flax.linen as nn
import numpy as np

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.reshape(len(x), -1) * SCALE)

SCALE = 1.0

def load(split):
    return {"x": np.load(ROWS)[split], "label": np.arange(len(np.load(ROWS)[split])) % 2}
"""


def of_program(source, rows, name="my_program"):
    """The experiment of a program that was started anew."""
    module = types.ModuleType(name)
    file = f"<{name} {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    vars(module)["ROWS"] = str(rows)
    exec(compile(source, file, "exec", dont_inherit=True), vars(module))
    task = Classification(inputs=("x",))
    data = Arrays(module.load, batch_size=10, images=())
    return Experiment(model=module.Net(), data=data, task=task, loop=Loop(steps=2, save_every=1, eval_every=2))


def save_rows(path, rows=20, seed=0, dtype=np.float32, last=0.0):
    rng = np.random.default_rng(seed)
    splits = {split: rng.normal(size=(rows, 3)).astype(dtype) for split in ("train", "validation", "test")}
    splits["train"][-1, -1] += last
    np.savez(path, **splits)


@pytest.mark.slow
def test_a_run_is_never_gone_on_with_or_returned_by_other_code(tmp_path):
    save_rows(tmp_path / "rows.npz")
    first = fit(of_program(PROGRAM, tmp_path / "rows.npz"), workdir=tmp_path / "runs")
    commented = PROGRAM.replace("SCALE = 1.0", "# as it came\nSCALE = 1.0")
    assert not fit(of_program(commented, tmp_path / "rows.npz"), workdir=tmp_path / "runs").trained
    for stopped in (False, True):
        if stopped:
            (first.path / "summary.json").unlink()
        for old, new, named in (
            ("* SCALE", "/ SCALE", r"my_program\.Net\.__call__"),
            ("SCALE = 1.0", "SCALE = 2.0", r"my_program\.SCALE"),
            ("% 2}", "% 2 }  #", None),
            (") % 2}", ") // 10}", r"my_program\.load"),
        ):
            if named is not None:
                with pytest.raises(InputError, match=rf"{named} has changed since .* began.*workdir.*overwrite"):
                    fit(of_program(PROGRAM.replace(old, new), tmp_path / "rows.npz"), workdir=tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_never_gone_on_with_or_returned_for_other_data(finished, tmp_path):
    path = tmp_path / "rows.npz"
    save_rows(path)
    first = fit(of_program(PROGRAM, path), workdir=tmp_path / "runs")
    if not finished:
        (first.path / "summary.json").unlink()
    for change, said in (
        ({"rows": 30}, r"train has 30 rows \(was 20\), validation has 30 rows \(was 20\), test has 30"),
        ({"seed": 1}, "column 'x' of train has other values"),
        ({"dtype": np.float64}, r"column 'x' of train is float64\[3\] \(was float32\[3\]\)"),
        ({"last": 1.0}, "began: column 'x' of train has other values. A"),
    ):
        save_rows(path, **change)
        with pytest.raises(InputError, match=rf"the data have changed since .*{said}"):
            fit(of_program(PROGRAM, path), workdir=tmp_path / "runs")
        with pytest.raises(InputError, match=r"the data have changed since .* train "):
            Run(first.path, of_program(PROGRAM, path)).evaluate("train")
        with pytest.raises(InputError, match=r"the data have changed since .* train "):
            Past(Run(first.path, of_program(PROGRAM, path)), print)
    save_rows(path)
    assert fit(of_program(PROGRAM, path), workdir=tmp_path / "runs").trained != finished


@pytest.mark.slow
def test_an_unfinished_run_is_not_gone_on_with_by_other_packages(tmp_path):
    save_rows(tmp_path / "rows.npz")
    first = fit(of_program(PROGRAM, tmp_path / "rows.npz"), workdir=tmp_path / "runs")
    config = json.loads((first.path / "config.json").read_text())
    config["made_by"]["flax"] = {"version": "0.1"}
    (first.path / "config.json").write_text(json.dumps(config))
    assert not fit(of_program(PROGRAM, tmp_path / "rows.npz"), workdir=tmp_path / "runs").trained
    (first.path / "summary.json").unlink()
    with pytest.raises(InputError, match=r"flax .* \(was 0.1\): .* install that version"):
        fit(of_program(PROGRAM, tmp_path / "rows.npz"), workdir=tmp_path / "runs")


@pytest.mark.slow
def test_one_device_gives_one_result_in_both_modes(tmp_path):
    """Dropout and augmentation included; and a run of either mode is read back."""
    # Not Adam: of the gradient of a bias before BatchNorm, which is 0 but for rounding, it makes whole steps.
    same = dataclasses.replace(BASE, precision="float32", optimizer=SGD(0.1))
    experiments = [dataclasses.replace(same, parallel=Parallel(mode)) for mode in ("jit", "pmap")]
    runs = [fit(experiment, workdir=tmp_path / experiment.parallel.mode) for experiment in experiments]
    states = [final_state(run.path, experiment).params for run, experiment in zip(runs, experiments, strict=True)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *states)
    for run, experiment in zip(runs, experiments, strict=True):
        assert Run(run.path, experiment).evaluate("test") == pytest.approx(runs[0].summary["test"])


def test_nan_is_null_in_json(tmp_path):
    RunFolder(tmp_path).write_summary({"a": [math.nan, 1.0], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": [None, 1.0], "b": {"c": None}}


def test_an_evaluation_compiles_once():
    trainer = Trainer(dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, eval_batch_size=30)))
    trainer.evaluation(trainer.devices.put(trainer.init()), trainer.source("test"))
    assert trainer.evaluation._add._cache_size() == 1


def differing(split):
    found = blobs(split)
    return found if split == "train" else {**found, "image": found["image"].astype(np.float32)}


def fractions(split):
    found = blobs(split)
    return {**found, "label": found["label"] / 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: dataclasses.replace(e, task=Classification(target="lable")), "target names 'lable'.*'label'"),
        (lambda e: dataclasses.replace(e, data=Arrays(differing)), r"'image' of the validation split is float32\[6"),
        (lambda e: dataclasses.replace(e, data=Arrays(fractions)), "'label' is float32.*expected whole numbers"),
        (lambda e: with_loop(e, monitor="acuracy"), "loop.monitor='acuracy'.*did you mean 'accuracy'"),
        (lambda e: dataclasses.replace(e, data=dataclasses.replace(e.data, batch_size=101)), "only 100 rows"),
        (lambda e: dataclasses.replace(e, task=dataclasses.replace(e.task, inputs=("imgae",))), "'imgae'.*image"),
        (lambda e: dataclasses.replace(e, data=Arrays(nothing)), "returned None"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        fit(change(BASE), workdir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(finished, tmp_path):
    folder = tmp_path / "experiment" / f"{BASE.hash}-s0"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no run folder"):
            fit(BASE, workdir=tmp_path, overwrite=overwrite)
    config = json.loads((finished.path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hash": "0123456789ab"}))
    with pytest.raises(InputError, match="belongs to another experiment"):
        fit(BASE, workdir=tmp_path)
    assert (folder / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": 0},
        {"steps": 0},
        {"ema_decay": 1.0},
        {"patience": 0},
        {"keep": 0},
        {"log_every": 2.5},
        {"mode": "most"},
    ],
)
def test_a_loop_that_cannot_run_is_refused(field):
    with pytest.raises(InputError, match=f"loop.{next(iter(field))} ?="):
        Loop(**field)


def test_the_mean_of_nothing_is_nan():
    assert math.isnan(compute(Trainer(BASE).no_metrics)["loss"])


@pytest.mark.slow
def test_a_run_that_names_what_it_trains_leaves_the_rest_to_the_bit_and_says_so(tmp_path):
    said: list[str] = []
    experiment = dataclasses.replace(BASE, trains=("Dense_1", "**/bias"), optimizer=AdamW(1e-2))
    fitted = fit(with_loop(experiment, steps=10), workdir=tmp_path, log=said.append)
    assert "not trained: 296 of the parameters, BatchNorm_0/scale, Dense_0/kernel" in " ".join(said)
    assert fitted.summary["parameters"] - fitted.summary["trained_parameters"] == 8 + 36 * 8
    state, start = Run(fitted.path, with_loop(experiment, steps=10)).state(), Trainer(experiment).init()
    for path, leaf in by_path(state.params).items():
        frozen = path in ("BatchNorm_0/scale", "Dense_0/kernel")
        assert np.array_equal(leaf, by_path(start.params)[path]) == frozen
    biases = dataclasses.replace(experiment, trains=("**/bias",))
    assert list(Trainer(biases).frozen())[1:] == [
        "weight decay: no trained parameter matches **/*kernel or **/*embedding"
    ]
    fit(with_loop(experiment, steps=10), workdir=tmp_path, log=said.append)
    assert fit(with_loop(biases, steps=10), workdir=tmp_path, log=said.append).path != fitted.path
