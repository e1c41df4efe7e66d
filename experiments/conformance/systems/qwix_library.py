"""Quantisers of qwix: its arrays with tiles along the contraction, to nearest and with its noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from qwix._src.core import qarray, stochastic_rounding  # what its providers call; the public API takes models alone
from subject import Subject

from jaxmp.testing import quantizer_laws


def rounded(x: jax.Array, qtype: object, block: int = 0, key: jax.Array | None = None) -> jax.Array:
    """Quantises rows, or tiles of a row, and dequantises."""
    noise = None if key is None else stochastic_rounding.get_noise_fn("uniform", key)
    tiles = {1: block} if block else {}
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=[0], tiled_axes=tiles, noise_fn=noise)
    return qarray.dequantize(qarray.quantize(x, how))


def subjects() -> list[Subject]:
    """Returns qwix's quantisers by format and rounding."""
    cases = (
        ("mxfp8", 32, "mxfp8:rceil"),
        ("mxfp4", 32, "mxfp4:rceil"),
        ("nvfp4", 16, "nvfp4"),
        (jnp.int8, 0, "int8:channel"),
    )
    found = []
    for qtype, block, format in cases:
        name = qtype if isinstance(qtype, str) else "int8"
        nearest = quantizer_laws(lambda x, q=qtype, b=block: rounded(x, q, b), format)
        found.append(Subject(f"qwix, {name}", ("qwix",), nearest))
        drawn = quantizer_laws(lambda x, key, q=qtype, b=block: rounded(x, q, b, key), format)
        found.append(Subject(f"qwix, {name}, stochastic", ("qwix",), drawn))
    return found
