"""How often a gate accepts what it should not: simulated studies of a precision that is worse by just the margin.

    python experiments/benchmarks/run.py gate_errors

Each study draws paired differences of a distribution whose mean is the margin, and decides as
`jaxmp.studies.gate.decide` does, after a fixed number of pairs, or after 5, 10 and 20. Beside it, what looking after
every pair from the third on would do.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from jaxmp.cli import script
from jaxmp.runs.provenance import provenance
from jaxmp.studies.gate import LOOKS, NOT_INFERIOR, P_OF_LOOKS, P, decidable_margin, decide

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "t, 3 degrees of freedom": lambda rng, shape: rng.standard_t(3, size=shape),
    "exponential, a few seeds much worse": lambda rng, shape: rng.exponential(size=shape) - 1,
    "exponential, a few seeds much better": lambda rng, shape: 1 - rng.exponential(size=shape),
    "log-normal (sigma 1), a few seeds much worse": lambda rng, shape: rng.lognormal(size=shape) - np.exp(0.5),
    "1 seed in 10 worse by 10 standard deviations": lambda rng, shape: (
        rng.normal(size=shape) + 10 * (rng.random(shape) < 0.1) - 1
    ),
}
"""differences of pairs, of mean 0; positive ones are worse"""

PLANS: dict[str, tuple[tuple[int, ...], float]] = {
    **{f"{n} pairs": ((n,), P) for n in (3, 5, 10, 20)},
    "looks at 5, 10, 20": (LOOKS, P_OF_LOOKS),
    "a look after every pair from 3 to 20": (tuple(range(3, 21)), P),
}


def accepted(draw: Draw, looks: tuple[int, ...], p: float, studies: int, seed: int = 0) -> float:
    """The share of simulated studies that accept a precision which is worse by just the margin, 1.

    The t tests are those of `decide`, on arrays of studies; of the first hundred studies `decide` is asked itself.
    """
    worse = 1.0 + draw(np.random.default_rng(seed), (studies, looks[-1]))
    found = np.zeros(studies, bool)
    for n in looks:
        found |= stats.ttest_1samp(worse[:, :n], 1.0, axis=1, alternative="less").pvalue < p
    for row, answer in zip(worse[:100], found, strict=False):
        assert any(decide(row[:n], 1.0, p).answer == NOT_INFERIOR for n in looks) == answer
    return float(np.mean(found))


def main(studies: int = 20_000, output: Path | None = None) -> None:
    """Prints the share of wrong acceptances for each distribution and plan.

    Args:
      studies: number of simulated studies of each distribution and plan.
      output: file for the results, as JSON.
    """
    shares: dict[str, dict[str, float]] = {}
    for name, draw in DISTRIBUTIONS.items():
        shares[name] = {}
        for plan, (looks, p) in PLANS.items():
            shares[name][plan] = accepted(draw, looks, p, studies)
        print(name, json.dumps(shares[name]), flush=True)
    margins = {f"{n} pairs": math.ceil(100 * decidable_margin(n, P)) / 100 for n in (3, 5, 10, 20)}
    found = {"studies": studies, "wrong_acceptances": shares, "margin_decided_in_spreads": margins}
    if output is not None:
        output.write_text(json.dumps(found | {"provenance": provenance(patch=False)}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(script(main))
