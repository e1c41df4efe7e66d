"""A GAN from one file outside of the package: its steps, its runs, and what looks at them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxmp
from jaxmp.cli import main
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.settings import Parallel
from jaxmp.instruments.gradient_error import gradient_error
from jaxmp.reports.run_report import report
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.gradients import compare_gradients
from jaxmp.testing import StepAdapter, step_laws
from jaxmp.training.metrics import compute
from jaxmp.trees import by_path

FILE = Path(__file__).parent / "configs" / "gan.py"
BOTH = ("discriminator", "generator")


def gan(**changed):
    """The experiment of the file, with other values of `Task`, `Loop` and `Experiment`."""
    experiment = ConfigFile.find(str(FILE)).experiment()
    task = dataclasses.replace(experiment.task, **{k: changed.pop(k) for k in ("every", "order") if k in changed})
    loop = {k: changed.pop(k) for k in list(changed) if hasattr(experiment.loop, k)}
    return dataclasses.replace(experiment, task=task, loop=dataclasses.replace(experiment.loop, **loop), **changed)


def numbers(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def bits(tree):
    return [(str(x.dtype), x.shape, x.tobytes()) for x in numbers(tree)]


def fresh(trainer, **scales):
    """A state before the first step, with other loss scales."""
    state = trainer.init()
    for name, scale in scales.items():
        scaling = state.opt_state[name]
        scaler = scaling.scaler._replace(scale=jnp.float32(scale))
        state = dataclasses.replace(state, opt_state={**state.opt_state, name: scaling._replace(scaler=scaler)})
    return state


@functools.cache
def trainer_of(order="in_turn"):
    return Trainer(gan(order=order))


@functools.cache
def step_of(order, due=None):
    trainer = trainer_of(order)
    return jax.jit(trainer._make_step(due))


FINITE, OVERFLOWING = 2.0**4, 2.0**60


def after(order, due=None, *, discriminator=FINITE, generator=FINITE):
    """The state after the first step, which both objectives take; or those that are due."""
    trainer = trainer_of(order)
    state = fresh(trainer, discriminator=discriminator, generator=generator)
    return step_of(order, due)(state, trainer.feed(fuse=False).batch(0))[0]


def without(state, name):
    """All of a state but what the scaler of an objective keeps."""
    own = state.opt_state[name].inner_state
    return dataclasses.replace(state, opt_state={**state.opt_state, name: own})


@pytest.mark.slow
@pytest.mark.parametrize(("skipped", "applied"), [BOTH, BOTH[::-1]])
def test_in_turn_an_overflow_of_one_leaves_the_state_as_if_the_other_ran_alone(skipped, applied):
    found = after("in_turn", **{skipped: OVERFLOWING})
    alone = after("in_turn", (applied,), **{skipped: OVERFLOWING})
    assert jaxmp.skipped_steps(found.opt_state[skipped]) == 1 and not jaxmp.skipped_steps(found.opt_state[applied])
    assert bits(without(found, skipped)) == bits(without(alone, skipped))
    assert bits(found.params[applied]) != bits(trainer_of().init().params[applied])


@pytest.mark.slow
@pytest.mark.parametrize(("skipped", "applied"), [BOTH, BOTH[::-1]])
def test_at_once_an_overflow_of_one_leaves_the_other_s_parameters_and_moments_to_the_bit(skipped, applied):
    found, whole = after("at_once", **{skipped: OVERFLOWING}), after("at_once")
    start = fresh(trainer_of("at_once"))
    assert jaxmp.skipped_steps(found.opt_state[skipped]) == 1
    for name, expected in ((applied, whole), (skipped, start)):
        assert bits((found.params[name], found.ema[name])) == bits((expected.params[name], expected.ema[name]))
        assert bits(found.opt_state[name].inner_state) == bits(expected.opt_state[name].inner_state)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["in_turn", "at_once"])
def test_the_state_that_an_objective_sees_is_what_those_before_it_left(order):
    trainer = trainer_of(order)
    start = fresh(trainer, discriminator=FINITE, generator=FINITE)
    seen = trainer.state_seen("generator")(start, trainer.feed(fuse=False).batch(0))
    alone = after(order, ("discriminator",))
    assert seen.step == start.step and bits(seen.model_state) == bits(alone.model_state) != bits(start.model_state)
    assert bits(seen.params) == bits((alone if order == "in_turn" else start).params)


@pytest.mark.slow
def test_the_gradient_and_the_moments_of_an_objective_hold_its_own_leaves_alone():
    trainer, name = trainer_of(), "generator"
    state, batch = trainer.init(), trainer.feed(fuse=False).batch(0)
    grads, _, _ = jax.eval_shape(
        trainer.gradients(name), state.params, state.model_state, jnp.float32(1), batch, state.key
    )
    assert set(by_path(grads)) == {path for path in by_path(state.params) if path.startswith("generator/")}
    moments = [path for path in by_path(state.opt_state[name].inner_state) if "kernel" in path]
    assert moments and all("generator/" in path for path in moments)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("fused", marks=pytest.mark.slow),
        pytest.param("resident", marks=pytest.mark.slow),
        pytest.param("streamed", marks=pytest.mark.full_size),
    ],
)
def test_there_is_one_program_for_each_set_of_due_objectives_and_all_of_the_state_is_donated(way):
    experiment = gan()
    if way == "streamed":
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, device_limit=0))
    trainer = Trainer(experiment)
    feed, devices = trainer.feed(fuse=way == "fused"), trainer.devices
    state, metrics = devices.put_state(trainer.init()), devices.put(trainer.no_metrics)
    for step in range(4):
        before = state
        state, metrics = feed.run(state, metrics, step, 1)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    feed.close()
    programs = {None: feed.program} if feed.programs is None else feed.programs.compiled
    assert set(programs) == ({None} if way == "fused" else {BOTH, BOTH[:1]})
    assert all(program._cache_size() == 1 for program in programs.values())
    for found, expected in zip(numbers(state.params), numbers(_trained(4).params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


@functools.cache
def _trained(steps):
    """The state after steps that are dispatched singly."""
    trainer = trainer_of()
    feed = trainer.feed(fuse=False)
    return feed.run(trainer.init(), trainer.no_metrics, 0, steps)[0]


WAYS = [
    (8, "jit", "replicated", 1),
    (8, "pmap", "replicated", 2),
    (8, "jit", "zero1", 2),
    (8, "jit", "fsdp", 1),
]

ONE_OVERFLOW = jaxmp.DynamicScaler(init_scale=2.0**24, backoff_factor=2.0**-18, growth_interval=3)


@functools.cache
def losses(count, mode, shard, parts, precision):
    """The losses of both objectives and the loss scales; in half, both overflow in the first step for certain."""
    experiment = gan(accumulate_steps=parts, parallel=Parallel(mode, shard), precision=precision, scaler=ONE_OVERFLOW)
    mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])
    trainer = Trainer(experiment, mesh=mesh)
    devices, feed = trainer.devices, trainer.feed(fuse=True)
    state, found = devices.put_state(trainer.init()), []
    for step in range(8):
        state, metrics = feed.run(state, devices.put(trainer.no_metrics), step, 1)
        values, last = compute(devices.get(metrics)), devices.get(state)
        scales = [float(jaxmp.loss_scale(last.opt_state[name])) for name in BOTH]
        found.append([*(values[f"{name}/loss"] for name in BOTH), *scales])
    return np.array(found)


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_it_trains_alike_however_it_is_spread_over_devices_and_microbatches(way):
    # Batch statistics are of a microbatch: one device with as many of them is what it has to agree with.
    for precision, tolerance in (("float32", 1e-5), ("mixed_float16", 1e-2)):
        expected = losses(1, "jit", "replicated", way[-1], precision)
        np.testing.assert_allclose(losses(*way, precision), expected, rtol=tolerance)
    assert np.isnan(expected[0, :2]).all() and np.isfinite(expected[2::2]).all(), "the first step was skipped"
    assert expected[-1, 2:].tolist() == [2.0**8, 2.0**7], "of seven applied steps, and of three"


# Its runs.


def start(workdir):
    options = ["--loop.steps", "300", "--loop.log-every", "7", "--loop.eval-every", "50", "--loop.save-every", "10"]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxmp", "train", str(FILE), "--workdir", str(workdir), *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def lines(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: of
            for key, of in record.items()
            if key not in ("wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second")
        }
        for record in records
    ]


def last_step(workdir):
    whole = [line for path in workdir.glob("*/*/metrics.jsonl") for line in path.read_text().split("\n")[:-1]]
    found = [json.loads(line)["step"] for line in whole]
    return max(found, default=0)


@pytest.mark.full_size
def test_killed_at_five_moments_it_ends_with_the_bits_and_lines_of_an_undisturbed_run(tmp_path):
    assert start(tmp_path / "whole").wait(timeout=300) == 0
    for step in (1, 60, 120, 180, 240):
        process, deadline = start(tmp_path / "killed"), time.monotonic() + 200
        while last_step(tmp_path / "killed") < step:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert last_step(tmp_path / "killed") < 300
    assert start(tmp_path / "killed").wait(timeout=300) == 0
    whole, killed = (Run(tmp_path / workdir) for workdir in ("whole", "killed"))
    assert lines(killed.path) == lines(whole.path)
    assert bits(killed.state()) == bits(whole.state())
    assert {**killed.summary, "wall_seconds": 0} == {**whole.summary, "wall_seconds": 0}
    assert all(whole.summary[f"skipped_steps/{name}"] > 0 for name in BOTH)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command line, and what that printed."""
    folder, out = tmp_path_factory.mktemp("gan"), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["train", str(FILE), "--workdir", str(folder), "--loop.ranges-every", "16"]) == 0
    return Run(folder), out.getvalue()


@pytest.mark.slow
def test_lines_console_summary_and_report_speak_of_each_objective(trained):
    run, printed = trained
    last = [line for line in run.metrics if line["split"] == "train"][-1]
    of_each = {f"{field}/{name}" for field in ("applied_steps", "loss_scale", "skipped_steps") for name in BOTH}
    assert of_each <= set(last) and not {"loss", "loss_scale", "applied_steps"} & set(last)
    assert last["skipped_steps"] == sum(last[f"skipped_steps/{name}"] for name in BOTH) > 0
    attempts = {name: last[f"applied_steps/{name}"] + last[f"skipped_steps/{name}"] for name in BOTH}
    assert attempts == {"discriminator": 24, "generator": 12}
    assert {"generator/loss", "discriminator/loss", "discriminator/accuracy"} == set(run.summary["test"])
    assert run.config["monitor"] == "discriminator/accuracy" and run.metric_specs["generator/loss"].unit == "nats"
    assert {field: run.summary[field] for field in of_each} == {field: last[field] for field in of_each}
    assert f"scale discriminator {last['loss_scale/discriminator']:g}  scale generator " in printed
    assert run.evaluate("test") == pytest.approx(run.summary["test"])
    page = str(report([run]))
    assert "Loss scale, generator" in page and "Skipped steps, discriminator" in page
    assert "Generator/loss" in page and "17, loss scale" in page


@pytest.mark.slow
def test_ranges_are_of_each_objective_that_runs_and_of_what_it_trains(trained):
    run, _ = trained
    found = {(line["step"], line["objective"]): line for line in run.ranges}
    assert set(found) == {(1, "discriminator"), (1, "generator"), (17, "discriminator"), (17, "generator")}
    assert found[1, "generator"]["loss_scale"] == 2.0**20
    for (_, name), line in found.items():
        for kind in ("parameters", "gradients", "updates"):
            assert all(path.startswith(name) for path in line["ranges"][kind])


@pytest.mark.slow
def test_it_is_continued_to_the_bit_and_says_the_learning_rate_of_each_objective(trained, tmp_path):
    run, _ = trained
    said: list[str] = []
    longer = {"workdir": tmp_path, "log": said.append}
    more = fit(gan(steps=32), continue_from=run.path, **longer)
    rate = "the learning rate of generator at its end was 0.002, and is 0.002 now"
    assert rate in said and not any(line.startswith("fresh") for line in said)
    whole = fit(gan(steps=32), **longer)
    assert bits(Run(more.path, gan(steps=32)).state()) == bits(Run(whole.path, gan(steps=32)).state())


@pytest.mark.slow
def test_too_many_skips_in_a_row_are_of_one_objective_and_the_message_names_it(tmp_path):
    never = {"discriminator": jaxmp.StaticScaler(2.0), "generator": jaxmp.StaticScaler(2.0**100)}
    with pytest.raises(RunFailed, match=r"^4 steps of generator in a row were skipped, the last of them step 7\. "):
        fit(gan(scaler=never, max_consecutive_skips=3), workdir=tmp_path, log=lambda message: None)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [BOTH, BOTH[:1]])
def test_a_failed_run_names_what_was_not_finite_of_each_objective_that_was_skipped(failing, tmp_path):
    scaler = {name: jaxmp.StaticScaler(2.0 ** (100 if name in failing else 1)) for name in BOTH}
    with pytest.raises(RunFailed, match=r"^\d steps of discriminator in a row were skipped") as error:
        fit(gan(scaler=scaler, max_consecutive_skips=2, every=1), workdir=tmp_path, log=lambda message: None)
    for name in BOTH:
        after = "" if failing == BOTH else ", with the parameters that generator left in it"
        found = rf"; not finite in step \d of {name}, at loss scale 1.26765e\+30{after}: the gradient of {name}/"
        assert (re.search(found, str(error.value)) is not None) == (name in failing), str(error.value)


@pytest.mark.full_size
def test_blame_and_find_policy_are_of_the_objective_that_is_named(trained, capsys):
    run, _ = trained
    found = jaxmp.blame(run, 1, objective="discriminator", log=lambda message: None)
    assert found.objective == "discriminator" and found.scale == 2.0**24 and found.found is not None
    assert all(path.startswith("gradients/discriminator") for path in found.found.reaches)
    found = jaxmp.blame(run, 1, objective="generator", log=lambda message: None)
    gradients = [each for each in found.deviations if each.what != "output"]
    assert found.found is None and {each.module.partition("/")[0] for each in gradients} == {"generator"}
    last = jaxmp.blame(run, log=lambda message: None)
    assert last.found is not None and last.objective in BOTH
    folder = str(run.path)
    for command, message in (
        (["blame", folder, "--step", "1"], "expected --objective, one of discriminator, generator"),
        (["blame", folder, "--objective", "generatr"], "did you mean 'generator'"),
        (["blame", folder, "--step", "2", "--objective", "generator"], "in this step discriminator runs"),
        (["find-policy", str(FILE)], "expected --objective, one of discriminator, generator"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.full_size
def test_compare_measures_the_gradients_of_each_objective_where_it_is_due(tmp_path):
    options = ["--precision", "float32", "mixed_float16", "--seeds", "0", "--workdir", str(tmp_path)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["compare", str(FILE), "--gradients", "2", *options, "--loop.steps", "6"]) == 0
    page = (tmp_path / "gan" / "compare.html").read_text()
    assert "Gradients of discriminator" in page and "Gradients of generator" in page
    found = json.loads((tmp_path / "gan" / "compare.json").read_text())["gradients"]["objectives"]
    assert {name: of["steps"] for name, of in found.items()} == {"discriminator": [1, 4], "generator": [1, 5]}
    for name, of in found.items():
        exact, half = (of["precisions"][precision] for precision in ("float32", "mixed_float16"))
        assert max(exact["relative_error"]) < 1e-5 and half["worst"]["parameter"].startswith(name)


@pytest.mark.slow
def test_compare_takes_the_gradient_of_an_objective_from_the_state_that_it_sees(monkeypatch):
    experiment, references = gan(steps=1, precision="float32", scaler=jaxmp.NoScaler()), []

    def seen(gradients, reference):
        references.append(reference)
        return gradient_error(gradients, reference)

    monkeypatch.setattr("jaxmp.studies.gradients.gradient_error", seen)
    compare_gradients({"float32": experiment}, 1)
    trainer = Trainer(experiment)
    batch = trainer.feed(fuse=False).batch(0)
    state = jax.jit(trainer._make_step(("discriminator",)))(trainer.init(), batch)[0]
    loss_fn = jaxmp.make_loss(experiment.model, experiment.task, "float32", objective="generator", train=False)

    def mean(own):
        total, (weight, *_) = loss_fn({**state.params, "generator": own}, state.model_state, batch, state.key)
        return total / weight

    expected = {f"generator/{path}": leaf for path, leaf in by_path(jax.grad(mean)(state.params["generator"])).items()}
    assert set(expected) == set(references[1])
    for path, leaf in expected.items():
        np.testing.assert_allclose(references[1][path], leaf, rtol=1e-4, atol=1e-6)


def laws_of(order, every):
    trainer = Trainer(gan(order=order, every=every))
    step, batch = jax.jit(trainer.train_step), trainer.feed(fuse=False).batch(0)
    claims = {"growth_interval": {"discriminator": 8, "generator": 4}, "max_scale": 2.0**24, "hysteresis": 1}
    return step_laws(StepAdapter(lambda: trainer.devices.put_state(trainer.init()), step, batch, **claims))


@pytest.mark.slow
def test_no_law_of_a_step_accuses_it():
    laws = laws_of("in_turn", 2)
    assert not laws.broken, str(laws)
    holds = {result.law for result in laws if result.verdict == "holds"}
    assert {
        "growth_step_is_right",
        "scale_moves_as_claimed",
        "not_due_stays",
        "skipped_statistics_are_dropped",
    } <= holds


@pytest.mark.full_size
@pytest.mark.parametrize("law", ["others_do_not_matter", "skipped_beside_others", "skipped_statistics_are_dropped"])
def test_its_objectives_leave_each_other_alone_at_once_too(law):
    assert at_once()[law].verdict == "holds", str(at_once()[law])


@functools.cache
def at_once():
    return laws_of("at_once", 1)


@pytest.mark.slow
def test_it_begins_with_the_weights_of_a_run_where_one_objective_alone_is_averaged(trained, tmp_path):
    experiment = dataclasses.replace(gan(steps=1, ema_decay=None), task=averaging_the_generator(gan().task))
    state = Run(fit(experiment, workdir=tmp_path, init_from=trained[0].path).path, experiment).state()
    assert set(by_path(state.ema)) == {path for path in by_path(state.params) if path.startswith("generator/")}


@pytest.mark.slow
def test_the_audit_sees_both_objectives_and_memory_is_of_the_one_that_holds_most():
    report = jaxmp.audit(gan())
    report.assert_clean("mixed_float16")
    assert report.dot_flops_by_dtype["float16"] == sum(report.dot_flops_by_dtype.values())
    gradients = jaxmp.memory(gan()).nbytes("gradients")
    state = trainer_of().state_spec
    assert gradients == max(sum(4 * leaf.size for leaf in jax.tree.leaves(state.params[name])) for name in BOTH)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": {"generator": jaxmp.Adam()}}, "optimizer has nothing for the objective 'discriminator'"),
        (
            {"optimizer": {**dict.fromkeys(BOTH, jaxmp.Adam()), "generatr": jaxmp.Adam()}},
            r"optimizer\['generatr'\]: Adversarial has no such objective; .*did you mean 'generator'",
        ),
        ({"optimizer": {**dict.fromkeys(BOTH, jaxmp.Adam()), "generator": 3}}, r"optimizer\['generator'\] = 3"),
        ({"scaler": {"discriminator": jaxmp.NoScaler(), "generator": "none"}}, r"scaler\['generator'\] = 'none'"),
        ({"trains": ("generator",)}, "the objectives of Adversarial say what each of them trains"),
        ({"trains": "generator"}, r"trains = 'generator': expected a tuple"),
        ({"task": jaxmp.Classification()}, "optimizer has values for .*: Classification has a single objective"),
    ],
)
def test_an_experiment_refuses_parts_of_no_objective(changed, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(gan(), **changed)


def test_the_order_and_the_share_of_the_steps_of_objectives_are_part_of_the_identity():
    hashes = [gan().hash, gan(every=1).hash, gan(order="at_once").hash, gan(optimizer=jaxmp.Adam()).hash]
    assert len(set(hashes)) == len(hashes)
    turned = dataclasses.replace(gan().task)
    object.__setattr__(turned, "__class__", _turned(type(turned)))
    assert dataclasses.replace(gan(), task=turned).hash != gan().hash


def averaging_the_generator(task):
    """The task of the GAN, with an average of the generator's weights alone."""
    specs = {**task.objectives, "generator": dataclasses.replace(task.objectives["generator"], ema_decay=0.5)}
    kind = type("Adversarial", (type(task),), {"objectives": property(lambda self: specs)})
    return kind(**{field.name: getattr(task, field.name) for field in dataclasses.fields(task)})


def test_the_average_of_one_objective_is_said_by_the_task_and_part_of_the_identity():
    experiment = dataclasses.replace(gan(ema_decay=None), task=averaging_the_generator(gan().task))
    assert experiment.hash != gan(ema_decay=None).hash
    decays = {name: objective.ema_decay for name, objective in Trainer(experiment).objective.items()}
    assert decays == {"discriminator": None, "generator": 0.5}
    with pytest.raises(InputError, match=r"ObjectiveSpec\.ema_decay = 1\.5: expected a number between 0 and 1"):
        jaxmp.ObjectiveSpec(ema_decay=1.5)


def _turned(kind):
    """The class of a task, under the same name, whose objectives run in the other order."""
    both = property(lambda self: dict(reversed(kind.objectives.fget(self).items())))
    return type(kind.__name__, (kind,), {"objectives": both, "__module__": kind.__module__})
