"""Which passes of a model answer many questions, so that what questions share is read once.

Flow: `likelihood.answer` hands all its queries to `plan`, which
    1. sorts them, so that those that begin alike stand together;
    2. cuts off a long beginning that many contexts share, as few-shot examples are, into a `Unit`
       with that prefix: a cache holds it while the rest is read;
    3. lays the queries of one context, and contexts that share half of their tokens, into one
       `Row`, a tree that branches where they part: a question is read once for all its options;
    4. batches rows of about equal length;
and `deal` gives each rank its units.

Shapes: B rows, T positions.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from summerlm.model.kernels import Branches

PREFIX_TOKENS = 64  # shorter beginnings aren't worth a pass of their own,
PREFIX_SHARERS = 4  # nor are those of fewer contexts
ROW_TOKENS = 512  # more don't join in one row: a token's scores are taken with all of them
READ_TOKENS = 16  # positions that a batch reads, prefixes included, for each one that it computes


class Query(NamedTuple):
    """A question as the model is asked it.

    Attributes:
        slot: Where its answer goes.
        ids: What is read, and the last target.
        asked: How many of the last ids are targets, below their number.
    """

    slot: int
    ids: tuple[int, ...]
    asked: int


class Target(NamedTuple):
    """One token that is asked about.

    Attributes:
        place: Index along its row of the token that it follows.
        token: The id.
        slot: Where its nats are added.
    """

    place: int
    token: int
    slot: int


class Row:
    """Queries as one tree of tokens; `model.kernels.Branches` says how it is read.

    Args:
        queries: Queries, in order, so that those that begin alike stand together.
        start: Tokens at the beginning of each that are read elsewhere.
    """

    def __init__(self, queries: Sequence[Query], start: int) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self.targets: list[Target] = []
        path: list[int] = []  # places of the last query's tokens
        last: tuple[int, ...] = ()
        for slot, ids, asked in queries:
            inputs = ids[start:-1]
            shared = common(last, inputs)
            size = len(self.tokens)
            for place in path[shared:]:
                self.ends[place] = size  # nobody reads it from here on
            self.tokens += inputs[shared:]
            self.positions += range(start + shared, start + len(inputs))
            self.ends += [0] * (len(inputs) - shared)
            path[shared:] = range(size, len(self.tokens))
            last = inputs
            self.targets += [
                Target(place, token, slot)
                for place, token in zip(path[-asked:], ids[-asked:], strict=True)
            ]
        for place in path:
            self.ends[place] = len(self.tokens)

    @property
    def branches(self) -> bool:
        """Whether two queries part somewhere."""
        return min(self.ends) < len(self.tokens)


class Batch(NamedTuple):
    """Rows that are read in one pass."""

    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        """Positions of the pass, padding included."""
        return len(self.rows) * max(len(row.tokens) for row in self.rows)

    def tensors(self) -> tuple[Tensor, Branches]:
        """Make the model's input: ids, (B, T), int64, and their branches; padding comes last."""
        longest = max(len(row.tokens) for row in self.rows)
        tokens, positions, ends = [], [], []
        for row in self.rows:
            size = len(row.tokens)
            missing = [0] * (longest - size)
            tokens.append(row.tokens + missing)
            positions.append(row.positions + missing)
            ends.append(row.ends + list(range(size + 1, longest + 1)))
        return torch.tensor(tokens), Branches(torch.tensor(positions), torch.tensor(ends))


@dataclass(frozen=True)
class Unit:
    """Work that one rank does.

    Attributes:
        prefix: Ids that all rows begin with, read once; empty where they share nothing.
        batches: What follows.
    """

    prefix: tuple[int, ...]
    batches: tuple[Batch, ...]

    @property
    def passes(self) -> int:
        """How often the model is called."""
        return bool(self.prefix) + len(self.batches)

    @cached_property
    def size(self) -> int:
        """Positions of all passes."""
        return len(self.prefix) + sum(batch.size for batch in self.batches)


def plan(queries: Sequence[Query], batch_tokens: int, world: int) -> list[Unit]:
    """Decide what is read together.

    Args:
        queries: What is asked.
        batch_tokens: Positions of a pass; a row that is longer goes alone.
        world: Ranks that share the work.

    Returns:
        All work, the longest rows of a kind first.
    """
    # big-endian bytes sort as the ids do, and are compared at once
    ordered = sorted(queries, key=lambda query: struct.pack(f">{len(query.ids)}I", *query.ids))
    others: list[Query] = []
    whole = []
    for group, prefix in _groups(ordered):
        if prefix:
            batches = _batches(_rows(group, len(prefix)), batch_tokens, len(prefix))
            whole.append(Unit(prefix, tuple(batches)))
        else:
            others += group
    units = [Unit((), (batch,)) for batch in _batches(_rows(others, 0), batch_tokens, 0)]
    fair = sum(unit.size for unit in units + whole) / world
    for unit in whole:
        units += _cut(unit, fair)
    return units


def deal(units: Sequence[Unit], world: int) -> list[list[Unit]]:
    """Give each rank about the same to do: the largest unit first, to who has least.

    Args:
        units: All work.
        world: How many ranks there are.

    Returns:
        The units of each rank.
    """
    hands: list[list[Unit]] = [[] for _ in range(world)]
    sizes = [0] * world
    for unit in sorted(units, key=lambda unit: -unit.size):
        rank = sizes.index(min(sizes))
        hands[rank].append(unit)
        sizes[rank] += unit.size
    return hands


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the ids that two texts have in common at their beginnings.

    Args:
        one: Ids.
        other: Ids, of the same type of sequence.

    Returns:
        How many.

    Example:
        >>> common((1, 2, 3, 4), (1, 2, 4, 4))
        2
    """
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared much faster than ids one by one
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _groups(queries: Sequence[Query]) -> Iterator[tuple[list[Query], tuple[int, ...]]]:
    """Cut sorted queries where little is shared; gives each group with its prefix, if any."""
    run: list[Query] = []
    shared: list[int] = []  # by each but the first with the one before
    for query in queries:
        if run:
            sizes = [len(q.ids) - q.asked for q in (run[-1], query)]
            length = min(common(run[-1].ids, query.ids), *sizes)
            if length < PREFIX_TOKENS or 2 * length < max(sizes):
                yield run, _prefix(run, shared)
                run, shared = [], []
            else:
                shared.append(length)
        run.append(query)
    if run:
        yield run, _prefix(run, shared)


def _prefix(queries: Sequence[Query], shared: Sequence[int]) -> tuple[int, ...]:
    """Give what is worth a pass of its own before all of some queries."""
    contexts = {query.ids[: -query.asked] for query in queries}
    if len(contexts) < PREFIX_SHARERS:
        return ()
    # the last token of each context is read with its continuations: its scores are asked for
    size = min(*shared, *(len(context) - 1 for context in contexts))
    return queries[0].ids[:size]


def _rows(queries: Sequence[Query], start: int) -> Iterator[Row]:
    """Join sorted queries into rows, the tokens before `start` left out."""
    run: list[Query] = []
    size = limit = 0
    for query in queries:
        length = len(query.ids) - 1 - start
        if run:
            shared = common(run[-1].ids[start:-1], query.ids[start:-1])
            context = max(len(q.ids) - q.asked for q in (run[-1], query)) - start
            if 2 * shared >= context and size + length - shared <= limit:
                run.append(query)
                size += length - shared
                continue
            yield Row(run, start)
        run, size, limit = [query], length, max(ROW_TOKENS, 2 * length)
    if run:
        yield Row(run, start)


def _batches(rows: Iterable[Row], batch_tokens: int, start: int) -> Iterator[Batch]:
    """Put rows of about equal length together, the longest first."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        longest = len(batch[0].tokens) if batch else 0
        count = len(batch) + 1
        full = count * longest > batch_tokens
        if batch and (full or count * (start + longest) > READ_TOKENS * batch_tokens):
            yield Batch(tuple(batch))
            batch = []
        batch.append(row)
    if batch:
        yield Batch(tuple(batch))


def _cut(unit: Unit, fair: float) -> Iterator[Unit]:
    """Cut a unit into some that are no larger than a rank's share, each with the prefix again."""
    piece: list[Batch] = []
    for before, batch in pairwise([None, *unit.batches]):
        assert batch is not None
        if before is not None and Unit(unit.prefix, (*piece, batch)).size > fair:
            yield Unit(unit.prefix, tuple(piece))
            piece = []
        piece.append(batch)
    yield Unit(unit.prefix, tuple(piece))
