"""The files of a source -> opened shards, by the kind that their names tell.

Flow: `sources` hands over what `find_files` lists, and the sizes that a lock pins. Without those,
footers are read here; with them nothing is, and a shard checks them when it is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO

from summerlm.core.errors import DataChangedError, SourceDownError, UsageError
from summerlm.core.progress import Progress, silent
from summerlm.data.config import SourceConfig
from summerlm.data.shards.hashes import hash_stream
from summerlm.data.shards.jsonlines import make_copies, open_json_lines
from summerlm.data.shards.parquet import ParquetShard, open_parquet
from summerlm.data.shards.rows import Row, plain_text
from summerlm.data.shards.selection import selection
from summerlm.data.shards.shard import Shard, reading
from summerlm.data.shards.threads import in_threads
from summerlm.data.shards.transfer import File, Transfer

Sizes = tuple[tuple[int, ...], tuple[int, ...]]  # rows and bytes of each group

_JSON_LINES = tuple(
    kind + packed for kind in (".json", ".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")
)
_NOT_READ = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z")


class TextShard(Shard):
    """A text or source file: one group of one row, the whole file."""

    def read(self, group: int, start: int, stop: int) -> Iterator[Row]:  # noqa: D102
        assert (group, start, stop) == (0, 0, 1)
        path = self.transfer.fetch(self.file)
        with reading(str(path)):
            data = path.read_bytes()
        kind = self.file.hash.partition(":")[0]
        if kind != "etag" and hash_stream(BytesIO(data), len(data), kind) != self.file.hash:
            if self.file.local is None:
                raise SourceDownError(f"{path}: damaged; delete this copy, it is fetched again")
            raise DataChangedError(
                f"{path}: changed since it was pinned; restore it or start a new run"
            )
        yield plain_text(data)


def open_shards(
    source: str,
    config: SourceConfig,
    files: Sequence[File],
    transfer: Transfer,
    pinned: Mapping[str, Sizes] | None = None,
    progress: Progress = silent,
) -> list[Shard]:
    """Open the files of a source, which are of one kind.

    Args:
        source: The source's name, for messages.
        config: Its settings.
        files: Its files.
        transfer: Reads them.
        pinned: Rows and bytes of each group, by the file's name, where a lock knows them.
        progress: Called with how many files are opened.

    Returns:
        A shard for each file, in their order.

    Raises:
        UsageError: If the files are of several kinds, or don't fit the settings.
        DamagedDataError: If a file can't be decoded, even when it is read again.
        SourceDownError: If a file can't be read.
        SaveError: If the cache can't be written.
    """
    pinned = pinned or {}
    chosen = selection(source, config)
    kinds = {_kind(file.name): file.name for file in reversed(files)}  # with the first of each
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise UsageError(f"source {source}: mixes {found}; choose one kind with `files`")
    (kind,) = kinds
    if kind == "text":
        if config.column or config.conversations or config.where:
            raise UsageError(
                f"source {source}: {kinds[kind]} is read whole; it has no columns to choose"
            )
        return [TextShard(file, (1,), (file.size,), transfer) for file in files]

    if kind == "JSON lines":
        make_copies(files, chosen, transfer, progress)
        return [open_json_lines(f, chosen, transfer, pinned.get(f.name)) for f in files]

    def opened(file: File) -> Shard:
        if file.name in pinned:
            return ParquetShard(file, *pinned[file.name], transfer, chosen)
        return open_parquet(file, chosen, transfer)

    shards: dict[File, Shard] = {}
    for file, shard in in_threads(opened, files):
        shards[file] = shard
        progress("opening files", len(shards), len(files))
    return [shards[file] for file in files]


def _kind(name: str) -> str:
    lower = name.lower()
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(_JSON_LINES):
        return "JSON lines"
    if lower.endswith(_NOT_READ):
        raise UsageError(
            f"{name}: can't be read in this form; unpack it, or leave it out by a glob"
        )
    return "text"
