"""Quantisers that come with JAX: casts of ml_dtypes, jax.nn's scaled products, and Flax's fp8_ops."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.linen import fp8_ops
from subject import Subject

from jaxmp.precision.blocks import quantize
from jaxmp.testing import quantizer_laws

ADAPTER = "the adapter multiplies by the identity, so the sign of a zero is lost in the sum"


def cast(name: str):
    """Returns a cast to a dtype of ml_dtypes and back, as `astype` does it."""
    return lambda x: np.asarray(x).astype(getattr(ml_dtypes, name)).astype(np.float32)


def scaled_dot(mode: str):
    """Returns what jax.nn's product makes of its left operand: the product with the identity, which is exact."""

    def quantised(x: jax.Array) -> jax.Array:
        configs = [jax.nn.get_scaled_dot_general_config(mode)] * 3
        return jax.nn.scaled_dot_general(x, jnp.eye(x.shape[1]), (((1,), (1,)), ((), ())), configs=configs)

    return quantised


def scaled_dot_backward(mode: str):
    """Returns what the gradient of that product makes of its cotangent."""
    return lambda g: jax.vjp(scaled_dot(mode), jnp.ones_like(g))[1](g)[0]


def runs_here(mode: str) -> bool:
    """Returns whether JAX lowers its scaled product for this device: JAX 0.10 does for GPUs alone."""
    try:
        jax.jit(scaled_dot(mode)).lower(jnp.ones((4, 64)))
    except NotImplementedError:
        print(f"left out: jax.nn's {mode}, which JAX {jax.__version__} has no code for on this device", file=sys.stderr)
        return False
    return True


def flax_qdq(x: jax.Array) -> jax.Array:
    """Flax's quantize and dequantize, with a scale of 1."""
    return fp8_ops.qdq(x, jnp.float8_e4m3fn, jnp.ones(1), jnp.float32)


def subjects() -> list[Subject]:
    """Returns the quantisers of jaxmp itself, and of what it brings."""
    found = []
    for name in ("mxfp8", "mxfp4", "nvfp4", "block128"):
        nearest = quantizer_laws(lambda x, name=name: quantize(x, name), name)
        found.append(Subject(f"jaxmp, quantize to {name}", ("jaxmp",), nearest))
    drawn = quantizer_laws(lambda x, key: quantize(x, "mxfp4:rceil", rounding="stochastic", key=key), "mxfp4:rceil")
    found.append(Subject("jaxmp, quantize to mxfp4:rceil, stochastic", ("jaxmp",), drawn))
    for name, format in (("float8_e4m3fn", "e4m3"), ("float8_e5m2", "e5m2"), ("float4_e2m1fn", "e2m1")):
        found.append(Subject(f"ml_dtypes, {name}", ("ml_dtypes",), quantizer_laws(cast(name), format)))
    for mode, format in (("mxfp8", "mxfp8:rceil"), ("nvfp4", "nvfp4")):
        if not runs_here(mode):
            continue
        for way, make in (("", scaled_dot), (", backward", scaled_dot_backward)):
            laws = quantizer_laws(make(mode), format)
            name = f'jax.nn, scaled_dot_general("{mode}"){way}'
            found.append(Subject(name, ("jax",), laws, {"negative_zero": ADAPTER}))
    found.append(Subject("flax, fp8_ops.qdq to e4m3", ("flax",), quantizer_laws(flax_qdq, "e4m3")))
    return found
