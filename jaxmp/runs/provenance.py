"""Where a result comes from: versions, git revision, command and devices."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import jax

PACKAGES = "jaxmp jax jaxlib flax optax jmp orbax-checkpoint tensorflow-datasets grain numpy".split()


def provenance(*, patch: bool = True) -> dict[str, Any]:
    """What a run notes of its surroundings: `command`, `versions`, `git`, `devices`, all JSON.

    `git` is the revision of the repository that the process stands in, the patch by which its tracked files differ (""
    where they do not), and the names of files that are neither tracked nor ignored; None where there is no repository.

    Args:
      patch: False for a result that is itself kept in the repository: `dirty`, a bool, stands in the patch's place.
    """
    git = _git()
    if git is not None and not patch:
        git = {"revision": git["revision"], "dirty": bool(git["patch"] or git["untracked"])}
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": git,
        "devices": [device.device_kind for device in jax.devices()],
        "platform": jax.default_backend(),
    }


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
        }
    except (OSError, subprocess.SubprocessError):
        return None
