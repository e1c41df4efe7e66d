"""`jaxmp doctor`: what this machine has and computes natively, and the command that gets what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import jaxmp
from jaxmp.data.cache import cache_folder
from jaxmp.data.catalog import data_folder, list_datasets

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy")

EXTRAS = {
    "testing": ("hypothesis", "the laws of jaxmp.testing"),
    "plots": ("matplotlib", "pictures of runs"),
    "text": ("tokenizers", "text datasets"),
    "tune": ("optuna", "search over configs"),
    "wandb": ("wandb", "metrics to Weights & Biases"),
    "prepare": ("tensorflow", "preparing datasets by TFDS's builders, not reading them"),
}

# What matrix units multiply without converting first, by the least compute capability; NVIDIA, CUDA C++ Programming
# Guide, table "Tensor Core data types".
TENSOR_CORES = {"float16": 7.0, "tensorfloat32": 8.0, "bfloat16": 8.0, "float8": 8.9, "float4": 10.0}

# Instructions of a CPU for products of a dtype, x86's and Arm's.
CPU_FLAGS = {"float16": {"avx512_fp16", "amx_fp16", "fphp"}, "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}}


def report() -> str:
    """All findings as text, a section each; the last says what is missing, if anything is."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "dtypes": _dtypes(jax.local_devices()[0]),
        "data": _data(),
        "missing": _missing(),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def native_dtypes(device: Any) -> dict[str, bool]:
    """Which dtypes the matrix units of `device` multiply as they are; the others are converted first.

    Empty for a device that jaxmp knows nothing of.
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


def _versions() -> Iterator[str]:
    yield f"jaxmp {jaxmp.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)


def _devices() -> Iterator[str]:
    for kind, count in Counter(device.device_kind for device in jax.local_devices()).items():
        yield f"{count} x {kind}"
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        yield f"{stats['bytes_limit'] / 2**30:.1f} GiB each for JAX"
    yield f"host: {os.cpu_count()} cores, {_host_memory() / 2**30:.1f} GiB"


def _dtypes(device: Any) -> Iterator[str]:
    native = native_dtypes(device)
    for name, is_native in native.items():
        yield f"{name:<14} {'native' if is_native else 'emulated: right results, but no speed'}"
    if not native:
        yield f"unknown for {device.device_kind}"
    if device.platform == "cpu":
        yield "XLA computes many half products on CPUs in float32: judge speed and memory of half precision on a GPU"


def _data() -> Iterator[str]:
    folder = data_folder()
    yield f"data folder {folder}{'' if folder.is_dir() else ' (not there)'}, from $JAXMP_DATA, else $TFDS_DATA_DIR"
    yield f"cache {cache_folder()}"
    yield f"datasets: {', '.join(sorted({dataset.name for dataset in list_datasets()}))}"


def _missing() -> list[str]:
    lines = []
    if jax.local_devices()[0].platform == "cpu" and Path("/proc/driver/nvidia/version").exists():
        lines.append("JAX does not see the NVIDIA GPU of this machine: " + _install("cuda12") + " (or cuda13)")
    for extra, (module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            lines.append(f"{module} ({purpose}): {_install(extra)}")
    prepared = {dataset.name for dataset in list_datasets()}
    for name in ("mnist", "cifar10"):
        if name not in prepared:
            lines.append(f"dataset {name}: jaxmp data prepare {name}, or set JAXMP_DATA to a folder that has it")
    return lines or ["nothing"]


def _install(extra: str) -> str:
    return f"uv sync --extra {extra}, or pip install 'jaxmp[{extra}]'"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
