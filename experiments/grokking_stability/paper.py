"""Grokking and the softmax's precision: losses become exactly 0 and learning stops, the sooner the fewer bits.

    jaxmp reproduce grokking_stability [--quick]

Prieto, Barsbey, Mediano and Birdal 2025, Grokking at the Edge of Numerical Stability, 2501.04697. Addition of two
one-hot numbers, an MLP of two hidden layers of 200, full batches, AdamW without decay. Only the softmax and the loss
differ between the arms named after a format: the model and AdamW are float32 everywhere. The seed draws weights and
split.

Arms named after a dtype compute the loss in that dtype of JAX. `11 bits` rounds the result of every operation of the
loss and of its gradient to 11 significant bits, with a range that nothing leaves (`jaxmp.studies.paper_losses`).
Float16 has these bits and less range: without a loss scale the gradient of a row, divided by the
number of rows, is subnormal or 0 in it. So `11 bits`, float32 and float64 are the doses, and float16 has a claim
of its own.

Betas and eps of AdamW are those of the published code. So is the rate, 0.01, but for its figure 2, which has 5e-4 and
20,000 epochs: 0.01 makes the logits grow as much in fewer steps. A run ends as soon as what it is there for is decided:
half of its losses are 0, or it generalises. The numbers are added modulo 113, as in the paper, at a training fraction
of 0.4; modulo 59, an eighth of the work, at the fractions 0.6 and 0.7, and for StableMax, which takes the paper 80,000
epochs modulo 113, with softmax beside it. StableMax is computed in float64, and judged beside softmax in float64.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import FunctionTask, NoScaler, TrainState, loss_scaling, make_loss, make_train_step
from jaxmp.html.figure import Axis
from jaxmp.models.mlp import MLP
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, below, higher, increasing, lower, share_above
from jaxmp.studies.paper_losses import RowLosses, losses_in, losses_of
from jaxmp.tasks.loss import init_model
from jaxmp.training.metrics import Mean

RATE = 0.01
STOPPED = 0.5
"""share of losses that are exactly 0 from which on learning counts as stopped"""
GENERALISED, DONE = 0.5, 0.98
"""test accuracy, as a share, from which on a run counts as one that generalises, and that at which it ends"""
FRACTIONS = (0.4, 0.6, 0.7)
LONG = 20_000
"""most steps of the runs modulo 59"""
DOSES: dict[str, str | int] = {"11 bits": 11, "float32": "float32", "float64": "float64"}
"""losses by their bits, 11, 24 and 53, all with a range that no gradient leaves: as `train` takes them"""
SOURCE = "2501.04697"


def stablemax_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of StableMax, in float64.

    In place of exp(x) it has s(x) = x + 1 for x >= 0, else 1 / (1 - x).
    """
    logits = logits.astype(jnp.float64)
    # Each branch is given only what it is for: 1 / (1 - x) would be infinite at 1, and its gradient NaN.
    positive, negative = jnp.maximum(logits, 0), jnp.minimum(logits, 0)
    log_s = jnp.where(logits >= 0, jnp.log1p(positive), -jnp.log1p(-negative))
    of_label = jnp.take_along_axis(log_s, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(log_s, axis=-1) - of_label


def orthogonal() -> optax.GradientTransformation:
    """Returns a transformation that takes from each leaf's gradient its part along the weights (the paper's eq. 9).

    That part only makes all logits larger. As in the published code, the rest is scaled to the norm of the whole.
    """

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra

        def without(g: jax.Array, w: jax.Array) -> jax.Array:
            tiny = jnp.finfo(jnp.float32).tiny
            rest = g - w * (jnp.vdot(w, g) / jnp.maximum(jnp.vdot(w, w), tiny))
            return rest * (jnp.linalg.norm(g) / jnp.maximum(jnp.linalg.norm(rest), tiny))

        return jax.tree.map(without, grads, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def train(
    seed: int,
    *,
    loss: str | int,
    modulus: int,
    fraction: float,
    steps: int,
    every: int,
    until: str,
    beta2: float = 0.99,
    perpendicular: bool = False,
) -> dict[str, Any]:
    """Trains, and returns when half of the losses were exactly 0, the test accuracy, and both along training.

    `generalised` is 1 where the test accuracy reached a half, else 0.

    Args:
      seed: of the weights and the split.
      loss: `stablemax`, in float64, or the dtype of the softmax, or its number of significant bits.
      modulus: number of classes.
      fraction: share of all pairs that is trained on.
      steps: most steps.
      every: steps between two looks.
      until: `zero` or `generalised`: what ends the run.
      beta2: AdamW's.
      perpendicular: whether gradients are made orthogonal to the weights.
    """
    rows_of: RowLosses = stablemax_losses
    if loss != "stablemax":
        rows_of = losses_of(loss) if isinstance(loss, int) else losses_in(jnp.dtype(loss))

    def criterion(logits: jax.Array, batch: Any) -> Any:
        losses = rows_of(logits, batch["y"])
        right = jnp.argmax(logits, axis=-1) == batch["y"]
        weight = batch["weight"]
        return losses.astype(jnp.float32), {"zero": Mean.of(losses == 0, weight), "accuracy": Mean.of(right, weight)}

    with jax.enable_x64(True):
        order = np.random.default_rng(seed).permutation(modulus**2)
        trained = int(fraction * modulus**2)
        one_hot = np.eye(modulus, dtype=np.float32)

        def split(rows: np.ndarray) -> dict[str, jax.Array]:
            a, b = rows // modulus, rows % modulus
            return {
                "x": jnp.asarray(np.concatenate([one_hot[a], one_hot[b]], axis=1)),
                "y": jnp.asarray((a + b) % modulus, jnp.int32),
                "weight": jnp.ones(len(rows), jnp.float32),
            }

        batch, test = split(order[:trained]), split(order[trained:])
        model, task = MLP(features=(200, 200), classes=modulus), FunctionTask(criterion)
        # The loss receives the logits in the dtype that the policy's `o=` names; tasks get halves in float32.
        policy = "p=f32,c=f32,o=f64" if loss in ("stablemax", "float64") else "float32"
        params, model_state = init_model(model, task, batch, jax.random.key(seed))
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        adamw = optax.adamw(RATE, b1=0.9, b2=beta2, eps=1e-25, weight_decay=0.0)
        tx = loss_scaling(optax.chain(orthogonal(), adamw) if perpendicular else adamw, NoScaler())
        state = TrainState.create(params, tx, key=jax.random.key(seed), model_state=model_state)
        loss_fn = make_loss(model, task, policy)
        step = make_train_step(loss_fn, tx)
        evaluate = make_loss(model, task, policy, train=False)

        @jax.jit
        def some(state: TrainState) -> Any:
            state, _ = jax.lax.scan(lambda state, _: (step(state, batch)[0], None), state, None, length=every)
            measured = [evaluate(state.params, model_state, rows, state.key)[1][1] for rows in (batch, test)]
            shares = (measured[0]["zero"], measured[1]["accuracy"])
            return state, [of.total / of.weight for of in shares]

        seen: list[tuple[int, float, float]] = []
        for done in range(every, steps + 1, every):
            state, shares = some(state)
            zero, accuracy = (float(share) for share in shares)
            seen.append((done, zero, accuracy))
            if (zero >= STOPPED) if until == "zero" else (accuracy >= DONE):
                break
    stopped = [done for done, zero, _ in seen if zero >= STOPPED]
    groks = [done for done, _, accuracy in seen if accuracy >= GENERALISED]
    return {
        "stops_at": stopped[0] if stopped else steps,
        "groks_at": groks[0] if groks else steps,
        "stopped": int(bool(stopped)),
        "generalised": int(bool(groks)),
        "zero": max(zero for _, zero, _ in seen),
        "accuracy": max(accuracy for *_, accuracy in seen),
        "steps": [done for done, *_ in seen],
        "zeros": [100 * zero for _, zero, _ in seen],
        "tested": [100 * accuracy for *_, accuracy in seen],
    }


def get_paper(quick: bool = False) -> Paper:
    """The claims about the softmax's bits, StableMax and the orthogonal gradient."""
    modulus, small = (23, 23) if quick else (113, 59)

    def arm(loss: str | int, steps: int, *, until: str = "generalised", **others: Any) -> Compute:
        shortened = min(steps, 200) if quick else steps
        settings = {"modulus": modulus, "fraction": 0.4, "every": 20, **others}
        return Compute(train, {"loss": loss, "steps": shortened, "until": until, **settings})

    fractions = FRACTIONS[:1] if quick else FRACTIONS
    arms = {
        f"{name}, {fraction}": arm(
            loss, 8000, until="zero", fraction=fraction, modulus=modulus if fraction == FRACTIONS[0] else small
        )
        for fraction in fractions
        for name, loss in DOSES.items()
    }
    arms["float16, 0.4"] = arm("float16", 8000, until="zero")
    arms["orthogonal"] = arm("float32", 300, perpendicular=True)
    arms["plain"] = arm("float32", 300)
    arms["StableMax"] = arm("stablemax", LONG, modulus=small, every=200, beta2=0.999)
    arms["softmax, float64"] = arm("float64", LONG, modulus=small, every=200, beta2=0.999)
    arms["softmax"] = arm("float32", LONG, modulus=small, every=200, beta2=0.999)
    if quick:
        some = (*(f"{name}, 0.4" for name in DOSES), "float16, 0.4", "orthogonal", "plain")
        arms = {name: arms[name] for name in some}

    claims = (
        Claim(
            id="losses-become-zero",
            says="Without decay half of the losses in float32 become exactly 0, in more than half of the seeds",
            published="losses of exactly 0, at a training fraction of 0.4 in float32",
            source=f"{SOURCE}, figure 2",
            checked=False,
            arms=("float32, 0.4",),
            metric="stopped",
            measured="share of seeds in which half of the training losses were exactly 0 within the steps of the run; "
            "above 0.5",
            judge=share_above(0.5),
        ),
        *(
            Claim(
                id=f"fewer-bits-sooner-{fraction}",
                says=f"The fewer bits the softmax has, all with enough range, the sooner this comes (training fraction "
                f"{fraction})",
                published="float16 before float32 before float64",
                source=f"{SOURCE}, figure 2",
                checked=False,
                arms=tuple(f"{name}, {fraction}" for name in DOSES),
                metric="stops_at",
                measured="step from which on half of the losses are 0, of 11, 24 and 53 bits; the least certain "
                "step of the order",
                judge=increasing,
                remark="A run whose losses never become 0 counts with its last step. Float16 has 11 bits and less "
                "range: 11 bits with the exponent of float64 stand for it here, and `float16-sooner` judges it."
                if fraction == fractions[0]
                else "",
            )
            for fraction in fractions
        ),
        Claim(
            id="float16-sooner",
            says="In float16 this comes sooner than in float32",
            published="float16 before float32",
            source=f"{SOURCE}, figure 2",
            checked=False,
            arms=("float16, 0.4", "float32, 0.4"),
            metric="stops_at",
            measured="step from which on half of the losses are 0, float16 minus float32, without a loss scale",
            judge=lower,
            remark="Of bits and range together: gradients can underflow in float16.",
        ),
        Claim(
            id="does-not-generalise",
            says="Without decay it does not generalise with softmax in float32",
            published="no generalisation at a training fraction of 0.4, modulo 113",
            source=f"{SOURCE}, figure 2",
            checked=False,
            arms=("softmax",),
            metric="accuracy",
            measured=f"largest test accuracy, as a share, modulo {small}; below {GENERALISED:g}",
            judge=below(GENERALISED),
        ),
        Claim(
            id="stablemax-groks",
            says="With StableMax it generalises without regularisation",
            published="mitigating Softmax Collapse leads to grokking without regularization, by StableMax",
            source=f"{SOURCE}, abstract",
            checked=True,
            arms=("StableMax",),
            metric="generalised",
            measured=f"share of seeds whose test accuracy reached {GENERALISED:g}, modulo {small}; above 0.5",
            judge=share_above(0.5),
        ),
        Claim(
            id="stablemax-gains",
            says="And it generalises better than with softmax in the same dtype",
            published="mitigating Softmax Collapse leads to grokking without regularization, by StableMax",
            source=f"{SOURCE}, abstract",
            checked=True,
            arms=("StableMax", "softmax, float64"),
            metric="accuracy",
            measured=f"largest test accuracy, as a share, modulo {small}: StableMax minus softmax, both in float64",
            judge=higher,
        ),
        Claim(
            id="orthogonal-gradient-groks",
            says="Without the part of the gradient along the weights it generalises at once",
            published="leads to quick generalization in grokking tasks",
            source=f"{SOURCE}, abstract",
            checked=True,
            arms=("orthogonal",),
            metric="generalised",
            measured=f"share of seeds whose test accuracy reached {GENERALISED:g} in 300 steps; above 0.5",
            judge=share_above(0.5),
        ),
        Claim(
            id="orthogonal-gradient-gains",
            says="And it generalises better than with the whole gradient",
            published="leads to quick generalization in grokking tasks",
            source=f"{SOURCE}, abstract",
            checked=True,
            arms=("orthogonal", "plain"),
            metric="accuracy",
            measured="largest test accuracy in 300 steps, as a share: orthogonal gradient minus plain, in float32",
            judge=higher,
        ),
    )
    return Paper(
        title="Grokking at the Edge of Numerical Stability",
        authors="Prieto, Barsbey, Mediano and Birdal 2025",
        url="https://arxiv.org/abs/2501.04697",
        seeds=(0,) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("stops_at", "stopped", "zero", "accuracy", "generalised", "groks_at"),
        figures=(
            Figure(
                "zeros",
                "Losses that are exactly 0",
                "Share of training losses that are exactly 0 along training, all seeds; a run ends at half.",
                lambda results: paper_figures.curves(
                    results,
                    [*(f"{name}, {fraction}" for fraction in fractions[:2] for name in DOSES), "float16, 0.4"],
                    "steps",
                    "zeros",
                    Axis("step"),
                    Axis("losses that are 0, %"),
                ),
            ),
            Figure(
                "tested",
                "Accuracy on the pairs that were held out",
                "Accuracy on all pairs outside the training split along training, all seeds; modulo 113 for the "
                "orthogonal and the plain gradient, 59 for StableMax and softmax.",
                lambda results: paper_figures.curves(
                    results,
                    ["orthogonal", "plain", "StableMax", "softmax, float64", "softmax"],
                    "steps",
                    "tested",
                    Axis("step"),
                    Axis("accuracy, %"),
                ),
            ),
        ),
    )
