"""Random splits, folds and balanced rows, of arrays and of any dataset."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmp.data.arrays import Arrays
from jaxmp.data.dataset import Dataset
from jaxmp.data.source import Columns
from jaxmp.data.splits import balanced, k_folds, random_split
from jaxmp.errors import InputError
from jaxmp.experiment.canonical import canonical
from jaxmp.experiment.experiment import Experiment
from jaxmp.experiment.overrides import override
from jaxmp.experiment.reachable import made_by
from jaxmp.models.mlp import MLP

ROWS, SPLITS = 103, ("train", "validation", "test")


class Lazily:
    """A source that is no arrays."""

    def __len__(self):
        return ROWS

    def __getitem__(self, indices):
        indices = np.asarray(indices)
        return {"x": indices.astype(np.float32), "label": (indices % 10 == 0).astype(int)}


class OnDisk:
    """A column that is no array in memory."""

    def __init__(self, values):
        self.values, self.dtype, self.ndim, self.shape = values, values.dtype, values.ndim, values.shape

    def __len__(self):
        return len(self.values)

    def __getitem__(self, indices):
        return self.values[indices]


@dataclasses.dataclass(frozen=True)
class Mine(Dataset):
    lazy: bool = True

    def source(self, split):
        if split != "train":
            return None
        rows = Lazily()[np.arange(ROWS)]
        return Lazily() if self.lazy else Columns({"x": rows["x"], "label": OnDisk(rows["label"])})


ARRAYS = Lazily()[np.arange(ROWS)]
DATASETS = {"arrays": ARRAYS, "lazy": Mine(), "on disk": Mine(lazy=False), "function": Arrays(Mine().source)}
DATASETS["function"] = Arrays(lambda split: ARRAYS if split == "train" else None)


def rows_of(data, split):
    source = data.read(split)
    return np.array([], int) if source is None else source[np.arange(len(source))]["x"].astype(int)


@pytest.mark.parametrize("name", DATASETS)
def test_the_rows_of_random_splits_are_each_in_one_split_and_the_same_for_each_kind_of_data(name):
    data = random_split(DATASETS[name], validation=0.2, test=13, seed=3)
    parts = [rows_of(data, split) for split in SPLITS]
    assert [len(part) for part in parts] == [103 - 21 - 13, 21, 13]
    assert sorted(np.concatenate(parts)) == list(range(ROWS))
    expected = random_split(ARRAYS, validation=0.2, test=13, seed=3)
    assert all(np.array_equal(part, rows_of(expected, split)) for part, split in zip(parts, SPLITS, strict=True))
    other = random_split(DATASETS[name], validation=0.2, test=13, seed=4)
    assert not np.array_equal(rows_of(other, "validation"), parts[1])


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.floats(0.05, 0.6), st.integers(0, 30))
def test_a_stratified_split_has_each_class_to_a_row(seed, validation, test):
    label = np.array([0] * 11 + [1] * 57 + [2] * 35)
    data = random_split(
        {"x": np.arange(103), "label": label}, validation=validation, test=test, seed=seed, stratify="label"
    )
    left = np.bincount(label).astype(float)
    for split, count in (("validation", round(validation * 103)), ("test", test)):
        share = count / left.sum()
        found = np.bincount(label[rows_of(data, split)], minlength=3) if count else np.zeros(3)
        assert found.sum() == count and np.all(np.abs(found - share * left) < 1)
        left -= found


@pytest.mark.parametrize("name", DATASETS)
def test_each_row_is_validated_in_one_fold_and_trained_in_the_others(name):
    folds = k_folds(DATASETS[name], 4, stratify="label")
    validated = [rows_of(fold, "validation") for fold in folds]
    assert sorted(np.concatenate(validated)) == list(range(ROWS))
    for fold, rows in zip(folds, validated, strict=True):
        assert sorted([*rows, *rows_of(fold, "train")]) == list(range(ROWS))
        assert np.sum(rows % 10 == 0) in (2, 3) and len(rows) in (25, 26)
    assert len({str(canonical(fold, "data")) for fold in folds}) == 4


@pytest.mark.parametrize("name", DATASETS)
def test_balanced_rows_come_as_often_from_each_class_and_evaluation_stays(name):
    split = random_split(DATASETS[name], validation=0.2, stratify="label")
    data = balanced(split, "label")
    rows = rows_of(data, "train")
    assert np.sum(rows % 10 == 0) == np.sum(rows % 10 != 0)
    assert set(rows) == set(rows_of(split, "train"))
    counts = np.unique(rows[rows % 10 == 0], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(rows_of(data, "validation"), rows_of(split, "validation"))
    with pytest.raises(InputError, match="balanced already"):
        random_split(data)


def test_datas_own_splits_stay_where_no_share_is_taken():
    data = random_split(Arrays.of(ARRAYS, test={"x": np.arange(5), "label": np.arange(5)}), validation=0.5)
    assert list(rows_of(data, "test")) == [0, 1, 2, 3, 4] and len(rows_of(data, "train")) == 51


def test_arrays_of_arrays_are_known_by_what_they_hold_and_travel():
    values = {"x": np.arange(6.0).reshape(3, 2), "text": ["a", "b", "c"], "label": [0, 1, 0]}
    data = Arrays.of(values, validation=values, batch_size=2)
    assert data.source("test") is None and list(data.source("train")[np.array([2])]["text"]) == ["c"]
    assert pickle.loads(pickle.dumps(data)).source("validation").columns.keys() == values.keys()

    def identity(**changed):
        experiment = Experiment(MLP((2,), 2), Arrays.of({**values, **changed}, batch_size=2))
        return experiment.hash, made_by(experiment)

    assert identity() == identity()
    assert len({identity(**changed)[0] for changed in ({}, {"x": values["x"] + 1}, {"text": ["a", "b", "d"]})}) == 3


def test_cuts_are_a_part_of_the_hash_and_the_command_line_leaves_them():
    plain = Experiment(MLP((2,), 2), Arrays.of(ARRAYS))
    cut = dataclasses.replace(plain, data=random_split(plain.data))
    assert "cuts" in str(cut.to_json()) and plain.hash != cut.hash
    changed = override(cut, ["--data.batch-size", "8", "--seed", "1"])
    assert changed.data.cuts == cut.data.cuts and changed.data.batch_size == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_split(3), "expected a Dataset, such as TFDS"),
        (lambda: random_split(ARRAYS, validation=0.5, test=0.5), "leave no rows"),
        (lambda: random_split(ARRAYS, validation=-0.1), "validation = -0.1: expected a share below 1"),
        (lambda: random_split(ARRAYS, validation=1.5), "expected a share below 1, or a whole number"),
        (lambda: random_split(ARRAYS, validation=100, test=3).read("train"), "rows leave none of 103"),
        (lambda: random_split(ARRAYS, validation=0.004).read("train"), "validation = 0.004 of 103 rows is none"),
        (lambda: random_split(ARRAYS, test=0.004).read("test"), "test = 0.004 of 103 rows is none"),
        (lambda: random_split(ARRAYS, stratify="labels").read("train"), "no column 'labels'.*did you mean 'label'"),
        (lambda: random_split({"x": np.ones((4, 2))}, stratify="x").read("train"), "expected one label a row"),
        (lambda: random_split(ARRAYS, seed=None), "random_split: seed = None: expected a whole number of at least 0"),
        (lambda: k_folds(ARRAYS, seed=1.5), "k_folds: seed = 1.5: expected a whole number of at least 0"),
        (lambda: balanced(ARRAYS, "label", seed=True), "balanced: seed = True: expected a whole number of at least 0"),
        (lambda: k_folds(ARRAYS, 1), "k = 1: expected a whole number of at least 2"),
        (lambda: k_folds(ARRAYS, 104)[0].read("train"), "104 folds of 103 rows"),
        (lambda: Arrays.of([1, 2]), "train is a list; expected arrays by name"),
        (lambda: Mine(cuts=(3,)), "expected what jaxmp.random_split sets"),
    ],
)
def test_what_cannot_be_split_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("names", [(b"\xff\xfe", b"caf\xc3\xa9"), ("\u00e9", "\u20ac"), (b"a", b"b")], ids=str)
def test_classes_may_be_texts_of_any_bytes(names):
    rows = {"x": np.arange(40), "label": np.array([names[row % 4 == 0] for row in range(40)], object)}
    assert np.sum(rows_of(random_split(rows, validation=0.5, stratify="label"), "validation") % 4 == 0) == 5
    assert all(np.sum(rows_of(f, "validation") % 4 == 0) == 2 for f in k_folds(rows, stratify="label"))
    assert len(rows_of(balanced(rows, "label"), "train")) == 60
