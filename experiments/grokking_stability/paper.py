"""Grokking and the softmax's precision: losses become exactly 0 and learning stops, the sooner the fewer bits.

    jaxmp reproduce grokking_stability [--quick]

Prieto et al. 2025, Grokking at the Edge of Numerical Stability, 2501.04697. Addition modulo 113 of two one-hot numbers,
an MLP of two hidden layers of 200, full batches, AdamW without decay. Only the dtype of the loss differs: the model is
float32 everywhere. The paper's arm in float64 is left out: JAX computes in float64 only if it is on for the whole
process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import AdamW, Arrays, Experiment, FunctionTask, Loop, Mean, Run
from jaxmp.html.figure import Axis
from jaxmp.models.mlp import MLP
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Figure, Paper, Train, above, below, higher, lower

RATE = 0.01
STOPPED = 0.5
"""share of losses that are exactly 0 from which on learning counts as stopped"""
GENERALISED = 0.5
"""test accuracy, as a share, from which on a run counts as one that generalises"""
SOURCE = "2501.04697"


@dataclasses.dataclass(frozen=True)
class Addition:
    """All sums of two numbers modulo `modulus`; a random `fraction` of them is the training split."""

    modulus: int = 113
    fraction: float = 0.4

    def __call__(self, split: str) -> dict[str, np.ndarray]:
        """Returns `x`, two one-hot numbers side by side, (rows, 2 modulus), and `y`, their sum."""
        p = self.modulus
        order = np.random.default_rng(0).permutation(p * p)
        trained = round(self.fraction * p * p)
        rows = order[:trained] if split == "train" else order[trained:]
        a, b = rows // p, rows % p
        one_hot = np.eye(p, dtype=np.float32)
        return {"x": np.concatenate([one_hot[a], one_hot[b]], axis=1), "y": (a + b) % p}


def softmax_float16(logits: jax.Array, batch: Any) -> Any:
    """Returns cross-entropy by row, with the softmax in float16, and its metrics."""
    return _of_rows(jax.nn.log_softmax(logits.astype(jnp.float16)), logits, batch)


def softmax_float32(logits: jax.Array, batch: Any) -> Any:
    """Returns cross-entropy by row, with the softmax in float32, and its metrics."""
    return _of_rows(jax.nn.log_softmax(logits), logits, batch)


def stablemax(logits: jax.Array, batch: Any) -> Any:
    """Returns the cross-entropy of StableMax by row: s(x) = x + 1 for x >= 0, else 1 / (1 - x), in place of exp(x)."""
    # Each branch is given only what it is for: 1 / (1 - x) would be infinite at 1, and its gradient NaN.
    positive, negative = jnp.maximum(logits, 0), jnp.minimum(logits, 0)
    log_s = jnp.where(logits >= 0, jnp.log1p(positive), -jnp.log1p(-negative))
    return _of_rows(log_s - jax.nn.logsumexp(log_s, axis=-1, keepdims=True), logits, batch)


def _of_rows(log_probabilities: jax.Array, logits: jax.Array, batch: Any) -> Any:
    losses = -jnp.take_along_axis(log_probabilities, batch["y"][:, None], axis=-1)[:, 0].astype(jnp.float32)
    right = (jnp.argmax(logits, -1) == batch["y"]).astype(jnp.float32)
    zero = (losses == 0).astype(jnp.float32)
    weight = batch["weight"]
    return losses, {"accuracy": Mean.of(right, weight), "zero": Mean.of(zero, weight)}


def orthogonal(steps: int) -> optax.GradientTransformation:
    """Returns AdamW without decay of gradients without their part along the weights, leaf by leaf (the paper's eq. 9).

    That part only makes all logits larger.
    """
    del steps

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra

        def without(g: jax.Array, w: jax.Array) -> jax.Array:
            return g - w * (jnp.vdot(w, g) / jnp.maximum(jnp.vdot(w, w), jnp.finfo(jnp.float32).tiny))

        return jax.tree.map(without, grads, params), state

    project = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    return optax.chain(project, optax.adamw(RATE, weight_decay=0.0))


def stopping(run: Run) -> Mapping[str, Any]:
    """Returns the share of exactly-zero losses along a run, and the step from which on half of them are.

    A run that never comes there counts with its last step.
    """
    steps, zero = run.curve("zero")
    stopped = steps[zero >= STOPPED]
    tested, accuracy = run.curve("accuracy", "validation")
    return {
        "steps": steps.tolist(),
        "zeros": (100 * zero).tolist(),
        "stops_at": int(stopped[0] if len(stopped) else steps[-1]),
        "last_zero": float(zero[-1]),
        "tested_steps": tested.tolist(),
        "tested": (100 * accuracy).tolist(),
    }


def get_paper(quick: bool = False) -> Paper:
    """The claims about the softmax's bits, StableMax and the orthogonal gradient."""
    modulus, steps, every = (23, 200, 20) if quick else (113, 8000, 100)

    def arm(loss: Any, fraction: float, optimizer: Any = AdamW(RATE, weight_decay=0.0)) -> Train:  # noqa: B008
        load = Addition(modulus, fraction)
        return Train(
            Experiment(
                model=MLP(features=(200, 200), classes=modulus),
                data=Arrays(load, batch_size=len(load("train")["y"])),
                task=FunctionTask(loss),
                optimizer=optimizer,
                precision="float32",
                loop=Loop(steps=steps, log_every=every, eval_every=5 * every),
            ),
            measure=stopping,
        )

    fractions = (0.4,) if quick else (0.4, 0.6, 0.7)
    arms = {
        f"{name}, {fraction}": arm(loss, fraction)
        for fraction in fractions
        for name, loss in (("float16", softmax_float16), ("float32", softmax_float32))
    }
    arms["StableMax, 0.4"] = arm(stablemax, 0.4)
    arms["orthogonal, 0.4"] = arm(softmax_float32, 0.4, orthogonal)

    claims = (
        Claim(
            id="losses-become-zero",
            says="Without decay more than half of the losses in float32 become exactly 0",
            published="losses of exactly 0, at a training fraction of 0.4 in float32",
            source=f"{SOURCE}, figure 2",
            checked=False,
            arms=("float32, 0.4",),
            metric="last_zero",
            measured="share of training losses that are exactly 0 at the end",
            judge=above(STOPPED),
        ),
        Claim(
            id="does-not-generalise",
            says="Without decay it does not generalise in float32",
            published="no generalisation at a training fraction of 0.4 in float32",
            source=f"{SOURCE}, figure 2",
            checked=False,
            arms=("float32, 0.4",),
            metric="accuracy",
            measured=f"test accuracy, as a share; below {GENERALISED:g}",
            judge=below(GENERALISED),
        ),
        *(
            Claim(
                id=f"fewer-bits-sooner-{fraction}",
                says=f"In float16 this comes sooner (training fraction {fraction})",
                published="the fewer bits the sooner: float16 before float32",
                source=f"{SOURCE}, figure 2",
                checked=False,
                arms=(f"float16, {fraction}", f"float32, {fraction}"),
                metric="stops_at",
                measured="step from which on half of the losses are 0, float16 minus float32",
                judge=lower,
                remark="A run whose losses never become 0 counts with its last step." if fraction == 0.4 else "",
            )
            for fraction in fractions
        ),
        Claim(
            id="stablemax-groks",
            says="With StableMax it generalises without regularisation",
            published="generalises where softmax does not",
            source=f"{SOURCE}, section on StableMax",
            checked=False,
            arms=("StableMax, 0.4", "float32, 0.4"),
            metric="accuracy",
            measured="test accuracy, as a share: StableMax minus softmax in float32",
            judge=higher,
        ),
        Claim(
            id="orthogonal-gradient-groks",
            says="Without the part of the gradient along the weights it generalises at once",
            published="generalises without a delay",
            source=f"{SOURCE}, section on the orthogonal gradient",
            checked=False,
            arms=("orthogonal, 0.4", "float32, 0.4"),
            metric="accuracy",
            measured="test accuracy, as a share: orthogonal gradient minus plain, in float32",
            judge=higher,
        ),
    )
    return Paper(
        title="Grokking at the Edge of Numerical Stability",
        authors="Prieto, Barsbey, Mediano and Birdal 2025",
        url="https://arxiv.org/abs/2501.04697",
        seeds=(0,) if quick else (0, 1, 2, 3, 4),
        arms=arms,
        claims=claims,
        tables=("accuracy", "last_zero", "stops_at"),
        figures=(
            Figure(
                "zeros",
                "Losses that are exactly 0",
                "Share of training losses that are exactly 0 along training, all seeds.",
                lambda results: paper_figures.curves(
                    results, list(arms), "steps", "zeros", Axis("step"), Axis("losses that are 0, %")
                ),
            ),
            Figure(
                "tested",
                "Accuracy on the pairs that were held out",
                "Accuracy on all pairs outside the training split along training, all seeds.",
                lambda results: paper_figures.curves(
                    results, list(arms), "tested_steps", "tested", Axis("step"), Axis("accuracy, %")
                ),
            ),
        ),
    )
