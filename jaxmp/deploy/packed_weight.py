"""`PackedWeight`: a weight of a model in a block format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.precision.blocks import PackedBlocks


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight in a block format, as a matrix whose blocks lie along the axes that its products sum over."""

    blocks: PackedBlocks
    """(rows, inputs): a row for each output, or for each entry of an embedding"""
    order: tuple[int, ...]
    """axes of the weight in the order of the matrix, rows first"""
    like: jax.ShapeDtypeStruct
    """shape and dtype of the weight"""
    after: jax.Array | None = None
    """what the columns of the matrix are multiplied by, float32 (inputs,); None: by 1"""

    @property
    def nbytes(self) -> int:
        """The bytes of all its arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, jax.Array]:
        """Its arrays by name: `elements`, `scales`, and `tensor_scale` and `after` where there are such."""
        found = {"elements": self.blocks.elements, "scales": self.blocks.scales}
        found |= {} if self.blocks.tensor_scale is None else {"tensor_scale": self.blocks.tensor_scale}
        return found | ({} if self.after is None else {"after": self.after})

    def with_arrays(self, arrays: Mapping[str, Any]) -> PackedWeight:
        """This weight with other arrays, as `arrays` names them."""
        blocks = {name: array for name, array in arrays.items() if name != "after"}
        return dataclasses.replace(self, blocks=dataclasses.replace(self.blocks, **blocks), after=arrays.get("after"))

    def unpack(self) -> jax.Array:
        """The weight, in its own shape and dtype."""
        matrix = self.blocks.unpack()
        matrix = matrix if self.after is None else matrix * self.after
        split = matrix.reshape([self.like.shape[axis] for axis in self.order])
        return jnp.transpose(split, np.argsort(self.order).tolist()).astype(self.like.dtype)
