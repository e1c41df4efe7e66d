"""Trains a config with its optimizer's state in several formats, paired by seed: loss, accuracy, memory.

    python experiments/optimizer_state/state_format.py --output experiments/optimizer_state/digits_mlp.json

The runs are those of `jaxmp train CONFIG --precision float32 --optimizer.state-format FORMAT --seed SEED`, in the same
folders; a run that is already finished is read and not repeated, one that diverges is None. Differences are to float32
state, with 95 % t intervals over seeds. Memory is that of one device: the moments as `jaxmp.memory` counts them, and
the arguments of the compiled step (state and batch) and its temporaries as the compiler reports them.

Result (digits_mlp.json, three seeds): with range expansion, 8-bit moments take 26 % of the bytes of float32 moments,
and the test loss is no larger. Without it, Adam diverges with all seeds, since second moments that are rounded to 0
make large updates. On a CPU, the emulation needs more temporary memory than this small model saves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxmp import fit
from jaxmp.cli import script
from jaxmp.errors import RunFailed
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.runs.provenance import provenance
from jaxmp.runs.trainer import Trainer
from jaxmp.studies.memory import memory
from jaxmp.studies.paired import method, paired
from jaxmp.text_table import without_nan

FORMATS = (
    "float32",
    "mu=block128,nu=block128,expanded",
    "mu=block128,nu=block128",
    "mu=block128,nu=block128,expanded,nearest",
)
MEASURES = {"test loss": "loss", "test accuracy": "accuracy"}


def experiment_of(file: ConfigFile, format: str, *options: str) -> tuple[Any, dict[str, Any]]:
    """The experiment with its optimizer's state in `format`, and how it is made again."""
    state = [] if format == "float32" else ["--optimizer.state-format", format]
    overrides = ["--precision", "float32", *state, *options]
    return file.experiment(overrides), {"source": file.source, "file": file.file, "overrides": overrides}


def results(file: ConfigFile, format: str, seeds: tuple[int, ...], workdir: Path) -> dict[str, list[float | None]]:
    """Returns each measure of one run per seed, None of runs that diverge; trains runs that do not exist yet."""
    found: dict[str, list[float | None]] = {name: [] for name in MEASURES}
    for seed in seeds:
        experiment, origin = experiment_of(file, format, "--seed", str(seed))
        try:
            fitted = fit(experiment, workdir=workdir, name=file.name, origin=origin, log=lambda message: None)
        except RunFailed as why:
            print(f"{format}, seed {seed}: {why}", flush=True)
            for of in found.values():
                of.append(None)
            continue
        if fitted.stopped:
            raise SystemExit(75)
        for name, key in MEASURES.items():
            found[name].append(fitted.summary["test"][key])
    return found


def memory_of(file: ConfigFile, format: str) -> dict[str, int]:
    """Bytes on one device: the moments as predicted, and what the compiler reports of the step."""
    experiment, _ = experiment_of(file, format)
    step, arguments = Trainer(experiment).program()
    compiled = step.lower(*arguments).compile().memory_analysis()
    return {
        "moments, predicted": memory(experiment).nbytes("moments"),
        "state and batch, compiled": compiled.argument_size_in_bytes,
        "temporaries, compiled": compiled.temp_size_in_bytes,
    }


def main(
    config: str = "digits_mlp",
    formats: tuple[str, ...] = FORMATS,
    seeds: tuple[int, ...] = (0, 1, 2),
    workdir: Path = Path("runs"),
    output: Path | None = None,
) -> None:
    """Trains the runs that do not exist yet, and prints a table.

    Args:
      config: what to train.
      formats: state formats; the first is what the others are compared with.
      seeds: one run of each format each; none measures the memory alone.
      workdir: folder of all runs.
      output: file for the results, as JSON.
    """
    file = ConfigFile.find(config)
    rows: list[dict[str, Any]] = []
    for format in formats:
        row: dict[str, Any] = {"state_format": format, "memory": memory_of(file, format)}
        row |= {"results": results(file, format, seeds, workdir)} if seeds else {}
        for name in MEASURES if rows and seeds else ():
            pairs = zip(row["results"][name], rows[0]["results"][name], strict=True)
            differences = [own - first for own, first in pairs if own is not None]
            row.setdefault("differences", {})[name] = paired(differences)._asdict()
        rows.append(row)
        print(format, row["memory"], row.get("differences") or row.get("results"), flush=True)
    if output is not None:
        own = "python experiments/optimizer_state/state_format.py"
        how = f"{own} --config {config} --seeds {' '.join(map(str, seeds))} --output {output}"
        content = {**provenance(patch=False), "command": how, "method": method(len(seeds)), "rows": rows}
        output.write_text(json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
