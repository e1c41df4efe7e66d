"""ONNX files of exported models."""

from __future__ import annotations

from jaxmp.deploy.forward import Forward
from jaxmp.errors import InputError


def require_packages() -> None:
    """Raises InputError if a package that ONNX files need is missing."""
    raise InputError("format onnx: not there yet; expected stablehlo")


def files(of: Forward) -> dict[str, bytes]:
    """The files of a model as ONNX, by name."""
    raise NotImplementedError
