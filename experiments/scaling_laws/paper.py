"""Scaling laws for precision: which damage rounding does to a language model, by its size, its data and the bits.

    jaxmp reproduce scaling_laws [--quick]

Kumar et al. 2024, Scaling Laws for Precision, 2411.04330. Character LMs of three sizes, each trained on three amounts
of data in float32, are rounded after training (`damage_...`). Others are trained with rounded weights. Model,
optimizer and schedule follow the paper's appendix A: gated SiLU, rotary positions, RMSNorm, Adam (0.9, 0.95), weight
decay 0.1, a warm-up of a tenth of the steps and a cosine, and a learning rate that is smaller the wider the model is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmp import TFDS, AdamW, Arrays, CosineDecay, Experiment, Loop, Run, make_loss, quantize
from jaxmp.data.pipeline import evaluation_batches
from jaxmp.data.text import TextWindows
from jaxmp.data.tokenizer import Characters
from jaxmp.html.figure import Axis, Series, line_figure
from jaxmp.models.transformer import Llama
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import (
    Claim,
    Figure,
    Finding,
    Judge,
    Paper,
    Results,
    Train,
    Values,
    above,
    below,
    higher,
    increasing,
    lower,
    within,
)
from jaxmp.tasks.language import NextToken

SOURCE = "2411.04330"
CONTEXT, ROWS = 64, 16
"""tokens in a window, and windows in a batch"""
CHARACTERS = 65
"""vocabulary: the characters of the text"""
BITS = (3, 4, 5)
"""widths of integers over which the slope by bits is taken; what more bits do is so little that its sign is chance"""
FORMATS = {
    **{f"int{bits}": f"int{bits}:channel" for bits in (*BITS, 6, 8)},
    "mxfp4": "mxfp4:rceil",
    "e4m3": "e4m3:channel",
}
"""block formats to which a trained model is rounded, by short name; `channel`: one scale for each output"""
SAME = 0.02
"""margin in nats within which 6 bits count as no loss: about 1 % of the loss"""


class Size(NamedTuple):
    """The size of a model and of its training."""

    width: int
    layers: int
    steps: int

    @property
    def hidden(self) -> int:
        """The width of the gate: 8/3 of the width, so that a block has 12 width^2 weights."""
        return 8 * self.width // 3

    @property
    def parameters(self) -> int:
        """N: the number of weights in the matrices of the blocks, without embedding and head."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.hidden)

    @property
    def tokens(self) -> int:
        """D: the number of tokens seen in training; each pass over the text counts."""
        return self.steps * ROWS * CONTEXT

    @property
    def ratio(self) -> float:
        """Tokens by parameter, D / N."""
        return self.tokens / self.parameters

    @property
    def name(self) -> str:
        """The name of its arm in float32."""
        return f"width {self.width}, {self.steps} steps"


def generated(split: str) -> Mapping[str, np.ndarray]:
    """Returns a text of words that are drawn by Zipf's law, for `--quick`, which needs no dataset."""
    letters = np.random.default_rng(0)
    words = ["".join(letters.choice(list("etaoinshrdlu"), letters.integers(1, 7))) for _ in range(300)]
    share = 1 / np.arange(1, len(words) + 1)
    drawn = np.random.default_rng(["train", "validation", "test"].index(split)).choice(
        words, 12_000 if split == "train" else 1_500, p=share / share.sum()
    )
    return {"text": np.array([" ".join(drawn)])}


def experiment(size: Size, weights: str = "", *, rows: Any = TFDS(name="tiny_shakespeare")) -> Experiment:  # noqa: B008
    """Returns the training of a character LM.

    Args:
      size: of the model and the training.
      weights: block format to which the weights of products are rounded in the forward pass; empty: they are not.
      rows: dataset of the text.
    """
    return Experiment(
        model=Llama(
            vocabulary=CHARACTERS,
            context=CONTEXT,
            layers=size.layers,
            heads=size.width // 24,
            kv_heads=size.width // 24,
            width=size.width,
            hidden=size.hidden,
        ),
        data=TextWindows(rows=rows, tokenizer=Characters(), length=CONTEXT, batch_size=ROWS),
        task=NextToken(),
        optimizer=AdamW(
            0.128 / size.width,
            schedule=CosineDecay(warmup_steps=size.steps // 10, final=0.1),
            weight_decay=0.1,
            b2=0.95,
            clip_norm=1.0,
        ),
        precision=f"float32,fprop=high/{weights}" if weights else "float32",
        loop=Loop(steps=size.steps, eval_every=size.steps, save_every=2400, log_every=1000, keep=1),
    )


def rounded(params: Any, format: str) -> Any:
    """Returns parameters whose kernels, (in, out), are rounded as they are in the forward product of a recipe."""

    def leaf(path: Any, w: jax.Array) -> jax.Array:
        return quantize(w, format, axis=0) if path[-1].key == "kernel" else w

    return jax.tree_util.tree_map_with_path(leaf, params)


def damages(run: Run, *, trained: str) -> dict[str, float | int]:
    """Returns what rounding the weights after training does to the loss on the test split, in nats.

    Args:
      run: a finished run; its last, unrounded weights are taken.
      trained: block format of the weights in training; empty: float32.

    Returns: `damage_F` for each format F, the loss with weights rounded to F minus that with the weights as they were
      in training; `loss_F`, the former; of a model trained in float32 also `log_damage_F`, the natural logarithm of
      the damage, NaN where rounding did no harm, and `log_damage_per_bit`, its least-squares slope over the integers of
      3 to 5 bits.
    """
    model, task = run.experiment.model, run.experiment.task
    params, source = run.state().params, run.source("test")
    loss = functools.partial(_loss, model, task, list(evaluation_batches(source, 128)))
    as_trained = loss(rounded(params, trained) if trained else params)
    found: dict[str, float | int] = {"loss_as_trained": as_trained}
    for name, format in FORMATS.items():
        found[f"loss_{name}"] = loss(rounded(params, format))
        found[f"damage_{name}"] = damage = found[f"loss_{name}"] - as_trained
        if not trained:
            found[f"log_damage_{name}"] = math.log(damage) if damage > 0 else math.nan
    if not trained:
        found["log_damage_per_bit"] = slope(BITS, [found[f"log_damage_int{bits}"] for bits in BITS])
    return found


def _loss(model: Any, task: Any, batches: Sequence[Mapping[str, np.ndarray]], params: Any) -> float:
    """The mean loss of a token in nats, added up in float64."""
    found = [_losses(model, task)(params, batch) for batch in batches]
    return sum(float(total) for total, _ in found) / sum(float(weight) for _, weight in found)


@functools.cache
def _losses(model: Any, task: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The summed loss of a batch and its weight; compiled once for all runs of a model."""
    loss_fn = make_loss(model, task, "float32", train=False)

    @jax.jit
    def losses(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        total, (weight, *_) = loss_fn(params, {}, batch, jax.random.key(0))
        return total, weight

    return losses


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the least-squares slope of y over x; NaN if a value of y is NaN.

    >>> slope([1, 2, 4], [3, 5, 9])
    2.0
    """
    centred = [value - math.fsum(x) / len(x) for value in x]
    return math.fsum(c * value for c, value in zip(centred, y, strict=True)) / math.fsum(c * c for c in centred)


def by_seed(function: Callable[[Sequence[float]], float], judge: Judge) -> Judge:
    """Returns a judge of one number for each seed, made of the values of all arms; a seed with a failed run fails."""

    def judged(values: Values) -> Finding:
        numbers: dict[int, float | None] = {}
        for seed in values[0]:
            row = [of.get(seed) for of in values]
            known = [value for value in row if value is not None]
            numbers[seed] = function(known) if len(known) == len(row) else None
        return judge([numbers])

    return judged


def least_slope(x: Sequence[float], y: Sequence[float], group: Sequence[int]) -> float:
    """Returns the least of the slopes of y over x within each group."""
    groups = [[i for i, of in enumerate(group) if of == each] for each in dict.fromkeys(group)]
    return min(slope([x[i] for i in members], [y[i] for i in members]) for members in groups)


def get_paper(quick: bool = False) -> Paper:
    """The claims about rounding after training, about training with rounded weights, and about both."""
    widths, steps = ((24,), (60, 240)) if quick else ((24, 48, 96), (600, 2400, 9600))
    rows = Arrays(generated) if quick else TFDS(name="tiny_shakespeare")
    grid = [Size(width, 1 if quick else 2, count) for width in widths for count in steps]

    def arm(size: Size, weights: str = "") -> Train:
        format = FORMATS[weights] if weights else ""
        return Train(experiment(size, format, rows=rows), measure=functools.partial(damages, trained=format))

    def trained(size: Size, weights: str) -> str:
        return f"{size.name}, {weights} weights"

    small, middle = (Size(width, grid[0].layers, steps[1]) for width in (widths[0], widths[len(widths) // 2]))
    arms = {size.name: arm(size) for size in grid}
    few = ("int4",) if quick else ("int3", "int4", "int6")
    arms |= {trained(middle, weights): arm(middle, weights) for weights in few}
    if not quick:
        arms[trained(small, "int3")] = arm(small, "int3")
    names = tuple(size.name for size in grid)
    longest = tuple(size.name for size in grid if size.steps == steps[-1])
    over = {
        "tokens": [math.log(size.tokens) for size in grid],
        "parameters": [math.log(size.parameters) for size in grid],
        "tokens by parameter": [math.log(size.ratio) for size in grid],
    }

    def over_grid(
        id: str,
        *,
        says: str,
        published: str,
        source: str,
        of: str,
        judge: Judge,
        format: str = "int4",
        remark: str = "",
    ) -> Claim:
        x = over[of]
        return Claim(
            id=id,
            says=says,
            published=published,
            source=f"{SOURCE}, {source}",
            checked=True,
            arms=names,
            metric=f"log_damage_{format}",
            measured=f"slope of the logarithm of the damage by {format} over that of {of}, {len(grid)} models a seed",
            judge=by_seed(lambda y: slope(x, y), judge),
            remark=remark,
        )

    def grows(format: str, *, says: str, source: str, remark: str = "") -> Claim:
        return over_grid(
            f"grows-with-ratio-{format}",
            says=says,
            published="delta = C_T (D^gamma_D / N^gamma_N) exp(-P_post / gamma_post), an approximate power law in D/N",
            source=source,
            of="tokens by parameter",
            judge=above(0.0),
            format=format,
            remark=remark,
        )

    def robust(weights: str) -> Claim:
        return Claim(
            id=f"robust-{weights}",
            says=f"A model trained with {weights} weights loses less by rounding to int3 than one trained in float32",
            published="models trained in lower precision are more robust: they incur lower degradation",
            source=f"{SOURCE}, section 5",
            checked=True,
            arms=(trained(middle, weights), middle.name),
            metric="damage_int3",
            measured=f"damage by int3 in nats, {weights} weights minus float32",
            judge=lower,
            remark="Both are rounded from the unrounded weights that the optimizer keeps.",
        )

    ordered = tuple(trained(middle, weights) for weights in ("int6", "int4", "int3"))
    figure_2 = "finding 1, equation 2, figure 2"
    claims = [
        grows("int4", says="The damage by int4 grows with tokens by parameter", source=figure_2),
        grows("int3", says="So does that by int3", source=figure_2),
        grows(
            "mxfp4",
            says="So does that by a float format, mxfp4",
            source="appendix D",
            remark="A hypothesis of the paper: similar functional forms for integers and floats.",
        ),
        over_grid(
            "grows-with-data",
            says="At equal size, the damage grows with the data",
            published="gamma_D = 0.5068; the trend is the finding, the constant is not",
            source="section 3.1; table 2 of appendix K",
            of="tokens",
            judge=above(0.0),
        ),
        over_grid(
            "larger-lose-less",
            says="With the same data, larger models lose less",
            published="gamma_N = 0.3439, the slope being -gamma_N; the trend is the finding, the constant is not",
            source="section 3.1; table 2 of appendix K",
            of="parameters",
            judge=below(0.0),
        ),
        Claim(
            id="at-every-size",
            says="The damage grows with the data at every size",
            published="degradation increases in training data size across all model sizes",
            source=f"{SOURCE}, section 3.1, figure 2",
            checked=True,
            arms=names,
            metric="log_damage_int4",
            measured=f"least of {len(widths)} slopes of the logarithm of the damage by int4 over that of tokens",
            judge=by_seed(lambda y: least_slope(over["tokens"], y, [size.width for size in grid]), above(0.0)),
            remark="The least of each seed: its mean is at most the slope of any size.",
        ),
        Claim(
            id="falls-with-bits",
            says="Each bit less more than doubles the damage",
            published="exp(-P_post / gamma_post) with gamma_post = 0.5907: a slope of -1.69 a bit",
            source=f"{SOURCE}, equation 2; table 2 of appendix K",
            checked=True,
            arms=longest,
            metric="log_damage_per_bit",
            measured=f"slope of the logarithm of the damage by bit, int{BITS[0]} to int{BITS[-1]}, mean of the "
            f"{len(longest)} models of the most tokens in a seed; below -ln 2",
            judge=by_seed(lambda y: math.fsum(y) / len(y), below(-math.log(2))),
            remark="Of models of fewer tokens the damage by int5 is too small beside chance. A slope of -ln 4 = -1.39 "
            "is that of the square of the rounding error. Table 2 was read in a text that had lost subscripts: "
            "0.5907 stands there after gamma_N, for a gamma without one.",
        ),
        Claim(
            id="more-data-harms",
            says="With enough tokens by parameter, more data makes the model that is rounded to int3 worse",
            published="an amount of data beyond which more is actively harmful",
            source=f"{SOURCE}, section 3.1, figures 1 and 2",
            checked=True,
            arms=(grid[len(steps) - 1].name, grid[len(steps) - 2].name),
            metric="loss_int3",
            measured=f"test loss after rounding to int3, nats, width {widths[0]}, {steps[-1]} minus {steps[-2]} steps",
            judge=higher,
        ),
        Claim(
            id="fewer-bits-lose",
            says="Training with weights of fewer bits ends at a higher loss",
            published="N_eff = N (1 - exp(-P_w / gamma_w)) rises with the bits",
            source=f"{SOURCE}, section 4.1, equation 3, figure 4",
            checked=True,
            arms=ordered,
            metric="loss_as_trained",
            measured="test loss in nats, the least certain step of int6, int4, int3",
            judge=increasing,
        ),
        Claim(
            id="gains-shrink",
            says="The gain of a bit is smaller where there are more",
            published="gains are large at lower precisions and saturate",
            source=f"{SOURCE}, section 4.1",
            checked=True,
            arms=ordered,
            metric="loss_as_trained",
            measured="test loss in nats, the gain of int4 over int3 minus that of int6 over int4",
            judge=by_seed(lambda y: (y[2] - y[1]) - (y[1] - y[0]), above(0.0)),
            remark="The second gain is that of two bits.",
        ),
        Claim(
            id="saturates-at-6",
            says=f"With 6 bits the loss is that of float32, within {SAME} nats",
            published="saturation typically around 6 to 7 bits per weight",
            source=f"{SOURCE}, section 4.1",
            checked=True,
            arms=(ordered[0], middle.name),
            metric="loss_as_trained",
            measured=f"test loss in nats, int6 weights minus float32; within {SAME}",
            judge=within(SAME),
        ),
        Claim(
            id="training-costs-small-models-more",
            says="Training with int3 weights costs the smaller model more",
            published="L = A N_eff^-alpha + B D^-beta + E: a share of N is lost, which costs more where N is small",
            source=f"{SOURCE}, section 4.1, equation 3, figure 4",
            checked=True,
            arms=(trained(small, "int3"), small.name, ordered[2], middle.name),
            metric="loss_as_trained",
            measured=f"test loss in nats, int3 weights minus float32: that of width {small.width} minus that of width "
            f"{middle.width}",
            judge=by_seed(lambda y: (y[0] - y[1]) - (y[2] - y[3]), above(0.0)),
        ),
        robust("int4"),
        robust("int6"),
    ]
    left_out = () if len(widths) > 1 else ("larger-lose-less",)
    by_ratio = sorted(grid, key=lambda size: size.ratio)
    return Paper(
        title="Scaling Laws for Precision",
        authors="Kumar et al. 2024",
        url="https://arxiv.org/abs/2411.04330",
        seeds=(0,) if quick else (0, 1, 2, 3, 4),  # a run takes seconds to compile
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms) and claim.id not in left_out),
        tables=("loss_as_trained", *(f"damage_{name}" for name in FORMATS), "log_damage_per_bit"),
        figures=(
            Figure(
                "damage",
                "Damage of int4 by tokens and parameters",
                "Test loss with weights rounded to int4 after training, minus that in float32, over tokens by "
                "parameter: the geometric mean of the seeds in which it did harm, a line for each size.",
                lambda results: _by_ratio(results, grid),
            ),
            Figure(
                "bits",
                "Damage by bits",
                "The same over the bits of integers, for the models of the fewest and of the most tokens by parameter "
                "and the one between.",
                lambda results: _by_bits(results, by_ratio[:: max(len(by_ratio) // 2, 1)]),
            ),
            Figure(
                "training",
                "Loss of training with rounded weights",
                f"Test loss of width {middle.width} with weights rounded in training, minus that in float32: each "
                "seed, and the mean with its 95 % t interval.",
                lambda results: paper_figures.differences(
                    results,
                    [trained(middle, weights) for weights in few],
                    middle.name,
                    "loss_as_trained",
                    "test loss minus that of float32, nats",
                ),
            ),
        ),
    )


def _mean_damage(results: Results, size: Size, format: str) -> float:
    return math.exp(results.mean(size.name, f"log_damage_{format}").mean)


def _by_ratio(results: Results, grid: Sequence[Size]) -> str:
    series = []
    for i, width in enumerate(dict.fromkeys(size.width for size in grid)):
        of = [size for size in grid if size.width == width]
        damage = [_mean_damage(results, size, "int4") for size in of]
        series.append(Series(f"{of[0].parameters:,} parameters", [size.ratio for size in of], damage, i))
    vertical = Axis("damage by int4, nats", "log10")
    return line_figure(Axis("tokens by parameter", "log10"), vertical, series, name="Damage by tokens by parameter")


def _by_bits(results: Results, sizes: Sequence[Size]) -> str:
    series = [
        Series(f"D/N = {size.ratio:,.0f}", BITS, [_mean_damage(results, size, f"int{bits}") for bits in BITS], i)
        for i, size in enumerate(sizes)
    ]
    return line_figure(Axis("bits", whole=True), Axis("damage, nats", "log10"), series, name="Damage by bits")
