"""A folder of dealt steps: its files, and the manifest that vouches for them.

    MANIFEST.json               what the steps are, and size and SHA-256 of every other file
    data.lock.json              the lock of the sources
    held-out.json               held-out texts, for validation
    000000001-000000976.rows    the rows of these steps in global order, to be memory-mapped
    000000001-000000976.json    what each step accounts for; where lanes stand after the last

Flow: `writing` adds a shard at a time and publishes the manifest anew after each, so at any
moment the folder is a whole one of fewer steps; `reading` opens it.

Shapes: B rows of T targets in a step.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from summerlm.core.config import differences, validate
from summerlm.core.errors import DamagedDataError, DataChangedError, UsageError
from summerlm.core.files import sha256_file, write_json
from summerlm.data.config import HOW, DataConfig

FORMAT = 1  # a later one is refused by name
MANIFEST, LOCK, HELD_OUT = "MANIFEST.json", "data.lock.json", "held-out.json"
MENDING = "copy the file anew, or tokenize into another folder"


class Entry(NamedTuple):
    """What the manifest says of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "Entry":
        """Describe a file by its content."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


class Shard(NamedTuple):
    """The steps of one pair of files, first and last included."""

    first: int
    last: int

    @property
    def rows(self) -> str:
        """Name of the file of its rows."""
        return f"{self.first:09}-{self.last:09}.rows"

    @property
    def account(self) -> str:
        """Name of the file of its counts and lanes."""
        return f"{self.first:09}-{self.last:09}.json"


@dataclass(frozen=True)
class Manifest:
    """What a folder of dealt steps holds.

    Args:
        identity: `DataOrder.identity` of the steps.
        data: The settings of the data that decide what is read, as plain values.
        vocabulary: Ids are below it.
        held_out_characters: Held-out text of each source that was asked for, in characters.
        versions: What wrote the folder.
        files: Every other file by name.
        shards: The shards in the order of their steps.
    """

    identity: dict[str, Any]
    data: dict[str, Any]
    vocabulary: int
    held_out_characters: int
    versions: dict[str, str]
    files: dict[str, Entry]
    shards: tuple[Shard, ...] = ()

    @property
    def steps(self) -> int:
        """How many steps the folder holds, from the first on."""
        return self.shards[-1].last if self.shards else 0

    @property
    def row_type(self) -> np.dtype[np.void]:
        """How a row lies in a file: its T + 1 ids, the index of its source, its checksum."""
        ids, source = (
            np.min_scalar_type(count - 1).newbyteorder("<")
            for count in (self.vocabulary, len(self.identity["sources"]))
        )
        width = self.identity["context"] + 1
        return np.dtype([("ids", ids, (width,)), ("source", source), ("check", "<u8")])

    def checksums(self, rows: NDArray[np.void], numbers: range) -> NDArray[np.uint64]:
        """Hash rows together with their place in the run and what run it is.

        Args:
            rows: The rows, (n,), of `row_type`, contiguous; their own checksums don't count.
            numbers: The global number of each.

        Returns:
            The checksums, (n,).
        """
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).digest()
        width = rows.dtype.itemsize
        content = rows.view(np.uint8).reshape(-1, width)[:, : width - 8]
        digests = [
            hashlib.blake2b(row, digest_size=8, key=key, salt=number.to_bytes(8, "little")).digest()
            for row, number in zip(content, numbers, strict=True)
        ]
        return np.frombuffer(b"".join(digests), "<u8")


def order_settings(data: DataConfig) -> dict[str, Any]:
    """Give the settings of the data that decide what is read, as plain values."""
    return data.model_dump(mode="json", exclude=set(HOW))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a manifest, with a hash of its own.

    Args:
        folder: The folder; every file that the manifest lists lies there, whole.
        manifest: The manifest.

    Raises:
        SaveError: If it can't be written.
    """
    body = {"format": FORMAT, **asdict(manifest)}
    write_json(folder / MANIFEST, {"manifest": body, "sha256": _hash(body)})


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest and look whether its files are there.

    Args:
        folder: The folder.

    Returns:
        The manifest.

    Raises:
        UsageError: If there is none, or one of another version.
        DamagedDataError: If it was altered, or a file is missing or has another size.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; `summerlm data tokenize` makes such a folder"
        ) from None
    try:
        whole = json.loads(text)
        body, digest = whole["manifest"], whole["sha256"]
    except (ValueError, LookupError, TypeError):
        raise DamagedDataError(f"{path}: no manifest; {MENDING}") from None
    if _hash(body) != digest:
        raise DamagedDataError(f"{path}: was altered after it was written; {MENDING}")
    if (version := body.pop("format")) != FORMAT:
        raise UsageError(f"{path}: has format {version}, this version reads {FORMAT}")
    files = {name: Entry(*entry) for name, entry in body.pop("files").items()}
    shards = tuple(Shard(*shard) for shard in body.pop("shards"))
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedDataError(f"{folder / name}: {error.strerror}; {MENDING}") from None
        if size != entry.size:
            raise DamagedDataError(
                f"{folder / name}: has {size} bytes, the manifest says {entry.size}; {MENDING}"
            )
    return Manifest(files=files, shards=shards, **body)


def verify_files(folder: Path, manifest: Manifest, progress: Callable[[int, int], None]) -> None:
    """Compare every file with its SHA-256.

    Args:
        folder: The folder.
        manifest: Its manifest.
        progress: Called with the bytes that are done and all bytes.

    Raises:
        DamagedDataError: If a file differs.
    """
    done, total = 0, sum(entry.size for entry in manifest.files.values())
    for name, entry in manifest.files.items():
        if sha256_file(folder / name) != entry.sha256:
            raise DamagedDataError(f"{folder / name}: its SHA-256 is not the manifest's; {MENDING}")
        done += entry.size
        progress(done, total)


def require_order(
    folder: Path,
    manifest: Manifest,
    data: DataConfig,
    *,
    seed: int,
    rows: int,
    context: int,
    tokenizer: str,
) -> None:
    """Refuse a folder whose steps are not those that settings ask for.

    Args:
        folder: The folder.
        manifest: Its manifest.
        data: The settings of the data.
        seed: Seed of the order.
        rows: B, rows of the global batch.
        context: T, targets a row.
        tokenizer: The tokenizer's fingerprint.

    Raises:
        DataChangedError: If a setting differs; the message names it and both values.
    """
    was = manifest.identity
    pairs = {
        "run.seed": (was["seed"], seed),
        "model.context": (was["context"], context),
        "train.batch_tokens": (was["rows"] * was["context"], rows * context),
        "the tokenizer's fingerprint": (was["tokenizer"], tokenizer),
        "the order of data.sources": (was["sources"], list(data.sources)),
    }
    old, new = (
        validate(DataConfig, values, str(folder / MANIFEST))
        for values in (manifest.data, order_settings(data))
    )
    pairs |= {f"data.{key}": pair for key, pair in differences(old, new).items()}
    lines = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in pairs.items() if old != new]
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise DataChangedError(
            f"{folder}: was tokenized by other settings: {lines[0]}{more}; "
            "restore them, or tokenize into another folder"
        )


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
