from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxmp.data import encoded, text
from jaxmp.data.arrays import Arrays
from jaxmp.data.catalog import Description, Prepared
from jaxmp.data.fingerprint import changed_rows, fingerprint
from jaxmp.data.masking import Masking
from jaxmp.data.pipeline import batch_of
from jaxmp.data.splits import balanced, k_folds, random_split
from jaxmp.data.text import PackedTexts, TextRows, TextWindows, describe_texts, pack, windows
from jaxmp.data.tokenizer import Bytes, Characters, WordPiece
from jaxmp.errors import InputError
from jaxmp.models.rnn import SequenceClassifier
from jaxmp.runs.checks import check_vocabulary

PAD, CLS, SEP, MASK = 256, 258, 259, 260
TEXTS = [b"abcde", b"x", "\u00e9f".encode()]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def of(texts, **columns):
    return Arrays(lambda split: None if split == "test" else {"text": list(texts), **columns})


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


def test_windows_do_not_go_from_one_text_into_the_next():
    data = TextWindows(of(TEXTS), length=3)
    rows = data.read("train").columns
    np.testing.assert_array_equal(rows["tokens"], [[97, 98, 99], [100, 0, 0], [0xC3, 0xA9, 0]])
    np.testing.assert_array_equal(rows["next_tokens"], [[98, 99, 100], [101, -1, -1], [0xA9, 102, -1]])
    assert list(rows) == ["tokens", "next_tokens"] and data.read("test") is None


def test_windows_count_the_bytes_of_their_targets():
    rows = TextWindows(of(["a\u00e9b\u20ac"]), tokenizer=Characters(), length=4).read("train").columns
    np.testing.assert_array_equal(rows["next_tokens"], [[2, 1, 3, -1]])
    np.testing.assert_array_equal(rows["next_bytes"], [[2, 1, 3, 0]])


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("room", [2**28, 0], ids=["in memory", "when read"])
def test_joined_texts_are_one_sequence_with_the_end_between_them(special, room, monkeypatch):
    monkeypatch.setattr(text, "IN_MEMORY", room)
    source = TextWindows(of(TEXTS), tokenizer=Bytes(special=special), length=3, joined=True).read("train")
    whole = [byte for each in TEXTS for byte in [*each, *([SEP] if special else [])]]
    rows = source[np.arange(len(source))]
    assert len(source) == (len(whole) - 1) // 3 and hasattr(source, "columns") == bool(room)
    np.testing.assert_array_equal(rows["tokens"].ravel(), whole[: 3 * len(source)])
    np.testing.assert_array_equal(rows["next_tokens"].ravel(), whole[1 : 3 * len(source) + 1])
    np.testing.assert_array_equal(source[np.array([1, 0])]["tokens"], rows["tokens"][[1, 0]])


def test_a_text_stands_between_special_tokens_and_before_padding():
    data = TextRows(of(TEXTS, label=[3, 4, 5]), tokenizer=Bytes(special=True), length=7)
    rows = data.read("train").columns
    expected = [[CLS, *each, SEP] for each in TEXTS]
    for row, tokens in enumerate(expected):
        assert rows["tokens"][row].tolist() == tokens + [PAD] * (7 - len(tokens))
        assert rows["mask"][row].tolist() == [True] * len(tokens) + [False] * (7 - len(tokens))
    assert rows["count"].tolist() == [7, 3, 5] and rows["label"].tolist() == [3, 4, 5] and "text" not in rows
    # Rows of one's own, as `jaxmp predict --input` has them, become the same.
    batch = batch_of(data, {"text": TEXTS, "label": [3, 4, 5]})
    np.testing.assert_array_equal(batch["tokens"], rows["tokens"])
    np.testing.assert_array_equal(batch_of(data, {"text": TEXTS})["mask"], rows["mask"])


def test_of_a_pair_the_longer_text_is_cut_and_the_segments_are_told_apart():
    data = TextRows(
        of([b"abcdef", b"a"], other=[b"xy", b"vwxyz"]), second="other", tokenizer=Bytes(special=True), length=8,
        overlong="cut",
    )  # fmt: skip
    rows = data.read("train").columns
    a, x = ord("a"), ord("x")
    assert rows["tokens"].tolist() == [
        [CLS, a, a + 1, a + 2, SEP, x, x + 1, SEP],
        [CLS, a, SEP, x - 2, x - 1, x, x + 1, SEP],
    ]
    assert rows["segments"].tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 5]


def one_by_one(lengths, room):
    lengths = list(lengths)
    while sum(lengths) > room:
        lengths[int(np.argmax(lengths))] -= 1
    return lengths


def test_texts_are_cut_as_if_one_token_was_taken_after_the_other():
    for room in range(1, 9):
        for lengths in [*itertools.product(range(10), range(10)), *((length,) for length in range(10))]:
            found = text._cut([np.arange(length) for length in lengths], room)
            assert [part.tolist() for part in found] == [list(range(kept)) for kept in one_by_one(lengths, room)]


def test_only_a_vocabulary_that_needs_no_training_rows_lets_texts_be_cut():
    texts = {"text": list("abcdefgh"), "label": [0, 0, 0, 1] * 2}
    rows = Arrays(lambda split: texts if split == "train" else None)
    assert len(k_folds(TextRows(rows, length=2), 2)[0].read("train")) == 4
    inner = TextRows(random_split(rows, validation=2), tokenizer=Characters(), length=2)
    assert len(inner.vocabulary.tokens) == 6
    assert len(balanced(TextRows(rows, tokenizer=Characters(), length=2), "label").read("train")) == 12


@pytest.mark.parametrize("dtype", [object, "U9", np.dtypes.StringDType()])
def test_texts_may_be_arrays_of_any_kind_of_text(dtype):
    rows = Arrays(lambda split: {"text": np.array(["ab", "c"], dtype)})
    assert TextRows(rows, length=2).read("train").columns["tokens"].tolist() == [[97, 98], [99, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("overlong", ["cut", "split"])
def test_packed_texts_are_each_there_once_with_their_places_and_without_much_padding(overlong, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, length).tolist()) for length in rng.integers(1, 40, 300)]
    data = PackedTexts(of(texts), tokenizer=Bytes(special=True), length=32, overlong=overlong)
    rows = data.read("train").columns
    found = []
    for tokens, mask, positions in zip(rows["tokens"], rows["mask"], rows["positions"], strict=True):
        assert set(np.unique(mask[mask > 0])) == set(range(1, mask.max() + 1)) and (tokens[mask == 0] == PAD).all()
        for number in range(1, mask.max() + 1):
            own = tokens[mask == number].tolist()
            assert own[0] == CLS and own[-1] == SEP and (np.diff(np.flatnonzero(mask == number)) == 1).all()
            assert positions[mask == number].tolist() == list(range(len(own)))
            found.append(bytes(own[1:-1]))
    pieces = [each[at : at + 30] for each in texts for at in range(0, len(each) if overlong == "split" else 1, 30)]
    assert sorted(found) == sorted(pieces)
    assert (rows["mask"] > 0).mean() > 0.85
    batch = {name: column[:4] for name, column in rows.items()} | {"weight": np.ones(4, np.float32)}
    made = data.prepare(train=False)(batch, None)
    follows = np.zeros((4, 32), bool)
    follows[:, :-1] = (batch["mask"][:, 1:] == batch["mask"][:, :-1]) & (batch["mask"][:, 1:] > 0)
    expected = np.where(follows, np.roll(batch["tokens"], -1, axis=1), -1)
    np.testing.assert_array_equal(made["next_tokens"], expected)


@pytest.mark.slow
def test_packing_fills_rows_with_what_fits():
    assert pack(np.array([3, 3, 2, 2, 1]), 5) == [[0, 2], [1, 3], [4]]


# --- hiding tokens


def hidden(texts, *, key=None, most=None, rate=0.4, length=64, index=None):
    data = TextRows(of(texts), tokenizer=Bytes(special=True), length=length, masking=Masking(rate, most=most))
    rows = data.read("train").columns
    batch = {name: rows[name] for name in ("tokens", "mask")} | {"weight": np.ones(len(texts), np.float32)}
    made = jax.jit(data.prepare(train=key is not None))(batch, key, index)
    return rows["tokens"], jax.device_get(made)


LONG = [bytes(np.random.default_rng(row).integers(0, 256, 60).tolist()) for row in range(200)]


@pytest.mark.slow
def test_of_the_hidden_tokens_8_of_10_are_masks_1_is_random_1_stays_and_special_tokens_are_never_hidden():
    tokens, made = hidden(LONG, key=jax.random.key(0))
    chosen, seen = made["targets"] >= 0, made["tokens"]
    np.testing.assert_array_equal(made["targets"][chosen], tokens[chosen])
    np.testing.assert_array_equal(seen[~chosen], tokens[~chosen])
    assert not chosen[tokens >= 256].any() and (tokens[:, 62:] == PAD).all()
    # 12,000 and 4,800 draws: four standard deviations.
    assert chosen[:, 1:61].mean() == pytest.approx(0.4, abs=0.018)
    assert (seen[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.024)
    replaced = (seen != tokens) & chosen & (seen != MASK)
    assert replaced.sum() / chosen.sum() == pytest.approx(0.1 * 255 / 256, abs=0.018)
    assert seen[replaced].max() < 256 and len(np.unique(seen[replaced])) > 150


@pytest.mark.slow
def test_what_is_hidden_is_a_function_of_the_key_and_of_the_place_in_the_whole_batch():
    key = jax.random.key(0)
    _, whole = hidden(LONG[:8], key=key)
    _, half = hidden(LONG[4:8], key=key, index=np.arange(4, 8))
    np.testing.assert_array_equal(whole["tokens"][4:], half["tokens"])
    _, other = hidden(LONG[:8], key=jax.random.key(1))
    assert (whole["tokens"] != other["tokens"]).any()


@pytest.mark.slow
def test_in_evaluation_a_row_is_hidden_in_one_way_whatever_its_batch_and_its_own_masks_are_kept():
    _, whole = hidden(LONG[:8])
    _, half = hidden(LONG[4:8])
    np.testing.assert_array_equal(whole["tokens"][4:], half["tokens"])
    chosen = whole["targets"] >= 0
    assert len({tuple(row) for row in chosen.tolist()}) == 8
    masking = Masking(0.9)
    row = np.array([CLS, 97, MASK, 98, SEP])
    how = {"special": range(256, 261), "ordinary": np.arange(256), "mask_token": MASK, "padding": np.zeros(5, bool)}
    made = masking(None, row, **how)
    assert made["tokens"].tolist() == row.tolist() and made["targets"].tolist() == [-1] * 5


@pytest.mark.slow
def test_at_most_so_many_tokens_of_a_row_are_predicted_wherever_they_stand():
    tokens, made = hidden(LONG, key=jax.random.key(0), most=8)
    places, targets = made["predicted"], made["targets"]
    counts = targets >= 0
    assert places.shape == targets.shape == (200, 8) and all(len(set(row)) == 8 for row in places.tolist())
    np.testing.assert_array_equal(targets[counts], np.take_along_axis(tokens, places, 1)[counts])
    assert ((made["tokens"] != tokens).sum(axis=1) <= counts.sum(axis=1)).all()
    assert places[counts].mean() == pytest.approx(30.5, abs=2)  # the middle of places 1 to 60
    _, few = hidden([b"ab"], key=jax.random.key(0), most=8, length=16)
    assert (few["targets"] >= 0).sum() <= 2


# --- the cache, and what a run is made by


def test_texts_are_encoded_once_and_a_damaged_cache_anew(monkeypatch, tmp_path):
    first = TextRows(of(TEXTS), tokenizer=Bytes(special=True), length=7).read("train").columns["tokens"]
    monkeypatch.setattr("jaxmp.data.vocabulary.ByteVocabulary.encode", lambda *_: pytest.fail("encoded again"))
    again = TextRows(of(TEXTS), tokenizer=Bytes(special=True), length=7)
    np.testing.assert_array_equal(again.read("train").columns["tokens"], first)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (file,) = tmp_path.rglob("tokens.bin")
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(encoded, "MAPPED", 0)
    mapped = TextRows(of(TEXTS), tokenizer=Bytes(special=True), length=7).read("train").columns["tokens"]
    np.testing.assert_array_equal(mapped, first)


def lower(rows):
    return {**rows, "text": np.array([text.lower() for text in rows["text"]], object)}


def as_text(rows):
    return {"text": np.array([f"n{number}" for number in rows["number"]], object)}


def test_the_cache_knows_texts_as_they_are_read_after_the_host_transforms_of_their_rows():
    tokens = {}
    for transforms in ((), (lower,)):
        rows = dataclasses.replace(of(["AB", "Cd"]), host_transforms=transforms)
        tokens[transforms] = TextRows(rows, length=2).read("train").columns["tokens"].tolist()
    assert tokens == {(): [[65, 66], [67, 100]], (lower,): [[97, 98], [99, 100]]}
    # A column that a transform makes; and rows of one's own go through the transforms as well.
    made = TextRows(Arrays(lambda split: {"number": [1, 2]}, host_transforms=(as_text,)), length=2)
    assert made.read("train").columns["tokens"].tolist() == [[110, 49], [110, 50]]
    assert batch_of(made, {"number": np.array([7])})["tokens"].tolist() == [[110, 55]]


def test_the_cache_knows_every_text_of_a_large_split(monkeypatch):
    monkeypatch.setattr("jaxmp.data.fingerprint.WHOLE_BYTES", 0)
    texts = [f"{n:03}" for n in range(600)]
    first = TextRows(of(texts), length=3).read("train").columns["tokens"]
    texts[1] = "new"  # no row of the 256 that stand for a large split
    second = TextRows(of(texts), length=3).read("train").columns["tokens"]
    assert np.flatnonzero((first != second).any(1)).tolist() == [1]


def test_texts_are_encoded_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    rows = TextRows(of(TEXTS), tokenizer=Bytes(special=True), length=7).read("train")
    assert rows.columns["count"].tolist() == [7, 3, 5]


def test_another_vocabulary_is_other_data():
    one, other = (
        fingerprint(TextRows(of(["ab", "ab" + more]), tokenizer=Characters(), length=4).read("train")) for more in "ac"
    )
    (sentence,) = changed_rows("train", one, other)
    assert sentence == (
        f"the tokens of train are of another vocabulary: its digest is {other['vocabulary']} (was {one['vocabulary']})"
    )
    assert changed_rows("train", one, one) == []


def described(features, nbytes=1):
    dataset = Prepared("books", "1.0.0", None, {"train": 3}, nbytes)
    return describe_texts(Description(dataset, features, "", "", "", ""))


def test_a_dataset_says_how_many_texts_it_has_and_how_long_they_are(monkeypatch):
    monkeypatch.setattr(text.TFDS, "source", lambda self, split: of(TEXTS).read(split))
    features = {"text": "object ()", "label": "int64 ()"}
    assert described(features) == "text: 3 texts in train, 3 bytes on average, 5 at most"
    assert described(features, 2**30) == described({**features, "image": "uint8 (28, 28, 1)"}) == "text"
    assert described({"label": "int64 ()"}) == ""


@dataclasses.dataclass
class Of:
    data: object
    model: object = dataclasses.field(default_factory=lambda: SequenceClassifier(vocabulary=256))


def train(data):
    data.read("train")
    data.prepare(train=True)
    check_vocabulary(Of(data))


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (lambda: TextWindows(of(TEXTS), length=0), "data.length = 0: expected a whole number of at least 1"),
        (lambda: TextWindows("books"), "data.rows = 'books': expected a dataset"),
        (lambda: TextWindows(of(TEXTS), tokenizer=Bytes), "data.tokenizer = <class"),
        (lambda: TextWindows(of(TEXTS), column="txt"), "the train split has text; did you mean 'text'?"),
        (lambda: TextWindows(of(TEXTS, n=[1, 2, 3]), column="n"), "column is 'n', which holds int64; expected texts"),
        (lambda: TextWindows(of(["a", "b"])), "no text of 'text' has two tokens or more"),
        (lambda: TextWindows(of(["ab"]), joined=True), "2 tokens; expected at least data.length + 1 = 65"),
        (lambda: TextWindows(of(["", ""]), joined=True), "0 tokens; expected at least data.length + 1 = 65"),
        (
            lambda: random_split(TextRows(of(TEXTS), tokenizer=Characters(), length=5), validation=1),
            "data.cuts: the vocabulary of data.tokenizer = Characters(special=False) would be trained on the rows that "
            "are cut off, too; cut data.rows instead",
        ),
        (lambda: TextRows(of(TEXTS), length=4), "text 0 of 'text' in train has 5 tokens; expected at most 4"),
        (lambda: PackedTexts(of(TEXTS), tokenizer=Bytes(special=True), length=6), "data.length = 6"),
        (lambda: TextRows(of(TEXTS), tokenizer=Bytes(special=True), length=2, overlong="cut"), "expected at most -0"),
        (lambda: PackedTexts(of(["", ""]), length=4), "no text of 'text' has a token"),
        (lambda: TextRows(of(TEXTS, mask=[1, 2, 3])), "data.rows has a column 'mask', which is made of the texts"),
        (
            lambda: TextRows(of(TEXTS), masking=Masking(0.15)),
            "data.masking needs the special token [MASK]; the vocabulary of data.tokenizer has none; expected",
        ),
        (lambda: Masking(1.5), "data.masking.rate = 1.5: expected a share"),
        (lambda: Masking(0.1, masked=0.8, replaced=0.3), "data.masking.masked + replaced = 1.1: expected at most 1"),
        (
            lambda: TextRows(of(TEXTS), tokenizer=Bytes(special=True)),
            "model.vocabulary = 256: the vocabulary of data.tokenizer has 261 tokens, numbered from 0 to 260; expected "
            "--model.vocabulary 261 or more",
        ),
        (lambda: TextRows(of(TEXTS, n=np.array(["a", "b", None], object)), column="n"), "holds None in row 2"),
        (lambda: TextRows(of([b"\xff"]), tokenizer=Characters()), "is no UTF-8: invalid start byte at byte 0"),
        (lambda: TextRows(of(TEXTS), tokenizer=WordPiece(file="none.txt")), "none.txt': No such file"),
    ],
)  # fmt: skip
def test_texts_that_do_not_fit_are_one_message(data, names):
    with pytest.raises(InputError) as error:
        train(data())
    assert names.replace("-0", "0") in str(error.value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["abcd"], "text 0 of 'text' in these rows has 4 tokens; expected at most 3"),
        (np.array([12, 7]), "the column 'text' holds int64; expected texts"),
    ],
)
def test_rows_of_ones_own_whose_texts_do_not_fit_are_refused(texts, message):
    with pytest.raises(InputError, match=message):
        batch_of(TextRows(of(["abc"]), length=3), {"text": texts})
    cut = batch_of(TextRows(of(["abc"]), length=3, overlong="cut"), {"text": ["abcd"]})
    assert cut["tokens"].tolist() == [[97, 98, 99]]
