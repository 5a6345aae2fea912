"""JSON lines -> parquet, once: a line format has no row groups to read at random.

Flow: `formats` opens a `.json` or `.jsonl` file, as it is or with `.gz` or `.zst`, here; the first
time its text is copied into a parquet file of the cache folder, which is then read like any other.
The cache is keyed by the file's hash and the selection, so a changed file is copied anew.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from summerlm.core.errors import DamagedDataError, SourceDownError, SummerError
from summerlm.core.progress import Progress
from summerlm.core.runtime import STOP_SIGNALS, holding_signals
from summerlm.data.shards.cache import cached, drafting, making
from summerlm.data.shards.lines import rows_of
from summerlm.data.shards.parquet import check_groups, forget, group_sizes, parquet_file, stripe
from summerlm.data.shards.rows import Dropped, Row
from summerlm.data.shards.selection import Selection
from summerlm.data.shards.shard import Shard, reading
from summerlm.data.shards.transfer import File, Transfer

CACHE_VERSION = 2  # of the copy's layout, of `rows` and of the group sizes below
GROUP_BYTES = 1 << 20  # a group of the copy closes at this much text...
GROUP_ROWS = 1000  # ...or this many rows

_COLUMN = "row"
_ROW = pa.struct([("text", pa.large_string()), ("fault", pa.string())])  # one of the two is null
_REMEDY = "delete this copy, it is made again"


@dataclass(frozen=True)
class JsonLinesShard(Shard):
    """A JSON lines file.

    Args:
        copy: Its parquet copy in the cache folder.
    """

    copy: Path

    def read(self, group: int, start: int, stop: int) -> Iterator[Row]:  # noqa: D102
        with _reading_copy(self.copy, self.transfer, group) as file:
            check_groups(str(self.copy), file.metadata, self.groups)
            for values in stripe(file, group, start, stop, [_COLUMN]):
                row = values[_COLUMN]
                fault = row["fault"]
                yield row["text"].decode() if fault is None else Dropped(fault.decode())


def open_json_lines(
    file: File,
    selection: Selection,
    transfer: Transfer,
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> JsonLinesShard:
    """Open a file that holds one JSON object a line, copying it first where there is no copy.

    Args:
        file: The file; compressed if its name ends in `.gz` or `.zst`.
        selection: What of a row is its text, and which rows count.
        transfer: Reads it.
        sizes: Rows and bytes of each group where they are known; None = they are read.

    Returns:
        The shard.

    Raises:
        UsageError: If no line is an object with the keys.
        DamagedDataError: If the file can't be decoded, even when it is read again.
        SourceDownError: If the file can't be read.
        SaveError: If the copy can't be written.
    """
    copy = make_copy(file, selection, transfer)
    if sizes is None:
        with _reading_copy(copy, transfer) as opened:
            sizes = group_sizes(opened.metadata, _COLUMN)
    return JsonLinesShard(file, *sizes, transfer, copy)


@contextmanager
def _reading_copy(
    copy: Path, transfer: Transfer, group: int | None = None
) -> Iterator[pq.ParquetFile]:
    """Open a copy; damage to it is none of the source's, and may not be skipped as such."""
    with reading(str(copy), _REMEDY, damage=SourceDownError):
        file = File(copy.name, str(copy), copy.stat().st_size, "etag:")
        with parquet_file(file, transfer, group) as opened:
            yield opened


def copy_path(file: File, selection: Selection) -> Path:
    """Name a file's copy."""
    where = [condition.text for condition in selection.where]
    by_tag = [file.url] if file.hash.startswith("etag:") else []  # a tag is one address's own
    content = [file.hash, file.size, *by_tag]
    selected = [selection.column, selection.form, where]
    return cached("jsonlines", CACHE_VERSION, content, selected).with_suffix(".parquet")


def make_copies(
    files: Sequence[File], selection: Selection, transfer: Transfer, progress: Progress
) -> None:
    """Copy files that have no copy yet, several at a time in processes of their own.

    Args:
        files: The files.
        selection: What of a row is its text, and which rows count.
        transfer: Reads them.
        progress: Called with how many are done.

    Raises:
        SummerError: As `open_json_lines` does.
    """
    missing = [file for file in files if not copy_path(file, selection).exists()]
    processes = min(len(missing), len(os.sched_getaffinity(0)))
    if processes < 2:
        for done, file in enumerate(missing):
            progress("converting JSON lines", done, len(missing))
            make_copy(file, selection, transfer)
        return
    # not forked: threads of this process may hold locks; and not from the fork server, which
    # would then lack what the loader's workers want loaded in it
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(processes, context, initializer=_settle) as pool:
        with holding_signals():  # the processes start here
            jobs = [pool.submit(_make_copy_there, file, selection, transfer) for file in missing]
        try:
            for done, job in enumerate(as_completed(jobs)):
                transfer.incidents += job.result()
                progress("converting JSON lines", done + 1, len(missing))
        except BrokenProcessPool:
            raise SummerError(
                "a process that converts JSON lines died; look for an out-of-memory kill"
            ) from None
        except BaseException:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.kill()
            raise


def _settle() -> None:
    """Prepare a process that copies: it ends when its parent does, and leaves signals to it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make_copy_there(file: File, selection: Selection, transfer: Transfer) -> list[dict[str, Any]]:
    make_copy(file, selection, transfer)
    return transfer.take_incidents()


def make_copy(file: File, selection: Selection, transfer: Transfer) -> Path:
    """Copy a file where it has no copy yet.

    Args:
        file: The file.
        selection: What of a row is its text, and which rows count.
        transfer: Reads it.

    Returns:
        The copy.

    Raises:
        SummerError: As `open_json_lines` does.
    """
    copy = copy_path(file, selection)
    if copy.exists():
        return copy
    with making(copy):
        if not copy.exists():
            path = transfer.fetch(file)
            try:
                _write(copy, rows_of(file, path, selection))
            except DamagedDataError as damage:
                transfer.incidents.append({"reason": f"{damage}; read anew"})
                forget(file, transfer)
                _write(copy, rows_of(file, transfer.fetch(file), selection))
    return copy


def _write(copy: Path, rows: Iterator[Row]) -> None:
    schema = pa.schema([(_COLUMN, _ROW)])
    with (
        drafting(copy) as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=False,  # like statistics, it would only repeat the texts
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        for group in _groups(rows):
            writer.write_table(pa.table({_COLUMN: group}, schema), len(group))


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
