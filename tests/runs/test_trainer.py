"""The compiled program of a run: runs that differ in numbers alone have the same, to the letter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmp.data.arrays import Arrays
from jaxmp.data.augment import Augment
from jaxmp.data.pipeline import stream
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.models.mlp import MLP
from jaxmp.runs.checks import reading_processes
from jaxmp.runs.trainer import Trainer
from jaxmp.training.feed import Resident
from jaxmp.training.optimizers import DPSGD, SGD, AdamW
from jaxmp.training.schedules import CosineDecay

OTHER = {"learning_rate": 0.03, "weight_decay": 0.003, "clip_norm": 2.0, "momentum": 0.8, "eps": 1e-6}


def blobs(split):
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 255, (16, 4, 4, 1), np.uint8), "label": rng.integers(0, 2, 16)}


BASE = Experiment(
    MLP((4,), 2),
    Arrays(blobs, batch_size=8),
    optimizer=SGD(0.1, schedule=CosineDecay(), weight_decay=1e-4, clip_norm=1.0),
    precision="mixed_float16",
    loop=Loop(steps=4, ema_decay=0.9),
)
AUGMENTED = Arrays(blobs, batch_size=8, augment=Augment(flip=True))
STREAMED = dataclasses.replace(AUGMENTED, device_limit=0)
GAN = ConfigFile.find(str(Path(__file__).parents[1] / "configs" / "gan.py")).experiment()
SLOW = ("streamed", "pmap")
HALVES = Loop(steps=4, accumulate_steps=2)


def with_other_numbers(experiment):
    """The same experiment with another value of each number that need not be a constant."""
    optimizer, loop = experiment.optimizer, experiment.loop
    own = {name: value for name, value in OTHER.items() if name in optimizer.numbers(4)}
    if isinstance(optimizer.schedule, CosineDecay):
        own["schedule"] = CosineDecay(warmup_steps=3, final=0.5)
    loop = dataclasses.replace(loop, ema_decay=loop.ema_decay and 0.5, steps=6)
    return dataclasses.replace(experiment, optimizer=dataclasses.replace(optimizer, **own), loop=loop, seed=7)


def lowered(experiment, *, fuse):
    """The program that trains, as StableHLO."""
    trainer = Trainer(experiment)
    feed, devices = trainer.feed(fuse=fuse), trainer.devices
    given = devices.put_state(trainer.init()), devices.put(trainer.no_metrics)
    if isinstance(feed, Resident):
        rows = devices.put(trainer.batches.epoch_rows(0))
        count = (np.int32(1),) if fuse else ()
        return feed.program.lower(*given, feed.columns, rows, feed.arguments, *count).as_text()
    raw = next(stream(trainer.source(), trainer.batches, 0, 1))
    return feed.program.lower(*given, devices.put_local(raw), feed.arguments).as_text()


@pytest.mark.parametrize(
    ("fields", "fuse"),
    [
        pytest.param({}, True, id="fused"),
        *[
            pytest.param(fields, fuse, id=name, marks=pytest.mark.slow if name in SLOW else pytest.mark.full_size)
            for name, fields, fuse in (
                ("augmented", {"data": AUGMENTED}, False),
                ("streamed", {"data": STREAMED}, False),
                ("pmap", {"data": AUGMENTED, "parallel": Parallel("pmap")}, True),
                ("zero1", {"parallel": Parallel("jit", "zero1")}, True),
                ("fsdp", {"parallel": Parallel("jit", "fsdp"), "optimizer": AdamW(1e-3, clip_norm=1.0)}, False),
                ("microbatches", {"loop": HALVES, "optimizer": AdamW(1e-3)}, True),
                ("half weights", {"precision": "bfloat16,rounding=kahan"}, True),
                ("private", {"optimizer": DPSGD(0.1, sampling="shuffled"), "precision": "float32"}, True),
            )
        ],
    ],
)
def test_runs_that_differ_in_numbers_alone_run_the_same_program_to_the_letter(fields, fuse):
    experiment = dataclasses.replace(BASE, **fields)
    text = lowered(experiment, fuse=fuse)
    assert lowered(with_other_numbers(experiment), fuse=fuse) == text


class Wide(Arrays):
    """Rows of which the device keeps 1 MiB each."""

    def prepare_ahead(self, columns):
        return columns | {"wide": np.zeros((len(columns["label"]), 2**18), np.float32)}


@pytest.mark.parametrize(("limit", "streamed"), [(15, True), (17, False)])
def test_a_split_is_streamed_if_what_the_device_would_keep_of_it_is_too_large(limit, streamed, monkeypatch):
    trainer = Trainer(dataclasses.replace(BASE, data=Wide(blobs, batch_size=8, device_limit=limit, workers=1)))
    assert trainer.is_streamed == streamed and reading_processes(trainer) == streamed
    for kind in ("Resident", "Streamed"):
        monkeypatch.setattr(f"jaxmp.runs.trainer.{kind}", lambda *args, kind=kind, **how: kind)
    assert trainer.feed(fuse=False) == ("Streamed" if streamed else "Resident")


@pytest.mark.slow
def test_several_objectives_have_numbers_each():
    other = {**GAN.optimizer, "generator": dataclasses.replace(GAN.optimizer["generator"], learning_rate=0.5)}
    assert lowered(GAN, fuse=False) == lowered(dataclasses.replace(GAN, optimizer=other), fuse=False)
    trainer = Trainer(dataclasses.replace(GAN, optimizer=other))
    assert trainer.numbers["generator"]["learning_rate"] == 0.5
    state, batch = trainer.init(), trainer.feed(fuse=False).batch(0)
    step = jax.jit(trainer.train_step)
    with_constants, with_arguments = (step(state, batch, *own)[0] for own in ((), (trainer.numbers,)))
    for a, b in zip(jax.tree.leaves(with_constants.params), jax.tree.leaves(with_arguments.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_first_state_has_the_same_bits_however_well_it_is_compiled(monkeypatch):
    """Else the weights of the runs that are on record could not be made again."""
    experiment = ConfigFile.find("digits_cnn").experiment()
    fast = Trainer(experiment).init()
    monkeypatch.setattr("jaxmp.runs.trainer.FAST_COMPILE", None)
    well = Trainer(experiment).init()
    for a, b in zip(jax.tree.leaves(fast.params), jax.tree.leaves(well.params), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
