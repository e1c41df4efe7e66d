"""Measures how the overheads of a step and of its start grow: with leaves, layers and devices; and fits the exponents.

    python experiments/benchmarks/run.py growth

"step" is the time of a step of one dispatch, "start" that of tracing, lowering and compiling it; both for jaxmp's step
and for the one by hand, in float16 with dynamic loss scaling. The exponent is the slope of the logarithms over the
upper half of the sizes, where what is constant no longer counts: 1 is linear. Layers are as wide as 8, so that the time
is overhead. A size whose compilation of the step by hand would take minutes is measured for jaxmp alone, and counts for
no exponent. "scanned" layers are one `nn.scan`, by hand a `lax.scan`: neither should grow in its start. Devices are
virtual, of one CPU, in a process each: a step's time is overhead of the same work split up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleaved import Run, interleave, load
from peer_steps import hand_written, jaxmp_itself
from peer_steps.cases import FIRST_SCALE, Case, loss_and_accuracy, optimizer
from peers import singly

from jaxmp import Adam, Arrays, Experiment, Loop
from jaxmp.cli import script
from jaxmp.models.mlp import MLP
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer
from jaxmp.scaling.scalers import Scaling

WIDTH = 8
SIZES = {
    "leaves": (10, 30, 100, 300, 1000, 3000),
    "layers": (2, 5, 10, 20, 50, 100, 200),
    "scanned layers": (2, 5, 10, 20, 50, 100, 200),
    "devices": (1, 2, 4, 8),
}
LONGEST = 20.0
"""seconds of a start of the step by hand after which no larger one is compiled"""
SMALLEST = {"leaves": (4, 6), "layers": (2, 3), "scanned layers": (2, 3), "devices": (1, 2)}


class Scanned(nn.Module):
    """Dense layers as one scan, and a head."""

    layers: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps x (rows, WIDTH) to logits."""

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> Any:
                return nn.relu(nn.Dense(WIDTH)(x)), None

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        return nn.Dense(10)(scan()(x, None)[0])


def scanned_by_hand(case: Case) -> tuple[Any, Any]:
    """Returns `(step, state)` of the scanned layers in plain JAX."""

    def forward(params: Any, x: jax.Array, dtype: Any) -> jax.Array:
        layers = next(value for name, value in params.items() if name != "Dense_0")["Dense_0"]
        x, _ = jax.lax.scan(lambda x, p: (jax.nn.relu(hand_written.dense(p, x, dtype)), None), x.astype(dtype), layers)
        return hand_written.dense(params["Dense_0"], x, dtype)

    def loss_fn(params: Any, batch: Any) -> Any:
        loss, accuracy = loss_and_accuracy(forward(params, batch["x"], jnp.float16), batch["label"])
        return loss, {"loss": loss, "accuracy": accuracy}

    tx, params = optimizer(), case.params()
    return hand_written.scaled(hand_written.scaled_gradients(loss_fn), tx), hand_written.first_scaled(params, tx)


def case_of(kind: str, size: int) -> Case:
    """Returns the model of a size; two leaves a layer."""
    if kind == "scanned layers":
        return Case(Scanned(size), (WIDTH,), 8)
    layers = size // 2 if kind == "leaves" else size
    return Case(MLP((WIDTH,) * (layers - 1)), (WIDTH,), 8)


def start_seconds(step: Any, state: Any, batch: Any) -> float:
    """Seconds of tracing, lowering and compiling a step."""
    began = time.perf_counter()
    jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return time.perf_counter() - began


def of_size(kind: str, size: int, rounds: int, seconds: float, *, both: bool = True) -> dict[str, dict[str, float]]:
    """Returns the seconds of start and step for a size, of both or of jaxmp alone."""
    case = case_of(kind, size)
    by_hand: Callable[[], Any] = (
        (lambda: scanned_by_hand(case)) if kind == "scanned layers" else (lambda: hand_written.make(case, "float16"))
    )
    makers: dict[str, Callable[[], Any]] = {"jaxmp": lambda: jaxmp_itself.make(case, "float16")}
    makers |= {"hand-written": by_hand} if both else {}
    batch = case.batch()
    runs: dict[str, Run] = {}
    start = dict.fromkeys(makers, float("inf"))
    for _ in range(2 if rounds > 1 else 1):
        for name, make in makers.items():
            step, state = make()
            start[name] = min(start[name], start_seconds(step, state, batch))
            runs[name] = singly(step, state, batch)
    times = interleave(runs, rounds=rounds, seconds=seconds)
    return {"start": start, "step": {name: min(of) for name, of in times.items()}}


def of_devices(count: int, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Returns the seconds of start and step on virtual devices, in a process that has them."""
    words = [sys.executable, __file__, "--devices", str(count), "--rounds", str(rounds), "--seconds", str(seconds)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{count} devices: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def on_these_devices(rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Returns the seconds of start and step on all devices of this process: jaxmp's, and a plain `shard_map`."""
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    rows, case = 64, Case(MLP((WIDTH,) * 8), (WIDTH,), 64)
    experiment = Experiment(
        model=case.model,
        task=jaxmp_itself.TASK,
        data=Arrays(lambda split: case.columns() if split == "train" else None, batch_size=rows, images=()),
        optimizer=Adam(1e-3),
        precision="mixed_float16",
        scaler=Scaling(init_scale=FIRST_SCALE),
        loop=Loop(steps=1),
    )
    trainer = Trainer(experiment)
    program, _ = trainer.program()
    state = trainer.devices.put_state(trainer.init())
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = {name: jax.device_put(column, NamedSharding(mesh, P("data"))) for name, column in case.columns().items()}
    ones = jax.device_put(np.ones(rows, np.float32), NamedSharding(mesh, P("data")))
    forward, params = hand_written.forward_of(case)
    tx = optax.adam(1e-3)

    def loss_fn(params: Any, batch: Any) -> Any:
        loss, accuracy = loss_and_accuracy(forward(params, batch["x"], jnp.float16), batch["label"])
        return loss, {"loss": loss, "accuracy": accuracy}

    own_gradients = hand_written.scaled_gradients(loss_fn)

    def gradients(params: Any, batch: Any, scale: Any) -> Any:
        def own(*args: Any) -> Any:
            return jax.lax.pmean(own_gradients(*args), "data")

        specs = P(), P("data"), P()
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(params, batch, scale)

    step = hand_written.scaled(gradients, tx)
    by_hand = jax.device_put(hand_written.first_scaled(params, tx), NamedSharding(mesh, P()))
    todo = {
        "jaxmp": (program, state, ({**split, "weight": ones}, trainer.numbers)),
        "hand-written": (jax.jit(step, donate_argnums=0), by_hand, (split,)),
    }
    runs, start = {}, {}
    for name, (jitted, first, rest) in todo.items():
        began = time.perf_counter()
        compiled = jitted.lower(first, *rest).compile()
        start[name] = time.perf_counter() - began
        runs[name] = repeated(compiled, first, rest)
    times = interleave(runs, rounds=rounds, seconds=seconds)
    return {"start": start, "step": {name: min(of) for name, of in times.items()}}


def repeated(compiled: Any, state: Any, rest: tuple[Any, ...]) -> Run:
    """Runs a compiled step that donates its state, on the same other arguments; waits for each.

    On a CPU, several steps under way may take each other's threads, and wait for an all-reduce for ever.
    """

    def run(count: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(count):
            state, _ = jax.block_until_ready(compiled(state, *rest))
        return (time.perf_counter() - began) / count

    return run


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(size), over the upper half of the sizes."""
    half = len(sizes) // 2 if len(sizes) > 3 else 0
    return float(np.polyfit(np.log(sizes[half:]), np.log(seconds[half:]), 1)[0])


def measure(kind: str, sizes: tuple[int, ...], rounds: int, seconds: float) -> dict[str, Any]:
    """Returns the seconds by size, and the exponents."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    both = True
    for size in sizes:
        if kind == "devices":
            found[size] = of_devices(size, rounds, seconds)
        else:
            found[size] = of_size(kind, size, rounds, seconds, both=both)
        both = both and found[size]["start"]["hand-written"] <= LONGEST
        print(
            kind,
            size,
            {k: {n: f"{1e3 * s:.2f} ms" for n, s in of.items()} for k, of in found[size].items()},
            flush=True,
        )
    compared = [size for size in sizes if "hand-written" in found[size]["step"]]
    result: dict[str, Any] = {"sizes": list(sizes), "compared": compared, "load": load()}
    for what in ("start", "step"):
        by_name = {name: [found[size][what].get(name) for size in sizes] for name in ("jaxmp", "hand-written")}
        exponents = {
            name: round(exponent(compared, [found[size][what][name] for size in compared]), 3) for name in by_name
        }
        result[what] = {"seconds": by_name, "exponent": exponents}
    return result


def plot(axes: Any, result: dict[str, Any]) -> None:
    """Draws the time of a step by size, both logarithmic."""
    for kind, of in result["results"].items():
        for name, style in (("jaxmp", "o-"), ("hand-written", "x--")):
            seconds = [1e6 * s for s in of["step"]["seconds"][name] if s is not None]
            axes.loglog(of["sizes"][: len(seconds)], seconds, style, label=f"{kind}, {name}")
    axes.set_xlabel("number")
    axes.set_ylabel("us a step")
    axes.legend(fontsize="small")


def main(
    output: Path | None = None,
    kinds: tuple[str, ...] = tuple(SIZES),
    rounds: int = 9,
    seconds: float = 0.1,
    quick: bool = False,
    devices: int | None = None,
) -> None:
    """Measures, prints, and writes the results as JSON after each kind.

    Args:
        output: JSON file to write; none by default. What it has already is not measured again.
        kinds: What is to grow.
        rounds: Number of rounds of the steps.
        seconds: Seconds of the faster of both in a round.
        quick: Two small sizes of each in one short round, to see that everything works.
        devices: Only print the figures of the devices of this process, as JSON.
    """
    if devices is not None:
        print(json.dumps(on_these_devices(rounds, seconds)))
        return
    kept = json.loads(output.read_text()) if output is not None and output.exists() else {}
    results: dict[str, Any] = kept.get("results", {})
    for kind in kinds:
        if kind in results:
            continue
        sizes = SMALLEST[kind] if quick else SIZES[kind]
        results[kind] = measure(kind, sizes, 1 if quick else rounds, 0.005 if quick else seconds)
        if output is not None:
            made = provenance(patch=False) | {"rounds": rounds, "results": results}
            output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
