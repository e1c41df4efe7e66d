"""The FLOPs of products and convolutions, counted in a jaxpr, and the peak of a device that they are compared with."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax.numpy as jnp
from jax.lax import DotAlgorithm, DotAlgorithmPreset, Precision

from jaxmp.jaxprs import bare, device_count, jaxprs_in

BACKWARD = 2
"""FLOPs of the backward pass by those of the forward pass: each product has two gradients as large. Source: J. Kaplan
et al., https://arxiv.org/abs/2001.08361, section 2.1; A. Chowdhery et al., https://arxiv.org/abs/2204.02311, appendix
B."""

_HALF = ("bfloat16", "float16")
PEAK_FLOPS = {
    "H100 80GB HBM3": {**dict.fromkeys(_HALF, 989.4e12), "tensorfloat32": 494.7e12, "float32": 67e12},
    "H200": {**dict.fromkeys(_HALF, 989.4e12), "tensorfloat32": 494.7e12, "float32": 67e12},
    "H100 PCIe": {**dict.fromkeys(_HALF, 756e12), "tensorfloat32": 378e12, "float32": 51e12},
    "A100": {**dict.fromkeys(_HALF, 312e12), "tensorfloat32": 156e12, "float32": 19.5e12},
}
"""The dense FLOP/s of a GPU, by a part of its name in JAX and the arithmetic of the products (see `arithmetic`). Tensor
cores multiply all but float32, which has only the ordinary cores. Source: NVIDIA's data sheets of the H100, H200 and
A100, without sparsity."""

_ALGORITHMS: dict[Any, str] = {
    DotAlgorithmPreset.F32_F32_F32: "float32",
    DotAlgorithmPreset.TF32_TF32_F32: "tensorfloat32",
    DotAlgorithmPreset.BF16_BF16_F32: "bfloat16",
    DotAlgorithmPreset.F16_F16_F32: "float16",
}


def arithmetic(eqn: Any) -> str:
    """Returns how an NVIDIA GPU multiplies in a `dot_general` or `conv_general_dilated`, as in `PEAK_FLOPS`.

    It is the wider dtype of the operands, except for float32: XLA rounds these operands to `tensorfloat32` unless one
    of them has `Precision.HIGHEST`. A dot algorithm decides by itself; one that takes several products is returned by
    its own name.
    """
    precision = eqn.params["precision"]
    if isinstance(precision, (DotAlgorithm, DotAlgorithmPreset)) and precision != DotAlgorithmPreset.DEFAULT:
        return _ALGORITHMS.get(precision, str(precision))
    dtype = jnp.promote_types(eqn.invars[0].aval.dtype, eqn.invars[1].aval.dtype).name
    if dtype == "float32" and not (isinstance(precision, tuple) and Precision.HIGHEST in precision):
        return "tensorfloat32"
    return dtype


def dot_flops(eqn: Any) -> int:
    """The FLOPs of a `dot_general`: a multiplication and an addition for each term."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)


def convolution_flops(eqn: Any) -> int:
    """The FLOPs of a `conv_general_dilated`, those of its padding included."""
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    _, inputs, *window = (kernel[d] for d in spec)  # the inputs are those of a group
    # Of the zeros between the numbers of a transposed convolution's input, nothing is computed.
    spread = math.prod(eqn.params["lhs_dilation"])
    return 2 * eqn.outvars[0].aval.size * inputs * math.prod(window) // spread


FLOPS = {"dot_general": dot_flops, "conv_general_dilated": convolution_flops}
"""the primitives that are counted"""


def product_flops(jaxpr: Any) -> dict[str, int]:
    """The FLOPs of all products and convolutions of a jaxpr, by their `arithmetic`.

    The body of a scan counts as often as it is long, that of a while loop once, of a conditional the branch with most.
    A function mapped over devices counts once for each.
    """
    found: collections.Counter[str] = collections.Counter()
    for eqn in bare(jaxpr).eqns:
        name = eqn.primitive.name
        if name in FLOPS:
            found[arithmetic(eqn)] += FLOPS[name](eqn)
            continue
        inner = [product_flops(each) for each in jaxprs_in(eqn)]
        if not any(inner):
            continue
        if name == "cond":
            inner = [max(inner, key=lambda branch: sum(branch.values()))]
        for of_one in inner:
            for kind, flops in of_one.items():
                found[kind] += flops * (eqn.params["length"] if name == "scan" else device_count(eqn))
    return dict(found.most_common())


def peak_flops(device: str, kind: str) -> float | None:
    """The FLOP/s that a device can reach in products of an `arithmetic`, from `PEAK_FLOPS`; None if it is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16"), peak_flops("cpu", "bfloat16")
    (989400000000000.0, None)
    """
    for name, peaks in PEAK_FLOPS.items():
        if name in device:
            return peaks.get(kind)
    return None
