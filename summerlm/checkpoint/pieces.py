"""Which rank writes which rows of which tensor: decided once, the same on every rank.

Flow: `plan_pieces` exchanges the tables of all ranks at the start of a run; `snapshot` copies the
pieces that this rank writes, `replicas` compares those that several hold, and the manifest lists
where each lies, so that `reading` finds the rows of any other layout.

A piece is a range of rows of a tensor that some ranks hold. Those who hold a piece hold it whole:
a layout cuts a tensor in one way, and replicas repeat it. Exactly one of them writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from summerlm.core.parts import Part
from summerlm.core.ranks import Ranks

Tables = Mapping[str, Mapping[str, Part]]  # by file stem ("model", "optimizer"), then by name


@dataclass(frozen=True, order=True)
class Piece:
    """A range of rows of a tensor.

    Attributes:
        stem: The table that the tensor belongs to.
        name: The tensor.
        start: Its first row.
        stop: The row after its last one.
    """

    stem: str
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Who holds and who writes each piece.

    Attributes:
        tensors: By stem and name: `dtype` and `shape` of the whole tensor.
        holders: The ranks that hold each piece, in order; only pieces that have rows.
        writer: The one of them that writes it.
        world: How many ranks there are.
    """

    tensors: Mapping[str, Mapping[str, Mapping[str, Any]]]
    holders: Mapping[Piece, list[int]]
    writer: Mapping[Piece, int]
    world: int

    def written_by(self, rank: int) -> list[Piece]:
        """List the pieces that a rank writes, in order."""
        return sorted(piece for piece, writer in self.writer.items() if writer == rank)

    def held_twice(self) -> list[Piece]:
        """List the pieces that several ranks hold, in order."""
        return sorted(piece for piece, ranks in self.holders.items() if len(ranks) > 1)

    def file(self, stem: str, rank: int) -> str:
        """Name the file of a table that a rank writes."""
        return f"{stem}-{rank:05d}-of-{self.world:05d}.safetensors"

    def table(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Give the manifest's account of all tensors.

        Returns:
            By stem and name: `dtype`, `shape`, and `pieces`, each a file, a first row and the row
            after the last.
        """
        found: dict[str, dict[str, dict[str, Any]]] = {
            stem: {name: {**facts, "pieces": []} for name, facts in tensors.items()}
            for stem, tensors in self.tensors.items()
        }
        for piece in sorted(self.writer):
            file = self.file(piece.stem, self.writer[piece])
            found[piece.stem][piece.name]["pieces"].append([file, piece.start, piece.stop])
        return found


def plan_pieces(tables: Tables, ranks: Ranks) -> Plan:
    """Agree with all ranks on who writes what; every rank calls this at the same place.

    Args:
        tables: What this rank holds.
        ranks: The ranks of the job.

    Returns:
        The plan, the same on every rank: bytes to write are balanced over the ranks.
    """
    own = {
        stem: {
            name: (str(part.tensor.dtype).removeprefix("torch."), part.shape, part.start, part.stop)
            for name, part in table.items()
        }
        for stem, table in tables.items()
    }
    tensors: dict[str, dict[str, dict[str, Any]]] = {stem: {} for stem in own}
    holders: dict[Piece, list[int]] = {}
    for rank, theirs in enumerate(ranks.exchange(own)):
        assert theirs.keys() == own.keys(), f"rank {rank} holds other tables"
        for stem, table in theirs.items():
            assert table.keys() == own[stem].keys(), f"rank {rank} holds other tensors of {stem}"
            for name, (dtype, shape, start, stop) in table.items():
                facts = {"dtype": dtype, "shape": list(shape)}
                known = tensors[stem].setdefault(name, facts)
                assert known == facts, f"rank {rank}: {name} is {facts}, elsewhere {known}"
                if stop > start:
                    holders.setdefault(Piece(stem, name, start, stop), []).append(rank)
    _check_cover(tensors, holders)
    return Plan(tensors, holders, _choose_writers(tensors, holders, ranks.world), ranks.world)


def _check_cover(
    tensors: Mapping[str, Mapping[str, Mapping[str, Any]]], holders: Mapping[Piece, list[int]]
) -> None:
    reached = {(stem, name): 0 for stem, table in tensors.items() for name in table}
    for piece in sorted(holders):
        key = (piece.stem, piece.name)
        assert piece.start == reached[key], f"{piece}: rows {reached[key]} to it overlap or lack"
        reached[key] = piece.stop
    for (stem, name), stop in reached.items():
        rows = (tensors[stem][name]["shape"] or [1])[0]
        assert stop == rows, f"{stem} {name}: rows {stop} to {rows} are held by no rank"


def _choose_writers(
    tensors: Mapping[str, Mapping[str, Mapping[str, Any]]],
    holders: Mapping[Piece, list[int]],
    world: int,
) -> dict[Piece, int]:
    """Give each piece to the one of its holders that has least to write, large pieces first."""

    def size(piece: Piece) -> int:
        facts = tensors[piece.stem][piece.name]
        item = getattr(torch, facts["dtype"]).itemsize
        return int(item * (piece.stop - piece.start) * prod(facts["shape"][1:]))

    loads = [0] * world
    writer = {}
    # what one rank alone holds comes first: it has no choice, and the others can make up for it
    for piece in sorted(holders, key=lambda p: (len(holders[p]) > 1, -size(p), p)):
        writer[piece] = min(holders[piece], key=lambda rank: (loads[rank], rank))
        loads[writer[piece]] += size(piece)
    return writer
