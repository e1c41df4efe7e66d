"""Compares the speed of jaxmp's train step with that of other frameworks, on the same models, data and optimizer.

    python experiments/benchmarks/run.py peers

makes the environment of `requirements.txt` and runs this in it; by hand, in an environment that has these packages:

    python experiments/benchmarks/peers.py --output peers.json

All of them run in one process, in interleaved rounds, so that other load on the machine affects all of them. Times are
relative to a step written by hand in plain JAX for this model and precision (peer_steps/hand_written.py). Float16 is
always with dynamic loss scaling, in everyone's own way. Each precision has two tables: one step a dispatch, on one
batch; and as many steps a dispatch as the framework makes of data that it holds (`steps`, `fit` of jaxmp and of Keras;
a `fori_loop` around the others' steps). XLA:CPU runs the gradients of convolutions naively in loops: there, a step of
a CNN is dispatched singly in the second table too.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from interleaved import Run, interleave, load, runs_here, summary, timed
from peer_steps import hand_written, jaxmp_itself
from peer_steps.cases import Case, cases

from jaxmp.cli import script
from jaxmp.runs.provenance import provenance
from jaxmp.text_table import table

BASELINE = "hand-written"
BOUNDARY = "hand-written, jaxmp's state"
"""the hand-written step with what jaxmp's takes and returns beside it: what that costs where a step is dispatched"""
JAX_PEERS = {"Flax": "flax_linen", "Haiku and jmp": "haiku_jmp", "mpx": "mpx_equinox"}
"""peers that have a `make(case, precision) -> (step, state)`, by the file in peer_steps"""
PRECISIONS = ("float32", "bfloat16", "float16")
CLOSE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""how far a loss of jaxmp's may be from that of the hand-written step, which has the same weights, relatively"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the times are taken."""

    rounds: int
    seconds: float
    """of the fastest in a round"""
    torch_compile: bool = False


def module_of(peer: str) -> Any:
    """Imports a file of peer_steps; None if what it compares is not installed."""
    try:
        return importlib.import_module(f"peer_steps.{peer}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("peer_steps"):
            raise
        return None


def jax_steps(case: Case, precision: str) -> dict[str, tuple[Any, Any]]:
    """Returns `(step, state)` of everyone who has a step of their own, by name."""
    found = {BASELINE: hand_written.make(case, precision), "jaxmp": jaxmp_itself.make(case, precision)}
    if precision != "float16":
        found["jaxmp, NoScaler"] = jaxmp_itself.make(case, precision, no_scaler=True)
        found[BOUNDARY] = hand_written.with_state_of_jaxmp(case, *found[BASELINE])
    for name, file in JAX_PEERS.items():
        module = module_of(file)
        if module is not None and precision in getattr(module, "PRECISIONS", PRECISIONS):
            found[name] = module.make(case, precision)
    return found


def loss_of(metrics: Any) -> float:
    """The loss among a step's metrics, which are jaxmp's means or plain numbers."""
    loss = metrics["loss"]
    return float(loss.compute() if hasattr(loss, "compute") else loss)


def parameters(state: Any) -> int:
    """The number of parameters in a state of SGD without momentum: the elements of its float32 arrays, not scalars."""
    return sum(x.size for x in jax.tree.leaves(state) if hasattr(x, "size") and x.dtype == jnp.float32 and x.ndim)


def check_parameters(case: Case, found: dict[str, tuple[Any, Any]]) -> dict[str, int]:
    """Returns everyone's number of parameters, torch's and Keras's too. Raises RuntimeError if they are not equal."""
    counts = {name: parameters(state) for name, (_, state) in found.items()}
    for name, file in {"torch": "torch_amp", "Keras": "keras_jax"}.items():
        module = module_of(file)
        if module is not None:
            counts[name] = module.parameters(case)
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"not the same model: the numbers of parameters are {counts}")
    return counts


def check_losses(case: Case, precision: str, found: dict[str, tuple[Any, Any]]) -> dict[str, dict[str, float]]:
    """Returns everyone's losses of the first and the fifth step, on one batch: `{"jaxmp": {"1": 2.3, "5": 2.2}}`.

    Raises RuntimeError if a loss does not fall, or if one of jaxmp's is not that of the hand-written step within
    `CLOSE`: they begin with the same weights. The others draw first weights of their own.
    """
    losses: dict[str, dict[str, float]] = {}
    batch = case.batch()
    for name, (step, state) in found.items():
        jitted = jax.jit(step)
        losses[name] = {}
        for i in range(1, 6):
            state, metrics = jitted(state, batch)
            losses[name] |= {str(i): loss_of(metrics)} if i in (1, 5) else {}
    for name, of in losses.items():
        if not of["5"] < of["1"]:
            raise RuntimeError(f"{name} does not train: the losses of steps 1 and 5 are {losses}")
        close = [np.isclose(of[i], losses[BASELINE][i], rtol=CLOSE[precision], atol=0) for i in of]
        if name.startswith("jaxmp") and not all(close):
            raise RuntimeError(f"not the same model: the losses of steps 1 and 5 are {losses}")
    return losses


def singly(step: Any, state: Any, batch: Any) -> Run:
    """One step a dispatch, on one batch; the state is donated."""
    jitted, state = jax.jit(step, donate_argnums=0), jax.tree.map(jnp.copy, state)

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = jitted(state, batch)
        jax.block_until_ready(state)

    return timed(steps)


def over_data(step: Any, state: Any, case: Case, epoch: int, *, loop: bool) -> Run:
    """Steps on data held on the device, in a shuffled order, as a user writes it; many a dispatch with `loop`."""
    columns = jax.device_put(case.columns(epoch))
    state, rng = jax.tree.map(jnp.copy, state), np.random.default_rng(0)

    def advance(state: Any, columns: Any, order: Any, i: Any) -> Any:
        batch = jax.tree.map(lambda column: jnp.take(column, order[i], axis=0), columns)
        return step(state, batch)

    def many(state: Any, columns: Any, order: Any, count: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            state, sums = carry
            state, metrics = advance(state, columns, order, i)
            return state, jax.tree.map(jnp.add, sums, metrics)

        sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(advance, state, columns, order, 0)[1])
        return jax.lax.fori_loop(0, count, body, (state, sums))

    many_steps, one_step = jax.jit(many, donate_argnums=0), jax.jit(advance, donate_argnums=0)

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count // epoch):
            order = jnp.asarray(rng.permutation(epoch * case.rows).astype(np.int32).reshape(epoch, case.rows))
            if loop:
                state, _ = many_steps(state, columns, order, epoch)
                continue
            for i in range(epoch):
                state, _ = one_step(state, columns, order, np.int32(i))
        jax.block_until_ready(state)

    return timed(steps)


def one_step_a_dispatch(case: Case, precision: str, how: Settings, steps: dict[str, tuple[Any, Any]]) -> Any:
    """Times everyone with one step a dispatch."""
    batch = case.batch()
    runs = {name: singly(step, state, batch) for name, (step, state) in steps.items()}
    torch_amp = module_of("torch_amp")
    if torch_amp is not None:
        kinds = {"torch, eager": False} | ({"torch, compiled": True} if how.torch_compile else {})
        for name, compiled in kinds.items():
            run = timed(torch_amp.make_steps(case, precision, compiled=compiled))
            if runs_here(name, run):
                runs[name] = run
    return summary(interleave(runs, rounds=how.rounds, seconds=how.seconds), BASELINE)


def many_steps_a_dispatch(case: Case, precision: str, how: Settings, steps: dict[str, tuple[Any, Any]]) -> Any:
    """Times everyone with as many steps a dispatch as they make, on data that they hold: a round is an epoch.

    `fit` runs around all others, which have their turn between two of its epochs.
    """
    loop = not (case.convolves and jax.default_backend() == "cpu")
    batch = case.batch()
    probe = singly(*steps[BASELINE], batch)
    probe(2)
    epoch = max(2, min(500, int(how.seconds / probe(5))))
    runs = {
        name: over_data(step, state, case, epoch, loop=loop)
        for name, (step, state) in steps.items()
        if not name.startswith("jaxmp") and name != BOUNDARY
    }
    turns = how.rounds + 2
    runs["jaxmp, steps()"] = timed(jaxmp_itself.steps_of(case, precision, epoch=epoch, epochs=turns))
    keras_jax = module_of("keras_jax")
    if keras_jax is not None:
        at_once = min(epoch, 50) if loop else 1
        run = timed(keras_jax.make_fit(case, precision, steps_per_execution=at_once))
        if runs_here("Keras, fit", run, epoch):
            runs["Keras, fit"] = run
    times: dict[str, list[float]] = {name: [] for name in (*runs, "jaxmp, fit()")}

    def between(seconds: float) -> None:
        times["jaxmp, fit()"].append(seconds)
        for name, run in runs.items() if len(times["jaxmp, fit()"]) % 2 else reversed(runs.items()):
            times[name].append(run(epoch))

    jaxmp_itself.fit_around(case, precision, epoch=epoch, epochs=turns, between=between)
    return summary({name: each[2:] for name, each in times.items()}, BASELINE) | {"steps_a_round": epoch}


def main(
    output: Path | None = None,
    size: Literal["small", "tiny"] = "small",
    models: tuple[str, ...] = (),
    precisions: tuple[Literal["float32", "bfloat16", "float16"], ...] = PRECISIONS,
    rounds: int = 9,
    seconds: float = 0.2,
    quick: bool = False,
    torch_compile: bool = False,
) -> None:
    """Runs all comparisons, prints tables, and writes the results as JSON after each.

    Args:
        output: JSON file to write; none by default. What it has already is not measured again.
        size: Sizes of the models; tiny ones show that it runs.
        models: Names of the models; all by default.
        precisions: Compute dtypes.
        rounds: Number of rounds, 7 or more for results that are kept.
        seconds: Seconds of the fastest of them in a round.
        quick: 3 short rounds, to see that everything works.
        torch_compile: Also time torch.compile; on a CPU it takes a C++ compiler, and a minute for each.
    """
    how = Settings(3 if quick else rounds, 0.02 if quick else seconds, torch_compile)
    kept = json.loads(output.read_text()) if output is not None and output.exists() else {}
    results: dict[str, Any] = kept.get("results", {})
    for name, case in cases(size).items():
        for precision in precisions:
            key = f"{name}, {precision}"
            if (models and name not in models) or key in results:
                continue
            steps = jax_steps(case, precision)
            counts, losses = check_parameters(case, steps), check_losses(case, precision, steps)
            one = one_step_a_dispatch(case, precision, how, steps)
            many = many_steps_a_dispatch(case, precision, how, steps)
            results[key] = {
                "rows": case.rows,
                "parameters": counts,
                "losses_of_steps": losses,
                "load": load(),
                "one step a dispatch": one,
                "many steps a dispatch": many,
            }
            report(key, results[key])
            if output is not None:
                origin = provenance(patch=False) | {"peers": versions(), "rounds": how.rounds, "seconds": how.seconds}
                output.write_text(json.dumps(origin | {"results": results}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Returns the versions of the peers that are installed."""
    modules = [module_of(file) for file in (*JAX_PEERS.values(), "keras_jax", "torch_amp")]
    packages = sorted({package for module in modules if module for package in module.PACKAGES})
    return {package: importlib.metadata.version(package) for package in packages}


def report(key: str, result: dict[str, Any]) -> None:
    """Prints the ratios of one model and precision."""
    for kind in ("one step a dispatch", "many steps a dispatch"):
        rows = [
            (name, f"{each['min_us']:.0f}", f"{each['ratio']:.3f}", f"{each['median_ratio']:.3f}")
            for name, each in result[kind].items()
            if isinstance(each, dict)
        ]
        print(f"{key}, {kind}; load {result['load']}")
        print(table(rows, header=("", "us a step", "ratio", "median"), right=(1, 2, 3), indent=2), flush=True)


if __name__ == "__main__":
    sys.exit(script(main))
