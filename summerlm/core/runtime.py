"""The running process: its seeds, and the signals that ask it to stop.

Flow: `train` derives a seed wherever it draws; `recipes` wrap a run in `StopRequest`.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from summerlm.core.errors import UsageError

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


def require_single_process() -> None:
    """Refuse to run as one of several ranks, which this version can't do.

    Raises:
        UsageError: If a launcher has set WORLD_SIZE above 1.
    """
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(f"WORLD_SIZE={world}: this version trains in one process only")


class InterruptedWaitError(Exception):
    """A signal came while the loop waited inside `StopRequest.interrupting`."""


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request that the loop reads between steps.

    A second SIGINT ends the process at once, for a person who doesn't want to wait. A context
    manager; the former handlers come back on leaving.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = False

    def __enter__(self) -> "StopRequest":
        """Start listening."""
        self._former = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._interrupts:
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
        """What the process should end with: 75 after SIGUSR1, else 0."""
        return REQUEUE if self.received is signal.SIGUSR1 else 0
