"""Training in 4 bits, at the level of gradients: three papers beside one estimate of a gradient, with no long training.

    jaxmp reproduce fp4_gradients [--quick]

Castro et al. 2025, Quartet: Native FP4 Training Can Be Optimal for Large Language Models, 2505.14669.
Chmiel et al. 2025, FP4 All the Way: Fully Quantized Training of LLMs, 2505.19115.
NVIDIA 2025, Pretraining Large Language Models with NVFP4, 2509.25149.

Two kinds of arms. `gaussian` rounds normal numbers, as table 2 of Quartet does. `gradient` trains `digits_mlp` in
float32 for some steps, then takes the gradient of one batch many times under a recipe, with other random numbers for
stochastic rounding each time, and compares their mean and their spread with the gradient in float64.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import make_loss, parse_policy, quantize, what_if
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.instruments.gradient_error import exact_gradients, float64_arrays
from jaxmp.runs.replay import PastStep, states_at
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, above, higher, increasing, lower, near
from jaxmp.training.gradients import make_gradients

THRESHOLD = math.sqrt(3)
"""norm of the gradient by its quantisation noise"""
QUARTET, FP4, NVFP4 = "2505.14669", "2505.19115", "2509.25149"

# Weights and activations to nearest, gradients stochastic, as in FP4 All the Way.
FORMATS = {
    "nvfp4": "nvfp4",
    "e2m1, 16, e8m0": "e2m1:block16:e8m0:rceil",
    "mxfp4": "mxfp4:rceil",
    "e2m1, 64, e8m0": "e2m1:block64:e8m0:rceil",
    "e2m1, tensor": "e2m1:tensor",
}
HIGH = "Dense_1=float32; "
PARTS = {
    "nvfp4 recipe": HIGH + "nvfp4",
    "without Hadamard": HIGH + "nvfp4,hadamard=none",
    "without stochastic rounding": HIGH + "nvfp4,stochastic=none",
    "without 16x16 weights": HIGH + "nvfp4,fprop=nvfp4/nvfp4,dgrad=nvfp4/nvfp4",
    "without high layers": "nvfp4",
}

ERROR = "error of the gradient, share of its norm"
FORWARD = (
    "Most of the error is bias of the forward pass, which is rounded to nearest in both: it changes the outputs, and "
    "with them the whole gradient, by an amount that differs much from seed to seed. "
)
OF_ONE_STEP = (
    "What is judged is the gradient of one step of a small network, from which the paper's claim, of the loss after a "
    "long training, does not follow."
)
QUICK = ("gaussian, nearest", "gaussian, stochastic", "nvfp4", "all to nearest", "step 1")
"""the arms of the quick version"""


def gaussian(seed: int, *, format: str, rounding: str, rows: int) -> dict[str, float]:
    """Returns the mean squared error of rounding standard normal numbers, shape (rows, 1024)."""
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (rows, 1024))
    given = {"key": keys[1]} if rounding == "stochastic" else {}
    error = np.asarray(quantize(x, format, rounding=rounding, **given), np.float64) - np.asarray(x, np.float64)
    return {"mse": float(np.mean(error**2)), "bias": float(np.sum(error * x) / np.sum(np.asarray(x, np.float64) ** 2))}


def gradient(seed: int, *, precision: str, step: int, draws: int) -> dict[str, float]:
    """Returns bias, spread and error of the gradient under `precision`, over the norm of the float64 gradient r.

    `bias`: norm of (mean of the draws - r), without what their spread adds to it; `spread`: root of the mean of the
    squared distance to the mean; `error`: root of the mean squared distance to r. A precision that draws nothing has
    no spread.
    """
    past, exact = _step(seed, step)
    estimate = _estimate(precision)
    found = np.stack([estimate(past, jax.random.key(draw)) for draw in range(draws)])
    norm = np.linalg.norm(exact)
    mean = found.mean(0)
    variance = float(np.sum((found - mean) ** 2) / (draws - 1))
    squared_bias = float(np.sum((mean - exact) ** 2)) - variance / draws
    return {
        "bias": math.sqrt(max(squared_bias, 0.0)) / norm,
        "spread": math.sqrt(variance) / norm,
        "error": math.sqrt(max(squared_bias, 0.0) + variance) / norm,
    }


def signal_to_noise(seed: int, *, recipe: str, step: int) -> dict[str, float]:
    """Returns the least signal to noise of the gradient products of the layers, and that of each, at a step."""
    found = what_if(_experiment(seed), recipes=[recipe], step=step, log=lambda message: None)
    ratios = {f"{row.layer} {row.product}": row.signal_to_noise for row in found.rows if row.product != "fprop"}
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    return {"least": min(known.values()), **known}


def _experiment(seed: int) -> Any:
    return ConfigFile.find("digits_mlp").experiment(["--precision", "float32", "--seed", str(seed)])


@functools.cache
def _step(seed: int, step: int) -> tuple[PastStep, np.ndarray]:
    """A step of training in float32, and its gradient in float64 without dropout, as one array."""
    experiment = _experiment(seed)
    (past,) = states_at(experiment, {step})
    loss = make_loss(experiment.adapted_model, experiment.task, parse_policy("p=f64,c=f64,o=f64"), train=False)
    exact = exact_gradients(loss)
    return past, _flat(exact(past.state.params, past.state.model_state, past.batch, past.state.key))


@functools.cache
def _estimate(precision: str) -> Any:
    """The gradient under `precision` with a key, as one float64 array; compiled once for all seeds."""
    experiment = _experiment(0)
    gradients = jax.jit(make_gradients(make_loss(experiment.adapted_model, experiment.task, precision, train=False)))

    def at(past: PastStep, key: Any) -> np.ndarray:
        grads, _, _ = gradients(past.state.params, past.state.model_state, jnp.float32(1), past.batch, key)
        return _flat(float64_arrays(grads))

    return at


def _flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def get_paper(quick: bool = False) -> Paper:
    """The claims about rounding errors, formats, stochastic rounding, NVFP4's parts, and signal to noise."""
    rows, step, draws = (64, 20, 4) if quick else (2048, 200, 16)
    arms: dict[str, Compute] = {
        f"gaussian, {rounding}": Compute(gaussian, {"format": "mxfp4:rceil", "rounding": rounding, "rows": rows})
        for rounding in ("nearest", "stochastic")
    }
    how = {"step": step, "draws": draws}
    for name, format in FORMATS.items():
        products = {"fprop": format, "dgrad": format, "wgrad": format, "stochastic": "gradients"}
        fields = ",".join(f"{field}={value}" for field, value in products.items())
        arms[name] = Compute(gradient, {"precision": f"float32,{fields}", **how})
    plain = "float32,fprop=nvfp4,dgrad=nvfp4,wgrad=nvfp4"
    arms["all to nearest"] = Compute(gradient, {"precision": f"{plain},stochastic=none", **how})
    everywhere = "activations/weights/gradients"
    arms["all stochastic"] = Compute(gradient, {"precision": f"{plain},stochastic={everywhere}", **how})
    for name, precision in PARTS.items():
        arms[name] = Compute(gradient, {"precision": precision, **how})
    early, late = (1, 20) if quick else (1, 1000)
    arms["step 1"] = Compute(signal_to_noise, {"recipe": "nvfp4", "step": early})
    arms["last step"] = Compute(signal_to_noise, {"recipe": "nvfp4", "step": late})

    if quick:  # each recipe takes seconds to compile
        arms = {arm: arms[arm] for arm in QUICK}

    def part(id: str, arm: str, metric: str, remark: str = "") -> Claim:
        return Claim(
            id=f"part-{id}",
            says=f"NVFP4 {arm} has a worse gradient than the whole recipe",
            published="no figure of a gradient: training a 12B model without it has a higher loss, shown as curves",
            source=f"{NVFP4}, the ablation of its techniques",
            checked=False,
            arms=(arm, "nvfp4 recipe"),
            metric=metric,
            measured=f"{metric} of the gradient by its norm, {arm} minus the whole recipe",
            judge=higher,
            remark=f"{OF_ONE_STEP} {remark}".rstrip(),
        )

    claims = (
        Claim(
            id="mse-nearest",
            says="MXFP4 to nearest has this mean squared error on normal numbers",
            published="1.37e-2",
            source=f"{QUARTET}, table 2",
            checked=False,
            arms=("gaussian, nearest",),
            metric="mse",
            measured="mean squared error",
            judge=near(1.37e-2, 0.05),
            remark="Judged within 5 % of the figure. Scales are rounded up here (`mxfp4:rceil`); the paper's own code "
            "was not run.",
        ),
        Claim(
            id="mse-stochastic",
            says="MXFP4 with stochastic rounding has about twice that",
            published="2.77e-2",
            source=f"{QUARTET}, table 2",
            checked=False,
            arms=("gaussian, stochastic",),
            metric="mse",
            measured="mean squared error",
            judge=near(2.77e-2, 0.05),
            remark="As above.",
        ),
        Claim(
            id="nvfp4-best",
            says="NVFP4 (blocks of 16, e4m3 scales) gives better gradients than MXFP4 (blocks of 32, e8m0)",
            published="NVFP4 gives the best results",
            source=f"{FP4}, abstract",
            checked=True,
            arms=("nvfp4", "mxfp4"),
            metric="error",
            measured="error of the gradient by its norm, NVFP4 minus MXFP4",
            judge=lower,
            remark=FORWARD + "The spread, which the backward pass alone makes, is smaller under NVFP4: see the table.",
        ),
        Claim(
            id="format-order",
            says="Larger blocks and coarser scales lose more",
            published="an order of block sizes and scale formats by loss, shown as curves",
            source=f"{FP4}, the sections on block size and scale format",
            checked=False,
            arms=tuple(FORMATS),
            metric="error",
            measured="error of the gradient by its norm, the least certain step of the order",
            judge=increasing,
            remark=f"The order judged: {', then '.join(FORMATS)}. The means are in this order. {FORWARD}",
        ),
        Claim(
            id="stochastic-unbiased",
            says="Stochastic rounding of gradients takes away bias",
            published="round to nearest in the forward pass, stochastic in the backward pass and the update",
            source=f"{FP4}, abstract",
            checked=True,
            arms=("nvfp4", "all to nearest"),
            metric="bias",
            measured="bias of the gradient by its norm, stochastic gradients minus all to nearest",
            judge=lower,
            remark=FORWARD + "The same is tested on the backward pass with a cleaner forward pass by "
            "`part-stochastic`.",
        ),
        Claim(
            id="stochastic-noise",
            says="Stochastic rounding of gradients costs error in one step: its spread is more than the bias it saves",
            published="2.77e-2 stochastic, 1.37e-2 to nearest (mean squared errors)",
            source=f"{QUARTET}, table 2",
            checked=False,
            arms=("nvfp4", "all to nearest"),
            metric="error",
            measured="error of the gradient by its norm, stochastic gradients minus all to nearest",
            judge=higher,
            remark=FORWARD,
        ),
        Claim(
            id="gradients-only",
            says="Stochastic rounding belongs on gradients only: on weights and activations it adds error",
            published="round to nearest in the forward pass",
            source=f"{FP4}, abstract",
            checked=True,
            arms=("all stochastic", "nvfp4"),
            metric="error",
            measured="error of the gradient by its norm, stochastic everywhere minus on gradients only",
            judge=higher,
        ),
        part(
            "hadamard",
            "without Hadamard",
            "error",
            "The transform spreads outliers over a block. The activations and gradients of a small network on digits "
            "have none to speak of, and it adds spread; the difference is small beside the error itself.",
        ),
        part("stochastic", "without stochastic rounding", "bias"),
        part(
            "two-dimensional",
            "without 16x16 weights",
            "error",
            "What the paper wants of 16x16 blocks is that both passes see the same weights, over many steps. An error "
            "against float64 does not measure that: smaller blocks round each number better, so in one step this part "
            "costs error.",
        ),
        part("high-layers", "without high layers", "error"),
        Claim(
            id="sqrt3-early",
            says="At the start, the gradient products are above sqrt(3) times their quantisation noise",
            published="below about sqrt(3), training in 4 bits becomes less effective",
            source=f"{FP4}, abstract",
            checked=True,
            arms=("step 1",),
            metric="least",
            measured="least signal to noise of a layer's gradient product, first step",
            judge=above(THRESHOLD),
            remark="Of single products beside their own rounding error, of which most follows from the format: the "
            "paper's threshold speaks of the gradient of the whole loss.",
        ),
        Claim(
            id="sqrt3-falls",
            says="It falls as the gradient becomes small",
            published="the threshold is crossed late in training",
            source=f"{FP4}, the section on the threshold",
            checked=False,
            arms=("last step", "step 1"),
            metric="least",
            measured=f"least signal to noise, step {late} minus step {early}",
            judge=lower,
            remark="Measured of single products of one batch, as `jaxmp what-if` does; the paper's threshold speaks of "
            "the gradient of the whole loss, whose norm shrinks while the noise of its batches does not.",
        ),
    )
    seeds = (0, 1) if quick else (0, 1, 2, 3, 4, 5, 6, 7)
    return Paper(
        title="FP4 training at the level of gradients (Quartet, FP4 All the Way, NVFP4)",
        authors="Castro et al. 2025; Chmiel et al. 2025; NVIDIA 2025",
        url="https://arxiv.org/abs/2505.14669 https://arxiv.org/abs/2505.19115 https://arxiv.org/abs/2509.25149",
        seeds=seeds,
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("mse", "error", "bias", "spread", "least"),
        figures=(
            Figure(
                "formats",
                "Error of the gradient by format",
                "Root mean squared distance of the gradient of digits_mlp to that in float64, by the norm of the "
                "latter: each seed, and the mean with its 95 % t interval. Gradients are rounded stochastically.",
                lambda results: paper_figures.means(
                    results, [*FORMATS, "all to nearest", "all stochastic"], "error", ERROR
                ),
            ),
            Figure(
                "parts",
                "Error of the gradient with each part of NVFP4 left out",
                "As above, for NVIDIA's recipe with the last layer in float32, and without one of its parts each.",
                lambda results: paper_figures.means(results, list(PARTS), "error", ERROR),
            ),
        ),
    )
