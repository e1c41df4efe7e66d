"""`provenance`: how a result was made: command, versions, git revision and devices."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from jaxmp.text_table import without_password

PACKAGES = "jaxmp jax jaxlib flax optax jmp orbax-checkpoint tensorflow-datasets grain numpy".split()

NO_RESULT = ":(top,attr:!jaxmp-result)"
"""what git calls the files that are no results"""


def provenance(*, patch: bool = True) -> dict[str, Any]:
    """Collects how the current process was started, as JSON: `command`, `versions`, `git`, `devices`, `platform`.

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
    }


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
