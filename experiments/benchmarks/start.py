"""Measures how long it takes to begin: importing, `jaxmp --help`, and to the first step, and a whole short run.

    python experiments/benchmarks/run.py start

All is timed from the shell, a process each, in interleaved rounds. `digits_mlp` is what the programs of start_programs
train: jaxmp's command line, the same by hand in JAX, by Keras on JAX, and by torch. "cold" has no compile cache, "warm"
finds all in JAX's persistent cache, made by a run before. The parts of the first step come from processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from interleaved import load

from jaxmp.cli import script
from jaxmp.runs.provenance import provenance

PROGRAMS = Path(__file__).parent / "start_programs"
CONTENDERS = {
    "jaxmp": "jaxmp_train",
    "hand-written": "hand_written",
    "Keras": "keras_fit",
    "torch": "torch_loop",
}
NEEDED = {"Keras": "keras", "torch": "torch"}


def timed(command: list[str], cache: str | None) -> dict[str, float]:
    """Wall and processor seconds of a process. Raises RuntimeError if it fails.

    Args:
      command: what to run.
      cache: folder of JAX's persistent compile cache; None for none.
    """
    # Without Python's own cache, every process would compile the source of all that it imports.
    without = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if name not in without}
    if cache is not None:
        env |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    children = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "processor": children}


def commands(steps: int, folder: Path, contenders: tuple[str, ...]) -> dict[str, tuple[list[str], str | None]]:
    """Returns what is timed, by name: a command, and its compile cache. Each run has a folder of its own."""
    python = sys.executable
    cli = "import sys; from jaxmp.cli import main; sys.exit(main())"
    found: dict[str, tuple[list[str], str | None]] = {
        "import numpy": ([python, "-c", "import numpy"], None),
        "import jax, flax, optax": ([python, "-c", "import jax, flax.linen, optax"], None),
        "import jaxmp": ([python, "-c", "import jaxmp"], None),
        "jaxmp --help": ([python, "-c", cli, "--help"], None),
    }
    there = [name for name in contenders if name not in NEEDED or importlib.util.find_spec(NEEDED[name])]
    for name in there:
        for kind, count in (("first step", 1), (f"{steps} steps", steps)):
            for cached in (None, str(folder / "cache")):
                if name == "torch" and cached:
                    continue
                program = [python, str(PROGRAMS / f"{CONTENDERS[name]}.py"), str(count)]
                found[f"{kind}, {name}, {'warm' if cached else 'cold'}"] = program, cached
    return found


def measure(rounds: int, steps: int, contenders: tuple[str, ...] = tuple(CONTENDERS)) -> dict[str, Any]:
    """Returns the fastest and the median seconds of each, wall and processor, and the parts of the first step.

    With no round, only the one that fills the caches is timed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        todo, times = commands(steps, folder, contenders), dict[str, list[dict[str, float]]]()
        for turn in range(rounds + 1):  # the first fills the caches, of Python's bytecode and of the disk too
            for name, (command, cache) in todo.items():
                workdir = tempfile.mkdtemp(dir=folder)
                own = command if "-c" in command else [*command, workdir]
                found = timed(own, cache)
                if turn or not rounds:
                    times.setdefault(name, []).append(found)
    results: dict[str, Any] = {
        name: {
            kind: {"min": min(each[kind] for each in of), "median": statistics.median(each[kind] for each in of)}
            for kind in ("wall", "processor")
        }
        for name, of in times.items()
    }
    parts = {}
    for who in ("jaxmp", "hand-written"):
        runs = [
            json.loads(subprocess.check_output([sys.executable, str(PROGRAMS / "parts.py"), who], text=True))
            for _ in range(max(1, rounds // 2))
        ]
        parts[who] = {part: min(run[part] for run in runs) for part in runs[0]}
    return {"seconds": results, "parts": parts}


def plot(axes: Any, result: dict[str, Any]) -> None:
    """Draws the parts of the first step as stacked bars."""
    parts, left = result["results"]["parts"], dict.fromkeys(result["results"]["parts"], 0.0)
    names = list(dict.fromkeys(part for of in parts.values() for part in of))
    for name in names:
        widths = [of.get(name, 0.0) for of in parts.values()]
        axes.barh(list(parts), widths, left=list(left.values()), label=name)
        left = {who: left[who] + width for who, width in zip(parts, widths, strict=True)}
    axes.set_xlabel("seconds to the end of the first step, cold")
    axes.legend(fontsize="small", ncols=2)


def main(output: Path | None = None, rounds: int = 7, steps: int = 1000, quick: bool = False) -> None:
    """Measures, prints, and writes the results as JSON.

    Args:
        output: JSON file to write; none by default.
        rounds: Number of rounds.
        steps: Steps of the whole run, a multiple of 100.
        quick: One round of jaxmp and the hand-written program alone, 100 steps, to see that everything works.
    """
    results = measure(0, 100, ("jaxmp", "hand-written")) if quick else measure(rounds, steps)
    for name, of in results["seconds"].items():
        print(f"{name:<36} {of['wall']['min']:7.2f} s, processor {of['processor']['min']:7.2f} s", flush=True)
    for who, parts in results["parts"].items():
        print(f"{who}: {', '.join(f'{part} {seconds:.2f}' for part, seconds in parts.items())}")
    if output is not None:
        how = {"rounds": rounds, "steps": steps, "load": load(), "results": results}
        output.write_text(json.dumps(provenance(patch=False) | how, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
