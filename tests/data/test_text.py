from __future__ import annotations

import numpy as np
import pytest

from jaxmp.data.source import Columns
from jaxmp.data.text import TextBytes, windows
from jaxmp.data.tfds import TFDS
from jaxmp.errors import InputError


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_each_token_but_the_first_is_a_target_once_and_follows_its_input(count):
    tokens = np.arange(10, 10 + count)
    rows = windows(tokens, 4)
    inputs, targets = rows["tokens"], rows["next_tokens"]
    assert inputs.shape == targets.shape == (-(-(count - 1) // 4), 4) and inputs.dtype == targets.dtype == np.int32
    counts = targets.ravel() >= 0
    np.testing.assert_array_equal(targets.ravel()[counts], tokens[1:])
    np.testing.assert_array_equal(inputs.ravel()[counts], tokens[:-1])
    assert not inputs.ravel()[~counts].any() and (targets.ravel()[~counts] == -1).all()


@pytest.fixture
def texts(monkeypatch):
    def source(self, split):
        column = np.empty(3, object)
        column[:] = [b"abcde", b"x", "\u00e9f".encode()]
        assert (self.name, self.train, self.version) == ("books", "train[:3]", "1.0.0")
        return Columns({"text": column, "number": np.arange(3)})

    monkeypatch.setattr(TFDS, "source", source)
    return {"name": "books", "train": "train[:3]", "version": "1.0.0"}


def test_windows_do_not_go_from_one_text_into_the_next(texts):
    source = TextBytes(length=3, **texts).source("train")
    np.testing.assert_array_equal(source.columns["tokens"], [[97, 98, 99], [100, 0, 0], [0xC3, 0xA9, 0]])
    np.testing.assert_array_equal(source.columns["next_tokens"], [[98, 99, 100], [101, -1, -1], [0xA9, 102, -1]])


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"length": 0}, "data.length = 0: expected a whole number of at least 1"),
        ({"column": "txt"}, "data.column is 'txt'; books has text, number; did you mean 'text'?"),
        ({"column": "number"}, "data.column is 'number', which holds int64; expected texts"),
    ],
)
def test_a_column_without_texts_is_refused(texts, fields, names):
    with pytest.raises(InputError) as error:
        TextBytes(**{**texts, **fields}).source("train")
    assert names in str(error.value)
