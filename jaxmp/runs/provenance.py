"""`provenance`: how a result was made: command, versions, git revision, devices and host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmp.text_table import without_password

PACKAGES = "jaxmp jax jaxlib flax optax jmp orbax-checkpoint tensorflow-datasets grain numpy".split()

NO_RESULT = ":(top,attr:!jaxmp-result)"
"""what git calls the files that are no results"""


def provenance(*, patch: bool = True) -> dict[str, Any]:
    """Collects how the current process was started, as JSON: `command`, `versions`, `git`, `devices`,
    `platform`, `host`.

    Passwords in the URLs of `command` are left out.

    `git` describes the repository of the working directory: its `revision`, a `patch` with the changes to tracked files
    ("" if there are none), the `untracked` files that are not ignored, and whether it is `dirty`: whether any of those
    files is other than a result. Results are what .gitattributes marks `jaxmp-result`: of several commands that write
    some, one after the other, none has changed what the next one measures. It is None outside a repository.

    Args:
      patch: False leaves `patch` and `untracked` out, for results that are stored in the repository.
    """
    git = _git()
    if not patch:
        git = without_patch(git)
    return {
        "command": [without_password(word) for word in sys.argv],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": git,
        "devices": [device.device_kind for device in jax.devices()],
        "platform": jax.default_backend(),
        "host": {"processor": processor(), "cores": cores()},
    }


def processor() -> str:
    """The name of this machine's CPU; its architecture where the system does not say."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # no Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(origin: Mapping[str, Any]) -> str:
    """The devices and the host of a provenance, in words; an earlier version recorded no host.

    >>> hardware({"devices": ["cpu"], "platform": "cpu", "host": {"processor": "AMD EPYC", "cores": 2}})
    '1 x cpu (AMD EPYC, 2 cores)'
    >>> hardware({"devices": ["NVIDIA H200"] * 8, "platform": "gpu"})
    '8 x NVIDIA H200 (gpu)'
    """
    devices, host = list(origin.get("devices", ())), origin.get("host")
    of = (
        []
        if "platform" in origin and {*devices} == {origin["platform"]}
        else [origin.get("platform", "unknown platform")]
    )
    if host:
        of.append(f"{host['processor']}, {host['cores']} {'core' if host['cores'] == 1 else 'cores'}")
    counted = ", ".join(f"{devices.count(device)} x {device}" for device in dict.fromkeys(devices))
    return f"{counted} ({'; '.join(of)})" if of else counted


def without_patch(git: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the `revision` and `dirty` of `git` of a provenance; None for None.

    Of one that an earlier version recorded, any change is dirty.
    """
    if git is None:
        return None
    return {"revision": git["revision"], "dirty": git.get("dirty", bool(git["patch"] or git["untracked"]))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    def git(*args: str) -> str:
        done = subprocess.run(("git", *args), capture_output=True, text=True, errors="replace", timeout=10, check=True)
        return done.stdout

    try:
        return {
            "revision": git("rev-parse", "HEAD").strip(),
            "patch": git("diff", "HEAD"),
            "untracked": git("ls-files", "--others", "--exclude-standard", ":/").splitlines(),
            "dirty": bool(
                git("--no-optional-locks", "status", "--porcelain", "--untracked-files=all", "--", NO_RESULT)
            ),
        }
    except (OSError, subprocess.SubprocessError):
        return None
