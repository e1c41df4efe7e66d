"""Static scales of activations are what NumPy finds, stand in the artefact, and say what they clip."""

from __future__ import annotations

import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from deployed_runs import images, load, trained

import jaxmp
from jaxmp import InputError
from jaxmp.deploy.calibrate import _magnitude, calibrate, clipped
from jaxmp.deploy.forward import _of_gradients
from jaxmp.deploy.quantise import packed_weight, quantise

pytest.importorskip("flatbuffers", reason="exporting needs flatbuffers: pip install 'jaxmp[export]'")

pytestmark = pytest.mark.xdist_group("deploy")


class Small(nn.Module):
    """A layer, and a head that cannot be observed."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Dense(8)(image.reshape(image.shape[0], -1)))
        return nn.Einsum((8, 3), "bi,io->bo")(x)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = nn.Sequential([_flat, nn.Dense(8), nn.relu, nn.Dense(3)])
    return trained(tmp_path_factory.mktemp("small"), "float32", model=model)


def _flat(image):
    return -image.reshape(image.shape[0], -1)  # so that the largest magnitudes are negative


def inputs_of_layers(run, image):
    """The inputs of the two layers and the outputs, in float64; and the parameters."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in run.weights("best").items()}
    first = np.float32(0.3) - image.reshape(len(image), -1).astype(np.float64) / 255
    second = np.maximum(first @ params["layers_1/kernel"] + params["layers_1/bias"], 0)
    return first, second, params


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "e4m3"])
def test_the_scales_are_those_of_the_largest_inputs_on_the_training_split(small, tmp_path, format):
    found = quantise(small, output=tmp_path / "out", weights="int8", activations=format, calibrate=1)
    first, second, params = inputs_of_layers(small, load("train")["image"][::2])  # 10 rows of 20, spread evenly
    amax = [np.abs(first).max(), np.abs(second).max()]
    largest = {"int8": 127.0, "e4m3": 448.0}[format]
    file = (tmp_path / "out" / "weights.safetensors").read_bytes()
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    body = file[8 + int.from_bytes(file[:8], "little") :]
    assert not any(name.startswith("gradient_amax/") for name in header)  # which no prediction depends on
    scales = []
    for layer in ("layers_1", "layers_3"):
        begin, end = header[f"delayed_scaling/{layer}/activations_0/scale"]["data_offsets"]
        scales.append(np.frombuffer(body[begin:end], np.float32)[0])
    np.testing.assert_allclose(scales, [largest / each for each in amax], rtol=1e-5)
    # What lies beyond them on other rows is clipped, and counted.
    rows = load("test")["image"]
    both = inputs_of_layers(small, rows)[:2]
    beyond = [np.sum(np.abs(x) > limit) for x, limit in zip(both, amax, strict=True)]
    assert found.calibration is not None and found.calibration.rows == 10
    assert found.calibration.share == pytest.approx(sum(beyond) / sum(x.size for x in both))
    assert found.calibration.clipped == pytest.approx(
        {name: n / x.size for name, n, x in zip(("layers_1", "layers_3"), beyond, both, strict=True)}
    )
    assert sum(beyond) > 0 and "clipped" in str(found) and found.artefact.manifest["run"]["calibration"]["rows"] == 10
    if format == "e4m3":
        return
    block = jaxmp.parse_block_format("int8:channel")
    weights = [
        np.asarray(packed_weight(name, params[name].astype(np.float32), block, {}).unpack())
        for name in ("layers_1/kernel", "layers_3/kernel")
    ]

    def rounded(x, scale):
        return np.clip(np.rint(x * scale), -127, 127) / scale

    x = np.maximum(rounded(both[0], scales[0]) @ weights[0] + params["layers_1/bias"], 0)
    right = rounded(x, scales[1]) @ weights[1] + params["layers_3/bias"]
    # A number that is close to the middle of two may be rounded to the other one in float32.
    close = np.abs(found.artefact(rows) - right) < 1e-4 * np.abs(right).max()
    assert close.mean() > 0.9
    # The same scales for one row as for many.
    np.testing.assert_allclose(found.artefact(rows)[:1], found.artefact(rows[:1]), rtol=1e-5)


@pytest.mark.full_size
def test_layers_that_cannot_be_observed_stay_as_they_are_and_are_named(tmp_path):
    run = trained(tmp_path, "mixed_bfloat16", model=Small())
    found = quantise(run, output=tmp_path / "out", activations="int8", calibrate=2)
    assert found.calibration is not None and found.unrounded == ("Einsum_0",)
    assert "not rounded      the inputs of Einsum_0" in str(found)
    assert found.artefact(images(3)).shape == (3, 3)
    state = run.state("best")
    counts = clipped(run, state, run.source("train"), calibrate(run, state, "int8", batches=2))
    assert [above for above, _ in counts.values()] == [0]  # all of it was seen


class Kept(nn.Module):
    """A layer that a rule keeps, in nn.remat; one whose input is 0 in training; and a head."""

    @nn.compact
    def __call__(self, image):
        x = image.reshape(image.shape[0], -1)
        x = nn.relu(nn.remat(nn.Dense)(8, name="wrapped")(x))
        dead = nn.Dense(3, name="dead")(jnp.where(x > 1e9, x, 0))
        return nn.Dense(3, name="head")(x) + dead


@pytest.mark.slow
def test_layers_that_are_not_rounded_are_named_and_none_of_their_inputs_counts_as_clipped(tmp_path):
    run = trained(tmp_path, "head=float32; mixed_bfloat16", model=Kept())
    found = quantise(run, output=tmp_path / "out", activations="int8", calibrate=1)
    assert found.calibration is not None
    assert sorted(found.unrounded) == ["dead", "head"]
    assert set(found.calibration.clipped) == {"wrapped"}


class Layers(nn.Module):
    """Layers in nn.scan, and a head."""

    @nn.compact
    def __call__(self, image):
        layers = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(image.reshape(image.shape[0], -1), None)
        return nn.Dense(3, name="head")(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + 0.1 * nn.Dense(16, name="dense")(x), None


@pytest.mark.full_size
def test_layers_in_a_scan_have_no_scale_and_stay_where_a_rule_says_so(tmp_path):
    plain = trained(tmp_path / "plain", "float32", model=Layers())
    with pytest.raises(InputError, match=r"layers/dense has no state of delayed scaling.*inside nn.scan.*=fp8_current"):
        quantise(plain, output=tmp_path / "no", activations="int8", calibrate=1)
    run = trained(tmp_path / "rules", "layers=float32; mixed_bfloat16", model=Layers())
    found = quantise(run, output=tmp_path / "out", activations="int8", calibrate=1)
    assert found.calibration is not None and found.unrounded == ("layers/dense",)
    assert set(found.calibration.clipped) == {"head"}
    (kernel,) = (layer for layer in found.layers if layer.path == "layers/dense/kernel")
    assert kernel.nbytes == 3 * 16 * 16 + 4 * 3 * 16  # a scale for each output of each layer
    assert found.artefact(images(7)).shape == (7, 3)
    # GPTQ: the inputs of all layers would be one, so that they are rounded to nearest.
    by_gptq = quantise(run, output=tmp_path / "gptq", weights="int4", method="gptq", calibrate=1)
    methods = {layer.path: layer.method for layer in by_gptq.layers if layer.format}
    assert methods == {"layers/dense/kernel": "nearest", "head/kernel": "gptq"}


def test_the_largest_magnitude_is_not_finite_where_a_value_is_not():
    x = np.full(4096, -2, np.float32)  # so many that XLA:CPU's max ignores NaN
    assert _magnitude(("", 0), jnp.asarray(x)) == 2
    for bad in (np.nan, np.inf, -np.inf):
        x[1] = bad
        assert not np.isfinite(_magnitude(("", 0), jnp.asarray(x)))


def test_what_cannot_be_calibrated_is_one_message(run, tmp_path):
    for options, message in (
        ({"calibrate": 3}, "--calibrate 3: there is nothing to calibrate; expected --activations beside it"),
        ({"calibrate": 0, "activations": "int8"}, "--calibrate = 0: expected a whole number of at least 1"),
    ):
        with pytest.raises(InputError) as error:
            quantise(run, output=tmp_path / "out", **options)
        assert message in str(error.value)


def test_scales_of_gradients_are_told_by_the_operand_and_not_by_a_module():
    assert _of_gradients("delayed_scaling/head/gradients_0/scale")
    assert not _of_gradients("delayed_scaling/gradients_head/activations_0/scale")
