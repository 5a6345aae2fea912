"""Documents by position: every source is a fixed table of units that any process can read.

Flow:
    1. `open_sources` lists each source's files (`find_files`, `standard_library`) and opens
       them as shards;
    2. a rule of `heldout` sets rows aside, and the other rows are cut into units: a row group,
       or a stripe of one where groups are large or few;
    3. lanes ask `Source.read` for the texts of a unit, evaluation asks `Source.held_out`;
    4. `Source.lock` says what was opened, for `lock_differences` to compare with a run's.

Everything here is a function of the files' bytes and the settings.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import UsageError
from summerlm.data.config import DataConfig, SourceConfig
from summerlm.data.heldout import HeldOut, HeldOutFiles, HeldOutRows
from summerlm.data.shards.files import find_files
from summerlm.data.shards.formats import Column, Shard, open_parquet, open_text
from summerlm.data.shards.jsonlines import open_json_lines
from summerlm.data.shards.rows import Dropped
from summerlm.data.shards.stdlib import library_folder, standard_library

UNIT_BYTES = 4 << 20  # about the most text of a unit: each lane holds one unit of each source
UNITS_PER_LANE = 4  # where rows allow: lanes differ by one unit, so by a quarter at most

_JSON_LINES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_NOT_YET = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")
_HELD_OUT = -1  # in place of a unit's number: where the faults of held-out rows are counted


class Unit(NamedTuple):
    """A stripe of one group of one shard."""

    shard: int
    group: int
    start: int  # rows within the group, held-out ones included
    stop: int
    rows: int  # training rows among them, at least 1


def open_sources(config: DataConfig, lanes: int) -> list["Source"]:
    """Open all sources: find, hash and measure their files.

    Args:
        config: The settings of the data.
        lanes: Lanes that will share each source's units.

    Returns:
        The sources in the order of the settings.

    Raises:
        UsageError: If a source's settings don't fit its files, or it holds too little text.
        SourceDownError: If a file can't be read.
    """
    return [_open_source(name, config, lanes) for name in config.sources]


def _open_source(name: str, config: DataConfig, lanes: int) -> "Source":
    source = config.sources[name]
    if source.python_stdlib:
        root, split = library_folder(), standard_library()
        names = {path: path.relative_to(root).as_posix() for path in itertools.chain(*split)}
        shards: list[Shard] = [open_text(names[path], path) for path in sorted(names)]
        rule = HeldOutFiles(frozenset(names[path] for path in split.held_out))
        return Source(name, source, shards, rule, lanes)
    shards = _open_shards(name, source, find_files(name, source, config.mirror))
    rows = {shard.name: sum(shard.groups) for shard in shards}
    return Source(name, source, shards, HeldOutRows(name, config.held_out_fraction, rows), lanes)


def _open_shards(name: str, source: SourceConfig, files: list[tuple[str, Path]]) -> list[Shard]:
    """Open files of one kind, told by their endings."""
    kinds = {_kind(file): file for file, _ in reversed(files)}  # with the first example of each
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({file})" for kind, file in sorted(kinds.items()))
        raise UsageError(f"source {name}: mixes {found}; choose one kind with `files`")
    (kind,) = kinds
    column = Column(source.conversations or source.column or "text", bool(source.conversations))
    if kind == "parquet":
        return [open_parquet(*file, column) for file in files]
    if kind == "JSON lines":
        return [open_json_lines(*file, column) for file in files]
    if source.column or source.conversations:
        raise UsageError(f"source {name}: {kinds[kind]} is read whole; it has no columns to choose")
    return [open_text(*file) for file in files]


def _kind(file: str) -> str:
    lower = file.lower()
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(_JSON_LINES):
        return "JSON lines"
    if lower.endswith(_NOT_YET):
        raise UsageError(
            f"{file}: can't be read in this form; unpack it, or leave it out by a glob"
        )
    return "text"


class Source:
    """One source: units of training rows, held-out rows, and what rows had no text.

    Plain data, safe to fork and to pickle; each read opens its file anew.

    Args:
        name: The source's name in the settings.
        config: Its settings.
        shards: Its files, in order.
        rule: Which rows are held out.
        lanes: Lanes that will share the units.

    Raises:
        UsageError: If there are fewer training rows than lanes, or no row has a text.
    """

    def __init__(
        self, name: str, config: SourceConfig, shards: Sequence[Shard], rule: HeldOut, lanes: int
    ) -> None:
        self.name = name
        self._config = config
        self._shards = shards
        self._rule = rule
        self._units = self._cut(lanes)
        self.units: Sequence[int] = [unit.rows for unit in self._units]
        self._faults: dict[int, Counter[str]] = {}  # of the units that have any
        if not any(any(self.read(unit)) for unit in range(len(self.units))):
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.faults.most_common())
            raise UsageError(f"source {name}: no training row has a text ({reasons})")
        self._faults.clear()

    @property
    def faults(self) -> Counter[str]:
        """Rows without text by reason, of the units read so far, each unit counted once."""
        return sum(self._faults.values(), Counter())

    def read(self, unit: int) -> list[str]:
        """Read the training rows of a unit.

        Args:
            unit: Index into `units`.

        Returns:
            Texts in the file's order, as many as `units[unit]`; "" for a row without text.

        Raises:
            DataChangedError: If the file is another than the opened one.
            SourceDownError: If the file can't be read.
        """
        shard, group, start, stop, rows = self._units[unit]
        keep = self._keep(shard, group)[start:stop]
        faults: Counter[str] = Counter()
        texts = list(self._texts(shard, group, start, keep, faults))
        assert len(texts) == rows
        if faults:
            self._faults[unit] = faults
        return texts

    def held_out(self) -> Iterator[str]:
        """Read the texts that training never draws, in the order of files and rows."""
        faults = self._faults[_HELD_OUT] = Counter()
        for index, shard in enumerate(self._shards):
            for group in range(len(shard.groups)):
                keep = ~self._keep(index, group)
                if keep.any():
                    yield from filter(None, self._texts(index, group, 0, keep, faults))

    def lock(self) -> dict[str, Any]:
        """Say which data this source stands for.

        Returns:
            Plain JSON: name, origin, revision, licence, what of a row is its text, the held-out
            rule, and each file's name, bytes, sha256 and rows per group; no path of a machine.
        """
        config = self._config
        return {
            "name": self.name,
            "origin": config.hub or ("python_stdlib" if config.python_stdlib else "files"),
            "revision": config.revision if config.hub else None,
            "licence": config.licence,
            "column": config.column,
            "conversations": config.conversations,
            "held_out": self._rule.describe(),
            "files": [
                {"name": s.name, "bytes": s.size, "sha256": s.sha256, "rows": list(s.groups)}
                for s in self._shards
            ],
        }

    def _keep(self, shard: int, group: int) -> NDArray[np.bool_]:
        """Tell which rows of a group are for training."""
        groups = self._shards[shard].groups
        return ~self._rule.mask(self._shards[shard].name, sum(groups[:group]), groups[group])

    def _texts(
        self, shard: int, group: int, start: int, keep: NDArray[np.bool_], faults: Counter[str]
    ) -> Iterator[str]:
        """Read those rows from `start` on that `keep` marks; "" for a fault, which is counted."""
        rows = self._shards[shard].read(group, start, start + len(keep))
        for row in itertools.compress(rows, keep):
            if isinstance(row, Dropped):
                faults[row.reason] += 1
            yield "" if isinstance(row, Dropped) else row

    def _cut(self, lanes: int) -> list[Unit]:
        """Cut every group into stripes of about equal training rows."""
        places = [(s, g) for s, shard in enumerate(self._shards) for g in range(len(shard.groups))]
        kept = [np.flatnonzero(self._keep(shard, group)) for shard, group in places]
        rows = [len(positions) for positions in kept]
        if sum(rows) < lanes:
            raise UsageError(
                f"source {self.name}: {sum(rows)} training rows can't feed {lanes} lanes; give it "
                "more text or set a smaller data.lanes"
            )
        sizes = [self._shards[shard].group_bytes[group] for shard, group in places]
        units = []
        for place, positions, parts in zip(places, kept, _stripes(rows, sizes, lanes), strict=True):
            for part in range(parts):
                first, last = len(positions) * part // parts, len(positions) * (part + 1) // parts
                start, stop = int(positions[first]), int(positions[last - 1]) + 1
                units.append(Unit(*place, start, stop, last - first))
        return units


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
