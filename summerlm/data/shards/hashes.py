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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from summerlm.core.errors import SourceDownError
from summerlm.core.progress import Progress, silent
from summerlm.data.shards.cache import cached, drafting

SETTLED_NS = 2_000_000_000  # a file younger than this could change again within the same time stamp
_THREADS = 8


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
    known = _read(store)
    now = time.time_ns()
    stamps, found = {}, {}
    for name, kind in files:
        stamp = _stamp(folder / name)
        if known.get(f"{kind} {name}", [None])[0] == stamp:
            found[name] = (stamp[0], known[f"{kind} {name}"][1])
        else:
            stamps[name] = (kind, stamp)
    total, done = sum(stamp[0] for _, stamp in stamps.values()), 0
    fresh = {}
    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            jobs = {n: threads.submit(_hash, folder / n, kind) for n, (kind, _) in stamps.items()}
            try:
                for name, job in jobs.items():
                    kind, stamp = stamps[name]
                    found[name] = (stamp[0], job.result())
                    done += stamp[0]
                    progress("hashing files", done, total)
                    if max(stamp[1:3]) < now - SETTLED_NS and _stamp(folder / name) == stamp:
                        fresh[f"{kind} {name}"] = [stamp, found[name][1]]
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
    finally:
        if fresh:
            with drafting(store) as file:
                file.write(json.dumps(_read(store) | fresh).encode())
    return found


def _hash(path: Path, kind: str) -> str:
    try:
        return hash_file(path, kind)
    except OSError as error:
        raise SourceDownError(f"{path}: can't be read ({error.strerror})") from error


def _stamp(path: Path) -> list[int]:
    """Give what changes when a file does: its size, times of content and inode, and inode."""
    try:
        stat = path.stat()
    except OSError as error:
        raise SourceDownError(f"{path}: can't be read ({error.strerror})") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(store: Path) -> dict[str, Any]:
    try:
        return json.loads(store.read_bytes())
    except (OSError, ValueError):  # none yet, or not ours: then everything is hashed
        return {}
