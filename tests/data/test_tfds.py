"""Prepared TFDS datasets: found, decoded once, and never half there."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmp.data import catalog
from jaxmp.data.cache import CachedColumns, cache_folder, prepare_once, save_columns
from jaxmp.data.records import decode_images, decode_records
from jaxmp.data.tfds import TFDS
from jaxmp.errors import InputError

REAL_DATA = os.environ.get("JAXMP_DATA")
needs_data = pytest.mark.skipif(not REAL_DATA, reason="needs prepared MNIST and CIFAR-10 in $JAXMP_DATA")


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """Digits, prepared in a cache of these tests; no data folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAXMP_DATA", str(tmp_path_factory.mktemp("no_data")))
        yield catalog.find_dataset("digits")


@pytest.fixture
def copy(prepared, tmp_path, monkeypatch):
    """The files of digits as dataset "copy" in a data folder, with an empty cache: a folder to damage."""
    folder = tmp_path / "data" / "copy" / "1.0.0"
    shutil.copytree(prepared.folder, folder)
    monkeypatch.setenv("JAXMP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def everything(source):
    return source[np.arange(len(source))]


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


# --- digits


def test_digits_is_scikit_learns_set_split_at_random_within_each_label():
    from sklearn.datasets import load_digits

    splits = [everything(TFDS().source(split)) for split in ("train", "validation", "test")]
    images, labels = (np.concatenate([split[name] for split in splits]) for name in ("image", "label"))
    assert [len(split["label"]) for split in splits] == [1258, 270, 269]
    assert (images.dtype, images.shape, images.max()) == (np.uint8, (1797, 8, 8, 1), 16)
    original = load_digits()
    pairs = sorted(zip(map(bytes, images), labels.tolist(), strict=True))
    assert pairs == sorted(zip(map(bytes, original.images.astype(np.uint8)), original.target.tolist(), strict=True))
    for split in splits:
        share = len(split["label"]) / 1797
        np.testing.assert_allclose(np.bincount(split["label"]), np.bincount(labels) * share, atol=1)


def test_a_prepared_set_is_its_files_alone(prepared):
    assert all(file.is_file() for file in prepared.folder.iterdir())


def test_the_split_of_digits_never_changes():
    rows = everything(TFDS().source("test"))
    digest = hashlib.sha256(b"".join(sorted(bytes(image) for image in rows["image"]))).hexdigest()
    assert digest[:16] == "40ace93bb535873b"


@pytest.mark.slow
def test_reading_needs_neither_tensorflow_nor_once_decoded_tfds(prepared):
    everything(TFDS().source("test"))
    program = (
        "import sys; from jaxmp.data import arrays, catalog, pipeline, tfds\n"
        "print(len(tfds.TFDS().source('test')))\n"
        "print({'tensorflow', 'tensorflow_datasets', 'grain', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["269", "set()"]
    assert "tensorflow" not in sys.modules


# --- finding


def test_a_dataset_that_is_not_there_is_bad_input_with_the_command_that_prepares_it(copy):
    with pytest.raises(InputError) as error:
        TFDS("digtis").source("train")
    for part in ("'digtis' is not prepared", str(copy.parents[1]), "`jaxmp data prepare digtis`", "mean 'digits'?"):
        assert part in str(error.value)


def test_the_newest_version_is_read_unless_one_is_given(copy):
    for version in ("9.0.0", "10.0.0", "2.0.0.incompleteXY"):
        shutil.copytree(copy, copy.with_name(version))
    assert catalog.find_dataset("copy").version == "10.0.0"
    assert catalog.find_dataset("copy", "9.0.0").folder == copy.with_name("9.0.0")
    with pytest.raises(InputError, match=r"not prepared in version '3.0.0', only in 10.0.0, 9.0.0, 1.0.0"):
        TFDS("copy", version="3.0.0").source("train")


def test_a_config_is_part_of_the_name(copy):
    shutil.copytree(copy, copy.parent / "small" / "1.0.0")
    shutil.rmtree(copy)
    assert len(TFDS("copy/small").source("test")) == 269
    with pytest.raises(InputError, match="'copy' needs a config; prepared: copy/small"):
        TFDS("copy").source("test")


def test_the_list_has_what_is_prepared_and_our_own_even_before(copy, prepared):
    entries = {entry.name: entry for entry in catalog.list_datasets()}
    assert list(entries) == ["copy", "digits"]
    assert entries["copy"].splits == {"train": 1258, "validation": 270, "test": 269}
    assert entries["copy"].folder == copy
    assert entries["digits"].splits == {}


def test_a_description_has_features_licence_and_citation(prepared):
    description = catalog.describe("digits")
    assert description.dataset == prepared
    assert description.features == {"image": "uint8 (8, 8, 1)", "label": "int64 ()"}
    assert description.licence == "CC BY 4.0"
    assert "Alpaydin" in description.citation


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_description_of_the_features_is_bad_input(content, copy):
    (copy / "features.json").write_text(content)
    for read in (lambda: TFDS("copy").source("train"), lambda: catalog.describe("copy")):
        with pytest.raises(InputError, match=r"features\.json .*cannot be read"):
            read()


def test_a_broken_description_is_bad_input(copy):
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset_info\.json, the description of a dataset, cannot be read"):
        TFDS("copy").source("train")


# --- preparing


def test_preparing_what_is_prepared_does_nothing(prepared, copy, monkeypatch):
    assert catalog.prepare_dataset("copy").folder == copy
    monkeypatch.setenv("XDG_CACHE_HOME", str(prepared.folder.parents[3]))
    assert catalog.prepare_dataset("digits") == prepared


def test_preparing_an_unknown_dataset_is_bad_input():
    with pytest.raises(InputError, match=r"TFDS has no dataset 'mnits'; did you mean 'mnist'\?"):
        catalog.prepare_dataset("mnits")


def test_preparing_a_dataset_of_tfds_without_tensorflow_says_which_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="TensorFlow, and that is not installed: `uv sync --extra prepare`"):
        catalog.prepare_dataset("mnist")


def test_preparing_a_dataset_of_tfds_writes_array_record_to_our_own_folder(prepared, tmp_path, monkeypatch):
    asked = {}

    class Builder:
        def __init__(self, name, **options):
            asked.update(name=name, **options)

        def download_and_prepare(self):
            shutil.copytree(prepared.folder, asked["data_dir"] / "mnist" / "3.0.1")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("tensorflow_datasets.builder", Builder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert catalog.prepare_dataset("mnist").folder == catalog.own_folder() / "mnist" / "3.0.1"
    assert asked == {"name": "mnist", "data_dir": catalog.own_folder(), "file_format": "array_record"}
    with pytest.raises(InputError, match=r"preparing 'cifar10' in .* failed: FileExistsError"):
        catalog.prepare_dataset("cifar10")


def test_a_place_that_cannot_be_written_is_bad_input_for_our_own(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot prepare 'digits' in .*\$XDG_CACHE_HOME names another place"):
        TFDS().source("train")


# --- splits


@pytest.mark.parametrize(
    "spec, rows", [("train[:100]", 100), ("train[80%:]", 252), ("train+test", 1527), ("train[-5:]+test[:5]", 10)]
)
def test_a_split_is_any_that_tfds_understands(spec, rows):
    assert len(TFDS(train=spec).source("train")) == rows


def test_slices_are_parts_of_the_split():
    whole = everything(TFDS().source("train"))
    parts = [everything(TFDS(train=spec).source("train")) for spec in ("train[:700]", "train[700:]")]
    assert same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize(
    "spec, message",
    [
        ("tain", r"no split 'tain'; its splits are train \(1258 rows\), .*did you mean 'train'"),
        ("train[:", r"no split 'train\[:'"),
        ("train[5000:]", r"no split 'train\[5000:\]'"),
        ("train+tset", r"no split 'train\+tset'"),
        ("train[:0]", "has no rows"),
    ],
)
def test_a_split_that_is_not_there_is_bad_input_and_writes_nothing(spec, message, copy):
    with pytest.raises(InputError, match=message):
        TFDS("copy", train=spec).source("train")
    assert not cache_folder().exists()


def test_a_set_without_validation_says_how_to_cut_one(copy):
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "validation"', '"name": "other"'))
    with pytest.raises(InputError, match=r"--data.train 'train\[:1132\]' --data.validation 'train\[1132:\]'"):
        TFDS("copy").source("validation")


# --- damaged files


def half(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def scrambled(path):
    content = bytearray(path.read_bytes())
    content[70_000:70_100] = bytes(100)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [half, empty, scrambled, Path.unlink])
def test_a_damaged_data_file_is_bad_input_with_its_name_and_leaves_no_cache(damage, copy):
    (file,) = copy.glob("*train*")
    damage(file)
    with pytest.raises(InputError, match=rf"data file .*{file.name} is damaged or missing .*data prepare copy"):
        TFDS("copy").source("train")
    assert not list(cache_folder().rglob("*.npy"))
    assert len(TFDS("copy").source("test")) == 269


# --- the decoded cache


def test_decoding_happens_once(copy, monkeypatch):
    first = everything(TFDS("copy").source("train"))
    monkeypatch.setattr("jaxmp.data.tfds._chunks", None)
    source = TFDS("copy").source("train")
    assert isinstance(source.columns["image"], np.memmap)
    assert same(everything(source), first)


@pytest.mark.slow
def test_a_changed_dataset_is_decoded_again(copy):
    before = TFDS("copy").source("test").folder
    (file,) = copy.glob("*-test*")
    os.utime(file, ns=(0, 0))
    assert TFDS("copy").source("test").folder != before


def truncate_array(folder):
    half(folder / "image.npy")


def empty_array(folder):
    empty(folder / "label.npy")


def other_array(folder):
    np.save(folder / "image.npy", np.zeros(3))


def spoil_description(folder):
    (folder / "columns.json").write_text('{"image"')


def lose_array(folder):
    (folder / "label.npy").unlink()


@pytest.mark.parametrize("damage", [truncate_array, empty_array, other_array, spoil_description, lose_array])
def test_a_damaged_cache_is_noticed_and_made_again(damage, copy):
    first = TFDS("copy").source("train")
    rows = everything(first)
    damage(first.folder)
    assert same(everything(TFDS("copy").source("train")), rows)
    assert same(everything(CachedColumns(first.folder)), rows)


def test_without_a_place_for_the_cache_decoding_goes_to_memory(copy, monkeypatch):
    rows = everything(TFDS("copy").source("train"))
    (copy / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "file"))
    assert same(everything(TFDS("copy").source("train")), rows)


def test_on_a_full_disk_decoding_goes_to_memory_and_leaves_nothing(copy):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # the images take 80,512 bytes
    try:
        source = TFDS("copy").source("train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(source) == 1258
    assert not list(cache_folder().rglob("*.npy"))
    assert same(everything(source), everything(TFDS("copy").source("train")))


def test_only_one_of_many_prepares_and_the_others_wait(tmp_path):
    built = []

    def build(draft):
        built.append(draft)
        time.sleep(0.1)  # so that all the others come meanwhile
        (draft / "content").write_text("whole")

    def read(folder):
        return (folder / "content").read_text()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: prepare_once(tmp_path / "set", build, read), range(8)))
    assert results == ["whole"] * 8
    assert len(built) == 1


def test_a_process_killed_half_way_leaves_no_broken_set(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from jaxmp.data.cache import prepare_once
def build(draft):
    (draft / "content").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
prepare_once(Path({str(tmp_path)!r}) / "set", build, lambda folder: (folder / "content").read_text())
"""
    killed = subprocess.run([sys.executable, "-c", program])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "set.draft" / "content").exists()
    assert not (tmp_path / "set").exists()

    def build(draft):
        assert not list(draft.iterdir())
        (draft / "content").write_text("whole")

    assert prepare_once(tmp_path / "set", build, lambda folder: (folder / "content").read_text()) == "whole"
    assert not (tmp_path / "set.draft").exists()


def test_text_is_kept_as_bytes_of_any_length(tmp_path):
    texts = [b"", b"a", b"\0b\0", "é".encode() * 300]
    save_columns(tmp_path, 4, [{"a/b": np.array(texts[:3], object)}, {"a/b": np.array(texts[3:], object)}])
    source = CachedColumns(tmp_path)
    assert len(source) == 4
    assert source[np.array([3, 0, 2, -4])]["a/b"].tolist() == [texts[3], b"", b"\0b\0", b""]


# --- decoding


def test_features_of_any_kind_become_columns():
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "box": {"corner": tfds.features.Tensor(shape=(2,), dtype=np.float32), "kind": np.int32},
            "name": tfds.features.Text(),
            "value": tfds.features.Scalar(np.float32),
        }
    )
    rows = [
        {"box": {"corner": np.float32([row, 2]), "kind": row}, "name": "ab" * row, "value": row / 4} for row in range(3)
    ]
    columns = decode_records(features, [features.serialize_example(row) for row in rows])
    np.testing.assert_array_equal(columns["box/corner"], np.float32([[0, 2], [1, 2], [2, 2]]))
    assert columns["box/kind"].tolist() == [0, 1, 2]
    assert columns["name"].tolist() == [b"", b"ab", b"abab"]
    assert columns["value"].tolist() == [0, 0.25, 0.5]


def test_rows_of_different_shapes_are_bad_input():
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"sequence": tfds.features.Sequence(np.int32)})
    records = [features.serialize_example({"sequence": list(range(length))}) for length in (2, 3)]
    with pytest.raises(InputError, match="'sequence' has rows of different shapes"):
        decode_records(features, records)


def encoded(pixels, form):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_are_decoded_to_one_array(channels):
    images = np.random.default_rng(channels).integers(0, 256, (40, 7, 5, channels), np.uint8)
    decoded = decode_images([encoded(image, "png") for image in images], (7, 5, channels))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, images)


def test_a_jpeg_is_decoded_beside_a_png():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    jpeg = encoded(pixels, "jpeg")
    decoded = decode_images([jpeg, encoded(pixels, "png")], (6, 6, 3))
    np.testing.assert_array_equal(decoded, [np.asarray(Image.open(io.BytesIO(jpeg))), pixels])


@pytest.mark.parametrize("dtype, shape", [(np.uint8, (5, 6, 3)), (np.uint8, (6, 6)), (np.uint16, (6, 6))])
def test_an_image_of_another_shape_or_depth_is_refused(dtype, shape):
    pixels = np.zeros((6, 6, 3), np.uint8)
    with pytest.raises(ValueError, match=r"an image is u?int\d+ \(\d, 6, \d\), not uint8 \(6, 6, 3\)"):
        decode_images([encoded(pixels, "png"), encoded(np.zeros(shape, dtype), "png")], (6, 6, 3))


@pytest.mark.parametrize("cut", [4, 60])
def test_a_damaged_image_is_an_error(cut):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    with pytest.raises((OSError, SyntaxError)):
        decode_images([encoded(pixels, "png")[:cut]], (6, 6, 3))


# --- real data


@needs_data
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_rows_are_those_that_tfds_decodes(name, monkeypatch, caplog):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("JAXMP_DATA", REAL_DATA)
    rows = everything(TFDS(name, train="train[500:600]").source("train"))
    source = tfds.builder_from_directory(catalog.find_dataset(name).folder).as_data_source(split="train")
    for row in range(100):
        example = source[500 + row]
        assert example.keys() == rows.keys()
        assert all(np.array_equal(rows[key][row], example[key]) for key in example)


@needs_data
def test_text_comes_as_bytes(monkeypatch):
    monkeypatch.setenv("JAXMP_DATA", REAL_DATA)
    rows = everything(TFDS("glue/sst2").source("validation"))
    assert len(rows["sentence"]) == 872
    assert all(isinstance(sentence, bytes) and sentence for sentence in rows["sentence"])


def test_a_column_that_npy_files_do_not_hold_is_no_cache_but_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    column = np.arange(3).astype(jnp.bfloat16)
    with pytest.raises(OSError, match=r"column 'x' is bfloat16, which \.npy files do not hold"):
        save_columns(tmp_path, 3, [{"x": column}])
    file = dataclasses.make_dataclass("File", ["take"])(3)
    monkeypatch.setattr("jaxmp.data.tfds._open", lambda *_: (None, [file]))
    monkeypatch.setattr("jaxmp.data.tfds._chunks", lambda *_: iter([{"x": column}]))
    found = TFDS("digits").source("train").columns["x"]
    assert found.dtype == jnp.bfloat16 and found.tolist() == [0, 1, 2]
