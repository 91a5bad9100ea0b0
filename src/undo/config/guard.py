"""The outermost frame of every command: mistakes become messages, and output that cannot be written no traceback."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from undo.config.mistakes import ConfigError


def guarded(action: Callable[[], int]) -> int:
    """Run a command -> its exit status. A user's mistake is printed alone (2); so is output that was lost (1)."""
    _prepare_streams()
    try:
        status = action()
    except ConfigError as error:
        status = 2
        _complain(str(error))
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:  # argparse, after help or a mistake
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
    except OSError:
        if (lost := _lost("\n")) is None:  # the error was not of our output
            raise
        return _end(1, lost)
    return _end(status, _lost())


def _prepare_streams() -> None:
    """A closed one leads nowhere, or the next file opened would take its place; what an encoding lacks is escaped."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _lost(more: str = "") -> OSError | None:
    """Why standard output, and `more`, cannot be written, if it cannot."""
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _end(status: int, lost: OSError | None) -> int:
    if lost is None:
        return status
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    if not isinstance(lost, BrokenPipeError):  # there the reader has gone, and wants no more
        _complain(f"what was printed could not be written ({lost.strerror or lost})")
    return status or 1


def _complain(text: str) -> None:
    with suppress(OSError):  # nobody listens
        print(f"error: {text}", file=sys.stderr)
