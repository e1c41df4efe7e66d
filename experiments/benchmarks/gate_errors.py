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
from jaxmp.studies.gate import LEAST_PAIRS, LOOKS, NOT_INFERIOR, P_OF_LOOKS, P, decidable_margin, decide

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
    "normal, and 1 seed in 20 fails": lambda rng, shape: _failing(rng, shape, FAILED),
    "normal, and 1 seed in 20 fails under the first alone": lambda rng, shape: _failing(rng, shape, FIRST_FAILED),
}
"""differences of pairs, of mean 0; positive ones are worse"""

FAILED, FIRST_FAILED = math.inf, math.nan
"""what stands for the difference of a pair in which the precision alone, or the first alone, failed"""


def _failing(rng: np.random.Generator, shape: tuple[int, int], how: float) -> np.ndarray:
    return np.where(rng.random(shape) < 0.05, how, rng.normal(size=shape))


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
        ended = np.ma.masked_invalid(worse[:, :n])
        pairs = ended.count(axis=1)
        t = (ended.mean(axis=1) - 1.0) / (ended.std(axis=1, ddof=1) / np.sqrt(pairs))
        accepts = stats.t.cdf(t.filled(np.nan), pairs - 1) < p
        found |= accepts & (pairs >= LEAST_PAIRS) & ~np.isinf(worse[:, :n]).any(axis=1)
    for row, answer in zip(worse[:100], found, strict=False):
        assert any(_decided(row[:n], p) == NOT_INFERIOR for n in looks) == answer
    return float(np.mean(found))


def _decided(worse: np.ndarray, p: float) -> str:
    failed, first_failed = int(np.isinf(worse).sum()), int(np.isnan(worse).sum())
    return decide(worse[np.isfinite(worse)], 1.0, p, failed, first_failed).answer


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
