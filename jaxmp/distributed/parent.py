"""The parent process of `jaxmp train --distributed`: it starts the process that trains, and reports how that ended.

When another process of the run is lost, JAX aborts this one from a background thread and prints a stack trace. The
operating system may also kill it at any moment. Only a separate process can then explain what happened. So the command
starts itself again as a child (child.py), forwards signals to it, and turns its end into an exit code and at most one
message. The parent does not import JAX.
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
"""environment variable that marks a child: the file descriptor of a pipe that closes when the parent ends"""

SIGNALS_BEFORE_KILL = 3
"""number of signals after which a child that has not ended is killed"""

GO_ON = "the same command on all machines goes on from the last checkpoint"
"""advice for a job that has to be started again"""

# The first line in which JAX's coordination service says why it aborts the process; all later lines belong to it.
_ABORT = re.compile(rb"^[EF]\d{4} [\d:.]+ +\d+ (coordination_service|client\.h)")
# On CPUs, Gloo's threads print greetings, and their lines get mixed up: this matches any sequence of the pieces.
_CHATTER = re.compile(
    rb"(\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |[\d\s])+"
    rb"|E\d{4} [\d:.]+ +\d+ add_port\.cc.*\s"  # jaxmp prints its own message for a port that is in use
)


def is_needed() -> bool:
    """Returns whether a parent has to be started: this process is not a child of one."""
    return PIPE not in os.environ


def run(arguments: list[str]) -> int:
    """Runs `jaxmp ARGUMENTS` in a child process and returns the exit code.

    If the child was ended by a signal, prints a message and returns FAILED; if the user sent that signal, returns 128
    plus its number, without a message.
    """
    ours, theirs = os.pipe()[::-1]
    signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward_signal(number: int, frame: object) -> None:
        signals.append(number)
        if child is not None:
            child.send_signal(number if len(signals) < SIGNALS_BEFORE_KILL else signal.SIGKILL)

    before = {number: signal.signal(number, forward_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # In a new session: Ctrl-C then reaches it only once, through its parent.
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
        reader = threading.Thread(target=_forward_stderr, args=(child.stderr, held), daemon=True)
        reader.start()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(ours)
    if code not in (DONE, STOPPED):
        with contextlib.suppress(ProcessLookupError):  # data workers of the child that are still running
            os.killpg(child.pid, signal.SIGKILL)
    reader.join(timeout=5)  # another process may still hold its standard error open
    if code < 0 and (-code in signals or len(signals) >= SIGNALS_BEFORE_KILL):
        return 128 + signals[-1]
    output = b"".join(held)
    if -code != signal.SIGABRT:
        sys.stderr.buffer.write(output)
    if code >= 0:
        return code
    print(f"jaxmp: {explain(output.decode(errors='replace'), -code)}", file=sys.stderr)
    return FAILED


def explain(output: str, number: int) -> str:
    """Returns what happened to a child that signal `number` ended, and what to do next.

    `output` is the last output of JAX.

    >>> explain("The following tasks are unhealthy (stopped sending heartbeats):\\n1\\nThe tasks ...", 6).split(";")[0]
    'process 1 does not answer: killed, or its machine is lost'
    >>> explain("", 9).split(";")[0]
    'the process on this machine was killed by SIGKILL, as the system does when memory runs out'
    """
    if number != signal.SIGABRT or not output:
        cause = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        return f"the process on this machine was killed by {name}{cause}; the others will end too, and {GO_ON}"
    if "RegisterTask" in output:
        return (
            "not all processes joined in time (--start-timeout): run this command --process-count times, each with "
            "another --process-index, where the coordinator can be reached"
        )
    if silent := re.search(r"stopped sending heartbeats\):\n([\d\n]+)", output):
        numbers = silent[1].split()
        if len(numbers) == 1:
            return f"process {numbers[0]} does not answer: killed, or its machine is lost; {GO_ON}"
        return f"processes {', '.join(numbers)} do not answer: killed, or their machines are lost; {GO_ON}"
    if "Failed to send RPC to coordination service" in output:
        return f"process 0, which coordinates the others, has ended or cannot be reached; {GO_ON}"
    status = re.search(r"absl::Status: (.*)", output)
    return f"another process has failed ({status[1] if status else output.splitlines()[0]}); {GO_ON}"


def _forward_stderr(stream: IO[bytes], held: list[bytes]) -> None:
    """Copies the child's standard error line by line; collects JAX's output while it aborts in `held` instead."""
    with stream:
        for line in stream:
            if held or _ABORT.match(line):
                held.append(line)
            elif not _CHATTER.fullmatch(line):
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
