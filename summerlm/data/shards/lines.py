"""JSON lines -> rows: every line an object, whose keys are chosen as columns are.

Flow: `jsonlines` copies what `rows_of` reads.
"""

import codecs
import gzip
import json
from collections.abc import Iterator
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa

from summerlm.core.errors import DataChangedError, UsageError
from summerlm.data.shards.hashes import hash_file
from summerlm.data.shards.rows import BAD_UTF8, NOT_JSON, TOO_LONG, Dropped, Row
from summerlm.data.shards.selection import Selection
from summerlm.data.shards.shard import nearest_first, reading
from summerlm.data.shards.transfer import File

LINE_BYTES = 1 << 28  # a longer line has no text: it is no document but a file without lines


def rows_of(file: File, path: Path, selection: Selection) -> Iterator[Row]:
    """Read the rows of a JSON lines file; lines of white space only are none.

    Args:
        file: The file; compressed if its name ends in `.gz` or `.zst`.
        path: Where its bytes lie on this machine.
        selection: What of a row is its text, and which rows count.

    Yields:
        The text of each row, or why there is none.

    Raises:
        UsageError: If no line is an object, or none has a key that is asked for.
        DamagedDataError: If the file can't be decoded.
        SourceDownError: If it can't be read.
        DataChangedError: If it is another than the pinned one.
    """
    wanted = {selection.column, *(condition.column for condition in selection.where)}
    missing = set(wanted)
    keys: dict[str, None] = {}  # of the objects seen so far, in order, until all wanted are met
    with reading(file.url), _opened(path, file.name) as opened:
        for line in _lines(opened):
            if not line.strip():
                continue
            value = _parse(line)
            if isinstance(value, Dropped):
                yield value
                continue
            if missing:
                keys.update(dict.fromkeys(value))
                missing -= keys.keys()
            yield selection.row(value)
        kind = file.hash.partition(":")[0]
        if file.local is not None and hash_file(path, kind) != file.hash:
            raise DataChangedError(f"{path}: changed since it was listed; start again")
    if not keys:
        raise UsageError(f"{file.url}: holds no JSON object; write one a line")
    for key in sorted(missing):
        names = nearest_first(key, list(keys))
        raise UsageError(f"{file.url}: no key {key!r}; its keys are: {names}")


def _opened(path: Path, name: str) -> BufferedIOBase:
    if name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if name.lower().endswith(".zst"):
        # Arrow's, as it tells a cut file from a whole one and reads frame after frame
        return BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 1 << 20)
    return path.open("rb")


def _lines(file: BufferedIOBase) -> Iterator[bytes]:
    """Read lines; of one that is too long only the head, so that it never fills the memory."""
    first = True
    while line := file.readline(LINE_BYTES):
        yield line.removeprefix(codecs.BOM_UTF8) if first else line
        first = False
        while len(line) == LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES)


def _parse(line: bytes) -> dict[str, Any] | Dropped:
    if len(line) >= LINE_BYTES:
        return TOO_LONG
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BAD_UTF8
    except (ValueError, RecursionError):  # no JSON, a number beyond Python's, nested too deep
        return NOT_JSON
    return value if isinstance(value, dict) else NOT_JSON
