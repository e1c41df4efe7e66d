"""Times trials of `digits_mlp` whose seeds are trained one by one, and by one program (`jaxmp tune --seeds-together`).

    python experiments/benchmarks/seeds_together.py --seeds 3 --rounds 3

Each round runs a study of two trials either way, in turn: the first compiles, the second loads what it can. A line a
study says the seconds of each trial, of the clock and of the processor, and the load; the last lines have the least.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time

from jaxmp.cli import script
from jaxmp.experiment.config_file import ConfigFile
from jaxmp.studies.tune import tune

SPACE = {"optimizer.learning_rate": (5e-4, 1e-3)}


def study(seeds: int, seeds_together: bool) -> list[tuple[float, float]]:
    """Seconds of the clock and of the processor of each trial, the first with all that begins a study."""
    marks = [(time.perf_counter(), time.process_time())]

    def mark(message: str) -> None:  # a line a trial
        marks.append((time.perf_counter(), time.process_time()))

    config = ConfigFile.find("digits_mlp")
    with tempfile.TemporaryDirectory() as workdir:
        tune(config, SPACE, sampler="grid", seeds=seeds, seeds_together=seeds_together, workdir=workdir, log=mark)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]


def main(seeds: int = 3, rounds: int = 3) -> None:
    """Prints the seconds of each study, and the least of each trial."""
    found: dict[str, list[list[tuple[float, float]]]] = {"one by one": [], "together": []}
    for _ in range(rounds):
        for name, studies in found.items():
            studies.append(study(seeds, name == "together"))
            said = ", ".join(f"{wall:.2f} s ({cpu:.2f} of the processor)" for wall, cpu in studies[-1])
            print(f"{seeds} seeds {name}: {said}, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, studies in found.items():
        for i, trials in enumerate(zip(*studies, strict=True)):
            wall, cpu = (min(of) for of in zip(*trials, strict=True))
            print(f"least, {seeds} seeds {name}, trial {i + 1}: {wall:.2f} s ({cpu:.2f} of the processor)")


if __name__ == "__main__":
    sys.exit(script(main))
