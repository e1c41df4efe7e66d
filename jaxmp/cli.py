"""`jaxmp COMMAND ...`: finds the command, runs it, and turns every ending into an exit code and at most one message.

Exit codes: 0 done; 1 the run failed; 2 bad input; 75 stopped by a signal after saving, the same command goes on;
130 interrupted with nothing to save.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from jaxmp.commands import (
    audit,
    blame,
    compare,
    configs,
    data,
    doctor,
    eval,
    export,
    find_lr,
    find_policy,
    predict,
    prune,
    quantise,
    report,
    reproduce,
    runs,
    sample,
    train,
    tune,
    weights,
    what_if,
)
from jaxmp.commands.command import HELP, Command
from jaxmp.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, InputError, RunFailed, nearest

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        train.COMMAND,
        eval.COMMAND,
        predict.COMMAND,
        sample.COMMAND,
        weights.COMMAND,
        export.COMMAND,
        quantise.COMMAND,
        prune.COMMAND,
        audit.COMMAND,
        blame.COMMAND,
        compare.COMMAND,
        tune.COMMAND,
        find_policy.COMMAND,
        what_if.COMMAND,
        find_lr.COMMAND,
        reproduce.COMMAND,
        report.COMMAND,
        runs.COMMAND,
        configs.COMMAND,
        data.LIST,
        data.PREPARE,
        data.INFO,
        doctor.COMMAND,
    )
}
"""All commands, in the order in which `jaxmp --help` lists them."""

# The errors of a folder that cannot be written to: no space, quota, no permission, read-only, a file in its place.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, by default that of the process, and returns its exit code.

    Raises: any exception that is a bug, of jaxmp or of the user's model; its traceback is what helps.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    return _ended(lambda: _run(given))


def script(function: Callable[..., object]) -> int:
    """Runs a script, by `sys.exit(script(main))`: it ends as a command does, bad input with one message and code 2.

    Args:
      function: its parameters are the options of the command line, read by tyro; without any it reads them itself.
    """
    import tyro

    def run() -> int:
        tyro.cli(function) if inspect.signature(function).parameters else function()
        return DONE

    return _ended(run)


def _ended(run: Callable[[], int]) -> int:
    """Calls `run`, and returns its exit code, or that of the error with which it ended, after its message."""
    for stream in (sys.stdout, sys.stderr):  # an output in ASCII, and paths that are not UTF-8, are no errors
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _exit_on_interrupt():
        try:
            code = run()
            if sys.stdout is not None:  # `jaxmp ... >&-`
                sys.stdout.flush()  # a closed pipe raises here
            return code
        except SystemExit as stop:  # by tyro: 0 after --help, 2 after its message about an argument
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
                return FAILED
            return DONE if stop.code is None else int(stop.code)
        except BrokenPipeError:  # `jaxmp configs | head`
            sys.stdout = None
            return DONE
        except (Exception, KeyboardInterrupt) as error:
            ending = _ending(error)
            if ending is None:
                raise
            code, message = ending
            print(f"jaxmp: {message}", file=sys.stderr)
            return code


def _run(argv: list[str]) -> int:
    """Calls the command that the first one or two words name, or prints help."""
    if not argv or argv[0] in HELP:
        print(_help(COMMANDS.values()))
        return DONE if argv else BAD_INPUT
    if argv[0] == "--version":
        import importlib.metadata  # takes 30 ms

        print(f"jaxmp {importlib.metadata.version('jaxmp')}")
        return DONE
    for words in (2, 1):
        command = COMMANDS.get(" ".join(argv[:words]))
        if command is not None:
            return command(argv[words:])
    group = {name: command for name, command in COMMANDS.items() if name.startswith(f"{argv[0]} ")}
    if group and (len(argv) == 1 or argv[1] in HELP):
        print(_help(group.values()))
        return DONE if argv[1:] else BAD_INPUT
    given, names = (" ".join(argv[:2]), group) if group else (argv[0], COMMANDS)
    raise InputError(f"unknown command {given!r}; expected one of {', '.join(names)}{nearest(given, names)}")


def _help(commands: Iterable[Command]) -> str:
    """The help of `jaxmp`, or of a group of commands such as `jaxmp data`."""
    return "\n".join(
        [
            "usage: jaxmp COMMAND ...",
            "",
            "Trains any experiment under any precision, and shows what the precision did.",
            "",
            *(f"  {command.name:<14}{command.summary}" for command in commands),
            "",
            "`jaxmp COMMAND --help` shows a command's options, `jaxmp train CONFIG --help` every field of that config.",
        ]
    )


@contextlib.contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Context manager: Ctrl-C ends the process at once, like `kill -9`, which loses nothing that is written.

    A KeyboardInterrupt could come in the middle of an import, in a callback of JAX that discards it, or while XLA's
    threads still run and Python shuts down. `fit` handles the signal itself: a run saves and stops.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def end(number: int, frame: object) -> None:
        with contextlib.suppress(Exception):  # the signal may come in the middle of a write
            sys.stdout.flush()
        os.write(2, b"jaxmp: interrupted\n")
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message for an exception that is expected; None for a bug."""
    if isinstance(error, InputError):
        return BAD_INPUT, str(error)
    if isinstance(error, RunFailed):
        return FAILED, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = f"{error.filename}: " if error.filename else ""
        return BAD_INPUT, f"{where}{error.strerror}; choose another folder (--workdir), or make room there"
    if (missing := doctor.missing_platform(error)) is not None:
        return BAD_INPUT, f"{missing}; `jaxmp doctor` tells what is missing"
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        return BAD_INPUT, "there is no home folder; expected HOME, or XDG_CACHE_HOME and JAXMP_DATA, in the environment"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return FAILED, (
            f"out of memory ({str(error).partition(chr(10))[0] or 'host'}); try a smaller --data.batch-size or a "
            "precision with half the bytes, and `jaxmp train CONFIG --dry-run` to see what a step needs"
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if "jax" not in sys.modules:
        return False
    from jax.errors import JaxRuntimeError

    return isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
