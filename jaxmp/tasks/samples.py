"""`Samples`: texts or pictures that a task draws from a trained model, and what it is given for that.

`draw_pictures` is what the tasks of models that make images share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.data.vocabulary import Vocabulary
from jaxmp.errors import InputError, whole_number

TEXTS, PICTURES = 4, 64
"""numbers of texts and of pictures that are drawn where none is given"""
AT_A_TIME = 256
"""most pictures that one call of the model makes"""


@dataclass(frozen=True)
class Sampling:
    """What is to be drawn. Raises InputError for a number out of range."""

    count: int | None = None
    """number of texts or pictures; None: 4 texts, or 64 pictures"""
    prompt: str | None = None
    """text that each text begins with; None: the end-of-text token, or a new line where the vocabulary has none"""
    length: int | None = None
    """number of tokens to draw for a text; None: as many as the model's context has room for"""
    temperature: float = 1.0
    """what logits are divided by; 0: the most probable token is taken"""

    def __post_init__(self) -> None:
        if self.count is not None:
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


def draw_pictures(
    trained: Trained, key: jax.Array, sampling: Sampling, as_pictures: Callable[[jax.Array], jax.Array]
) -> Samples:
    """Draws pictures by the model's method `draw(count)`, under the run's policy.

    Each picture is a function of the variables, of the key and of its own number: more pictures begin with the fewer,
    up to the rounding of a larger batch.

    Args:
      trained: the model, whose `draw` returns images (count, height, width, channels), with draws from its random
        stream "noise".
      key: key of the draws.
      sampling: how many; texts alone have a prompt, a length and a temperature.
      as_pictures: maps what `draw` returns, in float32, to pictures from 0 to 1; what is outside is clipped.

    Raises:
      InputError: the model has no method `draw`, its images have neither 1 nor 3 channels, or `sampling` asks for what
        only texts have.
    """
    name, plain = type(trained.model).__name__, Sampling()
    for option in ("prompt", "length", "temperature"):
        if (value := getattr(sampling, option)) != getattr(plain, option):
            raise InputError(f"{option} = {value!r}: only texts have one, and {name} draws pictures; expected none")
    if not callable(getattr(trained.model, "draw", None)):
        raise InputError(f"{name} has no method draw(count), which draws images; expected a model such as DCGAN or VAE")
    count = PICTURES if sampling.count is None else sampling.count
    draw = jax.jit(trained.apply, static_argnums=1, static_argnames="method")  # compiled once for one `trained.apply`
    pictures = []
    for number, first in enumerate(range(0, count, AT_A_TIME)):
        key_of_part = jax.random.fold_in(key, number)
        made = draw(trained.variables, min(AT_A_TIME, count - first), method="draw", rngs={"noise": key_of_part})
        if made.ndim != 4 or made.shape[-1] not in (1, 3):
            raise InputError(
                f"{name}.draw returned {made.dtype}{list(made.shape)}; expected images (count, height, width, "
                "channels) with 1 or 3 channels"
            )
        pictures.append(np.asarray(jnp.clip(as_pictures(made.astype(jnp.float32)), 0, 1)))
    return Samples(pictures=np.concatenate(pictures))
