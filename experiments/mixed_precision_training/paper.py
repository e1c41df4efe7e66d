"""Mixed precision training: float16 is as good as float32, by three techniques, each of which is left out here.

    jaxmp reproduce mixed_precision_training [--quick]

Micikevicius et al. 2018, Mixed Precision Training, 1710.03740. Equality is tested on `digits_mlp` and on six tasks in
the manner of the paper's own, each trained for minutes; their data has to be prepared first:

    for name in mnist cifar10 glue/sst2 tiny_shakespeare; do jaxmp data prepare $name; done
    jaxmp data prepare spoken_digits --manual RECORDINGS

For loss scaling `digits_mlp` is trained with a loss in a unit 2^19 as large, and a learning rate 2^19 as large: in
float32 that changes no update but by rounding, and in float16 the gradients are at the bottom of the range. Those of
digits itself are not, and need no scale; the paper's own example is an object detector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import SGD, FunctionTask, InputError, Mean, NoScaler, Run, StaticScaler
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.html.figure import Axis, Series, line_figure
from jaxmp.precision.rounding import apply_updates
from jaxmp.reports.ranges import by_exponent, gradient_histogram
from jaxmp.runs.fit import fit
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, Results, Train, above, below, higher, lower, within
from jaxmp.studies.two_sample import RealImages

POINT = 0.01
"""the margin of equality: 1 point of test accuracy, 2.7 of the 269 test images of digits; or a hundredth of a nat"""
UNIT = 2.0**-19
"""the largest unit in which float16 loses the gradients of a whole batch without a scale: a batch of 64 divides them by
2^6, and 2^-25 is half of float16's smallest number"""
LOST = -25
"""float16 makes 0 of magnitudes up to 2^-25, half of its smallest number"""
RATIOS = (1024, 1536, 2047, 2304, 2560, 3072, 3584, 4096, 8192)
SOURCE = "1710.03740"


class Task(NamedTuple):
    """A task in which mixed float16 is compared with float32."""

    config: str
    options: tuple[str, ...]
    """of `jaxmp train`: what makes it short"""
    published: str
    """the paper's figures of the task that is most like it: float32, then mixed"""
    source: str
    metric: str = "accuracy"
    unit: str = "test accuracy, as a share"
    """what the metric is, with its unit"""
    remark: str = ""
    measure: Callable[[Run], Mapping[str, Any]] | None = None
    """of a finished run: gives the metric, where the task's own does not"""


def told_apart(run: Run) -> dict[str, float]:
    """Returns how well the pictures of a run's last weights are told from test images of MNIST.

    `told_apart`: the accuracy of `jaxmp.studies.two_sample.nearest_neighbour_accuracy`, 0.5 to 1, in the features of
    a `mnist_cnn` of two epochs in float32, of the same weights for all runs; it is trained beside the first of them.
    """
    file, workdir = ConfigFile.find("mnist_cnn"), run.path.parents[1]
    options = ["--precision", "float32", "--loop.epochs", "2"]
    how = {"name": file.name, "origin": file.origin(options), "progress": "none", "log": lambda message: None}
    fitted = fit(file.experiment(options), workdir=workdir, **how)
    if fitted.stopped:
        raise KeyboardInterrupt
    return {"told_apart": RealImages(Run(fitted.path)).from_pictures(run, run.state())["accuracy"]}


TASKS = {
    "MNIST": Task("mnist_mlp", ("--loop.epochs", "2"), "56.77 and 56.93 % (AlexNet on ILSVRC12)", "table 1"),
    "CIFAR-10": Task("cifar10_cnn", ("--loop.epochs", "1"), "75.92 and 76.04 % (ResNet-50 on ILSVRC12)", "table 1"),
    "spoken digits": Task(
        "spoken_digits_lstm",
        ("--loop.epochs", "8"),
        "character error rates of 2.20 and 1.99 % (English speech)",
        "table 3",
        remark="One of the 300 test recordings is a third of a point. After 8 of the config's 30 epochs the two runs "
        "of a seed differ in at most four of them, which leaves more than a point open; after all 30, means of 3 seeds "
        "differ by a third of a point (configs/README.md).",
    ),
    "SST-2": Task(
        "sst2_lstm",
        ("--loop.steps", "256"),
        "the same quality of an LSTM's English to French translation, shown as curves",
        "section 4.4",
        unit="accuracy on the published validation split, as a share",
    ),
    "characters": Task(
        "shakespeare_gpt",
        ("--loop.steps", "500"),
        "the same perplexity of the bigLSTM language model, shown as curves",
        "section 4.5",
        "loss",
        "test loss, nats a character",
    ),
    "DCGAN": Task(
        "mnist_dcgan",
        ("--loop.epochs", "2"),
        "pictures of faces of the same quality, shown",
        "section 4.6",
        "told_apart",
        "accuracy, as a share, at which the pictures' nearest neighbours tell them from test images",
        remark="Two of the config's three epochs: the accuracy still falls towards that of equal distributions, 0.5.",
        measure=told_apart,
    ),
}


def magnitudes(run: Run) -> dict[str, Any]:
    """Returns how large the activation gradients of a run without a loss scale were, in all steps that it looked at.

    `lost_gradients`: share of the non-zero ones below 2^-25, of which float16 makes 0; `saved_gradients`: of those from
    2^-28 on, which a scale of 8 saves; `lines`: all together, as one of `Run.ranges`.
    """
    if not run.ranges:
        raise InputError(
            f"{run.path}: its ranges were not counted; delete the folder, which this study then trains again"
        )
    seen = [of for line in run.ranges for of in line["ranges"]["output_gradients"].values()]
    counts = by_exponent(seen)
    lowest, number = min(counts), sum(counts.values())
    together = {name: sum(of[name] for of in seen) for name in ("size", "zeros")}
    together |= {"lowest_exponent": lowest, "counts": [counts.get(e, 0) for e in range(lowest, max(counts) + 1)]}
    lost, under_8 = (sum(n for e, n in counts.items() if e < LOST - shift) / number for shift in (0, 3))
    line = {"step": run.ranges[0]["step"], "loss_scale": 1.0, "ranges": {"output_gradients": {"all": together}}}
    return {"lost_gradients": lost, "saved_gradients": lost - under_8, "lines": [line]}


def lost_updates(seed: int, *, ratio: float) -> dict[str, float]:
    """Returns the share of float16 weights that an update of -1/ratio of each leaves as it was.

    The weights are normally distributed; the few below float16's smallest normal number, 2^-14, are left out.
    """
    drawn = jax.random.normal(jax.random.key(seed), (100_000,)).astype(jnp.float16)
    weights = drawn[jnp.abs(drawn) >= 2.0**-14]
    updates = -weights.astype(jnp.float32) / ratio
    return {"lost": float(jnp.mean(apply_updates(weights, updates) == weights))}


def accumulated(seed: int, *, dtype: str, length: int) -> dict[str, float]:
    """Returns the error of 256 dot products of float16 vectors summed in `dtype`, by the norm of those in float64.

    Each product is rounded to `dtype`, and the sum after each term. The vectors are positive, uniform in [0, 1).
    """
    rng = np.random.default_rng(seed)
    x, y = (rng.random((256, length)).astype(np.float16) for _ in range(2))
    exact = np.sum(x.astype(np.float64) * y.astype(np.float64), axis=1)
    total = np.zeros(256, dtype)
    for i in range(length):
        total = (total + (x[:, i].astype(np.float32) * y[:, i].astype(np.float32)).astype(dtype)).astype(dtype)
    return {"error": float(np.linalg.norm(total.astype(np.float64) - exact) / np.linalg.norm(exact))}


def small_loss(logits: jax.Array, batch: Any) -> Any:
    """Returns cross-entropy in a unit 2^19 as large, by row, and the accuracy."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
    return UNIT * loss, {"accuracy": Mean.of(right, batch["weight"])}


def get_paper(quick: bool = False) -> Paper:
    """The claims that mixed float16 equals float32, and that each of the three techniques is needed."""
    epochs, length = (4, 1024) if quick else (15, 4096)
    options = ("--loop.epochs", str(epochs), "--loop.eval-every", "1000")
    plain = ConfigFile.find("digits_mlp").experiment(list(options))
    small = dataclasses.replace(
        plain, task=FunctionTask(small_loss, ("image",)), optimizer=SGD(0.02 / UNIT, momentum=0.9)
    )

    def trained(precision: str) -> Train:
        return Train("digits_mlp", ("--precision", precision, *options))

    def scaled(scaler: Any) -> Train:
        return Train(dataclasses.replace(small, precision="mixed_float16", scaler=scaler))

    arms: dict[str, Train | Compute] = {
        "float32": trained("float32"),
        "mixed_float16": trained("mixed_float16"),
        "float16 master weights": trained("float16"),
        "small loss, float32": Train(
            dataclasses.replace(
                small, precision="float32", scaler=NoScaler(), loop=dataclasses.replace(small.loop, ranges_every=60)
            ),
            measure=magnitudes,
        ),
        "small loss, S = 1": scaled(NoScaler()),
        "small loss, S = 8": scaled(StaticScaler(8.0)),
        "small loss, S = 1024": scaled(StaticScaler(1024.0)),
        "summed in float16": Compute(accumulated, {"dtype": "float16", "length": length}),
        "summed in float32": Compute(accumulated, {"dtype": "float32", "length": length}),
    }
    for task, of in TASKS.items():
        for precision in ("float32", "mixed_float16"):
            measure = magnitudes if (task, precision) == ("characters", "float32") else of.measure
            looks = ("--loop.ranges-every", "100") if measure is magnitudes else ()
            given = ("--precision", precision, *of.options, *looks)
            arms[f"{task}, {precision}"] = Train(of.config, given, measure)
    arms |= {f"ratio {ratio}": Compute(lost_updates, {"ratio": ratio}) for ratio in RATIOS}
    if quick:
        of_tasks = tuple(f"{task}, " for task in TASKS)
        arms = {name: arms[name] for name in arms if not name.startswith(of_tasks)}
        arms = {name: arms[name] for name in arms if not name.endswith(("weights", "8", "1024")) or "ratio" in name}
    accuracy = "test accuracy, as a share: "

    def scale_claim(scale: int) -> Claim:
        return Claim(
            id=f"scale-{scale}-passes",
            says=f"With a loss scale of {scale} it reaches float32",
            published="a scale of 8 was enough for the Multibox SSD detector",
            source=f"{SOURCE}, section 3.2",
            checked=False,
            arms=(f"small loss, S = {scale}", "small loss, float32"),
            metric="accuracy",
            measured=f"{accuracy}S = {scale} minus float32; within 0.01",
            judge=within(POINT),
            remark="How large a scale is enough follows from the unit of the loss. 2^-19 is the largest in which S = 1 "
            "loses every gradient of a whole batch of 64; the last batch of an epoch has 42 rows, and keeps those that "
            "are wrong by two thirds or more. Under S = 8 a gradient keeps 2 bits at most. The unit was chosen after "
            "runs in other units, which are not in results.json.",
        )

    def task_claim(name: str, task: Task) -> Claim:
        return Claim(
            id=f"{name.lower().replace(' ', '-')}-equals-float32",
            says=f"Mixed float16 is as good as float32: {name}",
            published=task.published,
            source=f"{SOURCE}, {task.source}",
            checked=False,
            arms=(f"{name}, mixed_float16", f"{name}, float32"),
            metric=task.metric,
            measured=f"{task.unit}: mixed_float16 minus float32; within {POINT}",
            judge=within(POINT),
            remark=task.remark,
        )

    claims = (
        Claim(
            id="mixed-equals-float32",
            says="Mixed float16 is as accurate as float32",
            published="the same accuracy, over all tasks",
            source=f"{SOURCE}, abstract",
            checked=False,
            arms=("mixed_float16", "float32"),
            metric="accuracy",
            measured=f"{accuracy}mixed_float16 minus float32; within 0.01",
            judge=within(POINT),
        ),
        *(task_claim(name, task) for name, task in TASKS.items()),
        Claim(
            id="no-update-lost-below-2048",
            says="An update of more than 1/2048 of its float16 weight is not lost",
            published="lost where the weight is at least 2,048 times as large",
            source=f"{SOURCE}, section 3.1",
            checked=False,
            arms=("ratio 2047",),
            metric="lost",
            measured="share of lost updates, weights 2,047 times as large",
            judge=below(1e-9),
        ),
        Claim(
            id="updates-lost-from-2048",
            says="An update of less than that can be lost",
            published="lost where the weight is at least 2,048 times as large",
            source=f"{SOURCE}, section 3.1",
            checked=False,
            arms=("ratio 2304",),
            metric="lost",
            measured="share of lost updates, weights 2,304 times as large",
            judge=above(0.0),
            remark="Which are lost depends on the significand: a weight just above a power of two loses its update "
            "from 2,048 on, one just below only from 4,096 on, where all are lost.",
        ),
        Claim(
            id="float16-master-weights-lose",
            says="Without float32 master weights, training loses accuracy",
            published="80 % relative loss of accuracy, of a Mandarin speech model",
            source=f"{SOURCE}, section 3.1",
            checked=False,
            arms=("float16 master weights", "mixed_float16"),
            metric="accuracy",
            measured=f"{accuracy}float16 weights minus mixed_float16",
            judge=lower,
            remark="Adam at 1e-3 moves weights of 0.03 by about 1e-3 a step, far above 1/2048 of them. With bfloat16 "
            "and a smaller learning rate the loss is there: see `bfloat16_training`.",
        ),
        Claim(
            id="no-scale-loses",
            says="Without a loss scale, small gradients are lost and accuracy is worse",
            published="Multibox SSD diverges without a scale",
            source=f"{SOURCE}, section 3.2",
            checked=False,
            arms=("small loss, S = 1", "small loss, float32"),
            metric="accuracy",
            measured=f"{accuracy}S = 1 minus float32",
            judge=lower,
            remark="It trains all the same, where the paper's detector diverges: see the table.",
        ),
        scale_claim(8),
        scale_claim(1024),
        Claim(
            id="scale-saves-gradients",
            says="A scale of 8 keeps activation gradients that float16 makes 0 without one",
            published="magnitudes from 2^-27 to 2^-24 had to be kept in the Multibox SSD detector",
            source=f"{SOURCE}, section 3.2",
            checked=False,
            arms=("characters, float32",),
            metric="saved_gradients",
            measured="share of the non-zero activation gradients of the character LM from 2^-28 to 2^-25, every 100th "
            "step in float32; above 0.001",
            judge=above(0.001),
            remark="Whether training needs them is not tested: `characters-equals-float32` has a scale of 2^15.",
        ),
        Claim(
            id="float16-sums-lose",
            says="Dot products of float16 vectors have to be summed in float32",
            published="some networks need it, without a figure",
            source=f"{SOURCE}, section 3.3",
            checked=False,
            arms=("summed in float16", "summed in float32"),
            metric="error",
            measured=f"relative error of dot products of {length}, float16 minus float32 sums",
            judge=higher,
        ),
    )
    return Paper(
        title="Mixed Precision Training",
        authors="Micikevicius et al. 2018",
        url="https://arxiv.org/abs/1710.03740",
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("accuracy", "loss", "told_apart", "lost_gradients", "error", "lost", "skipped_steps"),
        figures=(
            Figure(
                "lost_updates",
                "Updates lost beside float16 weights",
                "Share of updates that leave a float16 weight as it was, by how many times as large as its update the "
                "weight is; mean over the seeds. The paper's threshold is 2,048.",
                _lost,
            ),
            *(
                Figure(
                    f"gradients_{name}",
                    f"Activation gradients, {title}",
                    "Magnitudes in float32, of all modules and seeds, in some steps of the whole training; the bar on "
                    "the left has the zeros. The paper's figure 3 shows those of its detector.",
                    lambda results, arm=arm: gradient_histogram(
                        [line for of in results[arm].values() for line in of["lines"]], arm
                    )[0],
                )
                for name, title, arm in (
                    ("digits", "a loss in a large unit", "small loss, float32"),
                    ("characters", "the character LM", "characters, float32"),
                )
                if arm in arms
            ),
            Figure(
                "scaling",
                "A loss in a large unit, under loss scales",
                "Test accuracy in mixed_float16: each seed, and the mean with its 95 % t interval.",
                lambda results: paper_figures.means(
                    results, [arm for arm in arms if arm.startswith("small")], "accuracy", "test accuracy, share"
                ),
            ),
        ),
    )


def _lost(results: Results) -> str:
    shares = [100 * results.mean(f"ratio {ratio}", "lost").mean for ratio in RATIOS]
    return line_figure(
        Axis("weight by its update", "log2"),
        Axis("lost updates, %"),
        [Series("float16", RATIOS, shares)],
        name="Share of lost updates by the ratio of weight and update",
    )
