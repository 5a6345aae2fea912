"""One side of the benchmark `parallel.py`: a process alone or the ranks of a job, asked for steps.

The job is a JSON object in the first argument: `config`, `overrides` and `world`. The process that
is started is rank 0 and starts the others. It answers each line that it reads, a JSON object, with
a line of JSON:
    {"steps": n}   makes n steps by the loop of a run, data and messages included: seconds, tokens,
                   and by rank the bytes that went out over TCP in a step;
    {"save": n}    makes n steps without a save, saves and waits for it, and saves again while n
                   steps are made: seconds of each.
"""

import json
import math
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from watched_job import die_with_parent

from summerlm.core.config import read_settings
from summerlm.core.files import RunFolder
from summerlm.core.ranks import Ranks, join
from summerlm.core.record import Recorder
from summerlm.core.runtime import StopRequest
from summerlm.recipes.opening import Run, open_run
from summerlm.recipes.pretrain import Equipment, equip, make_steps
from summerlm.recipes.settings import Settings
from summerlm.train.loop import Event

KNOWN = 1 << 20  # bytes of a message by which the sockets of the host's messages are known
SENT = 200  # where struct tcp_info of linux/tcp.h holds tcpi_bytes_sent


def main() -> None:
    job = json.loads(sys.argv[1])
    overrides = [*job["overrides"], "run.device=cpu", "parallel.timeout_s=100000"]
    settings = read_settings(Settings, Path(job["config"]), overrides)
    others = start_others(job["world"]) if "RANK" not in os.environ else []
    with StopRequest() as stop, join("cpu", settings.parallel.timeout_s) as ranks:
        folder = RunFolder(settings.run.folder)
        run = open_run(settings, folder, ranks, lambda _: None, stop)
        side = Side(run, stop)
        for request in requests(ranks):
            answer = side.steps(**request) if "steps" in request else side.save(**request)
            if ranks.leads:
                print(json.dumps(answer), flush=True)
        side.close()
    for other in others:
        other.wait()


def start_others(world: int) -> list[subprocess.Popen[bytes]]:
    """Make this process rank 0 of a job on this machine, and start the other ranks."""
    if world == 1:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    others = []
    for rank in range(1, world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        others.append(
            subprocess.Popen(
                [sys.executable, *sys.argv],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **place},
                preexec_fn=die_with_parent,
            )
        )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    return others


def requests(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Read what rank 0 is asked, on all ranks, until its input ends."""
    while line := ranks.exchange(sys.stdin.readline() if ranks.leads else "")[0]:
        yield json.loads(line)


class Side:
    """A run whose steps are made on demand, without its record.

    Args:
        run: The run.
        stop: A request to stop, which never comes.
    """

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self._run, self._ranks = run, run.ranks
        self._saves, self._journeys = Saves(), Journeys()
        self._gear: Equipment = equip(run, Recorder([self._saves]), stop)
        self._steps = self._polled(make_steps(run, self._gear, stop))
        self._event: Event | None = None
        self._host = self._sockets_of_the_host() if self._ranks.world > 1 else set()

    def steps(self, steps: int) -> dict[str, Any]:
        """Make steps.

        Args:
            steps: How many.

        Returns:
            Seconds, tokens, and for each rank the bytes that it sent in a step: of tensors, of
            the host's messages, and to the job's store; of the tensors, those of Muon; and what
            is needed.
        """
        journeys = self._journeys.bytes
        before, began = sent(), time.perf_counter()
        self._make(steps)
        seconds = time.perf_counter() - began
        kinds = {"tensors": 0.0, "messages": 0.0, "store": 0.0}
        for name, (bytes_, kind) in sent().items():
            kind = "messages" if name in self._host else kind
            kinds[kind] += (bytes_ - before.get(name, (0, kind))[0]) / steps
        return {
            "seconds": seconds,
            "tokens": steps * self._run.settings.train.batch_tokens,
            "sent": self._ranks.exchange(kinds),
            "muon": self._ranks.exchange((self._journeys.bytes - journeys) / steps),
            **needed_bytes(self._run),
        }

    def save(self, save: int) -> dict[str, Any]:
        """Save once waiting, once while steps are made.

        Args:
            save: Steps that are made meanwhile, at least; all that it takes are.

        Returns:
            Seconds: of the save waited for; that training stood still for the other and that this
            took in all; of a step without a save and, while it was under way, of a step with it.
        """
        saver = self._gear.saver
        self._make(1)
        alone = self._timed(lambda: self._make(save)) / save
        synchronous = self._timed(self._save_and_wait)
        self._make(1)
        self._saves.rows.clear()
        steps, began = 0, time.perf_counter()
        assert self._event is not None
        saver.save(self._event)
        stood = time.perf_counter() - began
        while steps < save or not self._saves.rows:
            self._make(1)
            steps += 1
        beside = time.perf_counter() - began - stood
        row = self._saves.rows[-1]
        return {
            "bytes": row["bytes"],
            "synchronous": max(self._ranks.exchange(synchronous)),
            "stall": max(self._ranks.exchange(row["stall_s"])),
            "asynchronous": row["seconds"],
            "step": alone,
            "step_meanwhile": beside / steps,
        }

    def close(self) -> None:
        """Finish what is under way."""
        self._gear.loader.close()
        self._gear.saver.close()

    def _make(self, steps: int) -> None:
        for event in islice(self._steps, steps):
            self._event = event

    def _polled(self, steps: Iterator[Event]) -> Iterator[Event]:
        for event in steps:
            self._gear.saver.poll(event.data.reports)
            yield event

    def _save_and_wait(self) -> None:
        assert self._event is not None
        self._gear.saver.save(self._event)
        self._gear.saver.finish()

    def _timed(self, act: Any) -> float:
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    def _sockets_of_the_host(self) -> set[str]:
        """Find the sockets of the host's messages, by sending so much that it can't be missed."""
        before = sent()
        self._ranks.exchange(b"." * KNOWN)
        after = sent()
        return {name for name in after if after[name][0] - before.get(name, (0,))[0] > KNOWN // 2}


class Saves:
    """A sink that keeps what the run says of its saves."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, kind: str, fields: dict[str, Any], line: str | None) -> None:
        """Take one event."""
        if kind == "incident":
            raise SystemExit(f"the figures are void: {line}")
        if kind == "save":
            self.rows.append(fields)

    def close(self) -> None:
        """Keep them."""


def sent() -> dict[str, tuple[int, str]]:
    """Ask the kernel what this process sent over each of its TCP connections, and of which kind."""
    found = {}
    store = int(os.environ.get("MASTER_PORT", "0"))
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile
            continue
        with copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            ports = {copy.getsockname()[1]}
            try:
                ports.add(copy.getpeername()[1])
            except OSError:  # listens
                continue
            kind = "store" if store in ports else "tensors"
            # a number is given again to another socket when one is closed: the inode tells
            node = os.fstat(copy.fileno()).st_ino
            found[f"{name}-{node}"] = struct.unpack_from("=Q", info, SENT)[0], kind
    return found


def needed_bytes(run: Run) -> dict[str, float]:
    """Count what each rank sends in a step, on average over ranks, W of them.

    Args:
        run: The run; all ranks share one copy, or each has its own.

    Returns:
        `least`: for a replicated layout 2 (W - 1) / W of the gradients' bytes, by which a ring
        adds up; for a sharded one (W - 1) / W of the weights, in the dtype they travel in, and of
        the gradients. And what comes by design: `again`, blocks gathered once more for the backward
        pass; `added_up`, what gloo sends more than a reduce-scatter would, as it adds up all
        everywhere.
    """
    world, layout = run.ranks.world, run.layout
    sizes = {name: math.prod(part.shape) for name, part in layout.parts.items()}
    share, gradients = (world - 1) / world, 4 * sum(sizes.values())
    if layout.shards == 1:
        return {"least": 2 * share * gradients, "again": 0.0, "added_up": 0.0}
    width = 2 if run.dtype is not None else 4
    blocks = width * sum(size for name, size in sizes.items() if name.startswith("blocks."))
    root = 4 * sum(size for name, size in sizes.items() if not name.startswith("blocks."))
    return {
        "least": share * (blocks + root + gradients),
        "again": share * blocks,
        "added_up": share * gradients,
    }


class Journeys:
    """Counts what this rank sends of Muon's matrices, which nothing else exchanges so."""

    def __init__(self) -> None:
        self.bytes = 0
        self._send = dist.all_to_all_single
        dist.all_to_all_single = self

    def __call__(self, came: Tensor, sent: Tensor, into: Any, out: Any, group: Any) -> Any:
        """Send; what a rank keeps is not counted."""
        others = sum(out) - out[dist.get_rank(group)]
        self.bytes += others * sent.element_size()
        return self._send(came, sent, into, out, group=group)


if __name__ == "__main__":
    main()
