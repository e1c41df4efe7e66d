"""What is shown of a study says what its numbers do not: levels, failed runs, and figures that nobody checked."""

from __future__ import annotations

import pytest

from jaxmp.reports import paper_report

CLAIM = {
    "id": "loses",
    "says": "It loses",
    "published": "1 point",
    "source": "table 1",
    "checked": True,
    "measured": "loss",
    "remark": "",
    "mean": 0.5,
    "low": 0.25,
    "high": 0.75,
    "note": "",
    "confidence": 0.95,
    "verdict": "reproduced",
}


def shown(claims, arms=None):
    """All three forms in which a study is shown."""
    results = {
        "paper": "bits",
        "title": "Bits",
        "devices": ["cpu"],
        "platform": "cpu",
        "versions": {"python": "3", "jax": "1", "jaxmp": "0"},
        "command": "jaxmp reproduce bits",
        "seeds": [0, 1, 2],
        "seconds": 1.0,
        "claims": claims,
        "arms": arms or {},
    }
    block = paper_report.block(results, ("loss",) if arms else (), ())
    return paper_report.text(results), block, paper_report.overview([results])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checked": False}, "not checked"),
        ({"note": "2 of 6 runs failed"}, "2 of 6 runs failed"),
        ({"confidence": 0.9875}, "0.5 (0.25 to 0.75, 98.75 %)"),
    ],
)
def test_each_form_says_what_the_figure_alone_does_not(change, said):
    for plain, changed in zip(shown([CLAIM]), shown([CLAIM | change]), strict=True):
        assert said in str(changed) and said not in str(plain)
        assert "0.5 (0.25 to 0.75)" in str(plain)


def test_a_metric_that_is_not_finite_counts_as_failed_and_one_that_an_arm_does_not_have_does_not():
    arms = {
        "ended": {"how": "a", "seeds": {"0": {"loss": 1.0}, "1": {"loss": None}, "2": {"failed": "NaN"}}},
        "other": {"how": "b", "seeds": {"0": {"error": 1.0}}},
    }
    _, block, _ = shown([CLAIM], arms)
    assert "| `ended` | 1; 2 of 3 failed | `a` |" in block
    assert "| `other` |  | `b` |" in block


def test_a_block_says_at_which_revisions_the_runs_were_measured_and_which_runs_do_not_say():
    git, dirty = {"revision": "0123456789", "dirty": False}, {"revision": "abcdef0123", "dirty": True}
    arms = {"a": {"how": "a", "seeds": {"0": {"loss": 1.0, "git": git}, "1": {"loss": 1.0, "git": dirty}}}}
    assert "Measured at 0123456 (1 runs), abcdef0 with uncommitted changes (1 runs)." in shown([CLAIM], arms)[1]
    arms["b"] = {"how": "b", "seeds": {"0": {"loss": 1.0}}}
    assert "(1 runs), an unknown revision (1 runs)." in shown([CLAIM], arms)[1]


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((3.4e-13, 1.2e-13, 5.6e-13), "3.4e-13 (1.2e-13 to 5.6e-13)"),
        ((4e-17, -0.01, 0.01), "0 (-0.01 to 0.01)"),
        ((4e-17, None, None), "4e-17"),
        ((1.23456e-10, 1.23456e-10, 1.23456e-10), "1.235e-10 (1.235e-10 to 1.235e-10)"),
    ],
)
def test_a_small_figure_is_0_only_beside_the_size_of_its_interval(figures, said):
    claim = CLAIM | dict(zip(("mean", "low", "high"), figures, strict=True))
    assert paper_report._figure(claim) == said
