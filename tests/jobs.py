"""Jobs of several ranks that may fail: how each ends, and what all of them print, for tests.

The ranks are forks of the test's process, which keeps the job's store as torchrun does, or leaves
that to rank 0, as launchers do that only set variables.
"""

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from summerlm import cli
from summerlm.core.failing import one_voice
from summerlm.core.ranks import join

FORK = multiprocessing.get_context("fork")


class Job:
    """Starts `act(ranks, *args)` on every rank; `act` is called under the command's own `main`."""

    def __init__(
        self,
        folder: Path,
        act: Callable[..., Any],
        *args: Any,
        world: int = 2,
        timeout_s: float = 60,
        data_allowance_s: float | None = None,
        store: dist.TCPStore | None = None,
        attempt: int = 0,
        store_of_rank_0: bool = False,
    ) -> None:
        self.log = folder / f"log-{attempt}.txt"
        self.store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.start = time.monotonic()
        calls = []
        port = _free_port() if store_of_rank_0 else self.store.port
        for rank in range(world):
            env = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_USE_AGENT_STORE": not store_of_rank_0,
                "TORCHELASTIC_RESTART_COUNT": attempt,
            }
            calls.append((self.log, env, timeout_s, data_allowance_s, act, args))
        self.ranks = fork_ranks(_serve, calls)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def kill(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid, number)

    def await_line(self, words: str, count: int = 1) -> None:
        """Wait until the ranks have printed something so many times."""
        for _ in range(2000):
            if self.log.exists() and self.log.read_text().count(words) >= count:
                return
            time.sleep(0.01)
        raise AssertionError(f"no {words!r} in {self.log.read_text()!r}")

    def end(self, within_s: float = 30) -> tuple[list[int], str, float]:
        """Wait for the end: exit codes, all that was printed, and seconds since the start."""
        for rank in self.ranks:
            rank.join(max(0.0, self.start + within_s - time.monotonic()))
        seconds = time.monotonic() - self.start
        assert all(rank.exitcode is not None for rank in self.ranks), self.log.read_text()
        return [rank.exitcode for rank in self.ranks], self.log.read_text(), seconds


def fork_ranks(serve: Callable[..., None], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Start a process for every call of `serve`; none goes on before all are there.

    The thread of the store asks for names of those who connect, under a lock of the C library:
    were a rank forked while another connects, it could inherit that lock, and wait for ever.
    """
    go = FORK.Event()
    ranks = [FORK.Process(target=_wait, args=(go, serve, *call), daemon=True) for call in calls]
    for rank in ranks:
        rank.start()
    go.set()
    return ranks


def _wait(go, serve, *args) -> None:
    gc.freeze()  # what the parent left is not this process's to collect
    go.wait()
    serve(*args)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve(log, env, timeout_s, data_allowance_s, act, args) -> None:
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {name: str(value) for name, value in env.items()}

    def command() -> None:
        with one_voice(), join("cpu", timeout_s, data_allowance_s) as ranks:
            act(ranks, *args)

    cli.app = command
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    cli.main()
    sys.stdout.flush()
    sys.stderr.flush()
