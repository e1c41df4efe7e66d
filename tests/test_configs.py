from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
import jaxmp.testing
from jaxmp.data.augment import RandomResizedCrop
from jaxmp.data.image_folder import ImageFolder
from jaxmp.data.text import TextDataset
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.settings import Loop
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run
from jaxmp.runs.teacher import Teacher
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.gradients import compare_gradients
from jaxmp.studies.overflow import blame_run
from jaxmp.tasks.task import objectives_of
from jaxmp.testing import StepAdapter, step_laws

CONFIGS = [path.stem for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))]

IN_FLOAT32 = {"spoken_digits_ctc": "jaxmp/tasks/ctc.py"}
"""where a config's loss has products of its own, which are in float32 whatever the policy, as losses are: optax picks
the log-probabilities of labels by products with zeros and ones"""

UNIT_ROUNDOFFS = {"mnist_dcgan": 128, "cifar10_resnet18_fast": 128}
"""the bound of a config's gradients, where it is not 64 unit roundoffs: a rectified unit whose input is rounded across
0 passes on another share of its gradient. With linear units, which are checked as well, they keep a bound of 16: the
largest error falls from 0.051 to 0.007 and from 0.365 to less than 0.032."""


def shipped(name):
    return ConfigFile.find(str(Path(__file__).parent.parent / "configs" / f"{name}.py")).experiment()


# Full-size configs, each with a smaller model of its kind, for shorter rows or smaller images, and its number of
# parameters.
FULL_SIZE = {
    "openwebtext_gpt2_124m": ({"layers": 2, "heads": 2, "width": 64, "context": 32}, 124_439_808),
    "bert_base_mlm": ({"layers": 2, "heads": 2, "width": 64, "hidden": 128, "context": 32}, 109_514_298),
    "imagenet_resnet50": ({"blocks": (1, 1), "channels": 8}, 25_557_032),
    "imagenet_vit_b16": ({"layers": 2, "heads": 2, "width": 64}, 86_567_656),
}


TEACHER = """
import numpy as np

from jaxmp import Arrays, Experiment, Loop
from jaxmp.models.mlp import MLP


def load(split):
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (32, 28, 28, 1)).astype(np.uint8), "label": rng.integers(0, 10, 32)}


def get_config():
    data = Arrays(load, batch_size=8, mean=(0.1307,), std=(0.3081,))
    return Experiment(model=MLP(features=(8,), classes=10), data=data, loop=Loop(steps=2))
"""


@pytest.fixture
def four_steps(made_up, tmp_path_factory):
    """A config, by name, with 32 random rows of the same shape, and a checkpoint half way; and a teacher of that."""

    def with_teacher(experiment):
        folder = tmp_path_factory.mktemp("teacher")
        (folder / "teacher.py").write_text(TEACHER)
        config = ConfigFile.find(str(folder / "teacher.py"))
        how = {"origin": config.origin([]), "log": lambda text: None}
        run = fit(config.experiment(), workdir=folder, name="teacher", **how).path
        task = dataclasses.replace(experiment.task, teacher=Teacher(str(run)))
        return dataclasses.replace(experiment, task=task)

    def of(name):
        experiment = shipped(name)
        if name in FULL_SIZE:
            images = isinstance(experiment.data, ImageFolder)
            small = {"size": (64, 64), "crop": RandomResizedCrop(size=32)} if images else {"length": 32}
            model, data = experiment.model.clone(**FULL_SIZE[name][0]), dataclasses.replace(experiment.data, **small)
            experiment = dataclasses.replace(experiment, model=model, data=data)
        experiment = made_up(experiment, 32)
        if hasattr(experiment.optimizer, "sampling"):
            pytest.importorskip("dp_accounting")
        if hasattr(experiment.task, "teacher"):
            experiment = with_teacher(experiment)
        return dataclasses.replace(experiment, loop=Loop(steps=4, save_every=2))

    return of


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


LONG = (
    *("bert_base_mlm", "cifar10_", "imagenet_", "mnist_cnn", "mnist_dcgan", "mnist_dpsgd", "mnist_mlp", "openwebtext_"),
    *("permuted_mnist", "spoken_digits_", "sst2_bert"),
)
"""configs that take long to compile, or have a like one among the others"""


def marked(names, longer=()):
    """The names for parametrize: the slow suite has those that are neither LONG nor in `longer`."""
    long = {name for name in names if name.startswith((*LONG, *longer))}
    return [pytest.param(name, marks=pytest.mark.full_size if name in long else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(CONFIGS))
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


LONGER = ("mnist_vae", "shakespeare_gpt", "sst2_lstm")
"""configs whose whole run takes a minute, beside like ones that do not"""


@pytest.mark.parametrize("name", marked(CONFIGS, LONGER))
def test_a_whole_run_of_a_config_is_audited_blamed_compared_with_float64_and_its_laws_hold(
    four_steps, name, tmp_path, monkeypatch
):
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
    opt_state, names = run.state().opt_state, list(objectives_of(experiment.task)) or [None]
    compared = compare_gradients({precision: experiment}, 2)
    for objective in names:
        own = opt_state if objective is None else opt_state[objective]
        if not run.trainer.is_private:  # whose steps cannot be blamed
            blamed = blame_run(run, 4, objective=objective, log=lambda text: None)
            overflows = int(jaxmp.consecutive_skips(own)) > 0  # the last step, the fourth, was skipped
            assert blamed.step == 4 and (blamed.found is not None) == overflows
            assert not overflows or (blamed.float32_helps and (blamed.passing_scale or 0) < blamed.scale)

        of = compared if objective is None else compared["objectives"][objective]
        (errors,) = of["precisions"].values()
        # The unit roundoff of float16 is 2^-11, and the bound that of the laws. An error of 0 would mean no half at
        # all. None: not finite at the first scale, at which steps of the run were skipped then.
        found = [error for error in errors["relative_error"] if error is not None]
        skipped = int(jaxmp.skipped_steps(own)) > 0
        assert all(0 < error < 64 * 2.0**-11 for error in found) and (found or skipped), errors

    trainer = Trainer(experiment)
    if isinstance(experiment.data, TextDataset):
        batch = trainer.feed(fuse=False).batch(0)
        example = tuple(batch[name][:4] for name in experiment.task.inputs)
    else:
        given, *others = trainer.inputs
        example = jnp.asarray(np.random.default_rng(1).standard_normal((4, *given.shape[1:])), given.dtype)
        if others:  # a number of steps
            steps = given.shape[1]
            example = (example, jnp.array([steps, 1, steps // 2, steps - 1], jnp.int32))
    laws = jaxmp.testing.policy_laws(experiment.model, precision, example, multiple=UNIT_ROUNDOFFS.get(name, 64))
    assert not [law for law in laws if law.verdict == "broken"], str(laws)
    if name in UNIT_ROUNDOFFS:
        for rectified in ("relu", "leaky_relu"):
            monkeypatch.setattr(nn, rectified, lambda x, slope=0: x)
        laws = jaxmp.testing.policy_laws(experiment.model, precision, example, multiple=16)
        assert not [law for law in laws if law.verdict == "broken"], str(laws)


SHORT = ("digits_mlp",)
"""configs whose step the slow suite has time to check; `-m full_size` checks all others"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SHORT else pytest.mark.full_size)
        for name in CONFIGS
        if name != "mnist_dpsgd"  # a private step has laws of its own: tests/testing/test_private_laws.py
    ],
)
def test_the_laws_of_a_step_hold_for_the_step_of_a_config(four_steps, name):
    trainer = Trainer(four_steps(name))
    step, batch = jax.jit(trainer.train_step), trainer.feed(fuse=False).batch(0)
    loss = None if trainer.objectives else lambda out: out[1]["loss"].total
    laws = step_laws(StepAdapter(lambda: trainer.devices.put_state(trainer.init()), step, batch, loss=loss))
    assert not laws.broken, str(laws)
    assert {"trains", "types_stay", "one_compile", "bad_gradient_is_skipped", "survives_saving"} <= {
        result.law for result in laws if result.verdict == "holds"
    }


@pytest.mark.full_size
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_config_has_the_published_parameters_and_runs_two_steps(made_up, name):
    experiment = made_up(shipped(name), 8)
    report = jaxmp.audit(experiment)  # of whole rows, traced and not run
    assert not report.findings and list(report.dot_flops_by_dtype) == ["bfloat16"]
    changed = {"length": 64} if isinstance(experiment.data, TextDataset) else {"workers": 0}
    data = dataclasses.replace(experiment.data, **changed, batch_size=1)
    two = dataclasses.replace(experiment, data=data, loop=Loop(steps=2, steps_per_dispatch=1))
    losses = []
    for info in jaxmp.steps(two):
        losses.append(info.metrics["loss"])
        assert sum(leaf.size for leaf in jax.tree.leaves(info.state.params)) == FULL_SIZE[name][1]
    assert len(losses) == 2 and all(np.isfinite(float(loss.compute())) for loss in losses)


FROM_MINUS_ONE_TO_ONE = "mnist_dcgan"  # its images have the range of tanh, of which its generator makes images
NORMALISED = [
    name for name in CONFIGS if getattr(shipped(name).data, "mean", (0.0,)) != (0.0,) and name != FROM_MINUS_ONE_TO_ONE
]


@pytest.mark.parametrize("name", [name for name in NORMALISED if name not in FULL_SIZE])
def test_mean_and_std_are_those_of_the_train_split(name):
    data = shipped(name).data
    rows = getattr(data, "rows", data)  # of a dataset that changes the rows of another
    if rows.name != "digits" and "JAXMP_DATA" not in os.environ:
        pytest.skip(f"needs {rows.name} in $JAXMP_DATA")
    source = rows.source("train")
    images = source[np.arange(len(source))]["image"] / np.float32(255)
    np.testing.assert_allclose(images.mean((0, 1, 2), dtype=np.float64), data.mean, atol=5e-5)
    np.testing.assert_allclose(images.std((0, 1, 2), dtype=np.float64), data.std, atol=5e-5)


@pytest.mark.slow
def test_digits_cnn_reaches_the_accuracy_of_its_record(tmp_path):
    """That of digits_mlp is looked at where README's commands run."""
    assert fit(shipped("digits_cnn"), workdir=tmp_path).summary["test"]["accuracy"] >= 0.98
