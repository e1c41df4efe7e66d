"""Compares the speed of jaxmp's train step with the same step in plain JAX, and with Flax's DynamicScale.

    python experiments/benchmarks/run.py step_time

All contenders run in one process, in interleaved rounds, so that other load on the machine affects all of them. Compare
the ratios rather than the times: the ratio of the fastest rounds, and the median of the ratios of single rounds. Every
contender has float32 master weights, half-precision compute, dynamic loss scaling and optax's Adam, donates its state,
and is dispatched step by step.

The last two lines compare something else: jaxmp with many steps in one dispatch, and jaxmp dispatched step by step. On
a CPU, a step on a single example consists of compiled kernels only, and dispatch is nearly all of its time. With
several examples, each matrix product is a library call, whose time does not depend on dispatch.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale

from jaxmp import Arrays, Classification, Experiment, TrainState, loss_scaling, make_loss, make_train_step
from jaxmp.cli import script
from jaxmp.models.mlp import MLP
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer

CLASSES = 10
LEARNING_RATE = 1e-3

Step = Callable[[Any, Any], tuple[Any, dict[str, Any]]]
"""`(state, batch) -> (state, metrics)`, jitted; the state is donated"""


@dataclass(frozen=True)
class Case:
    """A multi-layer perceptron and its batch."""

    features: tuple[int, ...]
    inputs: int
    examples: int

    @property
    def model(self) -> MLP:
        """The model, without dtypes, like all models of jaxmp."""
        return MLP(self.features, classes=CLASSES)

    def params(self) -> Any:
        """Returns new parameters, the same each time, in buffers that may be donated."""
        return self.model.init(jax.random.key(0), jnp.zeros((1, self.inputs)))["params"]

    def batch(self) -> dict[str, jax.Array]:
        """Returns random rows: image float32 (examples, inputs), label int32 (examples,), weight 1."""
        rng = np.random.default_rng(0)
        return {
            "image": jnp.asarray(rng.standard_normal((self.examples, self.inputs)), jnp.float32),
            "label": jnp.asarray(rng.integers(CLASSES, size=self.examples), jnp.int32),
            "weight": jnp.ones(self.examples, jnp.float32),
        }


DISPATCH_BOUND = Case(features=(8,) * 31, inputs=8, examples=8)  # 64 leaves


def cases() -> dict[str, Case]:
    """Returns three cases: dispatch-bound, small, and about 20 ms per step (on 2 CPU cores, or on a GPU)."""
    large = Case((1024, 1024), 784, 192) if jax.default_backend() == "cpu" else Case((8192,) * 4, 8192, 8192)
    return {"dispatch-bound": DISPATCH_BOUND, "128x2": Case((128, 128), 64, 64), "20 ms": large}


def jaxmp_step(case: Case, precision: str) -> tuple[Step, Any]:
    """Returns jaxmp's train step and its first state."""
    tx = loss_scaling(optax.adam(LEARNING_RATE))
    step = make_train_step(make_loss(case.model, Classification(), precision), tx)
    return jax.jit(step, donate_argnums=0), TrainState.create(case.params(), tx, key=jax.random.key(0))


def hand_written_step(case: Case, precision: str) -> tuple[Step, Any]:
    """Returns the same step in plain JAX, written for this model only, and its first state."""
    dtype, layers = half(precision), len(case.features) + 1
    optimizer = optax.adam(LEARNING_RATE)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        for i in range(layers):
            kernel, bias = params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]
            x = x @ kernel.astype(dtype)
            x = x + jnp.broadcast_to(bias, x.shape).astype(dtype)  # so that its gradient is summed in float32
            x = x if i == layers - 1 else jax.nn.relu(x)
        return x.astype(jnp.float32)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, scale, good_steps = state

        def scaled_loss(params: Any) -> Any:
            logits = forward(params, batch["image"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            return loss * scale, (loss, jnp.mean(jnp.argmax(logits, -1) == batch["label"]))

        grads, (loss, accuracy) = jax.grad(scaled_loss, has_aux=True)(params)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all() & jnp.isfinite(loss)
        grads = jax.tree.map(lambda g: g / scale, grads)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (params, opt_state))
        grow = finite & (good_steps == 1999)
        good_steps = jnp.where(finite & ~grow, good_steps + 1, 0)
        backed_off = jnp.maximum(scale * 0.5, 2.0**-14)
        scale = jnp.where(finite, jnp.where(grow, jnp.minimum(scale * 2.0, 2.0**24), scale), backed_off)
        return (params, opt_state, scale, good_steps), {"loss": loss, "accuracy": accuracy}

    params = case.params()
    state = (params, optimizer.init(params), jnp.float32(2.0**15), jnp.int32(0))
    return jax.jit(step, donate_argnums=0), state


class FlaxMLP(nn.Module):
    """The model in the style of Flax's examples, with a dtype in every layer."""

    features: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, inputs) to float32 logits (batch, classes)."""
        for width in self.features:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(CLASSES, dtype=self.dtype)(x).astype(jnp.float32)


def flax_step(case: Case, precision: str) -> tuple[Step, Any]:
    """Returns a step with Flax's DynamicScale, as in Flax's ImageNet example, and its first state."""
    model, optimizer = FlaxMLP(case.features, half(precision)), optax.adam(LEARNING_RATE)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, scaling = state

        def loss_fn(params: Any) -> Any:
            logits = model.apply({"params": params}, batch["image"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            return loss, jnp.mean(jnp.argmax(logits, -1) == batch["label"])

        scaling, finite, (loss, accuracy), grads = scaling.value_and_grad(loss_fn, has_aux=True)(params)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (params, opt_state))
        return (params, opt_state, scaling), {"loss": loss, "accuracy": accuracy}

    params = case.params()
    state = (params, optimizer.init(params), DynamicScale(scale=jnp.float32(2.0**15)))
    return jax.jit(step, donate_argnums=0), state


CONTENDERS = {"jaxmp": jaxmp_step, "hand-written": hand_written_step, "flax": flax_step}


def half(precision: str) -> Any:
    """Returns the compute dtype of a preset."""
    return {"mixed_float16": jnp.float16, "mixed_bfloat16": jnp.bfloat16}[precision]


def step_by_step(step: Step, state: Any, batch: Any) -> Callable[[int], float]:
    """Returns a function that runs a given number of steps and returns the seconds per step."""

    def run(count: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(count):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / count

    return run


def compare(runs: dict[str, Callable[[int], float]], rounds: int, seconds: float) -> dict[str, Any]:
    """Times all `runs` in every round, for about `seconds` each, and returns times and ratios of all pairs."""
    for run in runs.values():
        run(3)  # compiles; Flax's twice
    count = int(np.clip(seconds / min(run(3) for run in runs.values()), 5, 5000))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        order = list(runs) if i % 2 == 0 else list(runs)[::-1]
        for name in order:
            times[name].append(runs[name](count))
    first, *others = runs
    return {
        "rounds": rounds,
        "steps_a_round": count,
        "microseconds": {
            name: {"min": 1e6 * min(each), "median": 1e6 * statistics.median(each)} for name, each in times.items()
        },
        "ratio": {
            f"{first} / {other}": {
                "min": min(times[first]) / min(times[other]),
                "median": statistics.median(a / b for a, b in zip(times[first], times[other], strict=True)),
            }
            for other in others
        },
    }


def compare_steps(case: Case, precision: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Compares all steps on one model. Raises RuntimeError if their losses differ."""
    batch, runs, losses = case.batch(), {}, {}
    for name, make in CONTENDERS.items():
        step, state = make(case, precision)
        for _ in range(5):
            state, metrics = step(state, batch)
        loss = metrics["loss"]
        losses[name] = float(loss.compute() if hasattr(loss, "compute") else loss)
        runs[name] = step_by_step(step, state, batch)
    if not np.allclose(list(losses.values()), losses["jaxmp"], rtol=5e-3):
        raise RuntimeError(f"not the same step: the losses of step 5 are {losses}")
    sizes = [leaf.size for leaf in jax.tree.leaves(case.params())]
    facts = {"leaves": len(sizes), "parameters": sum(sizes), "batch": case.examples}
    return facts | compare(runs, rounds, seconds)


def compare_dispatch(case: Case, precision: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Compares one dispatch for many steps with one per step, using the feeds of `fit` with data on the device."""
    steps_in_epoch = 5000

    def load(split: str) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        examples = case.examples * steps_in_epoch
        image = rng.standard_normal((examples, case.inputs)).astype(np.float32)
        return {"image": image, "label": rng.integers(CLASSES, size=examples)}

    data = Arrays(load=load, batch_size=case.examples, images=())
    trainer = Trainer(Experiment(model=case.model, data=data, precision=precision))

    def run_with(feed: Any) -> Callable[[int], float]:
        carry = trainer.devices.put(trainer.init()), trainer.devices.put(trainer.no_metrics)

        def run(count: int) -> float:
            nonlocal carry
            began = time.perf_counter()
            carry = feed.run(*carry, 0, count)
            jax.block_until_ready(carry)
            return (time.perf_counter() - began) / count

        return run

    runs = {"step by step": run_with(trainer.feed(fuse=False)), "in one dispatch": run_with(trainer.feed(fuse=True))}
    return compare(runs, rounds, seconds)


def main(
    output: Path | None = None,
    rounds: int = 9,
    seconds: float = 0.3,
    precision: Literal["mixed_float16", "mixed_bfloat16"] = "mixed_float16",
) -> None:
    """Runs all comparisons, prints a table, and writes the results as JSON.

    Args:
        output: JSON file to write; none by default.
        rounds: Number of rounds of each comparison, 7 or more.
        seconds: Seconds per contender and round.
        precision: Precision of all contenders.
    """
    results: dict[str, Any] = {}
    for name, case in cases().items():
        results[name] = compare_steps(case, precision, rounds, seconds)
        report(name, results[name])
    for examples in (1, DISPATCH_BOUND.examples):
        name = f"many, batch {examples}"
        results[name] = compare_dispatch(replace(DISPATCH_BOUND, examples=examples), precision, rounds, seconds)
        report(name, results[name])
    if output is not None:
        whole = provenance(patch=False) | {"precision": precision, "results": results}
        output.write_text(json.dumps(whole, indent=2) + "\n")


def report(name: str, result: dict[str, Any]) -> None:
    """Prints a result as one line."""
    times = ", ".join(f"{who} {each['min']:.0f}" for who, each in result["microseconds"].items())
    ratios = ", ".join(
        f"{pair} {each['min']:.3f} (median {each['median']:.3f})" for pair, each in result["ratio"].items()
    )
    print(f"{name:<15} us a step: {times}; {ratios}", flush=True)


if __name__ == "__main__":
    sys.exit(script(main))
