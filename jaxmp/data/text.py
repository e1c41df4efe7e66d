"""`TextWindows`, `TextRows` and `PackedTexts`: texts as tokens, in rows of one length.

All three take their texts from a column of another dataset, and split them by a tokenizer, whose vocabulary is that of
the train split or of a file. The tokens are encoded once, into the cache, and memory-mapped if they are many.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.catalog import Description
from jaxmp.data.dataset import Dataset, Prepare, Split
from jaxmp.data.encoded import Encoded, Texts, as_texts, cached_json, encode_texts
from jaxmp.data.masking import Masking
from jaxmp.data.source import Columns, Source, as_column
from jaxmp.data.splits import Balanced
from jaxmp.data.tfds import TFDS
from jaxmp.data.tokenizer import Bytes, Tokenizer
from jaxmp.data.transforms import apply_host_transforms, read_rows
from jaxmp.data.vocabulary import LibraryVocabulary, Vocabulary
from jaxmp.errors import InputError, whole_number

IN_MEMORY = 2**28
"""rows of fewer bytes are made at once; larger ones when they are read"""

PACKING_BINS = 64
"""rows that are filled at a time when texts are packed"""

MASKING_STREAM = 0x68696465
"""number of the stream of keys by which tokens are hidden"""


@dataclass(frozen=True)
class TextDataset(Dataset):
    """The base of datasets of texts: where the texts come from, and how they become tokens."""

    rows: Any = TFDS(name="tiny_shakespeare")
    """Dataset that has the texts in a column; of its fields, those that name rows count."""
    column: str = "text"
    """Column of the texts."""
    tokenizer: Any = Bytes()
    """How texts are split into tokens: Bytes, Characters, WordPiece or BPE."""
    length: int = 64
    """Tokens in a row."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting that cannot be used."""
        super().__post_init__()
        object.__setattr__(self, "length", whole_number("data.length", self.length, 1))
        if not isinstance(self.rows, Dataset):
            raise InputError(f"data.rows = {self.rows!r:.60}: expected a dataset, TFDS(name=...) or Arrays(load)")
        if not hasattr(self.tokenizer, "vocabulary") or isinstance(self.tokenizer, type):
            raise InputError(
                f"data.tokenizer = {self.tokenizer!r:.60}: expected Bytes(), Characters(), WordPiece(8000) or BPE(8000)"
            )
        if self.tokenizer.is_trained and any(not isinstance(cut, Balanced) for cut in self.cuts):
            raise InputError(
                f"data.cuts: the vocabulary of data.tokenizer = {self.tokenizer!r:.60} would be trained on the rows "
                "that are cut off, too; cut data.rows instead"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens, made once: of the train split's texts, or of a file.

        Raises: InputError if the texts or the file cannot be read, or the library `tokenizers` is needed and missing.
        """
        if "_vocabulary" not in self.__dict__:
            self.__dict__["_vocabulary"] = self._vocabulary()
        return self.__dict__["_vocabulary"]

    def _vocabulary(self) -> Vocabulary:
        tokenizer: Tokenizer = self.tokenizer
        if not tokenizer.is_trained:
            return tokenizer.vocabulary([])
        return trained_vocabulary(tokenizer, self.texts("train"))

    def texts(self, split: Split, column: str | None = None) -> Texts:
        """The texts of a split. Raises InputError as `rows` does, or if the column holds no texts."""
        return Texts(self._rows(split), column or self.column, split)

    def _rows(self, split: Split) -> Source:
        source = self.rows.read(split)
        if source is None:
            raise InputError(f"data.rows has no {split} split")
        return source

    def _has(self, split: Split) -> bool:
        return self.rows.read(split) is not None

    def encoded(self, split: Split, column: str | None = None) -> Encoded:
        """The tokens of the texts of a split, without special tokens."""
        return encode_texts(self.texts(split, column), self.vocabulary)

    def _columns(self, source: Source) -> Source:
        """Rows in memory if they are few, which are checked as a whole; else as they are."""
        first = source[np.arange(1)]
        vocabulary = self.vocabulary.sha256
        if sum(column.nbytes for column in first.values()) * len(source) > IN_MEMORY:
            source.vocabulary_sha256 = vocabulary  # type: ignore[attr-defined]
            return source
        columns = Columns(source[np.arange(len(source))])
        columns.vocabulary_sha256 = vocabulary  # type: ignore[attr-defined]
        return columns


DESCRIBED_BYTES = 2**28
"""the largest dataset, as stored, whose texts are measured"""


def describe_texts(description: Description) -> str:
    """What a prepared dataset has as text: of each column, texts of the train split and their size; "" if it has none.

    Texts of a dataset with images, or of more than 256 MiB, are only named.
    """
    dataset = description.dataset
    columns = [name for name, feature in description.features.items() if feature in ("object ()", "<U0 ()", "|S0 ()")]
    if not columns:
        return ""
    has_images = any(feature.count(",") > 1 for feature in description.features.values())
    if has_images or dataset.nbytes > DESCRIBED_BYTES or "train" not in dataset.splits:
        return ", ".join(columns)
    rows = TFDS(name=dataset.name, version=dataset.version).source("train")
    found = []
    for name in columns:
        sizes = [len(text.encode() if isinstance(text, str) else text) for text in Texts(rows, name, "train")]
        of = f"{len(sizes):,} texts in train" if len(sizes) > 1 else "1 text in train"
        found.append(f"{name}: {of}, {np.mean(sizes):,.0f} bytes on average, {max(sizes):,} at most")
    return "; ".join(found)


def trained_vocabulary(tokenizer: Tokenizer, texts: Texts) -> Vocabulary:
    """The vocabulary of texts; one that the library trains is kept in the cache."""
    if not hasattr(tokenizer, "file"):
        return tokenizer.vocabulary(texts)
    from jaxmp.data.vocabulary import import_tokenizers

    version = import_tokenizers().__version__
    fields = {"class": type(tokenizer).__name__, **dataclasses.asdict(tokenizer)}  # type: ignore[call-overload]
    identity = {"tokenizer": fields, "texts": texts.identity(), "tokenizers": version}

    def train() -> dict[str, Any]:
        vocabulary: Any = tokenizer.vocabulary(texts)
        return {
            "definition": vocabulary.definition,
            "special": vocabulary.named_special,
            "of_bytes": vocabulary.of_bytes,
        }

    return LibraryVocabulary(**cached_json("vocabularies", identity, train))


@dataclass(frozen=True)
class TextWindows(TextDataset):
    """Running text, in windows that do not overlap, for models of the next token.

    A row is a window: `tokens`, and `next_tokens`, for each of them the token that follows, both int32 (length,). Where
    tokens are more than a byte each and their bytes are known, `next_bytes`, int32 (length,), counts those of
    `next_tokens`, for bits a byte.
    """

    joined: bool = False
    """Whether windows reach from one text into the next, with the end-of-text token between them where the vocabulary
    has one, and what does not fill the last window is left out. Else each text begins a window, each token but its
    first is a target once, and its last window is filled up with tokens 0, whose `next_tokens` are -1."""

    def source(self, split: Split) -> Source | None:
        """The windows of one split.

        Raises InputError as `texts` does, or if the texts are too short.
        """
        if not self._has(split):
            return None
        encoded, sizes = self.encoded(split), self.vocabulary.byte_counts
        sizes = None if sizes is None or set(sizes.tolist()) == {1} else sizes
        if self.joined:
            rows: Source = JoinedWindows(encoded, self.vocabulary.special.get("end"), self.length, sizes)
            if not len(rows):
                raise InputError(
                    f"{split}: the texts have {len(encoded.tokens):,} tokens; expected at least data.length + 1 = "
                    f"{self.length + 1}"
                )
            return self._columns(rows)
        parts = [windows(encoded[text], self.length) for text in range(len(encoded)) if encoded.lengths[text] > 1]
        if not parts:
            raise InputError(f"{split}: no text of {self.column!r} has two tokens or more")
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if sizes is not None:
            found["next_bytes"] = np.where(found["next_tokens"] < 0, 0, sizes[found["next_tokens"]])
        return self._columns(Columns(found))


class JoinedWindows:
    """The windows of joined texts, a `Source`, made when they are read.

    Args:
      encoded: the tokens of the texts.
      end: the token between two texts; None: nothing is.
      length: tokens in a window.
      sizes: number of bytes of each token of the vocabulary; None: rows have no `next_bytes`.
    """

    thread_safe = True

    def __init__(self, encoded: Encoded, end: int | None, length: int, sizes: np.ndarray | None):
        self.encoded, self.end, self.length, self.sizes = encoded, end, length, sizes
        # Where each text ends among all tokens, the one after it included.
        self.ends = encoded.ends + (0 if end is None else np.arange(1, len(encoded) + 1))

    def __len__(self) -> int:
        return max(0, int(self.ends[-1] - 1)) // self.length

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See `Source`."""
        places = np.asarray(indices)[:, None] * self.length + np.arange(self.length + 1)
        tokens = self._tokens(places)
        rows = {"tokens": tokens[:, :-1], "next_tokens": tokens[:, 1:]}
        return rows if self.sizes is None else {**rows, "next_bytes": self.sizes[rows["next_tokens"]]}

    def _tokens(self, places: np.ndarray) -> np.ndarray:
        if self.end is None:
            return self.encoded.tokens[places].astype(np.int32)
        text = np.searchsorted(self.ends, places, side="right")
        between = places == self.ends[text] - 1
        return np.where(between, self.end, self.encoded.tokens[np.where(between, 0, places - text)]).astype(np.int32)


@dataclass(frozen=True)
class _Framed(TextDataset):
    """Texts of limited length, between the special tokens of beginning and end where the vocabulary has them."""

    overlong: Literal["refuse", "cut"] = "refuse"
    """What is done with a text of more tokens than fit: refuse, before training, or cut its end."""
    masking: Masking = Masking()
    """Hides tokens that a masked language model is to predict."""

    def _padding(self) -> int:
        return self.vocabulary.special.get("padding", 0)

    def prepare(self, *, train: bool) -> Prepare:
        """As `Dataset.prepare`, with tokens hidden first as `masking` says: see `Masking` for the columns.

        Raises: InputError if tokens are to be hidden, and the vocabulary has no mask token.
        """
        transform, masking = super().prepare(train=train), self.masking
        if not masking.rate:
            return transform
        vocabulary = self.vocabulary
        mask_token = vocabulary.require("mask", "data.masking")
        how: dict[str, Any] = {
            "special": sorted(vocabulary.special.values()),
            "ordinary": vocabulary.ordinary,
            "mask_token": mask_token,
        }

        def apply(batch: dict[str, Any], key: Any, global_index: jax.Array | None = None) -> dict[str, Any]:
            tokens, padding = batch["tokens"], batch["mask"] == 0
            if train:
                index = jnp.arange(len(tokens)) if global_index is None else global_index
                keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, MASKING_STREAM), index)
                hidden = jax.vmap(lambda k, t, p: masking(k, t, padding=p, **how))(keys, tokens, padding)
            else:
                hidden = jax.vmap(lambda t, p: masking(None, t, padding=p, **how))(tokens, padding)
            return transform({**batch, **hidden}, key, global_index)

        return apply

    def _special(self) -> tuple[int | None, int | None]:
        special = self.vocabulary.special
        return special.get("begin"), special.get("end")

    def _refused(self, split: str, text: int, tokens: int, room: int) -> InputError:
        return InputError(
            f"text {text} of {self.column!r} in {split} has {tokens} tokens; expected at most {room}, for which "
            f"data.length = {self.length} has room beside special tokens; or --data.overlong cut"
        )


@dataclass(frozen=True)
class TextRows(_Framed):
    """Texts, one in a row, cut or filled up to one length: for classification.

    A row has `tokens`, int32 (length,): the text between the special tokens of beginning and end, where the vocabulary
    has them, then padding. `mask`, bool (length,), is False for padding. `count`, int32, is the number of tokens that
    are no padding. With a `second` column both texts are in the row, each with its end, and `segments`, int32
    (length,), is 0 for the first and 1 for the second. All other columns of `rows` stay.
    """

    second: str | None = None
    """Column of a second text, for pairs of texts."""

    def source(self, split: Split) -> Source | None:
        """The rows of one split.

        Raises InputError as `texts` does, or for a text that is too long.
        """
        if not self._has(split):
            return None
        encoded = [self.encoded(split, column) for column in self._text_columns]
        return self._columns(self._padded(encoded, self._others(split), split))

    def _padded(self, encoded: list[Encoded], others: Source | None, where: str) -> PaddedRows:
        """The rows of texts. Raises InputError, which says `where` it is, for a text that is too long."""
        begin, end = self._special()
        room = self.length - (begin is not None) - len(encoded) * (end is not None)
        lengths = np.sum([each.lengths for each in encoded], axis=0)
        if room < 1 or (self.overlong == "refuse" and lengths.max() > room):
            longest = int(np.argmax(lengths > max(room, 0)))
            raise self._refused(where, longest, int(lengths[longest]), room)
        return PaddedRows(encoded, begin, end, self._padding(), self.length, others)

    @property
    def _text_columns(self) -> list[str]:
        return [self.column, *([self.second] if self.second is not None else [])]

    def _others(self, split: Split) -> Source:
        made = {"tokens", "mask", "count", "segments"}
        source = self._rows(split)
        taken = sorted(made & set(read_rows(source, np.arange(1))))
        if taken:
            raise InputError(f"data.rows has a column {taken[0]!r}, which is made of the texts; rename it")
        return WithoutColumns(source, self._text_columns)

    def encode(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rows of one's own: of those with texts, the tokens are made, after the host transforms of `rows`.

        Raises: InputError if a column of texts holds anything else, or, as `source` does, for a text that is too long.
        """
        columns = {name: as_column(name, rows[name]) for name in rows}
        if "tokens" not in columns:
            columns = apply_host_transforms(self.rows.host_transforms, columns)
        if any(column not in columns for column in self._text_columns):
            return columns
        encoded = []
        for name in self._text_columns:
            tokens = self.vocabulary.encode(as_texts(columns[name], f"the column {name!r}"))
            encoded.append(Encoded(np.concatenate(tokens), np.cumsum([len(each) for each in tokens])))
        kept = {name: column for name, column in columns.items() if name not in self._text_columns}
        made = self._padded(encoded, Columns(kept) if kept else None, "these rows")
        return made[np.arange(len(encoded[0]))]


class WithoutColumns:
    """A `Source` without some of its columns."""

    def __init__(self, source: Source, names: Sequence[str]):
        self.source, self.names = source, tuple(names)
        self.thread_safe = getattr(source, "thread_safe", False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See `Source`."""
        rows = read_rows(self.source, indices)
        return {name: column for name, column in rows.items() if name not in self.names}


class PaddedRows:
    """A text in each row, or a pair: a `Source`. For the columns see `TextRows`.

    Args:
      encoded: the tokens of the texts, and of the second texts of pairs.
      begin: token before the first text; None: nothing is.
      end: token after each text; None: nothing is.
      padding: token that fills rows up.
      length: tokens in a row.
      others: the other columns; None: there are none.
    """

    def __init__(
        self,
        encoded: list[Encoded],
        begin: int | None,
        end: int | None,
        padding: int,
        length: int,
        others: Source | None,
    ):
        self.encoded, self.begin, self.end, self.padding, self.length = encoded, begin, end, padding, length
        self.others = others
        self.thread_safe = getattr(others, "thread_safe", False)

    def __len__(self) -> int:
        return len(self.encoded[0])

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See `Source`."""
        indices = np.asarray(indices)
        tokens = np.full((len(indices), self.length), self.padding, np.int32)
        segments, counts = np.zeros_like(tokens), np.zeros(len(indices), np.int32)
        ends = [] if self.end is None else [self.end]
        for row, text in enumerate(indices.tolist()):
            whole: list[np.ndarray] = [np.array([] if self.begin is None else [self.begin], np.int32)]
            parts = _cut(
                [each[text] for each in self.encoded], self.length - len(whole[0]) - len(ends) * len(self.encoded)
            )
            for part in parts:
                whole.append(np.concatenate([part, np.array(ends, np.int32)]))
            counts[row] = sum(map(len, whole))
            tokens[row, : counts[row]] = np.concatenate(whole)
            segments[row, len(whole[0]) + len(whole[1]) : counts[row]] = 1
        rows = {"tokens": tokens, "mask": np.arange(self.length) < counts[:, None], "count": counts}
        rows |= {"segments": segments} if len(self.encoded) > 1 else {}
        others = {} if self.others is None else self.others[indices]
        return {**others, **rows}


def _cut(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """One part or two, the longer one cut at its end until both fit; of two that are as long, first the first."""
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = parts
    kept = min(len(first), max(room - len(second), room // 2))
    return [first[:kept], second[: room - kept]]


@dataclass(frozen=True)
class PackedTexts(_Framed):
    """Texts, as many in a row as fit, first fit (Grain's): for language models, without much padding.

    A row has, each int32 (length,): `tokens`; `mask`, the number of the text in the row that a token belongs to, from
    1, and 0 for padding: with it, attention sees no other text; `positions`, the place of a token in its text;
    `next_tokens`, the token that follows in the same text, else -1; and `segments`, zeros. Texts are between the
    special tokens of beginning and end, where the vocabulary has them. Other columns are left out.
    """

    overlong: Literal["refuse", "cut", "split"] = "refuse"  # type: ignore[assignment]
    """What is done with a text of more tokens than fit: refuse, before training, cut its end, or split it in several
    texts."""

    def source(self, split: Split) -> Source | None:
        """The rows of one split.

        Raises InputError as `texts` does, or for a text that is too long.
        """
        if not self._has(split):
            return None
        encoded, (begin, end) = self.encoded(split), self._special()
        frame = (begin is not None) + (end is not None)
        room, lengths = self.length - frame, encoded.lengths
        if room < 1 or (self.overlong == "refuse" and lengths.max() > room):
            longest = int(np.argmax(lengths > max(room, 0)))
            raise self._refused(split, longest, int(lengths[longest]), room)
        starts = encoded.ends - lengths
        if self.overlong == "split":
            starts, lengths = _pieces(starts, lengths, room)
        lengths = np.minimum(lengths, room)
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        if not len(lengths):
            raise InputError(f"{split}: no text of {self.column!r} has a token")
        taken = lengths + frame
        of_lengths = hashlib.sha256(taken.astype(np.int64).tobytes()).hexdigest()
        identity = {"lengths": of_lengths, "length": self.length, "bins": PACKING_BINS}
        packed = cached_json("packed", identity, lambda: pack(taken, self.length))
        return self._columns(PackedRows(encoded, starts, lengths, packed, begin, end, self._padding(), self.length))

    def prepare(self, *, train: bool) -> Prepare:
        """As `Dataset.prepare`; makes `next_tokens` and `segments`, and hides tokens as `masking` says."""
        prepared = super().prepare(train=train)

        def apply(batch: dict[str, Any], key: Any, global_index: jax.Array | None = None) -> dict[str, Any]:
            tokens, mask = batch["tokens"], batch["mask"]
            same = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
            following = jnp.where(same, tokens[:, 1:], -1).astype(jnp.int32)
            following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=-1)
            made = {"next_tokens": following, "segments": jnp.zeros_like(tokens)}
            return prepared({**batch, **made}, key, global_index)

        return apply


def _pieces(starts: np.ndarray, lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces, of at most `room` tokens, of texts with these starts and lengths."""
    counts = -(-lengths // room)
    text = np.repeat(np.arange(len(lengths)), counts)
    piece = np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[text] + piece * room, np.minimum(lengths[text] - piece * room, room)


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Which texts each row has: all texts once, no row with more than `room` tokens.

    By Grain's first-fit packing of 64 rows at a time. The same for the same lengths.

    Args:
      lengths: tokens of each text, int (texts,), at most `room` each.
      room: most tokens of a row.
    """
    import grain

    texts = grain.MapDataset.source(_Lengths(lengths)).to_iter_dataset(grain.ReadOptions(0, 0))
    packing = grain.experimental.FirstFitPackIterDataset(
        texts, length_struct={"text": room}, num_packing_bins=PACKING_BINS, shuffle_bins=False
    )
    rows = ((row["text"], row["text_positions"], row["text_segment_ids"]) for row in packing)
    return [text[(position == 0) & (number > 0)].tolist() for text, position, number in rows]


@dataclass(frozen=True)
class _Lengths:
    """Arrays of the length of each text, filled with its number: what Grain packs."""

    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, text: int) -> dict[str, np.ndarray]:
        return {"text": np.full(self.lengths[text], text, np.int64)}


class PackedRows:
    """Several texts in each row: a `Source`. For the columns see `PackedTexts`; `next_tokens` are made on the device.

    Args:
      encoded: the tokens.
      starts: where each text begins among them, int (texts,).
      lengths: tokens of each text, int (texts,).
      packed: the texts of each row.
      begin: token before each text; None: nothing is.
      end: token after each text; None: nothing is.
      padding: token that fills rows up.
      length: tokens in a row.
    """

    thread_safe = True

    def __init__(
        self,
        encoded: Encoded,
        starts: np.ndarray,
        lengths: np.ndarray,
        packed: list[list[int]],
        begin: int | None,
        end: int | None,
        padding: int,
        length: int,
    ):
        self.encoded, self.starts, self.lengths, self.packed = encoded, starts, lengths, packed
        self.begin, self.end, self.padding, self.length = begin, end, padding, length

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See `Source`."""
        tokens = np.full((len(indices), self.length), self.padding, np.int32)
        mask, positions = np.zeros_like(tokens), np.zeros_like(tokens)
        for row, index in enumerate(np.asarray(indices).tolist()):
            at = 0
            for number, text in enumerate(self.packed[index], 1):
                start, length = int(self.starts[text]), int(self.lengths[text])
                first = at
                if self.begin is not None:
                    tokens[row, at] = self.begin
                    at += 1
                tokens[row, at : at + length] = self.encoded.tokens[start : start + length]
                at += length
                if self.end is not None:
                    tokens[row, at] = self.end
                    at += 1
                mask[row, first:at], positions[row, first:at] = number, np.arange(at - first)
        return {"tokens": tokens, "mask": mask, "positions": positions}


def windows(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Windows of a sequence of tokens, int (n,), n at least 2, that do not overlap.

    Returns:
      `tokens` and `next_tokens`, both int32 (windows, length). The last window is filled up with 0 and -1.
    """
    rows = -(-(len(tokens) - 1) // length)
    inputs, targets = np.zeros(rows * length, np.int32), np.full(rows * length, -1, np.int32)
    inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return {"tokens": inputs.reshape(rows, length), "next_tokens": targets.reshape(rows, length)}
