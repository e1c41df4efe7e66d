"""Training a character language model in 4 bits by NVFP4's recipe, and with each of its parts left out.

    jaxmp reproduce fp4_training [--quick]

NVIDIA 2025, Pretraining Large Language Models with NVFP4, 2509.25149.

`shakespeare_gpt`, 4 layers of width 128, for 400 of its 2,000 steps. The recipe is the paper's: products of the first
three blocks are in NVFP4, the last block and the head are in float32. A part is left out by one field of the policy.
MXFP4 stands in the recipe's place of NVFP4, with weights in blocks along the products, as MXFP4 has them; it is
compared with NVFP4 without 16x16 weights, so that the format is all that differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxmp import Arrays
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Figure, Paper, Train, higher, within

SOURCE = "2509.25149"
CONFIG = "shakespeare_gpt"
STEPS = 400
MARGIN = 0.035
"""nats: 1.5 % of 2.33, the loss of float32 after these steps (experiments/recipes)"""
LAYERS = 4
PARTS = {
    "hadamard": ("without Hadamard", "nvfp4,hadamard=none"),
    "stochastic": ("without stochastic rounding", "nvfp4,stochastic=none"),
    "two-dimensional": ("without 16x16 weights", "nvfp4,fprop=nvfp4/nvfp4,dgrad=nvfp4/nvfp4"),
    "high-layers": ("without high layers", "nvfp4"),
}
"""each part of the recipe by its claim: the arm without it, and the recipe of that arm"""
RECIPES = {
    "float32": "float32",
    "NVFP4": "nvfp4",
    **dict(PARTS.values()),
    "MXFP4": "nvfp4,fprop=mxfp4:rceil,dgrad=mxfp4:rceil,wgrad=mxfp4:rceil",
}
"""the recipe of each arm"""
QUICK = ("float32", "NVFP4", "without high layers")
"""the arms of the quick version: each recipe takes seconds to compile"""


def repeated(split: str) -> Mapping[str, np.ndarray]:
    """Returns a text of one line many times, for `--quick`, which needs no dataset."""
    return {"text": np.array(["To be, or not to be, that is the question.\n" * (400 if split == "train" else 40)])}


def precision_of(arm: str, layers: int) -> str:
    """Returns the policy of an arm: its recipe, and float32 for the last block and the head, which it keeps high.

    The weights of the head are those of the embedding.
    """
    high = "" if arm in ("float32", "without high layers") else f"blocks_{layers - 1}=float32; tokens=float32; "
    return high + RECIPES[arm]


def get_paper(quick: bool = False) -> Paper:
    """The claims about NVFP4 beside float32 and MXFP4, and about each part of its recipe."""
    options = ("--loop.steps", str(STEPS), "--loop.eval-every", str(STEPS))

    def arm(name: str) -> Train:
        if not quick:
            return Train(CONFIG, ("--precision", precision_of(name, LAYERS), *options))
        short = ["--loop.steps", "20", "--optimizer.schedule.warmup-steps", "5", "--model.layers", "2"]
        experiment = ConfigFile.find(CONFIG).experiment(["--precision", precision_of(name, 2), *short])
        data = dataclasses.replace(experiment.data, rows=Arrays(repeated))
        return Train(dataclasses.replace(experiment, data=data))

    arms = {name: arm(name) for name in RECIPES if not quick or name in QUICK}
    nats = "test loss, nats a character"
    relative_error = "a relative error of the loss below 1 %, and about 1.5 % at the end, beside FP8 (12B model)"
    claims = (
        Claim(
            id="nvfp4-near",
            says="A language model trained by NVFP4's recipe has a loss within 1.5 % of a wider format's",
            published=relative_error,
            source=f"{SOURCE}, the section on training with NVFP4",
            checked=False,
            arms=("NVFP4", "float32"),
            metric="loss",
            measured=f"{nats}: NVFP4 minus float32; within {MARGIN:g}",
            judge=within(MARGIN),
        ),
        Claim(
            id="nvfp4-costs",
            says="But it costs something",
            published=relative_error,
            source=f"{SOURCE}, the section on training with NVFP4",
            checked=False,
            arms=("NVFP4", "float32"),
            metric="loss",
            measured=f"{nats}: NVFP4 minus float32",
            judge=higher,
        ),
        Claim(
            id="mxfp4-loses-more",
            says="MXFP4 in the place of NVFP4 has a higher loss",
            published="MXFP4 takes 36 % more tokens to come to the loss of NVFP4 (8B model)",
            source=f"{SOURCE}, the comparison with MXFP4",
            checked=False,
            arms=("MXFP4", "without 16x16 weights"),
            metric="loss",
            measured=f"{nats}: MXFP4 minus NVFP4, neither with 16x16 weights",
            judge=higher,
        ),
        *(
            Claim(
                id=f"part-{id}",
                says=f"NVFP4 {name} has a higher loss than the whole recipe",
                published="a higher loss without it, shown as curves (12B model)",
                source=f"{SOURCE}, the ablation of its techniques",
                checked=False,
                arms=(name, "NVFP4"),
                metric="loss",
                measured=f"{nats}: {name} minus the whole recipe",
                judge=higher,
            )
            for id, (name, _) in PARTS.items()
        ),
    )
    compared = [name for name in arms if name != "float32"]
    return Paper(
        title="Pretraining Large Language Models with NVFP4",
        authors="NVIDIA 2025",
        url="https://arxiv.org/abs/2509.25149",
        seeds=(10,) if quick else tuple(range(10, 18)),  # 0 to 2 were seen: experiments/recipes
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("loss",),
        figures=(
            Figure(
                "losses",
                "Test loss beside that of float32",
                "Paired differences of the test loss to float32: each seed, and the mean with its 95 % t interval.",
                lambda results: paper_figures.differences(
                    results, compared, "float32", "loss", "loss, nats a character"
                ),
            ),
        ),
    )
