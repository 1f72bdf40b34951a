"""The one exception for a user's mistake, and how a command turns exceptions into exit codes.

Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 75 stopped by a signal with everything saved (the same
command goes on), 1 anything else: the machine's faults with one message, our own with a traceback. 130 after Ctrl-C. Asserts
are for ours. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

# What a machine may lack, whoever wrote the program, and what to say beyond the operating system's own words.
_MACHINE_FAULTS = {
    errno.ENOSPC: "free some space or choose another folder; what was committed before is unharmed",
    errno.EDQUOT: "free some of your quota or choose another folder; what was committed before is unharmed",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder you may use, or change its permissions",
    errno.EPERM: "choose a folder you may use, or change its permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or the network file system failed",
}


# What gloo and NCCL say when a process they talk to has ended.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


class UserError(ValueError):
    """A mistake only the user can mend. The message names the key or file, the value, and the way out."""


class RunError(RuntimeError):
    """A run that cannot go on through nobody's mistake; one message says what happened and what to do, exit code 1."""


class StoppedError(RuntimeError):
    """A signal asked the run to stop and everything is saved: exit code 75, on which a scheduler starts the same again."""


EXIT_STOPPED = os.EX_TEMPFAIL
STOPPED_FILE = "TITAN_DP_STOPPED_FILE"
"""Environment variable: a file that a stopped process makes, for launch/torchrun.py, which torch does not tell exit codes."""


def run_main(command: Callable[[], int]) -> int:
    """Run `command` and return the process's exit code, printing what went wrong to stderr."""
    if path := os.environ.get(STOPPED_FILE):  # of an earlier life of this rank
        with suppress(OSError):
            os.unlink(path)
    for stream in (sys.stdout, sys.stderr):  # whatever a name or a text holds, printing it is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where a closed pipe or a full disk is still ours to report
    except UserError as error:
        _report(str(error))
        return 2
    except RunError as error:
        _report(str(error))
        return 1
    except StoppedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, flush=True)
        if path := os.environ.get(STOPPED_FILE):
            open(path, "w").close()
        return EXIT_STOPPED
    except KeyboardInterrupt:
        _report("interrupted")
        return 130
    except BrokenPipeError:  # `... | head`: the reader has seen enough, and flushing at exit must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (fault := machine_fault(error)) is not None:
            _report(fault)
        elif any(sign in str(error) for sign in _LOST_RANK):
            time.sleep(2)  # the rank that left knows why
            _report("the connection to another rank is lost; that one says why, or was killed")
        else:
            traceback.print_exc()
        return 1


def machine_fault(error: BaseException | None) -> str | None:
    """One sentence if `error`, or one it was raised from, is the machine's fault (a full disk, a missing permission)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _MACHINE_FAULTS:
            return f"{error}; {_MACHINE_FAULTS[error.errno]}"
        error = error.__cause__ or error.__context__
    return None


def _report(message: str) -> None:
    """Print to stderr, once for all ranks where they all say the same.

    torchrun ends the other ranks as soon as the first has left, so those wait a moment: they are heard only if rank 0
    had nothing to say.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)
    print(f"error{'' if rank == '0' else f' (rank {rank})'}: {message}", file=sys.stderr, flush=True)
