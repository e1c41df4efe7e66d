"""A transformer and other models on eight virtual CPU devices, sharded in every way."""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.cli import main
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.instruments.program import Program
from jaxmp.runs.checkpoint import Checkpoints
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.scalers import Scaling
from jaxmp.training.metrics import Mean, compute
from jaxmp.training.optimizers import SGD, AdamW
from jaxmp.training.pruning import Pruning, masked, masks_of

ROWS, LENGTH, WORDS, WIDTH = 40, 6, 16, 64


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        mask = nn.make_causal_mask(x[..., 0])
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.2, broadcast_dropout=False)
        x = x + attention(nn.LayerNorm()(x), mask=mask, deterministic=not train)
        y = nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return x + nn.Dropout(0.2, deterministic=not train)(y), None


class Transformer(nn.Module):
    """Two layers, their weights scanned."""

    @nn.compact
    def __call__(self, words, *, train=False):
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = layers(name="layers")(nn.Embed(WORDS, WIDTH)(words), train)
        return nn.Dense(WORDS)(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class MaskedWords:
    """The next word, where it counts."""

    inputs: tuple[str, ...] = ("words",)
    target: str = "next"

    def __call__(self, logits, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["next"])
        weight = batch["counts"].astype(jnp.float32) * batch["weight"][:, None]
        return Mean.of(losses, weight), {"accuracy": Mean.of(logits.argmax(-1) == batch["next"], weight)}


def sentences(split):
    rng = np.random.default_rng(0)
    words = rng.integers(0, WORDS, (ROWS, LENGTH))  # with batches of 16: the last of an epoch has 8
    return {"words": words, "next": (3 * words + 1) % WORDS, "counts": rng.random((ROWS, LENGTH)) < 0.4}


TRIP = 64.0


@jax.custom_vjp
def tripwire(y, x):
    """`y`, (rows, n); its gradient is infinite in the rows of `x`, (rows, m), in which a number is TRIP."""
    return y


def tripped(x, gradient):
    return jnp.where((x == TRIP).any(1, keepdims=True), jnp.inf, gradient), jnp.zeros_like(x)


tripwire.defvjp(lambda y, x: (y, x), tripped)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(nn.Dense(128)(x)))
        return x, None


class MLP(nn.Module):
    """Three scanned layers with dropout."""

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(x.shape[0], -1)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = layers(name="layers")(tripwire(nn.Dense(128)(x), x), train)
        return nn.Dense(3)(x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x.reshape(x.shape[0], -1))[:, :3]


def images(split):
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(ROWS, 4, 4, 1)).astype(np.float32), "label": rng.integers(0, 3, ROWS)}


TRANSFORMER = Experiment(
    model=Transformer(),
    data=Arrays(sentences, batch_size=16, images=()),
    task=MaskedWords(),
    optimizer=AdamW(1e-3, clip_norm=1.0),
    precision="float32",
)
LAYERS = Experiment(
    model=MLP(),
    data=Arrays(images, batch_size=16, images=()),
    optimizer=SGD(0.1),
    precision="float32",
    scaler=Scaling(kind="dynamic", growth_interval=2),
)
NORMED = Experiment(
    model=Normed(), data=Arrays(images, batch_size=ROWS, images=()), optimizer=SGD(0.1), precision="float32"
)


class Session:
    """The compiled step, the state, and the loss of each step so far."""

    def __init__(self, experiment, count, parallel, loop):
        self.experiment = dataclasses.replace(experiment, parallel=parallel, loop=Loop(steps=50, ema_decay=0.9, **loop))
        trainer = self.trainer = Trainer(self.experiment)
        size, microbatches = experiment.data.batch_size, self.experiment.loop.accumulate_steps
        self.devices = parallel.make(size, microbatches, devices=jax.devices()[:count])
        trainer.__dict__["devices"] = self.devices
        self.feed, self.fresh = trainer.feed(fuse=False), trainer.init()
        self.restart()
        args = self.state_on_devices, self.devices.put(trainer.no_metrics), self.feed.columns
        rows = self.devices.put(trainer.batches.epoch_rows(0))
        self.feed.program = self.feed.program.lower(*args, rows, self.feed.arguments).compile()

    def restart(self, state=None, step=0):
        self.losses = [None] * step
        state = jax.tree.map(jnp.copy, self.fresh if state is None else state)  # what it is made from is not donated
        self.state_on_devices = self.devices.put_state(state)

    def train(self, steps):
        for i in range(len(self.losses), steps):
            nothing = self.devices.put(self.trainer.no_metrics)
            self.state_on_devices, metrics = self.feed.run(self.state_on_devices, nothing, i, 1)
            self.losses.append(compute(self.devices.get(metrics))["loss"])
        return np.array(self.losses)

    @property
    def state(self):
        return self.devices.get(self.state_on_devices)

    def collectives(self):
        return Program.read(self.feed.program).collectives


@functools.cache
def compiled(experiment, count, shard, mode, loop):
    return Session(experiment, count, Parallel(mode, shard), dict(loop))


def session(experiment, count=8, shard="replicated", mode="jit", **loop):
    """A session from its start, compiled once."""
    found = compiled(experiment, count, shard, mode, tuple(loop.items()))
    found.restart()
    return found


def agree(steps, tolerance, expected, *sessions):
    for found in sessions:
        np.testing.assert_allclose(found.train(steps), expected.train(steps), rtol=tolerance)


def all_ways():
    """A session of scanned layers with dropout for each way to train on eight devices."""
    yield session(LAYERS, mode="pmap")
    yield session(LAYERS, shard="zero1", accumulate_steps=2)
    yield session(LAYERS, shard="fsdp")


@pytest.mark.slow
@pytest.mark.eight_devices
def test_layers_train_alike_however_they_are_sharded():
    agree(10, 2e-6, session(LAYERS, 1), *all_ways())


def numbers(tree):
    leaves = jax.tree.leaves(tree)
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]


def size(tree):
    return sum(leaf.nbytes for leaf in numbers(tree))


def bytes_of(kind, found):
    return sum(each.nbytes for each in found if each.kind == kind)


SUMS = 128  # bytes: weights, losses and metrics, and what the optimizer asks for, are summed over devices as well


def is_reduced_once_and_not_in_a_loop(replicated):
    found, params = replicated.collectives(), size(replicated.state.params)
    assert not any(each.in_loop for each in found)
    assert [each.kind for each in found if each.nbytes > SUMS] == ["all-reduce"]
    assert params <= bytes_of("all-reduce", found) <= params + SUMS


@pytest.mark.slow
@pytest.mark.eight_devices
def test_the_gradient_of_scanned_weights_is_reduced_once_and_not_in_a_loop():
    """Four bytes a parameter."""
    is_reduced_once_and_not_in_a_loop(session(LAYERS, mode="pmap"))


@pytest.mark.slow
@pytest.mark.eight_devices
def test_zero1_scatters_the_gradient_once_and_gathers_the_weights():
    zero1 = session(LAYERS, shard="zero1", accumulate_steps=2)
    found, params = zero1.collectives(), zero1.state.params
    split = size([x for x in jax.tree.leaves(params) if x.size >= 2**8])
    assert not any(each.in_loop for each in found)
    assert bytes_of("reduce-scatter", found) == bytes_of("all-gather", found) == split
    assert size(params) - split <= bytes_of("all-reduce", found) <= size(params) - split + SUMS


@pytest.mark.slow
@pytest.mark.eight_devices
def test_memory_shrinks_with_the_number_of_devices():
    for sharded in (session(LAYERS, shard="zero1", accumulate_steps=2), session(LAYERS, shard="fsdp")):
        memory = sharded.feed.program.memory_analysis()
        params, optimizer = size(sharded.state.params), size((sharded.state.opt_state, sharded.state.ema))
        ideal = (params + optimizer) / 8 if sharded.devices.shard == "fsdp" else params + optimizer / 8
        data = size(sharded.feed.columns) + sharded.trainer.batches.epoch_rows(0).nbytes
        assert memory.argument_size_in_bytes - data <= 1.1 * ideal
        shares = [x.addressable_shards[0].data.nbytes for x in numbers(sharded.state)]
        assert memory.alias_size_in_bytes == sum(shares)  # all of it is donated


def shards_of(tree):
    return [[np.asarray(shard.data).tobytes() for shard in x.addressable_shards] for x in numbers(tree)]


@pytest.mark.slow
@pytest.mark.eight_devices
def test_an_inf_on_one_replica_is_skipped_by_all_in_every_sharding():
    for each in all_ways():
        columns = each.feed.columns
        rows, _ = each.trainer.batches.rows(0)
        image = np.array(each.devices.get(columns)["image"])
        image[rows[-1]] = TRIP  # one row of the first batch, and so on one device; the loss stays finite
        each.feed.columns = columns | {"image": each.devices.put(image)}
        start = shards_of((each.state_on_devices.params, each.state_on_devices.ema))
        each.train(1)
        end = each.state_on_devices
        each.feed.columns = columns
        assert jaxmp.skipped_steps(each.state.opt_state) == 1
        scales = [np.asarray(shard.data).item() for shard in jaxmp.loss_scale(end.opt_state).addressable_shards]
        assert scales == [2.0**14] * 8
        assert shards_of((end.params, end.ema)) == start


@pytest.mark.eight_devices
@pytest.mark.slow
def test_what_fsdp_saved_is_restored_to_the_bit_on_one_device_and_on_eight():
    saved = session(LAYERS, shard="fsdp")
    saved.train(3)
    assert not saved.state.params["layers"]["Dense_0"]["kernel"].is_fully_replicated
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(3, saved.state)
        before = [np.asarray(x).tobytes() for x in numbers(saved.state)]
        for other in (session(LAYERS, 1), *all_ways()):
            _, state = checkpoints.restore(other.fresh)
            other.restart(state, step=3)
            assert [np.asarray(x).tobytes() for x in numbers(other.state)] == before
            assert np.isfinite(other.train(4)[3])
        checkpoints.close()


@pytest.mark.eight_devices
@pytest.mark.full_size
def test_pruned_weights_are_the_same_and_zero_however_the_state_is_sharded():
    pruned = dataclasses.replace(LAYERS, pruning=Pruning(0.9, scope="global", end=0.1, rounds=2))
    ways = (("zero1", "jit"), ("fsdp", "jit"), ("replicated", "pmap"))
    (first, *others) = [session(pruned, 1), *(session(pruned, shard=shard, mode=mode) for shard, mode in ways)]
    agree(8, 1e-5, first, *others)
    for each in (first, *others):
        masks = masks_of(each.state.opt_state)
        share = sum(np.sum(~np.asarray(mask)) for mask in jax.tree.leaves(masks))
        assert share == round(0.9 * sum(mask.size for mask in jax.tree.leaves(masks)))
        for tree in (each.state.params, each.state.ema):
            assert jax.tree.all(jax.tree.map(np.array_equal, tree, masked(tree, masks)))


@pytest.mark.eight_devices
@pytest.mark.full_size
def test_packed_optimizer_state_is_equal_to_the_bit_on_all_replicas_and_trains_in_every_sharding():
    optimizer = AdamW(1e-3, state_format="mu=block128,nu=block128,expanded")
    packed = dataclasses.replace(LAYERS, optimizer=optimizer)
    plain = session(dataclasses.replace(LAYERS, optimizer=AdamW(1e-3)), 1).train(10)
    for how in ({}, {"mode": "pmap"}, {"shard": "zero1"}, {"shard": "fsdp"}):
        found = session(packed, **how)
        np.testing.assert_allclose(found.train(10), plain, rtol=0.02)
        opt_state = found.state_on_devices.opt_state
        elements = [x for x in jax.tree.leaves(opt_state) if x.dtype == jnp.uint8]
        assert len(elements) == 2 * len(jax.tree.leaves(found.state.params))
        if found.devices.shard != "replicated":
            largest = max(elements, key=lambda x: x.size)
            assert largest.addressable_shards[0].data.size == largest.size // 8
            continue
        for x in numbers(opt_state):
            copies = [np.asarray(shard.data).tobytes() for shard in x.addressable_shards]
            assert len(copies) == 8 and len(set(copies)) == 1


@pytest.mark.eight_devices
@pytest.mark.slow
def test_batch_norm_per_replica_averages_the_statistics_of_the_replicas():
    rows = images("train")["image"].reshape(ROWS, -1).astype(np.float64)
    for choice, mode in (("global", "jit"), ("replica", "jit"), ("replica", "pmap")):
        normed = session(NORMED, mode=mode, batch_norm=choice)
        order, _ = normed.trainer.batches.rows(0)
        expected = rows.var(0) if choice == "global" else rows[order].reshape(8, 5, -1).var(1).mean(0)
        normed.train(1)
        found = normed.state.model_state["batch_stats"]["BatchNorm_0"]["var"]
        np.testing.assert_allclose(found, 0.5 + 0.5 * expected, rtol=1e-5)


def ways_of(experiment):
    yield session(experiment, 2)
    yield session(experiment, 4, mode="pmap")
    yield session(experiment, accumulate_steps=2)
    yield session(experiment, mode="pmap", accumulate_steps=2)
    yield session(experiment, 4, shard="zero1", accumulate_steps=4)
    yield session(experiment, shard="fsdp", accumulate_steps=2)


@pytest.mark.eight_devices
@pytest.mark.slow
def test_a_transformer_for_fifty_steps():
    """With dropout, also in attention, a masked loss and ragged last batches."""
    agree(10, 2e-6, session(TRANSFORMER, 1), *ways_of(TRANSFORMER))
    agree(50, 2e-5, session(TRANSFORMER, 1), *ways_of(TRANSFORMER))
    for mode in ("jit", "pmap"):
        is_reduced_once_and_not_in_a_loop(session(TRANSFORMER, mode=mode, accumulate_steps=2))


@pytest.mark.eight_devices
@pytest.mark.slow
def test_digits_for_fifty_steps():
    file = ConfigFile.find("digits_mlp")
    digits = dataclasses.replace(file.experiment(), precision="float32")
    agree(10, 2e-6, session(digits, 1), *ways_of(digits))
    agree(50, 2e-5, session(digits, 1), *ways_of(digits))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": ("pmap", "zero1")}, "parallel.shard=zero1 needs parallel.mode=jit; it is pmap"),
        ({"parallel": ("pmap", "fsdp")}, "parallel.shard=fsdp needs parallel.mode=jit; it is pmap"),
        ({"parallel": ("jit", "fsdp"), "loop": Loop(batch_norm="replica")}, "loop.batch_norm=replica: with .*fsdp"),
    ],
)
def test_what_no_mode_can_do_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LAYERS, **fields | {"parallel": Parallel(*fields["parallel"])})


def test_fsdp_has_no_reduce_dtype_of_its_own():
    experiment = dataclasses.replace(LAYERS, precision="float32,reduce=bf16", parallel=Parallel(shard="fsdp"))
    with pytest.raises(InputError, match=r"precision reduce=bfloat16: with parallel.shard=fsdp"):
        _ = Trainer(experiment).train_step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--parallel.mode pmap --parallel.shard zero1", "parallel.shard=zero1 needs parallel.mode=jit"),
        (
            "--parallel.remat Dens_0 --dry-run",
            "parallel.remat 'Dens_0' names no module; there are .*did you mean 'Dense_0'",
        ),
        ("--loop.accumulate-steps 3 --dry-run", r"3 microbatches .*nearest that does: 63 or 66"),
        ("--loop.accumulate-steps 0", "loop.accumulate_steps = 0: expected a whole number of at least 1"),
    ],
)
def test_the_command_line_ends_with_2(arguments, message, capsys):
    assert main(["train", "digits_mlp", *arguments.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
