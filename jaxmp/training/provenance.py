"""Where a result comes from: versions, git revision, command and devices."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import jax

PACKAGES = "jaxmp jax jaxlib flax optax jmp orbax-checkpoint tensorflow-datasets grain numpy".split()


def provenance() -> dict[str, Any]:
    """What a run notes of its surroundings: `command`, `versions`, `git`, `devices`, all JSON.

    `git` is the revision of the repository that the process stands in, and, where its tree is dirty, the patch; None
    where there is no repository.
    """
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _git(),
        "devices": [device.device_kind for device in jax.local_devices()],
        "platform": jax.default_backend(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, str] | None:
    def git(*args: str) -> str:
        done = subprocess.run(("git", *args), capture_output=True, text=True, errors="replace", timeout=10, check=True)
        return done.stdout

    try:
        return {"revision": git("rev-parse", "HEAD").strip(), "patch": git("diff", "HEAD")}
    except (OSError, subprocess.SubprocessError):
        return None
