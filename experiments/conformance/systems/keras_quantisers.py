"""Quantisers of Keras 3 on JAX: float8 as its Dense layers use it, and AbsMaxQuantizer in int8."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
from subject import Subject

from jaxmp.testing import quantizer_laws


def float8(x: jax.Array) -> jax.Array:
    """`quantize_and_dequantize` to float8_e4m3fn with a scale of 1, as `Dense.float8_call` calls it."""
    return keras.src.quantizers.quantize_and_dequantize(x, jnp.float32(1), "float8_e4m3fn", "float32")


def int8(x: jax.Array) -> jax.Array:
    """`AbsMaxQuantizer` by row, and the division by its scale that undoes it."""
    values, scale = keras.quantizers.AbsMaxQuantizer(axis=-1)(x)
    return values.astype(jnp.float32) / scale


def subjects() -> list[Subject]:
    """Returns the two quantisers."""
    return [
        Subject("Keras, float8_e4m3fn", ("keras",), quantizer_laws(float8, "e4m3")),
        Subject("Keras, AbsMaxQuantizer in int8", ("keras",), quantizer_laws(int8, "int8:channel")),
    ]
