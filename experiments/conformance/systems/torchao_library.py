"""Quantisers of torchao: MX tensors by each scale rule, and NVFP4 with a scale of the tensor. Python 3.11."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from subject import Subject
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from jaxmp.testing import quantizer_laws

WHOLE_BLOCKS = "torchao asserts that a row is a multiple of the block; the adapter would fill it up"


def _padded(x: Any, length: int) -> torch.Tensor:
    x = np.asarray(x, np.float32)
    return torch.from_numpy(np.ascontiguousarray(np.pad(x, [(0, 0), (0, -x.shape[1] % length)])))


def mx(x: Any, dtype: Any, rule: str) -> np.ndarray:
    """An MX tensor and back to float32."""
    tensor = MXTensor.to_mx(_padded(x, 32), dtype, 32, scaling_mode=ScaleCalculationMode[rule.upper()])
    return tensor.dequantize(torch.float32).numpy()[:, : x.shape[1]]


def nvfp4(x: Any) -> np.ndarray:
    """An NVFP4 tensor with a scale of the tensor, and back to float32."""
    tensor = _padded(x, 16)
    scale = per_tensor_amax_to_scale(tensor.abs().max())
    return NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=scale).dequantize(torch.float32).numpy()[:, : x.shape[1]]


def subjects() -> list[Subject]:
    """Returns torchao's quantisers."""
    packages = ("torchao", "torch")
    found = []
    for name, dtype in (("mxfp8", torch.float8_e4m3fn), ("mxfp4", torch.float4_e2m1fn_x2)):
        for rule in ("floor", "rceil"):
            laws = quantizer_laws(lambda x, d=dtype, r=rule: mx(x, d, r), f"{name}:{rule}")
            found.append(Subject(f"torchao, {name}:{rule}", packages, laws, {"ragged_shapes": WHOLE_BLOCKS}))
    laws = quantizer_laws(nvfp4, "nvfp4:torchao")
    found.append(Subject("torchao, nvfp4", packages, laws, {"ragged_shapes": WHOLE_BLOCKS}))
    return found
