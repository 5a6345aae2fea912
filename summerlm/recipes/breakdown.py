"""Where the time of a step goes: a table of its parts that sums to the step.

Flow: `break_down` reads a trace that `profiling` recorded:
    1. host events are nested as they were called, and each belongs to the innermost mark round it;
       what autograd does belongs to the part whose operation it differentiates, found by the
       sequence number that both carry; what ranks send each other is a part by itself;
    2. inside attention, what multiplies and all between is the kernel; a compiled block, which has
       no marks inside, is told apart by the names of its operations;
    3. each moment of a step is credited to one part: on a CPU to the innermost event, on a GPU to
       the kernel that runs, by the event that launched it; what is left is "other".
"""

import gzip
import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from summerlm.core.marks import MARK

STEP = "one step"  # the mark round each step of a trace
ATTENTION, KERNEL = "attention: rotary, biases", "attention: kernel"
BLOCK, PRODUCTS, BLOCK_KERNEL = "blocks: the rest", "blocks: products", "blocks: attention kernel"
GRADIENTS, RANKS, OTHER = "gradients: kept", "between ranks", "other"
OF_THE_MODEL = (
    "embedding",
    "attention: norm",
    "attention: qkv",
    ATTENTION,
    KERNEL,
    "attention: output",
    "MLP: norm",
    "MLP: gate, up",
    "MLP: activation",
    "MLP: down",
    PRODUCTS,
    BLOCK_KERNEL,
    BLOCK,
    "final norm",
    "head and loss",
)
AFTERWARDS = (
    GRADIENTS,
    RANKS,
    "gradient norm, clip",
    "optimizer: AdamW",
    "optimizer: Muon",
    "hooks",
    OTHER,
)
ORDER = ("data", *OF_THE_MODEL, *AFTERWARDS)
HOSTS_OWN = ("data", "hooks")  # what a GPU waits for
AGAIN = "recomputed"
PHASES = ("forward", "backward", AGAIN)
NOWHERE = (OTHER, "forward")

HOST_WORK = ("cpu_op", "user_annotation")
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
ENGINE = "autograd::engine::evaluate_function: "
OF_RANKS = ("c10d::", "FSDP::", "nccl:", "gloo:")
OF_ATTENTION = (
    *("scaled_dot_product", "flash_attn", "flash_attention", "plain_attention"),
    *("::bmm", "::baddbmm"),
)
MULTIPLIES = ("::mm", "::addmm", "::matmul", "_scaled_mm", "linear", *OF_ATTENTION)

Place = tuple[str, str]  # part and phase


@dataclass(eq=False)
class HostEvent:
    """Something the host did: an operation, a mark, a node of autograd; times in microseconds."""

    name: str
    start: float
    stop: float
    number: int | None  # by which a GPU's work names what launched it
    sequence: int | None  # of the node that it makes or differentiates
    parent: "HostEvent | None" = None
    depth: int = 0
    inner: "list[HostEvent]" = field(default_factory=list)
    place: Place | None = None

    def multiplies(self) -> bool:
        """Whether it is or calls a product of matrices."""
        return _names(self, MULTIPLIES) or any(event.multiplies() for event in self.inner)


@dataclass(frozen=True)
class Interval:
    """A stretch of time that wants to be credited to a place; the highest rank gets a moment."""

    start: float
    stop: float
    rank: float
    place: Place


def break_down(trace: Path) -> dict[str, Any]:
    """Say where the time of the steps in a trace went.

    Args:
        trace: A Chrome trace with marks, gzipped JSON.

    Returns:
        `steps` (how many), `seconds` (of one, on average), and `parts` in the order of a step: each
        a `part` with its `seconds` of a step and `share`, and where the model is differentiated
        seconds by phase, "forward", "backward" and "recomputed". The parts sum to the step.
    """
    with gzip.open(trace) as file:
        raw = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    events = nest(raw)
    steps = [event for event in events if event.name == STEP]
    settle_places(events)
    if work := [event for event in raw if event["cat"] in DEVICE_WORK]:
        intervals = _of_device(work, events)
    else:
        intervals = [Interval(e.start, e.stop, e.depth, e.place or NOWHERE) for e in events]
    spent = share_out(intervals, [(step.start, step.stop) for step in steps])
    return table_of(spent, len(steps))


def nest(raw: Iterable[Mapping[str, Any]]) -> list[HostEvent]:
    """Find what called what on the host.

    Args:
        raw: A trace's events of all kinds.

    Returns:
        The host's, by thread, each thread's by start; the thread that makes the steps first.
    """
    threads: dict[Any, list[HostEvent]] = defaultdict(list)
    ordered = sorted(raw, key=lambda e: (e["ts"], -e["dur"]))
    for found in (e for e in ordered if e["cat"] in HOST_WORK):
        arguments = found.get("args", {})
        start = float(found["ts"])
        event = HostEvent(
            found["name"],
            start,
            start + found["dur"],
            arguments.get("External id"),
            arguments.get("Sequence number"),
        )
        thread = threads[found["tid"]]
        parent = thread[-1] if thread else None
        while parent is not None and parent.stop < event.stop:
            parent = parent.parent
        if parent is not None:
            event.parent, event.depth = parent, parent.depth + 1
            parent.inner.append(event)
        thread.append(event)
    makes_steps = [any(e.name == STEP for e in thread) for thread in threads.values()]
    both = sorted(zip(makes_steps, threads.values(), strict=True), key=lambda pair: not pair[0])
    return [event for _, thread in both for event in thread]


def settle_places(events: Iterable[HostEvent]) -> None:
    """Decide which part each event belongs to.

    Args:
        events: What `nest` returned; changed in place.
    """
    makers: dict[int, str] = {}  # the part that made each node of autograd; the last event did
    for event in events:
        part, phase = event.parent.place or NOWHERE if event.parent else NOWHERE
        if event.place is not None:
            pass  # settled below, with the event round it
        elif event.name.startswith(MARK):
            event.place = event.name.removeprefix(MARK), "forward" if phase == "forward" else AGAIN
        elif event.name.startswith(ENGINE):
            kept = event.name.endswith("AccumulateGrad")
            part = GRADIENTS if kept else makers.get(event.sequence or -1, OTHER)
            event.place = part, "backward"
        elif event.name.startswith(OF_RANKS):
            event.place = RANKS, phase
        elif part == BLOCK and _names(event, MULTIPLIES):
            event.place = BLOCK_KERNEL if _names(event, OF_ATTENTION) else PRODUCTS, phase
        else:
            event.place = part, phase
        part, phase = event.place
        if phase == "forward" and event.sequence is not None:
            makers[event.sequence] = part
        if event.name == MARK + ATTENTION:
            for inner in _kernel(event):
                inner.place = KERNEL, phase


def _kernel(attention: HostEvent) -> Sequence[HostEvent]:
    """Find the kernel in an attention: what multiplies beside its linears, and all between."""
    own = [event for event in attention.inner if not event.name.startswith(MARK)]
    found = [index for index, event in enumerate(own) if event.multiplies()]
    return own[found[0] : found[-1] + 1] if found else ()


def _names(event: HostEvent, words: Sequence[str]) -> bool:
    return any(word in event.name for word in words)


def _of_device(work: Iterable[Mapping[str, Any]], events: Sequence[HostEvent]) -> list[Interval]:
    """Give a GPU's work to what launched it; communication counts while nothing else runs.

    Where the GPU does nothing while the host waits for data or is in hooks, these get the time.
    """
    places = {event.number: event.place or NOWHERE for event in events}
    intervals = []
    for found in work:
        start, arguments = float(found["ts"]), found.get("args", {})
        rank = 1.0 if "nccl" in found["name"].lower() else 2.0
        place = places.get(arguments.get("External id"), NOWHERE)
        intervals.append(Interval(start, start + found["dur"], rank, place))
    own = {MARK + name for name in HOSTS_OWN}
    hosts = (event for event in events if event.name in own)
    return [*intervals, *(Interval(e.start, e.stop, 0.0, e.place or NOWHERE) for e in hosts)]


def share_out(
    intervals: Iterable[Interval], windows: Iterable[tuple[float, float]]
) -> dict[Place, float]:
    """Credit each moment to one place.

    Args:
        intervals: What wants to be credited; they may overlap.
        windows: The time that is shared out; windows don't overlap.

    Returns:
        How long each place was credited, in the intervals' unit; what nobody wants is `OTHER`. The
        sum is the windows' length.

    Example:
        >>> outer, inner = Interval(0, 10, 0, ("a", "")), Interval(4, 6, 1, ("b", ""))
        >>> share_out([outer, inner], [(2, 12)])
        {('a', ''): 6.0, ('b', ''): 2.0, ('other', 'forward'): 2.0}
    """
    ordered = sorted(intervals, key=lambda interval: interval.start)
    spent: dict[Place, float] = defaultdict(float)
    alive: list[tuple[float, int, Interval]] = []  # the highest rank first
    upcoming = 0
    for start, stop in sorted(windows):
        now = start
        while now < stop:
            while upcoming < len(ordered) and ordered[upcoming].start <= now:
                heapq.heappush(alive, (-ordered[upcoming].rank, upcoming, ordered[upcoming]))
                upcoming += 1
            while alive and alive[0][2].stop <= now:
                heapq.heappop(alive)
            until = min(stop, alive[0][2].stop) if alive else stop
            if upcoming < len(ordered):
                until = min(until, ordered[upcoming].start)
            spent[alive[0][2].place if alive else NOWHERE] += until - now
            now = until
    return dict(spent)


def table_of(spent: Mapping[Place, float], steps: int) -> dict[str, Any]:
    """Sum up by part.

    Args:
        spent: Microseconds by place.
        steps: How many steps they belong to.

    Returns:
        What `break_down` returns.
    """
    total = sum(spent.values())
    rows = []
    for part in sorted({part for part, _ in spent}, key=ORDER.index):
        phases = {p: spent.get((part, p), 0.0) / steps / 1e6 for p in PHASES}
        row: dict[str, Any] = {"part": part}
        if part in OF_THE_MODEL:
            row |= phases
        seconds = sum(phases.values())
        rows.append({**row, "seconds": seconds, "share": seconds * steps * 1e6 / total})
    return {"steps": steps, "seconds": total / steps / 1e6, "parts": rows}
