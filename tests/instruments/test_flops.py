from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp import SGD, Arrays, Classification, Experiment, audit
from jaxmp.instruments.flops import peak_flops, product_flops
from jaxmp.models.mlp import MLP
from jaxmp.modules.lora import LoRA
from jaxmp.runs.records import flops_per_second
from jaxmp.runs.trainer import Trainer
from jaxmp.tasks.distillation import Distillation

P = jax.sharding.PartitionSpec
MESH = jax.sharding.AbstractMesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
X, W = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((8, 8), jnp.bfloat16)


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]


def either(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)


def mapped(axes):
    """A product of rows that are split over 4 of the devices of `MESH`, or over all 8 (none of them is there)."""
    return jax.shard_map(
        lambda x, w: x @ w, mesh=MESH, in_specs=(P(axes), P()), out_specs=P(axes), axis_names=set(axes), check_vma=False
    )


def convolved(x, w):
    image, kernel = x.reshape(1, 4, 4, 2), w[:2].reshape(2, 2, 2, 2)
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda x, w: x @ w, 2 * 4 * 8 * 8),
        (jax.jit(lambda x, w: x @ w), 2 * 4 * 8 * 8),
        (jax.checkpoint(lambda x, w: x @ w), 2 * 4 * 8 * 8),
        (scanned, 5 * 2 * 4 * 8 * 8),
        (either, 2 * 4 * 8 * 8),
        (convolved, 2 * 16 * 2 * 2 * 2 * 2),
        (lambda x, w: mapped(("a",))(x, w), 2 * 4 * 8 * 8),
        (lambda x, w: mapped(("a", "b"))(jnp.tile(x, (2, 1)), w), 2 * 8 * 8 * 8),
    ],
)
def test_the_flops_are_those_of_the_products(function, flops):
    assert product_flops(jax.make_jaxpr(function)(X, W)) == {"bfloat16": flops}


def test_both_gradients_of_a_transposed_convolution_have_the_flops_of_its_forward_pass():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))

    def forward(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    out = forward(x, kernel)
    assert out.shape == (1, 8, 8, 5)
    for function, args in (
        (forward, (x, kernel)),
        (jax.linear_transpose(lambda x: forward(x, kernel), x), (out,)),
        (jax.linear_transpose(lambda kernel: forward(x, kernel), kernel), (out,)),
    ):
        assert sum(product_flops(jax.make_jaxpr(function)(*args)).values()) == 2 * x.size * 5 * 3 * 3


@pytest.mark.parametrize(
    ("precision", "operands", "expected"),
    [
        (None, jnp.float32, "tensorfloat32"),
        ("high", jnp.float32, "tensorfloat32"),
        ("tensorfloat32", jnp.float32, "tensorfloat32"),
        ("TF32_TF32_F32", jnp.float32, "tensorfloat32"),
        ("float32", jnp.float32, "float32"),
        ("F32_F32_F32", jnp.float32, "float32"),
        ("BF16_BF16_F32", jnp.float32, "bfloat16"),
        ("BF16_BF16_F32_X3", jnp.float32, "BF16_BF16_F32_X3"),
        ("highest", jnp.bfloat16, "bfloat16"),
        (None, jnp.float16, "float16"),
    ],
)
@pytest.mark.parametrize("function", [lambda x, w: x @ w, convolved])
def test_float32_is_multiplied_in_tf32_unless_the_precision_is_full(precision, operands, expected, function):
    with jax.default_matmul_precision(precision):
        assert list(product_flops(jax.make_jaxpr(function)(X.astype(operands), W.astype(operands)))) == [expected]


def mlp_trainer(precision):
    rows = {"image": np.zeros((32, 16), np.float32), "label": np.zeros(32, np.int32)}
    data = Arrays(lambda split: rows if split == "train" else None, batch_size=32, images=())
    return Trainer(Experiment(MLP((8,)), data, task=Classification(), optimizer=SGD(0.1), precision=precision))


def on_h100s(trainer, count=1):
    gpus = np.array([types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * count)
    devices = types.SimpleNamespace(mesh=types.SimpleNamespace(devices=gpus), count=count)
    return types.SimpleNamespace(step_flops=trainer.step_flops, devices=devices)


def test_a_step_has_three_times_the_flops_of_its_loss_and_the_share_is_of_all_devices():
    trainer = mlp_trainer("mixed_bfloat16")
    flops = 3 * 2 * 32 * (16 * 8 + 8 * 10)
    assert trainer.step_flops == {"bfloat16": flops}
    assert flops_per_second(trainer, 1e6) == {"tflops_per_second": flops / 1e6}, "nothing is known of a CPU's peak"
    assert flops_per_second(on_h100s(trainer, 2), 1e6)["mfu"] == pytest.approx(flops * 1e6 / (2 * 989.4e12))
    # The step itself computes one product less: nobody asks for the gradient of the images.
    step, arguments = trainer.program()
    counted = sum(audit(step, *arguments).dot_flops_by_dtype.values())
    assert counted == flops - 2 * 32 * 16 * 8
    # What has no backward pass is not counted as if it had one.
    teacher = Distillation(teacher=lambda batch: batch["image"][:, :10])
    for other in ({"trains": ("Dense_1",)}, {"lora": LoRA(2)}, {"task": teacher}):
        changed = Trainer(dataclasses.replace(trainer.experiment, **other))
        assert changed.step_flops == {} and flops_per_second(changed, 1e6) == {}


@pytest.mark.parametrize(("precision", "peak"), [("float32", 67e12), ("tensorfloat32", 494.7e12)])
def test_the_share_of_true_float32_is_not_of_the_peak_of_tf32(precision, peak):
    trainer = mlp_trainer(precision)
    assert list(trainer.step_flops) == [precision]
    flops = trainer.step_flops[precision] * 1e6
    assert flops_per_second(on_h100s(trainer), 1e6)["mfu"] == pytest.approx(flops / peak)


def test_the_peak_is_that_of_the_arithmetic():
    assert peak_flops("NVIDIA H100 80GB HBM3", "tensorfloat32") == 494.7e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float64") is None
