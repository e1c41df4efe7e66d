"""Unit scaling: a network whose numbers begin with unit variance trains in float16 and FP8 without any loss scale.

    jaxmp reproduce unit_scaling [--quick]

Blake, Orr and Luschi 2023, Unit Scaling: Out-of-the-Box Low-Precision Training, 2303.11257. A plain MLP and a
unit-scaled one learn digits by the same optimizer, Adam with a negligible epsilon, which does not notice the scale of
a gradient. The loss is in a unit 2^24 as large, so that the gradients of the plain network are below the range of
float16; the unit-scaled loss brings its gradient to unit variance whatever its unit is. That is a constant factor on
the gradient, which a static loss scale is, too: the arms `static scale 2^24` have the plain network with that alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmp import DynamicScaler, FunctionTask, Mean, NoScaler, StaticScaler, fake_quantize
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.studies import paper_figures
from jaxmp.studies.claims import Claim, Compute, Figure, Paper, Train, below, higher, lower, within

POINT = 0.01
"""the margin of equality: 1 point of test accuracy, 2.7 of the 269 test images"""
UNIT = 2.0**-24
"""a batch of 42 rows or more divides a gradient in this unit by 2^5, and float16 rounds what is below 2^-25 to zero"""
CLASSES = 10
FEATURES = (256, 256, 256)
RELU_FORWARD = math.sqrt(2 / (1 - 1 / math.pi))
"""one by the standard deviation of max(x, 0), for x of a standard normal distribution"""
RELU_BACKWARD = math.sqrt(2)
"""one by the root mean square of the derivative of max(x, 0) there"""
ABSTRACT = "2303.11257, abstract"
NO_LOSS = "BERT-Large trains in FP16 and then FP8 with no degradation in accuracy"
CHOSEN = (
    "The unit of the loss was chosen so that plain float16 fails. The unit-scaled loss takes it out again by a "
    "constant factor, which is a static loss scale: see `static-scale-float16`."
)
BROKEN = "In some seeds its baseline loses accuracy by the unit of the loss as well: see `plain-float32-breaks`."
OTHER_ADAM = (
    "The arms differ in the optimizer as well: that of the baseline divides the unit out of the gradient before Adam. "
    "The same in the other format was not run."
)
STATIC = "static scale 2^24"
RANGE = "FP16 and FP8 can lack sufficient range for out-of-the-box training"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(x: jax.Array, w: jax.Array, forward: float, to_x: float, to_w: float) -> jax.Array:
    """Returns `forward * x @ w`, (rows, out); the gradients of x and w have factors of their own, `to_x` and `to_w`."""
    return (x @ w) * jnp.asarray(forward, x.dtype)


def _product_forward(x: jax.Array, w: jax.Array, forward: float, to_x: float, to_w: float) -> Any:
    return product(x, w, forward, to_x, to_w), (x, w)


def _product_backward(forward: float, to_x: float, to_w: float, kept: Any, gradient: jax.Array) -> Any:
    x, w = kept
    return (gradient @ w.T) * jnp.asarray(to_x, x.dtype), (x.T @ gradient) * jnp.asarray(to_w, w.dtype)


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def relu(x: jax.Array, forward: float, backward: float) -> jax.Array:
    """Returns `forward * max(x, 0)`; its derivative is taken as `backward` where x is positive."""
    return jnp.maximum(x, 0) * jnp.asarray(forward, x.dtype)


def _relu_forward(x: jax.Array, forward: float, backward: float) -> Any:
    return relu(x, forward, backward), x > 0


def _relu_backward(forward: float, backward: float, positive: jax.Array, gradient: jax.Array) -> Any:
    return (jnp.where(positive, gradient, 0) * jnp.asarray(backward, gradient.dtype),)


relu.defvjp(_relu_forward, _relu_backward)


@jax.custom_vjp
def scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns x; its gradient is multiplied by `factor`."""
    return x


scale_gradient.defvjp(
    lambda x, factor: (x, factor), lambda factor, gradient: (gradient * factor, jnp.zeros_like(factor))
)


def network(
    kernels: Sequence[jax.Array], x: jax.Array, *, unit: bool, fp8: bool, offsets: Sequence[jax.Array] | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the logits, (rows, classes), and the result of each layer before its activation.

    A chain has a cut edge between any two layers, so that forward and backward factors need not agree: what they change
    is a factor of the gradient of a whole kernel (section 4 of the paper).

    Args:
      kernels: the weights of each layer, (in, out).
      x: inputs, (rows, in).
      unit: multiply each product by one by the root of the number of its terms, and each activation by its factors.
      fp8: round operands of products to e4m3 and the gradients of their results to e5m2.
      offsets: zeros to add to the result of each layer, whose gradients are those of the results.
    """
    results = []
    for i, w in enumerate(kernels):
        if i:
            x = relu(x, RELU_FORWARD, RELU_BACKWARD) if unit else relu(x, 1.0, 1.0)
        factors = [length**-0.5 if unit else 1.0 for length in (w.shape[0], w.shape[1], x.shape[0])]
        if fp8:
            y = fake_quantize(product(fake_quantize(x, "e4m3"), fake_quantize(w, "e4m3"), *factors), None, "e5m2")
        else:
            y = product(x, w, *factors)
        x = y if offsets is None else y + offsets[i]
        results.append(x)
    return x, results


class ScaledMLP(nn.Module):
    """An MLP without biases, plain or unit-scaled."""

    unit: bool = False
    """Whether weights begin as standard normal numbers, and products and activations are scaled."""
    fp8: bool = False
    """Whether products are computed in FP8, without scales."""

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps inputs (rows, ...), flattened to (rows, features), to logits (rows, classes)."""
        x = inputs.reshape(inputs.shape[0], -1)
        initial = nn.initializers.normal(1.0) if self.unit else nn.initializers.lecun_normal()
        sizes = (x.shape[-1], *FEATURES, CLASSES)
        kernels = [self.param(f"kernel_{i}", initial, shape) for i, shape in enumerate(itertools.pairwise(sizes))]
        return network(kernels, x, unit=self.unit, fp8=self.fp8)[0]


def _loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return UNIT * optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def _unit_loss(logits: jax.Array, labels: jax.Array, rows: jax.Array) -> jax.Array:
    """As `_loss`, with a gradient of unit variance in a batch of `rows` rows, at logits of 0."""
    return _loss(scale_gradient(logits, rows * CLASSES / (math.sqrt(CLASSES - 1) * UNIT)), labels)


def plain_task(logits: jax.Array, batch: Any) -> Any:
    """Returns cross-entropy in a unit 2^24 as large, by row, and the accuracy."""
    return _loss(logits, batch["label"]), {"accuracy": _right(logits, batch)}


def unit_task(logits: jax.Array, batch: Any) -> Any:
    """Returns the same loss with a gradient of unit variance, and the accuracy."""
    rows = jnp.sum(batch["weight"])
    return _unit_loss(logits, batch["label"], rows), {"accuracy": _right(logits, batch)}


def _right(logits: jax.Array, batch: Any) -> Mean:
    return Mean.of((jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32), batch["weight"])


def adam(steps: int) -> optax.GradientTransformation:
    """Returns Adam at 1e-3 whose epsilon is negligible beside gradients in any unit."""
    del steps
    return optax.adam(1e-3, eps=1e-30)


def adam_in_nats(steps: int) -> optax.GradientTransformation:
    """Returns the same Adam of gradients from which the unit of the loss is divided out, so that no square underflows.

    A power of two changes no other bit of float32.
    """
    return optax.chain(optax.scale(1 / UNIT), adam(steps))


def unit_adam(steps: int) -> optax.GradientTransformation:
    """Returns Adam at 16 times that rate: weights of layers of 256 inputs begin 16 times as large as the plain ones.

    Those of the first layer, of 64 inputs, begin only 8 times as large, at the same rate.
    """
    del steps
    return optax.adam(1e-3 * math.sqrt(FEATURES[0]), eps=1e-30)


def at_start(seed: int, *, unit: bool) -> dict[str, Any]:
    """Returns the base 2 logarithms of the standard deviations of all tensors of one step, at the start, in float32.

    `farthest_without_unit` is `farthest` with the gradients of the plain loss divided by its unit of 2^-24, exactly.
    `farthest` is the largest magnitude among those of weights, results of layers and their gradients: 0 is unit
    variance of all; `farthest_of_weight_gradients` is that of the gradients of weights. Inputs are standard normal
    numbers, and labels are random.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (64, 64))
    labels = jax.random.randint(keys[1], (64,), 0, CLASSES)
    params = ScaledMLP(unit=unit).init(keys[2], x)["params"]
    kernels = [params[f"kernel_{i}"] for i in range(len(params))]
    offsets = [jnp.zeros((64, w.shape[1])) for w in kernels]

    def loss(kernels: Any, offsets: Any) -> Any:
        logits, results = network(kernels, x, unit=unit, fp8=False, offsets=offsets)
        total = _unit_loss(logits, labels, jnp.float32(64)) if unit else _loss(logits, labels)
        return jnp.mean(total), results

    (of_kernels, of_results), results = jax.grad(loss, argnums=(0, 1), has_aux=True)(kernels, offsets)
    groups = {
        "weights": kernels,
        "results": results,
        "gradients of weights": of_kernels,
        "gradients of results": of_results,
    }
    found = {
        name: [math.log2(float(np.std(np.asarray(of, np.float64)))) for of in tensors]
        for name, tensors in groups.items()
    }
    of_weights = found["gradients of weights"]
    in_order = [(name, value) for name, values in found.items() if name != "gradients of weights" for value in values]
    others = [value for _, value in in_order]
    by_unit = 0.0 if unit else -math.log2(UNIT)
    in_nats = [of + by_unit * (name == "gradients of results") for name, of in in_order]
    return {
        "farthest": max(map(abs, others)),
        "farthest_without_unit": max(map(abs, in_nats)),
        "farthest_of_weight_gradients": max(map(abs, of_weights)),
        **found,
    }


def get_paper(quick: bool = False) -> Paper:
    """The claims about variance at the start, and training in float16 and FP8 without a loss scale."""
    epochs = 4 if quick else 20
    base = ConfigFile.find("digits_mlp").experiment(["--loop.epochs", str(epochs), "--loop.eval-every", "1000"])

    def arm(
        precision: str,
        *,
        unit: bool,
        fp8: bool = False,
        scaler: Any = NoScaler(),  # noqa: B008
        optimizer: Any = None,
    ) -> Train:
        return Train(
            dataclasses.replace(
                base,
                model=ScaledMLP(unit=unit, fp8=fp8),
                task=FunctionTask(unit_task if unit else plain_task, ("image",)),
                optimizer=optimizer or (unit_adam if unit else adam),
                precision=precision,
                scaler=scaler,
            )
        )

    arms: dict[str, Train | Compute] = {
        "plain, float32": arm("float32", unit=False),
        "plain, float32, Adam in nats": arm("float32", unit=False, optimizer=adam_in_nats),
        "plain, float16": arm("mixed_float16", unit=False),
        "plain, float16, dynamic scale": arm("mixed_float16", unit=False, scaler=DynamicScaler()),
        f"plain, float16, {STATIC}": arm("mixed_float16", unit=False, scaler=StaticScaler(1 / UNIT)),
        "plain, FP8": arm("float32", unit=False, fp8=True),
        f"plain, FP8, {STATIC}": arm("float32", unit=False, fp8=True, scaler=StaticScaler(1 / UNIT)),
        "unit-scaled, float32": arm("float32", unit=True),
        "unit-scaled, float16": arm("mixed_float16", unit=True),
        "unit-scaled, FP8": arm("float32", unit=True, fp8=True),
    }
    trained = list(arms)
    if quick:
        arms = {name: arms[name] for name in ("plain, float16", "unit-scaled, float32", "unit-scaled, float16")}
    arms |= {
        f"at the start, {name}": Compute(at_start, {"unit": unit})
        for name, unit in (("plain", False), ("unit-scaled", True))
    }
    points = "test accuracy, as a share: "

    def same(id: str, says: str, arm: str, baseline: str, remark: str = "") -> Claim:
        return Claim(
            id=id,
            says=says,
            published=NO_LOSS,
            source=ABSTRACT,
            checked=True,
            arms=(arm, baseline),
            metric="accuracy",
            measured=f"{points}{arm} minus {baseline}; within 0.01",
            judge=within(POINT),
            remark=remark,
        )

    def fails(format: str, baseline: str, suffix: str, remark: str) -> Claim:
        return Claim(
            id=f"plain-{format.lower()}-fails{suffix}",
            says=f"Without a loss scale, the plain network loses accuracy in {format}",
            published=RANGE,
            source=ABSTRACT,
            checked=True,
            arms=(f"plain, {format}", baseline),
            metric="accuracy",
            measured=f"{points}plain, {format} minus {baseline}, no loss scale",
            judge=lower,
            remark=remark,
        )

    def static(id: str, says: str, arm: str, baseline: str) -> Claim:
        return Claim(
            id=id,
            says=says,
            published="own comparison, no claim of the paper: what of the gain a constant factor makes",
            source="own comparison",
            checked=False,
            arms=(arm, baseline),
            metric="accuracy",
            measured=f"{points}{arm} minus {baseline}; within 0.01",
            judge=within(POINT),
            remark="Added after the results of the other claims.",
        )

    claims = (
        Claim(
            id="unit-variance",
            says="Weights, products and their gradients begin with unit variance: deviations of 1, to a factor of 2",
            published="unit variance of all weights, activations and gradients at initialisation",
            source=ABSTRACT,
            checked=True,
            arms=("at the start, unit-scaled",),
            metric="farthest",
            measured="largest base 2 logarithm of a standard deviation, in magnitude, of 4 products; below 1",
            judge=below(1.0),
            remark="Of the depth that is trained here, 4 products, and before the activation: the factor of ReLU makes "
            "the variance 1, but leaves a mean, which the next product adds up, so that deviations grow from layer to "
            "layer: nothing is said of deeper networks.",
        ),
        Claim(
            id="unit-variance-of-weight-gradients",
            says="So do the gradients of weights",
            published="unit variance of all weights, activations and gradients at initialisation",
            source=ABSTRACT,
            checked=True,
            arms=("at the start, unit-scaled",),
            metric="farthest_of_weight_gradients",
            measured="largest base 2 logarithm of a standard deviation, in magnitude; below 1",
            judge=below(1.0),
            remark="The factor, one by the root of the number of rows, holds for independent rows with mean 0. "
            "Activations after a ReLU have a mean, and so have gradients where labels are not spread evenly: the rows "
            "then add up, most in the last layers.",
        ),
        Claim(
            id="plain-variance",
            says="Those of the plain network are farther from it, with the unit of its loss divided out",
            published=RANGE,
            source=ABSTRACT,
            checked=True,
            arms=("at the start, plain", "at the start, unit-scaled"),
            metric="farthest_without_unit",
            measured="largest base 2 logarithm of a standard deviation, in magnitude, the loss in nats, plain minus "
            "unit-scaled",
            judge=higher,
            remark="Changed after the results: declared was the next claim.",
        ),
        Claim(
            id="plain-variance-as-declared",
            says="Those of the plain network, with the loss in its unit of 2^24, are farther from it",
            published=RANGE,
            source=ABSTRACT,
            checked=True,
            arms=("at the start, plain", "at the start, unit-scaled"),
            metric="farthest",
            measured="largest base 2 logarithm of a standard deviation, in magnitude, plain minus unit-scaled",
            judge=higher,
            remark="As declared before the runs. It could hardly fail: the unit of the loss alone is 24 of it.",
        ),
        fails(
            "float16",
            "plain, float32, Adam in nats",
            "",
            f"Changed after the results: see `plain-float16-fails-as-declared`. {OTHER_ADAM} {CHOSEN}",
        ),
        fails("float16", "plain, float32", "-as-declared", f"As declared before the runs. {BROKEN} {CHOSEN}"),
        Claim(
            id="plain-float32-breaks",
            says="For comparison: the unit of the loss takes accuracy from the plain network in float32, too",
            published="own comparison, no claim of the paper: whether the handicap is one of float16 alone",
            source="own comparison",
            checked=False,
            arms=("plain, float32", "plain, float32, Adam in nats"),
            metric="accuracy",
            measured=f"{points}plain, float32 minus the same with the unit divided out of the gradient before Adam",
            judge=lower,
            remark="Added after the results. Adam squares the gradient, and an epsilon of 1e-30 is probably no help "
            "where a square underflows.",
        ),
        Claim(
            id="unit-beats-plain",
            says="Without a loss scale, the unit-scaled network is better in float16 than the plain one",
            published=RANGE,
            source=ABSTRACT,
            checked=True,
            arms=("unit-scaled, float16", "plain, float16"),
            metric="accuracy",
            measured=f"{points}unit-scaled minus plain, float16, no loss scale",
            judge=higher,
            remark=CHOSEN,
        ),
        same(
            "float16-equals-float32",
            "Unit-scaled, float16 without a loss scale is within 1 point of float32",
            "unit-scaled, float16",
            "unit-scaled, float32",
            CHOSEN,
        ),
        same(
            "fp8-equals-float32",
            "Unit-scaled, FP8 without any scale is within 1 point of float32",
            "unit-scaled, FP8",
            "unit-scaled, float32",
            f"e4m3 for weights and activations, e5m2 for gradients, to nearest. {CHOSEN}",
        ),
        fails(
            "FP8",
            "plain, float32, Adam in nats",
            "",
            f"Changed after the results: see `plain-fp8-fails-as-declared`. {OTHER_ADAM} {CHOSEN}",
        ),
        fails("FP8", "plain, float32", "-as-declared", f"As declared before the runs. {BROKEN} {CHOSEN}"),
        static(
            "static-scale-float16",
            "For comparison: the plain network in float16 with a static loss scale of 2^24 does as well",
            f"plain, float16, {STATIC}",
            "unit-scaled, float16",
        ),
        static(
            "static-scale-fp8",
            "For comparison: the plain network in FP8 with a static loss scale of 2^24 does as well",
            f"plain, FP8, {STATIC}",
            "unit-scaled, FP8",
        ),
        same(
            "same-as-loss-scaling",
            "Unit-scaled, float16 is within 1 point of the plain network with a loss scale of 2^15",
            "unit-scaled, float16",
            "plain, float16, dynamic scale",
            "Two networks: their initial weights differ in scale, and their learning rates by a factor of 16. The "
            f"dynamic scale starts at 2^15, which it keeps: no step overflows, and {20 * epochs} steps are fewer than "
            f"its growth interval of 2,000. {CHOSEN}",
        ),
    )
    return Paper(
        title="Unit Scaling: Out-of-the-Box Low-Precision Training",
        authors="Blake, Orr and Luschi 2023",
        url="https://arxiv.org/abs/2303.11257",
        seeds=(0, 1) if quick else (0, 1, 2, 3, 4, 5),
        arms=arms,
        claims=tuple(claim for claim in claims if set(claim.arms) <= set(arms)),
        tables=("accuracy", "farthest", "farthest_without_unit", "farthest_of_weight_gradients"),
        figures=(
            Figure(
                "accuracy",
                "Test accuracy of plain and unit-scaled networks",
                "Test accuracy on digits, no loss scale if none is named: each seed, and the mean with its 95 % t "
                "interval.",
                lambda results: paper_figures.means(results, trained, "accuracy", "test accuracy, share"),
            ),
        ),
    )
