"""Whether ranks that hold the same rows hold the same bits.

Flow: at every save `flight` exchanges each rank's `checksums` and hands all of them to
`check_replicas` before anything is written. Replicas make the same updates from the same reduced
gradients, so a difference means that memory or arithmetic failed somewhere.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from summerlm.checkpoint.pieces import Piece, Plan, Tables
from summerlm.core.errors import CorruptionError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHOWN = 3  # tensors named in a message


def checksums(tables: Tables, plan: Plan, rank: int) -> list[int]:
    """Sum up the bits of every piece that this rank shares with others, on their device.

    A sum of the bits, taken as integers, differs where any one bit differs.

    Args:
        tables: What this rank holds.
        plan: Who holds what.
        rank: This rank.

    Returns:
        One number for each piece of `shared_pieces`, in that order.
    """
    tensors = [tables[p.stem][p.name].tensor.detach() for p in shared_pieces(plan, rank)]
    if not any(tensor.is_cuda for tensor in tensors):
        # by one thread, as in `snapshot.copy_into`; sums wrap round, as the GPU's do
        return [int(np.add.reduce(_words(t).numpy(), dtype=np.int64)) for t in tensors]
    sums = [_words(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return [int(value) for value in torch.stack(sums).tolist()]


def shared_pieces(plan: Plan, rank: int) -> list[Piece]:
    """List the pieces that a rank holds and others hold too, in order."""
    return [piece for piece in plan.held_twice() if rank in plan.holders[piece]]


def check_replicas(plan: Plan, sums: Sequence[Sequence[int]], step: int) -> None:
    """Compare the checksums of all ranks; every rank comes to the same verdict.

    Args:
        plan: Who holds what.
        sums: What `checksums` returned on each rank, by rank.
        step: The step, for the message.

    Raises:
        CorruptionError: If replicas differ; the message names tensors and ranks.
    """
    found: dict[Piece, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, own in enumerate(sums):
        for piece, value in zip(shared_pieces(plan, rank), own, strict=True):
            found[piece][value].append(rank)
    differing = {piece: groups for piece, groups in found.items() if len(groups) > 1}
    if not differing:
        return
    lines = [_describe(piece, list(groups.values())) for piece, groups in differing.items()]
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    raise CorruptionError(
        f"step {step}: replicas differ in {'; '.join(lines[:SHOWN])}{more}: a device or its memory "
        "failed silently; nothing is saved, start again without it from the checkpoint before"
    )


def _describe(piece: Piece, groups: list[list[int]]) -> str:
    """Name a tensor and who holds what of it; where most agree, those who don't."""
    groups = sorted(groups, key=len, reverse=True)
    words = [", ".join(map(str, ranks)) for ranks in groups]
    place = f"{piece.stem} {piece.name} (rows {piece.start} to {piece.stop})"
    if len(groups[0]) > len(groups[1]):
        return f"{place} on rank {', '.join(words[1:])} against {words[0]}"
    return f"{place} between ranks {' and '.join(words)}"


def _words(tensor: Tensor) -> Tensor:
    """View a tensor's bits as integers, as wide ones as fit."""
    flat = tensor.contiguous().view(-1)
    size = tensor.dtype.itemsize
    if (flat.numel() * size) % 8:
        return flat.view(_INTEGERS[size])
    if (flat.storage_offset() * size) % 8:
        flat = flat.clone()  # replicas take the same words wherever their rows begin
    return flat.view(torch.int64)
