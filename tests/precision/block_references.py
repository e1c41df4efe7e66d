"""Independent implementations of the block formats, and the vectors in `block_vectors.npz` that they made.

    pip install gfloat==0.5.2 torch==2.13.0 torchao==0.18.0 numpy ml_dtypes      # Python 3.11
    pip download --no-deps transformer_engine_cu12==2.20.2                       # unzip its custom_recipes folder
    TRANSFORMER_ENGINE=.../custom_recipes python tests/precision/block_references.py

writes the vectors: what each reference returns for `inputs(4096)`. Where the packages are installed, the slow tests
compare 10^6 values with them directly.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np

VECTORS = Path(__file__).parent / "block_vectors.npz"

MX = {"mxfp8_e4m3": "e4m3", "mxfp8_e5m2": "e5m2", "mxfp6_e2m3": "e2m3", "mxfp6_e3m2": "e3m2", "mxfp4": "e2m1"}
CASES = {
    **{f"gfloat {name}": 32 for name in (*MX, "mxint8")},
    **{f"torchao {name}:{rule}": 32 for name in MX for rule in ("floor", "rceil", "ceil", "even")},
    **{"te nvfp4": 16, "te nvfp4_16x16": 16, "torchao nvfp4:torchao": 16},
    **{"numpy block128": 128, "numpy int8": None, "numpy int4:channel": None},
}
"""the cases, a reference and a format each, and the length of blocks"""


def inputs(count: int, seed: int = 0) -> np.ndarray:
    """Numbers of all kinds, float32 (count / 256, 256). RandomState's streams are the same in every NumPy."""
    random = np.random.RandomState(seed)
    rows = count // 256
    shape = (rows, 8, 32)
    sign = random.choice([-1.0, 1.0], shape)
    normal = random.standard_normal(shape) * np.exp2(random.randint(-20, 20, (rows, 8, 1)))
    log_uniform = sign * np.exp2(random.uniform(-126, 127.9, shape))
    narrow = sign * np.exp2(random.uniform(-22, 0, shape) + random.randint(-100, 120, (rows, 8, 1)))
    # The largest of a block just below a power of two: every rule that rounds or clips it differs from the next.
    narrow[..., 0] = sign[..., 0] * (2 - 2.0**-9) * np.exp2(random.randint(-100, 120, (rows, 8)))
    # All numbers and midpoints of the small formats, and the float32 numbers beside them.
    mantissa = random.randint(16, 32, shape) / 16.0
    grid = sign * mantissa * np.exp2(random.randint(-8, 9, shape) + random.randint(-30, 30, (rows, 8, 1)))
    grid = grid.astype(np.float32).view(np.uint32) + random.randint(-1, 2, shape)
    grid = grid.astype(np.uint32).view(np.float32).astype(np.float64)
    exact = sign * mantissa * np.exp2(random.randint(-6, 3, shape))
    small = sign * np.exp2(random.uniform(-30, 0, shape) + random.randint(-145, -106, (rows, 8, 1)))
    zeros = np.where(random.uniform(size=shape) < 0.9, 0.0 * sign, normal)
    zeros[:, :4] *= 0
    kinds = np.stack([normal, log_uniform, narrow, grid, exact, small, zeros])
    kind = random.choice(len(kinds), (rows, 1, 1), p=[0.3, 0.05, 0.2, 0.2, 0.1, 0.05, 0.1])
    x = np.choose(np.broadcast_to(kind, shape), kinds).astype(np.float32)
    return x.reshape(rows, 256)


def tensor_inputs(count: int, seed: int = 1) -> np.ndarray:
    """Numbers for formats with a scale of the tensor, in which amax of the blocks vary by 2^24, float32 (..., 256)."""
    random = np.random.RandomState(seed)
    shape = (count // 256, 16, 16)
    normal = random.standard_normal(shape) * np.exp2(random.randint(-18, 4, (count // 256, 16, 1)))
    ties = random.randint(-13, 14, shape) / 4.0 * np.exp2(random.randint(-6, 2, (count // 256, 16, 1)))
    zeros = np.where(random.uniform(size=shape) < 0.95, 0.0, normal)
    # Where the order of multiplications shows: elements, or scales, that are halfway between two up to rounding errors.
    largest = 123.45678
    scale = random.randint(8, 16, shape[:2]) / 8.0 * np.exp2(random.randint(-5, 8, shape[:2]))
    middle = random.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], shape) * random.choice([-1.0, 1.0], shape)
    middle[..., 0] = 6.0
    elements = middle * scale[..., None] * (largest / 2688)
    scales = np.minimum(np.abs(normal), 1) / 8
    scales[..., 0] = (scale + np.exp2(np.floor(np.log2(scale)) - 4)) * (largest / 448)
    kinds = np.stack([normal, ties, zeros, elements, scales])
    kind = random.choice(5, (*shape[:2], 1), p=[0.4, 0.1, 0.1, 0.2, 0.2])
    x = np.choose(np.broadcast_to(kind, shape), kinds).astype(np.float32)
    near = (x.view(np.uint32) + random.randint(-1, 2, shape)).astype(np.uint32).view(np.float32)
    x = np.where((kind > 2) & (x != 0), near, x).reshape(-1, 256)
    x[0, 0] = largest
    return x


def inputs_of(case: str, count: int) -> np.ndarray:
    """The inputs of a case."""
    return inputs(count) if " mx" in case else tensor_inputs(count)


def reference(case: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """What a reference makes of `x`: codes of elements and of scales, each uint8 (float32 scales as they are)."""
    who, name = case.split(" ")
    return {"gfloat": _gfloat, "torchao": _torchao, "te": _transformer_engine, "numpy": _numpy}[who](name, x)


def installed(case: str) -> bool:
    """Whether the packages of a reference are here."""
    needs = {"gfloat": ["gfloat"], "torchao": ["torch", "torchao"], "te": ["torch"], "numpy": []}[case.split(" ")[0]]
    found = all(importlib.util.find_spec(package) for package in needs)
    return found and (not case.startswith("te ") or "TRANSFORMER_ENGINE" in os.environ)


def _gfloat(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    from gfloat import RoundMode, encode_ndarray, formats, round_ndarray
    from gfloat.block import compute_scale_amax

    format = getattr(formats, f"format_info_{'mxfp4_e2m1' if name == 'mxfp4' else name}")
    blocks = x.astype(np.float64).reshape(-1, 32)
    scale = np.array([compute_scale_amax(format.etype.emax, block) for block in blocks])
    rounded = round_ndarray(format.etype, blocks / scale[:, None], RoundMode.TiesToEven, sat=True)
    codes = encode_ndarray(format.etype, rounded)
    return {
        "elements": np.asarray(codes).astype(np.uint8).reshape(x.shape),
        "scales": np.asarray(encode_ndarray(format.stype, scale)).astype(np.uint8).reshape(*x.shape[:-1], -1),
    }


def _torchao(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx, unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    name, rule = name.split(":")
    tensor = torch.from_numpy(x)
    if name == "nvfp4":
        scale = per_tensor_amax_to_scale(tensor.abs().max())
        scales, packed = nvfp4_quantize(tensor, 16, scale)
        elements = unpack_uint4(packed)
    else:
        element = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}
        dtype = element.get(MX[name], f"fp6_{MX[name]}")
        scales, elements = to_mx(tensor, dtype, 32, ScaleCalculationMode[rule.upper()])
        elements = unpack_uint4(elements) if name == "mxfp4" else elements
    return {
        "elements": elements.view(torch.uint8).numpy().reshape(x.shape),
        "scales": scales.view(torch.uint8).numpy().reshape(*x.shape[:-1], -1),
    }


@functools.cache
def _te_module() -> types.ModuleType:
    """reference_nvfp4.py alone: what it imports of Transformer Engine is not used here, and is stubbed."""
    folder = Path(os.environ["TRANSFORMER_ENGINE"])

    class Quantizer:
        def __init__(self, rowwise: bool, columnwise: bool):
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    pytorch = "transformer_engine.pytorch"
    for each in ("transformer_engine", pytorch, f"{pytorch}.custom_recipes", f"{pytorch}.custom_recipes.gemm"):
        sys.modules[each] = types.ModuleType(each)
    tensors = types.ModuleType(f"{pytorch}.quantized_tensor")
    tensors.Quantizer, tensors.QuantizedTensorStorage = Quantizer, object
    sys.modules[tensors.__name__] = tensors
    recipes = sys.modules[f"{pytorch}.custom_recipes"]
    recipes.gemm = sys.modules[f"{pytorch}.custom_recipes.gemm"]
    recipes.gemm.MMParams = recipes.gemm.GEMMType = types.SimpleNamespace(FPROP=None)
    for each in ("reference_utils", "reference_nvfp4"):
        spec = importlib.util.spec_from_file_location(f"{recipes.__name__}.{each}", folder / f"{each}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        setattr(recipes, each, module)
        spec.loader.exec_module(module)
    return module


def _transformer_engine(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    module = _te_module()
    rows = 16 if name == "nvfp4_16x16" else 1
    quantizer = module.NVFP4QuantizerRef("e2m1", columnwise=False, quant_tile_shape=(rows, 16))
    made = quantizer.quantize(torch.from_numpy(x))
    packed = made.data.numpy()
    elements = np.stack([packed & 15, packed >> 4], -1).reshape(x.shape)
    return {"elements": elements, "scales": made.scale.view(torch.uint8).numpy()[::rows]}


def _numpy(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """`amax` in float32, as written: e = largest / amax, the scale 1 / e."""
    length = {"block128": 128, "int8": x.size, "int4:channel": x.shape[-1]}[name]
    largest = np.float32({"block128": 448, "int8": 127, "int4:channel": 7}[name])
    blocks = x.reshape(-1, length)
    with np.errstate(divide="ignore"):
        encode = np.minimum(largest / np.abs(blocks).max(1, keepdims=True), np.float32(2.0**126))
    scaled = np.clip(blocks * encode, -largest, largest)
    if name == "block128":
        elements = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    else:
        elements = np.rint(scaled).astype(np.int8).view(np.uint8) & (15 if "int4" in name else 255)
    shape = {"block128": (x.shape[0], -1), "int8": (1, 1), "int4:channel": (x.shape[0], 1)}[name]
    return {"elements": elements.reshape(x.shape), "scales": (np.float32(1) / encode).reshape(shape)}


if __name__ == "__main__":
    arrays = {}
    for case in CASES:
        for key, array in reference(case, inputs_of(case, 4096)).items():
            arrays[f"{case} {key}"] = array
    np.savez_compressed(VECTORS, **arrays)
    print(f"{VECTORS}: {len(CASES)} cases, {VECTORS.stat().st_size} bytes")
