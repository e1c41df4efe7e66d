"""The modes of training on eight virtual CPU devices."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.data.augment import Augment
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.runs.fit import steps
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.scalers import DynamicScaler
from jaxmp.scaling.transform import loss_scaling
from jaxmp.tasks.classification import Classification
from jaxmp.tasks.loss import init_model, make_loss
from jaxmp.training.metrics import compute
from jaxmp.training.parallel import Replicas, single
from jaxmp.training.state import TrainState
from jaxmp.training.step import make_train_step


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1))))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def batch(seed=0, rows=16):
    rng = np.random.default_rng(seed)
    weight = np.ones(rows, np.float32)
    weight[-5:] = 0  # the last two replicas have no or one example that counts
    return {
        "image": rng.normal(size=(rows, 4, 4, 2)).astype(np.float32),
        "label": rng.integers(0, 3, rows),
        "weight": weight,
    }


EXTRA = {"n": np.arange(3), "key": jax.random.key(5)}
"""parameters that the model does not know"""


@functools.cache
def compiled(model, mode, policy):
    """(init, train step, devices), on eight devices, or on one where mode is None."""
    policy = jaxmp.parse_policy(policy)
    tx = loss_scaling(optax.sgd(0.5, momentum=0.9), DynamicScaler(growth_interval=2))
    devices = Parallel(mode).make(16) if mode else None
    replicas = devices.replicas(policy.reduce) if mode else single
    loss_fn = make_loss(model, Classification(), policy, axis_name=replicas.axis_name)

    @jax.jit
    def init():
        params, model_state = init_model(model, Classification(), batch(), jax.random.key(0))
        return TrainState.create({**params, **EXTRA}, tx, key=jax.random.key(1), model_state=model_state, ema=True)

    def loss(params, *args):
        return loss_fn({name: leaf for name, leaf in params.items() if name not in EXTRA}, *args)

    step = make_train_step(loss, tx, ema_decay=0.9, replicas=replicas)
    return init, devices.compile(step, (0, 0)) if mode else jax.jit(step), devices


@functools.cache
def trained(model, mode, policy="float32", steps=3, change=lambda batch: batch):
    """(state, metrics of each step, the devices) after training."""
    init, step, devices = compiled(model, mode, policy)
    state, all_metrics = init(), []
    if mode:
        state = devices.put(state)
    for i in range(steps):
        rows = change(batch(i))
        state, metrics = step(state, devices.put_batch(rows) if mode else rows)
        all_metrics.append(compute(devices.get(metrics) if mode else metrics))
    return state, all_metrics, devices


def of_one(state, devices):
    return devices.get(state) if devices else state


def numbers(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]


def modes_agree(model):
    expected, metrics, _ = trained(model, None)
    for mode in ("jit", "pmap"):
        state, found, devices = trained(model, mode)
        state = of_one(state, devices)
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        for a, b in zip(numbers(state), numbers(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        for a, b in zip(found, metrics, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_jit_pmap_and_one_device_agree_on_an_mlp():
    modes_agree(MLP())


@pytest.mark.eight_devices
@pytest.mark.slow
def test_jit_pmap_and_one_device_agree_on_a_conv_net_with_batch_norm():
    modes_agree(ConvNet())


@pytest.mark.eight_devices
@pytest.mark.slow
def test_every_replica_ends_with_the_same_bits():
    for mode in ("jit", "pmap"):
        state, _, _ = trained(ConvNet(), mode)
        for leaf in jax.tree.leaves(state):
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                shards = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
                assert len(leaf.addressable_shards) == 8 and len(shards) == 1


@pytest.mark.eight_devices
@pytest.mark.slow
def test_an_inf_on_one_replica_skips_the_step_on_all_b14():
    def poison(rows):
        rows["image"][0] = np.inf  # of the first replica only
        return rows

    for mode in ("jit", "pmap"):
        state, _, devices = trained(ConvNet(), mode, "mixed_float16", steps=2, change=poison)
        start, _, _ = trained(ConvNet(), mode, "mixed_float16", steps=0)
        scales = np.unique([np.asarray(s.data) for s in jaxmp.loss_scale(state.opt_state).addressable_shards])
        assert scales.tolist() == [2.0**13]
        state, start = of_one(state, devices), of_one(start, devices)
        assert jaxmp.skipped_steps(state.opt_state) == 2
        for a, b in zip(numbers((state.params, state.ema)), numbers((start.params, start.ema)), strict=True):
            assert a.tobytes() == b.tobytes()
        for a, b in zip(numbers(state.model_state), numbers(start.model_state), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.slow
@pytest.mark.eight_devices
def test_integer_and_key_leaves_go_through_all_modes():
    for mode in (None, "jit", "pmap"):
        state, _, devices = trained(MLP(), mode)
        out = of_one(state, devices).params
        assert np.array_equal(out["n"], EXTRA["n"])
        assert np.array_equal(jax.random.key_data(out["key"]), jax.random.key_data(EXTRA["key"]))


def over_replicas(function, values, dtype=jnp.float32):
    """What `function` of the replicas and the value of each makes of `values`, one a replica."""
    mesh = jax.make_mesh((len(values),), ("data",), (AxisType.Auto,), devices=jax.devices()[: len(values)])
    replicas, spec = Replicas("data", mesh, dtype), jax.sharding.PartitionSpec
    mapped = jax.shard_map(
        lambda x: function(replicas, x), mesh=mesh, in_specs=spec("data"), out_specs=spec(), check_vma=False
    )
    return jax.jit(mapped)(jnp.asarray(values))


def reduced(values, dtype):
    """`values`, one a replica, summed by the gradient collective in `dtype`."""
    out = over_replicas(lambda replicas, x: replicas.sum_gradients({"w": x, "n": jnp.int32(3)}), values, dtype)
    assert out["n"] == 3
    return out["w"]


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_reduction_in_bfloat16_does_not_overflow_t3():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    values = np.array([largest, largest, -largest, largest, -largest, largest, -largest, -largest / 2], np.float32)
    out = reduced(values, jnp.bfloat16)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, largest / 2, rtol=2e-2)
    of_three = reduced(np.array([largest, largest, -largest], np.float32), jnp.bfloat16)
    np.testing.assert_allclose(of_three, largest, rtol=2e-2)
    np.testing.assert_array_equal(reduced(np.full(8, 40000, np.float16), jnp.float32), [320000])
    assert not np.isfinite(reduced(np.array([1] * 7 + [np.inf], np.float32), jnp.bfloat16))
    np.testing.assert_array_equal(reduced(np.full(8, 1 - 2j, np.complex64), jnp.bfloat16), [8 - 16j])


@pytest.mark.slow
@pytest.mark.eight_devices
def test_the_mean_of_the_model_state_does_not_overflow_in_float16_t3():
    mean = over_replicas(lambda replicas, x: replicas.mean(x), np.full(8, 40000, np.float16))
    assert mean.dtype == jnp.float16 and mean.tolist() == [40000]


class Random(nn.Module):
    """A model whose outputs are noise, so that equal noise shows."""

    @nn.compact
    def __call__(self, x, *, train):
        noise = jax.random.normal(self.make_rng("dropout"), (x.shape[0], 3)) if train else 0.0
        return nn.Dense(3)(x.reshape(x.shape[0], -1)) * 0 + noise


@pytest.mark.eight_devices
@pytest.mark.slow
def test_every_replica_draws_noise_of_its_own():
    losses = []
    for first in (0, 2):  # the first row of the first replica, and of the second

        def only(rows, first=first):
            return {**rows, "weight": np.eye(16, dtype=np.float32)[first], "label": np.zeros(16, int)}

        _, metrics, _ = trained(Random(), "jit", steps=1, change=only)
        losses.append(metrics[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.eight_devices
@pytest.mark.slow
def test_a_whole_run_with_augmentation_is_the_same_in_both_modes():
    rng = np.random.default_rng(0)
    columns = {"image": rng.integers(0, 256, (40, 6, 6, 1)).astype(np.uint8), "label": rng.integers(0, 2, 40)}

    def load(split):
        return columns

    runs = []
    for mode in ("jit", "pmap"):
        experiment = Experiment(
            model=MLP(),
            data=Arrays(load, batch_size=16, augment=Augment(crop_padding=2, flip=True)),
            precision="float32",
            parallel=Parallel(mode),
            loop=Loop(steps=5),
        )
        *_, last = steps(experiment)
        runs.append(numbers(last.state.params))
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


def words(rows):
    letters = [[ord(letter) - ord("a") for letter in text] for text in rows["text"]]
    return {**rows, "x": np.array(letters, np.float32)}


def noisy(key, row):
    return row if key is None else {**row, "x": row["x"] + 9 * jax.random.normal(key, row["x"].shape)}


@pytest.mark.eight_devices
@pytest.mark.slow
def test_transforms_give_the_same_rows_and_draws_on_one_device_and_on_eight():
    rng = np.random.default_rng(0)
    columns = {"text": ["".join(row) for row in rng.choice(list("abcd"), (40, 5))], "label": rng.integers(0, 2, 40)}
    data = Arrays(lambda split: columns, batch_size=16, host_transforms=(words,), transforms=(noisy,))
    runs = []
    for count, mode, limit in ((1, "jit", 1), (8, "jit", 1), (8, "jit", 0), (8, "pmap", 1), (8, "pmap", 0)):
        experiment = Experiment(
            model=MLP(),
            data=dataclasses.replace(data, device_limit=limit),
            task=Classification(inputs=("x",)),
            precision="float32",
            parallel=Parallel(mode),
            loop=Loop(steps=5),
        )
        trainer = Trainer(
            experiment, mesh=jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])
        )
        devices, feed = trainer.devices, trainer.feed(fuse=False)
        state, metrics = devices.put_state(trainer.init()), devices.put(trainer.no_metrics)
        for first, steps_ in ((0, 3), (3, 2)):  # an epoch has three batches, the last with padding
            state, metrics = feed.run(state, metrics, first, steps_)
        feed.close()
        runs.append([*numbers(devices.get(state).params), compute(devices.get(metrics))["loss"]])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_one_collective_carries_the_gradient_in_the_reduce_dtype():
    devices, tx = Parallel("jit").make(16), loss_scaling(optax.sgd(0.1))
    params, _ = jax.eval_shape(lambda k: init_model(MLP(), Classification(), batch(), k), jax.random.key(0))
    state = jax.eval_shape(lambda p: TrainState.create(p, tx, key=jax.random.key(0)), params)
    for text, dtype in (
        ("mixed_float16", "float32"),
        ("mixed_float16,reduce=bf16", "bfloat16"),
        ("bfloat16", "float32"),
    ):
        policy = jaxmp.parse_policy(text)
        loss_fn = make_loss(MLP(), Classification(), policy)
        step = jax.jit(make_train_step(loss_fn, tx, replicas=devices.replicas(policy.reduce)))
        sums = [v for equation in psums(jax.make_jaxpr(step)(state, batch()).jaxpr) for v in equation.invars]
        gradients = [v.aval for v in sums if v.aval.ndim]
        assert len(gradients) == len(jax.tree.leaves(params))  # each leaf once,
        assert {aval.dtype for aval in gradients} == {jnp.dtype(dtype)}
        compiled = step.lower(state, batch()).compile().as_text()
        kernels = [line for line in compiled.splitlines() if " all-reduce(" in line and "[32,8]" in line]
        assert len(kernels) == 1 and "[8,3]" in kernels[0]  # and all of them together


def psums(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("psum"):
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from psums(inner)


@pytest.mark.eight_devices
@pytest.mark.slow
def test_half_reductions_train_as_well():
    expected, _, _ = trained(MLP(), None)
    for mode in ("jit", "pmap"):
        state, _, devices = trained(MLP(), mode, "float32,reduce=bf16")
        for a, b in zip(numbers(of_one(state, devices).params), numbers(expected.params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-2)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_all_bytes_of_the_state_are_donated_on_every_device():
    devices = Parallel("jit").make(16)
    tx = loss_scaling(optax.adam(0.1))
    step = make_train_step(make_loss(MLP(), Classification(), "float32"), tx, replicas=devices.replicas())
    params, _ = init_model(MLP(), Classification(), batch(), jax.random.key(0))
    state = devices.put(TrainState.create(params, tx, key=jax.random.key(0)))
    compiled = devices.compile(step, (0, 0)).lower(state, devices.put_batch(batch())).compile()
    size = sum(leaf.nbytes for leaf in numbers(state)) + jax.random.key_data(state.key).nbytes
    assert compiled.memory_analysis().alias_size_in_bytes == size


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_size():
    for size, words in ((12, "8 or 16"), (5, "nearest that does: 8")):
        with pytest.raises(InputError, match=words):
            Parallel().make(size)
