"""What a person should know beside a plan's figures.

Flow: `planning` calls `notes` when the figures are known, and shows the lines.
"""

from collections.abc import Iterator
from typing import Any

from summerlm.plan.memory import Footprint
from summerlm.recipes.probing import Probed
from summerlm.recipes.room import Room
from summerlm.recipes.settings import Settings
from summerlm.recipes.terms import Terms

GIB = 2**30


def notes(
    settings: Settings,
    terms: Terms,
    room: Room,
    memory: Footprint,
    fits: dict[str, Any] | None,
    probed: Probed | None,
) -> Iterator[str]:
    """Say what would go wrong, and what a figure rests on that isn't modelled.

    Args:
        settings: The run's settings.
        terms: What it is planned for.
        room: What memory there is.
        memory: Of a step.
        fits: What `Room.largest` found, or None.
        probed: What was measured, or None.

    Yields:
        Lines.
    """
    if room.limit is not None and fits is not None and memory.total > room.limit:
        need, there = memory.total / GIB, room.limit / GIB
        yield f"a step needs {need:.1f} GiB, and {there:.1f} GiB are there: {_way(room, fits)}"
    if terms.hardware is not None and settings.data.lanes % terms.world:
        yield (
            f"{terms.world} devices don't divide data.lanes ({settings.data.lanes}): "
            "the run would refuse them"
        )
    if settings.parallel.compile:
        yield (
            "blocks are compiled: what they keep is estimated as selective recomputation's; "
            "--probe measures it"
        )
    yield from _unmodelled(settings, terms, probed)
    if probed is not None:
        yield from _measured(settings, memory, probed)


def _way(room: Room, fits: dict[str, Any]) -> str:
    """Say what would fit."""
    rows, recompute = fits["micro_batch_rows"], fits["recompute"]
    if rows:
        more = f" with parallel.recompute={recompute}" if recompute else ""
        return f"parallel.micro_batch_rows={rows}{more} fits"
    how = "with everything recomputed"
    if room.shards > 1:
        how += f" and a model shared over {room.shards}"
    fewest = room.fewest()
    if fewest is None:
        among = f"any number of devices that divides data.lanes ({room.lanes})"
        return f"not one row fits, {how}, and sharing the model over {among} isn't enough"
    count = "" if fewest == room.world else f"--count {fewest} with "
    return f"not one row fits, {how}; {count}parallel.shard_ranks=all would do"


def _unmodelled(settings: Settings, terms: Terms, probed: Probed | None) -> Iterator[str]:
    """Say where the MFU, or memory, isn't that of the precision asked for."""
    planned = terms.hardware is not None and probed is None
    if planned and settings.train.precision == "float32":
        yield (
            "train.precision=float32: MFU is a share of the bf16 peak, and float32 products reach "
            "far less of it: state what yours reach (--mfu)"
        )
    if settings.parallel.float8:
        if planned:
            yield (
                "parallel.float8: MFU is a share of the bf16 peak; what fp8 gains isn't in it: "
                "state what yours reach (--mfu)"
            )
        yield "parallel.float8: its copies of weights and activations are not in the memory"


def _measured(settings: Settings, memory: Footprint, probed: Probed) -> Iterator[str]:
    """Say how what was measured goes with what was predicted."""
    step = (probed.peak_bytes - probed.base_bytes) / GIB
    base = f" and {probed.base_bytes / GIB:.2f} GiB the process itself" if probed.base_bytes else ""
    yield (
        f"of the probe's peak {step:.2f} GiB are the run's, a checkpoint's copy included{base}; "
        f"predicted for tensors were {memory.total / GIB:.2f} GiB: the probe's figure holds"
    )
    if not probed.own_text:
        yield (
            "the probe read Python's library, for the run's text isn't all on this machine: how "
            "long its own takes to read is not in the step"
        )
    if settings.parallel.shard_ranks != 1:
        yield (
            "the probe is one process with a whole model: its peak is without parallel.shard_ranks"
        )
