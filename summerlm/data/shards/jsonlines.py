"""JSON lines -> parquet, once: a line format has no row groups to read at random.

Flow: `sources` opens a `.json`, `.jsonl`, `.json.gz` or `.jsonl.gz` file here; the first time
its text is copied into a parquet file of the cache folder, which is then read like any other.
The cache is keyed by the file's hash and the column, so a changed file is copied anew.
"""

import codecs
import gzip
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from summerlm.core.errors import DataChangedError, SaveError, UsageError
from summerlm.core.files import sha256_file, sync_folder
from summerlm.data.shards.formats import (
    Column,
    ParquetShard,
    group_sizes,
    nearest_first,
    parquet_file,
    reading,
)
from summerlm.data.shards.rows import BAD_UTF8, NOT_JSON, Dropped, Row

CACHE_VERSION = 1  # of the copy's layout, of `rows` and of the group sizes below
GROUP_BYTES = 1 << 20  # a group of the copy closes at this much text...
GROUP_ROWS = 1000  # ...or this many rows

_COLUMN = "row"
_ROW = pa.struct([("text", pa.large_string()), ("fault", pa.string())])  # one of the two is null


@dataclass(frozen=True)
class JsonLinesShard(ParquetShard):
    """A JSON lines file: `size` and `sha256` are the file's own, `path` is its parquet copy."""

    remedy: ClassVar[str] = "delete this copy, it is made again"

    def read(self, group: int, start: int, stop: int) -> Iterator[Row]:  # noqa: D102
        for row in self._values(group, start, stop):
            yield row["text"] if row["fault"] is None else Dropped(row["fault"])


def open_json_lines(name: str, path: Path, column: Column) -> JsonLinesShard:
    """Open a file that holds one JSON object a line, copying it first where there is no copy.

    Args:
        name: Its name inside the source.
        path: Where it lies; compressed if it ends in `.gz`.
        column: What of a row is its text.

    Returns:
        The shard.

    Raises:
        UsageError: If no line is an object with the column's key.
        SaveError: If the copy can't be written.
    """
    with reading(path):
        size, sha256 = path.stat().st_size, sha256_file(path)
    how = json.dumps([CACHE_VERSION, sha256, column.name, column.dialogue])
    copy = cache_folder() / "jsonlines" / f"{hashlib.sha256(how.encode()).hexdigest()}.parquet"
    if not copy.exists():
        _write(copy, _rows(path, sha256, column))
    with reading(copy, JsonLinesShard.remedy), parquet_file(copy) as file:
        rows, sizes = group_sizes(file.metadata, _COLUMN)
    return JsonLinesShard(name, copy, size, sha256, rows, sizes, Column(_COLUMN, dialogue=False))


def cache_folder() -> Path:
    """Give the folder of derived files: `$SUMMERLM_CACHE`, or `~/.cache/summerlm`."""
    return Path(os.environ.get("SUMMERLM_CACHE") or "~/.cache/summerlm").expanduser()


def _rows(path: Path, sha256: str, column: Column) -> Iterator[Row]:
    """Read every line; those of white space only are no rows."""
    keys: dict[str, None] = {}  # of the objects seen so far, in order, until the column's is met
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path), opened(path, "rb") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            value = _parse(line.removeprefix(codecs.BOM_UTF8) if number == 0 else line)
            if isinstance(value, Dropped):
                yield value
                continue
            if column.name not in keys:
                keys.update(dict.fromkeys(value))
            yield column.text_of(value.get(column.name))
        if sha256_file(path) != sha256:
            raise DataChangedError(f"{path}: changed while it was read; start again")
    if not keys:
        raise UsageError(f"{path}: holds no JSON object; write one a line")
    if column.name not in keys:
        names = nearest_first(column.name, list(keys))
        raise UsageError(f"{path}: no key {column.name!r}; its keys are: {names}")


def _parse(line: bytes) -> dict[str, Any] | Dropped:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BAD_UTF8
    except (ValueError, RecursionError):  # no JSON, a number beyond Python's, nested too deep
        return NOT_JSON
    return value if isinstance(value, dict) else NOT_JSON


def _write(target: Path, rows: Iterator[Row]) -> None:
    """Write rows as a parquet file that appears whole; of two writers at once the last one wins."""
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    schema = pa.schema([(_COLUMN, _ROW)])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            try:
                with pq.ParquetWriter(
                    file,
                    schema,
                    compression="zstd",
                    use_dictionary=False,  # like statistics, it would only repeat the texts
                    write_statistics=False,
                    write_page_checksum=True,
                ) as writer:
                    for group in _groups(rows):
                        writer.write_table(pa.table({_COLUMN: group}, schema), len(group))
                file.flush()
                os.fsync(file.fileno())
                os.replace(draft, target)
            except BaseException:
                draft.unlink()
                raise
        sync_folder(target.parent)
    except OSError as error:
        raise SaveError(
            f"{target.parent}: can't write the cache ({error.strerror or error}); make room or set "
            "SUMMERLM_CACHE to another folder"
        ) from error


def _groups(rows: Iterator[Row]) -> Iterator[list[dict[str, str | None]]]:
    """Cut rows into groups; depends on the rows alone, since groups are units of the data order."""
    group: list[dict[str, str | None]] = []
    held_bytes = 0
    for row in rows:
        if isinstance(row, Dropped):
            group.append({"text": None, "fault": row.reason})
        else:
            group.append({"text": row, "fault": None})
            held_bytes += len(row.encode())
        if len(group) == GROUP_ROWS or held_bytes >= GROUP_BYTES:
            yield group
            group, held_bytes = [], 0
    if group:
        yield group
