"""The folder of derived files: copies and footers that can always be made again.

Flow: `transfer` keeps fetched files here, `jsonlines` its copies, `parquet` footers, `hashes`
what it computed. Everything appears whole and under a name that tells its content, so several
processes may share the folder.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from summerlm.core.errors import SaveError
from summerlm.core.files import sync_folder


def cache_folder() -> Path:
    """Give the folder of derived files: `$SUMMERLM_CACHE`, or `~/.cache/summerlm`."""
    return Path(os.environ.get("SUMMERLM_CACHE") or "~/.cache/summerlm").expanduser()


def cached(folder: str, *key: Any) -> Path:
    """Name a file of the cache by what it is made of.

    Args:
        folder: Folder of the cache.
        *key: All that decides the file's bytes, as JSON values.

    Returns:
        Its path, whether it exists or not.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_folder() / folder / digest


@contextmanager
def drafting(target: Path) -> Iterator[IO[bytes]]:
    """Write a file of the cache so that it appears whole; of two writers the last one wins.

    Args:
        target: Its path.

    Yields:
        The open draft; it is dropped where the body raises.

    Raises:
        SaveError: If the disk refuses.
    """
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with _saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(draft, target)
            except BaseException:
                draft.unlink()
                raise
        sync_folder(target.parent)


@contextmanager
def making(target: Path) -> Iterator[None]:
    """Let one process at a time make a file of the cache, so that the others find it made.

    Args:
        target: Its path.

    Yields:
        Nothing; the body looks whether the file exists, and makes it if not.

    Raises:
        SaveError: If the disk refuses.
    """
    path = cache_folder() / "locks" / target.name
    with _saving(target):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        with suppress(OSError):  # a file system without locks: then some work is done twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _saving(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{target.parent}: can't write the cache ({error.strerror or error}); make room or set "
            "SUMMERLM_CACHE to another folder"
        ) from error
