"""Loads a model that jaxmp exported, and predicts with it. This file ships in the exported folder and needs no jaxmp.

    python predict.py rows.npz predictions.npz

    from predict import load
    model = load("folder")            # checks every file before it reads any
    logits = model(image=images)      # NumPy arrays, any number of rows

A folder of StableHLO needs jax, numpy and flatbuffers; a folder of ONNX needs onnxruntime and numpy.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

VERSION = 1
"""version of the folder's layout"""

MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
"""file that describes the folder, with the sha256 of every other file; and file with the sha256 of that"""


class ArtefactError(ValueError):
    """The folder cannot be used, or the arrays do not fit the model. The message says what was expected."""


def load(folder: str | Path, *, accept_expired: bool = False) -> Artefact:
    """Reads an exported folder. Each file is compared with its sha256 before anything in it is deserialised.

    Args:
      folder: the folder that `jaxmp export` wrote.
      accept_expired: whether to load a folder after the date until which JAX promises to load it.

    Raises:
      ArtefactError: the folder is incomplete or damaged, of another version, expired, exported for other platforms or
        by a later JAX; or a package that it needs is missing.
    """
    folder = Path(folder)
    manifest, files = read_files(folder)
    expires = datetime.date.fromisoformat(manifest["expires"]) if manifest["expires"] else None
    if expires is not None and datetime.date.today() > expires and not accept_expired:
        raise ArtefactError(
            f"{folder} expired on {expires}, the date until which JAX promises to load it; export the run again, or "
            f"load(folder, accept_expired=True) to try it: jax {manifest['jax']['version']} exported it"
        )
    return assemble(manifest, files, str(folder))


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and the content of all other files by name, each compared with its sha256.

    Raises: ArtefactError if a file is missing or damaged, or the folder is of another version.
    """
    text, digest = _read(folder / MANIFEST), _read(folder / DIGEST)
    if digest != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode():
        raise ArtefactError(
            f"{folder}: {MANIFEST} and {DIGEST} do not agree: one of them has been changed or damaged; copy the folder "
            "again, or export the run again"
        )
    manifest = json.loads(text)
    if manifest.get("artefact") != VERSION:
        raise ArtefactError(
            f"{folder} has version {manifest.get('artefact')!r} of the layout; this program reads version {VERSION}. "
            "Use the predict.py of that folder, or export the run again"
        )
    files = {}
    for name, expected in manifest["sha256"].items():
        files[name] = _read(folder / name)
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise ArtefactError(
                f"{folder}: {name} is not the file that was exported: its sha256 differs from that in {MANIFEST}; copy "
                "the folder again, or export the run again"
            )
    return manifest, files


def assemble(manifest: dict[str, Any], files: Mapping[str, bytes], name: str) -> Artefact:
    """The model of a folder whose files are as they were exported. `name` stands for the folder in messages.

    Raises: ArtefactError if this process cannot run it.
    """
    certificate = json.loads(files.get("certificate.json", b"{}"))
    if manifest["format"] == "onnx":
        return Artefact(manifest, certificate, *_onnx(manifest, files, name))
    return Artefact(manifest, certificate, _stablehlo(manifest, files, name))


class Artefact:
    """An exported model, as a function of NumPy arrays.

    Attributes:
      manifest: content of manifest.json: inputs, outputs, policy by module, versions, class names.
      certificate: content of certificate.json: how far the outputs are from those in float32, on which rows.
      providers: execution providers of ONNX Runtime in the order in which they are tried; () for StableHLO.
    """

    def __init__(
        self, manifest: dict[str, Any], certificate: dict[str, Any], run: Any, providers: tuple[str, ...] = ()
    ):
        self.manifest, self.certificate, self._run, self.providers = manifest, certificate, run, providers

    def __repr__(self) -> str:
        of = ", ".join(f"{name}: {layout(spec)}" for name, spec in self.inputs.items())
        return f"Artefact({self.manifest['name']}, {self.manifest['format']}, {of})"

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """`shape` and `dtype` of each input, in their order; a dimension "b" is the number of rows."""
        return self.manifest["inputs"]

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of their logits, if they are known."""
        return self.manifest["classes"]

    def __call__(self, /, *arrays: Any, **named: Any) -> Any:
        """The model's outputs for rows, given in the order of `inputs` or by name.

        Returns:
          An array of shape (rows, ...); or dicts and lists of such arrays, as the model returns them.

        Raises:
          ArtefactError: an input is missing, or has another shape or dtype; or the model needs a state (`start`).
        """
        if self.manifest["state"]:
            raise ArtefactError("this model decodes with a cache; expected state = start(rows), then step(state, ...)")
        return self._build(self._run([], self._check(arrays, named)))

    def start(self, rows: int) -> list[np.ndarray]:
        """The state before the first token, an empty cache, for a number of rows; of a model that decodes."""
        return [
            np.zeros([rows if d == "b" else d for d in spec["shape"]], _dtype(spec["dtype"]))
            for spec in self.manifest["state"].values()
        ]

    def step(self, state: list[Any], /, *arrays: Any, **named: Any) -> tuple[Any, list[Any]]:
        """The outputs for the next tokens of each row, and the state after them; see `start`.

        Raises:
          ArtefactError: as a call does; or the state is none of this model, is for another number of rows, or there are
            more tokens a row than the model's context.
        """
        found = self._run(list(state), self._check(arrays, named, self._check_state(state)))
        count = len(found) - len(self.manifest["state"])
        return self._build(found[:count]), list(found[count:])

    def leaves(self, outputs: Any) -> dict[str, np.ndarray]:
        """The arrays of what a call returned, by name."""
        names = list(self.manifest["outputs"])
        found: list[np.ndarray] = []

        def visit(structure: Any, value: Any) -> None:
            if isinstance(structure, int):
                found.append(value)
            elif structure is not None:
                for key in structure if isinstance(structure, dict) else range(len(structure)):
                    visit(structure[key], value[key])

        visit(self.manifest["structure"], outputs)
        return dict(zip(names, found, strict=True))

    def _build(self, leaves: Any) -> Any:
        arrays = [np.asarray(leaf) for leaf in leaves]

        def build(structure: Any) -> Any:
            if isinstance(structure, dict):
                return {name: build(inside) for name, inside in structure.items()}
            if isinstance(structure, list):
                return [build(inside) for inside in structure]
            return None if structure is None else arrays[structure]

        return build(self.manifest["structure"])

    def _check_state(self, state: list[Any]) -> dict[str, int]:
        """The number of rows of a state, by the name of the dimension. Raises ArtefactError if it does not fit."""
        specs, sizes = self.manifest["state"], dict[str, int]()
        if len(state) != len(specs):
            raise ArtefactError(f"the state has {len(state)} arrays; expected the {len(specs)} of start(rows)")
        for (name, spec), array in zip(specs.items(), state, strict=True):
            shape, dtype = list(np.shape(array)), getattr(array, "dtype", type(array).__name__)
            if shape != _shape(spec, shape, sizes) or dtype != _dtype(spec["dtype"]):
                raise ArtefactError(
                    f"state {name} is {dtype}{shape}; expected {layout(spec)}, of as many rows in each array, as "
                    "start(rows) makes it"
                )
        return sizes

    def _check(
        self, arrays: tuple[Any, ...], named: dict[str, Any], of_state: Mapping[str, int] | None = None
    ) -> list[np.ndarray]:
        """The inputs in their order, in the model's dtypes. Raises ArtefactError if they do not fit.

        Args:
          arrays: inputs in their order.
          named: inputs by name.
          of_state: sizes of dimensions that the state has, by name.
        """
        given = {**dict(zip(self.inputs, arrays, strict=False)), **named}
        expected = ", ".join(f"{name}: {layout(spec)}" for name, spec in self.inputs.items())
        if len(arrays) > len(self.inputs) or set(given) != set(self.inputs) or len(given) != len(arrays) + len(named):
            names = ", ".join([*named, *(["..."] if arrays else [])]) or "nothing"
            raise ArtefactError(f"{len(arrays) + len(named)} inputs were given ({names}); expected {expected}")
        sizes = dict(of_state or {})
        found = []
        for name, spec in self.inputs.items():
            array = np.asarray(given[name])
            shape = list(array.shape)
            if shape != _shape(spec, shape, sizes) or 0 in shape:
                rows = f", and {of_state['b']} rows, as the state has" if of_state and "b" in of_state else ""
                raise ArtefactError(
                    f"input {name} is {array.dtype}{shape}; expected {layout(spec)}{rows}"
                    + ("" if len(self.inputs) == 1 else ", and as many rows in each input")
                    + (", at least one row" if 0 in shape else "")
                )
            found.append(_in_dtype(name, array, _dtype(spec["dtype"]), layout(spec)))
        most = self.manifest.get("context")
        if most is not None and sizes["t"] > most:
            raise ArtefactError(f"{sizes['t']} tokens a row were given; expected at most {most}, the model's context")
        return found


def _shape(spec: Mapping[str, Any], shape: list[int], sizes: dict[str, int]) -> list[int] | None:
    """The shape that an array of `shape` should have, None for another number of axes; adds to the known `sizes`."""
    if len(shape) != len(spec["shape"]):
        return None
    return [sizes.setdefault(d, n) if isinstance(d, str) else d for d, n in zip(spec["shape"], shape, strict=True)]


def _in_dtype(name: str, array: np.ndarray, dtype: np.dtype, layout: str) -> np.ndarray:
    """The array in the model's dtype: as it is, or of the same kind with values that fit."""
    if array.dtype == dtype:
        return array
    alike = array.dtype.kind == dtype.kind != "V" or {array.dtype.kind, dtype.kind} == {"i", "u"}
    cast = array.astype(dtype) if alike else None
    if cast is None or not (dtype.kind == "f" or np.array_equal(cast, array)):
        why = "" if cast is None else f", and some of its values do not fit in {dtype}"
        raise ArtefactError(f"input {name} is {array.dtype}{list(array.shape)}{why}; expected {layout}")
    return cast


def layout(spec: Mapping[str, Any]) -> str:
    """Dtype and shape of an array as text: `uint8[b, 28, 28, 1]`."""
    return f"{spec['dtype']}[{', '.join(map(str, spec['shape']))}]"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path}: {error.strerror}; expected a folder that `jaxmp export` wrote, with all of its files"
        ) from None


def _dtype(name: str) -> np.dtype:
    """A dtype by name; those of less than 16 bits, and bfloat16, are ml_dtypes', which comes with jax."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    names = {
        **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
        **{
            f"{kind}{bits}": f"{long}{bits}" for kind, long in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
        },
        **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    }
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            dtype, shape, begin = _dtype(names[entry["dtype"]]), entry["shape"], entry["data_offsets"][0]
            tensors[name] = np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(shape)
    return tensors


def platform() -> str:
    """The platform that JAX runs on here: cpu, cuda, rocm or tpu."""
    import jax
    from jax.extend import backend

    if jax.default_backend() != "gpu":
        return jax.default_backend()
    return "cuda" if "cuda" in backend.get_backend().platform_version else "rocm"


def _stablehlo(manifest: dict[str, Any], files: Mapping[str, bytes], folder: str) -> Any:
    """`(state, inputs) -> outputs` by the program for this process's platform."""
    try:
        import flatbuffers  # noqa: F401  jax.export needs it
        import jax
        from jax import export
    except ImportError as error:
        raise ArtefactError(f"{folder} needs {error.name}: pip install jax numpy flatbuffers") from None
    of, here = manifest["jax"]["version"], jax.__version__
    if _numbers(here) < _numbers(of):
        raise ArtefactError(
            f"{folder} was exported by jax {of}, and jax {here}, which is installed, is older and does not load it: "
            f"pip install 'jax>={of}'"
        )
    on = platform()
    if on not in manifest["programs"]:
        there = ", ".join(manifest["programs"])
        raise ArtefactError(
            f"{folder} has a program for {there}, and JAX runs on {on} here: export the run with --platforms "
            f"{' '.join(manifest['programs'])} {on}, or set JAX_PLATFORMS={next(iter(manifest['programs']))}"
        )
    program = export.deserialize(bytearray(files[manifest["programs"][on]]))
    tensors = read_tensors(files["weights.safetensors"])
    weights = jax.device_put([tensors[name] for name in manifest["weights"]])
    call = jax.jit(program.call)
    return lambda state, inputs: call(weights, state, inputs)


def _onnx(manifest: dict[str, Any], files: Mapping[str, bytes], folder: str) -> tuple[Any, tuple[str, ...]]:
    """`(state, inputs) -> outputs` by ONNX Runtime, and its execution providers."""
    try:
        import onnxruntime
    except ImportError:
        raise ArtefactError(f"{folder} needs onnxruntime: pip install onnxruntime numpy") from None
    try:
        session = onnxruntime.InferenceSession(files["model.onnx"], providers=onnxruntime.get_available_providers())
    except Exception as error:  # ONNX Runtime's own classes; its message names the operation, and with it the module
        first = str(error).strip().partition("\n")[0]
        raise ArtefactError(
            f"{folder}: onnxruntime {onnxruntime.__version__} does not load model.onnx ({first}); export the run with "
            "--format stablehlo"
        ) from None
    names = [*manifest["state"], *manifest["inputs"]]

    def run(state: Any, inputs: Any) -> Any:
        return session.run(None, dict(zip(names, [*state, *inputs], strict=True)))

    return run, tuple(session.get_providers())


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]


def main() -> int:
    """Predicts the rows of a .npz file. Returns the exit code: 0, or 2 after a message."""
    parser = argparse.ArgumentParser(description="Predicts with the exported model in the folder of this file.")
    parser.add_argument("rows", help=".npz file with an array for each input of the model")
    parser.add_argument("predictions", help=".npz file to write: an array for each output")
    parser.add_argument("--batch", type=int, default=512, help="number of rows that are computed at a time")
    options = parser.parse_args()
    try:
        if options.batch < 1:
            raise ArtefactError(f"--batch {options.batch}: expected 1 or more")
        model = load(Path(__file__).resolve().parent)
        rows = {name: column for name, column in _read_columns(options.rows).items() if name in model.inputs}
        parts = []
        # Once at least: the model says what is wrong with no rows, or with a number instead of rows.
        for start in range(0, max([1, *(len(column) for column in rows.values() if column.ndim)]), options.batch):
            stop = start + options.batch
            part = {name: column[start:stop] if column.ndim else column for name, column in rows.items()}
            parts.append(model.leaves(model(**part)))
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        first = next(iter(found.values()))
        if "class" not in found and model.classes and first.ndim == 2 and first.shape[1] == len(model.classes):
            found["class"] = np.array(model.classes)[first.argmax(axis=1)]
        path = options.predictions if options.predictions.endswith(".npz") else f"{options.predictions}.npz"
        with open(path, "wb") as file:
            write_columns(file, found)
    except (ArtefactError, OSError, ValueError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(first)} rows, {', '.join(found)}: {path}")
    return 0


def _read_columns(path: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. Raises ArtefactError, with the path, if it is none, or damaged."""
    with open(path, "rb") as file:
        try:
            return read_columns(file)
        except ArtefactError as error:
            raise ArtefactError(f"{path}: {error}") from None


def read_columns(file: IO[bytes], *, most: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. What it says of their sizes is checked before anything of a size is read.

    Args:
      file: the file, open to be read.
      most: the most bytes that it may have unpacked; None for any number.

    Raises: ArtefactError if it is no .npz file, damaged, encrypted, or larger than `most`, or has Python objects.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if most is not None and (size := sum(member.file_size for member in members)) > most:
                raise ValueError(f"this one has {size:,} bytes unpacked; at most {most:,} are read")
            return {member.filename.removesuffix(".npy"): _read_column(archive, member) for member in members}
    # All that zipfile, zlib and numpy.lib.format raise of bytes that are no .npz file: RuntimeError, of encrypted ones.
    except (
        *(ValueError, TypeError, EOFError, LookupError, RuntimeError, ArithmeticError, SyntaxError),
        *(OSError, MemoryError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
    ) as error:
        raise ArtefactError(f"expected a .npz file with an array for each input ({error})") from None


def _read_column(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of a .npz file. Raises ValueError, or what its parts raise, if it is damaged."""
    if member.flag_bits & 1:
        raise ValueError(f"{member.filename} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed otherwise than by deflate")
    with archive.open(member) as data:
        version = np.lib.format.read_magic(data)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename} has version {version} of the .npy format")
        shape, fortran_order, dtype = _HEADERS[version](data)
        there = member.file_size - data.tell()
        if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != there:
            raise ValueError(f"{member.filename} has {there:,} bytes; its header says {dtype}{list(shape)}")
        array = np.ndarray(math.prod(shape), dtype, bytearray(data.read()))
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)


_HEADERS: dict[Any, Any] = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""what reads the header of a .npy file, by the version of the format"""


def write_columns(file: IO[bytes], columns: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a .npz file, under any names. (np.savez has no array called `file`.)

    Args:
      file: the file, open to be written.
      columns: the arrays by name; floats of ml_dtypes are written as float32, since NumPy alone reads back no others.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in columns.items():
            plain = array.astype(np.float32) if array.dtype.kind == "V" else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as data:
                np.lib.format.write_array(data, np.asanyarray(plain), allow_pickle=False)


if __name__ == "__main__":
    sys.exit(main())
