"""Products of arrays in a block format by one call of JAX, which hardware that has the format runs natively.

    x, w = pack(x, "mxfp8"), pack(w.T, "mxfp8")     # (rows, K) and (N, K): blocks run along the contraction
    y = native_product(x, w)                        # jax.nn.scaled_matmul: cuDNN on NVIDIA's Blackwell

Elsewhere the numbers are multiplied in float32: the result is that of the emulation but for the order of sums. Training
under a recipe does not call this: `jaxmp.precision.product` emulates, so that a run is the same on every device, and
hardware sums in its own order and precision (Hopper: about 14 bits, 2412.19437, section 3.3.2). This is how the two are
compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmp.errors import InputError
from jaxmp.precision.blocks import BlockFormat, PackedBlocks, parse_block_format


class NativeCall(NamedTuple):
    """The call of JAX that multiplies two arrays in a format."""

    call: str
    """its name"""
    capability: float
    """least compute capability of an NVIDIA GPU that runs it natively: 8.9 is Ada and 9.0 Hopper, 10.0 Blackwell"""


_FP8 = ("e4m3", "e5m2")
_DTYPES: dict[str, Any] = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "e2m1": jnp.float4_e2m1fn}
_BY_TENSOR = NativeCall("jax.lax.dot_general", 8.9)
_BY_BLOCK = NativeCall("jax.nn.scaled_matmul", 10.0)

FORMATS = ("e4m3:tensor", "e5m2:tensor", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4")
"""Names of formats that `native_call` knows, with any scale rule."""


def native_call(format: BlockFormat | str) -> NativeCall | None:
    """Returns the call that multiplies arrays in a format natively on some hardware; None if no single call does.

    >>> native_call("mxfp8"), native_call("block128")
    (NativeCall(call='jax.nn.scaled_matmul', capability=10.0), None)

    Source: NVIDIA, cuBLAS, table of cublasLtMatmul (FP8 by tensor, 8.9); jax.nn.scaled_matmul, Notes.
    """
    format = parse_block_format(format) if isinstance(format, str) else format
    element = str(format.element)
    if format.block == "tensor" and format.scale == "f32" and element in _FP8:
        return _BY_TENSOR
    if (format.block, format.scale) == ((32,), "e8m0") and element in _FP8:
        return _BY_BLOCK
    if (format.block, format.scale) == ((16,), "e4m3") and element == "e2m1":
        return _BY_BLOCK
    return None


def is_native(format: BlockFormat | str, device: Any) -> bool:
    """Whether a JAX device multiplies arrays in a format natively, in one call; known of NVIDIA GPUs alone."""
    found = native_call(format)
    if found is None or device.platform != "gpu":
        return False
    try:
        return float(device.compute_capability) >= found.capability
    except (AttributeError, ValueError):  # AMD names an architecture, not a number
        return False


def native_product(x: PackedBlocks, w: PackedBlocks) -> jax.Array:
    """Multiplies arrays in a block format by one call of JAX, see `native_call`.

    Args:
      x: (rows, K), packed along its last axis.
      w: (N, K), packed along its last axis, in a format of the same call: float8 by tensor or MXFP8 may mix e4m3 and
        e5m2.

    Returns:
      float32 (rows, N).

    Raises:
      InputError: no single call multiplies the two formats, or K is no multiple of the block length.
    """
    calls = [native_call(each.format) for each in (x, w)]
    if calls[0] is None or calls[0] != calls[1] or x.format.block != w.format.block:
        raise InputError(
            f"native product of {x.format} and {w.format}: no single call of JAX multiplies them; expected two of one "
            f"kind among {', '.join(FORMATS)}"
        )
    if x.shape[-1] != w.shape[-1] or len(x.shape) != 2 or len(w.shape) != 2:
        raise InputError(f"native product of shapes {x.shape} and {w.shape}: expected (rows, K) and (N, K)")
    if calls[0] is _BY_TENSOR:
        numbers = (((1,), (1,)), ((), ()))
        y = lax.dot_general(_elements(x), _elements(w), numbers, preferred_element_type=jnp.float32)
        return y * (x.scales.reshape(()) * w.scales.reshape(()))
    if isinstance(x.format.block, tuple) and x.shape[-1] % x.format.block[0]:
        raise InputError(
            f"native product of {x.format}: K is {x.shape[-1]}; expected a multiple of the block length "
            f"{x.format.block[0]}"
        )
    return lax.platform_dependent(x, w, cuda=_scaled_matmul, default=_of_numbers)


def _scaled_matmul(x: PackedBlocks, w: PackedBlocks) -> jax.Array:
    """The product by `jax.nn.scaled_matmul`, which JAX lowers for GPUs alone."""
    a, b, of_a, of_b = (each[None] for each in (_elements(x), _elements(w), _scales(x), _scales(w)))
    y = jax.nn.scaled_matmul(a, b, of_a, of_b, preferred_element_type=jnp.float32)[0]
    for each in (x, w):
        y = y if each.tensor_scale is None else y * each.tensor_scale
    return y


def _of_numbers(x: PackedBlocks, w: PackedBlocks) -> jax.Array:
    """The product of the numbers, in float32."""
    numbers = (((1,), (1,)), ((), ()))
    return lax.dot_general(x.unpack(), w.unpack(), numbers, precision=lax.Precision.HIGHEST)


def _elements(x: PackedBlocks) -> jax.Array:
    """The elements in their dtype, (rows, K)."""
    codes = x.elements
    if x.format.element.bits == 4:  # two a byte, the first in the low bits
        codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)[..., : x.shape[-1]]
        return lax.bitcast_convert_type(codes.astype(jnp.uint4), _DTYPES["e2m1"])
    return lax.bitcast_convert_type(codes, _DTYPES[str(x.format.element)])


def _scales(x: PackedBlocks) -> jax.Array:
    return lax.bitcast_convert_type(x.scales, jnp.float8_e8m0fnu if x.format.scale == "e8m0" else jnp.float8_e4m3fn)
