"""Log-mel features, against a reference in float64, and what padding, masks and lengths mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data.audio import JoinedRecordings, LogMel, Recordings, SpecAugment, random_span
from jaxmp.data.pipeline import nbytes, prepared_ahead
from jaxmp.data.source import Columns
from jaxmp.errors import InputError


def reference(features, samples, length):
    """Log-mel features in float64, frame by frame and band by band; no normalisation."""
    count = (samples.shape[1] - features.window) // features.hop + 1
    angle = 2 * np.pi * np.arange(features.window) / features.window
    window = 0.5 - 0.5 * np.cos(angle)
    mel = np.linspace(*(2595 * np.log10(1 + hz / 700) for hz in (features.low, features.high)), features.bands + 2)
    corners = 700 * (10 ** (mel / 2595) - 1)
    logs, energies = (np.zeros((len(samples), count, features.bands)) for _ in range(2))
    for row in range(len(samples)):
        for frame in range(count):
            part = samples[row, frame * features.hop :][: features.window] / 32768.0
            if frame * features.hop + features.window > length[row]:
                continue
            power = np.abs(np.fft.fft(part * window, features.fft)) ** 2
            for band in range(features.bands):
                frequency = np.arange(features.fft // 2 + 1) * features.sample_rate / features.fft
                shares = np.interp(frequency, corners[band : band + 3], [0, 1, 0])
                energies[row, frame, band] = shares @ power[: features.fft // 2 + 1]
            logs[row, frame] = np.log(np.maximum(energies[row, frame], features.floor))
    return logs, energies


def recordings(rows=3, samples=900):
    """Two tones and noise, some of it loud, some as quiet as 16 bits allow."""
    rng = np.random.default_rng(0)
    time = np.arange(samples) / 8000
    loud = np.array([20000, 300, 2])[:rows, None]
    tones = np.sin(2 * np.pi * 440 * time) + 0.3 * np.sin(2 * np.pi * 2500 * time)
    return np.round(loud * tones / 1.3 + rng.normal(size=(rows, samples))).astype(np.int16)


def test_features_are_those_of_float64():
    features, samples, length = LogMel(normalise=False), recordings(), np.array([900, 500, 700])
    expected, energy = reference(features, samples, length)
    found = np.asarray(jax.jit(features)(samples, length))
    assert found.dtype == np.float32
    # The rounding of a spectrum is of the size of its largest part, u = 2^-24; a sum of 64 squares of it below.
    largest = energy.max(-1, keepdims=True)
    bound = 64 * 2.0**-24 * (np.sqrt(largest * energy) + largest * 2.0**-20) / np.maximum(energy, features.floor)
    counts = expected != 0
    assert (np.abs(found - expected) <= bound + 8 * 2.0**-24 * np.abs(expected) + 1e-6)[counts].all()
    assert not found[~counts].any() and counts.any(-1).sum(1).tolist() == [9, 4, 7]
    assert features.frames(length).tolist() == [9, 4, 7] and features.frames(199) == 0


@pytest.mark.slow
def test_padding_changes_nothing_and_a_recording_without_a_frame_is_zeros():
    length = np.array([900, 500, 100])
    samples = np.random.default_rng(0).integers(-9000, 9000, (3, 900)).astype(np.int16)
    features = jax.jit(LogMel())
    whole = np.asarray(features(samples, length))
    beyond = np.arange(900) >= length[:, None]
    np.testing.assert_array_equal(features(np.where(beyond, 7000, samples).astype(np.int16), length), whole)
    np.testing.assert_allclose(features(samples[1:2, :500], length[1:2])[0], whole[1, :4], atol=1e-6)
    assert not whole[1, 4:].any() and not whole[2].any()
    for recording in (whole[0], whole[1, :4]):
        assert abs(recording.mean()) < 1e-5 and abs(recording.std() - 1) < 1e-5
    as_floats = features((samples / 32768).astype(np.float32), length)
    np.testing.assert_array_equal(as_floats, whole)


def test_features_are_computed_in_float32_at_the_highest_precision():
    jaxpr = str(jax.make_jaxpr(LogMel())(jnp.zeros((2, 900), jnp.int16), jnp.zeros(2, jnp.int32)))
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in jaxpr
    assert "bf16" not in jaxpr and "f16[" not in jaxpr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 300}, "fft = 256: expected at least window = 300"),
        ({"high": 5000.0}, "high = 5000.0: expected at most 4000.0, half the sample rate"),
        ({"low": 4000.0}, "low = 4000.0: expected 0 or more, below high"),
        ({"bands": 0}, "features.bands = 0: expected a whole number"),
        ({"bands": 100}, "bands = 100: expected fewer, or a larger fft: no frequency is in band"),
        ({"floor": 0.0}, "floor = 0.0: expected at least 1.2e-38"),
    ],
)
def test_features_that_cannot_be_computed_are_refused(fields, message):
    with pytest.raises(InputError) as error:
        LogMel(**fields)
    assert message in str(error.value)


def test_a_recording_shorter_than_a_frame_is_refused_by_its_length():
    with pytest.raises(InputError, match=r"recordings of 100 samples have no frame of 200; expected .*data\.seconds"):
        jax.eval_shape(LogMel(), jnp.zeros((1, 100), jnp.int16), jnp.zeros(1, jnp.int32))


class Two(Recordings):
    """Two recordings that are there without a prepared dataset."""

    def _rows(self, split):
        return {"audio": [np.full(300, 5, np.int16), np.full(1000, -5, np.int16)], "label": np.array([1, 2])}


def test_recordings_are_filled_up_or_cut_to_one_length():
    data = Two(seconds=0.1)
    rows = data.source("train")[np.arange(2)]
    assert rows["samples"].shape == (2, 800) and rows["length"].tolist() == [300, 800]
    assert rows["samples"][0].tolist() == [5] * 300 + [0] * 500
    prepare, key = data.prepare(train=True), jax.random.key(0)
    batch = jax.eval_shape(prepare, {**rows, "weight": np.ones(2, np.float32)}, key)
    assert set(batch) == {"features", "frames", "label", "weight"}
    assert batch["features"].shape == (2, 8, 40) and batch["frames"].dtype == np.int32


@pytest.mark.parametrize("name", ["length", "samples", "frames"])
def test_a_column_of_the_data_that_would_be_replaced_is_refused(name, monkeypatch):
    rows = {**Two()._rows("train"), name: np.array([7, 8])}
    monkeypatch.setattr(Two, "_rows", lambda self, split: dict(rows))
    with pytest.raises(InputError, match=f"spoken_digits has a column '{name}', which here is made of the recordings"):
        Two().source("train")


class Louder(Two):
    """Two recordings that are changed as samples."""

    def prepare(self, *, train):
        inner = super().prepare(train=train)
        return lambda batch, key, index=None: inner({**batch, "samples": 2 * batch["samples"]}, key, index)


def test_features_are_made_once_where_the_recordings_stay_in_memory():
    data, key = Two(augment=SpecAugment(bands=20, frames=3)), jax.random.key(0)
    columns, prepare = data.source("train")[np.arange(2)], data.prepare(train=True)
    once = data.prepare_ahead(columns)
    assert set(once) == {"features", "frames", "label"} and "samples" in columns
    assert nbytes(data.source("train"), data.prepare_ahead) == sum(column.nbytes for column in once.values())
    # Resident or streamed, the steps take these rows, and so the same bits.
    rows = prepared_ahead(data, data.source("train"))[np.arange(2)]
    assert set(rows) == set(once)
    for name, column in once.items():
        np.testing.assert_array_equal(rows[name], column)
    weight = {"weight": np.ones(2, np.float32)}
    assert "fft" in str(jax.make_jaxpr(prepare)({**columns, **weight}, key))
    assert "fft" not in str(jax.make_jaxpr(prepare)({**once, **weight}, key))
    anew, kept = (jax.jit(prepare)({**rows, **weight}, key) for rows in (columns, once))
    np.testing.assert_allclose(anew["features"], kept["features"], rtol=0, atol=1e-5)  # of a standard deviation
    np.testing.assert_array_equal(anew["frames"], kept["frames"])
    assert "samples" in Louder().prepare_ahead(columns)
    # Features that a host transform made stay as they are.
    assert Two().prepare_ahead({"features": once["features"]}) == {"features": once["features"]}


@pytest.mark.slow
def test_features_are_masked_in_training_as_by_a_transform():
    batch = {**Two().source("train")[np.arange(2)], "weight": np.ones(2, np.float32)}
    augment, key = SpecAugment(bands=20, frames=3), jax.random.key(0)
    field, transform = Two(augment=augment), Two(transforms=(augment,))
    masked = jax.jit(field.prepare(train=True))(batch, key)["features"]
    np.testing.assert_array_equal(masked, jax.jit(transform.prepare(train=True))(batch, key)["features"])
    plain = jax.jit(field.prepare(train=False))(batch, None)["features"]
    np.testing.assert_array_equal(plain, jax.jit(Two().prepare(train=True))(batch, key)["features"])
    assert (masked != plain).any() and ((masked == plain) | (masked == 0)).all()


class Strings(JoinedRecordings):
    """Strings of 20 recordings, whose samples are their numbers, of two speakers."""

    def _rows(self, split):
        audio = [np.full(100 + 10 * row, row, np.int16) for row in range(20)]
        return {"audio": audio, "label": np.arange(20) % 10, "speaker": np.arange(20) % 2}


def test_strings_are_recordings_of_one_speaker_joined_and_their_labels():
    data = Strings(strings=50, eval_strings=10, least=2, most=4, seconds=0.075)
    rows = data.source("train")[np.arange(50)]
    numbers = set()
    for samples, length, labels in zip(rows["samples"], rows["length"], rows["labels"], strict=True):
        assert not samples[length:].any()
        # A recording is as long as its number says, so two that are equal side by side are two.
        chosen, rest = [], samples[:length]
        while rest.size:
            chosen.append(int(rest[0]))
            assert (rest[: 100 + 10 * rest[0]] == rest[0]).all()
            rest = rest[100 + 10 * rest[0] :]
        assert len({number % 2 for number in chosen}) == 1
        assert labels.tolist() == [number % 10 for number in chosen] + [-1] * (4 - len(chosen))
        numbers.add(len(chosen))
    assert numbers == {2, 3, 4} and (rows["length"] <= 600).all()


def test_strings_are_a_pure_function_of_seed_split_and_row():
    def strings(split, **fields):
        return [row.tolist() for row in Strings(**fields).choose(split, np.arange(20) % 2, 30)]

    whole = strings("train")
    assert whole == strings("train") and whole[:9] == [
        row.tolist() for row in Strings().choose("train", np.arange(20) % 2, 9)
    ]
    assert whole != strings("test") and whole != strings("train", string_seed=1)
    assert whole[0] == [0, 8, 6, 16]
    assert {len(row) for row in whole} == {3, 4, 5, 6} and len({row[0] % 2 for row in whole}) == 2


def test_strings_that_cannot_be_made_are_refused():
    with pytest.raises(InputError, match=r"most = 2: expected at least least = 3"):
        JoinedRecordings(most=2)
    with pytest.raises(InputError, match=r"strings need the column 'speker'; spoken_digits has audio, label, speaker"):
        Strings(group="speker").source("train")
    with pytest.raises(InputError, match=r"data.seconds is 0.03, and spoken_digits, test, row 19 lasts 0.04 s"):
        Strings(seconds=0.03).source("test")


def test_a_column_that_holds_no_recordings_is_refused_with_the_nearest_name(monkeypatch):
    columns = Columns({"audio": np.array([b"x"], object), "label": np.array([1])})
    monkeypatch.setattr("jaxmp.data.tfds.TFDS.source", lambda self, split: columns)
    for column, message in (
        ("adio", "'adio'; spoken_digits has audio, label; did"),
        ("label", "holds int64; expected"),
    ):
        with pytest.raises(InputError, match=message):
            Recordings(column=column).source("train")
    with pytest.raises(InputError, match="spoken_digits, train, row 0 cannot be read as wav"):
        Recordings().source("train")


@pytest.mark.slow
def test_masks_are_spans_of_uniform_width_and_place_and_only_in_training():
    spans = np.asarray(jax.jit(jax.vmap(lambda key: random_span(key, 6, 3)))(jax.random.split(jax.random.key(0), 4000)))
    widths = spans.sum(1)
    assert (np.abs(np.diff(np.pad(spans, ((0, 0), (1, 1))).astype(int))).sum(1) == 2 * (widths > 0)).all()
    np.testing.assert_allclose(np.bincount(widths) / 4000, [1 / 4] * 4, atol=0.03)
    starts = spans[widths == 3].argmax(1)
    np.testing.assert_allclose(np.bincount(starts) / len(starts), [1 / 4] * 4, atol=0.06)

    row = {"features": jnp.ones((20, 10)), "weight": jnp.float32(1)}
    augment = SpecAugment(bands=4, frames=8, masks=2)
    np.testing.assert_array_equal(augment(None, row)["features"], 1)
    augment = jax.jit(augment)
    hidden = [np.asarray(augment(jax.random.key(seed), row)["features"]) == 0 for seed in range(20)]
    assert all((h == h.all(1, keepdims=True) | h.all(0, keepdims=True)).all() for h in hidden)
    assert len({h.tobytes() for h in hidden}) > 15 and max(h.all(1).sum() for h in hidden) <= 16
    with pytest.raises(InputError, match=r"SpecAugment\.masks = -1"):
        SpecAugment(masks=-1)
