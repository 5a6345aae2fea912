"""Checkpoints for tests: small tables with known bits, published as a run publishes them."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from summerlm.checkpoint.flight import Flight
from summerlm.checkpoint.store import Retention, Store
from summerlm.core.errors import SaveError
from summerlm.core.parts import Part
from summerlm.core.ranks import ALONE, Ranks


def whole(step):
    """The whole tensors of a step, by stem and name: odd shapes, few rows, a scalar, bfloat16."""
    draw = torch.Generator().manual_seed(step)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    return {
        "model": {
            "a.weight": normal(40, 30),
            "b.norm": normal(7),
            "c.few": normal(2, 3, 5),
            "d.half": normal(5, 3).bfloat16(),
        },
        "optimizer": {
            "a.weight/m": normal(40, 30),
            "a.weight/step": torch.tensor(float(step)),
            "c.few/m": normal(2, 3, 5),
        },
    }


def cut(tables, shard=0, shards=1):
    """The rows of one shard, cut as FSDP2 does: runs of equal length, the last ones short."""

    def part(tensor):
        if not tensor.shape:
            return Part.whole(tensor.clone())
        rows = -(-tensor.shape[0] // shards)
        start = min(shard * rows, tensor.shape[0])
        return Part(tensor[start : start + rows].clone(), start, tuple(tensor.shape))

    return {s: {n: part(t) for n, t in table.items()} for s, table in tables.items()}


def empty_like(tables):
    """Parts of the same rows that hold nothing yet."""
    return {
        s: {n: p.like(torch.full_like(p.tensor, -7)) for n, p in table.items()}
        for s, table in tables.items()
    }


def same(one, two):
    """Whether two tables of parts hold the same bits."""
    return all(
        torch.equal(one[s][n].tensor, two[s][n].tensor) and one[s][n].start == two[s][n].start
        for s in one
        for n in one[s]
    )


def files_of(step):
    return {"config.toml": b"[model]\n", "state.json": b'{"step": %d}' % step}


def make_flight(store, tables, ranks=ALONE, keep=100):
    return Flight(store, ranks, tables, identity={"tokenizer": "t"}, retention=Retention(keep))


def publish(store: Store, step, tables=None, ranks=ALONE, keep=100):
    """Publish a checkpoint and wait for it."""
    flight = make_flight(store, tables or cut(whole(step)), ranks, keep)
    flight.start(step, None, lambda values: files_of(step))
    outcome = flight.wait()
    if outcome.error:
        raise SaveError(outcome.error)
    return store.path(step)


class Thread(Ranks):
    """A rank of a job whose ranks are threads of this process."""

    def meet(self, board, barrier):
        object.__setattr__(self, "_meeting", (board, barrier))
        return self

    def exchange(self, value):
        board, barrier = self._meeting
        board[self.rank] = pickle.dumps(value)
        barrier.wait()
        values = [pickle.loads(said) for said in board]
        barrier.wait()
        return values


def in_threads(world, act):
    """Call `act(ranks)` on ranks that are threads; gives their results, by rank."""
    board, barrier = [b""] * world, threading.Barrier(world, timeout=30)

    def serve(rank):
        try:
            return act(Thread(rank, world).meet(board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        jobs = [pool.submit(serve, rank) for rank in range(world)]
    errors = [job.exception() for job in jobs if job.exception() is not None]
    if errors:  # a broken barrier only follows from another rank's error
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [job.result() for job in jobs]
