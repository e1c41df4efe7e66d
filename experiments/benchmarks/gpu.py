"""Measures jaxmp on one GPU: speed, MFU and memory of the usual models, beside TF32 and torch; and time to an accuracy.

    python experiments/benchmarks/run.py gpu

Each block is one of the models, all of its contenders interleaved in one process, or a run to an accuracy, and takes
less than 10 minutes; one that was measured on this day is not measured again, so that what was cut off goes on where it
stopped. Rows are random, and stay on the device. With `--toys` the same runs on a CPU in seconds: a rehearsal.

MFU is the FLOPs of the model a second, three times those of its forward pass's products, by the peak of the arithmetic
of most of them: 989e12 on an H100 for bfloat16, 495e12 for TF32, 67e12 for float32. `of the ceiling` is the same by the
FLOP/s of a large product in that arithmetic, measured here. "TF32" is JAX's default of float32 on a GPU, "float32" the
true one. torch runs with autocast, compiled; its float32 is TF32.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside JAX

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from interleaved import Run, interleave, load, runs_here, timed
from jax.lax import Precision
from large_models import Workload, workloads

from jaxmp import DynamicScaler, TrainState, fit, loss_scaling, make_train_step
from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.instruments.flops import BACKWARD, peak_flops, product_flops
from jaxmp.instruments.program import Program
from jaxmp.runs.hooks import Evaluated, Stop
from jaxmp.runs.provenance import provenance

CONTENDERS = {
    "TF32": ("tensorfloat32", False),
    "float32": ("float32", False),
    "bfloat16": ("mixed_bfloat16", False),
    "bfloat16, dynamic scaling": ("mixed_bfloat16", True),
    "float16, dynamic scaling": ("mixed_float16", True),
}
"""precision, and whether the loss is scaled"""
TO_ACCURACY = {
    "MNIST to 99 %": ("mnist_cnn", 0.99),
    "CIFAR-10 to 94 %": ("cifar10_resnet18_fast", 0.94),
}
TOY_ACCURACY = {"digits to 50 %": ("digits_mlp", 0.5)}
CEILING = "ceiling of products"
MUST = {
    "ResNet-50": (3000, 4300),
    "ViT-B/16": (1500, 2500),
    "GPT-2 124M": (300_000, 400_000),
}
"""of one H100 in bfloat16, units a second: what must be reached, and what is good (performance.md)"""


def ceiling(size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """FLOP/s of one large product in each arithmetic, by the names of `PEAK_FLOPS`; random operands."""
    keys = jax.random.split(jax.random.key(0))
    operands = [jax.random.normal(key, (size, size), jnp.float32) for key in keys]
    kinds: dict[str, tuple[Any, Precision]] = {
        "bfloat16": (jnp.bfloat16, Precision.DEFAULT),
        "float16": (jnp.float16, Precision.DEFAULT),
        "tensorfloat32": (jnp.float32, Precision.HIGH),
        "float32": (jnp.float32, Precision.HIGHEST),
    }
    if jax.default_backend() == "gpu":
        kinds["float8_e4m3fn"] = jnp.float8_e4m3fn, Precision.DEFAULT
    runs = {}
    for name, (dtype, precision) in kinds.items():
        x, w = (operand.astype(dtype) for operand in operands)

        @jax.jit
        def product(x: jax.Array, w: jax.Array, precision: Precision = precision) -> jax.Array:
            wide = jnp.bfloat16 if x.dtype.itemsize == 1 else x.dtype
            return jax.lax.dot(x, w.T, precision=precision, preferred_element_type=wide)

        def steps(count: int, product: Any = product, x: Any = x, w: Any = w) -> None:
            for _ in range(count):
                y = product(x, w)
            jax.block_until_ready(y)

        runs[name] = timed(steps)
    times = interleave(runs, rounds=rounds, seconds=seconds)
    return {name: 2 * size**3 / min(each) for name, each in times.items()}


def contender(workload: Workload, precision: str, *, scaled: bool) -> tuple[Run, dict[str, Any]]:
    """Returns the steps of jaxmp in a precision, and what is known of its program."""
    tx: Any = workload.optimizer()
    tx = loss_scaling(tx, DynamicScaler()) if scaled else tx
    loss = workload.loss(precision)
    step = make_train_step(loss, tx)
    batch = jax.device_put(workload.batch())
    params, model_state = jax.jit(workload.init)(jax.random.key(0))
    flops = product_flops(jax.make_jaxpr(loss)(params, model_state, batch, jax.random.key(0)))
    state: Any = TrainState.create(params, tx, key=jax.random.key(1), model_state=model_state)
    del params, model_state
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    facts = {
        "compile_seconds": time.perf_counter() - began,
        "bytes": Program.read(compiled).memory.peak,
        "step_flops": (1 + BACKWARD) * sum(flops.values()),
        "arithmetic": max(flops, key=lambda kind: flops[kind]),
    }

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    return timed(steps), facts


def shares(flops: float, arithmetic: str, device: str, most: dict[str, float]) -> dict[str, float | None]:
    """Returns `mfu` and `of_ceiling`: FLOP/s by the peak of a device, and by what a large product reached on it.

    Each is None where that of this arithmetic is not known.
    """
    peak, reached = peak_flops(device, arithmetic), most.get(arithmetic)
    return {
        "mfu": None if peak is None else flops / peak,
        "of_ceiling": None if reached is None else flops / reached,
    }


def of_model(
    workload: Workload, contenders: tuple[str, ...], rounds: int, seconds: float, most: dict[str, float]
) -> dict[str, Any]:
    """Times all contenders on one model.

    Args:
      workload: what is trained.
      contenders: of `CONTENDERS`, "TF32" and "bfloat16" among them.
      rounds: number of rounds.
      seconds: seconds of the fastest in a round.
      most: FLOP/s of a large product by its arithmetic, measured before; {} leaves out the share of it.
    """
    found = {}
    for name in contenders:
        precision, scaled = CONTENDERS[name]
        found[name] = contender(workload, precision, scaled=scaled)
    runs: dict[str, Run] = {name: run for name, (run, _) in found.items()}
    facts: dict[str, dict[str, Any]] = {name: fact for name, (_, fact) in found.items()}
    if importlib.util.find_spec("torch"):
        import torch_large

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        for name, half in (("torch, TF32", None), ("torch, bfloat16", "bfloat16"), ("torch, float16", "float16")):
            steps = torch_large.make_steps(workload, half=half, device=device)
            if steps is not None and runs_here(name, timed(steps)):
                runs[name] = timed(steps)
                facts[name] = {
                    "step_flops": facts["bfloat16"]["step_flops"],
                    "arithmetic": half or "tensorfloat32",
                }
    times = interleave(runs, rounds=rounds, seconds=seconds)
    device_kind, result = jax.devices()[0].device_kind, {}
    for name, each in times.items():
        flops, arithmetic = facts[name]["step_flops"] / min(each), facts[name]["arithmetic"]
        result[name] = facts[name] | {
            "unit": workload.unit,
            "units_per_second": workload.rows * workload.per_row / min(each),
            "median_units_per_second": workload.rows * workload.per_row / statistics.median(each),
            "tflops_per_second": flops / 1e12,
            **shares(flops, arithmetic, device_kind, most),
            "beside_TF32": min(times["TF32"]) / min(each),
        }
    return result


def to_accuracy(config: str, accuracy: float) -> dict[str, Any]:
    """Seconds of training until the validation accuracy is reached: evaluations included, and compiling those; not the
    reading of the data, nor the compilation of the step, which the first dispatch waits for.
    """
    experiment = ConfigFile.find(config).experiment()
    found: dict[str, Any] = {}

    def hook(info: Any) -> Any:
        found.setdefault("began", time.perf_counter())  # the first steps are dispatched: compiled
        if isinstance(info, Evaluated) and info.split == "validation":
            found.update(step=info.step, accuracy=info.metrics["accuracy"], ended=time.perf_counter())
            return Stop("the accuracy is reached") if info.metrics["accuracy"] >= accuracy else None
        return None

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        fit(experiment, workdir=folder, hooks=[hook], progress="none", log=lambda message: None)
        whole = time.perf_counter() - began
    reached = found["accuracy"] >= accuracy
    return {
        "config": config,
        "reached": reached,
        "steps": found["step"],
        "validation_accuracy": found["accuracy"],
        "seconds_after_compiling": found["ended"] - found["began"] if reached else None,
        "seconds_in_all": whole,
    }


def blocks(
    contenders: tuple[str, ...], rounds: int, seconds: float, *, toys: bool
) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Returns what is measured, by name: functions of the results so far."""

    def most(results: dict[str, Any]) -> dict[str, float]:
        return results.get(CEILING, {}).get("result", {})

    found: dict[str, Callable[[dict[str, Any]], Any]] = {
        CEILING: lambda results: ceiling(64 if toys else 8192, rounds, seconds)
    }
    for name, workload in workloads(toys=toys).items():
        if name not in ("digits CNN", "ResNet-18"):
            found[name] = lambda results, workload=workload: of_model(
                workload, contenders, rounds, seconds, most(results)
            )
    for name, (config, accuracy) in (TOY_ACCURACY if toys else TO_ACCURACY).items():
        found[name] = lambda results, config=config, accuracy=accuracy: to_accuracy(config, accuracy)
    return found


def main(
    output: Path | None = None,
    names: tuple[str, ...] = (),
    contenders: tuple[str, ...] = tuple(CONTENDERS),
    rounds: int = 9,
    seconds: float = 1.0,
    toys: bool = False,
    quick: bool = False,
) -> None:
    """Measures, prints, and writes the results as JSON after each block.

    Args:
        output: JSON file to write; none by default. What it has already is not measured again.
        names: Blocks to measure; all by default.
        contenders: Precisions of jaxmp to measure, TF32 and bfloat16 among them.
        rounds: Number of rounds.
        seconds: Seconds of the fastest in a round.
        toys: The smallest models instead of the large ones, on any device.
        quick: The same as --toys, in one short round.
    """
    kept = json.loads(output.read_text()) if output is not None and output.exists() else {}
    results: dict[str, Any] = kept.get("results", {})
    how = {"rounds": 1, "seconds": 0.002} if quick else {"rounds": rounds, "seconds": seconds}
    failed = []
    for name, measure in blocks(contenders, **how, toys=toys or quick).items():
        if (names and name not in names) or name in results:
            continue
        began = time.perf_counter()
        try:
            found = measure(results)
        except Exception as error:  # one model that does not fit must not cost the figures of the others
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            print(failed[-1], flush=True)
            continue
        results[name] = {
            "result": found,
            "goal": MUST.get(name),
            "wall_seconds": time.perf_counter() - began,
            "load": load(),
        }
        print(name, json.dumps(results[name], indent=1), flush=True)
        if output is not None:
            made = provenance(patch=False) | how | {"results": results}
            output.write_text(json.dumps(made, indent=1) + "\n")
        jax.clear_caches()
    if failed:
        raise SystemExit("not measured: " + "; ".join(failed))


if __name__ == "__main__":
    sys.exit(script(main))
