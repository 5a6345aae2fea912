"""Who takes part in a job: how its ranks find one another, and what becomes of their processes.

Flow: `ranks.join` calls `meet` before any process group is made; `liveness.Liveness` asks
`process_state` of the peers whose process it can see.
"""

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

from summerlm.core.errors import PeerLostError

POLL_S = 0.01


@dataclass(frozen=True)
class Peer:
    """One rank's process.

    Attributes:
        rank: Its number.
        host: Its machine's name.
        space: Where process numbers mean the same: one boot of one machine, one name space.
        process: Its process number.
        started: The kernel's count of ticks at its start: a number may be given out again.
        token: Drawn by the process, so that it knows itself from an earlier one of its rank.
    """

    rank: int
    host: str
    space: str
    process: int
    started: int
    token: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


def meet(store: dist.Store, rank: int, world: int, deadline_s: float) -> tuple[str, list[Peer]]:
    """Learn of all ranks of this start of the job; every rank calls this.

    A launcher that starts ranks again keeps its store, and on several machines it counts the
    starts of each apart. So nothing that an earlier start has left may be taken for this one's:
    rank 0 writes the roster down, the others answer to it where it names their own token, and
    rank 0 goes on when all have.

    Args:
        store: The launcher's store.
        rank: This rank.
        world: How many there are.
        deadline_s: Seconds after which ranks that are missing are given up.

    Returns:
        The name of this start, under which its keys lie, and its ranks.

    Raises:
        PeerLostError: If ranks are missing; the message says which.
    """
    me = Peer(rank, socket.gethostname(), _space(), os.getpid(), _started(), secrets.token_hex(8))
    store.set(f"hello/{rank}", json.dumps(asdict(me)))
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if rank == 0:
            hellos = [key for r in range(world) if store.check([key := f"hello/{r}"])]
            store.set("roster", json.dumps([v.decode() for v in store.multi_get(hellos)]))
        if store.check(["roster"]):
            peers = [Peer(**json.loads(hello)) for hello in json.loads(store.get("roster"))]
            name = peers[0].token  # rank 0's own, which no other start has
            if me in peers:
                store.set(f"answer/{name}/{me.token}", "")
            answers = [f"answer/{name}/{peer.token}" for peer in peers]
            if rank == 0 and len(peers) == world and store.check(answers):
                store.set(f"complete/{name}", "")
            if me in peers and store.check([f"complete/{name}"]):
                return name, peers
        time.sleep(POLL_S)
    words = ", ".join(str(r) for r in range(world) if not store.check([f"hello/{r}"]))
    raise PeerLostError(f"after {deadline_s:.0f} s ranks of the job are missing: {words or 'some'}")


def process_state(peer: Peer, observer: Peer) -> str | None:
    """Look at the process of a rank.

    Args:
        peer: The rank.
        observer: This process's own rank.

    Returns:
        The kernel's letter: "T" for a stopped one, "Z" for one that has ended, as "" does, of
        which nothing is left; None where this process can't see it.
    """
    if peer.space != observer.space:
        return None
    state, started = _read_stat(peer.process)
    return state if started == peer.started else ""


def _space() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)  # no Linux: nobody shares it, so nobody looks


def _started() -> int:
    return _read_stat(os.getpid())[1]


def _read_stat(process: int) -> tuple[str, int]:
    """The kernel's letter for a process and the tick it started at; nothing where it is gone."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])  # fields 3 and 22 of proc(5)
