from __future__ import annotations

import math
import sys

import pytest

from jaxmp.errors import InputError
from jaxmp.training.accountant import PrivateSteps, epsilon, import_accounting


def steps(count, sampling="poisson", noise=1.1, first=0):
    return PrivateSteps(sampling, noise, count, rate=0.01, per_epoch=100, first=first)


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match=r"uv sync --extra private.*pip install 'jaxmp\[private\]'"):
        import_accounting()


@pytest.mark.slow
def test_epsilon_is_that_of_the_mechanism():
    pytest.importorskip("dp_accounting")
    # Abadi et al. 2016, section 3.2 and figure 2: q = 0.01, noise 4, 10,000 steps; the moments accountant has 1.26.
    assert 0.9 < epsilon([steps(10_000, noise=4.0)], 1e-5) < 1.26
    # The Gaussian mechanism of mu = 2 / sigma, by Balle and Wang 2018, equation 6: four epochs, each row once in each.
    of_four, mu = epsilon([steps(400, "shuffled", noise=3.0)], 1e-5), 2 / 3.0

    def delta(eps):
        normal = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
        return normal(mu / 2 - eps / mu) - math.exp(eps) * normal(-mu / 2 - eps / mu)

    assert delta(of_four) <= 1e-5 < delta(of_four - 0.01)
    # Steps of two runs add up; an epoch that is begun counts; steps without noise, or without privacy, have no bound.
    halves = [steps(200), steps(300, first=200)]
    assert math.isclose(epsilon(halves, 1e-5), epsilon([steps(500)], 1e-5), rel_tol=1e-3)
    assert epsilon([steps(301, "shuffled", noise=3.0)], 1e-5) == pytest.approx(of_four)
    assert epsilon([steps(1, "shuffled", first=399)], 1e-5) == epsilon([steps(100, "shuffled")], 1e-5)
    assert epsilon([], 1e-5) == 0
    # The rows that a batch has no room for: steps * (1 + exp(epsilon)) * 1e-20 has to be a small part of delta.
    assert math.isfinite(epsilon([steps(1000)], 1e-12)) and epsilon([steps(1000)], 1e-15) == math.inf
    assert math.isfinite(epsilon([steps(1000, "shuffled", noise=10.0)], 1e-15))
    assert math.inf == epsilon([None, steps(1)], 1e-5) == epsilon([steps(1, noise=0.0)], 1e-5)
