"""The two FP8 formats: what they hold, training in them beside 16 bits, and rounding a trained model to them.

    jaxmp reproduce fp8_formats [--quick]

Micikevicius et al. 2022, FP8 Formats for Deep Learning, 2209.05433. Trained is `digits_mlp`, with master weights in
float32 and products whose operands are rounded to FP8 and summed in float32. A model that was trained in mixed float16
is then evaluated with weights and activations rounded to each format (`rounded`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import Run, quantize
from jaxmp.html.figure import Axis, Series, line_figure
from jaxmp.runs.trainer import Trainer
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, Results, Train, below, exact, higher, lower, within
from jaxmp.training.metrics import compute

POINT = 0.01
"""the margin of equality: 1 point of test accuracy, 2.7 of the 269 test images"""
SOURCE = "2209.05433"
ABSTRACT = f"{SOURCE}, abstract"
TABLE = f"{SOURCE}, table 1"
MATCHES = "effectively matches 16-bit training, with all hyper-parameters unchanged"

TRAINED = {
    "float16": "mixed_float16",
    "bfloat16": "mixed_bfloat16",
    "e4m3 and e5m2": "c=e4m3/e5m2",
    "e4m3 alone": "c=e4m3/e4m3",
    "e5m2 alone": "c=e5m2/e5m2",
    "e4m3 and e5m2, scaled": "fp8_current",
}
"""`scaled`: with a scale for each tensor from its largest magnitude"""
POST_TRAINING = {
    "e4m3": "e4m3",
    "e4m3, scaled": "e4m3:tensor",
    "e5m2": "e5m2",
    "e5m2, scaled": "e5m2:tensor",
    "int8, scaled": "int8:tensor",
    "int4, scaled": "int4:tensor",
}
EXPONENTS = (0, -2, -4, -6, -8, -10, -12)


def limits(seed: int, *, format: str) -> dict[str, float]:
    """Returns the largest, smallest normal and smallest number of a format, of what rounding leaves as it is.

    Tried are all positive numbers of float16's range whose significand is a multiple of 1/8: no FP8 number is another.
    The number after a normal one is larger by at most 2^-3 of it in e4m3 and 2^-2 in e5m2, that after a subnormal one
    by more.
    """
    del seed
    exponents = np.arange(-24, 16, dtype=np.float32)
    tried = np.sort((2.0 ** exponents[:, None] * (1 + np.arange(8, dtype=np.float32) / 8)).ravel())
    held = tried[np.asarray(quantize(jnp.asarray(tried), format)) == tried]
    relative = np.diff(held) / held[:-1]
    finest = 2.0**-3 if format == "e4m3" else 2.0**-2
    return {
        "largest": float(held[-1]),
        "smallest_normal": float(held[:-1][relative <= finest][0]),
        "smallest": float(held[0]),
    }


def cast(seed: int, *, format: str, exponent: int) -> dict[str, float]:
    """Returns the error of rounding 2^exponent times 65,536 normal numbers, by their norm."""
    x = jax.random.normal(jax.random.key(seed), (256, 256)) * 2.0**exponent
    exact = np.asarray(x, np.float64)
    return {"error": float(np.linalg.norm(np.asarray(quantize(x, format), np.float64) - exact) / np.linalg.norm(exact))}


def rounded(run: Run) -> Mapping[str, Any]:
    """Returns test accuracy and loss of a trained model with weights and activations rounded to each format.

    Beside each stands by how much rounding changed it.
    """
    state = run.state()
    found = {}
    for name, format in POST_TRAINING.items():
        trainer = Trainer(dataclasses.replace(run.experiment, precision=f"float32,fprop={format}"))
        placed = trainer.devices.get(trainer.devices.put_state(state))
        tested = compute(trainer.evaluation(placed, trainer.evaluated("test")))
        for metric in ("accuracy", "loss"):
            found[f"{metric} in {name}"] = tested[metric]
            found[f"change of {metric}, {name}"] = tested[metric] - run.summary["test"][metric]
    return found


def get_paper(quick: bool = False) -> Paper:
    """The claims about the formats, training in them, and rounding a trained model."""
    epochs = 4 if quick else 25
    options = ("--loop.epochs", str(epochs), "--loop.eval-every", "1000")
    arms: dict[str, Train | Compute] = {
        name: Train("digits_mlp", ("--precision", precision, *options), rounded if name == "float16" else None)
        for name, precision in TRAINED.items()
    }
    if quick:  # each recipe takes seconds to compile, and so does each format of `rounded`
        arms = {name: arms[name] for name in ("bfloat16", "e4m3 and e5m2")}
    arms |= {f"limits of {format}": Compute(limits, {"format": format}) for format in ("e4m3", "e5m2")}
    for name, format in (("e4m3", "e4m3"), ("e4m3, scaled", "e4m3:tensor"), ("e5m2", "e5m2")):
        for exponent in EXPONENTS:
            arms[f"cast to {name}, 2^{exponent}"] = Compute(cast, {"format": format, "exponent": exponent})
    points = "test accuracy, as a share: "

    def limit(format: str, which: str, metric: str, value: float, published: str) -> Claim:
        return Claim(
            id=f"{format}-{metric.replace('_', '-')}",
            says=f"The {which} number of {format} is {published}",
            published=published,
            source=TABLE,
            checked=False,
            arms=(f"limits of {format}",),
            metric=metric,
            measured=f"{which} number of {format} that rounding leaves as it is",
            judge=exact(lambda found: found == value),
        )

    def same(id: str, arm: str, baseline: str, remark: str = "") -> Claim:
        return Claim(
            id=id,
            says=f"Training in {arm} is within 1 point of {baseline}",
            published=MATCHES,
            source=ABSTRACT,
            checked=True,
            arms=(arm, baseline),
            metric="accuracy",
            measured=f"{points}{arm} minus {baseline}; within 0.01",
            judge=within(POINT),
            remark=remark,
        )

    def inference(id: str, says: str, name: str, judge: Any, limit: str, remark: str = "") -> Claim:
        return Claim(
            id=id,
            says=says,
            published="FP8 keeps the accuracy of 16-bit language models that int8 does not",
            source=f"{SOURCE}, the section on inference",
            checked=False,
            arms=("float16",),
            metric=f"change of accuracy, {name}",
            measured=f"{points}weights and activations in {name}, minus float16{limit}",
            judge=judge,
            remark=remark,
        )

    claims = (
        limit("e4m3", "largest", "largest", 448.0, "448"),
        limit("e4m3", "smallest normal", "smallest_normal", 2.0**-6, "2^-6"),
        limit("e4m3", "smallest", "smallest", 2.0**-9, "2^-9"),
        limit("e5m2", "largest", "largest", 57344.0, "57,344"),
        limit("e5m2", "smallest normal", "smallest_normal", 2.0**-14, "2^-14"),
        limit("e5m2", "smallest", "smallest", 2.0**-16, "2^-16"),
        same("matches-float16", "e4m3 and e5m2", "float16", "Gradients have a loss scale, tensors have no scales."),
        same("matches-bfloat16", "e4m3 and e5m2", "bfloat16", "As above."),
        same("scaled-matches-float16", "e4m3 and e5m2, scaled", "float16", "A scale for each tensor."),
        Claim(
            id="e4m3-alone-loses",
            says="Gradients in e4m3 have a higher loss than in e5m2",
            published="e5m2 is recommended for gradients",
            source=f"{SOURCE}, section 3",
            checked=False,
            arms=("e4m3 alone", "e4m3 and e5m2"),
            metric="loss",
            measured="test loss, e4m3 alone minus e4m3 and e5m2",
            judge=higher,
            remark="The paper recommends e5m2 for its range. With a loss scale, gradients of two layers fit e4m3.",
        ),
        Claim(
            id="e5m2-alone-loses",
            says="Weights and activations in e5m2 have a higher loss than in e4m3",
            published="e4m3 is recommended for weights and activations",
            source=f"{SOURCE}, section 3",
            checked=False,
            arms=("e5m2 alone", "e4m3 and e5m2"),
            metric="loss",
            measured="test loss, e5m2 alone minus e4m3 and e5m2",
            judge=higher,
        ),
        inference(
            "inference-e4m3",
            "A trained model keeps its accuracy in e4m3, to within 1 point",
            "e4m3, scaled",
            _near_zero(POINT),
            "; within 0.01",
        ),
        inference(
            "inference-int8",
            "In int8 with one scale for each tensor it does not: it loses accuracy",
            "int8, scaled",
            below(0.0),
            "; below 0",
            "As declared before the runs. What resists int8 are outliers in the activations of large language models. "
            "A network on digits has none, so that equal accuracies here say nothing of the claim.",
        ),
        Claim(
            id="tensors-need-scales",
            says="Small tensors need a scale: normal numbers times 2^-12 are lost in e4m3 without one",
            published="some networks need a scale for each tensor, others do not",
            source=f"{SOURCE}, section 3",
            checked=False,
            arms=("cast to e4m3, scaled, 2^-12", "cast to e4m3, 2^-12"),
            metric="error",
            measured="error of the cast by the norm, with a scale minus without",
            judge=lower,
        ),
        Claim(
            id="usual-tensors-need-none",
            says="Numbers about 1 need none: the error with a scale is no smaller by more than 0.01",
            published="some networks need a scale for each tensor, others do not",
            source=f"{SOURCE}, section 3",
            checked=False,
            arms=("cast to e4m3, scaled, 2^0", "cast to e4m3, 2^0"),
            metric="error",
            measured="error of the cast by the norm, with a scale minus without; within 0.01",
            judge=within(0.01),
        ),
    )
    return Paper(
        title="FP8 Formats for Deep Learning",
        authors="Micikevicius et al. 2022",
        url="https://arxiv.org/abs/2209.05433",
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=(
            "accuracy",
            "loss",
            "error",
            *(f"{metric} in {name}" for metric in ("accuracy", "loss") for name in POST_TRAINING),
        ),
        figures=(
            Figure(
                "training",
                "Test accuracy of digits_mlp beside mixed float16",
                "Paired differences to training in mixed float16: each seed, and the mean with its 95 % t interval.",
                lambda results: (
                    paper_figures.differences(
                        results, list(TRAINED)[1:], "float16", "accuracy", "test accuracy minus that of float16, share"
                    )
                    if "float16" in results
                    else paper_figures.means(results, list(TRAINED), "accuracy", "test accuracy, share")
                ),
            ),
            Figure(
                "cast",
                "Error of a cast by the size of the numbers",
                "Error of rounding normal numbers times a power of two, by their norm; mean over the seeds.",
                _cast,
            ),
        ),
    )


def _near_zero(margin: float) -> Any:
    """A judge that the mean of one arm lies within +-margin."""

    def judge(values: Any) -> Any:
        zero = dict.fromkeys(values[0], 0.0)
        return within(margin)([values[0], zero])

    return judge


def _cast(results: Results) -> str:
    series = []
    for i, name in enumerate(("e4m3", "e4m3, scaled", "e5m2")):
        errors = [results.mean(f"cast to {name}, 2^{exponent}", "error").mean for exponent in EXPONENTS]
        series.append(Series(name, [2.0**exponent for exponent in EXPONENTS], errors, i))
    return line_figure(
        Axis("standard deviation of the numbers", "log2"),
        Axis("error by norm", "log10"),
        series,
        name="Error of casts to FP8 by the size of the numbers",
    )
