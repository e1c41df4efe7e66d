"""`Masking`: tokens hidden at random from a masked language model, which is to predict them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError, whole_number

EVALUATION = 0x6D61736B
"""seed of the keys in evaluation, where a row's own tokens decide what of it is hidden"""


@dataclass(frozen=True)
class Masking:
    """Hides tokens at random on the device: special tokens and padding never, each other one with the same probability.

    Source: J. Devlin et al., BERT, 2019, https://arxiv.org/abs/1810.04805, section 3.1, task 1, and appendix A.1.
    """

    rate: float = 0.0
    """Share of the tokens that are to be predicted, 0.15 in BERT; 0: there is no masking."""
    masked: float = 0.8
    """Share of these that the mask token replaces."""
    replaced: float = 0.1
    """Share of these that a random token replaces; the rest stay as they are."""
    most: int | None = None
    """Most tokens of a row that are to be predicted; the model then makes logits for these places alone, which the
    batch names in `predicted`. By default any number, and logits for all places."""

    def __post_init__(self) -> None:
        """Raises InputError for shares that are none."""
        for name in ("rate", "masked", "replaced"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.masking.{name} = {getattr(self, name)}: expected a share, from 0 to 1")
        if self.masked + self.replaced > 1:
            raise InputError(
                f"data.masking.masked + replaced = {self.masked + self.replaced:g}: expected at most 1, the rest stay "
                "as they are"
            )
        if self.most is not None:
            object.__setattr__(self, "most", whole_number("data.masking.most", self.most, 1))

    def __call__(
        self,
        key: jax.Array | None,
        tokens: jax.Array,
        *,
        padding: jax.Array,
        special: Sequence[int],
        ordinary: np.ndarray,
        mask_token: int,
    ) -> dict[str, jax.Array]:
        """Hides tokens of one row. Pure.

        Args:
          key: key of the draws. None in evaluation: they are a function of the row's tokens, so that a row is hidden in
            the same way whatever else is in its batch; a row that has mask tokens of its own is left as it is.
          tokens: int (length,).
          padding: bool (length,): True for padding.
          special: the special tokens.
          ordinary: all other tokens, int (n,).
          mask_token: the mask token.

        Returns:
          `tokens`, int32 (length,), what the model sees; `targets`, int32, what was there at the places to predict, -1
          elsewhere. With `most`: `targets` (n,), and `predicted`, their places, int32 (n,), all different, with n =
          min(most, length).
        """
        length, tokens = tokens.shape[0], tokens.astype(jnp.int32)
        is_special = functools.reduce(jnp.logical_or, [tokens == token for token in special])
        hidable = ~(is_special | padding)
        if key is None:
            hidable &= ~jnp.any(tokens == mask_token)
            key = jax.random.fold_in(jax.random.key(EVALUATION), hash_of(tokens))
        to_choose, to_change, to_replace = jax.random.split(key, 3)
        drawn = jnp.where(hidable, jax.random.uniform(to_choose, (length,)), 1.0)
        chosen = drawn < self.rate
        if self.most is not None:
            # Those with the smallest draws, so that no place is preferred.
            places = jnp.argsort(drawn)[: self.most].astype(jnp.int32)
            chosen &= jnp.zeros(length, bool).at[places].set(True)
        change = jax.random.uniform(to_change, (length,))
        other = jnp.asarray(ordinary, jnp.int32)[jax.random.randint(to_replace, (length,), 0, len(ordinary))]
        seen = jnp.where(
            change < self.masked, mask_token, jnp.where(change < self.masked + self.replaced, other, tokens)
        )
        targets = jnp.where(chosen, tokens, -1)
        batch = {"tokens": jnp.where(chosen, seen, tokens), "targets": targets}
        return batch if self.most is None else {**batch, "targets": targets[places], "predicted": places}


def hash_of(tokens: jax.Array) -> jax.Array:
    """A number made of all tokens and their places, uint32 scalar.

    Args:
      tokens: int (length,).
    """
    odd = np.array([pow(0x9E3779B1, place + 1, 2**32) for place in range(tokens.shape[0])], np.uint32)
    return jnp.sum((tokens.astype(jnp.uint32) + 1) * odd, dtype=jnp.uint32)
