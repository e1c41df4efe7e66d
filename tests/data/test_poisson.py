from __future__ import annotations

import numpy as np
import pytest

from jaxmp.data.poisson import OVERFULL, PoissonBatches
from jaxmp.errors import InputError

BATCHES = PoissonBatches(examples=2000, batch_size=128, seed=5)


def test_the_rate_is_the_largest_with_room_for_what_is_drawn():
    from scipy.stats import binom

    assert binom.sf(128, 2000, BATCHES.rate) <= OVERFULL < binom.sf(128, 2000, BATCHES.rate * 1.001)
    assert PoissonBatches(64, 64, 0).rate == 1 and BATCHES.per_epoch == round(1 / BATCHES.rate)


def test_each_row_is_drawn_by_itself():
    drawn = np.concatenate([BATCHES.epoch_rows(epoch) for epoch in range(40)])
    counts = (drawn >= 0).sum(1)
    steps, rate = len(drawn), BATCHES.rate
    # Six standard errors of the mean and of the variance of a binomial.
    assert abs(counts.mean() - 2000 * rate) < 6 * np.sqrt(2000 * rate / steps)
    assert abs(counts.var() / (2000 * rate * (1 - rate)) - 1) < 6 * np.sqrt(2 / steps)
    each = np.bincount(drawn[drawn >= 0], minlength=2000)
    assert abs(each.var() / (steps * rate * (1 - rate)) - 1) < 6 * np.sqrt(2 / 2000)
    assert not np.array_equal(BATCHES.epoch_rows(0), BATCHES.epoch_rows(1))


@pytest.mark.parametrize("room", [1, 8])
def test_so_little_room_that_a_batch_would_be_empty_is_refused(room):
    with pytest.raises(InputError, match=f"data.batch_size = {room}: a Poisson batch with so little room would hold"):
        PoissonBatches(60_000, room, 0)


@pytest.mark.parametrize("step", [0, 17, 41])
def test_the_rows_of_a_step_are_a_function_of_seed_and_step(step):
    rows, weight = PoissonBatches(2000, 128, 5).rows(step)
    line = BATCHES.epoch_rows(step // BATCHES.per_epoch)[step % BATCHES.per_epoch]
    np.testing.assert_array_equal(weight, line >= 0)
    np.testing.assert_array_equal(rows, np.maximum(line, 0))
    assert len(np.unique(rows[weight > 0])) == weight.sum()
