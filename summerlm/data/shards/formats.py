"""One file of a source -> its rows, a group at a time.

Flow: `sources` opens every file once as a `Shard` (footer, hash), then reads stripes of its
groups from any process; `jsonlines` gives shards of its own. A row is its text, or the `Dropped`
that leaves it without one. A text file with other bytes than it was opened with is refused, and
so is a parquet file with other rows.
"""

import difflib
import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from summerlm.core.errors import DataChangedError, SourceDownError, UsageError
from summerlm.core.files import sha256_file
from summerlm.data.shards.rows import TURN_KEYS, Row, dialogue, plain_text

BATCH_ROWS = 32  # rows decoded at once, and...
BUFFER_BYTES = 1 << 20  # ...file bytes read at once: what a reader holds beyond its stripe


@dataclass(frozen=True)
class Column:
    """What of a row is its text.

    Args:
        name: Column of a parquet file, or key of a JSON object.
        dialogue: Whether it holds a list of turns rather than a text.
    """

    name: str
    dialogue: bool

    def text_of(self, value: object) -> Row:
        """Read what stands in one row."""
        return dialogue(value) if self.dialogue else plain_text(value)


@dataclass(frozen=True)
class Shard(ABC):
    """One opened file.

    Args:
        name: Path below the source's folder, with `/`; orders the files and keys their rows.
        path: Where the file lies.
        size: Bytes of the file.
        sha256: Hash of the file, hexadecimal.
        groups: Rows of each group.
        group_bytes: Bytes of text of each group, roughly.
    """

    name: str
    path: Path
    size: int
    sha256: str
    groups: tuple[int, ...]
    group_bytes: tuple[int, ...]

    @abstractmethod
    def read(self, group: int, start: int, stop: int) -> Iterator[Row]:
        """Read rows `start` to `stop` (exclusive) of a group.

        Args:
            group: Index of the group.
            start: First row, counted within the group.
            stop: One past the last row.

        Returns:
            The rows in order; as many as asked for.

        Raises:
            DataChangedError: If the file is another than the opened one.
            SourceDownError: If the file can't be read.
        """


@contextmanager
def reading(path: Path, remedy: str = "restore or fetch the file again") -> Iterator[None]:
    """Turn what disks and decoders raise about a file into one line that names it.

    Args:
        path: The file that is read inside.
        remedy: What the user can do about it.

    Yields:
        Nothing; the body of the `with` runs here.

    Raises:
        SourceDownError: If the body meets an unreadable or damaged file.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceDownError(f"{path}: unreadable or damaged ({reason}); {remedy}") from error


def nearest_first(word: str, names: Sequence[str]) -> str:
    """List names for an error message, those that look like `word` first."""
    likeness = {name: difflib.SequenceMatcher(None, word, name).ratio() for name in names}
    return ", ".join(sorted(names, key=lambda name: -likeness[name])) or "none"


class TextShard(Shard):
    """A text or source file: one group of one row, the whole file."""

    def read(self, group: int, start: int, stop: int) -> Iterator[Row]:  # noqa: D102
        assert (group, start, stop) == (0, 0, 1)
        with reading(self.path):
            data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DataChangedError(f"{self.path}: changed since it was opened; start anew")
        yield plain_text(data)


def open_text(name: str, path: Path) -> TextShard:
    """Open a text file as one document.

    Args:
        name: Its name inside the source.
        path: Where it lies.

    Returns:
        The shard.
    """
    with reading(path):
        size = path.stat().st_size
        return TextShard(name, path, size, sha256_file(path), (1,), (size,))


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A parquet file: its row groups, of which only the text's column is read.

    Args:
        column: What of a row is its text.
    """

    remedy: ClassVar[str] = "restore or fetch the file again"

    column: Column

    def read(self, group: int, start: int, stop: int) -> Iterator[Row]:  # noqa: D102
        return map(self.column.text_of, self._values(group, start, stop))

    def _values(self, group: int, start: int, stop: int) -> Iterator[Any]:
        """Yield what the column holds; rows before `start` are decoded and dropped."""
        with reading(self.path, self.remedy), parquet_file(self.path) as file:
            self._check_unchanged(file.metadata)
            position = 0
            for batch in file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self.column.name], use_threads=False
            ):
                wanted = batch.column(0)[max(start - position, 0) : max(stop - position, 0)]
                # as bytes: invalid UTF-8 must cost its own row only
                yield from wanted.cast(_as_bytes(wanted.type)).to_pylist()
                position += batch.num_rows
                if position >= stop:
                    return
        raise SourceDownError(f"{self.path}: group {group} ends before row {stop}; {self.remedy}")

    def _check_unchanged(self, footer: pq.FileMetaData) -> None:
        rows, _ = group_sizes(footer, self.column.name)
        if rows != self.groups:
            raise DataChangedError(
                f"{self.path}: has {sum(rows)} rows in {len(rows)} groups, had {sum(self.groups)} "
                f"in {len(self.groups)} when it was opened; {self.remedy}"
            )


def open_parquet(name: str, path: Path, column: Column) -> ParquetShard:
    """Open a parquet file by its footer.

    Args:
        name: Its name inside the source.
        path: Where it lies.
        column: What of a row is its text.

    Returns:
        The shard.

    Raises:
        UsageError: If the file lacks the column, or the column holds something else.
    """
    with reading(path):
        with parquet_file(path) as file:
            _check_column(path, file.schema_arrow, column)
            rows, sizes = group_sizes(file.metadata, column.name)
        return ParquetShard(name, path, path.stat().st_size, sha256_file(path), rows, sizes, column)


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open a parquet file for reading without threads, as a worker may be forked from here.

    Args:
        path: The file.

    Returns:
        The file; it reads large groups in little memory, and checks pages that have a checksum.
    """
    return pq.ParquetFile(
        path, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
    )


def group_sizes(footer: pq.FileMetaData, column: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Measure the row groups of a parquet file.

    Args:
        footer: The file's metadata.
        column: The column that will be read.

    Returns:
        Rows of each group, and bytes that the column takes in it before compression.
    """
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    sizes = tuple(
        sum(
            leaf.total_uncompressed_size
            for leaf in map(group.column, range(group.num_columns))
            if f"{leaf.path_in_schema}.".startswith(f"{column}.")
        )
        for group in groups
    )
    return tuple(group.num_rows for group in groups), sizes


def _check_column(path: Path, schema: pa.Schema, column: Column) -> None:
    if column.name not in schema.names:
        names = nearest_first(column.name, schema.names)
        raise UsageError(f"{path}: no column {column.name!r}; its columns are: {names}")
    kind = schema.field(column.name).type
    if column.dialogue and not _is_dialogue(kind):
        raise UsageError(
            f"{path}: column {column.name!r} is {kind}, not a list of {{from, value}} or "
            "{role, content}; for plain text set `column`"
        )
    if not column.dialogue and not _is_text(kind):
        hint = "; set `conversations` instead of `column`" if _is_dialogue(kind) else ""
        raise UsageError(f"{path}: column {column.name!r} is {kind}, not text{hint}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_dialogue(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    turn = kind.value_type
    fields = {field.name: field.type for field in turn} if pa.types.is_struct(turn) else {}
    return any(all(key in fields and _is_text(fields[key]) for key in keys) for keys in TURN_KEYS)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Give a column's type with every text in it read as bytes, and turns without other fields."""
    if _is_text(kind):
        return pa.large_binary()
    if not _is_dialogue(kind):
        return kind
    keys = {key for pair in TURN_KEYS for key in pair}
    turn = [(field.name, _as_bytes(field.type)) for field in kind.value_type if field.name in keys]
    return pa.large_list(pa.struct(turn))
