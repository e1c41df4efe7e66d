"""What is measured beside the task's metrics: right, and without a bit of the run changed."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxmp import Adam, Arrays, Classification, CosineDecay, Experiment, InputError, Loop, Run, Scaling, fit
from jaxmp.runs.checks import check
from jaxmp.runs.records import device_peak
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.loss import make_loss
from jaxmp.training.metrics import WATCHABLE, Mean

TIMING = {"wall_seconds", "examples_per_second", "steps_per_second", "tflops_per_second"}


class Net(nn.Module):
    convolution: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        if self.convolution:
            x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(x))


def load(split):
    rng = np.random.default_rng(len(split))
    label = rng.integers(0, 3, 50)
    return {"image": rng.normal(size=(50, 6, 6, 1)).astype(np.float32) + label[:, None, None, None], "label": label}


BASE = Experiment(
    model=Net(),
    data=Arrays(load, batch_size=10, images=()),
    optimizer=Adam(0.01, schedule=CosineDecay(warmup_steps=4), clip_norm=0.5),
    scaler=Scaling(init_scale=2.0**24, growth_interval=4),  # the first steps are skipped
    loop=Loop(steps=15, log_every=3, ema_decay=0.9),
)


def watching(experiment, **fields):
    return dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, **fields))


def bits(run):
    state = run.state()
    leaves = [*jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "convolution"), [("float32", False), ("mixed_float16", True)])
def test_no_bit_of_a_run_changes_when_everything_is_logged(tmp_path, precision, convolution):
    plain = dataclasses.replace(BASE, precision=precision, model=Net(convolution))
    watched = watching(plain, watch=WATCHABLE, log_images=2, ranges_every=3, log_every=1)
    runs = [Run(fit(each, workdir=tmp_path / str(each is watched)).path, each) for each in (plain, watched)]
    assert bits(runs[0]) == bits(runs[1])
    assert [run.summary["test"] for run in runs[:1]] == [run.summary["test"] for run in runs[1:]]
    evaluated = [[line["loss"] for line in lines(run) if line["split"] == "validation"] for run in runs]
    assert evaluated[0] == evaluated[1]
    assert all(set(WATCHABLE) <= set(line) for line in lines(runs[1]) if line["split"] == "train")
    assert not any(set(WATCHABLE) & set(line) for line in lines(runs[1]) if line["split"] != "train")


def events(path):
    """The events of a TFRecord file: each between its length with a checksum, and a checksum of its own."""
    data = path.read_bytes()
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12:end])
        data = data[end + 4 :]


@pytest.mark.slow
def test_what_a_run_trains_on_is_on_the_pages_of_tensorboard(tmp_path):
    run = Run(fit(watching(BASE, steps=4, log_images=3), workdir=tmp_path).path, BASE)
    (file,) = run.path.glob("events.out.tfevents.*")
    found = {value.tag: value for event in events(file) for value in event.summary.value}
    assert [found.pop(f"train/batch/{i}").image.width for i in range(3)] == [6] * 3 and "train/batch/3" not in found
    settings, policies = (found[f"{name}/text_summary"].tensor.string_val[0] for name in ("experiment", "policy"))
    assert b"| optimizer.learning_rate | 0.01 |" in settings and b"Dense_0" in policies
    metrics, values = (found[f"_hparams_/{name}"].metadata.plugin_data for name in ("experiment", "session_start_info"))
    assert b"validation/accuracy" in metrics.content and b"optimizer.clip_norm" in values.content


def test_the_most_memory_is_that_of_the_device_that_held_most(monkeypatch):
    def devices(*told):
        monkeypatch.setattr(
            jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda t=t: t) for t in told]
        )

    devices(None, {})
    assert device_peak() == {}
    devices({"peak_bytes_in_use": 3}, None, {"peak_bytes_in_use": 5})
    assert device_peak() == {"device_peak_bytes": 5}


@pytest.mark.slow
def test_the_most_memory_of_a_device_is_in_the_lines_where_the_device_tells(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxmp.runs.records.device_peak", lambda: {"device_peak_bytes": 5})
    found = [line for line in lines(Run(fit(BASE, workdir=tmp_path).path, BASE)) if line["split"] == "train"]
    assert found and all(line["device_peak_bytes"] == 5 for line in found)


@pytest.mark.slow
def test_the_learning_rate_of_a_line_is_that_of_the_last_applied_step(tmp_path):
    run = Run(fit(watching(BASE, log_every=1), workdir=tmp_path).path, BASE)
    found = {line["step"]: line for line in lines(run) if line["split"] == "train"}
    assert found[1]["skipped_steps"] == 1, "so that steps and applied steps differ"
    for line in found.values():
        applied = max(line["applied_steps"] - 1, 0)
        warmup, progress = min(1.0, (applied + 1) / 4), max(0.0, (applied - 4) / 11)
        expected = 0.01 * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-6)
    assert not any("learning_rate" in line for line in lines(run) if line["split"] != "train")


class Same(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


@dataclasses.dataclass(frozen=True)
class OfItsOwnMean(Classification):
    def __call__(self, outputs, batch):
        loss, metrics = super().__call__(outputs, batch)
        return Mean(loss.total * 1, loss.weight), metrics


def test_losses_that_are_not_known_one_by_one_are_refused_before_the_first_step():
    with pytest.raises(InputError, match=r"zero_losses: OfItsOwnMean makes its loss otherwise than by Mean.of"):
        check(Trainer(watching(dataclasses.replace(BASE, task=OfItsOwnMean()), watch=("zero_losses",))))


def test_the_share_of_losses_that_are_exactly_zero_is_counted_under_their_weights():
    logits = jnp.array([[40.0, 0, 0], [0, 40.0, 0], [1.0, 0, 0], [40.0, 0, 0]])
    batch = {"image": logits, "label": jnp.array([0, 1, 0, 0]), "weight": jnp.array([1.0, 1, 1, 0])}
    loss_fn = make_loss(Same(), Classification(), "float32", zero_losses=True)
    _, (_, metrics, _) = loss_fn({}, {}, batch, jax.random.key(0))
    assert (float(metrics["zero_losses"].total), float(metrics["zero_losses"].weight)) == (2.0, 3.0)
