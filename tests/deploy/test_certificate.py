"""A certificate says no more than was measured: of what is not finite, of whole numbers, of which outputs, by what."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deployed_runs import Net

from jaxmp import InputError
from jaxmp.deploy.certificate import Deviation
from jaxmp.deploy.export import _measured_on, lines
from jaxmp.deploy.forward import _check_rows, forward, symbolic, traced
from jaxmp.deploy.predict import Artefact

pytestmark = pytest.mark.xdist_group("deploy")  # one worker: the fixture trains


def deviation(output, reference):
    found = Deviation()
    found.add({"y": output}, {"y": reference}, None, len(output))
    return found.to_json()


@pytest.mark.parametrize(
    ("output", "reference", "nonfinite"),
    [
        (np.inf, np.inf, 0),
        (np.nan, np.nan, 0),
        (np.inf, -np.inf, 1),
        (np.nan, np.inf, 1),
        (-np.inf, np.nan, 1),
        (np.inf, 1, 1),
        (1, np.nan, 1),
    ],
)
def test_outputs_that_differ_and_are_not_finite_are_counted(output, reference, nonfinite):
    found = deviation(np.float32([[output, 1], [2, 2]]), np.float32([[reference, 1], [2, 2]]))
    assert found["nonfinite"] == nonfinite and found["outputs"]["y"]["largest_ulp"] == 0
    assert found["bit_equal"] == (nonfinite == 0)


def test_whole_numbers_and_bools_have_a_figure_and_a_line_of_their_own(tmp_path):
    found = Deviation()
    logits = np.ones((3, 2), np.float32)
    for rows in (3, 1):  # the others fill up the batch
        mine = {"logits": logits, "length": np.array([5, 6, 7], np.int32), "ends": np.array([True, True, False])}
        found.add(mine, {**mine, "length": np.array([9, 6, 8])}, None, rows)
    against = found.to_json()
    expected = {"length": {"compared": 4, "differing": 3}, "ends": {"compared": 4, "differing": 0}}
    assert against["whole_numbers"] == expected and not against["bit_equal"]
    manifest = {"inputs": {}, "outputs": {}, "precision": "float32", "run": {"weights": "best", "step": 2}}
    certificate = {"rows": 4, "of": 4, "split": "test", "against": {"run": against}}
    artefact = Artefact({**manifest, "expires": None}, certificate, None)
    name, text = lines(artefact, tmp_path)[-1]
    assert name == "against run" and "length: 3 of 4 whole numbers differ; ends: 0 of 4 whole numbers differ" in text


def test_decisions_and_divergences_that_do_not_count_are_left_out():
    found, logits = Deviation(), np.zeros((2, 3, 2), np.float32)
    other = logits.copy()
    other[:, 2] = 1, -1
    counts = np.array([[True, True, False], [True, False, False]])
    decided = np.array([[0, 0, 0], [0, 0, 0]])
    found.add({"y": other}, {"y": logits}, (np.add(decided, [0, 0, 1]), decided, counts), 2)
    assert found.to_json()["decisions"] == {"compared": 3, "agree": 3, "share": 1.0}
    assert found.to_json()["kl"] == {"mean": 0, "largest": 0}


def test_an_output_without_a_leading_axis_of_rows_is_refused_by_name():
    rows = symbolic("b")
    for shape in ((), (12, 3), (2 * rows, 3), (4, rows, 3), (rows + 1,)):
        outputs = {"logits": jax.ShapeDtypeStruct((rows, 3), jnp.float32)}
        outputs["protos"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        with pytest.raises(InputError, match=r"the output protos of the model of runs/net is float32\["):
            _check_rows(SimpleNamespace(path="runs/net"), outputs, rows)


class Penalised(Net):
    """The model of the fixture with an output that has no rows."""

    def __call__(self, image, *, train=False):
        logits = super().__call__(image, train=train)
        return {"logits": logits, "penalty": jnp.mean(logits**2)}


@pytest.mark.slow
def test_such_a_model_is_refused_before_its_program_is_made_and_can_be_pruned(run):
    experiment = dataclasses.replace(run.experiment, model=Penalised())
    other = SimpleNamespace(experiment=experiment, path=run.path, trainer=run.trainer)
    state, source = run.state("best"), run.source("test")
    with pytest.raises(
        InputError, match=r"the output penalty of .* is float32\[\] for b rows; expected the rows first"
    ):
        forward(other, state, source, precision="float32")
    assert list(traced(other, state, source).outputs) == ["logits", "penalty"]


def test_what_ran_an_onnx_file_is_named_whatever_device_jax_has(monkeypatch):
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr("jax.devices", lambda: [gpu])
    found = _measured_on(Artefact({"format": "onnx"}, {}, None, ("CPUExecutionProvider",)))
    assert found["providers"] == ["CPUExecutionProvider"] and found["device"] != "NVIDIA H200" and found["device"]
    assert _measured_on(Artefact({"format": "stablehlo"}, {}, None)) == {"platform": "gpu", "device": "NVIDIA H200"}
