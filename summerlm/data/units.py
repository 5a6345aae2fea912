"""Row groups of files -> units: what a lane reads at once.

Flow: `sources` cuts each source's training rows here. A unit is a row group, or a stripe of one
where a source has few groups or a group is large: each lane holds one unit of each source.
"""

import itertools
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import UsageError
from summerlm.data.heldout import HeldOut

UNIT_BYTES = 4 << 20  # about the most text of a unit
UNITS_PER_LANE = 4  # where rows allow: lanes differ by one unit, so by a quarter at most

Sizes = tuple[str, Sequence[int], Sequence[int]]  # a file's name, rows and bytes of its groups


class Unit(IntEnum):
    """Columns of the table of units: a stripe of one group of one shard."""

    SHARD = 0
    GROUP = 1
    START = 2  # rows within the group, held-out ones included
    STOP = 3
    ROWS = 4  # training rows among them, at least 1


def cut_units(source: str, files: Sequence[Sizes], rule: HeldOut, lanes: int) -> NDArray[np.int64]:
    """Cut every group into stripes of about equal training rows.

    Args:
        source: The source's name, for messages.
        files: Its files, in order.
        rule: Which rows are held out.
        lanes: Lanes that will share the units.

    Returns:
        The units, (units, 5), columns as `Unit` names them.

    Raises:
        UsageError: If there are fewer training rows than lanes.
    """
    rows = [len(kept) for _, kept in _kept(files, rule)]
    if sum(rows) < lanes:
        raise UsageError(
            f"source {source}: {sum(rows)} training rows can't feed {lanes} lanes (a file of plain "
            f"text is one row); give it more, or set data.lanes to {max(sum(rows), 1)} or less"
        )
    sizes = [size for _, _, group_bytes in files for size in group_bytes]
    units: list[NDArray[np.int64]] = []
    for (place, kept), parts in zip(_kept(files, rule), _stripes(rows, sizes, lanes), strict=True):
        if parts:
            borders = len(kept) * np.arange(parts + 1) // parts
            first, last = borders[:-1], borders[1:]
            table = np.empty((parts, len(Unit)), np.int64)
            table[:, : Unit.START] = place
            table[:, Unit.START], table[:, Unit.STOP] = kept[first], kept[last - 1] + 1
            table[:, Unit.ROWS] = last - first
            units.append(table)
    return np.concatenate(units)


def _kept(
    files: Sequence[Sizes], rule: HeldOut
) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
    """Yield the place of each group and its training rows; a file's rows are held at once."""
    for shard, (name, groups, _) in enumerate(files):
        keep, start = ~rule.mask(name, 0, sum(groups)), 0
        for group, count in enumerate(groups):
            yield (shard, group), np.flatnonzero(keep[start : start + count])
            start += count


def _stripes(rows: Sequence[int], sizes: Sequence[int], lanes: int) -> list[int]:
    """Choose into how many units each group is cut.

    Args:
        rows: Training rows of each group.
        sizes: Bytes of text of each group.
        lanes: Lanes that will share the units.

    Returns:
        Units of each group, as far as its rows go: enough for `UNIT_BYTES` each, and the least
        more, alike for all groups, for `UNITS_PER_LANE` over all groups.
    """
    wanted = min(sum(rows), UNITS_PER_LANE * lanes)
    for least in itertools.count(1):
        parts = [
            min(n, max(least, -(-size // UNIT_BYTES))) for n, size in zip(rows, sizes, strict=True)
        ]
        if sum(parts) >= wanted:
            break
    return parts
