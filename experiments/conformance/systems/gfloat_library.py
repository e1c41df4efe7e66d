"""The quantiser of gfloat: blocks of MX formats, whose scale its `compute_scale_amax` gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from gfloat import RoundMode, formats, round_ndarray
from gfloat.block import compute_scale_amax
from subject import Subject

from jaxmp.testing import quantizer_laws


def rounded(x: Any, format: Any) -> np.ndarray:
    """Rounds blocks of 32 along a row; a block that is not finite is NaN, which gfloat leaves to its caller."""
    x = np.asarray(x)
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), (0, -x.shape[1] % 32)])
    blocks = padded.reshape(-1, 32)
    with np.errstate(all="ignore"):
        scales = [compute_scale_amax(format.etype.emax, b) if np.isfinite(b).all() else np.nan for b in blocks]
        scale = np.array(scales)[:, None]
        elements = round_ndarray(format.etype, np.nan_to_num(blocks / scale), RoundMode.TiesToEven, sat=True)
        return (elements * scale).reshape(padded.shape)[:, : x.shape[1]].astype(np.float32)


def subjects() -> list[Subject]:
    """Returns gfloat's MX formats."""
    found = []
    for name, format in (("mxfp8_e4m3", "mxfp8"), ("mxfp4_e2m1", "mxfp4"), ("mxfp6_e2m3", "mxfp6_e2m3")):
        info = getattr(formats, f"format_info_{name}")
        laws = quantizer_laws(lambda x, info=info: rounded(x, info), format)
        found.append(Subject(f"gfloat, {name}", ("gfloat",), laws))
    return found
