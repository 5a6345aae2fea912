"""Hashes that pin a file's bytes, computed once for a local file and then remembered.

Flow: `files` hashes what lies on this machine, `transfer` what it fetched. What is remembered
lies in the cache folder, one file for each folder of data; a file is hashed again when its size,
times or inode are others, so a start doesn't read terabytes.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from summerlm.core.errors import SourceDownError
from summerlm.core.progress import Progress, silent
from summerlm.data.shards.cache import cached, drafting
from summerlm.data.shards.threads import in_threads

SETTLED_NS = 2_000_000_000  # a file younger than this could change again within the same time stamp
_THREADS = 8


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int
    content_ns: int  # when its content last changed, as far as it tells,
    inode_ns: int  # and when anything of it did, which no tool can set back
    inode: int


def hash_file(path: Path, kind: str) -> str:
    """Hash a file.

    Args:
        path: The file.
        kind: `sha256`, or `git` for the sha1 by which git names a file's bytes.

    Returns:
        The hash, as `sha256:...` or `git:...`.
    """
    with path.open("rb") as file:
        return hash_stream(file, os.fstat(file.fileno()).st_size, kind)


def hash_stream(stream: BinaryIO, size: int, kind: str) -> str:
    r"""Hash what a stream still gives.

    Args:
        stream: The bytes.
        size: How many they are.
        kind: As for `hash_file`.

    Returns:
        The hash, as `hash_file` gives it.

    Source:
        Pro Git, section 10.2, "Git objects": sha1 over `blob <bytes>\0` and the bytes.
    """
    assert kind in ("sha256", "git")
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {size}\0".encode())
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def remembered_hashes(
    folder: Path, files: Iterable[tuple[str, str]], progress: Progress = silent
) -> dict[str, tuple[int, str]]:
    """Hash files of a folder, as far as they are not remembered.

    Args:
        folder: The folder, absolute.
        files: Name below the folder and kind of hash of each file.
        progress: Called now and then with the bytes that are hashed.

    Returns:
        Bytes and hash of each file, by name.

    Raises:
        SourceDownError: If a file can't be read.
        SaveError: If the cache can't be written.
    """
    store = cached("hashes", str(folder))
    known, found, stamps = _read(store), {}, {}
    for name, kind in files:
        stamp = _stamp(folder / name)
        remembered, digest = known.get(f"{kind} {name}", (None, ""))
        if remembered == stamp:
            found[name] = (stamp.size, digest)
        else:
            stamps[name, kind] = stamp
    total, done = sum(stamp.size for stamp in stamps.values()), 0
    settled, fresh = time.time_ns() - SETTLED_NS, {}
    try:
        for (name, kind), digest in in_threads(lambda item: _hash(folder, *item), stamps, _THREADS):
            stamp = stamps[name, kind]
            found[name] = (stamp.size, digest)
            done += stamp.size
            progress("hashing files", done, total)
            if max(stamp.content_ns, stamp.inode_ns) < settled and _stamp(folder / name) == stamp:
                fresh[f"{kind} {name}"] = (stamp, digest)
    finally:
        if fresh:
            with drafting(store) as file:
                file.write(json.dumps(_read(store) | fresh).encode())
    return found


def _hash(folder: Path, name: str, kind: str) -> str:
    try:
        return hash_file(folder / name, kind)
    except OSError as error:
        raise SourceDownError(f"{folder / name}: can't be read ({error.strerror})") from error


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError as error:
        raise SourceDownError(f"{path}: can't be read ({error.strerror})") from error
    return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _read(store: Path) -> dict[str, tuple[Stamp, str]]:
    try:
        entries = json.loads(store.read_bytes())
    except (OSError, ValueError):  # none yet: then everything is hashed
        return {}
    return {key: (Stamp(*stamp), digest) for key, (stamp, digest) in entries.items()}
