"""Whether ranks that hold the same rows hold the same bits.

Flow: at every save `writing` sums up what a rank shares with others (`sum_shared`), what it writes
from its copy, and `flight` hands the sums of all ranks to `difference` before anything is
published. Replicas make the same updates from the same reduced gradients, so a
difference means that memory or arithmetic failed somewhere.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from summerlm.checkpoint.pieces import Piece, Plan
from summerlm.core.errors import CorruptionError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Sums = dict[Piece, int]

SHOWN = 3  # tensors named in a message


def sum_shared(plan: Plan, rank: int, give: Callable[[str, str], Tensor], *, written: bool) -> Sums:
    """Sum up the bits of what a rank shares with others, on their device.

    A sum of the bits, taken as integers, differs where any one bit differs.

    Args:
        plan: Who holds and who writes what.
        rank: This rank.
        give: Gives this rank's tensor by stem and name.
        written: Whether of the pieces that this rank writes, or of those that others do.

    Returns:
        One number for each piece.
    """
    pieces = [p for p in shared_pieces(plan, rank) if (plan.writer[p] == rank) is written]
    words = [_words(give(piece.stem, piece.name).detach()) for piece in pieces]
    if any(word.is_cuda for word in words):
        sums = torch.stack([word.sum(dtype=torch.int64) for word in words]).tolist()
    else:  # by one thread, as in `snapshot.copy_into`; sums wrap round, as the GPU's do
        sums = [int(np.add.reduce(word.numpy(), dtype=np.int64)) for word in words]
    return dict(zip(pieces, sums, strict=True))


def shared_pieces(plan: Plan, rank: int) -> list[Piece]:
    """List the pieces that a rank holds and others hold too, in order."""
    return [piece for piece in plan.held_twice() if rank in plan.holders[piece]]


def difference(plan: Plan, sums: Sequence[Sequence[int]], step: int) -> CorruptionError | None:
    """Compare the sums of all ranks; every rank comes to the same verdict.

    Args:
        plan: Who holds what.
        sums: The sum of each of `shared_pieces`, in that order, by rank; of a rank that couldn't
            even make them, nothing.
        step: The step, for the message.

    Returns:
        Where replicas differ, what to raise: it names tensors and ranks; else None.
    """
    found: dict[Piece, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, own in enumerate(sums):
        for piece, value in zip(shared_pieces(plan, rank) if own else (), own, strict=True):
            found[piece][value].append(rank)
    differing = {piece: groups for piece, groups in found.items() if len(groups) > 1}
    if not differing:
        return None
    lines = [_describe(piece, list(groups.values())) for piece, groups in differing.items()]
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return CorruptionError(
        f"step {step}: replicas differ in {'; '.join(lines[:SHOWN])}{more}: a device or its memory "
        "failed silently; this step is not saved, start again without it from the checkpoint before"
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
