"""Rows that a run leaves out of its loss, since a spike came of them.

Flow:
    1. where `guards` found a spike and spikes go back, all ranks learn the mean loss of each row,
       and `offending` says which rows were beyond the limit;
    2. the loop raises `Rollback`; `recipes` name the rows' documents, find where these go on
       (`data.naming`), and `Quarantine.add` writes the table into the run folder, before anything
       is undone;
    3. the run goes on from its last good checkpoint, and `Quarantine.mask` takes the rows' targets
       out of the loss. The data order and its hashes stay as they are.

Shapes: B rows of a rank, B * W rows of a step, T positions.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from summerlm.core.errors import DivergedError, UsageError
from summerlm.core.files import read_json, write_json
from summerlm.core.ranks import Ranks
from summerlm.data.batch import IGNORE, Batch

MAX_ROLLBACKS = 3  # of a run: what still spikes after them isn't the data's doing

Place = tuple[int, int]  # a step, and a row of its batch in global order


class Rollback(Exception):  # noqa: N818 (not an error, but a way to go on)
    """A step spiked, and the run is to go back to its last good checkpoint.

    Args:
        step: The step.
        rows: Its offending rows, in global order.
    """

    def __init__(self, step: int, rows: Sequence[int]) -> None:
        super().__init__(f"step {step} spiked at its rows {', '.join(map(str, rows))}")
        self.step, self.rows = step, list(rows)


def offending(
    nats: Sequence[Sequence[float]], targets: Sequence[Sequence[int]], limit: float
) -> list[int]:
    """Tell the rows that a spike came of.

    Args:
        nats: Of each rank, the summed loss of its rows.
        targets: Of each rank, how many targets of its rows count.
        limit: The largest mean loss of a step that is borne.

    Returns:
        The rows whose own mean is beyond the limit or not finite, in global order; all rows that
        have targets where none is, as when the gradient alone spiked.
    """
    world = len(nats)
    means = {
        index * world + rank: total / count
        for rank in range(world)
        for index, (total, count) in enumerate(zip(nats[rank], targets[rank], strict=True))
        if count
    }
    beyond = [row for row, mean in means.items() if not mean <= limit]  # NaN is beyond too
    return sorted(beyond or means)


class Quarantine:
    """The rows that a run leaves out, and how often it went back.

    Args:
        path: The table, `quarantine.json` of the run folder; may be missing.
        ranks: This process among the ranks.

    Attributes:
        rollbacks: How often the run went back.

    Raises:
        UsageError: If the file holds no such table.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self._path, self._ranks = path, ranks
        self.rollbacks = 0
        self._rows: defaultdict[int, set[int]] = defaultdict(set)
        if path.exists():
            table = read_json(path)
            try:
                self.rollbacks = int(table["rollbacks"])
                self._take((int(step), int(row)) for step, row in table["rows"])
            except (KeyError, TypeError, ValueError):
                raise UsageError(
                    f"{path}: no table of quarantined rows; delete it to train on all rows"
                ) from None

    def add(self, places: Iterable[Place]) -> None:
        """Write down that the run goes back, and which rows it leaves out from now on.

        Every rank calls it with the same places; the leading one writes.

        Args:
            places: Steps and global rows.

        Raises:
            DivergedError: If the run went back as often as it may.
        """
        if self.rollbacks >= MAX_ROLLBACKS:
            raise DivergedError(
                f"a spike again, after going back {self.rollbacks} times; lower optim.peak_lr, or "
                f"look at incidents.jsonl and {self._path.name} for what was left out"
            )
        self.rollbacks += 1
        self._take(places)
        if self._ranks.leads:
            rows = [[step, row] for step in sorted(self._rows) for row in self.rows(step)]
            write_json(self._path, {"rollbacks": self.rollbacks, "rows": rows})

    def rows(self, step: int) -> list[int]:
        """Give the rows of a step that are left out, in global order."""
        return sorted(self._rows.get(step, ()))

    def mask(self, batch: Batch, step: int) -> Batch:
        """Take a step's quarantined rows out of the loss.

        Args:
            batch: The rows of this rank, on any device.
            step: The step's number.

        Returns:
            The batch; of quarantined rows all targets are `IGNORE`.
        """
        rank, world = self._ranks.rank, self._ranks.world
        # rank r has the lanes r, r + W, ... of each turn, so the global rows r, r + W, ...
        own = [row // world for row in self.rows(step) if row % world == rank]
        if not own:
            return batch
        index = torch.tensor(own, device=batch.targets.device)
        return replace(batch, targets=batch.targets.index_fill(0, index, IGNORE))

    def _take(self, places: Iterable[Place]) -> None:
        for step, row in places:
            self._rows[step].add(row)
