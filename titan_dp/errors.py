"""Errors that have a message for people, and how a command turns exceptions into exit codes.

A scheduler acts on the exit code (docs/reliability.md has the table of causes, each with its test): 0 done; 2 the user's
mistake, which no further try mends; 75 stopped by a signal with everything saved, so the same command goes on; 130 after
Ctrl-C in a command that is not training; 1 anything else, worth another try. Mistakes and faults of the machine or the
network are one message; our own mistakes, asserts among them, are a traceback. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from typing import IO, NoReturn

# Faults of the machine, and what to say beyond the operating system's own words.
_MACHINE_FAULTS = {
    errno.ENOSPC: "free some space or choose another folder; what was committed before is unharmed",
    errno.EDQUOT: "free some of your quota or choose another folder; what was committed before is unharmed",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder you may use, or change its permissions",
    errno.EPERM: "choose a folder you may use, or change its permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or the network file system failed",
    errno.ESTALE: "the network file system failed",
    errno.ENOMEM: "the machine has too little memory",
}

# Something else lies at a path than the file or folder that is needed: no further try changes it.
_WRONG_PATHS = {
    errno.ENOTDIR: "a file lies where a folder is needed; move it away, or choose another path",
    errno.EEXIST: "something else lies there; move it away, or choose another path",
    errno.EISDIR: "a folder lies where a file is needed; move it away, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "symbolic links lead in a circle; choose another path",
}

# Faults that may be over at the next try.
_PASSING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EINTR),
    *(errno.EIO, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN),
}
# Base classes of network faults in Python, requests, urllib3, httpx and aiohttp, by name, so that none has to be imported.
_NETWORK_FAULTS = {
    *("ConnectionError", "TimeoutError", "gaierror", "SSLError", "IncompleteRead"),
    *("Timeout", "ChunkedEncodingError", "ProtocolError", "TransportError", "ClientConnectionError", "ClientPayloadError"),
}
# The Hub's clients raise these for what no further try changes.
_REFUSALS = {"OfflineModeIsEnabled", "DatasetNotFoundError"}

# What gloo, NCCL and torch's store say when a process they talk to has ended; other connections fail with the same words.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe", "got 0 bytes")
_LOST_WORKER = re.compile(r"DataLoader worker \(pid.*|Pin memory thread exited unexpectedly")


class UserError(ValueError):
    """A mistake only the user can mend. The message names the key or file, the value, and the way out."""


class RunError(RuntimeError):
    """A run that cannot go on, by nobody's mistake; the message says what happened and what to do. Exit code 1."""


class UnwritableError(OSError):
    """A path that cannot be written, for a reason that `_MACHINE_FAULTS` has no words for; the message says all."""


class StoppedError(RuntimeError):
    """A signal asked the run to stop and everything is saved. Exit code 75, on which a scheduler starts the same again."""


def require(what: str, *packages: str) -> None:
    """Raise UserError if `what` needs packages that are not installed; to be called before hours are spent."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}")


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a run to stop at the end of a step (faults/interrupt.py); worker processes leave them to the rank."""
EXIT_STOPPED = os.EX_TEMPFAIL
LAUNCHER_PID = "TITAN_DP_LAUNCHER_PID"
"""Environment variable: the process of launch/torchrun.py, without which its ranks end."""
STOPPED_FILE = "TITAN_DP_STOPPED_FILE"
"""Environment variable: a file that a stopped process makes, for launch/torchrun.py, which does not see exit codes."""
RUNS_AT_ONCE = "TITAN_DP_RUNS_AT_ONCE"
"""Environment variable: how many runs a sweep has at the same time on this machine; they share its cores."""


def is_main_rank() -> bool:
    """Whether this process is rank 0, or has no ranks beside it; needs no process group."""
    return os.environ.get("RANK", "0") == "0"


def counted(number: int, noun: str, plural: str = "") -> str:
    """1 shard, 2 shards, 1,000 shards; `plural` is for other endings."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' with the nearest of what is `known`; empty if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def room(stream: IO[str] | None = None) -> int:
    """Columns of the terminal that reads `stream` (default: stdout); more than anything needs for a pipe or file."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else 100_000


def fitted(text: str, stream: IO[str] | None = None) -> str:
    """`text` in lines that the terminal behind `stream` (default: stdout) has room for, between words and with the indentation
    of each; to a pipe or file as it is, so that a sentence is one line for grep.
    """
    columns = room(stream)

    def wrapped(line: str) -> str:
        if len(line) <= columns:
            return line
        indent = " " * (len(line) - len(line.lstrip(" -")))
        return textwrap.fill(line, max(columns, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)

    return "\n".join(map(wrapped, text.split("\n")))


def say_once(sentence: str) -> None:
    """To stderr, once for all ranks."""
    if is_main_rank():
        print(fitted(sentence, sys.stderr), file=sys.stderr, flush=True)


def run_main(command: Callable[[], int]) -> int:
    """Run `command` and return the process's exit code, printing what went wrong to stderr."""
    # torch's threads wait by spinning unless told before its import, and take the cores from whoever else computes there.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Packed batches and validation change shapes: the GPU's allocator then grows segments and leaves no holes of odd sizes.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if path := os.environ.get(STOPPED_FILE):  # of an earlier life of this rank
        with suppress(OSError):
            os.unlink(path)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where a closed pipe or a full disk is still ours to report
    except (Exception, KeyboardInterrupt) as error:
        return report(error)


def report(error: Exception | KeyboardInterrupt) -> int:
    """Print what ended a command; returns the exit code. After one Ctrl-C the next ends the process at once."""
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if isinstance(error, StoppedError):
        if is_main_rank():
            print(error, flush=True)
        if path := os.environ.get(STOPPED_FILE):
            open(path, "w").close()
        return EXIT_STOPPED
    if isinstance(error, KeyboardInterrupt):
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr, flush=True)
        return 130
    if isinstance(error, BrokenPipeError):  # `... | head`: the reader has seen enough, and flushing at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if _is_lost_rank(error):
        time.sleep(2)  # the rank that left knows why
    if (known := explained(error)) is None:
        traceback.print_exception(error)
        if os.environ.get("WORLD_SIZE", "1") != "1":  # two tracebacks look alike
            print(f"error: the traceback above is of rank {os.environ.get('RANK', '0')}", file=sys.stderr, flush=True)
        return 1
    _say(str(known))
    return 2 if isinstance(known, UserError) else 1


def explained(error: BaseException) -> UserError | RunError | None:
    """`error` as one message, which can be sent to other processes; None if only a traceback tells what happened.

    A UserError that was raised from a passing fault becomes a RunError: another try may succeed.
    """
    if isinstance(error, UserError) and (fault := passing_fault(error.__cause__)) is not None:
        reason = "" if in_words(fault) in str(error) else f"; {in_words(fault)}"
        return RunError(f"{error}{reason}; this may pass: try the same command again")
    if isinstance(error, UserError | RunError):
        return error
    if _is_lost_rank(error):
        return RunError(f"the connection to another rank is lost; that one says why, or was killed ({in_words(error)})")
    if isinstance(error, OSError) and error.errno in _WRONG_PATHS:
        return UserError(f"{error}; {_WRONG_PATHS[error.errno]}")
    fault_text = machine_fault(error)
    return None if fault_text is None else RunError(fault_text)


def leave(error: BaseException) -> NoReturn:
    """Report `error` and end this process at once, with its exit code and without cleaning up.

    For a rank that fails alone: tearing down a process group may wait for ranks that wait for this one, until somebody kills
    it before it has said why.
    """
    code = report(error) if isinstance(error, Exception | KeyboardInterrupt) else 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def machine_fault(error: BaseException | None) -> str | None:
    """One sentence if `error`, or one it was raised from, is the machine's or the network's fault, such as a full disk."""
    for cause in _chain(error):
        if isinstance(cause, UnwritableError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in _MACHINE_FAULTS:
            return f"{cause}; {_MACHINE_FAULTS[cause.errno]}"
        if isinstance(cause, RuntimeError) and (found := _LOST_WORKER.search(str(cause))):
            return lost_worker(found[0])
    if (fault := passing_fault(error)) is not None:
        return f"{in_words(fault)}; a connection or the server at its other end failed: try the same command again"
    return None


def lost_worker(reason: str) -> str:
    """The sentence for a worker of the data loader that has died."""
    return (
        f"a process that reads data has ended, often killed for want of memory ({reason.rstrip(' .')}); start the same command "
        "again, with a lower training.dataloader.num_workers or prefetch_factor if it was memory"
    )


def passing_fault(error: BaseException | None) -> BaseException | None:
    """The fault, `error` or what it was raised from, that another try may not meet: a 503, a broken connection, a failed disk.

    None for anything else, such as a server's answer that there is no such name.
    """
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", getattr(cause, "status", None))
        names = {kind.__name__ for kind in type(cause).__mro__}
        if isinstance(status, int) and status >= 400:
            return cause if status >= 500 or status in (408, 425, 429) else None
        if names & _REFUSALS:
            return None
        if names & _NETWORK_FAULTS or (isinstance(cause, OSError) and cause.errno in _PASSING):
            return cause
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it was raised from or while handling, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_lost_rank(error: BaseException) -> bool:
    names, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    collective = "gloo/transport" in text or names & {"DistNetworkError", "DistBackendError"}
    return bool(collective) and any(sign in text for sign in _LOST_RANK)


def in_words(error: BaseException) -> str:
    """The kind of `error` and its first line; of a connection that urllib3 could not make, the host."""
    if host := re.search(r"HTTPS?Connection(?:Pool)?\(host='([^']+)'", str(error)):
        return f"{host[1]} cannot be reached"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _say(message: str) -> None:
    """Print to stderr. If all ranks say the same, only rank 0 is heard.

    torchrun ends the other ranks as soon as the first has left, so those wait a moment: they are heard only if rank 0 has
    nothing to say.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)
    message = re.sub(r"\[Errno -?\d+\] ", "", message)  # the number says nothing that the words beside it do not
    said = f"error{'' if rank == '0' else f' (rank {rank})'}: {message}"
    print(fitted(said, sys.stderr), file=sys.stderr, flush=True)
