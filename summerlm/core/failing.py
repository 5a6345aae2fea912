"""How a job of several ranks fails: one of them says why, once, and all end with its exit code.

Flow: a rank that fails claims the failure in the job's store before its peers can notice, in
`liveness.Liveness` or `one_voice`; whoever comes second keeps silent and takes the first one's
exit code. `cli.main` prints what is raised.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from summerlm.core.errors import explain

if TYPE_CHECKING:  # settings are read, and may fail, before torch is needed
    import torch.distributed as dist

INTERRUPTED = 130  # what a shell calls a process that Ctrl-C has ended


@dataclass(frozen=True)
class Failure:
    """Why a job ends.

    Attributes:
        rank: Who says so.
        code: What every rank ends with.
        text: In one line.
        hanging: Ranks that hang, whose stacks are wanted.
    """

    rank: int
    code: int
    text: str
    hanging: tuple[int, ...] = ()

    def say(self) -> None:
        """Tell whoever reads along, even where the process is about to end."""
        os.write(2, f"error: {self.text}\n".encode())


class Claims:
    """The place in a job's store where its first failure stands.

    Args:
        store: Keys of this start of the job only.
    """

    def __init__(self, store: "dist.Store") -> None:
        self._store = store

    def look(self) -> Failure | None:
        """Give the first failure, where there is one."""
        return _read(self._store.get("failure")) if self._store.check(["failure"]) else None

    def claim(self, failure: Failure) -> Failure:
        """Put a failure there unless one stands there, and give the one that does.

        Args:
            failure: What this rank would say.

        Returns:
            The first failure; equal to `failure` where this rank is to speak.
        """
        return _read(self._store.compare_set("failure", "", json.dumps(asdict(failure))))


def _read(value: bytes) -> Failure:
    fields = json.loads(value)
    return Failure(**{**fields, "hanging": tuple(fields["hanging"])})


def failure_of(error: BaseException, rank: int) -> Failure:
    """Put an error into the words and the exit code that the command ends with.

    Args:
        error: What was raised.
        rank: On which rank.

    Returns:
        The failure.
    """
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, INTERRUPTED, "interrupted")
    known = explain(error)
    if known is not None:
        return Failure(rank, known.exit_code, str(known))
    return Failure(rank, 1, f"{type(error).__name__}: {error}")


@contextmanager
def one_voice() -> Iterator[None]:
    """Let only one of a job's ranks raise what all meet before the job is joined.

    Yields:
        Nothing; the body of the `with` reads settings and joins the job.

    Raises:
        SystemExit: In place of an error, where another rank was first to fail.
    """
    try:
        yield
    except Exception as error:
        # a launcher without a store of its own lets rank 0 keep it, once the job is joined
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise
        import torch.distributed as dist

        mine = failure_of(error, int(os.environ["RANK"]))
        start = f"before-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(address, port, timeout=timedelta(seconds=10))
            first = Claims(dist.PrefixStore(start, store)).claim(mine)
        except RuntimeError:  # the launcher is gone: rather said twice than not at all
            raise error from None
        if first != mine:
            raise SystemExit(first.code) from None
        raise
