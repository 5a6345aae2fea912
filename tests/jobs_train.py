"""Whole training jobs for tests: `summerlm train` on forked ranks, with a fault if one is wanted.

Each rank runs the command itself, with its own arguments and environment, as torchrun starts it;
the job's store is kept by the test's process. A fault is a function of the rank, called in its
process before the command: it patches what the command will call.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from jobs import Job, fork_ranks

from summerlm import cli
from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.store import Store
from summerlm.core.record import read_rows
from summerlm.recipes import pretrain
from summerlm.train.feed import Feed
from summerlm.train.step import Stepper

Fault = Callable[[int], None]


class Training(Job):
    """Starts `summerlm train config overrides` on every rank."""

    def __init__(
        self,
        config: Path,
        folder: Path,
        *overrides: str,
        world: int = 2,
        fault: Fault | None = None,
    ) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self.log.unlink(missing_ok=True)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.start = time.monotonic()
        calls = []
        words = ["summerlm", "train", str(config), f"run.folder={folder}", "run.device=cpu"]
        for rank in range(world):
            env = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "TORCHELASTIC_RESTART_COUNT": 0,
                "TORCHELASTIC_RUN_ID": "test",
            }
            calls.append((self.log, env, [*words, *overrides], fault))
        self.ranks = fork_ranks(_serve, calls)

    def await_step(self, step: int) -> None:
        """Wait until a step is on record."""
        deadline = time.monotonic() + 60
        while step not in steps_of(self.folder):
            assert time.monotonic() < deadline, self.log.read_text()
            assert any(rank.is_alive() for rank in self.ranks), self.log.read_text()
            time.sleep(0.005)


def _serve(log, env, words, fault) -> None:
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {name: str(value) for name, value in env.items()}
    sys.argv = words
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if fault is not None:
        fault(env["RANK"])
    cli.main()


def run_job(config, folder, *overrides, world=2, fault=None, within_s=60):
    """Run a job to its end; gives its exit codes by rank, and what it printed."""
    with Training(config, folder, *overrides, world=world, fault=fault) as job:
        codes, words, _ = job.end(within_s)
    return codes, words


def rows_of(folder, kind="train", file="metrics.jsonl"):
    return [row for row in read_rows(folder / file) if row["kind"] == kind]


def steps_of(folder):
    """The rows of all recorded steps, by step; each stands there once."""
    rows = rows_of(folder)
    table = {row["step"]: row for row in rows}
    assert len(table) == len(rows)
    return table


def learning(folder):
    """What a run's steps came to, to the bit."""
    names = ("loss", "grad_norm", "update_norm", "batch_sha", "updated", "tokens", "lr")
    return {step: tuple(row[name] for name in names) for step, row in steps_of(folder).items()}


def shas(folder):
    return {step: row["batch_sha"] for step, row in steps_of(folder).items()}


def losses(folder):
    return {step: row["loss"] for step, row in steps_of(folder).items()}


def saved(folder, step=None):
    """All bits of a checkpoint, of weights and moments; of the newest if no step is named."""
    store = Store(folder / "checkpoints", lambda line: None)
    path = store.latest() if step is None else store.path(step)
    return {
        f"{stem}/{name}": tensor
        for stem in ("model", "optimizer")
        for name, tensor in read_tensors(path, stem).items()
    }


def same_bits(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# faults


def at_step(step: int, act: Callable[[], None], rank: int | None = None) -> Fault:
    """Do something when a step is complete, before its hooks."""

    def fault(own: int) -> None:
        train = pretrain.train

        def faulty(*args, **kwargs):
            for event in train(*args, **kwargs):
                if event.step == step and rank in (None, own):
                    act()
                yield event

        pretrain.train = faulty

    return fault


def in_forward(change: Callable, steps: dict[int, str], rank: int) -> Fault:
    """Change what one rank's forward pass gives in some steps.

    `change(word, stepper, micro, objective, per_target)` gives objective and per_target.
    """

    def fault(own: int) -> None:
        forward, call = Stepper._forward, Stepper.__call__

        def counting(self, batch, number, rate, **more):
            self.number = number
            return call(self, batch, number, rate, **more)

        def changed(self, micro):
            given = forward(self, micro)
            word = steps.get(self.number)
            return given if word is None or own != rank else change(word, self, micro, *given)

        Stepper.__call__, Stepper._forward = counting, changed

    return fault


def in_data(change: Callable[[Iterator], Iterator], rank: int) -> Fault:
    """Change what one rank's loader gives."""

    def fault(own: int) -> None:
        make = Feed.__init__

        def made(self, *args, **kwargs):
            make(self, *args, **kwargs)
            if own == rank:
                self._batches = change(self._batches)

        Feed.__init__ = made

    return fault


def term(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)
