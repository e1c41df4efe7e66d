"""`decode_wav`: a wav file as an array of samples."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np

from jaxmp.errors import InputError


def decode_wav(data: bytes, where: str, *, sample_rate: int) -> np.ndarray:
    """The samples of a wav file, int16 (samples,).

    Args:
      data: the bytes of the file.
      where: which file it is, for messages.
      sample_rate: samples a second that it has to have.

    Raises:
      InputError: it is damaged or truncated, has no samples, another sample rate, more than one channel, or samples of
        other than 16 bits.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            found = file.getframerate(), file.getnchannels(), 8 * file.getsampwidth()
            count, samples = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError, struct.error, RuntimeError) as error:
        raise InputError(
            f"{where} cannot be read as wav ({str(error) or 'it ends too early'}); copy it again"
        ) from error
    if found != (sample_rate, 1, 16):
        raise InputError(
            f"{where} has {found[0]} samples a second, {found[1]} channels and {found[2]} bits a sample; expected "
            f"{sample_rate}, 1 and 16"
        )
    if len(samples) != 2 * count or not count:
        raise InputError(f"{where} holds {len(samples) // 2} of the {count} samples that it announces; copy it again")
    return np.frombuffer(samples, "<i2").astype(np.int16)
