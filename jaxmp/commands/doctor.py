"""`jaxmp doctor`: what this machine has, which dtypes it computes natively, and how to install what is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmp.commands.command import Command
from jaxmp.errors import DONE, InputError, install

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy")

EXTRAS = {
    "testing": ("hypothesis", "the laws of jaxmp.testing"),
    "text": ("tokenizers", "vocabularies of WordPiece and BPE"),
    "export": ("flatbuffers", "exported models, which JAX runs"),
    "onnx": ("onnx", "exported models as ONNX"),
    "tune": ("optuna", "searches over many runs"),
    "wandb": ("wandb", "metrics to Weights & Biases"),
    "private": ("dp_accounting", "epsilon of private training"),
    "prepare": ("tensorflow", "to prepare datasets by their TFDS builders; prepared ones need none"),
}
"""The module that each optional dependency of pyproject.toml installs, and what it is for."""

# The least compute capability whose tensor cores multiply a dtype; NVIDIA, CUDA C++ Programming Guide, table "Tensor
# Core data types".
TENSOR_CORES = {"float16": 7.0, "tensorfloat32": 8.0, "bfloat16": 8.0, "float8": 8.9, "float4": 10.0}

# The flags in /proc/cpuinfo of instructions that multiply a dtype, on x86 and Arm.
CPU_FLAGS = {"float16": {"avx512_fp16", "amx_fp16", "fphp"}, "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}}


@dataclass(frozen=True)
class Options:
    """`jaxmp doctor` has no options."""


def doctor(options: Options) -> int:
    """Shows versions, devices, native dtypes and data folders, and how to get what is missing."""
    print(report())
    return DONE


def report() -> str:
    """Describes this machine in sections: versions, devices, dtypes, data, and what is missing."""
    sections = {"versions": _versions, "devices": _devices, "dtypes": _dtypes, "data": _data, "missing": _missing}
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in _told(of))]) for title, of in sections.items())


def _told(section: Callable[[], Iterable[str]]) -> Iterator[str]:
    """The lines of a section; the error instead of those that a broken machine has no answer to."""
    try:
        yield from section()
    except Exception as error:  # what is broken is what the user wants to know
        what = missing_platform(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield f"cannot be told: {what}"


def missing_platform(error: BaseException) -> str | None:
    """What is wrong if JAX raised `error` because it cannot use the platform it was told to; None if it is another."""
    frames = traceback.extract_tb(error.__traceback__)
    # Where a plugin is not installed, JAX 0.10 fails an assertion instead of saying so.
    in_jax = isinstance(error, AssertionError) and frames and frames[-1].filename.endswith("xla_bridge.py")
    if not in_jax and not (isinstance(error, RuntimeError) and "initialize backend" in str(error)):
        return None
    reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0][:200]
    return (
        f"JAX cannot use JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}{reason and f': {reason}'}; expected a "
        "platform of this machine, JAX_PLATFORMS=cpu say, or none"
    )


def native_dtypes(device: Any) -> dict[str, bool]:
    """Tells for each dtype whether the matrix units of the JAX device `device` multiply it without converting it first.

    Empty for a kind of device that jaxmp does not know.
    """
    if device.platform == "cpu":
        flags = _cpu_flags()
        return {"float64": True, "float32": True} | {name: bool(has & flags) for name, has in CPU_FLAGS.items()}
    if device.platform == "gpu":
        try:
            capability = float(device.compute_capability)
        except (AttributeError, ValueError):  # AMD names an architecture, not a number
            return {}
        return {"float64": True, "float32": True} | {name: capability >= least for name, least in TENSOR_CORES.items()}
    if device.platform == "tpu":
        return {"float32": False, "bfloat16": True, "float16": False}
    return {}


def native_formats(device: Any) -> Iterator[str]:
    """Says of each block format whether the JAX device `device` multiplies arrays in it in one call."""
    from jaxmp.precision.native import FORMATS, is_native, native_call

    for name in FORMATS:
        call = native_call(name)
        assert call is not None
        if is_native(name, device):
            yield f"{name:<14} products native, by {call.call}"
        else:
            yield f"{name:<14} emulated; native from compute capability {call.capability} on, by {call.call}"


def _versions() -> Iterator[str]:
    import importlib.metadata
    import platform

    yield f"jaxmp {importlib.metadata.version('jaxmp')}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)


def _devices() -> Iterator[str]:
    import jax

    for kind, count in Counter(device.device_kind for device in jax.local_devices()).items():
        yield f"{count} x {kind}"
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        yield f"{stats['bytes_limit'] / 2**30:.1f} GiB each for JAX"
    yield f"host: {os.cpu_count()} cores, {_host_memory() / 2**30:.1f} GiB"


def _dtypes() -> Iterator[str]:
    import jax

    device = jax.local_devices()[0]
    native = native_dtypes(device)
    for name, is_native in native.items():
        yield f"{name:<14} {'native' if is_native else 'emulated: correct results, but not faster'}"
    if not native:
        yield f"unknown for {device.device_kind}"
    yield from native_formats(device)
    if device.platform == "cpu":
        yield "XLA computes many half products on CPUs in float32: measure speed and memory of half precision on a GPU"


def _data() -> Iterator[str]:
    from jaxmp.data.cache import cache_folder
    from jaxmp.data.catalog import damaged_datasets, data_folder, list_datasets

    folder = data_folder()
    yield f"data folder {folder}{'' if folder.is_dir() else ' (not there)'}, from $JAXMP_DATA, else $TFDS_DATA_DIR"
    yield f"cache {cache_folder()}"
    yield f"datasets: {', '.join(sorted({dataset.name for dataset in list_datasets()}))}"
    for name, why in damaged_datasets().items():
        yield f"damaged: {name}: {why}"


def _missing() -> list[str]:
    lines = []
    if Path("/proc/driver/nvidia/version").exists() and not _sees_gpu():
        lines.append("JAX does not see the NVIDIA GPU of this machine: " + install("cuda12") + " (or cuda13)")
    for extra, (module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            lines.append(f"{module} ({purpose}): {install(extra)}")
    prepared = _prepared()
    for name in ("mnist", "cifar10"):
        if name not in prepared:
            lines.append(f"dataset {name}: jaxmp data prepare {name}, or set JAXMP_DATA to a folder that has it")
    return lines or ["nothing"]


def _sees_gpu() -> bool:
    import jax

    try:
        return jax.local_devices()[0].platform != "cpu"
    except RuntimeError:
        return False


def _prepared() -> set[str]:
    from jaxmp.data.catalog import list_datasets

    try:
        return {dataset.name for dataset in list_datasets()}
    except InputError:  # no home folder; the section on data says so
        return set()


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


COMMAND = Command("doctor", Options, doctor)
