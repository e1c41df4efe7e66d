"""`Vocabulary`: the tokens of a text model by number, and how texts become numbers and back."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmp.errors import InputError, install

ROLES: Mapping[str, str] = {
    "padding": "[PAD]",
    "unknown": "[UNK]",
    "begin": "[CLS]",
    "end": "[SEP]",
    "mask": "[MASK]",
}
"""the special tokens of BERT, by what they do, in the order of their numbers in a vocabulary that is trained here"""

SPECIAL = tuple(ROLES.values())

END_OF_TEXT = "<|endoftext|>"
"""the one special token of GPT-2"""


class Vocabulary(abc.ABC):
    """Tokens by number, from 0 on, and how texts become numbers and back.

    Args:
      tokens: the text of each token; a special token's is its name, such as "[MASK]".
      special: the numbers of the special tokens by role: any of `padding`, `unknown`, `begin`, `end`, `mask`.
      byte_counts: number of bytes of text that each token stands for; None if that is not known, since the text is
        changed before it is split.
    """

    def __init__(
        self, tokens: Sequence[str], special: Mapping[str, int], byte_counts: Sequence[int] | None, how: Any = None
    ):
        self.tokens, self.special = tuple(tokens), dict(special)
        self.byte_counts = None if byte_counts is None else np.asarray(byte_counts, np.int32)
        content = json.dumps([type(self).__name__, self.tokens, sorted(self.special.items()), how])
        self.sha256 = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        """digest of all that decides which numbers a text becomes; equal in every process"""

    @property
    def size(self) -> int:
        """The number of tokens, special ones included."""
        return len(self.tokens)

    @property
    def ordinary(self) -> np.ndarray:
        """The numbers of all tokens that are not special, int32, ascending."""
        return np.setdiff1d(np.arange(self.size, dtype=np.int32), list(self.special.values())).astype(np.int32)

    @abc.abstractmethod
    def encode(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """The tokens of each text, int32 (tokens,), without special tokens at its ends.

        Raises: InputError if a text is no UTF-8, cannot be written as UTF-8, or has a character that is not in the
          vocabulary.
        """

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special ones are left out, except that of an unknown word."""

    def require(self, role: str, why: str) -> int:
        """The number of a special token. Raises InputError, which begins with `why`, if there is none."""
        if role not in self.special:
            there = ", ".join(self.tokens[number] for number in sorted(self.special.values())) or "none"
            raise InputError(
                f"{why} needs the special token {ROLES[role]}; the vocabulary of data.tokenizer has {there}; expected "
                "WordPiece, whose vocabulary has it, or Bytes(special=True)"
            )
        return self.special[role]


def as_text(text: str | bytes) -> str:
    """The text of bytes. Raises InputError if they are no UTF-8."""
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"a text that begins with {text[:40]!r} is no UTF-8: {error.reason} at byte {error.start}; expected UTF-8, "
            "or data.tokenizer = Bytes(), which takes any bytes"
        ) from None


def as_bytes(text: str | bytes) -> bytes:
    """The UTF-8 of a text; bytes as they are. Raises InputError for a lone surrogate, which UTF-8 does not have."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text that begins with {text[:40]!r} has half a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}; expected text that can be written as UTF-8"
        ) from None


class ByteVocabulary(Vocabulary):
    """The 256 bytes, and behind them, with `special`, the special tokens of BERT."""

    def __init__(self, *, special: bool = False):
        names = SPECIAL if special else ()
        roles = {role: 256 + place for place, role in enumerate(ROLES)} if special else {}
        # latin-1 names each byte by one character.
        super().__init__([*map(chr, range(256)), *names], roles, [1] * 256 + [0] * len(names))

    def encode(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """See `Vocabulary.encode`; takes any bytes."""
        return [np.frombuffer(as_bytes(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """See `Vocabulary.decode`; bytes that are no UTF-8 become the replacement character."""
        return bytes(token for token in map(int, tokens) if token < 256).decode(errors="replace")


class CharacterVocabulary(Vocabulary):
    """Characters, sorted; before them, with `special`, the special tokens of BERT."""

    def __init__(self, characters: Iterable[str], *, special: bool = False):
        names = SPECIAL if special else ()
        characters = sorted(set(characters))
        roles = {role: place for place, role in enumerate(ROLES)} if special else {}
        sizes = [len(character.encode("utf-8", "surrogatepass")) for character in characters]
        super().__init__([*names, *characters], roles, [0] * len(names) + sizes)
        self._number = {character: len(names) + place for place, character in enumerate(characters)}

    def encode(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """See `Vocabulary.encode`."""
        unknown, found = self.special.get("unknown"), []
        for text in map(as_text, texts):
            numbers = [self._number.get(character, unknown) for character in text]
            if None in numbers:
                raise InputError(
                    f"the character {text[numbers.index(None)]!r} is not in the vocabulary of data.tokenizer, the "
                    f"{len(self._number)} characters of the train split; expected those, or Characters(special=True), "
                    "where [UNK] stands for others"
                )
            found.append(np.array(numbers, np.int32))
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        """See `Vocabulary.decode`."""
        left_out = {number for role, number in self.special.items() if role != "unknown"}
        return "".join(self.tokens[token] for token in map(int, tokens) if token not in left_out)


class LibraryVocabulary(Vocabulary):
    """A vocabulary of the `tokenizers` library.

    Args:
      definition: the tokenizer in the library's JSON.
      special: names of special tokens by role; those that it does not have are left out.
      of_bytes: whether a character of a token stands for one byte, as in byte-level BPE.
    """

    def __init__(self, definition: str, special: Mapping[str, str], *, of_bytes: bool):
        library = import_tokenizers()
        self._tokenizer = library.Tokenizer.from_str(definition)
        numbers = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = [""] * (max(numbers.values()) + 1)
        for token, number in numbers.items():
            tokens[number] = token
        roles = {role: numbers[name] for role, name in special.items() if name in numbers}
        sizes = [0 if number in roles.values() else len(token) for number, token in enumerate(tokens)]
        super().__init__(tokens, roles, sizes if of_bytes else None, json.loads(definition))
        self.definition, self.named_special, self.of_bytes = definition, dict(special), of_bytes

    def encode(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """See `Vocabulary.encode`; a special token that a text spells out, such as [MASK], is taken for one."""
        encodings = self._tokenizer.encode_batch([as_text(as_bytes(text)) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        """See `Vocabulary.decode`."""
        left_out = {number for role, number in self.special.items() if role not in ("unknown", "mask")}
        return self._tokenizer.decode(
            [token for token in map(int, tokens) if token not in left_out], skip_special_tokens=False
        )


def import_tokenizers() -> Any:
    """The `tokenizers` library. Raises InputError if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            f"data.tokenizer: WordPiece and BPE need the library tokenizers, which cannot be imported ({error}): "
            f"{install('text')}"
        ) from error
    return tokenizers
