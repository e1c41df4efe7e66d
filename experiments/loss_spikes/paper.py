"""Loss spikes in full-batch training are a rounding event: the gradient of the label is rounded to exactly 0.

    jaxmp reproduce loss_spikes [--quick]

Liu, Cao, Li and Zhou 2026, Grokking or Glitching? How Low-Precision Drives Slingshot Loss Spikes, 2605.06152.

Addition modulo 23 of two one-hot numbers, half of the pairs, an MLP of two hidden layers of 128, full batches, Adam
with a learning rate of 1e-3 and betas of 0.9 and 0.95, no decay. The model and Adam are float32 in every arm; only the
softmax and the loss differ. Arms named after a dtype compute them in that dtype of JAX. Arms named `p bits` round the
result of every operation of the loss and of its gradient to p significant bits, in float64 with 11 bits of exponent, so
that no range is ever exceeded; sums are rounded once, but at 53 bits. Their Adam has an eps of 1e-16 in place of 1e-8:
the larger one stops the growth of the logits before 53 bits are used up (plot `margins`).

Arms named `softmax of p bits` and `softmax in DTYPE` measure the threshold: they take the logits of one training for
each seed, along which margins pass 36.7, and compute the gradient under each format. The others train.

Claims that were declared before the runs and then changed, or added after them, say so; README.md lists them.

The margin of a row is the log-odds of its label, z_label - log(sum of exp(z) over the other classes). In exact
arithmetic the gradient of its logit is -1 / (1 + exp(margin)).
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import FunctionTask, NoScaler, TrainState, loss_scaling, make_loss, make_train_step
from jaxmp.html.figure import Axis
from jaxmp.models.mlp import MLP
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import (
    Claim,
    Compute,
    Figure,
    Judge,
    Paper,
    Values,
    above,
    higher,
    increasing,
    lower,
    near,
    prevents,
    slope_near,
    within,
)
from jaxmp.studies.paper_losses import losses_in, losses_of
from jaxmp.tasks.loss import init_model
from jaxmp.training.metrics import Mean

MODULUS, WIDTH, RATE = 23, 128, 1e-3
SPIKE, CALM = 0.1, 1e-3
"""training loss in nats: a spike begins above the first, and ends below the second"""
LOOK_EVERY = 10
"""steps between two looks at margins and gradients of all rows"""
BITS = (5, 8, 11, 16, 24, 32, 40, 53)
DTYPES = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
"""dtypes of JAX, and the bits of their significands"""
SAME = 0.1
"""difference of norms of the classifier's mean, of about 0.4 at the start, that counts as none"""
TOLERANCE = 0.01
"""relative tolerance of a threshold and of its slope; (p - 1) ln 2 and p ln 2 differ by 4 % at 24 bits"""
MOST, LEAST = 0.5, 0.05
"""share of seeds with a spike that a cure must stay below, and that its absence must be above"""
SOURCE = "2605.06152"
DECLARED = "As declared before the runs: on the logits of the training run itself."
AFTER = "Added after the results."


@jax.custom_vjp
def zero_sum(logits: jax.Array) -> jax.Array:
    """Returns logits as they are; subtracts from their gradient its mean over the classes, which is 0 if exact."""
    return logits


zero_sum.defvjp(lambda logits: (logits, None), lambda _, g: (g - jnp.mean(g, axis=-1, keepdims=True),))


def margins(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the log-odds of each row's label, float64 (rows,)."""
    z = logits.astype(jnp.float64)
    of_label = jax.nn.one_hot(labels, z.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(of_label, -jnp.inf, z), axis=-1)
    return jnp.sum(jnp.where(of_label, z, 0), axis=-1) - others


def separating(values: np.ndarray, zero: np.ndarray) -> float:
    """Returns the value that best separates values whose gradient is 0 from those below, whose gradient is not.

    It makes the share of zeros above it minus the share of others above it the largest (Youden's J); where an interval
    does so, it is its middle. NaN unless there are both.
    """
    if zero.all() or not zero.any():
        return math.nan
    order = np.argsort(values, kind="stable")
    ordered, flags = values[order], zero[order]
    # After the first i + 1 values, in order, are below.
    above_zero = 1 - np.cumsum(flags) / flags.sum()
    above_other = 1 - np.cumsum(~flags) / (~flags).sum()
    best = int(np.argmax(above_zero - above_other))
    return float((ordered[best] + ordered[min(best + 1, len(ordered) - 1)]) / 2)


def spikes(losses: np.ndarray) -> list[int]:
    """Returns the steps, from 0 on, at which the loss rises above SPIKE after it has been below CALM."""
    found, calm = [], False
    for step in np.flatnonzero((losses < CALM) | (losses > SPIKE)):
        if losses[step] < CALM:
            calm = True
        elif calm:
            found.append(int(step))
            calm = False
    return found


def train(
    seed: int, *, loss: str | int, eps: float, steps: int, centred: bool = False, modulus: int = MODULUS
) -> dict[str, Any]:
    """Trains, and returns where the label's gradient became 0, the spikes, and how far the classifier's mean drifted.

    Args:
      seed: of the weights, and of the half of the pairs that is trained on.
      loss: name of a dtype, or a number of significant bits.
      eps: Adam's.
      steps: multiple of 10.
      centred: whether each row's gradient of the logits is made to sum to 0.
      modulus: number of classes.
    """
    rows_of = losses_of(loss) if isinstance(loss, int) else losses_in(jnp.dtype(loss))

    def criterion(logits: jax.Array, batch: Any) -> Any:
        seen = zero_sum(logits) if centred else logits
        # That of the exact loss: the rounded one is 0 where it is small.
        exact = jnp.log1p(jnp.exp(-margins(jax.lax.stop_gradient(logits), batch["y"])))
        return rows_of(seen, batch["y"]).astype(jnp.float32), {"exact": Mean.of(exact, batch["weight"])}

    with jax.enable_x64(True):
        order = np.random.default_rng(seed).permutation(modulus**2)[: modulus**2 // 2]
        one_hot = np.eye(modulus, dtype=np.float32)
        a, b = order // modulus, order % modulus
        batch = {
            "x": jnp.asarray(np.concatenate([one_hot[a], one_hot[b]], axis=1)),
            "y": jnp.asarray((a + b) % modulus, jnp.int32),
            "weight": jnp.ones(len(order), jnp.float32),
        }
        model, task = MLP(features=(WIDTH, WIDTH), classes=modulus), FunctionTask(criterion)
        # The loss receives the logits in the dtype that the policy's `o=` names.
        policy = "p=f32,c=f32,o=f64" if loss == "float64" else "float32"
        params, model_state = init_model(model, task, batch, jax.random.key(seed))
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        tx = loss_scaling(optax.adam(RATE, b1=0.9, b2=0.95, eps=eps), NoScaler())
        state = TrainState.create(params, tx, key=jax.random.key(seed), model_state=model_state)
        step = make_train_step(make_loss(model, task, policy), tx)

        def look(params: Any) -> dict[str, jax.Array]:
            hidden = batch["x"]
            for layer in ("Dense_0", "Dense_1"):
                hidden = jax.nn.relu(hidden @ params[layer]["kernel"] + params[layer]["bias"])
            last = params["Dense_2"]
            logits = hidden @ last["kernel"] + last["bias"]
            gradient = jax.grad(lambda z: jnp.sum(rows_of(z, batch["y"])))(logits)
            weight, feature = jnp.mean(last["kernel"], axis=1), jnp.mean(hidden, axis=0)
            norms = jnp.linalg.norm(weight), jnp.linalg.norm(feature)
            return {
                "margins": margins(logits, batch["y"]),
                "zero": jnp.take_along_axis(gradient, batch["y"][:, None], axis=-1)[:, 0] == 0,
                "weight": norms[0],
                "cosine": jnp.vdot(weight, feature) / (norms[0] * norms[1]),
            }

        def some(state: TrainState, _: None) -> Any:
            def one(state: TrainState, _: None) -> Any:
                state, metrics = step(state, batch)
                return state, metrics["exact"].total / metrics["exact"].weight

            state, exact = jax.lax.scan(one, state, None, length=LOOK_EVERY)
            return state, (exact, look(state.params))

        scanned = jax.jit(lambda state: jax.lax.scan(some, state, None, length=steps // LOOK_EVERY))(state)[1]
        exact, seen = jax.tree.map(np.asarray, scanned)
    exact = np.asarray(exact, np.float64).ravel()
    share = seen["zero"].mean(axis=1)
    half = np.flatnonzero(share >= 0.5)
    found, shown = spikes(exact), slice(None, None, max(1, steps // LOOK_EVERY // 100))
    threshold = separating(seen["margins"].ravel(), seen["zero"].ravel())
    return {
        "threshold": threshold,  # NaN where no gradient, or each, was 0: that counts as failed
        "half_zero_at": int(half[0] + 1) * LOOK_EVERY if len(half) else steps,
        "spikes": len(found),
        "first_spike": found[0] + 1 if found else steps,
        "worst": float(exact[np.argmax(exact < CALM) :].max()),
        "mean_weight": float(seen["weight"][-1]),
        "cosine": float(seen["cosine"][-1]),
        "zero": float(share[-1]),
        "steps": ((np.arange(steps // LOOK_EVERY) + 1) * LOOK_EVERY)[shown].tolist(),
        # Between two shown looks a spike would be missed: the largest loss since the last one.
        "log_loss": [
            float(np.log10(part.max())) for part in np.array_split(exact, len(range(steps // LOOK_EVERY)[shown]))
        ],
        "margin": np.median(seen["margins"], axis=1)[shown].tolist(),
    }


@functools.cache
def logits_of(seed: int, steps: int, modulus: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits of all rows along a training with the loss in 53 bits, (looks, rows, classes), and the labels.

    Adam's eps is 1e-16: the margins come to pass 36.7 within about 1,500 steps.
    """
    losses = losses_of(53)

    def criterion(logits: jax.Array, batch: Any) -> Any:
        return losses(logits, batch["y"]).astype(jnp.float32)

    with jax.enable_x64(True):
        order = np.random.default_rng(seed).permutation(modulus**2)[: modulus**2 // 2]
        one_hot = np.eye(modulus, dtype=np.float32)
        a, b = order // modulus, order % modulus
        batch = {
            "x": jnp.asarray(np.concatenate([one_hot[a], one_hot[b]], axis=1)),
            "y": jnp.asarray((a + b) % modulus, jnp.int32),
            "weight": jnp.ones(len(order), jnp.float32),
        }
        model, task = MLP(features=(WIDTH, WIDTH), classes=modulus), FunctionTask(criterion)
        params, model_state = init_model(model, task, batch, jax.random.key(seed))
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        tx = loss_scaling(optax.adam(RATE, b1=0.9, b2=0.95, eps=1e-16), NoScaler())
        state = TrainState.create(params, tx, key=jax.random.key(seed), model_state=model_state)
        step = make_train_step(make_loss(model, task, "float32"), tx)

        def some(state: TrainState, _: None) -> Any:
            state, _ = jax.lax.scan(lambda state, _: (step(state, batch)[0], None), state, None, length=LOOK_EVERY)
            return state, model.apply({"params": state.params}, batch["x"])

        logits = jax.jit(lambda state: jax.lax.scan(some, state, None, length=steps // LOOK_EVERY)[1])(state)
        return np.asarray(logits), np.asarray(batch["y"])


def threshold(seed: int, *, loss: str | int, steps: int, modulus: int, jit: bool = True) -> dict[str, float]:
    """Returns the margin from which on the label's gradient is 0, on the logits of one training: see `logits_of`.

    Args:
      seed: of the training.
      loss: name of a dtype, or a number of significant bits.
      steps: of the training.
      modulus: number of classes.
      jit: whether functions of JAX that are jitted themselves, as `log_softmax` is, stay so. Between two operations in
        half precision XLA may then keep all bits of float32 (trap T6).

    Margins are those of the logits that the softmax sees, rounded as it rounds them. `gap` is the same of the paper's
    margin, the distance to the largest other logit.
    """
    logits, labels = logits_of(seed, steps, modulus)
    rows_of = losses_of(loss) if isinstance(loss, int) else losses_in(jnp.dtype(loss))
    with jax.enable_x64(True):
        every, of_label = jnp.asarray(logits.reshape(-1, modulus)), jnp.tile(jnp.asarray(labels), len(logits))
        with contextlib.nullcontext() if jit else jax.disable_jit():
            gradient = jax.grad(lambda z: jnp.sum(rows_of(z, of_label)))(every)
        zero = np.asarray(jnp.take_along_axis(gradient, of_label[:, None], axis=-1)[:, 0] == 0)
        seen = every.astype(jnp.float64)
        if isinstance(loss, int):
            seen = jax.lax.reduce_precision(seen, 11, loss - 1)
        else:
            seen = every.astype(loss).astype(jnp.float64)
        others = jnp.where(jax.nn.one_hot(of_label, modulus, dtype=bool), -jnp.inf, seen)
        gaps = jnp.take_along_axis(seen, of_label[:, None], axis=-1)[:, 0] - jnp.max(others, axis=-1)
        odds = margins(seen, of_label)
    return {"threshold": separating(np.asarray(odds), zero), "gap": separating(np.asarray(gaps), zero)}


def get_paper(quick: bool = False) -> Paper:
    """The claims about the threshold and its slope, the drift, the spikes, and the cures."""
    steps = 1000 if quick else 15000
    modulus = 11 if quick else MODULUS

    def arm(loss: str | int, eps: float, *, centred: bool = False) -> Compute:
        return Compute(train, {"loss": loss, "eps": eps, "steps": steps, "centred": centred, "modulus": modulus})

    short = 1000 if quick else 2000

    def softmax(loss: str | int, **others: bool) -> Compute:
        return Compute(threshold, {"loss": loss, "steps": short, "modulus": modulus, **others})

    bits_of = {f"{bits} bits": bits for bits in ((5, 11) if quick else BITS)}
    measured = {f"softmax of {name}": bits for name, bits in bits_of.items()}
    # Dropped after the results: the sum of 53 bits, in float64, is not rounded just once.
    doses = {name: bits for name, bits in measured.items() if bits <= 40}
    dtypes = ("bfloat16",) if quick else tuple(DTYPES)
    by_dtype = {f"softmax in {dtype}": DTYPES[dtype] for dtype in dtypes}
    arms = {name: softmax(bits) for name, bits in measured.items()}
    arms |= {f"softmax in {dtype}": softmax(dtype) for dtype in dtypes}
    arms |= {} if quick else {f"softmax in {dtype}, no jit": softmax(dtype, jit=False) for dtype in dtypes}
    arms |= {name: arm(bits, 1e-16) for name, bits in bits_of.items()}
    arms |= {dtype: arm(dtype, 1e-8) for dtype in (("bfloat16", "float64") if quick else DTYPES)}
    cures = {
        "float32, eps 1e-5": arm("float32", 1e-5),
        "float32, zero sum": arm("float32", 1e-8, centred=True),
        "24 bits, zero sum": arm(24, 1e-16, centred=True),
    }
    arms |= {} if quick else cures

    def reaches(of: str, arm: str, p: int, suffix: str = "", remark: str = "") -> Claim:
        return Claim(
            id=f"threshold-{of.replace(' ', '-')}{suffix}",
            says=f"In {of} the label's gradient becomes 0 at a margin of p ln 2, p = {p}",
            published=f"own prediction, p ln 2 = {p * math.log(2):.2f}; the paper, as quoted, has "
            f"(p - 1) ln 2 = {(p - 1) * math.log(2):.2f}",
            source=f"own prediction; {SOURCE}, on Softmax Collapse",
            checked=False,
            arms=(arm,),
            metric="threshold",
            measured="log-odds that separate labels with a gradient of 0",
            judge=near(p * math.log(2), TOLERANCE),
            remark=remark,
        )

    def exceeds(dtype: str) -> Claim:
        p = DTYPES[dtype]
        return Claim(
            id=f"above-published-{dtype}",
            says=f"In {dtype} this threshold is above (p - 1) ln 2, p = {p}",
            published=f"own prediction, {p} bits; the paper, as quoted, has {p - 1} of the gap",
            source=f"own prediction; {SOURCE}, on Softmax Collapse",
            checked=False,
            arms=(f"softmax in {dtype}",),
            metric="threshold",
            measured=f"log-odds that separate labels with a gradient of 0, by ln 2: in bits; above {p - 1}",
            judge=_in_bits(above(p - 1)),
            remark=AFTER,
        )

    def cured(id: str, says: str, published: str, arm: str, baseline: str = "float32", **others: str) -> Claim:
        return Claim(
            id=id,
            says=says,
            published=published,
            source=others.get("source", f"{SOURCE}, the section on mitigation"),
            checked=False,
            arms=(arm, baseline),
            metric="spikes",
            measured=f"share of seeds with a loss spike in {steps:,} steps, {arm}, beside {baseline}; none, the "
            f"interval below {MOST:g}, and McNemar p below 0.05",
            judge=prevents(MOST, LEAST),
            remark=others.get("remark", ""),
        )

    def slope(id: str, of: dict[str, int], how: str, remark: str) -> Claim:
        return Claim(
            id=id,
            says=f"The threshold rises by ln 2 for each bit of the significand{how}",
            published=f"ln 2 = {math.log(2):.4f} a bit",
            source=f"{SOURCE}, on Softmax Collapse",
            checked=False,
            arms=tuple(of),
            metric="threshold",
            measured=f"slope of the threshold over {', '.join(map(str, of.values()))} bits, in nats a bit",
            judge=slope_near(tuple(of.values()), math.log(2), TOLERANCE),
            remark=remark,
        )

    def published(id: str, arm: str, metric: str, says: str, remark: str) -> Claim:
        return Claim(
            id=id,
            says=says,
            published=f"(p - 1) ln 2 = {23 * math.log(2):.2f}, of the gap to the largest other logit: an unchecked "
            "reading, from quotations",
            source=f"{SOURCE}, on Softmax Collapse",
            checked=False,
            arms=(arm,),
            metric=metric,
            measured=f"{'gap' if metric == 'gap' else 'log-odds'} that best separates labels with a gradient of 0",
            judge=near(23 * math.log(2), TOLERANCE),
            remark=remark,
        )

    claims = (
        slope("slope-as-declared", bits_of, ", on the logits of each training run", DECLARED),
        slope(
            "slope-8-doses",
            measured,
            ", on the logits of one training",
            f"{AFTER} All declared doses, by the measure that was taken up after the results.",
        ),
        slope(
            "slope-8-doses-float64",
            {**doses, "softmax in float64": 53},
            ", with float64 itself at 53 bits",
            AFTER,
        ),
        slope(
            "slope-up-to-40-bits",
            doses,
            ", up to 40 bits",
            "Not as declared: measure and doses were changed after the results.",
        ),
        published(
            "published-threshold",
            "softmax of 24 bits",
            "gap",
            "At 24 bits the label's gradient becomes 0 at a gap of (p - 1) ln 2",
            "Changed after the results: declared was the claim below. The verdict is of a reading of quotations, not "
            "of the paper's text. A gap does not decide alone whether 1 + x is rounded to 1: x is the sum over all "
            "other classes.",
        ),
        published(
            "published-threshold-as-declared",
            "24 bits",
            "threshold",
            "At 24 bits the label's gradient becomes 0 at log-odds of (p - 1) ln 2",
            f"{DECLARED} It compares log-odds with a figure that is said of the gap.",
        ),
        *(reaches(dtype, f"softmax in {dtype}", DTYPES[dtype]) for dtype in dtypes),
        *(exceeds(dtype) for dtype in dtypes),
        *(reaches(dtype, dtype, DTYPES[dtype], "-as-declared", DECLARED) for dtype in dtypes if dtype != "float64"),
        reaches(
            "53 bits",
            "53 bits",
            53,
            remark=f"{DECLARED} The significand of float64. In the arm `float64`, with Adam's usual eps, no margin "
            "comes that far.",
        ),
        Claim(
            id="fewer-bits-sooner",
            says="The fewer bits, the sooner half of the labels have a gradient of 0",
            published="the threshold is lower the fewer bits there are",
            source=f"{SOURCE}, on low-precision training",
            checked=False,
            arms=tuple(bits_of),
            metric="half_zero_at",
            measured="step from which on half are 0; the least certain step of the order",
            judge=increasing,
            remark="A run that never comes there counts with its last step.",
        ),
        Claim(
            id="float32-spikes",
            says="Training in float32 has loss spikes",
            published="periodic loss spikes in unregularized long-term training",
            source=f"{SOURCE}, abstract",
            checked=True,
            arms=("float32",),
            metric="spikes",
            measured=f"number of loss spikes in {steps:,} steps; above 1",
            judge=above(1),
            remark=f"A spike is a training loss above {SPIKE:g} nats after one below {CALM:g}.",
        ),
        Claim(
            id="mean-drifts",
            says="The mean of the classifier's weights drifts where the label's gradient is 0",
            published="the gradient of the correct class is rounded exactly to zero, and the classifier mean grows "
            "exponentially",
            source=f"{SOURCE}, abstract",
            checked=True,
            arms=("float32", "float64"),
            metric="mean_weight",
            measured="norm of the mean over the classes of the last layer's weights at the end, float32 minus float64 "
            "loss",
            judge=higher,
        ),
        Claim(
            id="anti-parallel",
            says="It comes to point against the mean of the features",
            published="a cosine of -1 in the limit",
            source=f"{SOURCE}, theorem on the feedback",
            checked=False,
            arms=("float32", "float64"),
            metric="cosine",
            measured="cosine of the two means at the end, float32 minus float64 loss",
            judge=lower,
        ),
        cured(
            "float64-loss-cures",
            "With float64 in logits and loss alone there are no spikes",
            "casting the output logits to float64 solely during the loss computation is sufficient to eliminate the "
            "Slingshot effect",
            "float64",
        ),
        cured(
            "float64-cures-for-good",
            "And there are none whatever Adam's eps",
            "own reading, not claimed by the paper: eliminated, at Adam's usual eps",
            "53 bits",
            "24 bits",
            source=f"own reading; {SOURCE}, the section on mitigation",
            remark="Declared was the next claim's judge under this text. Both arms have an eps of 1e-16.",
        ),
        Claim(
            id="float64-no-drift-any-eps",
            says="Nor does the mean of the classifier's weights drift, whatever Adam's eps",
            published="own reading, not claimed by the paper: eliminated, at Adam's usual eps",
            source=f"own reading; {SOURCE}, the section on mitigation",
            checked=False,
            arms=("53 bits", "float64"),
            metric="mean_weight",
            measured="norm of the mean of the last layer's weights at the end, eps 1e-16 minus 1e-8, both 53 bits; "
            f"within {SAME:g}",
            judge=within(SAME),
            remark="Declared as `float64-cures-for-good`, whose text spoke of spikes.",
        ),
        cured("eps-cures", "A larger eps of Adam cures", "eps of 1e-5 removes the spikes", "float32, eps 1e-5"),
        cured(
            "zero-sum-cures",
            "Subtracting the mean component of the gradient cures",
            "projecting the gradient of the logits on sums of 0 removes the spikes",
            "float32, zero sum",
        ),
        cured(
            "zero-sum-cures-any-eps",
            "It cures with an eps of 1e-16, too",
            "projecting the gradient of the logits on sums of 0 removes the spikes",
            "24 bits, zero sum",
            "24 bits",
        ),
    )
    return Paper(
        title="Grokking or Glitching? How Low-Precision Drives Slingshot Loss Spikes",
        authors="Liu, Cao, Li and Zhou 2026",
        url="https://arxiv.org/abs/2605.06152",
        seeds=(0,) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("threshold", "gap", "half_zero_at", "spikes", "first_spike", "worst", "mean_weight", "cosine", "zero"),
        figures=(
            Figure(
                "thresholds",
                "Margin at which the label's gradient becomes exactly 0, by bits of the softmax",
                "Log-odds of the label that separate rows whose gradient is 0 from the others, on the logits of one "
                "training: each seed, in emulated formats and in bfloat16, float16, float32 and float64 (8, 11, 24 and "
                "53 bits). The lines are p ln 2, of rounding to nearest, and the published (p - 1) ln 2.",
                lambda results: paper_figures.doses(
                    results,
                    dict(sorted((measured | by_dtype).items(), key=lambda dose: dose[1])),
                    "threshold",
                    Axis("significand, bits"),
                    Axis("margin, nats"),
                    {"p ln 2": lambda p: p * math.log(2), "(p - 1) ln 2": lambda p: (p - 1) * math.log(2)},
                ),
            ),
            Figure(
                "margins",
                "Margins along training, by the precision of the loss and Adam's eps",
                "Median margin of the training rows in nats, log-odds, all seeds: eps is 1e-16 in `53 bits`, 1e-8 in "
                "the others.",
                lambda results: paper_figures.curves(
                    results,
                    [name for name in ("float32", "float64", "53 bits") if name in arms],
                    "steps",
                    "margin",
                    Axis("step"),
                    Axis("margin, nats"),
                ),
            ),
            Figure(
                "losses",
                "Training loss by precision of the loss, and its cures",
                "Decadic logarithm of the exact training loss in nats, the largest of each 150 steps: all seeds.",
                lambda results: paper_figures.curves(
                    results,
                    [name for name in ("float32", "float64", *cures) if name in arms],
                    "steps",
                    "log_loss",
                    Axis("step"),
                    Axis("log10 of the loss"),
                ),
            ),
        ),
    )


def _in_bits(judge: Judge) -> Judge:
    """Returns a judge of nats that are divided by ln 2."""

    def scaled(values: Values) -> Any:
        return judge([{seed: None if of is None else of / math.log(2) for seed, of in arm.items()} for arm in values])

    return scaled
