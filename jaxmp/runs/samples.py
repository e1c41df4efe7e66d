"""What was sampled from a run, kept in its folder: `samples/STEP-DIGEST.txt` or `.png`, and in TensorBoard.

`jaxmp sample` draws from a run that is there, `loop.log_samples` at each evaluation of one that trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np

from jaxmp.runs.folder import RunFolder
from jaxmp.runs.writers import TensorBoard
from jaxmp.tasks.samples import Samples, Sampling

RULE = "-" * 80
"""line between two texts of a file"""


def write_samples(
    folder: RunFolder,
    samples: Samples,
    sampling: Sampling,
    *,
    step: int,
    seed: int,
    board: TensorBoard | None = None,
) -> list[Path]:
    """Writes samples into a run's folder; those of the same step, seed and options replace what was there.

    Args:
      folder: the run's folder.
      samples: what was drawn.
      sampling: how it was drawn.
      step: the step of the weights.
      seed: the seed of the draws.
      board: takes them too; None: an event file of their own.

    Returns:
      The files.
    """
    how = {"step": step, "seed": seed, **dataclasses.asdict(sampling)}
    digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:8]
    folder.samples.mkdir(parents=True, exist_ok=True)
    path, written = folder.samples / f"{step}-{digest}", []
    with contextlib.ExitStack() as stack:
        if board is None:
            board = stack.enter_context(contextlib.closing(TensorBoard(folder.path)))
        if samples.texts:
            said = ", ".join(f"{name} {value!r}" for name, value in how.items() if value is not None)
            text = f"\n{RULE}\n".join([said, *samples.texts]) + "\n"
            written.append(_write(path.with_suffix(".txt"), text.encode("utf-8", "backslashreplace")))
            board.text("samples", "\n\n".join(f"```\n{text}\n```" for text in samples.texts), step)
        if samples.pictures is not None:
            picture = grid(samples.pictures)
            written.append(_write(path.with_suffix(".png"), png(picture)))
            board.images("samples", [picture], step)
    return written


def grid(pictures: np.ndarray) -> np.ndarray:
    """Pictures side by side, in rows that make about a square.

    Args:
      pictures: float32 (count, height, width, channels), from 0 to 1; NaN counts as 0.

    Returns:
      uint8 (height, width, channels), one black pixel between two pictures.
    """
    count, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    found = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), np.uint8)
    for index, picture in enumerate(np.clip(np.nan_to_num(pictures.astype(np.float32)), 0, 1)):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        found[top : top + height, left : left + width] = np.round(255 * picture)
    return found


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 (height, width, 1 or 3), as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(file, "PNG")
    return file.getvalue()


def _write(path: Path, content: bytes) -> Path:
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path
