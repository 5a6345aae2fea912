"""A parquet file -> its rows, a row group at a time, of which only the chosen columns are read.

Flow: `formats` opens a file by its footer as a `ParquetShard`; a remote footer is kept in the
cache folder. Reading a group of a large remote file costs about one request; a small one is
fetched whole, which checks its hash.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from summerlm.core.errors import DamagedDataError, DataChangedError
from summerlm.data.shards.cache import cached, drafting
from summerlm.data.shards.columns import check_columns, with_bytes
from summerlm.data.shards.rows import Row
from summerlm.data.shards.selection import Selection
from summerlm.data.shards.shard import Shard, reading
from summerlm.data.shards.transfer import File, Transfer

WHOLE_BYTES = 64 << 20  # a remote file up to this size is fetched whole
TAIL_BYTES = 256 << 10  # of a remote file, read first: most footers are shorter
BATCH_ROWS = 32  # most rows decoded at once, and...
BATCH_BYTES = 4 << 20  # ...about the most text in them, where a row isn't longer
BUFFER_BYTES = 1 << 20  # file bytes read at once


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A parquet file.

    Args:
        selection: What of a row is its text, and which rows count.
    """

    selection: Selection

    def read(self, group: int, start: int, stop: int) -> Iterator[Row]:  # noqa: D102
        try:
            for row in self._read(_nearby(self.file, self.transfer), group, start, stop):
                yield row
                start += 1
            return
        except DamagedDataError as damage:
            self.transfer.incidents.append({"reason": f"{damage}; read anew"})
            forget(self.file, self.transfer)
        yield from self._read(_nearby(self.file, self.transfer), group, start, stop)

    def _read(self, file: File, group: int, start: int, stop: int) -> Iterator[Row]:
        paths = [".".join(condition.path) for condition in self.selection.where]
        columns = list(dict.fromkeys([self.selection.column, *paths]))
        name = self.file.url
        with (
            reading(f"{name}: row group {group}"),
            parquet_file(file, self.transfer, group, columns) as opened,
        ):
            check_columns(name, opened.schema_arrow, self.selection)
            check_groups(name, opened.metadata, self.groups)
            rows = BATCH_BYTES * self.groups[group] // max(self.group_bytes[group], 1)
            for values in stripe(opened, group, start, stop, columns, rows):
                yield self.selection.row(values)


def open_parquet(file: File, selection: Selection, transfer: Transfer) -> ParquetShard:
    """Open a parquet file by its footer.

    Args:
        file: The file.
        selection: What of a row is its text, and which rows count.
        transfer: Reads it.

    Returns:
        The shard.

    Raises:
        UsageError: If the file lacks a column, or one holds something else.
        DamagedDataError: If the footer can't be decoded, even when it is read again.
        SourceDownError: If the file can't be read.
    """
    try:
        return _open(file, selection, transfer)
    except DamagedDataError as damage:
        transfer.incidents.append({"reason": f"{damage}; read anew"})
        forget(file, transfer)
        return _open(file, selection, transfer)


def _open(file: File, selection: Selection, transfer: Transfer) -> ParquetShard:
    with reading(f"{file.url}: footer"), parquet_file(file, transfer) as opened:
        check_columns(file.url, opened.schema_arrow, selection)
        rows, sizes = group_sizes(opened.metadata, selection.column)
    return ParquetShard(file, rows, sizes, transfer, selection)


def _nearby(file: File, transfer: Transfer) -> File:
    """Bring a small remote file to this machine."""
    if file.local is not None or file.size > WHOLE_BYTES:
        return file
    return replace(file, url=str(transfer.fetch(file)))


def forget(file: File, transfer: Transfer) -> None:
    """Drop what the cache folder holds of a remote file, so that it is read anew."""
    if file.local is None:
        transfer.copy_of(file).unlink(missing_ok=True)
        _footer_path(file).unlink(missing_ok=True)


@contextmanager
def parquet_file(
    file: File, transfer: Transfer, group: int | None = None, columns: Sequence[str] = ()
) -> Iterator[pq.ParquetFile]:
    """Open a parquet file for reading without threads, as a worker may be forked from here.

    Args:
        file: The file.
        transfer: Reads it.
        group: Index of the row group that will be read; None = nothing but the footer.
        columns: The columns that will be read.

    Yields:
        The file; it reads large groups in little memory, and checks pages that have a checksum.
    """
    footer = None if file.local else _footer(file, transfer)
    parts = _chunks(footer, group, columns) if footer and group is not None else ()
    with transfer.open(file, parts) as opened:
        yield pq.ParquetFile(
            opened,
            metadata=footer,
            pre_buffer=False,
            buffer_size=BUFFER_BYTES,
            page_checksum_verification=True,
        )


def stripe(
    file: pq.ParquetFile,
    group: int,
    start: int,
    stop: int,
    columns: Sequence[str],
    batch_rows: int = BATCH_ROWS,
) -> Iterator[Mapping[str, Any]]:
    """Read some rows of a group; rows before them are decoded and dropped.

    Args:
        file: The open file.
        group: Index of the group.
        start: First row, counted within the group.
        stop: One past the last row.
        columns: Columns, or keys below them with dots, that are read.
        batch_rows: Rows decoded at once; taken between 1 and `BATCH_ROWS`.

    Yields:
        The values of each row by column; text is bytes.

    Raises:
        ArrowInvalid: If the group ends before `stop`.
    """
    position, batch_rows = 0, max(1, min(batch_rows, BATCH_ROWS))
    for batch in file.iter_batches(
        batch_rows, row_groups=[group], columns=list(columns), use_threads=False
    ):
        wanted = batch.slice(max(start - position, 0), max(stop - max(position, start), 0))
        names = wanted.schema.names
        values = [column.cast(with_bytes(column.type)).to_pylist() for column in wanted.columns]
        for row in zip(*values, strict=True):
            yield dict(zip(names, row, strict=True))
        position += batch.num_rows
        if position >= stop:
            return
    raise pa.ArrowInvalid(f"ends before row {stop}")


def group_sizes(footer: pq.FileMetaData, column: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Measure the row groups of a parquet file.

    Args:
        footer: The file's metadata.
        column: The column that will be read.

    Returns:
        Rows of each group, and bytes that the column takes in it before compression.
    """
    groups = range(footer.num_row_groups)
    sizes = tuple(
        sum(leaf.total_uncompressed_size for leaf in _leaves(footer, group, [column]))
        for group in groups
    )
    return _rows(footer), sizes


def check_groups(what: str, footer: pq.FileMetaData, groups: Sequence[int]) -> None:
    """Compare a file's row groups with those that it was opened or pinned with.

    Args:
        what: The file, for messages.
        footer: Its metadata.
        groups: Rows of each group as they were.

    Raises:
        DataChangedError: If there are others.
    """
    if (rows := _rows(footer)) != tuple(groups):
        raise DataChangedError(
            f"{what}: has {sum(rows)} rows in {len(rows)} groups, had {sum(groups)} in "
            f"{len(groups)} when it was opened; restore it or start a new run"
        )


def _rows(footer: pq.FileMetaData) -> tuple[int, ...]:
    return tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))


def _leaves(footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> Iterator[Any]:
    """Give the column chunks of a group that hold parts of the columns."""
    metadata = footer.row_group(group)
    for index in range(metadata.num_columns):
        leaf = metadata.column(index)
        if any(f"{leaf.path_in_schema}.".startswith(f"{column}.") for column in columns):
            yield leaf


def _chunks(footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Give first byte and end of the column chunks that will be read."""
    starts = [
        (min(filter(None, (leaf.dictionary_page_offset, leaf.data_page_offset))), leaf)
        for leaf in _leaves(footer, group, columns)
    ]
    return [(start, start + leaf.total_compressed_size) for start, leaf in starts]


def _footer(file: File, transfer: Transfer) -> pq.FileMetaData:
    """Read a remote file's footer, from the cache folder where it is there."""
    path = _footer_path(file)
    if not path.exists():
        tail = transfer.read(file, max(file.size - TAIL_BYTES, 0), file.size)
        length = int.from_bytes(tail[-8:-4], "little") + 8  # of the footer, which these end
        if len(tail) < length <= file.size:
            tail = transfer.read(file, file.size - length, file.size)
        footer = pq.read_metadata(pa.BufferReader(tail))
        with drafting(path) as draft:
            draft.write(tail[-length:])
        return footer
    return pq.read_metadata(pa.BufferReader(path.read_bytes()))


def _footer_path(file: File) -> Path:
    return cached("footers", file.url, file.hash)
