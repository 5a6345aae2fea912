"""One opened file of a source: its groups of rows, readable by any process.

Flow: `formats` opens files as shards; `sources` cuts their groups into units and reads stripes
of them. What a disk or decoder raises about a file passes through `reading`.
"""

import difflib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from summerlm.core.errors import DamagedDataError, SourceDownError
from summerlm.data.shards.rows import Row
from summerlm.data.shards.transfer import File, Transfer


@dataclass(frozen=True)
class Shard(ABC):
    """One opened file; plain data, safe to pickle.

    Args:
        file: The file.
        groups: Rows of each group.
        group_bytes: Bytes of text of each group, roughly.
        transfer: Reads the file.
    """

    file: File
    groups: tuple[int, ...]
    group_bytes: tuple[int, ...]
    transfer: Transfer

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
            DataChangedError: If the file is another than the pinned one.
            DamagedDataError: If the group can't be decoded, even when its bytes are read again.
            SourceDownError: If the file can't be read.
            UsageError: If the file lacks a column that the settings name.
        """


@contextmanager
def reading(
    what: str,
    remedy: str = "restore or fetch the file again",
    damage: type[SourceDownError] = DamagedDataError,
) -> Iterator[None]:
    """Turn what disks and decoders raise about a file into one line that names it.

    Args:
        what: The file, and the part of it that is read inside.
        remedy: What the user can do about it.
        damage: What is raised for bytes that can't be decoded.

    Yields:
        Nothing; the body of the `with` runs here.

    Raises:
        SourceDownError: If the body meets an unreadable file, and as `damage` a damaged one.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; decoders set none
            raise SourceDownError(f"{what}: can't be read ({reason}); {remedy}") from error
        raise damage(f"{what}: damaged ({reason}); {remedy}") from error


def nearest_first(word: str, names: Sequence[str]) -> str:
    """List names for an error message, those that look like `word` first."""
    likeness = {name: difflib.SequenceMatcher(None, word, name).ratio() for name in names}
    return ", ".join(sorted(names, key=lambda name: -likeness[name])) or "none"
