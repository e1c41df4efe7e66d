"""The parent process of `jaxmp train --distributed`, one beside each process that trains.

JAX aborts a process when another one is gone, from a thread of its own and with a stack trace, and the system may kill
it at any moment: only another process can say what happened. So the command starts itself again as a child (child.py),
hands on signals to it, and turns its end into an exit code and at most one message. It imports nothing of JAX.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from typing import IO

from jaxmp.errors import DONE, FAILED, STOPPED

PIPE = "JAXMP_PARENT"
"""environment variable of a child: a file descriptor that comes to its end when its parent does"""

IMPATIENCE = 3
"""signals after which a child is killed that does not end"""

GO_ON = "the same command on all machines goes on from the last checkpoint"
"""what to do next, where the job has to be started again"""

# Where JAX's coordination service begins to say why it is about to abort the process; all that follows is about that.
_ABORT = re.compile(rb"^[EF]\d{4} [\d:.]+ +\d+ (coordination_service|client\.h)")
# Gloo's threads greet each other, on the CPU, in lines that get mixed up: what is made of their pieces.
_CHATTER = re.compile(
    rb"(\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |[\d\s])+"
    rb"|E\d{4} [\d:.]+ +\d+ add_port\.cc.*\s"  # that a port is taken is said in our own words
)


def is_needed() -> bool:
    """Whether this process is not yet a child."""
    return PIPE not in os.environ


def run(arguments: list[str]) -> int:
    """Runs `jaxmp ARGUMENTS` in a child and returns its exit code; FAILED, with a message, where it did not exit."""
    ours, theirs = os.pipe()[::-1]
    signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: object) -> None:
        signals.append(number)
        if child is not None:
            child.send_signal(number if len(signals) < IMPATIENCE else signal.SIGKILL)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # In a session of its own: Ctrl-C reaches it through its parent alone, and so once.
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxmp.child", *arguments],
            env={**os.environ, PIPE: str(theirs)},
            pass_fds=[theirs],
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(theirs)
        if signals:
            child.send_signal(signals[-1])
        held: list[bytes] = []
        reader = threading.Thread(target=_hand_on_lines, args=(child.stderr, held), daemon=True)
        reader.start()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(ours)
    if code not in (DONE, STOPPED):
        with contextlib.suppress(ProcessLookupError):  # the processes that read data for it, if any are left
            os.killpg(child.pid, signal.SIGKILL)
    reader.join(timeout=5)  # what else holds its standard error is none of ours
    if code < 0 and (-code in signals or len(signals) >= IMPATIENCE):
        return 128 + signals[-1]
    said = b"".join(held)
    if -code != signal.SIGABRT:
        sys.stderr.buffer.write(said)
    if code >= 0:
        return code
    print(f"jaxmp: {explain(said.decode(errors='replace'), -code)}", file=sys.stderr)
    return FAILED


def explain(said: str, number: int) -> str:
    """What happened to a child that signal `number` ended, from what JAX `said` last, and what to do.

    >>> explain("The following tasks are unhealthy (stopped sending heartbeats):\\n1\\nThe tasks ...", 6).split(";")[0]
    'process 1 does not answer: killed, or its machine is lost'
    >>> explain("", 9).split(";")[0]
    'the process on this machine was killed by SIGKILL, as the system does where memory runs out'
    """
    if number != signal.SIGABRT or not said:
        cause = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        return f"the process on this machine was killed by {name}{cause}; the others will end too, and {GO_ON}"
    if "RegisterTask" in said:
        return (
            "not all processes were there in time (--start-timeout): as many as --process-count says have to run this "
            "command, each with its own --process-index, and have to reach the coordinator"
        )
    if silent := re.search(r"stopped sending heartbeats\):\n([\d\n]+)", said):
        numbers = silent[1].split()
        if len(numbers) == 1:
            return f"process {numbers[0]} does not answer: killed, or its machine is lost; {GO_ON}"
        return f"processes {', '.join(numbers)} do not answer: killed, or their machines are lost; {GO_ON}"
    if "Failed to send RPC to coordination service" in said:
        return f"process 0, which coordinates the others, has ended or cannot be reached; {GO_ON}"
    status = re.search(r"absl::Status: (.*)", said)
    return f"another process has failed ({status[1] if status else said.splitlines()[0]}); {GO_ON}"


def _hand_on_lines(stream: IO[bytes], held: list[bytes]) -> None:
    """Copies the child's standard error to ours, as it comes; but holds back what JAX says when it aborts."""
    with stream:
        for line in stream:
            if held or _ABORT.match(line):
                held.append(line)
            elif not _CHATTER.fullmatch(line):
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
