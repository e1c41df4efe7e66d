"""`Target`: GPUs to compile for that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp.errors import InputError, install, nearest

GPUS = {"h100": Path(__file__).with_name("h100.txtpb")}
"""XLA's description of each GPU, by name"""

COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
"""Without a GPU no kernel can be timed, so XLA takes its default kernels; dtypes, memory and collectives stay."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One or more GPUs of one kind to compile programs for. That needs the CUDA build of JAX, but no GPU.

    >>> Target.parse("h100x8")
    Target(gpu='h100', count=8)
    """

    gpu: str
    """name of the GPU, one of `GPUS`"""
    count: int = 1
    """how many of them are in one machine"""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads a target from text: `h100`, or `h100x8` for eight of them.

        Raises:
          InputError: the GPU is not one of `GPUS`, or the number is 0.
        """
        gpu, count = re.fullmatch(r"(.*?)(?:x(\d+))?", text, re.DOTALL).groups()  # type: ignore[union-attr]
        if gpu not in GPUS or count == "0":
            raise InputError(
                f"target {text!r}: expected {' or '.join(GPUS)}, with the number of GPUs behind it where there are "
                f"several, such as h100x8{nearest(gpu, GPUS)}"
            )
        return cls(gpu, int(count or 1))

    def __str__(self) -> str:
        return self.gpu if self.count == 1 else f"{self.gpu}x{self.count}"

    @functools.cached_property
    def devices(self) -> tuple[Any, ...]:
        """The devices to compile for. No array can be put on them.

        Raises:
          InputError: the installed JAX cannot compile for GPUs.
        """
        try:
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=GPUS[self.gpu].read_text(), topology=f"1x1x{self.count}"
            )
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(f"target {self}: {_remedy()} ({str(error).partition(chr(10))[0]})") from error
        return tuple(topology.devices)

    def mesh(self, axis: str = "data") -> Mesh:
        """Returns the devices as a mesh with one axis, for arguments that are sharded over them."""
        return Mesh(np.array(self.devices), (axis,), axis_types=(AxisType.Auto,))

    def place(self, tree: Any) -> Any:
        """Turns arrays into `jax.ShapeDtypeStruct`s that each of these GPUs holds whole.

        Args:
          tree: the arguments of a function. A leaf that has a sharding over these GPUs keeps it. Leaves without shape
            and dtype stay as they are.
        """
        whole = NamedSharding(self.mesh(), P())

        def placed(x: Any) -> Any:
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                return x
            sharding = getattr(x, "sharding", None)
            here = sharding is not None and sharding.device_set <= set(self.devices)
            weak = getattr(x, "weak_type", False)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if here else whole, weak_type=weak)

        return jax.tree.map(placed, tree)


def _remedy() -> str:
    if any(importlib.util.find_spec(f"jax_{extra}_plugin") for extra in ("cuda12", "cuda13")):
        return "JAX could not load its CUDA build; without a GPU that takes JAX_PLATFORMS=cpu in the environment"
    return (
        "compiling for a GPU takes the CUDA build of JAX (4.5 GB), but no GPU; expected it installed, by "
        f"{install('cuda12')} (or cuda13)"
    )
