"""`gptq`: rounds a weight column by column, and changes the columns that follow such that outputs stay near.

Source: E. Frantar, S. Ashkboos, T. Hoefler and D. Alistarh, GPTQ, 2022, https://arxiv.org/abs/2210.17323, section 3.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxmp.errors import InputError
from jaxmp.precision.blocks import BlockFormat, Integer, PackedBlocks, block_scales, from_ml_dtypes

DAMPING = 0.01
"""share of the mean of the Hessian's diagonal that is added to it"""

COLUMNS = 128
"""columns whose errors are handed on to all later ones together, where a scale is for a whole row"""


def check_format(format: BlockFormat) -> None:
    """Raises InputError for a format that is not one of whole numbers with float32 scales along a row."""
    one_axis = format.block == "channel" or (isinstance(format.block, tuple) and len(format.block) == 1)
    whole = (
        isinstance(format.element, Integer) and format.element.bits in (2, 4, 8) and not format.element.fraction_bits
    )
    if not (one_axis and whole and format.scale == "f32"):
        raise InputError(
            f"--method gptq with --weights {format}: expected int8, int4, or int2, int4 or int8 with a block along one "
            "axis, such as int4:group32; or --method awq, which takes any format"
        )


def gptq(weight: np.ndarray, gram: np.ndarray, format: BlockFormat) -> PackedBlocks:
    """Rounds a weight to a format of whole numbers, so that the squared error of its outputs is small.

    The scale of a block is that of its largest magnitude when its turn comes. A weight that is 0 stays 0, so that a
    pruned matrix stays pruned. A column whose input was always 0 is
    rounded to nearest (the authors' program sets it to 0, which other inputs would feel).

    Args:
      weight: (rows, inputs); the product is inputs @ weight.T.
      gram: inputs.T @ inputs over the rows of calibration, (inputs, inputs).
      format: for those it takes see `check_format`.

    Returns:
      The weight in the format, its blocks along the inputs.
    """
    check_format(format)
    current = np.array(weight, np.float64)
    is_zero = current == 0
    rows, inputs = current.shape
    hessian = np.array(gram, np.float64)
    diagonal = np.diagonal(hessian).copy()
    unseen = diagonal == 0
    damping = DAMPING * (diagonal[~unseen].mean() if not unseen.all() else 1.0)
    hessian[np.diag_indices(inputs)] += np.where(unseen, 1.0, damping)
    # Row j of this factor of the inverse, from its diagonal on, is what the error of column j does to later ones: the
    # inverse of the Hessian of columns j and later has that row, up to a factor (section 3.3, step 3).
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    width = COLUMNS if isinstance(format.block, str) else format.block[0]
    codes = np.zeros((rows, inputs), np.int8)
    scales: list[np.ndarray] = []
    largest = int(format.element.max)
    for begin in range(0, inputs, width):
        end = min(begin + width, inputs)
        if begin == 0 or not isinstance(format.block, str):
            of_block = current if isinstance(format.block, str) else current[:, begin:end]
            scales.append(np.asarray(block_scales(jnp.asarray(of_block, jnp.float32), format, axis=1).of_blocks)[:, 0])
        scale = scales[-1].astype(np.float64)
        errors = np.zeros((rows, end - begin))
        for column in range(begin, end):
            code = np.clip(np.rint(current[:, column] / scale), -largest, largest)
            codes[:, column] = np.where(is_zero[:, column], 0, code)
            error = (current[:, column] - codes[:, column] * scale) / factor[column, column]
            current[:, column:end] -= np.outer(error, factor[column, column:end])
            errors[:, column - begin] = error
        current[:, end:] -= errors @ factor[begin:end, end:]
    dtype = {2: "int2", 4: "int4", 8: "int8"}[format.element.bits]
    return from_ml_dtypes(codes.astype(jnp.dtype(dtype)), np.stack(scales, 1), format, axis=1)
