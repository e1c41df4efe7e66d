"""MPX: a vision transformer in mixed precision is as accurate as in float32, and keeps fewer bytes for its gradient.

    jaxmp reproduce mpx [--quick]

Gräfe and Trimpe 2025, MPX: Mixed Precision Training for JAX, 2507.03312. The paper measures memory and time of vision
transformers on GPUs. Accuracy is measured here, of a small ViT on digits, trained by jaxmp's own step; memory is
predicted from the shapes of a step, without a compiler.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxmp import FunctionTask, make_loss, memory
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.models.vit import ViT
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, Train, exact, within

POINT = 0.01
"""the margin of equality: 1 point of test accuracy, 2.7 of the 269 test images"""
SOURCE = "2507.03312"
PRECISIONS = {"float32": "float32", "float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}
TI = ViT(patch=4, layers=12, heads=3, width=192, classes=100)
"""ViT-Ti on images of 32x32 and 100 classes, as CIFAR-100 has them"""


def cross_entropy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the cross-entropy of each row."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def kept(seed: int, *, precision: str, batch: int) -> dict[str, float]:
    """Returns what the forward pass of ViT-Ti keeps for the backward pass, in MiB, and that by float32's.

    Counted are saved activations, and copies of weights that are cast. It is the same for each seed.
    """
    del seed
    found, reference = (_kept(name, batch) for name in (precision, "float32"))
    return {"kept": found / 2**20, "ratio": found / reference}


def _kept(precision: str, batch: int) -> int:
    image = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    rows = {
        "image": image,
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((batch,), jnp.float32),
    }
    params = jax.eval_shape(lambda x: TI.init(jax.random.key(0), x), image)["params"]
    loss_fn = make_loss(TI, FunctionTask(cross_entropy, ("image",)), PRECISIONS[precision])

    def loss(params: object, rows: dict[str, jax.Array]) -> jax.Array:
        total, (weight, *_) = loss_fn(params, {}, rows, jax.random.key(0))
        return total / weight

    return memory(loss, params, rows).nbytes("saved activations", "weights cast for compute")


def get_paper(quick: bool = False) -> Paper:
    """The claims that mixed precision preserves accuracy and saves memory."""
    steps, layers = (40, 1) if quick else (200, 2)
    base = ConfigFile.find("digits_mlp").experiment(["--loop.steps", str(steps), "--loop.eval-every", "1000"])
    model = ViT(patch=2, layers=layers, heads=4, width=64, classes=10)
    arms: dict[str, Train | Compute] = {
        name: Train(dataclasses.replace(base, model=model, precision=precision))
        for name, precision in PRECISIONS.items()
    }
    trained = list(arms)
    if quick:  # a transformer takes seconds to compile
        arms.pop("bfloat16")
    for name in ("float16",) if quick else PRECISIONS:
        arms[f"memory, {name}"] = Compute(kept, {"precision": name, "batch": 256})

    def accuracy(name: str) -> Claim:
        return Claim(
            id=f"{name}-preserves-accuracy",
            says=f"A vision transformer in mixed {name} is within 1 point of float32",
            published="model accuracy is preserved, without a figure",
            source=f"{SOURCE}, abstract",
            checked=True,
            arms=(name, "float32"),
            metric="accuracy",
            measured=f"test accuracy, as a share: mixed {name} minus float32; within 0.01",
            judge=within(POINT),
            remark="float16 has jaxmp's dynamic loss scale. MPX's own, which unscales with the scale of the next step, "
            "is judged by `experiments/conformance`."
            if name == "float16"
            else "",
        )

    def saves(name: str) -> Claim:
        return Claim(
            id=f"{name}-saves-memory",
            says=f"Mixed {name} needs less memory than float32",
            published="less memory, as the paper measures it on GPUs",
            source=f"{SOURCE}, the section on experiments",
            checked=False,
            arms=(f"memory, {name}",),
            metric="ratio",
            measured="bytes kept for the backward pass (ViT-Ti, batch of 256) by those of float32; below 1",
            judge=exact(lambda ratio: ratio < 1),
            remark="Predicted from shapes, for what is kept alone. Time, and kernels of this model on a GPU, are not "
            "measured."
            if name == "float16"
            else "",
        )

    claims = (accuracy("float16"), accuracy("bfloat16"), saves("float16"), saves("bfloat16"))
    return Paper(
        title="MPX: Mixed Precision Training for JAX",
        authors="Gräfe and Trimpe 2025",
        url="https://arxiv.org/abs/2507.03312",
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("accuracy", "loss", "kept", "ratio"),
        figures=(
            Figure(
                "accuracy",
                "Test accuracy of a small vision transformer beside float32",
                "Paired differences to float32: each seed, and the mean with its 95 % t interval.",
                lambda results: paper_figures.differences(
                    results, trained[1:], "float32", "accuracy", "test accuracy minus that of float32, share"
                ),
            ),
        ),
    )
