"""`PrivateSteps`: how a run's rows entered its steps, and `epsilon`: what that has told of any one of them.

    epsilon([PrivateSteps("poisson", 1.1, 1000, rate=0.004, per_epoch=250)], delta=1e-5)

Epsilon is computed by dp_accounting (Google's library, the extra `private`), from the privacy loss distribution.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

from jaxmp.data.poisson import OVERFULL
from jaxmp.errors import InputError, install


@dataclasses.dataclass(frozen=True)
class PrivateSteps:
    """Steps of DP-SGD in a row over the same rows, as the accountant sees them.

    Two data sets are neighbours if one has a row that the other has not; of `shuffled`, if a row of one has no gradient
    in the other, since a row more would move all batches after it.
    """

    sampling: Literal["poisson", "shuffled"]
    """how batches are drawn. poisson: a subsampled Gaussian mechanism for each step. shuffled: a row is in one batch of
    an epoch, so that it pays for one Gaussian mechanism an epoch, without any amplification by sampling"""
    noise_multiplier: float
    """standard deviation of the noise on the sum, in units of the clip norm"""
    steps: int
    """number of steps attempted, skipped ones included: whether a step is skipped tells of the rows, too"""
    rate: float
    """probability with which a row is in a batch, of poisson"""
    per_epoch: int
    """number of steps of an epoch"""
    first: int = 0
    """number of steps before these"""

    def event(self) -> Any:
        """The privacy event of these steps; None if nothing bounds what they tell."""
        dp = import_accounting()
        if self.noise_multiplier == 0:
            return None
        gaussian = dp.GaussianDpEvent(self.noise_multiplier)
        if self.sampling == "poisson":
            return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(self.rate, gaussian), self.steps)
        begun = -(-(self.first + self.steps) // self.per_epoch) - self.first // self.per_epoch
        return dp.SelfComposedDpEvent(gaussian, begun)


def epsilon(spent: Sequence[PrivateSteps | None], delta: float) -> float:
    """The epsilon for which the weights after all these steps are (epsilon, delta)-differentially private.

    Args:
      spent: one after the other; None stands for training on the same rows without privacy.
      delta: between 0 and 1.

    Returns: an upper bound, from 0 to infinity. Where rows are drawn by Poisson sampling, 0.1 % of delta is kept for
      those that a batch has no room for (see `jaxmp.data.poisson`); it is infinite if that is too little.

    Raises: InputError if dp_accounting is not installed.

    Source: Koskela et al. 2020, Computing Tight Differential Privacy Guarantees Using FFT; Zhu et al. 2022.
    """
    return _epsilon(tuple(spent), delta)


@functools.lru_cache(maxsize=64)  # an evaluation of two splits asks twice
def _epsilon(spent: tuple[PrivateSteps | None, ...], delta: float) -> float:
    import_accounting()
    from dp_accounting import pld

    accountant, truncated = pld.PLDAccountant(), 0  # of a row more or less
    for steps in spent:
        if steps is None:
            return math.inf
        if not steps.steps:
            continue
        event = steps.event()
        if event is None:
            return math.inf
        accountant.compose(event)
        truncated += steps.steps if steps.sampling == "poisson" and steps.rate < 1 else 0
    if not truncated:
        return float(accountant.get_epsilon(delta))
    found = float(accountant.get_epsilon(0.999 * delta))
    left_out = OVERFULL * truncated * (1 + math.exp(min(found, 700)))  # the most that it adds to delta
    return found if left_out <= 0.001 * delta else math.inf


def import_accounting() -> Any:
    """The library dp_accounting. Raises InputError if it is not installed."""
    try:
        import dp_accounting
    except ImportError as error:
        raise InputError(
            f"a private optimizer: epsilon needs the library dp_accounting, which cannot be imported ({error}): "
            f"{install('private')}"
        ) from error
    return dp_accounting
