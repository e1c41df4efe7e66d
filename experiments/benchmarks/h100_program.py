"""Compiles the train steps of configs for H100s, in several precisions, and lists the kernels; needs no GPU.

    JAX_PLATFORMS=cpu python experiments/benchmarks/run.py h100_program

Needs the CUDA build of JAX. For each config, precision and target, it reports how many kernels a step launches, by kind
and dtype, the memory per GPU in bytes, and the collectives. Nothing is run, so there are no times. Kernels are not
autotuned, so that a real run may use another kernel for a product; dtypes, memory and collectives are the same.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.instruments.audit import audit
from jaxmp.instruments.target import Target
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer


def summary(config: str, precision: str, target: Target) -> dict[str, Any]:
    """Returns the figures of the compiled train step of a config."""
    experiment = dataclasses.replace(ConfigFile.find(config).experiment(), precision=precision)
    trainer = Trainer(experiment, target.mesh())
    step, arguments = trainer.program()
    policy, modules = experiment.policy, trainer.explain()
    report = audit(step, *arguments, policy=policy, modules=modules, target=target)
    assert report.program is not None
    program = report.program.to_json()
    return {
        "batch size": experiment.data.batch_size,
        "flops of products": report.dot_flops_by_dtype,
        "kernels": sum(row["times"] for row in program["launches"]),
        "kernels by kind and dtype": {f"{row['kind']} {row['dtype']}": row["times"] for row in program["launches"]},
        "memory of a GPU, in bytes": program["memory"],
        "collectives": [f"{each['kind']} {each['dtype']} {each['nbytes']} bytes" for each in program["collectives"]],
        "findings": [f"{finding.rule}: {finding.what} [{finding.path}]" for finding in report.findings],
    }


def measure(
    configs: tuple[str, ...] = ("digits_cnn", "mnist_cnn"),
    precisions: tuple[str, ...] = ("float32", "mixed_bfloat16", "mixed_float16"),
    targets: tuple[str, ...] = ("h100", "h100x8"),
    output: Path | None = None,
) -> None:
    """Compiles every combination, and prints the figures or writes them to a file.

    Args:
      configs: names of configs.
      precisions: values of --precision.
      targets: GPUs to compile for, such as h100 or h100x8 (eight of them).
      output: file to write the figures to.
    """
    results = {
        config: {
            target: {precision: summary(config, precision, Target.parse(target)) for precision in precisions}
            for target in targets
        }
        for config in configs
    }
    text = json.dumps({**provenance(patch=False), "results": results}, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(script(measure))
