"""`PoissonBatches`: batches that each row is in, or not, by a draw of its own, as the accounting of DP-SGD assumes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmp.data.pipeline import Batches
from jaxmp.errors import InputError

OVERFULL = 1e-20
"""the largest probability that the rows drawn for a step are more than a batch has room for; the rest is left out"""


@dataclass(frozen=True)
class PoissonBatches(Batches):
    """Which rows each step sees: each row with probability `rate`, whatever the other rows and steps do.

    `batch_size` is the room in a batch. The rate is the largest at which a step draws more rows than that with a
    probability below 1e-20; rows beyond it are left out, which adds at most steps * (1 + exp(epsilon)) * 1e-20 to delta
    (Chua et al. 2024, https://arxiv.org/abs/2406.17298); `jaxmp.training.accountant.epsilon` allows for it. Places
    that no row was drawn for have weight 0. An epoch is as many steps as draw each row once on average.

    Raises: InputError if batches are repeated, or so small that they would hold less than one row on average.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeat:
            raise InputError("loop.overfit_batches: a private optimizer draws other rows in each step; expected None")
        if self.expected_rows < 1:
            raise InputError(
                f"data.batch_size = {self.batch_size}: a Poisson batch with so little room would hold "
                f"{self.expected_rows:.2g} rows on average; expected a larger one, or optimizer.sampling shuffled"
            )

    @functools.cached_property
    def rate(self) -> float:
        """The probability with which a row is in a batch."""
        if self.batch_size == self.examples:
            return 1.0
        from scipy.stats import binom  # takes a second to import

        low, high = 0.0, self.batch_size / self.examples
        for _ in range(60):
            middle = (low + high) / 2
            fits = binom.sf(self.batch_size, self.examples, middle) <= OVERFULL
            low, high = (middle, high) if fits else (low, middle)
        return low

    @property
    def expected_rows(self) -> float:
        """The expected number of rows in a batch."""
        return self.rate * self.examples

    @property
    def mean_rows(self) -> float:
        """See `Batches.mean_rows`: the expected number."""
        return self.expected_rows

    @property
    def per_epoch(self) -> int:
        """Number of batches of an epoch: one row is drawn once in it on average."""
        whole = max(1, round(1 / self.rate))
        return whole if self.limit is None else min(self.limit, whole)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """The rows of each batch of an epoch, int32 (per_epoch, batch_size); -1 where no row was drawn."""
        draw = np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64))
        found = np.full((self.per_epoch, self.batch_size), -1, np.int32)
        for batch in found:
            # Raw bits, which every version of NumPy draws alike (NEP 19).
            drawn = np.flatnonzero(draw.random_raw(self.examples) * 2.0**-64 < self.rate)[: self.batch_size]
            batch[: len(drawn)] = drawn
        return found

    def batch(self, rows: Any, position: Any) -> tuple[Any, Any]:
        """See `Batches.batch`."""
        return rows.clip(0), (rows >= 0).astype(np.float32)
