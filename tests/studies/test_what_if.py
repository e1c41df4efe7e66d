"""`what_if` of a run: which of its steps is measured."""

from __future__ import annotations

from types import SimpleNamespace

from jaxmp.studies import what_if


def test_step_0_is_not_taken_for_no_step(monkeypatch):
    class OfFourSteps:
        """Stands for a run."""

        metrics = ({"step": 4},)

        def checkpoint_steps(self):
            return [2, 4]

    monkeypatch.setattr(what_if, "Run", OfFourSteps)
    monkeypatch.setattr(what_if, "Past", lambda run, log: SimpleNamespace(step=lambda step, objective: step))
    assert [what_if._past(OfFourSteps(), step, None, print) for step in (None, 3, 0)] == [4, 3, 0]
