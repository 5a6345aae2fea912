"""Run a function on several gloo ranks of this machine: real processes, for tests."""

import gc
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from summerlm.core import liveness
from summerlm.core.ranks import join


def _serve(
    rank: int, world: int, folder: str, port: int, act: Callable[..., Any], args: tuple[Any, ...]
):
    gc.freeze()  # what the parent left is not this process's to collect
    torch.set_num_threads(1)
    liveness.GRACE_S = 1.0  # many tests kill the rank that keeps the store, and wait for that
    if (inductor := sys.modules.get("torch._inductor.config")) is not None:
        inductor.compile_threads = 1  # the test process's own pool of threads has no threads here
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with join("cpu", timeout_s=60) as ranks:
            torch.save(act(ranks, *args), Path(folder, f"result-{rank}"))
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise


def run_ranks(act: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """Call `act(ranks, *args)` on every rank; gives their results, by rank.

    `act` is a function of a test module, not one inside a test; a failure on any rank fails the
    caller with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            mp.start_processes(
                _serve, (world, folder, port, act, args), nprocs=world, start_method="fork"
            )
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            errors = [file.read_text() for file in sorted(Path(folder).glob("error-*"))]
            raise AssertionError("\n".join(errors) or "a rank was killed") from None
        return [
            torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)
        ]
