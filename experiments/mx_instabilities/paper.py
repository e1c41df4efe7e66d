"""Training instabilities in MX formats: a student and a teacher, rounded LayerNorm weights, and five cures.

    jaxmp reproduce mx_instabilities [--quick]

Su et al. 2025, Characterization and Mitigation of Training Instabilities in Microscaling Formats, 2506.20752. The proxy
model is that of the authors' program (github.com/Hither1/systems-scaling, `olmo/synthetic/student_teacher.py`): a
residual MLP with LayerNorm learns a random teacher without, on fresh normal inputs, by Adam at a constant rate.

Two kinds of arms. `train` trains the student under a precision and watches its loss. `gradient` trains it in float32
and compares its gradient, at the end, under a precision with that in float32, on one batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import FunctionTask, TrainState, make_loss, make_train_step, quantize
from jaxmp.html.figure import Axis
from jaxmp.precision.blocks import parse_block_format
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, above, higher, higher_by, prevents, recovers
from jaxmp.training.gradients import make_gradients

SOURCE = "2506.20752"
ABSTRACT = f"{SOURCE}, abstract"
RATE, NOISE = 1e-3, 0.005
"""learning rate and standard deviation of the teacher's noise, the defaults of the program"""
DIVERGED = 2.0**20
"""what a loss that is larger, infinite or NaN counts as"""
CHUNK = 50
"""steps in one dispatch, of which the mean and the largest loss are kept"""
JUMP = 10.0
"""a chunk of steps counts as a spike if its largest loss is so many times the median of the chunks before it"""
UNSTABLE = 1.0
"""chunks with a spike, more than those of float32 in the mean over the seeds, from which on a format is unstable"""
MOST, LEAST = 0.5, 0.05
"""share of seeds with more spikes than float32 that a cure must stay below, and that its absence must be above"""
E4M3, E5M2, E3M2 = "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2"


def everywhere(format: str) -> str:
    """Returns the precision that rounds the operands of all three products to a format."""
    return f"float32,fprop={format},dgrad={format},wgrad={format}"


@dataclasses.dataclass(frozen=True)
class Precision:
    """What is rounded: operands of products by a policy, and the weights of LayerNorm."""

    policy: str
    """policy of the model, as `--precision` takes it"""
    affine: str = ""
    """block format of the weights and biases of LayerNorm; empty: they are not rounded"""


PRECISIONS = {
    "float32": Precision("float32"),
    "e4m3": Precision(everywhere(E4M3), E4M3),
    "e5m2": Precision(everywhere(E5M2), E5M2),
    "e3m2": Precision(everywhere(E3M2), E3M2),
    "e4m3, LayerNorm high": Precision(everywhere(E4M3)),
    "LayerNorm in e4m3 alone": Precision("float32", E4M3),
    "e4m3, scales rounded up": Precision(everywhere(f"{E4M3}:rceil"), f"{E4M3}:rceil"),
    "e4m3, activations high": Precision(f"float32,fprop=high/{E4M3},dgrad=high/{E4M3}", E4M3),
    "e4m3, forward only": Precision(f"float32,fprop={E4M3}", E4M3),
}
CURES = {
    "e4m3, LayerNorm high": "leaving the weights of LayerNorm unrounded",
    "e4m3, scales rounded up": "rounding the scale of a block up, which clips nothing",
    "e4m3, activations high": "leaving activations and their gradients unrounded",
    "e4m3, forward only": "rounding in the forward pass alone",
}
RETURN = "e4m3, float32 after half"


class LayerNorm(nn.Module):
    """Layer normalisation whose weight and bias are rounded to a block format where they are used."""

    affine: str = ""
    """The format; empty: they are not rounded."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of x, (rows, width)."""
        weight = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        if self.affine:  # the derivative of `quantize` is 1
            weight, bias = quantize(weight, self.affine), quantize(bias, self.affine)
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight + bias


uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""uniform in +-1 / sqrt(inputs), as PyTorch's Linear begins"""


class Student(nn.Module):
    """Residual blocks of LayerNorm, Dense of four times the width, GELU and Dense."""

    width: int
    depth: int
    affine: str = ""
    """Format of the weights of LayerNorm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x, (rows, width), to (rows, width)."""
        for i in range(self.depth):
            z = LayerNorm(self.affine, name=f"norm_{i}")(x)
            z = nn.Dense(4 * self.width, use_bias=False, kernel_init=uniform, name=f"up_{i}")(z)
            x = x + nn.Dense(self.width, kernel_init=uniform, name=f"down_{i}")(nn.gelu(z, approximate=False))
        return x


class Teacher(nn.Module):
    """Pairs of Dense layers without biases, a GELU in each; no LayerNorm and no residual branches."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x, (rows, width), to (rows, width)."""
        for _ in range(self.depth):
            x = nn.gelu(nn.Dense(self.width, use_bias=False, kernel_init=uniform)(x), approximate=False)
            x = nn.Dense(self.width, use_bias=False, kernel_init=uniform)(x)
        return x


def squared_error(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the mean squared error of each row."""
    return jnp.mean((outputs - batch["y"]) ** 2, axis=-1)


def train(seed: int, *, precision: str, then: str, width: int, depth: int, batch: int, steps: int) -> dict[str, Any]:
    """Trains the student, and returns how its loss went.

    Args:
      seed: of weights, teacher and batches, which are the same for all precisions.
      precision: one of `PRECISIONS`.
      then: the precision of the second half of the steps.
      width: of student and teacher.
      depth: number of their blocks.
      batch: rows of a batch.
      steps: number of steps.

    Returns: `final`, base 2 logarithm of the mean loss of the last tenth of the steps, under the precision itself: each
      batch is new, so that this is no loss on seen data; `spikes`, see `spikes_of`, and `late_spikes`, those of the
      second half; `clipped`, the share of the weights of LayerNorm that e4m3 clips at the end; and the curve `steps`,
      `losses`, means of 50 steps.
    """
    state, _, means, largest = _trained(seed, precision, then, width, depth, batch, steps)
    return {
        "final": float(np.log2(np.mean(means[-max(len(means) // 10, 1) :]))),
        "spikes": spikes_of(means, largest),
        "late_spikes": spikes_of(means, largest, steps // 2 // CHUNK),
        "clipped": clipped(state.params, E4M3),
        "steps": [CHUNK * (i + 1) for i in range(len(means))],
        "losses": list(means),
    }


def gradient(seed: int, *, precision: str, width: int, depth: int, batch: int, steps: int) -> dict[str, float]:
    """Trains in float32 and returns the error of the gradient under a precision there, by the norm of float32's.

    `clipped` is the share of the weights of LayerNorm that e4m3 clips, `clipped_kernels` that of the kernels, and
    `clipped_more` the difference.
    """
    state, teacher, _, _ = _trained(seed, "float32", "float32", width, depth, batch, steps)
    x, y = _rows(teacher, jax.random.fold_in(jax.random.key(seed), 2**31 - 2), width, depth, batch)
    exact, found = (_gradient(name, width, depth, batch)(state, x, y) for name in ("float32", precision))
    of_norms, of_kernels = clipped(state.params, E4M3), clipped(state.params, E4M3, kernels=True)
    return {
        "error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
        "clipped": of_norms,
        "clipped_kernels": of_kernels,
        "clipped_more": of_norms - of_kernels,
    }


def spikes_of(means: Sequence[float], largest: Sequence[float], first: int = 1) -> int:
    """Counts chunks, from `first` on, with a spike.

    That is a largest loss of more than 10 times the median of the means of the (up to 20) chunks before, or one that
    diverged: in a run that stays there, each chunk counts.
    """
    return sum(
        largest[i] >= DIVERGED or largest[i] > JUMP * float(np.median(means[max(i - 20, 0) : i]))
        for i in range(max(first, 1), len(means))
    )


def clipped(params: Any, format: str, *, kernels: bool = False) -> float:
    """Returns the share of the weights of LayerNorm, or of kernels, that rounding to a block format clips."""
    block = parse_block_format(format)
    kind = "kernel" if kernels else "scale"
    of = [np.asarray(w) for path, w in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == kind]
    values = np.concatenate([np.abs(w.T).reshape(-1, 32) for w in of])
    scale = 2.0 ** (np.floor(np.log2(values.max(-1, keepdims=True))) - block.element.max_exponent)
    return float(np.mean(values > block.element.max * scale))


def _bounded(loss: Any) -> float:
    return float(min(loss, DIVERGED)) if np.isfinite(loss) else DIVERGED


def _initial(seed: int, width: int, depth: int) -> tuple[TrainState, Any]:
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jnp.zeros((1, width))
    student = Student(width, depth).init(keys[0], x)["params"]
    state = TrainState.create(student, optax.adam(RATE), key=keys[2])
    return state, Teacher(width, depth).init(keys[1], x)


def _rows(teacher: Any, key: jax.Array, width: int, depth: int, rows: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (rows, width))
    return x, Teacher(width, depth).apply(teacher, x) + NOISE * jax.random.normal(keys[1], (rows, width))


def _loss(precision: str, width: int, depth: int) -> Any:
    how = PRECISIONS[precision]
    return make_loss(Student(width, depth, how.affine), FunctionTask(squared_error), how.policy)


@functools.cache
def _program(precision: str, width: int, depth: int, batch: int) -> Any:
    """`CHUNK` steps under a precision: `(state, teacher, key) -> (state, losses)`; compiled once for all seeds."""
    step = make_train_step(_loss(precision, width, depth), optax.adam(RATE))

    def one(carry: Any, _: Any) -> Any:
        state, teacher, key = carry
        x, y = _rows(teacher, jax.random.fold_in(key, state.step), width, depth, batch)
        state, metrics = step(state, {"x": x, "y": y, "weight": jnp.ones(batch)})
        return (state, teacher, key), metrics["loss"].total / metrics["loss"].weight

    def steps(state: TrainState, teacher: Any, key: jax.Array) -> Any:
        (state, _, _), losses = jax.lax.scan(one, (state, teacher, key), length=CHUNK)
        return state, losses

    return jax.jit(steps, donate_argnums=0)


@functools.lru_cache(maxsize=1)  # the arms `gradient` follow that of float32, whose state they share
def _trained(
    seed: int, precision: str, then: str, width: int, depth: int, batch: int, steps: int
) -> tuple[TrainState, Any, tuple[float, ...], tuple[float, ...]]:
    """The state at the end, the teacher, and of each chunk of steps the mean and the largest loss."""
    state, teacher = _initial(seed, width, depth)
    means, largest = [], []
    half = steps // 2 // CHUNK * CHUNK
    for name, count in ((precision, half), (then, steps - half)):
        for _ in range(count // CHUNK):
            state, losses = _program(name, width, depth, batch)(state, teacher, jax.random.key(seed))
            means.append(_bounded(np.mean(losses)))
            largest.append(_bounded(np.max(losses)))
    return state, teacher, tuple(means), tuple(largest)


@functools.cache
def _gradient(precision: str, width: int, depth: int, batch: int) -> Any:
    """The gradient under a precision as one float64 array; compiled once for all seeds."""
    gradients = jax.jit(make_gradients(_loss(precision, width, depth)))

    def at(state: TrainState, x: jax.Array, y: jax.Array) -> np.ndarray:
        rows = {"x": x, "y": y, "weight": jnp.ones(batch)}
        found, _, _ = gradients(state.params, state.model_state, jnp.float32(1), rows, state.key)
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(found)])

    return at


def get_paper(quick: bool = False) -> Paper:
    """The claims about instabilities, what makes them, and what prevents them."""
    size = {"width": 32, "depth": 4, "batch": 64} if quick else {"width": 256, "depth": 4, "batch": 128}
    steps = 1000 if quick else 7000
    names = [name for name in PRECISIONS if name != "LayerNorm in e4m3 alone"]
    arms = {name: Compute(train, {"precision": name, "then": name, **size, "steps": steps}) for name in names}
    arms[RETURN] = Compute(train, {"precision": "e4m3", "then": "float32", **size, "steps": steps})
    trained = list(arms)
    gradients = {
        f"gradient, {name}": Compute(gradient, {"precision": name, **size, "steps": steps})
        for name in ("e4m3", "e4m3, LayerNorm high", "LayerNorm in e4m3 alone")
    }
    arms = {"float32": arms["float32"], **gradients, **arms}
    if quick:  # a precision takes seconds to compile
        some = ("float32", "gradient, e4m3", "gradient, LayerNorm in e4m3 alone", "e4m3", "e4m3, LayerNorm high")
        arms = {name: arms[name] for name in some}

    def spikes(format: str) -> Claim:
        return Claim(
            id=f"{format}-unstable",
            says=f"In MX {format} the loss has spikes that float32 does not have",
            published=unstable,
            source=ABSTRACT,
            checked=True,
            arms=(format, "float32"),
            metric="spikes",
            measured=f"chunks of {CHUNK} steps with a spike, {format} minus float32; above {UNSTABLE:g}",
            judge=higher_by(UNSTABLE),
            remark=f"A spike is a loss of {JUMP:g} times the median of the 20 chunks before."
            if format == "e4m3"
            else "",
        )

    def cure(number: int, arm: str, how: str, remark: str, metric: str = "spikes") -> Claim:
        return Claim(
            id=f"cure-{number}",
            says=f"It is prevented by {how}",
            published=averted,
            source=ABSTRACT,
            checked=True,
            arms=(arm, "e4m3", "float32"),
            metric=metric,
            measured="share of seeds with more chunks with a spike"
            f"{' in the second half' if metric == 'late_spikes' else ''} than in float32, {arm}, beside e4m3; none, "
            f"the interval below {MOST:g}, and McNemar p below 0.05",
            judge=prevents(MOST, LEAST),
            remark=remark,
        )

    unstable = "sharp, stochastic instabilities in the loss, particularly at larger compute scales"
    averted = "instabilities can be averted or delayed by modifying precision schemes mid-training"
    cause = "a gradient bias from the quantisation of layer-norm affine parameters and a small fraction of activations"
    hybrid = "certain hybrid configurations recover performance competitive with full-precision training"
    competitive = 0.15

    def recovery(id: str, arm: str, says: str) -> Claim:
        return Claim(
            id=id,
            says=f"{says} recovers the loss of float32, to within 11 %",
            published=hybrid,
            source=ABSTRACT,
            checked=True,
            arms=(arm, "e4m3", "float32"),
            metric="final",
            measured=f"base 2 logarithm of the final loss, {arm} minus float32; within {competitive}, and below e4m3, "
            "where e4m3 is above float32",
            judge=recovers(competitive),
        )

    def of_gradient(id: str, says: str, names: tuple[str, ...], metric: str, measured: str, judge: Any) -> Claim:
        return Claim(
            id=id,
            says=says,
            published=cause,
            source=ABSTRACT,
            checked=True,
            arms=tuple(f"gradient, {name}" for name in names),
            metric=metric,
            measured=measured,
            judge=judge,
        )

    claims = (
        *(spikes(format) for format in ("e4m3", "e5m2", "e3m2")),
        Claim(
            id="e4m3-loses",
            says="In MX e4m3 the final loss is higher than in float32",
            published=unstable,
            source=ABSTRACT,
            checked=True,
            arms=("e4m3", "float32"),
            metric="final",
            measured="base 2 logarithm of the final loss, e4m3 minus float32",
            judge=higher,
        ),
        of_gradient(
            "norms-clip",
            "The weights of LayerNorm lie close together, and e4m3 clips more of them than of the kernels",
            ("e4m3",),
            "clipped_more",
            "share of clipped weights of LayerNorm minus that of kernels, after training in float32",
            above(0.0),
        ),
        of_gradient(
            "norms-bias-the-gradient",
            "Rounding the weights of LayerNorm is a part of the error of the gradient",
            ("e4m3", "e4m3, LayerNorm high"),
            "error",
            "error of the gradient by the norm of float32's, e4m3 minus e4m3 with LayerNorm high",
            higher,
        ),
        of_gradient(
            "norms-are-most-of-it",
            "Rounded alone they make more than half of its error",
            ("LayerNorm in e4m3 alone", "e4m3"),
            "error",
            "error of the gradient, LayerNorm in e4m3 alone minus half of that of e4m3",
            _more_than_half,
        ),
        *(
            cure(number, arm, how, "Over the whole training, not from its middle on as in the paper.")
            for number, (arm, how) in enumerate(CURES.items(), 1)
        ),
        cure(
            5,
            RETURN,
            "going on in float32 after half the steps",
            "Spikes of the first half, under e4m3 in both arms, do not count.",
            "late_spikes",
        ),
        recovery("hybrid-activations", "e4m3, activations high", "Leaving activations and their gradients unrounded"),
        recovery("hybrid-forward", "e4m3, forward only", "Rounding in the forward pass alone"),
    )
    return Paper(
        title="Characterization and Mitigation of Training Instabilities in Microscaling Formats",
        authors="Su, Kwun, Gil, Kakade and Anand 2025",
        url="https://arxiv.org/abs/2506.20752",
        seeds=(0, 1) if quick else tuple(range(8)),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("final", "spikes", "late_spikes", "clipped", "clipped_kernels", "error"),
        figures=(
            Figure(
                "losses",
                "Loss of the student along training",
                "Mean loss of 50 steps along training, all seeds.",
                lambda results: paper_figures.curves(
                    results,
                    ["float32", "e4m3", "e5m2", "e3m2", "e4m3, LayerNorm high"],
                    "steps",
                    "losses",
                    Axis("step"),
                    Axis("mean squared error", "log10"),
                ),
            ),
            Figure(
                "final",
                "Final loss beside float32",
                "Base 2 logarithm of the loss in the last tenth of the steps, minus that of float32: each seed, and "
                "the mean with its 95 % t interval.",
                lambda results: paper_figures.differences(
                    results, trained[1:], "float32", "final", "log2 of the loss, minus float32's"
                ),
            ),
        ),
    )


def _more_than_half(values: Any) -> Any:
    """Judges that the first arm is above half of the second."""
    alone, all_of_it = values
    return higher([alone, {seed: None if value is None else value / 2 for seed, value in all_of_it.items()}])
