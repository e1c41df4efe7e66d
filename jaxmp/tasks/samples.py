"""`Samples`: texts or pictures that a task draws from a trained model, and what it is given for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmp.data.vocabulary import Vocabulary
from jaxmp.errors import InputError, whole_number


@dataclass(frozen=True)
class Sampling:
    """What is to be drawn. Raises InputError for a number out of range."""

    count: int = 4
    """number of texts or pictures"""
    prompt: str | None = None
    """text that each text begins with; None: the end-of-text token, or a new line where the vocabulary has none"""
    length: int | None = None
    """number of tokens to draw for a text; None: as many as the model's context has room for"""
    temperature: float = 1.0
    """what logits are divided by; 0: the most probable token is taken"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", whole_number("count", self.count, 1))
        if self.length is not None:
            object.__setattr__(self, "length", whole_number("length", self.length, 1))
        if not 0 <= self.temperature < np.inf:
            raise InputError(f"temperature = {self.temperature}: expected 0 or more")


@dataclass(frozen=True)
class Trained:
    """A trained model, as a task samples from it."""

    model: Any
    """the model of the experiment"""
    apply: Callable[..., Any]
    """`model.apply` under the run's policy: `apply(variables, ..., method=..., mutable=..., rngs=...)`"""
    variables: Any
    """its variables: averaged weights where the run has them, and the model state"""
    data: Any
    """dataset of the experiment"""

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the data. Raises InputError if they have none, since they are not a dataset of texts."""
        found = getattr(self.data, "vocabulary", None)
        if not isinstance(found, Vocabulary):
            raise InputError(
                f"data = {type(self.data).__name__}(...): it says of no token what its text is; expected a dataset of "
                "texts, such as jaxmp.data.text.TextWindows"
            )
        return found


@dataclass(frozen=True)
class Samples:
    """Texts or pictures that were drawn."""

    texts: tuple[str, ...] = ()
    """texts, each with its prompt"""
    pictures: np.ndarray | None = None
    """pictures, float32 (count, height, width, channels), from 0 to 1, with 1 or 3 channels"""
