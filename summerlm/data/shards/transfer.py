"""Bytes of a file, wherever it lies: with retries, under a deadline, checked against its pin.

Flow:
    1. `files` lists a source's files as `File`s, each with the size and hash that pin it;
    2. `parquet`, `jsonlines` and text shards read them through a `Transfer`: `fetch` for a whole
       file, kept in the cache folder, `open` for ranges of a large one;
    3. each read goes through `retried`; what it met is an incident, drained by `take_incidents`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from summerlm.core.errors import DamagedDataError, DataChangedError, SourceDownError
from summerlm.data.shards import stores
from summerlm.data.shards.cache import cached, drafting, making
from summerlm.data.shards.hashes import hash_file
from summerlm.data.shards.ranges import RangeReader
from summerlm.data.shards.retrying import Transient, retried
from summerlm.data.shards.web import (
    FORBIDDEN,
    MISSING,
    NO_RANGE,
    Patience,
    Refused,
    Told,
    is_web,
)

T = TypeVar("T")

PIECE_BYTES = 16 << 20  # a whole file is fetched in requests of this size

_TAGS = {"sha256": 64, "git": 40}  # hexadecimal digits of a tag that is a hash of the kind


@dataclass(frozen=True)
class File:
    """A file of a source.

    Args:
        name: Path below the source's folder or repository, with `/`; orders the files and keys
            their rows.
        url: Path on this machine, or a URL.
        size: Bytes of the file.
        hash: What pins the bytes: `sha256:...`, `git:...` (the sha1 of the git blob) or
            `etag:...` (the store's tag).
    """

    name: str
    url: str
    size: int
    hash: str

    def pin(self) -> dict[str, Any]:
        """Say what a lock records of the file before it is opened."""
        return {"name": self.name, "bytes": self.size, "hash": self.hash}

    @property
    def local(self) -> Path | None:
        """Where the file lies on this machine; None for a remote one."""
        return None if "://" in self.url else Path(self.url)


class Transfer:
    """Reads files with retries; plain data, safe to pickle.

    Args:
        stall_timeout_s: Longest silence of a connection before it is cut.
        deadline_s: Longest time for a read with all its retries.
    """

    def __init__(self, stall_timeout_s: float, deadline_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        self.deadline_s = deadline_s
        self.incidents: list[dict[str, Any]] = []
        self._checked: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process: its incidents, and what it checked."""
        return {**self.__dict__, "incidents": [], "_checked": set()}

    def take_incidents(self) -> list[dict[str, Any]]:
        """Give what was tried again since the last call, each with a `reason` of one line."""
        taken = self.incidents[:]
        del self.incidents[: len(taken)]  # another thread may be adding to them
        return taken

    def open(self, file: File, parts: Sequence[tuple[int, int]] = ()) -> BinaryIO:
        """Open a file for reading in any order.

        Args:
            file: The file.
            parts: First byte and end of each stretch that will be read from its start to its
                end: what a remote file is read ahead by.

        Returns:
            The open file.

        Raises:
            DataChangedError: If it has another size.
            SourceDownError: If it can't be opened.
        """
        if (path := file.local) is None:
            reader = RangeReader(lambda start, stop: self.read(file, start, stop), file.size, parts)
            return cast(BinaryIO, reader)
        try:
            opened = path.open("rb")
        except OSError as error:
            raise SourceDownError(f"{path}: can't be read ({error.strerror})") from error
        self._check(file, Told(os.fstat(opened.fileno()).st_size, None))
        return opened

    def read(self, file: File, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a remote file.

        Args:
            file: The file.
            start: First byte.
            stop: One past the last byte.

        Returns:
            Exactly these bytes.

        Raises:
            DataChangedError: If the store says that the file is another, or gone.
            SourceDownError: If it can't be read before the deadline.
        """

        def attempt(patience: Patience) -> bytes:
            if not is_web(file.url) and file.url not in self._checked:
                self._check(file, stores.describe(file.url, patience))
                self._checked.add(file.url)
            data, told = stores.read(file.url, start, stop, file.size, patience)
            self._check(file, told)
            assert len(data) == stop - start
            return data

        try:
            return self.ask(file.url, attempt)
        except Refused as refusal:
            if refusal.status in (MISSING, NO_RANGE, 410):
                raise DataChangedError(
                    f"{file.url}: {refusal}; the file is gone or shorter than the {file.size} "
                    "bytes that were pinned; bring it back or start a new run"
                ) from None
            raise SourceDownError(f"{file.url}: {in_words(refusal, file.url)}") from None

    def fetch(self, file: File) -> Path:
        """Bring a whole file to this machine, into the cache folder.

        Args:
            file: The file.

        Returns:
            Where it lies; its bytes have the file's hash, or its size where only a tag pins it.

        Raises:
            DataChangedError: If the store says that the file is another, or gone.
            DamagedDataError: If the bytes have another hash, twice.
            SourceDownError: If it can't be read before the deadline.
            SaveError: If the cache can't be written.
        """
        if (path := file.local) is not None:
            return path
        copy = self.copy_of(file)
        with making(copy):
            if not copy.exists():
                try:
                    self._download(file, copy)
                except DamagedDataError as damage:
                    self.incidents.append({"reason": f"{damage}; read anew"})
                    self._download(file, copy)
        return copy

    def copy_of(self, file: File) -> Path:
        """Name the place in the cache folder where `fetch` keeps a remote file."""
        by_tag = [file.url, file.size] if file.hash.startswith("etag:") else []
        return cached("files", file.hash, *by_tag)

    def ask(self, what: str, attempt: Callable[[Patience], T]) -> T:
        """Ask a store, again and again where it may help.

        Args:
            what: File or URL, for messages.
            attempt: Asks once, within its patience.

        Returns:
            The answer.

        Raises:
            Refused: If the store refuses.
            SourceDownError: If no attempt works before the deadline.
        """
        return retried(
            what,
            lambda until: attempt(Patience(self.stall_timeout_s, until)),
            self.deadline_s,
            self.incidents.append,
        )

    def _download(self, file: File, copy: Path) -> None:
        """Write a copy, whose bytes must have the pinned hash."""
        kind = file.hash.partition(":")[0]
        with drafting(copy) as draft:
            for start in range(0, file.size, PIECE_BYTES):
                draft.write(self.read(file, start, min(start + PIECE_BYTES, file.size)))
            draft.flush()
            if kind != "etag" and hash_file(Path(draft.name), kind) != file.hash:
                raise DamagedDataError(f"{file.url}: its bytes don't have the hash {file.hash}")

    def _check(self, file: File, told: Told | None) -> None:
        """Compare what is told of a file with what pins it."""
        if told is None:
            raise DataChangedError(f"{file.url}: was a file and is a folder")
        kind, _, value = file.hash.partition(":")
        comparable = len(told.tag or "") == _TAGS[kind] if kind in _TAGS else told.tag and value
        if comparable and told.tag != value:
            raise DataChangedError(
                f"{file.url}: changed since it was pinned: its tag was {value[:40]} and is "
                f"{(told.tag or '')[:40]}; restore it or start a new run"
            )
        if told.size not in (None, file.size):
            if comparable:  # the same file, by its tag: cut on its way
                raise Transient(f"sends {told.size} of {file.size} bytes")
            raise DataChangedError(
                f"{file.url}: has {told.size} bytes, and had {file.size} when it was pinned; "
                "restore it or start a new run"
            )


def in_words(refusal: Refused, url: str) -> str:
    """Say what a user can do about a refusal.

    Args:
        refusal: What a store answered.
        url: What it was asked for.

    Returns:
        Half a line, to stand behind the name of what was asked for.
    """
    if refusal.status not in (401, FORBIDDEN):
        return str(refusal)
    if not is_web(url):
        return (
            f"access denied ({refusal}); give credentials to this machine, or for a public bucket "
            "set FSSPEC_S3_ANON=true or FSSPEC_GS_TOKEN=anon"
        )
    if "gated" in str(refusal).lower():
        return (
            f"access denied ({refusal}); accept the terms on the repository's page, then log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    return (
        f"access denied ({refusal}); log in with `hf auth login` or set HF_TOKEN to a token that "
        "may read it, and see whether the repository's page asks to accept terms"
    )
