"""The learning-rate range test, on a parabola: steps of more than 2 / curvature diverge."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmp
from jaxmp import SGD, Arrays, Experiment, InputError, Loop, ObjectiveSpec
from jaxmp.cli import main
from jaxmp.studies.learning_rate import Rising, find_lr


class Point(nn.Module):
    """One parameter, from 10."""

    @nn.compact
    def __call__(self, y):
        return jnp.broadcast_to(self.param("w", lambda key: jnp.float32(10)), y.shape)


@dataclasses.dataclass(frozen=True)
class Parabola(jaxmp.Task):
    """curvature / 2 times the squared distance."""

    curvature: float = 4.0
    inputs: tuple[str, ...] = ("y",)

    def __call__(self, outputs, batch):
        errors = self.curvature / 2 * (outputs.astype(jnp.float32) - batch["y"]) ** 2
        return jaxmp.Mean.of(errors, batch["weight"]), {}


def load(split):
    return {"y": np.random.default_rng(0).normal(size=256).astype(np.float32)}


def experiment(curvature=4.0, **changes: Any):
    return dataclasses.replace(
        Experiment(
            model=Point(),
            data=Arrays(load, batch_size=32, images=()),
            task=Parabola(curvature),
            optimizer=SGD(1e-3),
            precision="float32",
            loop=Loop(epochs=1),
        ),
        **changes,
    )


def test_the_rates_rise_by_one_factor_and_their_losses_are_those_of_gradient_descent():
    found = find_lr(experiment(), lowest=1e-3, highest=1e-1, steps=21, log=print)
    np.testing.assert_allclose(found.rates, np.geomspace(1e-3, 1e-1, 21), rtol=1e-5)
    assert (found.skipped, found.diverged) == (0, False)
    average = 0.0
    for i, (loss, averaged) in enumerate(zip(found.losses, found.averaged, strict=True), start=1):
        average = 0.9 * average + 0.1 * loss
        assert averaged == pytest.approx(average / (1 - 0.9**i))
    assert found.losses[0] == pytest.approx(2 * (10**2 + 1), rel=0.2), "of the first weights: before the update"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_the_suggestion_is_a_tenth_of_a_rate_about_the_largest_that_is_stable(precision):
    suggested = {}
    for curvature in (4.0, 40.0):
        said: list[str] = []
        found = find_lr(experiment(curvature, precision=precision), lowest=1e-5, highest=100.0, log=said.append)
        assert found.diverged and found.rates[-1] > 2 / curvature
        assert len(said) == 1 and "diverges at a learning rate of" in said[0]
        suggested[curvature] = found.suggestion * curvature
        # A tenth of 2 / curvature, or of what the rate rises to in the 10 steps that the average lags behind.
        assert 0.02 < suggested[curvature] < 0.2 * 1e7 ** (10 / 200)
    assert suggested[4.0] == pytest.approx(suggested[40.0], rel=0.5)


@pytest.mark.slow
def test_skipped_steps_are_counted_and_have_no_rate():
    scaler = jaxmp.DynamicScaler(init_scale=2.0**24, growth_interval=1000)
    found = find_lr(experiment(precision="float16", scaler=scaler), lowest=1e-4, highest=1e-3, steps=40)
    assert found.skipped > 0 and len(found.rates) == 40 - found.skipped
    np.testing.assert_allclose(found.rates, np.geomspace(1e-4, 1e-3, 40)[: len(found.rates)], rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Parabolas(jaxmp.Task):
    """Two points, each on a parabola of its own; the second moves in every second step."""

    inputs: tuple[str, ...] = ("y",)
    objectives: ClassVar = {"flat": ObjectiveSpec(("flat",)), "steep": ObjectiveSpec(("steep",), every=2)}

    def __call__(self, outputs, batch, objective):
        curvature = {"flat": 4.0, "steep": 40.0}[objective]
        errors = curvature / 2 * (outputs[objective].astype(jnp.float32) - batch["y"]) ** 2
        return jaxmp.Mean.of(errors, batch["weight"]), {}


class Points(nn.Module):
    """A parameter for each objective."""

    @nn.compact
    def __call__(self, y):
        return {name: Point(name=name)(y) for name in ("flat", "steep")}


@pytest.mark.slow
def test_of_several_objectives_one_is_tested_in_the_steps_in_which_it_is_due():
    both = experiment(model=Points(), task=Parabolas())
    suggested = {}
    for name, curvature in (("flat", 4.0), ("steep", 40.0)):
        found = find_lr(both, lowest=1e-5, highest=100.0, objective=name)
        alone = find_lr(experiment(curvature), lowest=1e-5, highest=100.0)
        assert found.rates[:100] == alone.rates[:100] and found.diverged and found.skipped == 0
        suggested[name] = found.suggestion / alone.suggestion
        assert found.losses[0] == pytest.approx(curvature / 2 * (10**2 + 1), rel=0.2)
    assert suggested == pytest.approx({"flat": 1.0, "steep": 1.0}, rel=0.5)


@pytest.mark.parametrize(
    ("task", "objective", "expected"),
    [
        (Parabolas(), None, "Parabolas has several objectives; expected --objective, one of flat, steep"),
        (Parabolas(), "step", "--objective.*'step'.*steep"),
        (Parabola(), "flat", "--objective flat: Parabola has a single objective; expected no --objective"),
    ],
)
def test_the_objective_of_a_range_test_has_to_be_one_of_the_task(task, objective, expected):
    with pytest.raises(InputError, match=expected):
        find_lr(experiment(model=Points(), task=task), objective=objective)


def test_the_last_step_has_the_peak():
    rate = Rising(first=1e-3).make(0.5, 10)
    assert [float(rate(t)) for t in (0, 9)] == pytest.approx([0.5e-3, 0.5])


@dataclasses.dataclass(frozen=True)
class Own:
    def make(self, steps):
        return SGD(0.1).make(steps)


@pytest.mark.parametrize(
    ("how", "changes", "expected"),
    [
        ({"lowest": 0.0}, {}, "0 < lowest < highest"),
        ({"lowest": 1.0}, {}, "0 < lowest < highest"),
        ({"highest": float("inf")}, {}, "0 < lowest < highest"),
        ({"steps": 9}, {}, "steps 9: expected 10 or more"),
        ({}, {"optimizer": Own()}, "a Own has no learning rate to change"),
        ({"lowest": 1e3, "highest": 1e6}, {}, "steps were applied before the loss diverged; expected 10 or more"),
    ],
)
def test_what_cannot_be_tested_is_bad_input(how, changes, expected):
    with pytest.raises(InputError, match=expected):
        find_lr(experiment(**changes), **how)


@pytest.mark.slow
def test_the_command_writes_a_page_and_prints_the_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["find-lr", "digits_mlp", "--precision", "mixed_float16"]) == 0
    rate = float(capsys.readouterr().out.split("learning rate    ")[1].split()[0])
    assert 1e-4 < rate < 1e-1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["find_lr.html"], "no run is left"
    page = (tmp_path / "runs/digits_mlp/find_lr.html").read_text()
    assert f"suggested learning rate: {rate:.2g}" in page and "<svg" in page
