"""Training in bfloat16 with no loss scale and float32's hyper-parameters, where float16 needs a scale.

    jaxmp reproduce bfloat16_study [--quick]

Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training, 1905.12322. `digits_mlp` and `digits_cnn` stand
for its applications. Their own gradients fit into float16, so `digits_mlp` is also trained with a loss in a unit 2^24
as large, and a learning rate 2^24 as large: that changes no update in float32 or bfloat16 but by rounding, and leaves
float16 no gradient at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp import SGD, DynamicScaler, FunctionTask, Mean, NoScaler, Run
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Figure, Paper, Train, higher, lower, within

POINT = 0.01
"""the margin of equality: 1 point of test accuracy, 2.7 of the 269 test images"""
UNIT = 2.0**-24
"""a batch of 42 rows or more divides a gradient in this unit by 2^5, and float16 rounds what is below 2^-25 to zero"""
LEARNED = 0.9
"""validation accuracy, as a share, from which on a run counts as having learned"""
ABSTRACT = "1905.12322, abstract"
SAME = "the same results as float32, in the same number of iterations, with no changes to hyper-parameters"
RANGE = "the range of float32, so that no hyper-parameter has to be tuned; float16 needs tuning"


def small_loss(logits: jax.Array, batch: Any) -> Any:
    """Returns cross-entropy in a unit 2^24 as large, by row, and the accuracy."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    return UNIT * loss, {"accuracy": Mean.of(right, batch["weight"])}


def learning(run: Run) -> Mapping[str, Any]:
    """Returns the first evaluated step with a validation accuracy of 90 %, and the curve.

    The step is NaN, which counts as failed, where a run never comes there.
    """
    steps, accuracy = run.curve("accuracy", "validation")
    there = steps[accuracy >= LEARNED]
    return {
        "learned_at": int(there[0]) if len(there) else math.nan,
        "tested_steps": steps.tolist(),
        "tested": (100 * accuracy).tolist(),
    }


def get_paper(quick: bool = False) -> Paper:
    """The claims that bfloat16 equals float32 without a scale, and that float16 does not."""
    epochs, steps = (4, 40) if quick else (25, 200)
    rounds = ("--loop.epochs", str(epochs), "--loop.eval-every", "10")
    plain = ConfigFile.find("digits_mlp").experiment(["--loop.epochs", str(epochs), "--loop.eval-every", "1000"])
    small = dataclasses.replace(
        plain, task=FunctionTask(small_loss, ("image",)), optimizer=SGD(0.02 / UNIT, momentum=0.9)
    )

    def mlp(precision: str) -> Train:
        return Train("digits_mlp", ("--precision", precision, *rounds), measure=learning)

    def cnn(precision: str) -> Train:
        return Train("digits_cnn", ("--precision", precision, "--loop.steps", str(steps), "--loop.eval-every", "1000"))

    def scaled(precision: str, scaler: Any) -> Train:
        return Train(dataclasses.replace(small, precision=precision, scaler=scaler))

    arms = {
        "float32": mlp("float32"),
        "bfloat16": mlp("mixed_bfloat16"),
        "CNN, float32": cnn("float32"),
        "CNN, bfloat16": cnn("mixed_bfloat16"),
        "small loss, float32": scaled("float32", NoScaler()),
        "small loss, bfloat16": scaled("mixed_bfloat16", NoScaler()),
        "small loss, float16": scaled("mixed_float16", NoScaler()),
        "small loss, float16, dynamic scale": scaled("mixed_float16", DynamicScaler()),
    }
    if quick:
        arms = {name: arms[name] for name in ("float32", "bfloat16", "small loss, bfloat16", "small loss, float16")}
    points = "test accuracy, as a share: "

    def same(id: str, says: str, arm: str, baseline: str, published: str, remark: str = "") -> Claim:
        return Claim(
            id=id,
            says=says,
            published=published,
            source=ABSTRACT,
            checked=True,
            arms=(arm, baseline),
            metric="accuracy",
            measured=f"{points}{arm} minus {baseline}; within 0.01",
            judge=within(POINT),
            remark=remark,
        )

    claims = (
        same(
            "equals-float32",
            "bfloat16 with float32's hyper-parameters and no loss scale is within 1 point of float32 (MLP)",
            "bfloat16",
            "float32",
            SAME,
        ),
        same(
            "cnn-equals-float32",
            "The same of a convolutional network",
            "CNN, bfloat16",
            "CNN, float32",
            SAME,
            f"{steps} steps. XLA:CPU computes a bfloat16 convolution in float32 and rounds its result.",
        ),
        Claim(
            id="same-iterations",
            says=f"It learns in the same number of iterations, to within 20 ({LEARNED:.0%} validation accuracy)",
            published=SAME,
            source=ABSTRACT,
            checked=True,
            arms=("bfloat16", "float32"),
            metric="learned_at",
            measured="step at which 90 % are reached, bfloat16 minus float32, evaluated every 10; within 20",
            judge=within(20),
            remark="The margin is two evaluations. It is not small beside the number of steps itself (`learned_at` in "
            "the table): half as many again would be within it.",
        ),
        same(
            "range-needs-no-scale",
            "With a loss in a large unit, bfloat16 needs no loss scale: it is within 1 point of float32",
            "small loss, bfloat16",
            "small loss, float32",
            RANGE,
            "The unit, 2^24, was chosen so that float16 loses every gradient of every batch, not to find where it "
            "begins to lose them: that is in `mixed_precision_training`.",
        ),
        Claim(
            id="float16-needs-a-scale",
            says="Under the same hyper-parameters float16 loses accuracy without a loss scale",
            published=RANGE,
            source=ABSTRACT,
            checked=True,
            arms=("small loss, float16", "small loss, bfloat16"),
            metric="accuracy",
            measured=f"{points}float16 minus bfloat16, both without a scale",
            judge=lower,
        ),
        Claim(
            id="scale-is-what-it-lacks",
            says="A loss scale gives float16 what it lacks",
            published=RANGE,
            source=ABSTRACT,
            checked=True,
            arms=("small loss, float16, dynamic scale", "small loss, float16"),
            metric="accuracy",
            measured=f"{points}float16 with a dynamic scale, which keeps its first value, minus without",
            judge=higher,
            remark=f"The dynamic scale starts at 2^15, which it keeps: no step overflows, and {20 * epochs} steps are "
            "fewer than its growth interval of 2,000. So this says nothing of the rule that moves it.",
        ),
    )
    return Paper(
        title="A Study of BFLOAT16 for Deep Learning Training",
        authors="Kalamkar et al. 2019",
        url="https://arxiv.org/abs/1905.12322",
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("accuracy", "learned_at"),
        figures=(
            Figure(
                "accuracy",
                "Test accuracy of each arm",
                "Test accuracy of digits_mlp and digits_cnn, and of digits_mlp with a loss in a unit 2^24 as large: "
                "each seed, and the mean with its 95 % t interval.",
                lambda results: paper_figures.means(results, list(arms), "accuracy", "test accuracy, share"),
            ),
        ),
    )
