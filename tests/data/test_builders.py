"""Datasets that jaxmp makes from files of one's own: MNIST from idx files, spoken digits from recordings."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest

from jaxmp.data import catalog
from jaxmp.data.builders.mnist import read_idx, read_pair
from jaxmp.data.builders.spoken_digits import SPEAKERS, read_recordings, split_of
from jaxmp.data.tfds import TFDS
from jaxmp.errors import InputError

REAL_DATA = os.environ.get("JAXMP_DATA")
MANUAL = Path(REAL_DATA).parent / "raw" if REAL_DATA else Path()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A manual folder; no data folder and an empty cache."""
    monkeypatch.setenv("JAXMP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manual = tmp_path / "manual"
    manual.mkdir()
    return manual


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def wav(samples, rate=8000, channels=1, dtype="<i2"):
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(np.dtype(dtype).itemsize)
        opened.setframerate(rate)
        opened.writeframes(np.asarray(samples, dtype).tobytes())
    return file.getvalue()


def write_mnist(folder):
    rng = np.random.default_rng(0)
    written = {}
    for prefix, rows in (("train", 20), ("t10k", 6)):
        images, labels = rng.integers(0, 256, (rows, 28, 28), np.uint8), rng.integers(0, 10, rows, np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        written[prefix] = images, labels
    return written


def test_mnist_is_made_of_its_idx_files(folders):
    written = write_mnist(folders)
    dataset = catalog.prepare_dataset("mnist", folders)
    assert dataset.splits == {"train": 20, "test": 6} and dataset.version == "3.0.1"
    assert catalog.prepare_dataset("mnist") == dataset == catalog.find_dataset("mnist")
    rows = TFDS("mnist", test="test").source("test")[np.arange(6)]
    images, labels = written["t10k"]
    order = [next(row for row in range(6) if np.array_equal(images[row], image[..., 0])) for image in rows["image"]]
    assert sorted(order) == list(range(6)) and rows["label"].tolist() == labels[order].tolist()
    assert "mnist" not in catalog.unprepared() and "spoken_digits" in catalog.unprepared()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            idx(np.zeros((2, 3), np.uint8))[:-1],
            "17 bytes; its header says 2 x 3 of them after the first 12: it is tr",
        ),
        (idx(np.zeros((2, 3), np.uint8)) + b"0", "its header says 2 x 3"),
        (idx(np.zeros((2, 3), np.uint8))[:9], "its header says 2 of them after the first 12"),
        (b"\0\0\x0d\1\0\0\0\0", "begins with 00000d01; expected 000008"),
        (b"", "begins with ; expected 000008"),
    ],
    ids=range(5),
)
def test_a_truncated_idx_file_is_bad_input_with_its_name(data, message, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InputError) as error:
        read_idx(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value) and message in str(error.value)
    (tmp_path / "file").unlink()
    with pytest.raises(InputError, match=r"file is not there, nor file\.gz"):
        read_idx(tmp_path / "file")
    (tmp_path / "file.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(InputError, match=r"file\.gz cannot be read \("):
        read_idx(tmp_path / "file")


def test_idx_files_that_do_not_belong_together_are_bad_input(tmp_path):
    write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(19, np.uint8)))
    with pytest.raises(InputError, match=r"images of shape \(20, 28, 28\) and .* labels of shape \(19,\)"):
        read_pair(tmp_path, "train")
    labels.write_bytes(idx(np.full(20, 10, np.uint8)))
    with pytest.raises(InputError, match="holds the label 10; expected 0 to 9"):
        read_pair(tmp_path, "train")


def some_recordings():
    return {
        f"{digit}_{speaker}_{recording}.wav": wav(np.arange(300) * (digit + 1))
        for digit in (0, 7)
        for speaker in SPEAKERS[:2]
        for recording in (0, 4, 5, 9, 10, 49)
    }


def test_spoken_digits_is_split_by_the_number_of_a_recording(folders):
    (folders / "recordings").mkdir()
    files = some_recordings()
    for name, data in files.items():
        (folders / "recordings" / name).write_bytes(data)
    dataset = catalog.prepare_dataset("spoken_digits", folders)
    assert dataset.splits == {"train": 8, "validation": 8, "test": 8}
    for split, numbers in (("train", {10, 49}), ("validation", {5, 9}), ("test", {0, 4})):
        rows = TFDS("spoken_digits").source(split)[np.arange(8)]
        assert set(rows["recording"].tolist()) == numbers
        names = [
            f"{digit}_{SPEAKERS[speaker]}_{recording}.wav"
            for digit, speaker, recording in zip(rows["label"], rows["speaker"], rows["recording"], strict=True)
        ]
        assert [files[name] for name in names] == rows["audio"].tolist()
    assert [split_of(number) for number in range(50)] == ["test"] * 5 + ["validation"] * 5 + ["train"] * 40

    with tarfile.open(folders / "fsdd_recordings.tar.gz", "w:gz") as archive:
        archive.add(folders / "recordings", "recordings")
    assert dict(read_recordings(folders)) == {
        (int(name[0]), name.split("_")[1], int(name[:-4].split("_")[2])): data for name, data in files.items()
    }


GOOD = wav(np.ones(300))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("3_theo_7.wav", GOOD[:400], "3_theo_7.wav holds 178 of the 300 samples"),
        ("3_theo_7.wav", GOOD[:20], "3_theo_7.wav cannot be read as wav (it ends too early)"),
        ("3_theo_7.wav", b"RIFX" + GOOD[4:], "3_theo_7.wav cannot be read as wav (file does not start with RIFF id)"),
        ("3_theo_7.wav", b"", "3_theo_7.wav cannot be read as wav"),
        ("3_theo_7.wav", wav([]), "3_theo_7.wav holds 0 of the 0 samples"),
        ("3_theo_7.wav", wav(np.ones(300), rate=16000), "16000 samples a second, 1 channels and 16 bits"),
        ("3_theo_7.wav", wav(np.ones(300), channels=2), "8000 samples a second, 2 channels"),
        ("3_theo_7.wav", wav(np.ones(300), dtype="u1"), "1 channels and 8 bits a sample; expected 8000, 1 and 16"),
        ("3_theo_50.wav", GOOD, "3_theo_50.wav: expected the name {digit}_{speaker}_{0 to 49}.wav"),
        ("3_thea_5.wav", GOOD, "speakers george, jackson"),
    ],
    ids=range(10),
)
def test_a_corrupt_recording_is_bad_input_with_its_name(name, data, message, tmp_path):
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "0_theo_0.wav").write_bytes(GOOD)
    (tmp_path / "recordings" / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        list(read_recordings(tmp_path))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_a_corrupt_recording_in_the_archive_leaves_nothing_prepared(folders):
    archive = folders / "fsdd_recordings.tar.gz"
    with tarfile.open(archive, "w:gz") as files:
        for name, data in {**some_recordings(), "3_theo_7.wav": GOOD[:400]}.items():
            member = tarfile.TarInfo(f"recordings/{name}")
            member.size = len(data)
            files.addfile(member, io.BytesIO(data))
    with pytest.raises(InputError, match=r"fsdd_recordings\.tar\.gz, recordings/3_theo_7\.wav holds 178 of the 300"):
        catalog.prepare_dataset("spoken_digits", folders)
    assert "spoken_digits" in catalog.unprepared()
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(InputError, match=r"fsdd_recordings\.tar\.gz cannot be read .*copy it again"):
        catalog.prepare_dataset("spoken_digits", folders)


def test_a_name_is_a_datasets_though_a_folder_is_called_so_too(folders, monkeypatch, capsys):
    from jaxmp.cli import main

    write_mnist(folders)
    monkeypatch.chdir(folders.parent)
    Path("mnist").mkdir()
    assert main(["data", "prepare", "mnist", "--manual", "manual"]) == 0
    assert capsys.readouterr().out.startswith("mnist 3.0.1 in ")
    Path("mnits").mkdir()
    assert main(["data", "prepare", "mnits", "--manual", "manual"]) == 2
    assert "did you mean 'mnist'?" in capsys.readouterr().err


def test_without_manual_files_a_builders_name_is_no_path(folders, monkeypatch, capsys):
    from jaxmp.cli import main

    monkeypatch.chdir(folders.parent)
    Path("spoken_digits").mkdir()
    assert main(["data", "prepare", "spoken_digits"]) == 2
    assert "has none of fsdd_recordings.tar.gz" in capsys.readouterr().err


def test_a_manual_folder_without_the_files_is_bad_input(folders):
    with pytest.raises(InputError, match=r"manual has none of train-images-idx3-ubyte, .*the four files of"):
        catalog.prepare_dataset("mnist", folders)
    with pytest.raises(InputError, match=r"data/downloads/manual has none of fsdd_recordings\.tar\.gz, recordings"):
        catalog.prepare_dataset("spoken_digits")
    with pytest.raises(InputError, match=r"makes mnist and spoken_digits .*not 'mnits'; did you mean 'mnist'\?"):
        catalog.prepare_dataset("mnits", folders)
    with pytest.raises(InputError, match=r"'spoken_digits' is not prepared .*data prepare spoken_digits --manual"):
        catalog.find_dataset("spoken_digits")
    (folders / "recordings").mkdir()
    with pytest.raises(InputError, match="manual has no recordings; expected"):
        catalog.prepare_dataset("spoken_digits", folders)


@pytest.mark.slow
@pytest.mark.skipif(not (MANUAL / "mnist").is_dir(), reason="needs the idx files, in ../raw/mnist beside $JAXMP_DATA")
def test_mnist_from_its_idx_files_has_the_rows_of_tfds_in_their_order(folders, monkeypatch):
    catalog.prepare_dataset("mnist", MANUAL / "mnist")
    made = TFDS("mnist", test="test").source("test")
    monkeypatch.setenv("JAXMP_DATA", REAL_DATA)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders))
    published = TFDS("mnist", test="test").source("test")
    assert made.folder != published.folder and len(made) == len(published) == 10_000
    for name in ("image", "label"):
        np.testing.assert_array_equal(made.columns[name], published.columns[name])


@pytest.mark.slow
@pytest.mark.skipif(
    not (MANUAL / "fsdd_recordings.tar.gz").exists(),
    reason="needs ../raw/fsdd_recordings.tar.gz beside $JAXMP_DATA",
)
def test_the_free_spoken_digit_dataset_has_its_3000_recordings(folders):
    assert catalog.prepare_dataset("spoken_digits", MANUAL).splits == {"train": 2400, "validation": 300, "test": 300}
