"""Checks the laws of jaxmp.testing on published systems, and prints a table.

    uv run --with-requirements experiments/conformance/requirements.txt --with torch --with torchao \
        python experiments/conformance/conformance.py --output experiments/conformance/conformance.json

Each file in `systems` has a function `subjects()`. It returns adapters for one system, used as in its documentation or
its examples. Systems are tested in the installed version; systems that are not installed are left out, with a line that
says so. Where the output file has rows of such a system, of an earlier run, they stay; `earlier` in it has the command,
revision and versions of that run by system. "holds" means that hypothesis found no counterexample with the examples of
its quick profile.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.metadata
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from subject import Subject

from jaxmp.cli import script
from jaxmp.errors import InputError
from jaxmp.runs.provenance import provenance

SYSTEMS = (
    "jaxmp_itself",
    "jmp_and_haiku",
    "flax_dynamic_scale",
    "mpx_library",
    "jaxamp_library",
    "keras_on_jax",
    "optax_wrappers",
    "torch_grad_scaler",
    "quantisers_of_jax",
    "qwix_library",
    "gfloat_library",
    "keras_quantisers",
    "torchao_library",
)


def rows_of(subject: Subject, versions: dict[str, str]) -> list[dict[str, Any]]:
    """Returns a row for each law, as JSON."""
    version = ", ".join(f"{package} {versions[package]}" for package in subject.packages)
    rows = []
    for law in subject.laws.laws:
        if law in subject.not_asked:
            verdict, words = "skipped", subject.not_asked[law]
        else:
            _, _, verdict, words = subject.laws[law]
        rows.append({"system": subject.name, "version": version, "law": law, "verdict": verdict, "words": words})
    return rows


def line(row: dict[str, Any]) -> str:
    """Formats a row as a line of a Markdown table."""
    words = " ".join(row["words"].split()).replace("|", "\\|")
    return f"| {row['system']} | {row['version']} | `{row['law']}` | {row['verdict']} | {words} |"


def log(message: str) -> None:
    """Prints to stderr, so that stdout contains only the table."""
    print(message, file=sys.stderr, flush=True)


def run(system: str) -> dict[str, Any]:
    """Tests one system in a new process; returns its `rows` and `versions`, or the reason why it is `left_out`."""
    started = time.monotonic()
    try:
        subjects = importlib.import_module(f"systems.{system}").subjects()
    except ModuleNotFoundError as error:
        log(f"left out: {system}, since {error.name} is not installed")
        return {"rows": [], "versions": {}, "left_out": f"{error.name} is not installed"}
    versions = {name: importlib.metadata.version(name) for subject in subjects for name in subject.packages}
    rows = [row for subject in subjects for row in rows_of(subject, versions)]
    broken = sum(row["verdict"] == "broken" for row in rows)
    log(f"{system}: {broken} of {len(rows)} laws broken, {time.monotonic() - started:.0f} s")
    return {"rows": rows, "versions": versions, "left_out": None}


def earlier(output: Path | None, tested: set[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the rows that the output file has of systems that were not tested now, and by system what measured them.

    Args:
        output: JSON file of an earlier run; there may be none.
        tested: Names of the systems that were tested now.
    """
    if output is None or not output.exists():
        return [], {}
    old = json.loads(output.read_text())
    rows = [row for row in old["rows"] if row["system"] not in tested]
    own = {name: old[name] for name in ("command", "git", "versions")}
    return rows, {system: old["earlier"].get(system, own) for system in dict.fromkeys(row["system"] for row in rows)}


def main(systems: tuple[str, ...] = SYSTEMS, processes: int = 2, output: Path | None = None) -> None:
    """Runs the laws and prints the table.

    Args:
        systems: Names of files in the folder `systems`.
        processes: Number of systems to test at the same time.
        output: JSON file to write; none by default.
    """
    for system in systems:
        if system not in SYSTEMS:
            raise InputError(f"--systems {system}: there is no such file; there are {', '.join(SYSTEMS)}")
    # A process for each: Haiku and Keras keep policies for the whole process.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, max_tasks_per_child=1) as pool:
        found = dict(zip(systems, pool.map(run, systems), strict=True))
    rows = [row for result in found.values() for row in result["rows"]]
    more, measured = earlier(output, {row["system"] for row in rows})
    rows += more
    print("| system | version | law | verdict | smallest counterexample, or why skipped |\n|---|---|---|---|---|")
    print("\n".join(map(line, rows)))
    if output is not None:
        origin = provenance(patch=False)
        for result in found.values():
            origin["versions"] |= result["versions"]
        left_out = {system: result["left_out"] for system, result in found.items() if result["left_out"]}
        found_now = {"left_out": left_out, "earlier": measured, "rows": rows}
        output.write_text(json.dumps(origin | found_now, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
