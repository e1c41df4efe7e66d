"""Counts what policies, dynamic scaling and recipes add to a train step: kernels, selects, bytes, memory.

    JAX_PLATFORMS=cpu python experiments/benchmarks/run.py scaling_cost

The step is compiled for an H100, which need not be there; only the CUDA build of JAX is necessary. Nothing is run. With
`--target cpu` the step is compiled for the CPU here, to see that everything works. A kernel count is of launches in one
step, loops turned out; selects are those in the compiled program's text, inside of fusions too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from large_models import Workload, spec_of, workloads

from jaxmp import DynamicScaler, TrainState, loss_scaling, make_train_step
from jaxmp.cli import script
from jaxmp.instruments.audit import audit
from jaxmp.instruments.program import Program
from jaxmp.instruments.target import COMPILER_OPTIONS, Target
from jaxmp.runs.provenance import provenance

BESIDE = {
    "float32": None,
    "mixed_bfloat16": "float32",
    "mixed_bfloat16, dynamic scaling": "mixed_bfloat16",
    "mixed_float16, no scaling": "float32",
    "mixed_float16, dynamic scaling": "mixed_float16, no scaling",
}
"""what is counted, and beside which other"""


def step_of(workload: Workload, name: str) -> tuple[Any, Any, Any]:
    """Returns a step and the shapes of its arguments."""
    precision = name.partition(",")[0]
    tx: Any = workload.optimizer()
    tx = loss_scaling(tx, DynamicScaler()) if "dynamic" in name else tx

    def init(key: jax.Array) -> TrainState:
        params, model_state = workload.init(key)
        return TrainState.create(params, tx, key=key, model_state=model_state)

    state = jax.eval_shape(init, jax.random.key(0))
    return make_train_step(workload.loss(precision), tx), state, spec_of(workload.batch())


def counted(workload: Workload, name: str, target: str) -> dict[str, Any]:
    """Returns the figures of one program."""
    step, state, batch = step_of(workload, name)
    half = name.startswith("mixed")
    jitted = jax.jit(step, donate_argnums=0)
    findings = audit(jitted, state, batch, policy=name.partition(",")[0]).findings if half else ()
    args, options = (state, batch), {}
    if target != "cpu":
        args, options = Target.parse(target).place(args), COMPILER_OPTIONS
    compiled = jitted.lower(*args).compile(options)
    program = Program.read(compiled, target)
    products = [kernel for kernel in program.kernels if kernel.kind in ("product", "convolution")]
    numbers = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.number)]
    return {
        "beside": BESIDE[name],
        "kernels": sum(kernel.times for kernel in program.kernels),
        "selects": len(re.findall(r"\bselect\(", compiled.as_text())),
        "arguments": program.memory.arguments,
        "donated": program.memory.aliased,
        "state": sum(leaf.size * leaf.dtype.itemsize for leaf in numbers),
        "temporaries": program.memory.temporaries,
        "peak": program.memory.peak,
        "float32 products": sum(each.times for each in products if each.dtype == "float32"),
        "findings": sorted({f"{each.rule}: {each.path}" for each in findings if each.rule == "float32 dot"}),
    }


def counted_or_why_not(workload: Workload, name: str, target: str) -> dict[str, Any]:
    """Returns the figures of one program; `{"why not": ...}` if XLA does not compile it where there is no GPU."""
    try:
        return counted(workload, name, target)
    except jax.errors.JaxRuntimeError as error:
        return {"beside": BESIDE[name], "why not": str(error).splitlines()[0]}


def main(
    output: Path | None = None,
    target: str = "h100",
    models: tuple[str, ...] = (),
    steps: tuple[str, ...] = tuple(BESIDE),
    quick: bool = False,
) -> None:
    """Compiles and counts, prints, and writes the results as JSON after each model.

    Args:
        output: JSON file to write; none by default. What it has already is not counted again.
        target: GPU to compile for, or cpu.
        models: Names of models; all by default.
        steps: Steps to count; with each, the one that it stands beside.
        quick: Toys instead of the models, to see that everything works.
    """
    kept = json.loads(output.read_text()) if output is not None and output.exists() else {}
    results: dict[str, Any] = kept.get("results", {})
    for model, workload in workloads(toys=quick).items():
        if (models and model not in models) or model in results or model == "LSTM":
            continue
        results[model] = {name: counted_or_why_not(workload, name, target) for name in steps}
        print(model, json.dumps(results[model], indent=1), flush=True)
        if output is not None:
            made = provenance(patch=False) | {"target": target, "results": results}
            output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
