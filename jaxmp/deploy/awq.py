"""`awq`: rounds a weight after its columns are scaled by a power of how large their inputs are.

Source: J. Lin and others, AWQ: Activation-aware Weight Quantization, 2023, section 3.2,
https://arxiv.org/abs/2306.00978.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxmp.precision.blocks import BlockFormat, PackedBlocks, pack

EXPONENTS = np.linspace(0, 1, 21)
"""exponents that are tried; 0 rounds to nearest"""

SMALLEST = 1e-4
"""the least magnitude of an input that is counted, beside the largest"""


def awq(
    weight: np.ndarray, gram: np.ndarray, magnitudes: np.ndarray, format: BlockFormat
) -> tuple[PackedBlocks, np.ndarray | None]:
    """Rounds a weight times a scale for each input, the one of those tried whose outputs have the least squared error.

    Args:
      weight: (rows, inputs); the product is inputs @ weight.T.
      gram: inputs.T @ inputs over the rows of calibration, (inputs, inputs).
      magnitudes: mean magnitude of each input over them, (inputs,).
      format: any block format; its blocks lie along the inputs.

    Returns:
      The scaled weight in the format, and what its columns are multiplied by afterwards, float32 (inputs,); None: by 1.
    """
    weight, gram = np.asarray(weight, np.float64), np.asarray(gram, np.float64)
    relative = np.maximum(magnitudes / max(float(magnitudes.max()), np.finfo(np.float64).tiny), SMALLEST)
    best: tuple[float, PackedBlocks, np.ndarray] | None = None
    for exponent in EXPONENTS:
        scale = relative**exponent
        after = (np.sqrt(scale.max() * scale.min()) / scale).astype(np.float32)
        packed = pack(jnp.asarray(weight / after, jnp.float32), format, axis=1)
        error = np.asarray(packed.unpack(), np.float64) * after - weight
        cost = float(np.einsum("ri,ri->", error @ gram, error))
        if best is None or cost < best[0]:
            best = cost, packed, after
    assert best is not None
    return best[1], None if np.all(best[2] == 1) else best[2]
