"""`compare`: trains one experiment under several precisions, paired by seed, and measures what sets them apart.

Every cell of the grid has a run folder of its own, that of `jaxmp train CONFIG --precision P --seed S`. So the same
command resumes a comparison that was killed, and runs that are finished or failed are only read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmp.distributed.signals import stop_signals
from jaxmp.errors import InputError, RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.experiment.experiment import Experiment
from jaxmp.instruments.audit import audit
from jaxmp.reports import comparison as pages
from jaxmp.reports.page import command, require_html, write
from jaxmp.reports.run_report import report
from jaxmp.runs.curves import examples_per_second, steps_per_second
from jaxmp.runs.fit import fit, parent_of
from jaxmp.runs.folder import RunFolder
from jaxmp.runs.provenance import provenance
from jaxmp.runs.run import Run
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.gradients import compare_gradients
from jaxmp.studies.grid import Cell, grid
from jaxmp.studies.outcome import recorded_failure, require_all_steps
from jaxmp.studies.paired import method, paired
from jaxmp.text_table import without_nan
from jaxmp.training.metrics import specs_to_json


class Comparison(dict[str, Any]):
    """A comparison as JSON. `print` shows its table, a notebook its table and curves, `save` writes its page."""

    def __str__(self) -> str:
        return pages.text(self)

    def __repr__(self) -> str:
        return f"<comparison of {self['config']}: {', '.join(self['precisions'])}; seeds {self['seeds']}>"

    def _repr_html_(self) -> str:
        """Shows the first table and figures of the page in a notebook."""
        return pages.cell(self)

    def save(self, path: str | Path) -> None:
        """Writes the page, the JSON beside it, and the report of each run in its folder, which the page leads to.

        Raises: InputError if a file cannot be written.
        """
        save(self, Path(path).expanduser())


def compare(
    subject: Experiment | ConfigFile,
    precisions: Sequence[str] = ("float32", "mixed_bfloat16", "mixed_float16"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    name: str = "experiment",
    overrides: Sequence[str] = (),
    workdir: str = "runs",
    gradients: int = 0,
    gradients_against: str = "float64",
    log: Callable[[str], None] = print,
) -> Comparison | None:
    """Trains those runs of the grid that are not finished yet, and measures differences, memory and operations.

    Args:
      subject: the experiment to train, or a config file.
      precisions: what `--precision` takes; all others are compared with the first.
      seeds: one run of each precision each.
      name: of the experiment, as `jaxmp.fit` takes it; a config file has its own.
      overrides: for a config file, further arguments of `jaxmp train` for all runs.
      workdir: folder of all runs.
      gradients: at how many states of the first run to compare gradients; see `compare_gradients`.
      gradients_against: `float64`, or `float32` with the random masks of training.
      log: takes each message to the user.

    Returns:
      The comparison, a dict for JSON that prints as a table; None if a signal stopped a run, after saving it. A run
      that failed is included, with its message.

    Raises: InputError as `grid` and `fit` do, before anything is trained.
    """
    require_gradients(gradients)
    cells, results = grid(subject, precisions, seeds, overrides), []
    name = subject.name if isinstance(subject, ConfigFile) else name
    for i, cell in enumerate(cells):
        log(f"[{i + 1}/{len(cells)}] {cell.precision}, seed {cell.seed}")
        origin = subject.origin(cell.overrides) if isinstance(subject, ConfigFile) else None
        result = train_cell(cell, workdir, name, origin, log)
        if result is None:
            return None
        results.append(result)
    trainer = Trainer(cells[0].experiment)
    log("measuring memory and operations")
    of_precision = [_of_precision(cell) for cell in cells[: len(precisions)]]
    errors = None
    if gradients:
        log("measuring gradients")
        experiments = {cell.precision: cell.experiment for cell in cells[: len(precisions)]}
        errors = compare_gradients(experiments, gradients, against=gradients_against)
    found = {
        "config": name,
        "about": subject.docstring.partition("\n")[0] if isinstance(subject, ConfigFile) else "",
        "overrides": list(overrides),
        "precisions": list(precisions),
        "seeds": list(seeds),
        "command": command(),
        **{name: value for name, value in provenance(patch=False).items() if name != "command"},
        "metrics": specs_to_json(trainer.metric_specs),
        "monitor": trainer.monitor.name,
        "interval": method(len(seeds)),
        "differences": differences(results, precisions),
        "measured": of_precision,
        "gradients": errors,
        "runs": results,
    }
    return Comparison(found)


def require_gradients(steps: int) -> None:
    """Raises InputError if gradients cannot be compared at so many steps."""
    if steps < 0:
        raise InputError(f"gradients at {steps} steps: expected a whole number of at least 0")


def train_cell(
    cell: Cell, workdir: str, name: str, origin: dict[str, Any] | None, log: Callable[[str], None], **begins: Any
) -> dict[str, Any] | None:
    """Trains one run of a grid, unless it is finished or failed, and returns it as JSON; None if a signal stopped it.

    A run that failed has the message under `failed`, and no metrics or devices if it failed before it had a folder.
    `begins` is what `fit` takes for the weights that it begins with. Raises: InputError as `fit` does, and for a run
    that a hook ended early.
    """
    experiment, parent = cell.experiment, parent_of(**begins)
    folder = RunFolder.of(experiment, workdir, name, None if parent is None else parent.begins_with)
    before, failed = _peak(), recorded_failure(folder, experiment, log)
    with stop_signals() as stopped:  # `fit` looks no more after its last step: a signal in its end would be lost
        try:
            fitted = None if failed else fit(experiment, workdir=workdir, name=name, origin=origin, log=log, **begins)
        except RunFailed as error:
            failed = str(error)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failed = f"out of memory: {str(error).partition(chr(10))[0]}"
        else:
            if fitted is not None:
                if fitted.stopped:
                    return None
                require_all_steps(fitted)
        if stopped():
            log("stopped after this run; the same command goes on from there")
            return None
    if failed:
        log(f"failed: {failed}")
    run = None if folder.is_unused() else Run(folder.path)
    metrics = [] if run is None else run.metrics
    after = _peak()
    return {
        "precision": cell.precision,
        "seed": cell.seed,
        "run": str(folder.path),
        "failed": failed,
        "summary": {} if run is None or failed else run.summary,
        "examples_per_second": without_nan(examples_per_second(metrics)),
        "seconds_per_step": without_nan(1 / steps_per_second(metrics)),
        # A process has one peak, for all that it ran: only a run that raised it is known by it.
        "device_peak_bytes": after if after is not None and after > (before or 0) else None,
        "devices": [] if run is None else run.config["devices"],
        "metrics": metrics,
    }


def _peak() -> int | None:
    """The most memory that this process has held on a device, in bytes; None if the device does not report it."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _of_precision(cell: Cell) -> dict[str, Any]:
    """Memory, operations and audit findings of a precision's step, which do not depend on the seed."""
    # pmap runs the same step, which wants its arrays stacked.
    parallel = dataclasses.replace(cell.experiment.parallel, mode="jit")
    trainer = Trainer(dataclasses.replace(cell.experiment, parallel=parallel))
    step, arguments = trainer.program()
    memory = step.lower(*arguments).compile().memory_analysis()
    seen = audit(step, *arguments, policy=cell.experiment.policy, modules=trainer.explain())
    flops = seen.flops_by_operands
    return {
        "precision": cell.precision,
        "policy": str(cell.experiment.policy),
        "scaler": _scalers(cell.experiment),
        "memory": {
            "arguments_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        },
        "dot_flops": sum(flops.values()),
        "dot_flops_share": {dtype: n / sum(flops.values()) for dtype, n in flops.items()},
        "casts": sum(cast.times for cast in seen.casts),
        "findings": [str(finding) for finding in seen.findings],
    }


def _scalers(experiment: Experiment) -> str:
    """The scaler as text; those of several objectives by name."""
    scalers = experiment.make_scalers()
    return ", ".join(f"{name}: {scaler}" for name, scaler in scalers.items()) or str(experiment.make_scaler())


def differences(results: Sequence[dict[str, Any]], precisions: Sequence[str]) -> list[dict[str, Any]]:
    """Computes each metric on the test set by precision, and its paired differences to the first precision.

    A seed is a pair only if both of its runs ended with a finite value: others are None in a summary.
    """
    ended = {(r["precision"], r["seed"]): r["summary"]["test"] for r in results if not r["failed"]}
    metrics = sorted({name for test in ended.values() for name in test})
    found = []
    for metric in metrics:
        for precision in precisions:
            values = {
                seed: test[metric]
                for (p, seed), test in ended.items()
                if p == precision and test.get(metric) is not None
            }
            reference = {seed: ended.get((precisions[0], seed), {}).get(metric) for seed in values}
            pairs = {seed: v - r for seed, v in values.items() if (r := reference[seed]) is not None}
            versus = paired(list(pairs.values())) if precision != precisions[0] else None
            found.append(
                {
                    "metric": metric,
                    "precision": precision,
                    "values": values,
                    "mean": statistics.fmean(values.values()) if values else None,
                    "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
                    "pairs": pairs if versus else None,
                    "difference": versus and without_nan(versus._asdict()),
                }
            )
    return found


def save(comparison: dict[str, Any], output: Path) -> None:
    """Writes the page to `output`, the JSON beside it, and the report of each run in its folder.

    A run folder that is not there any more is left out. Raises InputError if a file cannot be written, or `output` is
    that of the JSON.
    """
    require_html("output", output)
    reports = {}
    for path in dict.fromkeys(result["run"] for result in comparison["runs"]):
        folder = RunFolder(Path(path))
        if folder.is_unused():
            continue
        report([Run(path)]).write(folder.report)
        reports[path] = os.path.relpath(folder.report, output.parent)
    write(output.with_suffix(".json"), json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    pages.page(comparison, reports).write(output)
