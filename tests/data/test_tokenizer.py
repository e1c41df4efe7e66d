from __future__ import annotations

import json

import numpy as np
import pytest

from jaxmp.data.tokenizer import BPE, Bytes, Characters, WordPiece
from jaxmp.data.vocabulary import SPECIAL
from jaxmp.errors import InputError

TEXTS = ["The films, the film: a filmed theme!", b"caf\xc3\xa9s for the filming of themes", "an unfilmed farm"] * 3


def needs_the_library():
    pytest.importorskip("tokenizers", reason="needs the extra `text`")


def trained():
    """A WordPiece vocabulary whose merges have many ties."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 6))) for _ in range(400)]
    return WordPiece(600).vocabulary([" ".join(words[at : at + 8]) for at in range(0, 400, 8)])


def test_a_word_piece_vocabulary_is_the_same_each_time_it_is_trained():
    needs_the_library()
    first, again = trained(), trained()
    assert first.tokens == again.tokens and first.sha256 == again.sha256 and first.size == 600
    assert first.tokens[:5] == SPECIAL and first.tokens[5:31] == tuple(map(chr, range(97, 123)))
    assert first.tokens[31:57] == tuple(f"##{chr(letter)}" for letter in range(97, 123))


def test_word_pieces_are_the_longest_there_are_and_no_letter_is_taken_for_a_special_token():
    needs_the_library()
    vocabulary = WordPiece(60).vocabulary(TEXTS)
    (tokens,) = vocabulary.encode(["The filmed [MASK] x\u00e9 \u20ac"])
    assert [vocabulary.tokens[token] for token in tokens][:2] == ["the", "film"]
    names = [vocabulary.tokens[token] for token in tokens]
    assert "[MASK]" in names and names[-1] == "[UNK]" and vocabulary.byte_counts is None
    (tokens,) = vocabulary.encode(["filming themes, of the films"])
    assert vocabulary.decode([2, *tokens, 3, 0, 0]) == "filming themes, of the films"
    assert all(len(vocabulary.tokens[token]) > 1 for token in vocabulary.encode(["film the"])[0])


def test_a_vocabulary_file_numbers_tokens_by_its_lines(tmp_path):
    needs_the_library()
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[unused0]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfilm\n##s\nthe\n!\n")
    vocabulary = WordPiece(file=str(file)).vocabulary([])
    assert vocabulary.encode(["The films!", b"nothing"])[0].tolist() == [8, 6, 7, 9]
    assert vocabulary.special == {"padding": 0, "unknown": 2, "begin": 3, "end": 4, "mask": 5}
    assert vocabulary.size == 10 and 1 in vocabulary.ordinary and 5 not in vocabulary.ordinary


def test_byte_pairs_are_the_same_each_time_spell_any_text_and_count_its_bytes(tmp_path):
    needs_the_library()
    vocabulary = BPE(280).vocabulary(TEXTS)
    assert vocabulary.sha256 == BPE(280).vocabulary(TEXTS).sha256 and vocabulary.size == 280
    for text in ("the films \u20ac\n\x00 caf\u00e9  x", "\U0001f600"):
        (tokens,) = vocabulary.encode([text])
        assert vocabulary.decode([*tokens, 0]) == text
        assert vocabulary.byte_counts[tokens].sum() == len(text.encode())
    assert vocabulary.special == {"end": 0} and vocabulary.byte_counts[0] == 0
    assert len(vocabulary.encode(["the films"])[0]) < 6
    # The same from GPT-2's files.
    model = json.loads(vocabulary.definition)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    read = BPE(file=str(tmp_path / "vocab.json")).vocabulary([])
    np.testing.assert_array_equal(read.encode(["the films"])[0], vocabulary.encode(["the films"])[0])
    assert read.special == {"end": 0}


def test_a_file_of_byte_pairs_that_lacks_a_byte_is_refused(tmp_path):
    needs_the_library()
    model = json.loads(BPE(280).vocabulary(TEXTS).definition)["model"]
    tokens = [token for token in model["vocab"] if token != "\u0120"]  # the space
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match=r"vocab\.json' has no token for 1 of the 256 bytes, '\u0120' among them"):
        BPE(file=str(tmp_path / "vocab.json")).vocabulary([])


@pytest.mark.parametrize("tokenizer", [Bytes(), WordPiece(100), BPE(280)])
def test_a_text_that_is_no_utf_8_is_one_message(tokenizer):
    needs_the_library()
    with pytest.raises(InputError, match=r"half a surrogate pair, '\\ud800', at character 1; expected text that can"):
        tokenizer.vocabulary(TEXTS).encode(["a\ud800"])
    if tokenizer.is_trained:
        with pytest.raises(InputError, match="half a surrogate pair"):
            tokenizer.vocabulary([*TEXTS, "a\ud800"])


def test_characters_are_sorted_and_others_are_unknown():
    vocabulary = Characters(special=True).vocabulary(["b\u20aca", b"ab"])
    assert vocabulary.tokens == (*SPECIAL, "a", "b", "\u20ac") and vocabulary.byte_counts.tolist() == [0] * 5 + [
        1,
        1,
        3,
    ]
    assert vocabulary.encode(["\u20aczb"])[0].tolist() == [7, 1, 6]
    assert vocabulary.decode([2, 7, 1, 6, 3, 0]) == "\u20ac[UNK]b"
    with pytest.raises(InputError, match=r"the character 'z' is not in the vocabulary of .*, the 2 characters"):
        Characters().vocabulary(["ab"]).encode(["az"])


def test_bytes_are_decoded_whatever_they_are():
    vocabulary = Bytes(special=True).vocabulary([])
    assert vocabulary.decode([258, 0xC3, 0xA9, 0xFF, 259]) == "\u00e9\ufffd" and vocabulary.size == 261


@pytest.mark.parametrize(
    ("make", "content", "names"),
    [
        (lambda file: WordPiece(0), "", "data.tokenizer.size = 0: expected a whole number of at least 1"),
        (
            lambda file: WordPiece(40),
            "",
            "data.tokenizer.size = 40: expected at least",
        ),
        (lambda file: BPE(256), "", "data.tokenizer.size = 256: expected a whole number of at least 257"),
        (lambda file: WordPiece(file=file), "a\nb\na\n", "line 3: 'a' is on line 1 already"),
        (lambda file: WordPiece(file=file), "a\nb\n", "has 2 lines and no special token [UNK]"),
        (lambda file: WordPiece(file="s3://vocab.txt"), "", "s3://"),
        (lambda file: BPE(file=file), "a", "is no JSON"),
        (lambda file: BPE(file=file), '{"a": 0, "b": 2}', "numbered from 0 on"),
        (lambda file: BPE(file=file), '{"a": 0, "b": 1}', "merges.txt, line 2: 'a b'; expected two tokens of vocab"),
    ],
)
def test_what_is_no_vocabulary_is_one_message(make, content, names, tmp_path):
    needs_the_library()
    (tmp_path / "vocab").write_text(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(InputError) as error:
        make(str(tmp_path / "vocab")).vocabulary(TEXTS)
    assert names in str(error.value)


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"WordPiece and BPE need the library tokenizers.*uv sync --extra text"):
        BPE().vocabulary([])
