"""`Recordings` and `JoinedRecordings`, datasets of recordings, and `LogMel`, their features, in float32."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.dataset import Dataset, Prepare, Split
from jaxmp.data.source import Columns
from jaxmp.data.tfds import TFDS
from jaxmp.data.transforms import apply_transforms
from jaxmp.data.wav import decode_wav
from jaxmp.errors import InputError, nearest, require, whole_number


@dataclass(frozen=True, kw_only=True)
class LogMel:
    """Log-mel features: the logarithm of the energy in bands of frequency that are evenly spaced in mel.

    A frame is the power spectrum of `window` samples under a Hann window; frames begin `hop` samples apart, and the
    first with the first sample. Mel is HTK's: 2595 log10(1 + f / 700). A band is a triangle of height 1 between the
    middles of its neighbours. Source: S. Davis and P. Mermelstein, Comparison of parametric representations for
    monosyllabic word recognition, 1980, https://doi.org/10.1109/TASSP.1980.1163420, without the cosine transform.

    Raises:
      InputError: a value is out of range, or a band is so narrow that no frequency of the spectrum is in it.
    """

    sample_rate: int = 8000
    """Samples a second."""
    window: int = 200
    """Samples in a frame."""
    hop: int = 80
    """Samples between the beginnings of two frames."""
    fft: int = 256
    """Samples that a frame is filled up to with zeros; (fft / 2 + 1) frequencies come of it."""
    bands: int = 40
    """Number of features of a frame."""
    low: float = 20.0
    """Lower end of the first band, in Hz."""
    high: float = 4000.0
    """Upper end of the last band, in Hz."""
    floor: float = 1e-6
    """Energy below which a band counts as having this much; samples run from -1 to 1."""
    normalise: bool = True
    """Whether the features of a recording get mean 0 and variance 1, over its frames and bands together."""

    def __post_init__(self) -> None:
        for name in ("sample_rate", "window", "hop", "fft", "bands"):
            object.__setattr__(self, name, whole_number(f"features.{name}", getattr(self, name), 1))
        require(self, "fft", self.fft >= self.window, f"at least window = {self.window}")
        require(self, "low", 0 <= self.low < self.high, f"0 or more, below high = {self.high}")
        require(
            self, "high", self.high <= self.sample_rate / 2, f"at most {self.sample_rate / 2}, half the sample rate"
        )
        require(self, "floor", self.floor >= float(np.finfo(np.float32).tiny), "at least 1.2e-38, float32's smallest")
        narrow = np.flatnonzero(self.filters().sum(0) == 0)
        require(self, "bands", not narrow.size, f"fewer, or a larger fft: no frequency is in band {[*narrow, 0][0]}")

    def frames(self, samples: Any) -> Any:
        """Number of frames of a recording of that many samples, int or an array of them; 0 if it is too short."""
        whole = (samples - self.window) // self.hop + 1
        return max(whole, 0) if isinstance(whole, int) else jnp.maximum(whole, 0).astype(jnp.int32)

    def filters(self) -> np.ndarray:
        """Share of each frequency in each band, float64 (fft / 2 + 1, bands)."""
        frequency = np.arange(self.fft // 2 + 1) * (self.sample_rate / self.fft)
        mel_low, mel_high = (2595 * np.log10(1 + hz / 700) for hz in (self.low, self.high))
        corners = 700 * (10 ** (np.linspace(mel_low, mel_high, self.bands + 2) / 2595) - 1)
        left, middle, right = corners[:-2], corners[1:-1], corners[2:]
        rising = (frequency[:, None] - left) / (middle - left)
        falling = (right - frequency[:, None]) / (right - middle)
        return np.maximum(0, np.minimum(rising, falling))

    def __call__(self, samples: jax.Array, length: jax.Array) -> jax.Array:
        """The features of recordings, float32 (rows, frames, bands). Pure; all in float32, on a GPU too.

        Args:
          samples: int16, or floats from -1 to 1, (rows, samples).
          length: number of samples that count of each row, int (rows,). Frames that hold others are 0, and change
            nothing in those that count.
        """
        scale = 2.0**-15 if jnp.issubdtype(samples.dtype, jnp.integer) else 1.0
        samples = samples.astype(jnp.float32) * jnp.float32(scale)
        count = self.frames(samples.shape[1])
        if not count:
            raise InputError(
                f"recordings of {samples.shape[1]} samples have no frame of {self.window}; expected longer recordings, "
                "data.seconds, or a smaller data.features.window"
            )
        place = np.arange(count)[:, None] * self.hop + np.arange(self.window)
        # Which of a row's samples a frame has is known now: a gather by a constant.
        framed = samples[:, place] * np.hanning(self.window + 1)[:-1].astype(np.float32)
        spectrum = jnp.fft.rfft(framed, self.fft)
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        # At the highest precision: on a GPU a float32 product is one of TF32 by default.
        energy = jnp.matmul(power, self.filters().astype(np.float32), precision=jax.lax.Precision.HIGHEST)
        features = jnp.log(jnp.maximum(energy, jnp.float32(self.floor)))
        counts = jnp.arange(count) < self.frames(length)[:, None]
        if self.normalise:
            features = normalised(features, counts)
        return jnp.where(counts[..., None], features, 0)


def normalised(features: jax.Array, counts: jax.Array) -> jax.Array:
    """Features minus their mean, divided by their standard deviation (at least 1e-3), both of a whole recording.

    Not of each band by itself: in a recording of one word, that would take out the spectrum of its vowel.

    Args:
      features: float32 (rows, frames, bands).
      counts: which frames count, bool (rows, frames). A row of none stays finite.
    """
    weight = jnp.broadcast_to(counts[..., None], features.shape).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weight, axis=(1, 2), keepdims=True), 1)
    centred = features - jnp.sum(features * weight, axis=(1, 2), keepdims=True) / total
    variance = jnp.sum(jnp.square(centred) * weight, axis=(1, 2), keepdims=True) / total
    return centred / jnp.maximum(jnp.sqrt(variance), jnp.float32(1e-3))


CHUNK = 256
"""recordings whose features are made at a time, where they are made once"""


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """Sets random bands and random frames of an example's `features`, float32 (frames, bands), to 0, the mean.

    Source: D. Park et al., SpecAugment, 2019, https://arxiv.org/abs/1904.08779, without time warping.
    """

    bands: int = 0
    """Largest number of neighbouring bands in a mask; a mask's width is uniform from 0."""
    frames: int = 0
    """Largest number of neighbouring frames in a mask; a mask's width is uniform from 0."""
    masks: int = 1
    """Number of masks of each kind."""

    def __post_init__(self) -> None:
        for name in ("bands", "frames", "masks"):
            object.__setattr__(self, name, whole_number(f"SpecAugment.{name}", getattr(self, name), 0))

    def __call__(self, key: Any, row: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """`row` with masked `features` (frames, bands); as it is if `key` is None, in evaluation."""
        if key is None:
            return row
        features = row["features"]
        for mask in range(self.masks):
            for axis, width in enumerate((self.frames, self.bands)):
                of_mask = jax.random.fold_in(key, 2 * mask + axis)
                hidden = random_span(of_mask, features.shape[axis], min(width, features.shape[axis]))
                features = jnp.where(jnp.expand_dims(hidden, 1 - axis), 0, features)
        return {**row, "features": features}


def random_span(key: jax.Array, length: int, width: int) -> jax.Array:
    """A span of neighbouring places, bool (length,); its width, from 0 to `width`, and its beginning are uniform."""
    to_width, to_start = jax.random.split(key)
    wide = jax.random.randint(to_width, (), 0, width + 1)
    start = jax.random.randint(to_start, (), 0, length - wide + 1)
    place = jnp.arange(length)
    return (place >= start) & (place < start + wide)


@dataclass(frozen=True)
class Recordings(Dataset):
    """The recordings of a dataset that TFDS has prepared, as log-mel features.

    A batch has `features`, float32 (rows, frames, bands), and `frames`, int32 (rows,), how many of them count, beside
    the other columns of the dataset. The features are computed on the device, in float32 under any precision.
    """

    name: str = "spoken_digits"
    """Name of a prepared dataset with recordings, wav files. See `jaxmp data list`."""
    column: str = "audio"
    """Column of the wav files."""
    seconds: float = 1.0
    """Length that recordings are brought to: longer ones lose their end, shorter ones are filled up with silence."""
    features: LogMel = field(default_factory=LogMel)
    """How features are made of samples, and how many samples a second there are."""
    augment: SpecAugment = SpecAugment()
    """Random masks of the features in training, after the `transforms`."""
    train: str = "train"
    """Recordings to train on, in TFDS's split syntax."""
    validation: str = "validation"
    """Recordings to validate on, in the same syntax."""
    test: str = "test"
    """Recordings to test on, in the same syntax."""
    version: str | None = None
    """Version of the dataset, such as "1.0.0"; by default the newest that is prepared."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        require(self, "seconds", 0 < self.seconds < math.inf, "a positive number")

    def source(self, split: Split) -> Columns:
        """`samples`, int16 (rows, seconds * sample rate), filled up with 0; `length`, int32 (rows,); other columns.

        Raises InputError as `TFDS.source` does, or if there is no such column, a recording cannot be read, or another
        column is called like one that is made of them.
        """
        rows = self._rows(split)
        recordings, kept = rows.pop(self.column), round(self.seconds * self.features.sample_rate)
        taken = sorted({"samples", "length", "features", "frames"} & rows.keys())
        if taken:
            raise InputError(
                f"{self.name} has a column {taken[0]!r}, which here is made of the recordings; expected data without it"
            )
        samples, length = np.zeros((len(recordings), kept), np.int16), np.zeros(len(recordings), np.int32)
        for row, recording in enumerate(recordings):
            length[row] = min(len(recording), kept)
            samples[row, : length[row]] = recording[:kept]
        return Columns({"samples": samples, "length": length, **rows})

    def _rows(self, split: Split) -> dict[str, Any]:
        """The columns of a split, the recordings as a list of arrays of samples, int16."""
        texts = TFDS(
            name=self.name, train=self.train, validation=self.validation, test=self.test, version=self.version
        ).source(split)
        if self.column not in texts.columns:
            has = ", ".join(texts.columns)
            raise InputError(
                f"data.column is {self.column!r}; {self.name} has {has}{nearest(self.column, texts.columns)}"
            )
        rows: dict[str, Any] = texts[np.arange(len(texts))]
        if rows[self.column].dtype != object:
            raise InputError(
                f"data.column is {self.column!r}, which holds {rows[self.column].dtype}; expected wav files"
            )
        rate = self.features.sample_rate
        rows[self.column] = [
            decode_wav(data, f"{self.name}, {split}, row {row}", sample_rate=rate)
            for row, data in enumerate(rows[self.column])
        ]
        return rows

    def prepare_ahead(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `Dataset.prepare_ahead`: features in the place of the samples, from which a step would make them anew.

        A class with a `prepare` of its own gets the samples. What host transforms made features of stays as it is.
        """
        if type(self).prepare is not Recordings.prepare or "samples" not in columns:
            return columns
        columns, made = dict(columns), jax.jit(self._features)
        samples, length = columns.pop("samples"), columns.pop("length")
        chunks = [made(samples[i : i + CHUNK], length[i : i + CHUNK]) for i in range(0, len(samples), CHUNK)]
        return columns | jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)

    def _features(self, samples: Any, length: Any) -> dict[str, jax.Array]:
        return {"features": self.features(samples, length), "frames": self.features.frames(length)}

    def prepare(self, *, train: bool) -> Prepare:
        """As `Dataset.prepare`, with `features` and `frames` in the place of `samples` and `length`, and `augment`.

        A batch that has its features already, by `prepare_ahead`, keeps them.
        """
        masks = (self.augment,) if self.augment.bands or self.augment.frames else ()
        transforms = (*self.transforms, *masks) if train else self.transforms

        def apply(batch: dict[str, Any], key: Any, global_index: jax.Array | None = None) -> dict[str, Any]:
            batch = dict(batch)
            if "samples" in batch:
                batch |= self._features(batch.pop("samples"), batch.pop("length"))
            return apply_transforms(transforms, batch, key if train else None, global_index)

        return apply


@dataclass(frozen=True)
class JoinedRecordings(Recordings):
    """Strings of recordings, joined without a pause: what is said in them is a sequence of labels.

    A batch has `features` and `frames`, as that of `Recordings`, and `labels`, int32 (rows, most), each row filled up
    at its end with -1. The recordings of a string are of one `group` and of one split. Which they are is a pure
    function of `string_seed`, the split and the row.
    """

    seconds: float = 3.0
    """Length that strings are brought to, filled up with silence; of one that is longer the last recordings are left
    out, as many as it takes."""
    group: str = "speaker"
    """Column that the recordings of a string have in common."""
    strings: int = 4000
    """Number of strings to train on."""
    eval_strings: int = 500
    """Number of strings to validate on, and to test on."""
    least: int = 3
    """Smallest number of recordings that is drawn for a string."""
    most: int = 6
    """Largest number of recordings that is drawn for a string; each number from `least` on is as likely."""
    string_seed: int = 0
    """Seed of the draws; the experiment's seed does not change the data."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        for name, least in (("strings", 1), ("eval_strings", 1), ("least", 1), ("most", 1), ("string_seed", 0)):
            object.__setattr__(self, name, whole_number(f"data.{name}", getattr(self, name), least))
        require(self, "most", self.most >= self.least, f"at least least = {self.least}")

    def source(self, split: Split) -> Columns:
        """`samples`, int16 (rows, seconds * sample rate), `length`, int32 (rows,), and `labels`, int32 (rows, most).

        Raises InputError as `Recordings.source` does, or if there is no column of the group or of labels, or a
        recording is longer than `seconds`.
        """
        rows = self._rows(split)
        for name in (self.group, "label"):
            if name not in rows:
                raise InputError(f"strings need the column {name!r}; {self.name} has {', '.join(rows)}")
        recordings, kept = rows[self.column], round(self.seconds * self.features.sample_rate)
        sizes = np.array([len(recording) for recording in recordings])
        if sizes.max() > kept:
            raise InputError(
                f"data.seconds is {self.seconds}, and {self.name}, {split}, row {sizes.argmax()} lasts "
                f"{sizes.max() / self.features.sample_rate:.2f} s; expected at least as much"
            )
        count = self.strings if split == "train" else self.eval_strings
        samples, length = np.zeros((count, kept), np.int16), np.zeros(count, np.int32)
        labels = np.full((count, self.most), -1, np.int32)
        for row, chosen in enumerate(self.choose(split, np.asarray(rows[self.group]), count)):
            chosen = chosen[np.cumsum(sizes[chosen]) <= kept]
            joined = np.concatenate([recordings[index] for index in chosen])
            samples[row, : len(joined)], length[row] = joined, len(joined)
            labels[row, : len(chosen)] = rows["label"][chosen]
        return Columns({"samples": samples, "length": length, "labels": labels})

    def choose(self, split: Split, group: np.ndarray, count: int) -> list[np.ndarray]:
        """The recordings of each string, by row, before those are left out that are too many.

        Args:
          split: the split's name.
          group: the group of each recording, (recordings,).
          count: number of strings; the first ones do not depend on it.
        """
        bits = np.random.Philox(key=np.array([self.string_seed, zlib.crc32(split.encode())], np.uint64))
        drawn = bits.random_raw(count * (self.most + 2)).reshape(count, -1)
        members = [np.flatnonzero(group == each) for each in np.unique(group)]
        numbers = self.least + drawn[:, 0] % (self.most - self.least + 1)
        groups = [members[index] for index in drawn[:, 1] % len(members)]
        return [
            of_group[row[2 : 2 + number] % len(of_group)]
            for of_group, number, row in zip(groups, numbers.astype(int), drawn, strict=True)
        ]
