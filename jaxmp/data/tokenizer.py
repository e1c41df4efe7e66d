"""`Bytes`, `Characters`, `WordPiece` and `BPE`: how texts are split into tokens, as fields of a config."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxmp.data.vocabulary import (
    END_OF_TEXT,
    ROLES,
    SPECIAL,
    ByteVocabulary,
    CharacterVocabulary,
    LibraryVocabulary,
    Vocabulary,
    as_bytes,
    as_text,
    import_tokenizers,
)
from jaxmp.errors import InputError, local_path, whole_number

MOST_CHARACTERS = 1000
"""the most characters that a WordPiece vocabulary which is trained spells words with; rarer ones are unknown"""


class Tokenizer(Protocol):
    """How texts are split into tokens: a frozen dataclass that makes a `Vocabulary`."""

    @property
    def is_trained(self) -> bool:
        """Whether the vocabulary depends on texts; else they are not read."""

    def vocabulary(self, texts: Iterable[str | bytes]) -> Vocabulary:
        """The vocabulary, for texts that can be iterated several times; the same for the same texts."""


@dataclass(frozen=True)
class Bytes:
    """Each byte of the UTF-8 is a token: 256 tokens.

    >>> Bytes().vocabulary([]).encode(["h\u00e9"])
    [array([104, 195, 169], dtype=int32)]
    """

    special: bool = False
    """Whether [PAD], [UNK], [CLS], [SEP] and [MASK] follow as tokens 256 to 260."""

    is_trained = False

    def vocabulary(self, texts: Iterable[str | bytes]) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        return ByteVocabulary(special=self.special)


@dataclass(frozen=True)
class Characters:
    """Each character is a token; the vocabulary is all characters of the train split, sorted.

    >>> Characters().vocabulary(["abca"]).encode(["cab"])
    [array([2, 0, 1], dtype=int32)]
    """

    special: bool = False
    """Whether [PAD], [UNK], [CLS], [SEP] and [MASK] come first, as tokens 0 to 4; [UNK] stands for what the train split
    does not have."""

    is_trained = True

    def vocabulary(self, texts: Iterable[str | bytes]) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        characters: set[str] = set()
        for text in texts:
            characters.update(as_text(text))
        return CharacterVocabulary(characters, special=self.special)


@dataclass(frozen=True)
class WordPiece:
    """Words, and pieces of rarer words, as BERT splits them: by white space and punctuation, then the longest pieces.

    Sources: Y. Wu et al., 2016, https://arxiv.org/abs/1609.08144, section 4.1; J. Devlin et al., 2019,
    https://arxiv.org/abs/1810.04805. Training merges the most frequent pairs, as BPE does (Hugging Face's `tokenizers`,
    extra `text`). Raises InputError for a size that is too small, or a file that is no vocabulary.
    """

    size: int = 8000
    """Number of tokens of a vocabulary that is trained on the train split, special ones included."""
    file: str | None = None
    """File with a vocabulary instead, one token a line, such as BERT's vocab.txt; a token's number is that of its line,
    from 0."""
    lowercase: bool = True
    """Whether letters are made small and accents removed, as in BERT's uncased vocabulary."""

    def __post_init__(self) -> None:
        """Raises InputError for a size that is no whole number of at least 1."""
        object.__setattr__(self, "size", whole_number("data.tokenizer.size", self.size, 1))

    @property
    def is_trained(self) -> bool:
        """See `Tokenizer.is_trained`."""
        return self.file is None

    def vocabulary(self, texts: Iterable[str | bytes]) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        if self.file is not None:
            return self._vocabulary(read_word_pieces(self.file))
        library = import_tokenizers()
        tokenizer = self._tokenizer({name: number for number, name in enumerate(SPECIAL)})
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(tokenizer.normalizer.normalize_str(as_text(as_bytes(text))))
        by_frequency = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
        letters = sorted(by_frequency[:MOST_CHARACTERS])
        # The trainer numbers what continues a word in the order of a hash table, another in each process, and breaks
        # ties by these numbers. So they are given, as tokens that it takes over before it counts.
        pinned = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
        if self.size < len(pinned):
            raise InputError(
                f"data.tokenizer.size = {self.size}: expected at least {len(pinned)}: {len(SPECIAL)} special tokens, "
                f"and the {len(letters)} characters of the train split at the beginning of a word and inside"
            )
        trainer = library.trainers.WordPieceTrainer(
            vocab_size=self.size, special_tokens=pinned, continuing_subword_prefix="##", show_progress=False
        )
        tokenizer.train_from_iterator(map(as_text, texts), trainer)
        # Made anew: the trained one would find each pinned letter in a text as a special token, and cut words there.
        return self._vocabulary(tokenizer.get_vocab())

    def _vocabulary(self, numbers: Mapping[str, int]) -> Vocabulary:
        tokenizer = self._tokenizer(numbers)
        tokenizer.add_special_tokens([name for name in SPECIAL if name in numbers])
        return LibraryVocabulary(tokenizer.to_str(), ROLES, of_bytes=False)

    def _tokenizer(self, numbers: Mapping[str, int]) -> Any:
        library = import_tokenizers()
        tokenizer = library.Tokenizer(library.models.WordPiece(dict(numbers), unk_token=ROLES["unknown"]))
        tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = library.decoders.WordPiece(prefix="##")
        return tokenizer


@dataclass(frozen=True)
class BPE:
    """Byte-pair encoding of bytes, as GPT-2 splits texts; every text can be encoded.

    Sources: R. Sennrich et al., 2016, https://arxiv.org/abs/1508.07909; A. Radford et al., 2019, section 2.2. By
    Hugging Face's `tokenizers` (extra `text`). Raises InputError for a size that is too small, or a file that is no
    vocabulary.
    """

    size: int = 8000
    """Number of tokens of a vocabulary that is trained on the train split, <|endoftext|> included."""
    file: str | None = None
    """File with a vocabulary instead: GPT-2's vocab.json, with merges.txt beside it."""

    def __post_init__(self) -> None:
        """Raises InputError for a size below 257."""
        object.__setattr__(self, "size", whole_number("data.tokenizer.size", self.size, 257))

    @property
    def is_trained(self) -> bool:
        """See `Tokenizer.is_trained`."""
        return self.file is None

    def vocabulary(self, texts: Iterable[str | bytes]) -> Vocabulary:
        """See `Tokenizer.vocabulary`."""
        library = import_tokenizers()
        model = library.models.BPE() if self.file is None else library.models.BPE(*read_byte_pairs(self.file))
        tokenizer = library.Tokenizer(model)
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        if self.file is None:
            alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
            trainer = library.trainers.BpeTrainer(
                vocab_size=self.size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
            )
            tokenizer.train_from_iterator(map(as_text, map(as_bytes, texts)), trainer)
        elif tokenizer.token_to_id(END_OF_TEXT) is not None:
            tokenizer.add_special_tokens([END_OF_TEXT])
        return LibraryVocabulary(tokenizer.to_str(), {"end": END_OF_TEXT}, of_bytes=True)


def read_word_pieces(file: str) -> dict[str, int]:
    """The tokens of a WordPiece vocabulary file by name, with their numbers.

    Raises: InputError if there is no such file, a token stands there twice, or [UNK] is missing.
    """
    tokens = _read(file).split("\n")
    tokens = tokens[:-1] if tokens and not tokens[-1] else tokens
    numbers: dict[str, int] = {}
    for number, token in enumerate(token.rstrip("\r") for token in tokens):
        if token in numbers:
            raise InputError(
                f"data.tokenizer.file {file!r}, line {number + 1}: {token!r} is on line {numbers[token] + 1} already; "
                "expected one token a line, each once"
            )
        numbers[token] = number
    if ROLES["unknown"] not in numbers:
        raise InputError(
            f"data.tokenizer.file {file!r} has {len(numbers)} lines and no special token [UNK]; expected a vocabulary "
            "of WordPiece, one token a line, such as BERT's vocab.txt"
        )
    return numbers


def read_byte_pairs(file: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens of a BPE vocabulary with their numbers, and its merges: of vocab.json, and merges.txt beside it.

    Raises: InputError if there is no such file, it is not of that format, or a byte has no token, so that texts would
      lose it.
    """
    merges_file = str(Path(file).with_name("merges.txt"))
    try:
        numbers = json.loads(_read(file))
    except ValueError as error:
        raise InputError(f"data.tokenizer.file {file!r} is no JSON ({error}); expected GPT-2's vocab.json") from error
    if not isinstance(numbers, dict) or sorted(numbers.values(), key=str) != sorted(range(len(numbers)), key=str):
        raise InputError(f"data.tokenizer.file {file!r}: expected an object of tokens, numbered from 0 on")
    merges = []
    for number, line in enumerate(_read(merges_file).splitlines()):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or any(part not in numbers for part in (*pair, "".join(pair))):
            raise InputError(
                f"{merges_file}, line {number + 1}: {line!r}; expected two tokens of {Path(file).name} that make a "
                "third"
            )
        merges.append((pair[0], pair[1]))
    alphabet = import_tokenizers().pre_tokenizers.ByteLevel.alphabet()
    if missing := sorted(set(alphabet) - numbers.keys()):
        raise InputError(
            f"data.tokenizer.file {file!r} has no token for {len(missing)} of the 256 bytes, {missing[0]!r} among "
            "them, which texts would lose; expected GPT-2's vocab.json, which has all"
        )
    return numbers, merges


def _read(file: str) -> str:
    path = local_path("data.tokenizer.file", file)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"no UTF-8, {error.reason}"
        raise InputError(f"data.tokenizer.file {str(path)!r}: {why}; expected the file of a vocabulary") from error
