"""What a rank leaves behind when its job hangs: the stacks of its threads, and its collectives.

Flow: `liveness.Liveness` calls `listen` at its start, `dump` on each rank of a job that hangs, and
`make_dump` for a rank that can't do so itself.
"""

import contextlib
import faulthandler
import os
import signal
import tempfile
from pathlib import Path

import torch._C._distributed_c10d as c10d

from summerlm.core.roster import Peer

DUMP_SIGNAL = signal.SIGUSR2
TRACE_FILE = "TORCH_FR_DUMP_TEMP_FILE"  # torch's own name for where its flight recorder writes


def listen() -> None:
    """From now on print this process's stacks on SIGUSR2, whatever it does or holds."""
    faulthandler.register(DUMP_SIGNAL, file=2, all_threads=True)


def dump(me: Peer) -> None:
    """Print the stacks of all threads, in one write, so that ranks don't interleave.

    Where torch's variable says so, the collectives that its flight recorder holds are written too:
    torch itself does it at the end of its own timeout, which is longer than ours.

    Args:
        me: This rank.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        os.write(2, f"{me}:\n".encode() + file.read())
    if prefix := os.environ.get(TRACE_FILE):
        # builds without NCCL have the second only; neither is in torch's own type hints
        trace = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace")  # noqa: B009
        Path(f"{prefix}{me.rank}").write_bytes(trace())


def make_dump(peer: Peer) -> None:
    """Let another rank of this machine print its stacks.

    Args:
        peer: The rank, which listens.
    """
    os.write(2, f"{peer}:\n".encode())
    send(peer, DUMP_SIGNAL)


def send(peer: Peer, number: signal.Signals) -> None:
    """Send a signal to a rank of this machine that may have ended.

    Args:
        peer: The rank.
        number: The signal.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(peer.process, number)
