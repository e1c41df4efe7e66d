"""experiments/examples: each trains, learns something, and is at most a third as long as what it was written after."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxmp.experiment.settings import Loop
from jaxmp.runs.fit import fit
from jaxmp.runs.run import Run

FOLDER = Path(__file__).parents[1] / "experiments" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_examples_are_a_third_as_long_and_the_table_says_how_long():
    count = example("lines").count
    rows = re.findall(r"^\| `(\w+\.py)`.*\| (\d+) \|.*\| (\d+) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} == {path.name for path in FOLDER.glob("*.py")} - {"lines.py"}
    for name, lines, theirs in rows:
        assert count((FOLDER / name).read_text()) == int(lines) <= int(theirs) / 3


def trained(module, tmp_path, steps, hooks=()):
    loop = Loop(steps=steps, eval_every=steps // 2, log_every=max(steps // 10, 1))
    experiment = dataclasses.replace(module.EXPERIMENT, loop=loop)
    path = fit(experiment, workdir=tmp_path, hooks=hooks, log=lambda text: None).path
    return Run(path, experiment)


@pytest.mark.slow
def test_the_regression_finds_its_polynomial(tmp_path):
    module = example("regression")
    params = trained(module, tmp_path, 2000).state().params
    np.testing.assert_allclose(params["kernel"], module.W, atol=0.05)
    np.testing.assert_allclose(params["bias"], [module.B], atol=0.05)


@pytest.mark.slow
def test_the_autoencoder_gains_on_its_start_and_draws_samples(tmp_path):
    module = example("vae")
    run = trained(module, tmp_path, 200, (module.samples,))
    _, losses = run.curve("loss")
    assert losses[-1] < 0.8 * losses[0] and (run.path / "samples_200.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_translator_learns_to_add_letters(tmp_path, capsys):
    module = example("seq2seq")
    run = trained(module, tmp_path, 60, (module.decode,))
    _, losses = run.curve("loss")
    assert losses[-1] < 0.7 * losses[0]
    assert re.search(r"1\+2, 99\+12, 34\+567:( \d+){3}", capsys.readouterr().out)


@pytest.mark.slow
def test_the_gan_trains_both_of_its_nets_and_draws_samples(tmp_path):
    module = example("gan")
    run = trained(module, tmp_path, 60, (module.samples,))
    _, taken = run.curve("generator/taken_for_real")
    assert np.all(np.isfinite(taken)) and len(list(run.path.glob("samples_*.png"))) == 2
