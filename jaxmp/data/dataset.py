"""`Dataset`, the base of every dataset: named splits of rows, and how batches are made of them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from jaxmp.data.source import Source
from jaxmp.data.transforms import HostTransformed, apply_transforms, errors_named
from jaxmp.errors import InputError, whole_number

Split = Literal["train", "validation", "test"]

Prepare = Callable[..., dict[str, Any]]
"""`(batch, key, global_index=None) -> batch`: what is done to a batch on the device; pure, to be traced"""


@dataclass(frozen=True, kw_only=True)
class Dataset(abc.ABC):
    """Rows in three splits: train, validation and test. For data of your own, define `source`:

        @dataclass(frozen=True)
        class Mine(jaxmp.Dataset):
            def source(self, split):
                return Columns({"x": ..., "label": ...})    # jaxmp.data.source.Columns

    Derive from `jaxmp.data.images.Images` instead if images are to be normalised and augmented.
    """

    batch_size: int = 64
    """Rows in a training batch, counted over all devices."""
    eval_batch_size: int = field(default=512, metadata={"identity": "rounds"})
    """Rows in an evaluation batch, counted over all devices."""
    device_limit: int = field(default=1024, metadata={"identity": "operates"})
    """Largest training split, in MiB, that is kept in device memory; a larger one is streamed from the host."""
    workers: int = field(default=0, metadata={"identity": "operates"})
    """Processes that read a streamed training split; 0 reads in threads."""
    host_transforms: tuple[Callable[..., Any], ...] = ()
    """Functions of rows on the host, rows -> rows, applied in order: a tokenizer, for example."""
    transforms: tuple[Callable[..., Any], ...] = ()
    """Functions of one example on the device, (key, row) -> row, applied in order; key is None in evaluation."""
    cuts: tuple[Any, ...] = ()
    """How rows are dealt to splits anew, in order; set by jaxmp.random_split, k_folds and balanced."""

    def __post_init__(self) -> None:
        """Raises InputError for a size or a function that cannot be used."""
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("device_limit", 0), ("workers", 0)):
            object.__setattr__(self, name, whole_number(f"data.{name}", getattr(self, name), least))
        for name in ("host_transforms", "transforms"):
            functions = getattr(self, name)
            if not isinstance(functions, tuple) or not all(map(callable, functions)):
                raise InputError(f"data.{name} is {functions!r}; expected a tuple of functions, (function,)")
        if not isinstance(self.cuts, tuple) or not all(hasattr(cut, "source") for cut in self.cuts):
            raise InputError(f"data.cuts is {self.cuts!r:.80}; expected what jaxmp.random_split sets")

    @abc.abstractmethod
    def source(self, split: Split) -> Source | None:
        """The rows of one split, before any transform; None if there is no such split. Only "train" has to exist.

        Raises InputError if the rows cannot be read.
        """

    def encode(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rows of one's own, columns by name, in the form in which `source` has them; here the rows themselves.

        A dataset whose `source` changes the rows that it is made of, texts into tokens, say, extends this method.
        """
        return rows

    def read(self, split: Split) -> Source | None:
        """The rows of one split after the host transforms; None if there is no such split.

        Training and evaluation read these. Each split is opened once, so that a split that is drawn without a seed is
        the same for all that read it from this object. Raises InputError if there are no training rows, if `source`
        returns no rows, or as `apply_host_transforms` does.
        """
        opened = self.__dict__.setdefault("_opened", {})
        if split not in opened:
            opened[split] = self._read(split)
        return opened[split]

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a copy opens its own splits."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def _read(self, split: Split) -> Source | None:
        source = self._cut(split, self.cuts)
        if source is None:
            return None
        return HostTransformed(source, self.host_transforms) if self.host_transforms else source

    def _cut(self, split: Split, cuts: tuple[Any, ...]) -> Source | None:
        """The rows of a split after `cuts`; without any, those of `source`, which is opened once."""
        if cuts:
            return cuts[-1].source(split, lambda before: self._cut(before, cuts[:-1]))
        opened = self.__dict__.setdefault("_opened", {})
        if f"whole {split}" not in opened:
            opened[f"whole {split}"] = self._whole(split)
        return opened[f"whole {split}"]

    def _whole(self, split: Split) -> Source | None:
        call = f"{type(self).__name__}.source({split!r})"
        try:
            source = self.source(split)
        except InputError:  # which says where
            raise
        except Exception:  # of one's own dataset: anything
            with errors_named(call):
                raise
        if source is None:
            if split == "train":
                raise InputError(f"{call} returned None; expected the training rows, which alone are compulsory")
            return None
        if isinstance(source, dict) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise InputError(
                f"{call} returned {type(source).__name__}; expected a source of rows, such as "
                "jaxmp.data.source.Columns({name: array})"
            )
        if not len(source):
            raise InputError(f"{call} has no rows")
        return source

    def prepare_ahead(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of `prepare` needs neither a key nor other rows, done once to all training rows.

        `columns` has arrays of shape (rows, ...), and so has the result, of which `prepare` makes the same batches as
        of `columns`, but for rounding. Here it is `columns`; a class of datasets whose `prepare` is expensive extends
        both, as `Recordings` does.
        """
        return columns

    def prepare(self, *, train: bool) -> Prepare:
        """What is done to a batch on the device: `(batch, key, global_index=None) -> batch`, pure, to be traced.

        The one place for it: a class of datasets that does more extends this method, as `Images` does. Here it is the
        `transforms`.

        `batch` is a dict of arrays of shape (rows, ...). `key` is the step's JAX key for the data; it is ignored if not
        `train`. `global_index`, int32 (rows,), is the place of each row in the whole batch if `batch` is a part of one:
        what is drawn for a row depends on `key` and on this place alone, and so not on the number of devices.
        Raises InputError as `apply_transforms` does.
        """

        def apply(batch: dict[str, Any], key: Any, global_index: jax.Array | None = None) -> dict[str, Any]:
            return apply_transforms(self.transforms, batch, key if train else None, global_index)

        return apply
