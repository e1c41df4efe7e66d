"""Training in bfloat16 without float32 master weights: what rounding to nearest loses, and what brings it back.

    jaxmp reproduce bfloat16_training [--quick]

Zamirai et al. 2020, Revisiting BFloat16 Training, 2010.06192. `digits_mlp` stands for its seven applications: it trains
in seconds, so that there are enough paired seeds. The learning rate is small, so that updates are small beside weights.
"""

from __future__ import annotations

from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Figure, Paper, Train, higher, lower, within

PRECISIONS = {
    "float32": "float32",
    "nearest": "bfloat16",
    "stochastic": "bfloat16,rounding=stochastic",
    "Kahan": "bfloat16,rounding=kahan",
    "bfloat16 products only": "mixed_bfloat16",
    "bfloat16 weights only": "p=bf16,c=f32,o=f32",
}
POINT = 0.01
"""the margin of equality: 1 point of test accuracy, 2.7 of the 269 test images"""
ABSTRACT = "2010.06192, abstract"
REMARK = (
    "The paper's own range is narrower than the point that 269 test images resolve: a difference of its size would not "
    "be seen here."
)
GAP = "0.1 points lower to 0.2 points higher validation accuracy than float32, in seven applications"


def get_paper(quick: bool = False) -> Paper:
    """The claims about rounding to nearest, its two cures, and where rounding does harm."""
    epochs = 5 if quick else 25
    rounds = ("--loop.epochs", str(epochs), "--loop.eval-every", str(20 * epochs))

    def arm(precision: str, rate: str) -> Train:
        return Train("digits_mlp", ("--precision", precision, "--optimizer.learning-rate", rate, *rounds))

    arms = {name: arm(precision, "1e-4") for name, precision in PRECISIONS.items()}
    arms |= {f"{name}, 1e-3": arm(PRECISIONS[name], "1e-3") for name in ("float32", "nearest")}
    if quick:
        arms = {name: arms[name] for name in ("float32", "nearest", "stochastic")}
    points = "test accuracy, as a share: "
    claims = (
        Claim(
            id="nearest-loses",
            says="With weights in bfloat16 and updates rounded to nearest, training loses accuracy",
            published="updates rounded to nearest degrade model accuracy, without a figure",
            source=ABSTRACT,
            checked=True,
            arms=("nearest", "float32"),
            metric="accuracy",
            measured=f"{points}nearest minus float32",
            judge=lower,
        ),
        Claim(
            id="stochastic-gains",
            says="Stochastic rounding of the update gains accuracy",
            published="up to 7 points of validation accuracy, by stochastic rounding and Kahan summation",
            source=ABSTRACT,
            checked=True,
            arms=("stochastic", "nearest"),
            metric="accuracy",
            measured=f"{points}stochastic minus nearest",
            judge=higher,
        ),
        Claim(
            id="stochastic-closes-the-gap",
            says="With stochastic rounding, training in bfloat16 alone is within 1 point of float32",
            published=GAP,
            source=ABSTRACT,
            checked=True,
            arms=("stochastic", "float32"),
            metric="accuracy",
            measured=f"{points}stochastic minus float32; within 0.01",
            judge=within(POINT),
            remark=REMARK,
        ),
        Claim(
            id="kahan-closes-the-gap",
            says="With Kahan summation, training in bfloat16 alone is within 1 point of float32",
            published=GAP,
            source=ABSTRACT,
            checked=True,
            arms=("Kahan", "float32"),
            metric="accuracy",
            measured=f"{points}Kahan minus float32; within 0.01",
            judge=within(POINT),
            remark=REMARK,
        ),
        Claim(
            id="products-do-no-harm",
            says="Rounding in the forward and backward pass does no harm: it is within 1 point of float32",
            published="the bottleneck is the rounding of weight updates",
            source="2010.06192",
            checked=False,
            arms=("bfloat16 products only", "float32"),
            metric="accuracy",
            measured=f"{points}bfloat16 products with float32 weights, minus float32; within 0.01",
            judge=within(POINT),
        ),
        Claim(
            id="update-alone-loses",
            says="Rounding the weight update alone does the harm: all else in float32 loses too",
            published="the bottleneck is the rounding of weight updates",
            source="2010.06192",
            checked=False,
            arms=("bfloat16 weights only", "float32"),
            metric="accuracy",
            measured=f"{points}bfloat16 weights with float32 products, minus float32",
            judge=lower,
        ),
        Claim(
            id="update-is-all",
            says="It does all of the harm: with bfloat16 products as well, accuracy is within 1 point",
            published="the bottleneck is the rounding of weight updates",
            source="2010.06192",
            checked=False,
            arms=("nearest", "bfloat16 weights only"),
            metric="accuracy",
            measured=f"{points}all in bfloat16 minus bfloat16 weights only; within 0.01",
            judge=within(POINT),
        ),
        Claim(
            id="at-any-rate",
            says="Nearest loses accuracy at a learning rate ten times as large, too",
            published="a loss in seven applications, each at its usual learning rate",
            source=ABSTRACT,
            checked=False,
            arms=("nearest, 1e-3", "float32, 1e-3"),
            metric="accuracy",
            measured=f"{points}nearest minus float32, at a learning rate of 1e-3",
            judge=lower,
            remark="Accuracy is near its limit here: see `loss-at-any-rate`.",
        ),
        Claim(
            id="loss-at-any-rate",
            says="Its loss is higher at a learning rate ten times as large, too",
            published="a loss in seven applications, each at its usual learning rate",
            source=ABSTRACT,
            checked=False,
            arms=("nearest, 1e-3", "float32, 1e-3"),
            metric="loss",
            measured="test loss, nearest minus float32, at a learning rate of 1e-3",
            judge=higher,
            remark="Added after the results. An update to nearest is lost below half a unit in the last place of its "
            "weight: 1/512 to 1/256 of it. A larger learning rate loses fewer, so that the damage is smaller than at "
            "1e-4, but it is there.",
        ),
    )
    shown = [name for name in arms if not name.startswith("float32")]
    return Paper(
        title="Revisiting BFloat16 Training",
        authors="Zamirai, Zhang, Aberger and De Sa 2020",
        url="https://arxiv.org/abs/2010.06192",
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("accuracy", "loss"),
        figures=(
            Figure(
                "accuracy",
                "Test accuracy of digits_mlp beside float32",
                "Paired differences to float32 at the same learning rate of 1e-4: each seed, and the mean with its "
                "95 % t interval.",
                lambda results: paper_figures.differences(
                    results,
                    [name for name in shown if "1e-3" not in name],
                    "float32",
                    "accuracy",
                    "test accuracy minus that of float32, share",
                ),
            ),
        ),
    )
