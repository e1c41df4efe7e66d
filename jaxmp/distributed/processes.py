"""Runs on several processes: they join one JAX program, and share what the first process reads.

After `join`, `jax.devices()` are the devices of all processes. Only the first process writes files and prints. What
depends on files is read by the first process and sent to the others (`from_first`). If one process fails, JAX ends the
others after at most HEARTBEAT_SECONDS. So nothing here needs to wait for a process that may be gone.
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
"""seconds without a sign of life after which a process counts as lost; longer than migrating a virtual machine takes"""


def join(coordinator: str | None, count: int | None, index: int | None, timeout: int) -> None:
    """Makes this process one of several in a JAX program. Call it before any other JAX function.

    JAX takes arguments that are None from Slurm, Open MPI or Kubernetes. If not all processes have joined within
    `timeout` seconds, JAX aborts this one.

    Args:
      coordinator: HOST:PORT, the host of process 0 and a free port there.
      count: number of processes.
      index: index of this process, 0 to count - 1.
      timeout: seconds to wait for all processes.

    Raises:
      InputError: an argument is not valid, is missing and cannot be found, or the coordinator cannot be started.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator {coordinator}: expected HOST:PORT, with process 0's host and a free port")
    if count is not None and count < 1:
        raise InputError(f"--process-count {count}: expected at least 1")
    if index is not None and not 0 <= index < (index + 1 if count is None else count):
        raise InputError(f"--process-index {index}: expected 0 to {'...' if count is None else count - 1}")
    # Its handler of SIGTERM would swallow the signal until our own is installed.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            # No detection if everything is given: in a Kubernetes pod, detection needs extra permissions.
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
    """Returns whether the run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this is the first process, which writes files and prints."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process only, and returns its result in all processes.

    All processes must call this at the same point of the program. The result must be JSON (NaN is allowed).

    Raises:
      InputError: `function` raised an InputError or OSError (the first process raises that error itself).
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


def from_each(value: Any) -> list[Any]:
    """Returns the `value` of each process, in the order of their indices, in all processes.

    All processes must call this at the same point of the program. The values must be JSON.
    """
    if not several():
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(own)))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(own)] = own
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def try_in_each(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Calls `function` in each process. Returns (result, None), or in all (None, message) of the first InputError.

    All processes must call this at the same point of the program.
    """
    value, why = None, None
    try:
        value = function()
    except InputError as error:
        why = str(error)
    why = next(filter(None, from_each(why)), None)
    return (value, None) if why is None else (None, why)


def _broadcast(text: str) -> str:
    """Returns the `text` of the first process in all processes."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    if is_first():
        buffer[:] = np.frombuffer(text.encode(), np.uint8)  # JSON is ASCII
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes().decode()
