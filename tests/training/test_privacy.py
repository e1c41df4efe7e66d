"""Private gradients: clipped row by row, noise on the sum, rows that are not finite, replicas."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.data.arrays import Arrays
from jaxmp.errors import InputError
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.settings import Loop, Parallel
from jaxmp.instruments.ranges import make_step_ranges
from jaxmp.models.mlp import MLP
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.scalers import DynamicScaler, Scaling
from jaxmp.tasks.distillation import Distillation
from jaxmp.training.gradients import make_gradients
from jaxmp.training.metrics import DROPPED_EXAMPLES, compute
from jaxmp.training.optimizers import DPSGD, DPAdam
from jaxmp.training.privacy import Privacy
from jaxmp.trees import by_path

ROWS, SCALE = 12, jnp.float32(256)
KEY = jax.random.key(1)


def rows(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.standard_normal((ROWS, 6)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, ROWS)),
        "weight": jnp.ones(ROWS).at[-1].set(0),
    }


MODEL = MLP(features=(8,), classes=3)
PARAMS = MODEL.init(jax.random.key(0), rows()["image"])["params"]


def gradients(private, precision="float32", batch=None, **how):
    loss = jaxmp.make_loss(MODEL, jaxmp.Classification(), precision)
    compiled = jax.jit(make_gradients(loss, private=private, **how))
    return compiled(PARAMS, {}, SCALE, rows() if batch is None else batch, KEY)


def close(a, b, rtol=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(jnp.abs(y).max()))


def test_without_clipping_and_noise_the_gradient_is_that_of_the_mean_loss():
    plain, expected, _ = gradients(None)
    found, measured, _ = gradients(Privacy(1e6, 0.0, ROWS - 1), accumulate_steps=3)
    close(found, plain)
    assert np.isclose(measured.loss, expected.loss) and compute(measured.metrics)["dropped_examples"] == 0


@pytest.mark.slow
def test_clipped_gradients_are_those_of_optax():
    batch = rows() | {"weight": jnp.ones(ROWS)}
    loss = jaxmp.make_loss(MODEL, jaxmp.Classification(), "float32")

    def of_row(i):
        row = jax.tree.map(lambda x: x[i : i + 1], batch)
        return jax.grad(lambda p: loss(p, {}, row, KEY)[0])(PARAMS)

    each = jax.tree.map(lambda *x: jnp.stack(x), *map(of_row, range(ROWS)))
    norms = jax.vmap(jaxmp.global_norm)(each)
    clip = float(jnp.median(norms))  # of half of the rows
    found, _, _ = gradients(Privacy(clip, 0.0, ROWS), batch=batch)
    tx = optax.contrib.differentially_private_aggregate(clip, 0.0, jax.random.key(0))
    close(found, jax.tree.map(lambda g: g * SCALE, tx.update(each, tx.init(PARAMS))[0]))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 3e38])
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_a_row_that_is_not_finite_contributes_nothing_and_is_counted(precision, bad):
    batch = rows()
    without = batch | {"weight": batch["weight"].at[2].set(0)}
    broken = batch | {"image": batch["image"].at[2].set(bad)}
    expected, a, _ = gradients(Privacy(0.5, 0.0, ROWS), precision, without)
    found, b, _ = gradients(Privacy(0.5, 0.0, ROWS), precision, broken)
    close(found, expected, 1e-7)
    assert a.loss == b.loss
    total, weight = b.metrics[DROPPED_EXAMPLES]
    assert (float(total), float(weight)) == (1, ROWS - 1)


@pytest.mark.slow
def test_a_batch_without_a_finite_row_has_no_gradient_and_a_loss_of_nan():
    broken = rows() | {"image": jnp.full((ROWS, 6), jnp.nan)}
    found, measured, _ = gradients(Privacy(0.5, 0.0, ROWS), batch=broken)
    assert all(not np.any(x) for x in jax.tree.leaves(found))
    assert np.isnan(measured.metrics["loss"].total) and np.isfinite(measured.loss)


def load(split):
    rng = np.random.default_rng(3)
    images = rng.standard_normal((64, 6)).astype(np.float32)
    return {"image": images, "label": (images[:, 0] > 0).astype(np.int32)}


def private(optimizer=None, model=MODEL, **fields):
    optimizer = DPSGD(0.1, clip_norm=0.5, noise_multiplier=1.1) if optimizer is None else optimizer
    fields = {"precision": "mixed_bfloat16", "loop": Loop(steps=3)} | fields
    fields = {"data": Arrays(load, batch_size=32, images=())} | fields
    return Experiment(model=model, optimizer=optimizer, **fields)


class WithBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(image))


def gradients_of_batch_norm():
    variables = jax.eval_shape(WithBatchNorm().init, KEY, rows()["image"])
    loss = jaxmp.make_loss(WithBatchNorm(), jaxmp.Classification(), "float32")
    of_batch = make_gradients(loss, private=Privacy(1.0, 1.0, ROWS))
    state = {"batch_stats": variables["batch_stats"]}
    jax.eval_shape(of_batch, variables["params"], state, SCALE, rows(), KEY)


REFUSED = {
    "noise_multiplier = -1": (lambda: DPSGD(noise_multiplier=-1.0), "DPSGD.noise_multiplier = -1.0: expected 0 or"),
    "clip_norm = 0": (lambda: DPSGD(clip_norm=0.0), "DPSGD.clip_norm = 0.0: expected a positive number"),
    "clip_norm = None": (lambda: DPAdam(clip_norm=None), "DPAdam.clip_norm = None: expected a positive number"),
    "delta = 0": (lambda: DPSGD(delta=0.0), "DPSGD.delta = 0.0: expected a number between 0 and 1"),
    "sampling": (lambda: DPSGD(sampling="poison"), "expected poisson or shuffled; did you mean 'poisson'"),
    "a dynamic scale": (lambda: private(scaler=Scaling("dynamic")), "reacts to overflows remembers single rows"),
    "a dynamic scaler": (lambda: private(scaler=DynamicScaler()), "reacts to overflows remembers single rows"),
    "a recipe": (lambda: private(precision="mixed_bfloat16,recipe=mxfp8"), "mixes them without noise"),
    "dropped microbatches": (
        lambda: private(loop=Loop(steps=2, accumulate_overflow="microbatch")),
        "a private step leaves out the rows that overflow",
    ),
    "a teacher": (
        lambda: private(task=Distillation(teacher=lambda batch: batch["image"])),
        "DPSGD with task.teacher: what the teacher tells of its own training rows is not accounted for",
    ),
    "mixup": (
        lambda: private(task=jaxmp.Classification(mixup=0.2)),
        "with task.mixup = 0.2: mixup makes one row of two, which are then clipped as one; expected 0",
    ),
    "balanced data": (
        lambda: private(data=jaxmp.balanced(Arrays(load, batch_size=32, images=()), by="label")),
        "DPSGD with jaxmp.balanced data: copies of a row would count as rows of their own",
    ),
    "overfitted batches": (
        lambda: Trainer(private(loop=Loop(steps=2, overfit_batches=1))).batches,
        "loop.overfit_batches: a private optimizer draws other rows in each step",
    ),
    "batch normalisation": (
        lambda: gradients_of_batch_norm(),
        "the model keeps batch_stats from step to step, in which the rows of a batch are mixed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_private_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        make()


def test_a_teacher_without_weight_is_not_called_and_not_refused():
    assert private(task=Distillation(teacher=lambda batch: batch["image"], teacher_weight=0.0)).task.teacher


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 3])
def test_the_ranges_of_a_private_step_are_those_of_its_noised_update(parts):
    loss, tx = (
        jaxmp.make_loss(MODEL, jaxmp.Classification(), "float32"),
        jaxmp.loss_scaling(optax.sgd(1.0), jaxmp.NoScaler()),
    )
    objective = jaxmp.Objective(loss, tx, private=Privacy(1.0, 2.0, ROWS))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)  # to which an update is added exactly
    state = jaxmp.TrainState.create(zeros, objective, key=KEY)
    after, _ = jax.jit(jaxmp.make_train_step(objective, accumulate_steps=parts))(state, rows())
    read = jax.jit(make_step_ranges(objective, accumulate_steps=parts))(state, rows()).read()
    for name, leaf in by_path(after.params).items():
        found = read["updates"][name]
        assert found["size"] == leaf.size and found["zeros"] == 0
        np.testing.assert_allclose([found["largest"]], [jnp.abs(leaf).max()], rtol=1e-6)
    # Softmax less one-hot, at logits of 0: 2/3 at most, of a row that no batch divides; over microbatches a power of 2.
    assert np.isclose(read["output_gradients"][""]["largest"], 2 / 3 if parts == 1 else 0.5, rtol=1e-6)


def test_the_scale_of_a_private_float16_run_is_constant():
    assert private(precision="mixed_float16").make_scaler() == jaxmp.StaticScaler(256.0)
    assert private(precision="mixed_bfloat16").make_scaler() == jaxmp.NoScaler()
    chosen = private(precision="mixed_float16", scaler=Scaling(init_scale=16.0))
    assert chosen.make_scaler() == jaxmp.StaticScaler(16.0)


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "parallels",
    [
        (Parallel(mode="pmap"), Parallel(shard="zero1")),
        pytest.param((Parallel(), Parallel(shard="fsdp")), marks=pytest.mark.full_size),
    ],
    ids=["pmap and zero1", "jit and fsdp"],
)
def test_eight_devices_clip_by_row_sum_in_float32_and_add_one_noise(parallels):
    def after(parallel, devices=None):
        precision = "float32" if parallel.shard == "fsdp" else "p=f32,c=f32,o=f32,reduce=bf16"
        model = MLP(features=(64,), classes=3, dropout=0.5)
        how = {"loop": Loop(steps=3, accumulate_steps=2), "parallel": parallel, "precision": precision}
        experiment = private(model=model, **how)
        trainer = Trainer(experiment, None if devices is None else jax.make_mesh((1,), ("data",), devices=devices))
        feed, placed = trainer.feed(fuse=False), trainer.devices.put_state(trainer.init())
        state, metrics = feed.run(placed, trainer.devices.put(trainer.no_metrics), 0, 2)
        return trainer.devices.get(state).params, compute(trainer.devices.get(metrics))

    expected, alone = after(Parallel(), jax.devices()[:1])
    for parallel in parallels:
        found, measured = after(parallel)
        close(found, expected, 1e-5)
        assert np.isclose(measured["loss"], alone["loss"], rtol=1e-3), parallel
