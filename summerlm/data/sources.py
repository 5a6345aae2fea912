"""Documents by position: every source is a fixed table of units that any process can read.

Flow: made by `opening`.
    1. `units` has cut the rows that aren't held out;
    2. lanes ask `Source.read` for the rows of a unit and `Source.clean` for what the source's
       rules make of a text; evaluation asks `Source.held_out`;
    3. `Source.lock` says what was opened, for `lock_differences` to compare with.

Everything here is a function of the files' bytes and the settings.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import DamagedDataError, UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.heldout import HeldOut
from summerlm.data.hygiene import EXACT, NEAR, Evaluation, Placed
from summerlm.data.rules.catalogue import OF_THE_WHOLE, expand
from summerlm.data.rules.droplists import DropLists
from summerlm.data.rules.pipeline import Cleaned, Rules
from summerlm.data.shards.formats import Shard
from summerlm.data.shards.rows import Dropped, Row
from summerlm.data.shards.transfer import Transfer
from summerlm.data.units import Unit, cut_units

DAMAGED = Dropped("damaged part of a file")


class Source:
    """One source: units of training rows, held-out rows, rules.

    Plain data, safe to pickle; each read opens its file anew.

    Args:
        name: The source's name in the settings.
        config: Its settings.
        revision: The commit of its repository, where known.
        shards: Its files, in order.
        transfer: Reads them.
        rule: Which rows are held out.
        evaluation: What the rule `contamination` compares with; None where it isn't asked for.
        lanes: Lanes that will share the units.

    Attributes:
        table: The units, (units, 5), columns as `Unit` names them.
        units: Training rows of each unit.
        rules: Names of its rules.
        evaluation: What the rule `contamination` compares with; None where it isn't asked for.
        chat: Whether its texts are dialogues for the tokenizer's chat template.

    Raises:
        UsageError: If there are fewer training rows than lanes, or no row has a text.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        revision: str | None,
        shards: Sequence[Shard],
        transfer: Transfer,
        rule: HeldOut,
        evaluation: Evaluation | None,
        lanes: int,
    ) -> None:
        self.name, self.shards, self.rules = name, shards, expand(config.rules)
        self.chat = config.template == "chat"
        self._config, self._revision = config, revision
        self._transfer, self._rule = transfer, rule
        self.evaluation = evaluation
        self._clean = Rules(
            [name for name in self.rules if name not in OF_THE_WHOLE],
            None if evaluation is None else evaluation.index,
            config.min_characters,
            config.max_characters,
        )
        self._duplicates: list[tuple[Dropped, NDArray[np.int64]]] = []
        self._found_in: str | None = None
        sizes = [(shard.file.name, shard.groups, shard.group_bytes) for shard in shards]
        counts = (sum(shard.groups) for shard in shards)
        self._rows_before = list(itertools.accumulate(counts, initial=0))  # of all files before
        self.table = cut_units(name, sizes, rule, lanes)
        self.units: Sequence[int] = self.table[:, Unit.ROWS].tolist()
        self._require_text()

    def read(self, unit: int) -> list[Row]:
        """Read the training rows of a unit.

        Args:
            unit: Index into `units`.

        Returns:
            The rows in the file's order, as many as `units[unit]`.

        Raises:
            DataChangedError: If the file is another than the opened one.
            SourceDownError: If the file can't be read.
        """
        shard, group, start, stop, count = self.table[unit].tolist()
        keep = self._keep(shard, group)[start:stop]
        rows = self._read(shard, group, start, keep)
        assert len(rows) == count
        positions = self._first_row(shard, group) + start + np.flatnonzero(keep)
        return self._without_duplicates(rows, positions)

    def find(self, unit: int, row: int) -> tuple[str, int, int]:
        """Say where a row of a unit stands.

        Args:
            unit: Index into `units`.
            row: Index into what `read` gives of it.

        Returns:
            The file's name, the row group, and the row's number in the file, from 0.
        """
        shard, group, start, stop, _ = self.table[unit].tolist()
        kept = np.flatnonzero(self._keep(shard, group)[start:stop])
        first = sum(self.shards[shard].groups[:group])
        return self.shards[shard].file.name, group, first + start + int(kept[row])

    def clean(self, text: str) -> Cleaned:
        """Apply the source's rules.

        Args:
            text: A row's text.

        Returns:
            The text to train on, or why there is none, and what was changed.
        """
        if not self.chat:
            return self._clean(text)
        turns = json.loads(text)
        reason = next(self._clean.failing("\n".join(words for _, words in turns)), None)
        if reason is not None:
            return Cleaned(Dropped(reason), {})
        changes: Counter[str] = Counter()
        for turn in turns:
            turn[1], changed = self._clean.scrub(turn[1])
            changes += Counter(changed)
        return Cleaned(json.dumps(turns, ensure_ascii=False), changes)

    def rows(self, *, held_out: bool) -> Iterator[Placed]:
        """Read rows as they stand, before rules.

        Args:
            held_out: Whether the held-out rows are wanted, or all others.

        Yields:
            The rows, in the order of files and rows.

        Raises:
            SourceDownError: If a file can't be read.
        """
        for index, shard in enumerate(self.shards):
            for group in range(len(shard.groups)):
                wanted = self._keep(index, group) != held_out
                if wanted.any():
                    first = self._first_row(index, group)
                    rows = self._read(index, group, 0, wanted)
                    for place, row in zip(np.flatnonzero(wanted).tolist(), rows, strict=True):
                        yield Placed(first + place, row)

    def leave_out(self, lists: DropLists) -> None:
        """Drop rows that stand elsewhere too, if the source asks for it.

        Args:
            lists: The rows to drop, of all sources.
        """
        if not {EXACT, NEAR} & set(self.rules):
            return
        none = np.empty(0, np.int64)
        exact, near = lists.exact.get(self.name, none), lists.near.get(self.name, none)
        if EXACT not in self.rules:
            exact, near = none, np.union1d(exact, near)  # a copy is a near-duplicate too
        self._duplicates = [(Dropped(EXACT), exact)]
        if NEAR in self.rules:
            self._duplicates.append((Dropped(NEAR), near))
        self._found_in = lists.sha256

    def held_out(self) -> Iterator[str]:
        """Read the texts that training never draws, in the order of files and rows."""
        for position, row in self.rows(held_out=True):
            (kept,) = self._without_duplicates([row], np.array([position]))
            text = self._cleaned(kept)
            if not isinstance(text, Dropped):
                turns = json.loads(text) if self.chat else ()
                yield "".join(f"\n{role.upper()}: {words}" for role, words in turns) or text

    def take_incidents(self) -> list[dict[str, Any]]:
        """Hand over what went wrong and was mended since the last call."""
        return self._transfer.take_incidents()

    def lock(self) -> dict[str, Any]:
        """Say which data this source stands for.

        Returns:
            Plain JSON: name, origin, which files of it, revision, licence, terms, what of a row is
            its text, what is left out or changed, the held-out rule, and each file's name, bytes,
            hash, rows and bytes of text a group; no path of a machine.
        """
        config = self._config
        return {
            "name": self.name,
            "origin": self._origin(),
            # which files are asked for: those that a lock pins are read without looking again
            "branch": config.revision if config.hub else None,
            "data_dir": config.data_dir,
            "glob": config.files,
            "revision": self._revision,
            "licence": config.licence,
            "terms": config.terms,
            "column": config.column,
            "conversations": config.conversations,
            "template": config.template,
            "where": list(config.where),
            "min_characters": config.min_characters,
            "max_characters": config.max_characters,
            "rules": list(self.rules),
            "evaluation_sets": None if self.evaluation is None else self.evaluation.pins,
            "duplicates": self._found_in,
            "held_out": self._rule.describe(),
            "files": [
                {**s.file.pin(), "rows": list(s.groups), "group_bytes": list(s.group_bytes)}
                for s in self.shards
            ],
        }

    def _origin(self) -> str:
        """Say where the files are from; an address counts, a place on a machine doesn't."""
        config = self._config
        if config.path is not None:
            return config.path if "://" in config.path else "files"
        return config.hub or "python_stdlib"

    def _read(self, shard: int, group: int, start: int, wanted: NDArray[np.bool_]) -> list[Row]:
        """Read those rows of a group, from `start` on, that are wanted."""
        try:
            rows = self.shards[shard].read(group, start, start + len(wanted))
            return list(itertools.compress(rows, wanted))
        except DamagedDataError as error:
            if self._config.on_damage == "stop":
                raise
            count = int(wanted.sum())
            reason = f"{error}; its {count} rows are skipped (on_damage = skip)"
            self._transfer.incidents.append({"reason": f"source {self.name}: {reason}"})
            return [DAMAGED] * count

    def _keep(self, shard: int, group: int) -> NDArray[np.bool_]:
        """Tell which rows of a group are for training."""
        groups = self.shards[shard].groups
        return ~self._rule.mask(self.shards[shard].file.name, sum(groups[:group]), groups[group])

    def _first_row(self, shard: int, group: int) -> int:
        """Give the number of a group's first row, counted over all files."""
        return self._rows_before[shard] + sum(self.shards[shard].groups[:group])

    def _without_duplicates(self, rows: list[Row], positions: NDArray[np.int64]) -> list[Row]:
        for reason, listed in self._duplicates:
            first, last = np.searchsorted(listed, (positions[0], positions[-1] + 1))
            for index in np.flatnonzero(np.isin(positions, listed[first:last])):
                if not isinstance(rows[index], Dropped):
                    rows[index] = reason
        return rows

    def _cleaned(self, row: Row) -> Row:
        return row if isinstance(row, Dropped) else self.clean(row).text

    def _require_text(self) -> None:
        """Read until one text is met."""
        reasons: Counter[str] = Counter()
        for unit in range(len(self.units)):
            for row in self.read(unit):
                text = self._cleaned(row)
                if not isinstance(text, Dropped):
                    return
                reasons[text.reason] += 1
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise UsageError(f"source {self.name}: no training row has a text ({told})")
