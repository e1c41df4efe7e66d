"""`python -m jaxmp.child ARGUMENTS`: the process that trains, started by distributed/parent.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

from jaxmp import cli
from jaxmp.distributed.parent import PIPE
from jaxmp.errors import DONE, FAILED, INTERRUPTED, STOPPED

LINGER_SECONDS = 5
"""Seconds that process 0 stays alive after it failed: its end ends all others before they can say why they failed."""


def main() -> int:
    """Runs the command line and returns its exit code; if it failed, ends the process instead of returning."""
    threading.Thread(target=_stop_with_parent, args=(int(os.environ[PIPE]),), daemon=True).start()
    _keep_standard_output()
    try:
        code = cli.main()
    except BaseException as error:
        _wait_for_verdict(error)
        traceback.print_exc()
        code = FAILED
    if code in (DONE, STOPPED):
        for number in (signal.SIGTERM, signal.SIGINT):  # all is saved: a signal would only change the code
            signal.signal(number, signal.SIG_IGN)
        return code  # at exit, JAX waits for the other processes
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends this process without waiting for the others: they may be waiting for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _is_joined() and code != INTERRUPTED:
        import jax

        if jax.process_index() == 0:
            time.sleep(LINGER_SECONDS)
    os._exit(code)


def _wait_for_verdict(error: BaseException) -> None:
    """Waits until JAX knows which process is gone and aborts this one: that is why a collective failed."""
    if not _is_joined():
        return
    from jax.errors import JaxRuntimeError

    from jaxmp.distributed.processes import HEARTBEAT_SECONDS

    if isinstance(error, JaxRuntimeError):
        time.sleep(HEARTBEAT_SECONDS + 10)


def _is_joined() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _stop_with_parent(pipe: int) -> None:
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _keep_standard_output() -> None:
    """Sends what libraries print to standard error: there the parent drops the lines of no interest (Gloo's)."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


if __name__ == "__main__":
    sys.exit(main())
