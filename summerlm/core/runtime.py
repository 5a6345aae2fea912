"""The running process: its seeds, and the signals that ask it to stop.

Flow: `train` derives a seed wherever it draws; `recipes` wrap a run in `StopRequest`.
"""

import ctypes
import hashlib
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from summerlm.core.failing import INTERRUPTED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHER = "SUMMERLM_LAUNCHER"  # set for the ranks that `recipes.launching` starts: its process
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_BLOCK = 2**30  # bytes that are kept when freed; larger ones still come and go
ANSWER_S = 10.0  # that a launcher's store may take
# looks that a thread of OpenMP takes at another's work before it sleeps. Fewer cost a quiet machine
# up to a fifth of its speed, more cost it beside another process that wants the same cores (LOG.md)
SPINS = "10000"
REQUEUE = 75  # exit code after SIGUSR1, by which schedulers know to run the job again


def derive_seed(*parts: int | str) -> int:
    """Make a seed that depends on all its parts and on nothing else.

    Args:
        *parts: What the draw belongs to, for instance (run seed, "dropout", step, micro-batch).

    Returns:
        An integer in [0, 2^63).

    Example:
        >>> derive_seed(1, "dropout", 7) == derive_seed(1, "dropout", 7)
        True
        >>> derive_seed(1, "dropout", 7) == derive_seed(1, "dropout", 8)
        False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def die_with_launcher() -> None:
    """Let the kernel kill this process, where torchrun has started it, when torchrun dies.

    Raises:
        SystemExit: If its launcher is dead already.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)  # torchrun doesn't say its number, `launch` does
    if launcher is not None and os.getppid() != int(launcher):
        raise SystemExit(1)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # a store of its own that torchrun opens before it starts ranks: if it is shut, who
        # would end this process? It died before the kernel was told to watch it
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        try:
            socket.create_connection(place, timeout=ANSWER_S).close()
        except ConnectionRefusedError:
            raise SystemExit(1) from None
        except OSError:
            pass  # far or slow: those who meet there will say so


def spin_briefly() -> None:
    """Let OpenMP's threads wait for one another in a loop, but not for long.

    To be called before torch is imported. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, for what it takes next.

    glibc gives a block of over 32 MB back to the kernel at once, and gets the next one page by
    page, each filled with zeros. A step on a CPU frees and takes such blocks all the time: with a
    vocabulary of 32k it is half as fast again when they stay (LOG.md). Other libraries are left
    as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        library.mallopt(M_TRIM_THRESHOLD, -1)  # never


def end_process(code: int) -> None:
    """Leave, as one of several ranks at once: nothing that waits for a peer may hold it.

    Args:
        code: What the process ends with.

    Raises:
        SystemExit: In a process alone, which may clean up.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def settle_exit_code(code: int) -> int:
    """Keep torchrun from starting a run again at once that was asked to stop.

    Args:
        code: What the command would end with.

    Returns:
        0 in place of 75 where torchrun itself, which takes any other for a failure, has restarts
        left; else the code.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    left -= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if code != REQUEUE or left <= 0 or LAUNCHER in os.environ:
        return code
    if os.environ.get("RANK") == "0":
        print("ending with 0, not 75: torchrun would start the run again here and now")
    return 0


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold back stop signals to this thread, and for good those to processes started meanwhile.

    So no process that works for this one dies of a Ctrl-C or of a SIGTERM to the whole group, not
    even before it runs a line of Python.

    Yields:
        Nothing; the body of the `with` starts the processes.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    resource_tracker.ensure_running()  # started now it holds them too; it lifts two of them here
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextmanager
def starting() -> Iterator[None]:
    """Meet a Ctrl-C while modules are imported, where an exception prints tracebacks or is lost.

    A process alone leaves with one line. A rank holds signals back until a `StopRequest` listens:
    all of a job then stop together, where one that had left would be waited for.

    Yields:
        Nothing; the body of the `with` imports, and makes nothing that a `finally` would clear.
    """
    if "RANK" in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
        return

    def leave(*_: object) -> None:
        os.write(2, b"interrupted before the run began\n")
        os._exit(INTERRUPTED)

    former = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


class InterruptedWaitError(Exception):
    """A signal came while the loop waited inside `StopRequest.interrupting`."""


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the loop reads between steps.

    A second SIGINT ends the process at once, for a person who doesn't want to wait. A context
    manager; the former handlers come back on leaving.

    Attributes:
        received: The first signal that came, or that came to another rank.
        say: Told at once that it was heard, for the step and the save may take long.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.say: Callable[[str], None] = lambda line: None
        self._interrupts = False

    def __enter__(self) -> "StopRequest":
        """Start listening."""
        self._former = {s: signal.signal(s, self._receive) for s in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see `starting`
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            name = signal.Signals(number).name
            more = "; a second Ctrl-C leaves without saving" if name == "SIGINT" else ""
            self.say(f"{name}: stopping after this step, which is saved{more}")
        self.received = signal.Signals(number)
        if self._interrupts:
            self._interrupts = False  # once: not again while the wait is being left
            raise InterruptedWaitError

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a request end a wait that may be long, as for a data source that is down.

        Yields:
            Nothing; the body of the `with` waits.

        Raises:
            InterruptedWaitError: If a request comes meanwhile, or came before.
        """
        self._interrupts = True
        try:
            if self.received is not None:
                raise InterruptedWaitError
            yield
        finally:
            self._interrupts = False

    @property
    def exit_code(self) -> int:
        """What the process should end with when all is saved: 75 after SIGUSR1, else 0."""
        return REQUEUE if self.received is signal.SIGUSR1 else 0

    @property
    def exit_code_without_a_step(self) -> int:
        """The same where there was nothing to save: then Ctrl-C has interrupted the command."""
        return INTERRUPTED if self.received is signal.SIGINT else self.exit_code
