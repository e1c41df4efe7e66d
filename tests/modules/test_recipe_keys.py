"""The random bits of a recipe: the same on every replica, fresh in each step, layer, product and turn of a loop."""

from __future__ import annotations

import functools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.models.mlp import MLP
from jaxmp.modules.linen import with_policy
from jaxmp.runs.trainer import Trainer
from jaxmp.training.optimizers import SGD

KEY = jax.random.key(0)
ROWS = 256
NOISY = "fprop=mxfp4:rceil/high,dgrad=high,wgrad=high,stochastic=activations"
"""stochastic in the forward product, where equal noise shows in the outputs"""


def relative(a, b):
    """The norm of the difference of two trees, over the norm of the second."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    numbers = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return (sum(np.sum((x - y) ** 2) for x, y in numbers) / sum(np.sum(y**2) for _, y in numbers)) ** 0.5


# Replicas, microbatches and ways to split the state.


def rows_of(split):
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(ROWS, 8, 8, 1)).astype(np.float32), "label": rng.integers(0, 10, ROWS)}


def experiment_of(precision, **how):
    loop = Loop(steps=1, accumulate_steps=how.pop("accumulate_steps", 1))
    data = Arrays(rows_of, batch_size=ROWS)
    return Experiment(
        model=MLP((64,), classes=10),
        data=data,
        optimizer=SGD(1.0, momentum=0.0),
        precision=precision,
        loop=loop,
        parallel=Parallel(**how),
    )


@functools.cache
def before_and_after(precision, **how):
    """Parameters before and after one step on eight devices, and whether all replicas hold the same bits."""
    trainer = Trainer(experiment_of(precision, **how))
    before = jax.device_get(trainer.init().params)
    for info in jaxmp.steps(trainer.experiment):
        state = info.state
    agree = True
    for leaf in jax.tree.leaves(state.params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        whole = shards[0].shape == leaf.shape
        agree &= not whole or all(np.array_equal(shards[0], shard) for shard in shards)
    return before, jax.device_get(state.params), agree


def step_of(precision, **how):
    before, after, agree = before_and_after(precision, **how)
    assert agree
    return jax.tree.map(lambda a, b: a - b, before, after)


@functools.cache
def on_one_device(precision):
    trainer = Trainer(experiment_of(precision))
    state, batch = trainer.init(), trainer.feed(fuse=False).batch(0)
    key = jax.random.fold_in(state.key, state.step)
    scale = jaxmp.loss_scale(state.opt_state)
    grads, _, _ = trainer.gradients()(state.params, state.model_state, scale, batch, key)
    return jax.tree.map(lambda x: np.asarray(x) / float(scale), grads)


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("precision", ["nvfp4", "mxfp4"])
def test_eight_devices_draw_what_one_draws_in_every_mode(precision):
    # 256 rows: each of eight devices has 32, a whole block, so that blocks are the same however rows are spread.
    assert jax.device_count() == 8
    alone = on_one_device(precision)
    away = relative(alone, on_one_device("mxfp8"))
    assert away > 0.05
    modes = [{}, {"mode": "pmap"}, {"shard": "zero1"}, {"shard": "fsdp"}]
    for how in modes if precision == "nvfp4" else [{}]:
        # What sums in another order turns over a few roundings of a few numbers.
        assert relative(step_of(precision, **how), alone) < 0.02 * away, how


@pytest.mark.slow
@pytest.mark.eight_devices
def test_microbatches_draw_by_the_example():
    # To elements without blocks, since those of the gradient of the weights run along the rows.
    text = "fprop=high,dgrad=e5m2/high,wgrad=high/e5m2,stochastic=gradients"
    alone = on_one_device(text)
    assert relative(step_of(text, accumulate_steps=4), alone) < 0.02 * relative(alone, on_one_device("float32"))


# Loops, remat and mapped calls.


class Cells(nn.Module):
    """A recurrent network that forgets: with the same input in each step, it returns the same output in each."""

    by_hand: bool = False

    @nn.compact
    def __call__(self, x):
        if not self.by_hand:
            return nn.RNN(nn.SimpleCell(32, recurrent_kernel_init=nn.initializers.zeros))(x)

        def turn(dense, carry, x):
            return carry, dense(x)

        scanned = nn.scan(
            turn, variable_broadcast="params", split_rngs={"params": False, "recipe": True}, in_axes=1, out_axes=1
        )
        return scanned(nn.Dense(32), 0.0, x)[1]


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("through", ["jit", "grad"])
def test_cells_in_a_scan_draw_other_bits_in_each_step_of_time(by_hand, through):
    x = jnp.broadcast_to(jax.random.normal(KEY, (4, 1, 32)), (4, 6, 32))
    model = Cells(by_hand)
    variables = model.init(KEY, x)
    policy = NOISY if through == "jit" else "fprop=high,dgrad=mxfp4:rceil/high,wgrad=high,stochastic=gradients"
    apply = with_policy(model.apply, policy)
    if through == "jit":
        by_time = jax.jit(apply)(variables, x, rngs={"params": KEY})
    else:
        cotangent = jax.random.normal(jax.random.key(1), (4, 1, 32))
        by_time = jax.jit(jax.grad(lambda x: (apply(variables, x, rngs={"params": KEY}) * cotangent).sum()))(x)
    steps = np.moveaxis(np.asarray(by_time), 1, 0)
    for i in range(6):
        for j in range(i):
            assert np.any(steps[i] != steps[j]), (i, j)


class Stacked(nn.Module):
    """Three layers whose weights are scanned over, as a transformer's are, under streams of the model's choice."""

    split: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        streams = {"params": "params" in self.split, **dict.fromkeys(self.split, True)}
        axes = {"variable_axes": {"params": 0}} if streams["params"] else {"variable_broadcast": "params"}
        layers = nn.scan(lambda dense, x, _: (dense(x), None), split_rngs=streams, length=3, **axes)
        return layers(nn.Dense(64, kernel_init=nn.initializers.ones, name="dense"), x, None)[0]


@pytest.mark.slow
def test_a_scan_that_hands_each_turn_the_same_key_is_refused():
    x = jax.random.normal(KEY, (8, 64))
    for split in (("params",), ("recipe",), ("params", "recipe"), ()):
        model = Stacked(split)
        variables = model.init(KEY, x)
        apply = jax.jit(with_policy(model.apply, NOISY))
        if split:
            assert np.isfinite(apply(variables, x, rngs={"params": KEY})).all()
            continue
        with pytest.raises(InputError, match=r"dense is in an nn.scan.*split_rngs=\{..., 'recipe': True\}"):
            apply(variables, x, rngs={"params": KEY})
        with_policy(model.apply, NOISY.replace("stochastic=activations", "stochastic=none"))(variables, x)


class Two(nn.Module):
    """Two layers with the same weights and inputs, and one of them called twice."""

    @nn.compact
    def __call__(self, x):
        one, other = (nn.Dense(32, kernel_init=nn.initializers.ones, name=name) for name in ("one", "other"))
        return jnp.stack([one(x), one(x), other(x)])


@pytest.mark.slow
def test_layers_calls_steps_and_products_draw_other_bits():
    x = jax.random.normal(KEY, (8, 64))
    variables = Two().init(KEY, x)
    apply = with_policy(Two().apply, NOISY)
    outputs = [*apply(variables, x, rngs={"params": KEY}), *apply(variables, x, rngs={"params": jax.random.key(1)})]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert np.any(one != other)
    again = apply(variables, x, rngs={"params": KEY})
    np.testing.assert_array_equal(again, jnp.stack(outputs[:3]))


@pytest.mark.slow
def test_jit_remat_vmap_and_scan_over_the_model_change_no_bit():
    model, x = Two(), jax.random.normal(KEY, (8, 64))
    variables = model.init(KEY, x)
    apply = with_policy(model.apply, NOISY)

    def call(key, x):
        return apply(variables, x, rngs={"params": key})

    keys = jax.random.split(KEY, 3)
    xs = jnp.stack([x, 2 * x, -x])
    expected = jnp.stack([call(k, each) for k, each in zip(keys, xs, strict=True)])
    mapped = jax.vmap(call)(keys, xs)
    scanned = jax.lax.scan(lambda c, each: (c, call(*each)), 0, (keys, xs))[1]
    remat = jnp.stack([jax.jit(jax.checkpoint(call))(k, each) for k, each in zip(keys, xs, strict=True)])
    for found in (mapped, scanned, remat):
        np.testing.assert_array_equal(found, expected)


# Going on.


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param("digits_mlp", "nvfp4", marks=pytest.mark.slow),
        pytest.param("digits_mlp", "mxfp8", marks=pytest.mark.full_size),
        pytest.param("digits_cnn", "nvfp4", marks=pytest.mark.full_size),
        pytest.param("digits_cnn", "mxfp8", marks=pytest.mark.full_size),
        pytest.param("digits_mlp", "fp8_delayed", marks=pytest.mark.full_size),
    ],
)
def test_a_run_under_a_recipe_goes_on_to_the_same_bits(name, precision, tmp_path):
    options = ["--precision", precision, "--loop.steps", "4", "--loop.save-every", "2", "--loop.eval-every", "4"]
    experiment = ConfigFile.find(name).experiment([*options, "--loop.keep", "4", "--loop.limit-batches", "4"])
    whole = jaxmp.fit(experiment, workdir=tmp_path / "whole", log=lambda text: None)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    folder = tmp_path / "resumed" / whole.path.relative_to(tmp_path / "whole")
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "summary.json").unlink()
    said = []
    resumed = jaxmp.fit(experiment, workdir=tmp_path / "resumed", log=said.append)
    assert resumed.path == folder and "from step 2" in said[0]
    one, other = (jaxmp.Run(path, experiment).state() for path in (whole.path, folder))
    assert int(one.step) == 4
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(plain(a)), np.asarray(plain(b)))
