"""Datasets of files: folders of images, tables, and Hugging Face's datasets."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmp.data.augment import RandomResizedCrop
from jaxmp.data.fingerprint import fingerprint
from jaxmp.data.hugging_face import HuggingFace, _pixels
from jaxmp.data.image_folder import ImageFolder, read_image
from jaxmp.data.pipeline import batch_of, nbytes, resident
from jaxmp.data.table_files import TableFiles
from jaxmp.data.tables import read_table, write_table
from jaxmp.errors import InputError


def everything(source):
    return source[np.arange(len(source))]


# --- a folder of images


@pytest.fixture
def folder(tmp_path):
    """Images of 6 x 4 pixels: three cats and two dogs to train on, a dog to test on; no validation split."""
    rng = np.random.default_rng(0)
    for name in ("train/cat/1.png", "train/cat/2.jpg", "train/cat/3.PNG", "train/dog/1.png", "train/dog/2.png"):
        save(tmp_path / name, rng.integers(0, 256, (6, 4, 3), np.uint8))
    save(tmp_path / "test/dog/1.png", rng.integers(0, 256, (6, 4, 3), np.uint8))
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_a_class_is_a_folder_and_its_number_that_of_the_training_split(folder):
    data = ImageFolder(folder=str(folder))
    assert data.classes() == ["cat", "dog"]
    train = everything(data.source("train"))
    assert train["image"].shape == (5, 6, 4, 3) and train["label"].tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(train["image"][3], np.asarray(Image.open(folder / "train/dog/1.png")))
    assert everything(data.source("test"))["label"].tolist() == [1] and data.source("validation") is None
    source = data.source("train")
    assert source.thread_safe and nbytes(source) == 5 * (6 * 4 * 3 + 4) and set(resident(source)) == {"image", "label"}
    assert fingerprint(source)["rows"] == 5


def test_images_are_brought_to_one_size_and_to_one_number_of_channels(folder):
    save(folder / "train/dog/3.png", np.full((40, 10), 77, np.uint8))
    with pytest.raises(InputError, match=r"dog/3.png is 40 x 10 pixels, and .*cat/1.png 6 x 4; .*data\.size"):
        everything(ImageFolder(folder=str(folder)).source("train"))
    images = everything(ImageFolder(folder=str(folder), size=(5, 5), channels=1).source("train"))["image"]
    assert images.shape == (6, 5, 5, 1) and (images[-1] == 77).all()
    tall = np.repeat(np.arange(40, dtype=np.uint8), 10).reshape(40, 10)
    save(folder / "tall.png", tall)
    cropped = read_image(folder / "tall.png", (10, 10), 1)
    np.testing.assert_array_equal(cropped[..., 0], tall[15:25])


@pytest.mark.slow
def test_a_part_is_cut_at_random_in_training_and_from_the_middle_in_evaluation(folder):
    data = ImageFolder(folder=str(folder), size=(6, 6), crop=RandomResizedCrop(size=4), std=(0.5,))
    batch = {**everything(data.source("train")), "weight": np.ones(5, np.float32)}
    middle = jax.jit(data.prepare(train=False))(batch, None)["image"]
    np.testing.assert_allclose(middle, batch["image"][:, 1:5, 1:5] / np.float32(127.5), rtol=1e-6)
    parts = jax.jit(data.prepare(train=True))(batch, jax.random.key(0))["image"]
    assert parts.shape == middle.shape and (parts != middle).any()
    with pytest.raises(InputError, match=r"crop = 3: expected RandomResizedCrop\(size=224\), say"):
        ImageFolder(folder=str(folder), crop=3)


@pytest.mark.parametrize("damage", [b"", b"GIF89a", None])
def test_a_corrupt_image_is_bad_input_with_its_name(damage, folder):
    file = folder / "train/dog/2.png"
    file.write_bytes(file.read_bytes()[:60] if damage is None else damage)
    with pytest.raises(
        InputError, match=r"train/dog/2\.png cannot be read as an image \(.*copy it again, or remove it"
    ):
        everything(ImageFolder(folder=str(folder)).source("train"))


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")])
def test_an_image_of_more_than_8_bits_is_refused_with_its_name(dtype, mode, folder):
    save(folder / "train/dog/3.tiff", np.full((6, 4), 300, dtype))
    with pytest.raises(InputError, match=rf"dog/3.tiff has pixels of Pillow's mode {mode}, which 8 bits do not hold"):
        everything(ImageFolder(folder=str(folder)).source("train"))


def png(colour, channels, bits):
    """A PNG of 4 x 6 black pixels of a colour type, as Pillow does not write those of 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(4 * channels * bits // 8)) * 6
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 6, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (png(2, 3, 16), "RGB;16B"),
        (png(4, 2, 16), "LA;16B"),
        (png(6, 4, 16), "RGBA;16B"),
        (b"P6\n4 6\n65535\n" + bytes(6 * 24), "RGB;16"),
        (png(2, 3, 8), None),
        (png(6, 4, 8), None),
        (b"P6\n4 6\n255\n" + bytes(3 * 24), None),
    ],
    ids=["RGB 16", "LA 16", "RGBA 16", "PPM 16", "RGB 8", "RGBA 8", "PPM 8"],
)
def test_an_image_of_several_channels_of_more_than_8_bits_is_refused(content, mode, folder):
    (folder / "train/dog/2.png").write_bytes(content)
    source = ImageFolder(folder=str(folder)).source("train")
    if mode is None:
        assert not everything(source)["image"][-1].any()
    else:
        with pytest.raises(
            InputError, match=rf"dog/2.png has pixels of Pillow's mode {mode}, which 8 bits do not hold"
        ):
            everything(source)


@pytest.mark.parametrize("mode", ["P", "PA"])
def test_a_palette_becomes_its_colours(mode):
    image = Image.new("RGB", (3, 2), (250, 10, 20)).quantize(2).convert(mode)
    assert np.asarray(image).ndim == len(mode) + 1
    assert _pixels(image).tolist() == np.broadcast_to([250, 10, 20], (2, 3, 3)).tolist()


def test_a_folder_that_is_not_there_or_of_no_class_is_bad_input_with_the_nearest_name(folder):
    with pytest.raises(InputError, match=r"no folder 'trian' in it, .*there is test, train; did you mean 'train'\?"):
        ImageFolder(folder=str(folder), train="trian").source("train")
    with pytest.raises(InputError, match="nowhere': no folder 'train' in it"):
        ImageFolder(folder=str(folder / "nowhere")).source("train")
    (folder / "test/dgo").mkdir()
    with pytest.raises(InputError, match=r"test/dgo: 'train' has no class 'dgo', only cat, dog; did you mean 'dog'\?"):
        ImageFolder(folder=str(folder)).source("test")
    (folder / "empty/cat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"empty has no images in folders of classes; expected empty/CLASS/IMAGE.png"):
        ImageFolder(folder=str(folder), train="empty").source("train")
    with pytest.raises(InputError, match="channels = 2: expected 1 or 3"):
        ImageFolder(folder=str(folder), channels=2)


# --- tables

FLOWERS = {
    "length": np.array([5.1, 4.9, 6.3, 5.8]),
    "width": np.array([3, 2, 3, 1]),
    "species": np.array(["setosa", "virginica", "setosa", "versicolor"], object),
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_gives_features_and_labels(kind, tmp_path):
    path = str(tmp_path / f"train.{kind}")
    write_table(path, FLOWERS)
    data = TableFiles(train=path, features=("length", "width"), label="species")
    rows = everything(data.source("train"))
    assert rows["features"].dtype == np.float32
    np.testing.assert_array_equal(
        rows["features"], np.stack([FLOWERS["length"], FLOWERS["width"]], 1).astype(np.float32)
    )
    assert rows["label"].tolist() == [0, 2, 0, 1] and data.classes() == ["setosa", "versicolor", "virginica"]
    assert data.source("validation") is None and data.source("test") is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_column_is_bad_input_with_the_nearest_name(split, tmp_path):
    whole, part = str(tmp_path / "whole.csv"), str(tmp_path / "part.csv")
    write_table(whole, FLOWERS)
    write_table(part, {name: FLOWERS[name] for name in ("length", "species")})
    files = {"train": part if split == "train" else whole, "test": part}
    with pytest.raises(InputError, match=r"data\.features names 'width'; .*part\.csv has length, species$"):
        TableFiles(**files, features=("length", "width")).source(split)
    with pytest.raises(InputError, match=r"data\.label names 'spcies'; .*did you mean 'species'\?"):
        TableFiles(train=whole, label="spcies").source("train")
    with pytest.raises(InputError, match=r"data\.features names 'species', which in .* holds text; expected numbers"):
        TableFiles(train=whole, features=("species",)).source("train")
    with pytest.raises(InputError, match=r"data\.features = 'length': expected a tuple"):
        TableFiles(train=whole, features="length")


def test_a_label_that_no_training_row_has_is_bad_input_with_its_row(tmp_path):
    train, test = str(tmp_path / "train.csv"), str(tmp_path / "test.csv")
    write_table(train, FLOWERS)
    write_table(test, {**FLOWERS, "species": np.array(["setosa", "versicolour", "setosa", "setosa"], object)})
    with pytest.raises(InputError, match=r"test\.csv, row 1: species is 'versicolour', .*mean 'versicolor'\?"):
        TableFiles(train=train, test=test, label="species").source("test")


def test_only_labels_of_text_have_names_and_all_splits_have_labels_of_one_kind(tmp_path):
    files = {"numbers": [2, 10, 7, 2], "text": ["b", "a", "c", "1"], "digits": [1, 1, 1, 1]}
    for name, column in files.items():
        write_table(tmp_path / f"{name}.csv", {**FLOWERS, "species": np.array(column)})

    def labels(train, test):
        data = TableFiles(train=str(tmp_path / f"{train}.csv"), test=str(tmp_path / f"{test}.csv"), label="species")
        return data.classes(), everything(data.source("test"))["label"].tolist()

    assert labels("numbers", "numbers") == (None, [2, 10, 7, 2])
    assert labels("text", "text") == (["1", "a", "b", "c"], [2, 1, 3, 0])
    assert labels("text", "digits") == (["1", "a", "b", "c"], [0, 0, 0, 0])
    with pytest.raises(InputError, match=r"text\.csv: species holds text, and numbers in .*numbers\.csv"):
        labels("numbers", "text")
    assert TableFiles(train=str(tmp_path / "text.csv")).classes() is None


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_a_feature_beyond_float32_is_refused(value, tmp_path):
    write_table(tmp_path / "t.npz", {"a": np.array([1.0, np.inf]), "b": np.array([[1.0, 2.0], [3.0, value]])})
    with pytest.raises(InputError) as error:
        TableFiles(train=str(tmp_path / "t.npz"), features=("a", "b")).source("train")
    assert f"'b', which in {tmp_path / 't.npz'} has the value {value:g}, which float32" in str(error.value)


@pytest.mark.parametrize("fields", [{"label": "species"}, {"features": ("length", "width")}])
def test_a_column_that_would_be_replaced_is_refused(fields, tmp_path):
    path, (name, value) = str(tmp_path / "t.csv"), *fields.items()
    write_table(path, {**FLOWERS, name: np.arange(4)})
    with pytest.raises(InputError) as error:
        TableFiles(train=path, **fields).source("train")
    assert f"t.csv has a column {name!r}, which data.{name} = {value!r} would replace; rename it" in str(error.value)
    columns = TableFiles(train=path, **{name: name if name == "label" else (name,)}).source("train").columns
    assert columns[name].tolist() == ([0, 1, 2, 3] if name == "label" else [[0], [1], [2], [3]])


def test_labels_that_are_no_text_have_no_names(tmp_path):
    import decimal

    import pyarrow as pa
    import pyarrow.parquet

    path = str(tmp_path / "t.parquet")
    pyarrow.parquet.write_table(pa.table({"n": pa.array([decimal.Decimal(2), decimal.Decimal(10)])}), path)
    with pytest.raises(InputError, match=r"t\.parquet: n is Decimal\('2'\) in row 0; expected texts, or numbers alone"):
        TableFiles(train=path, label="n").source("train")


@pytest.mark.parametrize("label", ["species", "label"])
def test_rows_of_a_file_become_what_training_rows_are(label, tmp_path):
    path = str(tmp_path / "t.csv")
    write_table(path, {name if name != "species" else label: column for name, column in FLOWERS.items()})
    data = TableFiles(train=path, features=("length", "width"), label=label, images=())
    rows = everything(data.source("train"))
    for given in (read_table(path), rows, {name: column.tolist() for name, column in read_table(path).items()}):
        batch = batch_of(data, given, ("features",))
        np.testing.assert_array_equal(batch["features"], rows["features"])
        assert batch["label"].tolist() == [0, 2, 0, 1]
    # Columns that the model does not take have any dtype.
    few = batch_of(data, {"length": [5], "width": [0.5]}, ("features",))
    assert few["features"].tolist() == [[5, 0.5]] and "label" not in few
    with pytest.raises(InputError, match=rf"these rows, row 0: {label} is 'setoza', .*did you mean 'setosa'"):
        batch_of(data, {label: ["setoza"]})


def test_npy_files_in_a_folder_are_columns_that_stay_on_the_disk(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12.0, dtype=np.float32).reshape(4, 3))
    np.save(tmp_path / "label.npy", np.arange(4))
    source = TableFiles(train=str(tmp_path)).source("train")
    x = np.arange(12.0).reshape(4, 3)
    for column in (source.columns["x"], pickle.loads(pickle.dumps(source.columns["x"]))):
        for rows in ([0, 1, 2, 3], [3], [1, 2, 0, 0, 3], [2, 1, 0], [-1, 0], [0, 0], []):
            read = column[np.array(rows, int)]
            assert read.tolist() == x[rows].tolist() and read.shape == (len(rows), 3), rows
    assert isinstance(source.columns["label"], np.ndarray) and nbytes(source) == 4 * (12 + 8)
    np.save(tmp_path / "label.npy", np.arange(5))
    with pytest.raises(InputError, match="has columns of lengths"):
        TableFiles(train=str(tmp_path)).source("train")
    os.truncate(tmp_path / "x.npy", 150)
    several, header = io.BytesIO(), b"{'descr': (\n"
    np.savez(several, x=np.zeros(4))
    bad = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    for content in (None, several.getvalue(), bad):
        if content is not None:
            (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.npy cannot be read as npy"):
            TableFiles(train=str(tmp_path)).source("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data\.train '.*empty': the folder has no \.npy files"):
        TableFiles(train=str(tmp_path / "empty")).source("train")
    with pytest.raises(InputError, match=r"data\.test 'no\.csv': No such file"):
        TableFiles(train=str(tmp_path), test="no.csv").source("test")


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [-1, 0, 1, 2]])
def test_a_label_out_of_range_is_refused_before_the_first_step(labels, tmp_path):
    import jaxmp
    from jaxmp.models.mlp import MLP

    path = str(tmp_path / "t.npz")
    write_table(path, {"x": np.ones((4, 2), np.float32), "label": np.array(labels)})
    experiment = jaxmp.Experiment(
        model=MLP(features=(), classes=3),
        data=TableFiles(train=path, images=(), batch_size=2),
        task=jaxmp.Classification(inputs=("x",)),
    )
    with pytest.raises(InputError, match=rf"labels run from {labels[0]} to {labels[-1]}; expected 0 to 2"):
        jaxmp.fit(experiment, workdir=tmp_path)


# --- jaxmp data info


def test_info_and_prepare_show_what_files_have(folder, capsys):
    from jaxmp.cli import main

    write_table(folder / "flowers.csv", FLOWERS)
    np.save(folder / "train/x.npy", np.zeros((4, 3), np.float32))
    for path, lines in {
        str(folder): ["rows      train 5 (cat 3, dog 2), test 1 (cat 0, dog 1)", "image uint8 (6, 4, 3), of the first"],
        str(folder / "flowers.csv"): ["rows      4", "length float64 (), width int64 (), species text ()"],
        str(folder / "train"): ["TableFiles(train=", "features  x float32 (3,)"],
    }.items():
        for command in ("info", "prepare"):
            assert main(["data", command, path]) == 0
            out = capsys.readouterr().out
            assert all(line in out for line in lines), out
    for path, message in {
        str(folder / "flowers.cvs"): "no such file or folder",
        str(folder / "test/dog"): "no folder 'train' in it",
        "flowers.csv": "data 'flowers.csv': there is no such file",
    }.items():
        assert main(["data", "info", path]) == 2
        assert message in capsys.readouterr().err


# --- Hugging Face


def test_what_is_no_dataset_of_hugging_face_is_bad_input():
    for value, what in ((None, "NoneType"), ({"x": [1]}, "dict")):
        with pytest.raises(InputError, match=rf"\('train'\) returned {what}; expected a datasets\.Dataset"):
            HuggingFace(lambda split, value=value: value).source("train")
    assert HuggingFace(lambda split: None).source("test") is None
    with pytest.raises(InputError, match=r"\('train'\) raised KeyError"):
        HuggingFace(lambda split: {}[split]).source("train")


@pytest.mark.slow
def test_a_dataset_of_hugging_face_has_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    made = datasets.Dataset.from_dict(
        {
            "label": [0, 1, 1, 0, 2],
            "text": ["a", "b", "", "é", "e"],
            "vector": [[row, 0.5] for row in range(5)],
            "ragged": [None, *([0] * row for row in range(4))],
            "image": [Image.fromarray(image) for image in pixels],
        },
        features=datasets.Features(
            {
                "label": datasets.ClassLabel(num_classes=3),
                "text": datasets.Value("string"),
                "vector": datasets.Sequence(datasets.Value("float32")),
                "ragged": datasets.Sequence(datasets.Value("int32")),
                "image": datasets.Image(),
            }
        ),
    ).with_format("numpy")
    source = HuggingFace(lambda split: made if split == "train" else None).source("train")
    rows = source[np.array([4, 0])]
    assert rows["label"].tolist() == [2, 0] and rows["text"].tolist() == ["e", "a"]
    assert rows["vector"].tolist() == [[4, 0.5], [0, 0.5]] and rows["ragged"].tolist() == [[0, 0, 0], None]
    np.testing.assert_array_equal(rows["image"], pixels[[4, 0]])
    assert isinstance(source.columns["label"], np.ndarray) and set(resident(source)) == {"label", "vector", "image"}
    both = datasets.DatasetDict({"train": made})
    with pytest.raises(InputError, match=r"returned DatasetDict; expected a datasets\.Dataset"):
        HuggingFace(lambda split: both).source("train")
