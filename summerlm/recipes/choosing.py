"""`parallel.memory = "auto"`: micro-batch and recomputation, tried out as a run begins.

Flow: `opening` calls `settle_memory` on every rank before the model is laid out:
    1. a run that goes on takes what it began with, for another micro-batch adds up in another
       order: `KEPT` in its folder says what, and for which ranks and devices;
    2. else `tracing` says what fits, without recomputation, selective or full, in that order;
    3. on a GPU the largest micro-batch that fits is taken, after two small ones have corrected the
       prediction by what the allocator saw; on a CPU, where small ones may be faster, those that
       fit are timed by real steps (`trying`);
    4. all ranks take the same, which the run says and writes down.
"""

import math
import socket
from dataclasses import asdict, dataclass
from typing import Any

import torch

from summerlm.core.errors import DeviceMemoryError
from summerlm.core.files import RunFolder, read_json
from summerlm.core.hardware import describe, free_memory
from summerlm.core.ranks import Ranks
from summerlm.plan.cost import USABLE
from summerlm.recipes.room import RECOMPUTE
from summerlm.recipes.settings import Settings, derive
from summerlm.recipes.trying import Trial, with_choice

KEPT = "memory.json"
SIZES = 4  # micro-batches that are timed on a CPU: the largest that fits, and halves of it


@dataclass(frozen=True)
class Choice:
    """What was chosen, and for what.

    Attributes:
        micro_batch_rows: Rows of a micro-batch.
        recompute: What the backward pass computes anew.
        why: In words.
        circumstances: Under which it holds.
    """

    micro_batch_rows: int
    recompute: str | None
    why: str
    circumstances: dict[str, Any]


def settle_memory(
    settings: Settings,
    folder: RunFolder,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[Settings, str | None]:
    """Put a micro-batch and a recomputation in place of "auto"; every rank calls this.

    Args:
        settings: The run's settings.
        folder: Its folder, held by the leading rank.
        ranks: This process among those that train.
        device: Where this rank trains.
        dtype: Autocast's dtype, or None for float32.

    Returns:
        The settings to train under, and a line that says what was chosen; as they are, and None,
        where nothing is to be chosen.

    Raises:
        DeviceMemoryError: If not even one row fits with everything recomputed.
    """
    if settings.parallel.memory is None:
        return settings, None
    here = _circumstances(settings, ranks, device)
    kept = ranks.lead(lambda: _read(folder))
    if kept is not None and kept["circumstances"] == here:
        choice = Choice(**kept)
        why = f"as the run began ({folder.path / KEPT})"
    else:
        choice = choose(settings, ranks, device, dtype, here)
        why = choice.why
        ranks.lead(lambda: folder.write_json(KEPT, asdict(choice)))
    recompute = choice.recompute or "no"
    line = (
        f"parallel.memory: {choice.micro_batch_rows} rows at once, {recompute} recomputation: {why}"
    )
    return with_choice(settings, choice.micro_batch_rows, choice.recompute), line


def choose(
    settings: Settings,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype | None,
    circumstances: dict[str, Any],
) -> Choice:
    """Try micro-batches out; every rank calls this.

    Args:
        settings: The run's settings.
        ranks: This process among those that train.
        device: Where this rank trains.
        dtype: Autocast's dtype, or None for float32.
        circumstances: Kept with the choice.

    Returns:
        The choice, the same on all ranks.

    Raises:
        DeviceMemoryError: If not even one row fits with everything recomputed.
    """
    limit = _limit(ranks, device)
    own = derive(settings).rows // ranks.world
    trial = Trial(settings, ranks, device, dtype)
    for recompute in RECOMPUTE:
        rows = trial.largest(own, recompute, limit)
        if rows:
            break
    else:
        need = trial.predict(1, own, "full") / 2**30
        raise DeviceMemoryError(
            f"parallel.memory = 'auto': one row of {settings.model.context} needs {need:.1f} GiB "
            f"with everything recomputed, and {limit / 2**30:.1f} GiB are free; share the model "
            "over more ranks (parallel.shard_ranks), or make it smaller"
        )
    if device.type == "cuda":
        why = f"the most rows that fit into {limit / 2**30:.1f} GiB"
        return Choice(rows, recompute, why, circumstances)
    seconds = {size: trial.seconds_per_row(size, own, recompute) for size in _sizes(rows, own)}
    best = min(seconds, key=seconds.__getitem__)
    told = ", ".join(f"{size}: {1000 * s:.3g} ms" for size, s in seconds.items())
    return Choice(best, recompute, f"the fastest a row of those timed ({told})", circumstances)


def _sizes(rows: int, own: int) -> list[int]:
    """List the micro-batches to be timed: the largest that fits, then about halves."""
    sizes: list[int] = []
    while rows and len(sizes) < SIZES:
        sizes.append(rows)
        rows = math.ceil(own / (2 * math.ceil(own / rows))) if rows > 1 else 0
    return sizes


def _limit(ranks: Ranks, device: torch.device) -> int:
    """Give the bytes that each rank may use: those of the rank that has least."""
    free = free_memory(device)
    if free is None:
        return 2**63
    if device.type == "cuda":
        share = USABLE * free
    else:  # ranks of this machine share its memory
        machines = ranks.exchange(socket.gethostname())
        share = USABLE * free / machines.count(socket.gethostname())
    return int(min(ranks.exchange(share)))


def _circumstances(settings: Settings, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Say what a choice depends on, and a restart must share to take it over."""
    about = describe(device)
    return {
        "device": about.get("accelerator", device.type),
        "ranks": ranks.world,
        "shard_ranks": settings.parallel.shards(ranks.world),
        "rows": derive(settings).rows,
        **{name: getattr(settings.parallel, name) for name in ("attention", "compile", "float8")},
    }


def _read(folder: RunFolder) -> dict[str, Any] | None:
    path = folder.path / KEPT
    return read_json(path) if path.exists() else None
