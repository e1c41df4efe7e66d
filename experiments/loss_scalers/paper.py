"""Loss scalers: every rule that jaxmp has, with the same settings, on one task that overflows again and again.

    jaxmp reproduce loss_scalers [--quick]

Micikevicius et al. 2018, Mixed Precision Training, 1710.03740, section 3.2, and the rules that libraries made of it.
`digits_mlp` trains in mixed_float16. All scalers begin at 2^24, far too high, and grow after 20 finite steps,
where libraries take 1,000 or 2,000, so that each rule is at work all the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmp import DynamicScaler, Run, StaticScaler
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.html.figure import Axis
from jaxmp.scaling.historical import (
    ApexScaler,
    DeepSpeedScaler,
    FairseqScaler,
    FlaxScaler,
    JmpScaler,
    MegatronScaler,
    TorchScaler,
)
from jaxmp.scaling.scalers import HeadroomScaler
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Figure, Paper, Train, higher, lower, only_first_fails, within

HARD: dict[str, Any] = {"init_scale": 2.0**24, "growth_interval": 20}
SCALERS = {
    "torch": TorchScaler(**HARD),
    "jmp": JmpScaler(**HARD),
    "flax": FlaxScaler(**HARD),
    "apex": ApexScaler(**HARD),
    "Megatron": MegatronScaler(**HARD),
    "DeepSpeed": DeepSpeedScaler(**HARD),
    "fairseq": FairseqScaler(**HARD),
    "jaxmp": DynamicScaler(**HARD),
    "jaxmp headroom": HeadroomScaler(init_scale=2.0**24, half_life=20),
}
TORCH_LIKE = ("torch", "jmp", "apex", "fairseq", "jaxmp")
"""rules that make the same runs in this study: one result, which is judged once"""
DISTINCT = [name for name in SCALERS if name not in TORCH_LIKE[1:]]
POINT = 0.01
"""the margin of equality: 1 point of test accuracy, 2.7 of the 269 test images"""
SOURCE = "1710.03740, section 3.2"


def scales(run: Run) -> Mapping[str, Any]:
    """Returns the loss scale along a run, and the last."""
    steps, values = run.curve("loss_scale")
    return {"steps": steps.tolist(), "scales": values.tolist(), "last_scale": float(values[-1])}


def get_paper(quick: bool = False) -> Paper:
    """The claims that a dynamic scale costs no accuracy, and what tells the rules apart."""
    epochs, rate = ("4", "1e-3") if quick else ("15", "1e-3")
    options = ("--loop.epochs", epochs, "--loop.eval-every", "1000", "--loop.log-every", "4")
    base = ConfigFile.find("digits_mlp").experiment([*options, "--optimizer.learning-rate", rate])

    def arm(scaler: Any) -> Train:
        return Train(dataclasses.replace(base, precision="mixed_float16", scaler=scaler), measure=scales)

    arms = {"float32": Train(dataclasses.replace(base, precision="float32"))}
    arms |= {name: arm(scaler) for name, scaler in SCALERS.items()}
    arms["static, too high"] = arm(StaticScaler(HARD["init_scale"]))
    if quick:
        arms = {name: arms[name] for name in ("float32", "torch", "Megatron", "static, too high")}

    def same(name: str) -> Claim:
        return Claim(
            id=f"{name.lower().replace(' ', '-')}-costs-nothing",
            says=f"The dynamic rule of {name} is within 1 point of float32, though steps are skipped",
            published="float32's accuracy",
            source=SOURCE,
            checked=False,
            arms=(name, "float32"),
            metric="accuracy",
            measured=f"test accuracy, as a share: {name} minus float32; within 0.01",
            judge=within(POINT, claims=len(DISTINCT)),
            remark=f"The interval holds together with those of the {len(DISTINCT)} distinct rules (Bonferroni). "
            f"{', '.join(TORCH_LIKE[1:])} make the same runs as torch here, scale by scale."
            if name == TORCH_LIKE[0]
            else "",
        )

    def skips(
        id: str,
        says: str,
        first: str,
        judge: Any,
        published: str,
        source: str,
        remark: str = "",
        checked: bool = True,
    ) -> Claim:
        return Claim(
            id=id,
            says=says,
            published=published,
            source=source,
            checked=checked,
            arms=(first, "torch"),
            metric="skipped_steps",
            measured=f"skipped steps: {first} minus torch",
            judge=judge,
            remark=remark,
        )

    claims = (
        Claim(
            id="static-fails",
            says="A constant scale that overflows never trains: no step is applied, under a dynamic one all is well",
            published="training fails where the scale is too large for the gradients",
            source=SOURCE,
            checked=False,
            arms=("static, too high", "torch", "Megatron"),
            metric="accuracy",
            measured="failed runs of the constant scale, %; the interval above 50",
            judge=only_first_fails(0.5),
        ),
        *map(same, DISTINCT),
        skips(
            "hysteresis-skips-more",
            "Megatron's hysteresis skips more steps than torch's rule: after each growth the first overflow is let be",
            "Megatron",
            higher,
            "hysteresis of 2",
            "Megatron-LM, `DynamicGradScaler.update`",
        ),
        skips(
            "flax-skips-fewer",
            "Flax, which grows after one finite step more, skips fewer steps than torch",
            "flax",
            lower,
            "growths 21 finite steps apart, for an interval of 20",
            "flax, `DynamicScale`",
            "In so few steps few growths come: the two rules skip equally often in most seeds.",
        ),
        skips("jmp-is-torch", "jmp's rule is torch's", "jmp", within(0.0), "0", "jmp, `DynamicLossScale.adjust`"),
        skips(
            "headroom-skips-fewer",
            "A scale that follows the largest gradient skips fewer steps than one that waits for an overflow",
            "jaxmp headroom",
            lower,
            "no figure: the rule is jaxmp's own",
            "`help(jaxmp.HeadroomScaler)`",
            checked=False,
        ),
    )
    axis = Axis("step")
    return Paper(
        title="Loss scalers on one overflowing task (Mixed Precision Training, section 3.2)",
        authors="Micikevicius et al. 2018, and libraries",
        url="https://arxiv.org/abs/1710.03740",
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("accuracy", "loss", "skipped_steps"),
        figures=(
            Figure(
                "scales",
                "Loss scale along training",
                "Loss scale of digits_mlp in mixed_float16 under each rule, all seeds; every fourth step.",
                lambda results: paper_figures.curves(
                    results,
                    list(SCALERS)[:1] + list(SCALERS)[4:7] + list(SCALERS)[8:],
                    "steps",
                    "scales",
                    axis,
                    Axis("loss scale", "log2"),
                ),
            ),
            Figure(
                "skipped",
                "Skipped steps under each rule",
                "Number of skipped steps, each seed and the mean with its 95 % t interval.",
                lambda results: paper_figures.means(results, list(SCALERS), "skipped_steps", "skipped steps"),
            ),
        ),
    )
