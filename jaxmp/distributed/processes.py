"""Several processes in one run: how they find each other, and how all of them come to know what one knows.

`join` makes them one JAX program: `jax.devices()` are then those of all processes. One of them, the first, writes and
speaks; what is decided from the disk is decided there (`from_first`). A process that fails alone ends alone: JAX ends
the others, after HEARTBEAT_SECONDS at the latest. So nothing here waits for a process that may be gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmp.errors import InputError

HEARTBEAT_SECONDS = 60
"""how long a process may be silent before it is taken for dead: more than a virtual machine stands still to be moved"""


def join(coordinator: str | None, count: int | None, index: int | None, timeout: int) -> None:
    """Makes this process one of several, before anything else is asked of JAX.

    What is None is asked of Slurm, Open MPI or Kubernetes, as JAX finds them. JAX aborts the process where not all have
    come within `timeout` seconds.

    Raises:
      InputError: what is given is not valid; or nothing is given, and nothing found.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator {coordinator}: expected HOST:PORT, of process 0 and a free port there")
    if count is not None and count < 1:
        raise InputError(f"--process-count {count}: expected at least 1")
    if index is not None and not 0 <= index < (index + 1 if count is None else count):
        raise InputError(f"--process-index {index}: expected 0 to {'...' if count is None else count - 1}")
    # Its handler of SIGTERM would swallow the signal until ours is there.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            # Nothing to be found where all is given: a pod would want permissions of Kubernetes for that.
            cluster_detection_method="deactivate" if None not in (coordinator, count, index) else None,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:  # one of the three is not known
        raise InputError(
            f"--distributed: {str(error).rstrip('.')}; JAX finds it for `srun` (Slurm), `mpirun` (Open MPI) and an "
            "indexed Job (Kubernetes, with the package kubernetes); elsewhere give --coordinator HOST:PORT "
            "--process-count N --process-index I"
        ) from error
    except RuntimeError as error:
        taken = "; is its port taken by another program?" if "start RPC server" in str(error) else ""
        raise InputError(f"--distributed, coordinator {coordinator}: {error}{taken}") from error


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process (JSON, NaN included), in all of them; it is called in no other.

    All have to call this at the same place of the program. An InputError or OSError there is raised in all.
    """
    if not several():
        return function()
    value, error = None, None
    if is_first():
        try:
            value = function()
        except (InputError, OSError) as raised:
            error = raised
    value, message = json.loads(_broadcast(json.dumps([value, error and str(error)])))
    if message is not None:
        raise error or InputError(message)
    return value


def _broadcast(text: str) -> str:
    """The first process's text."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(text.encode(), np.uint8)  # JSON is ASCII
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes().decode()
