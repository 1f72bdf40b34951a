"""torchrun with three things added that a scheduler needs; takes exactly torchrun's options.

    python -m titan_dp.launch.torchrun --nproc-per-node=8 -m titan_dp.train --config 800m.toml

1. It leaves with the exit code of the process that failed first (2: the user's mistake), where torchrun always says 1, so
   that only what may succeed the next time is tried again. With --log-dir the code is in the file exit_code there as well.
2. With several nodes gloo, which carries asynchronous checkpoints and CPU training, binds to the interface that leads to the
   first node. By itself it binds to whatever the node's own name resolves to: loopback on Debian, nothing on many clusters.
   A GLOO_SOCKET_IFNAME that is set is left alone. NCCL finds its interfaces by itself.
3. SIGUSR1 is handed to the ranks as SIGTERM is. If they save and leave, so does this, with 75: start the same again.

Its page about ranks that failed is left out: they have said why, and of one that was killed a sentence tells. Everything else
is torch.distributed.run.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from titan_dp.errors import EXIT_STOPPED, LAUNCHER_PID, STOPPED_FILE, fitted

SHUTDOWN_SECONDS = "60"
"""What ranks have to save in after a signal, where TORCH_ELASTIC_SHUTDOWN_TIMEOUT and --shutdown-timeout are not given."""
SIOCGIFADDR = 0x8915  # netdevice(7)


def main(argv: list[str]) -> int:
    """Run torchrun with `argv`; returns the exit code: 128 + N if signal N killed the first process to fail."""
    from torch.distributed.elastic.multiprocessing.api import SignalException  # torch takes seconds to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Which process ended how is said below, and ranks say themselves what a signal means for them.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    args = parse_args(argv)
    host = args.rdzv_endpoint.rpartition(":")[0] or args.rdzv_endpoint or args.master_addr
    if args.nnodes != "1" and not args.standalone and (interface := interface_towards(host)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    if args.nproc_per_node != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun does this too, with four lines of warning
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    # torch 2.13 would let ranks that --max-restarts starts again, or on a node that was replaced, find the dead ones' addresses
    # in the agent's store, and hang.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if "SIGUSR1" not in args.signals_to_handle:
        args.signals_to_handle += ",SIGUSR1"
    with tempfile.TemporaryDirectory() as folder:
        stopped = Path(os.environ.setdefault(STOPPED_FILE, f"{folder}/stopped"))
        try:
            run(args)
        except ChildFailedError as error:
            # srun, told of another node's failure, ends this one: that must no longer change the exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            rank, failure = error.get_first_failure()
            code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode  # negative: killed by that signal
            if args.log_dir:
                with suppress(OSError):  # a full disk must not take the code itself away
                    Path(args.log_dir).mkdir(parents=True, exist_ok=True)
                    (Path(args.log_dir) / "exit_code").write_text(f"{code}\n")
            if code not in (EXIT_STOPPED, 1, 2):  # then the rank has said all there is to say
                said = f"error: {_end_of(rank, failure.pid, failure.exitcode)}"
                print(fitted(said, sys.stderr), file=sys.stderr, flush=True)
            return code
        except SignalException as error:
            if stopped.exists():  # the ranks have said that they saved
                return EXIT_STOPPED
            lost = "what the run did since its last save is lost; the same command goes on from there, or anew if none was made"
            said = f"stopped at once by {error.sigval.name}: {lost}"
            print(fitted(said, sys.stderr), file=sys.stderr, flush=True)
            # 1, not 143: srun reports the highest code of all nodes, and the one that failed by itself must show. So 75 too is
            # left with only where the ranks did save, which they cannot after another node has failed.
            return 1
    return 0


def _end_of(rank: int, pid: int, code: int) -> str:
    """The sentence for a rank that could not say itself why it ended; a negative `code` is the signal that killed it."""
    who = f"rank {rank} (process {pid} on {socket.gethostname()})"
    if code >= 0:
        return f"{who} ended with exit code {code}"
    name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
    why = ", often for want of memory" if -code == signal.SIGKILL else ""
    return f"{who} was killed by {name}{why}; the same command goes on from the last save"


def interface_towards(host: str) -> str | None:
    """The name of the network interface whose IPv4 address this machine uses to talk to `host`, itself included.

    None where `host` does not resolve or no interface has that address first.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # a datagram socket sends nothing here, it only asks for the route
        except OSError:
            return None
        address = probe.getsockname()[0]
        return next((name for _, name in socket.if_nameindex() if _address(probe, name) == address), None)


def _address(any_socket: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode())
    try:
        answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, request)
    except OSError:  # it has no IPv4 address
        return None
    return socket.inet_ntoa(answer[20:24])  # struct ifreq: 16 bytes of name, then sockaddr_in with the address at its byte 4


if __name__ == "__main__":
    # Until torchrun takes signals: if another node fails first, srun ends this one. 1, not 143, for the reason above.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(1))
    sys.exit(main(sys.argv[1:]))
