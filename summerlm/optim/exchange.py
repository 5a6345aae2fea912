"""Blocks of matrices that travel: from ranks that hold rows of them to the one that works on them.

Flow: `muon.Muon` has blocks dealt to owners in rounds by `deal`, and makes an `Exchange` for each
round. A rank alone owns all and sends nothing.

Shapes: R rows and S columns of a block; r <= R of its rows that a rank holds.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Block(NamedTuple):
    """Rows of a matrix that are worked on together."""

    name: str
    start: int
    stop: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Its shape, (R, S)."""
        return self.stop - self.start, self.columns

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return (self.stop - self.start) * self.columns


def deal(blocks: Sequence[Block], owners: int, limit: int) -> list[list[list[Block]]]:
    """Share blocks out so that all owners work about as long, in rounds of bounded size.

    Args:
        blocks: What is to be shared out.
        owners: How many share.
        limit: Elements that an owner takes in one round; a larger block has its own.

    Returns:
        For each round each owner's blocks; those of one shape stand together.
    """
    loads = [0] * owners
    shares: list[list[Block]] = [[] for _ in range(owners)]
    for block in sorted(blocks, key=_work, reverse=True):  # the largest first: an even fill
        owner = loads.index(min(loads))
        loads[owner] += _work(block)
        shares[owner].append(block)
    runs = [_runs(sorted(share, key=lambda block: sorted(block.shape)), limit) for share in shares]
    return [list(round_) for round_ in zip_longest(*runs, fillvalue=[])]


class Exchange:
    """The journeys of one round's blocks.

    Args:
        owned: Each rank's blocks in this round.
        held: For each rank the rows of each matrix that it holds, as (start, stop), ascending.
        rank: This rank's number in the group.
        group: The ranks that share the matrices; None for a rank alone.
    """

    def __init__(
        self,
        owned: Sequence[Sequence[Block]],
        held: Sequence[Mapping[str, tuple[int, int]]],
        rank: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._group = group
        self._held = held[rank]
        self._own = owned[rank]
        self._all = [block for share in owned for block in share]
        self.longer = [max(block.shape) for block in self._all]  # sides, as `pieces` orders them
        # rows of each block: what I hold of all, and what each rank holds of mine
        self._mine = [_rows(block, held[rank]) for block in self._all]
        self._theirs = [[_rows(block, rows) for block in self._own] for rows in held]
        to_owners = [[block.columns * len(_rows(block, held[rank])) for block in s] for s in owned]
        self._out = [sum(sizes) for sizes in to_owners]  # elements, by owner
        self._back = [size for sizes in to_owners for size in sizes]  # elements, by block
        self._in = [
            [block.columns * len(rows) for block, rows in zip(self._own, theirs, strict=True)]
            for theirs in self._theirs
        ]  # elements, by rank and block

    def pieces(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """View this rank's rows of all blocks of the round.

        Args:
            tensors: This rank's rows of each matrix, (rows held, S).

        Returns:
            Its rows of each block, (r, S), in an order of their own; some have no rows.
        """
        views = []
        for block, rows in zip(self._all, self._mine, strict=True):
            start, _ = self._held[block.name]
            views.append(tensors[block.name][rows.start - start : rows.stop - start])
        return views

    def at_owners(
        self, pieces: Sequence[Tensor], work: Callable[[list[Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """Let each block's owner work on the whole block; all ranks of the group call this.

        Args:
            pieces: This rank's rows, ordered as `pieces` gives them, all of one dtype.
            work: Takes the whole blocks of an owner, (R, S) each, and returns as many, of the same
                shapes and dtype.

        Returns:
            This rank's rows of the results, ordered as `pieces`.
        """
        if self._group is None:
            return work(list(pieces))
        came = self._travel(pieces, self._out, list(map(sum, self._in)))
        by_rank = [
            flat.split(sizes)
            for flat, sizes in zip(came.split(list(map(sum, self._in))), self._in, strict=True)
        ]
        whole = [
            torch.cat(rows).view(block.shape)
            for block, *rows in zip(self._own, *by_rank, strict=True)
        ]
        done = work(whole) if whole else []
        sent = [
            block[rows.start - own.start : rows.stop - own.start]
            for theirs in self._theirs
            for own, block, rows in zip(self._own, done, theirs, strict=True)
        ]
        back = self._travel([came[:0], *sent], list(map(sum, self._in)), self._out)
        return [
            flat.view_as(piece) for flat, piece in zip(back.split(self._back), pieces, strict=True)
        ]

    def _travel(self, tensors: Sequence[Tensor], out: list[int], into: list[int]) -> Tensor:
        """Send each rank its share of some tensors laid end to end, and give what came."""
        sent = torch.cat([tensor.flatten() for tensor in tensors])
        came = sent.new_empty(sum(into))
        dist.all_to_all_single(came, sent, into, out, group=self._group)
        return came


def _rows(block: Block, held: Mapping[str, tuple[int, int]]) -> range:
    """Give the rows of a block that a rank holds, numbered in the matrix."""
    start, stop = held[block.name]
    first = max(start, block.start)
    return range(first, max(first, min(stop, block.stop)))


def _work(block: Block) -> int:
    """Estimate the work on a block: three products of (R, S) matrices a round, R the smaller."""
    return min(block.shape) * block.elements


def _runs(blocks: Sequence[Block], limit: int) -> list[list[Block]]:
    """Cut a list into runs of at most so many elements, or of one block."""
    runs: list[list[Block]] = []
    total = limit + 1
    for block in blocks:
        total += block.elements
        if total > limit:
            runs.append([])
            total = block.elements
        runs[-1].append(block)
    return runs
