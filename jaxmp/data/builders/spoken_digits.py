"""Spoken digits as a TFDS dataset: the Free Spoken Digit Dataset, 3,000 recordings of the digits by six speakers."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxmp.data.builders.versions import VERSIONS
from jaxmp.data.wav import decode_wav
from jaxmp.errors import InputError

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
SAMPLE_RATE = 8000
ARCHIVE = "fsdd_recordings.tar.gz"


class SpokenDigits(tfds.core.GeneratorBasedBuilder):
    """audio, the bytes of a wav file (8 kHz, 16 bit, mono); label 0 to 9; speaker 0 to 5; recording 0 to 49.

    Each speaker has recorded each digit 50 times. Test is the official split, recordings 0 to 4; the official training
    split, 5 to 49, is divided: 5 to 9 are validation, 10 to 49 train. So train has 2,400 rows, the others 300 each.

    Args:
      manual: folder of the recordings, as `ARCHIVE` or as a folder `recordings`.
    """

    VERSION = tfds.core.Version(VERSIONS["spoken_digits"])
    name = "spoken_digits"
    code_path = None  # where TFDS would look for download checksums

    def __init__(self, *, manual: Path, **options: Any):
        self._manual = manual
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Free Spoken Digit Dataset: recordings of the digits in English by six speakers, 50 of each "
            "digit by each. Test: recordings 0 to 4 (official); validation: 5 to 9; train: 10 to 49.",
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Text(doc="the bytes of a wav file: 8 kHz, 16 bit, mono"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "speaker": tfds.features.ClassLabel(names=SPEAKERS),
                    "recording": tfds.features.Scalar(np.int64),
                }
            ),
            supervised_keys=("audio", "label"),
            homepage="https://github.com/Jakobovski/free-spoken-digit-dataset",
            citation="@misc{jackson2018fsdd,\n  title={Free Spoken Digit Dataset},\n  author={Jackson, Z.},\n"
            "  year={2018},\n  doi={10.5281/zenodo.1342401}\n}",
            license="CC BY-SA 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        files = dict(read_recordings(self._manual))
        return {split: self._generate_examples(files, split) for split in ("train", "validation", "test")}

    def _generate_examples(self, files: dict[tuple[int, str, int], bytes], split: str) -> Iterator:
        for (digit, speaker, recording), data in files.items():
            if split_of(recording) == split:
                yield (
                    f"{digit}_{speaker}_{recording}",
                    {"audio": data, "label": digit, "speaker": speaker, "recording": recording},
                )


def split_of(recording: int) -> str:
    """The split of a recording, by its number from 0 to 49; see `SpokenDigits`."""
    return "test" if recording < 5 else "validation" if recording < 10 else "train"


def read_recordings(manual: Path) -> Iterator[tuple[tuple[int, str, int], bytes]]:
    """Yields `(digit, speaker, recording)` and the bytes of each wav file in the manual folder.

    Raises:
      InputError: there are no recordings, the archive cannot be read, or a file is no wav or not called
        `{digit}_{speaker}_{recording}.wav`. The message names the file.
    """
    count = 0
    for where, name, data in _wav_files(manual):
        count += 1
        named = re.fullmatch(rf"(\d)_({'|'.join(SPEAKERS)})_([1-4]?\d)\.wav", name)
        if not named:
            raise InputError(
                f"{where}: expected the name {{digit}}_{{speaker}}_{{0 to 49}}.wav, speakers {', '.join(SPEAKERS)}"
            )
        decode_wav(data, where, sample_rate=SAMPLE_RATE)
        yield (int(named[1]), named[2], int(named[3])), data
    if not count:
        raise InputError(f"{manual} has no recordings; expected {ARCHIVE}, or a folder recordings with wav files")


def _wav_files(manual: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yields, of each wav file, where it is, its name and its bytes."""
    archive = manual / ARCHIVE
    if not archive.exists():
        for file in sorted((manual / "recordings").glob("*.wav")):
            yield str(file), file.name, file.read_bytes()
        return
    try:
        with tarfile.open(archive) as files:
            for member in files:
                opened = files.extractfile(member) if member.name.endswith(".wav") else None
                if opened is not None:
                    yield f"{archive}, {member.name}", Path(member.name).name, opened.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{archive} cannot be read ({error}); copy it again") from error
