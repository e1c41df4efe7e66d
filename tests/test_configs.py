from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
import jaxmp.testing
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.settings import Loop
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.gradients import compare_gradients
from jaxmp.studies.overflow import blame_run

FULL_SIZE = {"imagenet_resnet50": 25_557_032, "imagenet_vit_b16": 86_567_656}
"""configs that are too large for all of the tests below, and the published numbers of their parameters"""

CONFIGS = [path.stem for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))]
CONFIGS = [name for name in CONFIGS if name not in FULL_SIZE]

IN_FLOAT32 = {"spoken_digits_ctc": "jaxmp/tasks/ctc.py"}
"""where a config's loss has products of its own, which are in float32 whatever the policy, as losses are: optax picks
the log-probabilities of labels by products with zeros and ones"""


def shipped(name):
    return ConfigFile.find(str(Path(__file__).parent.parent / "configs" / f"{name}.py")).experiment()


@pytest.fixture
def four_steps(made_up):
    """A config, by name, with 32 random rows of the same shape, and a checkpoint half way."""

    def of(name):
        experiment = made_up(shipped(name), 32)
        schedule = experiment.optimizer.schedule
        schedule = dataclasses.replace(schedule, warmup_steps=min(schedule.warmup_steps, 4))
        optimizer = dataclasses.replace(experiment.optimizer, schedule=schedule)
        return dataclasses.replace(experiment, optimizer=optimizer, loop=Loop(steps=4, save_every=2))

    return of


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


def slow(names):
    """The convolutions that take long to compile are for the slow tests."""
    return [name if name == "digits_mlp" else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow(CONFIGS))
def test_a_config_trained_two_steps_and_resumed_to_four_ends_with_the_same_bits(four_steps, name, tmp_path):
    experiment = four_steps(name)
    whole = fit(experiment, workdir=tmp_path / "whole", log=lambda text: None)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    folder = tmp_path / "resumed" / whole.path.relative_to(tmp_path / "whole")
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "summary.json").unlink()

    said = []
    resumed = fit(experiment, workdir=tmp_path / "resumed", log=said.append)
    assert resumed.path == folder and "from step 2" in said[0]
    states = [Run(path, experiment).state() for path in (whole.path, folder)]
    assert int(states[0].step) == 4
    assert bits(states[0]) == bits(states[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_run_of_a_config_is_audited_blamed_compared_with_float64_and_its_laws_hold(four_steps, name, tmp_path):
    experiment = four_steps(name)
    precision = experiment.precision
    report = jaxmp.audit(experiment)
    # By hand: the gradient of each kernel of (inputs, outputs), and of all layers' inputs but the first's.
    assert not [found for found in report.findings if IN_FLOAT32.get(name, "?") not in found.source]
    of_loss = {"float32"} if name in IN_FLOAT32 else set()
    assert set(report.dot_flops_by_dtype) == {precision.removeprefix("mixed_")} | of_loss
    rows = experiment.data.batch_size
    kernels = [x.size for x in jax.tree.leaves(Trainer(experiment).state_spec.params) if x.ndim == 2]
    if name.endswith("mlp"):
        assert sum(report.dot_flops_by_dtype.values()) == 2 * rows * (3 * sum(kernels) - max(kernels))

    run = Run(fit(experiment, workdir=tmp_path, log=lambda text: None).path, experiment)
    blamed = blame_run(run, 4, log=lambda text: None)
    overflows = int(jaxmp.consecutive_skips(run.state().opt_state)) > 0  # the last step, the fourth, was skipped
    assert blamed.step == 4 and (blamed.found is not None) == overflows
    assert not overflows or (blamed.float32_helps and (blamed.passing_scale or 0) < blamed.scale)

    (errors,) = compare_gradients({precision: experiment}, 2)["precisions"].values()
    # The unit roundoff of float16 is 2^-11, and the bound that of the laws. An error of 0 would mean no half at all.
    found = [error for error in errors["relative_error"] if error is not None]  # None: not finite at the first scale
    assert all(0 < error < 64 * 2.0**-11 for error in found) and (found or overflows), errors

    given, *others = Trainer(experiment).inputs
    rng, shape = np.random.default_rng(1), (4, *given.shape[1:])
    whole = jnp.issubdtype(given.dtype, jnp.integer)
    example = jnp.asarray(rng.integers(0, 256, shape) if whole else rng.standard_normal(shape), given.dtype)
    if others:  # a number of steps
        example = (example, jnp.array([shape[1], 1, shape[1] // 2, shape[1] - 1], jnp.int32))
    laws = jaxmp.testing.policy_laws(experiment.model, precision, example)
    assert not [law for law in laws if law.verdict == "broken"], str(laws)


@pytest.mark.parametrize("name", [name for name in CONFIGS if getattr(shipped(name).data, "mean", (0.0,)) != (0.0,)])
def test_mean_and_std_are_those_of_the_train_split(name):
    data = shipped(name).data
    if data.name != "digits" and "JAXMP_DATA" not in os.environ:
        pytest.skip(f"needs {data.name} in $JAXMP_DATA")
    source = data.source("train")
    images = source[np.arange(len(source))]["image"] / np.float32(255)
    np.testing.assert_allclose(images.mean((0, 1, 2), dtype=np.float64), data.mean, atol=5e-5)
    np.testing.assert_allclose(images.std((0, 1, 2), dtype=np.float64), data.std, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_config_of_full_size_runs_two_steps_on_made_up_images_and_its_audit_is_clean(made_up, name):
    experiment = made_up(shipped(name), 4)
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, batch_size=2, workers=0))
    trainer = Trainer(experiment)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainer.state_spec.params)) == FULL_SIZE[name]
    assert [spec.shape for spec in trainer.inputs] == [(2, 224, 224, 3)]
    step, _ = trainer.program()
    report = jaxmp.audit(step, trainer.state_spec, trainer.batch_spec, policy=experiment.policy)
    assert not report.findings and list(report.dot_flops_by_dtype) == ["bfloat16"]
    two = dataclasses.replace(experiment, loop=Loop(steps=2, log_every=1), optimizer=jaxmp.SGD(1e-3))
    losses = [float(info.metrics["loss"].compute()) for info in jaxmp.steps(two)]
    assert len(losses) == 2 and np.isfinite(losses).all(), losses


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("digits_mlp", 0.97), ("digits_cnn", 0.98)])
def test_digits_reach_the_accuracy_of_their_record(name, least, tmp_path):
    assert fit(shipped(name), workdir=tmp_path).summary["test"]["accuracy"] >= least
