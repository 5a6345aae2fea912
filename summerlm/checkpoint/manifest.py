"""What a checkpoint must be, written down beside it: every file, every tensor, and its own hash.

Flow: the leading rank calls `write_manifest` when all files of all ranks lie in the draft; whoever
uses a checkpoint calls `verify` first, on many ranks each for its share of the files.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from summerlm.core.errors import NoCheckpointError
from summerlm.core.failpoints import reach
from summerlm.core.files import sha256_file
from summerlm.core.ranks import ALONE, Ranks

FORMAT = 2  # 1 had one file of whole tensors; another one is refused by name
MANIFEST = "MANIFEST.json"
STEP = re.compile(r"step-(\d{8,})")


class DamagedError(Exception):
    """A checkpoint is not what its manifest says; the message names the file and the reason."""


def write_manifest(draft: Path, facts: Mapping[str, Any]) -> None:
    """Write and sync the manifest of a draft.

    Args:
        draft: The folder, whose files are written and synced.
        facts: `step`, `world`, `files` with the size and SHA-256 of each, `tensors` and
            `identity`; JSON values.
    """
    body = json.dumps({"format": FORMAT, **facts}, allow_nan=False).encode()
    with (draft / MANIFEST).open("wb") as file:
        file.write(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
        file.flush()
        reach("publish.manifest_written")
        os.fsync(file.fileno())
    reach("publish.manifest_synced")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest and hold it against its own hash.

    Args:
        folder: A published checkpoint.

    Returns:
        What it says.

    Raises:
        DamagedError: If it is missing, altered, or another step's.
        NoCheckpointError: If it is whole, but of another format.
    """
    path = folder / MANIFEST
    try:
        body, _, digest = path.read_bytes().rstrip(b"\n").rpartition(b"\n")
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}") from None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedError(f"{path}: was altered after it was written")
    manifest: dict[str, Any] = json.loads(body)
    if manifest["format"] != FORMAT:
        raise NoCheckpointError(
            f"{path}: has format {manifest['format']}, this version reads {FORMAT}; go on with "
            "the version that wrote it, or in another run folder"
        )
    if (match := STEP.fullmatch(folder.name)) and int(match[1]) != manifest["step"]:
        raise DamagedError(f"{path}: belongs to step {manifest['step']}")
    return manifest


def verify(folder: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Check a checkpoint against its manifest, byte by byte.

    Args:
        folder: A published checkpoint.
        ranks: Those who check it together: each reads the bytes of its share of the files.

    Returns:
        The manifest.

    Raises:
        DamagedError: If the manifest is missing or altered, or a file is missing, extra, of
            another size or, in this rank's share, of another hash.
        NoCheckpointError: If it is of another format.
    """
    manifest = read_manifest(folder)
    for name in _share(manifest["files"], ranks):
        check_file(folder, name, manifest)
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if missing := sorted(manifest["files"].keys() - present):
        raise DamagedError(f"{folder / missing[0]}: is missing")
    if extra := sorted(present - manifest["files"].keys()):
        raise DamagedError(f"{folder / extra[0]}: does not belong here")
    return manifest


def check_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Check one file of a checkpoint, byte by byte.

    Args:
        folder: The checkpoint.
        name: The file, one of its manifest.
        manifest: What `read_manifest` returned.

    Raises:
        DamagedError: If the file is missing, or of another size or hash.
    """
    path, entry = folder / name, manifest["files"][name]
    try:
        size = path.stat().st_size
        digest = sha256_file(path) if size == entry["bytes"] else ""
    except FileNotFoundError:
        raise DamagedError(f"{path}: is missing") from None
    except OSError as error:
        raise DamagedError(f"{path}: can't be read: {error.strerror}") from None
    if size != entry["bytes"]:
        raise DamagedError(f"{path}: has {size} bytes, the manifest says {entry['bytes']}")
    if digest != entry["sha256"]:
        raise DamagedError(f"{path}: its SHA-256 differs from the manifest's")


def _share(files: Mapping[str, Mapping[str, Any]], ranks: Ranks) -> list[str]:
    """Deal the files to the ranks by their bytes; each rank's share, the same on every call."""
    loads, share = [0] * ranks.world, []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        rank = loads.index(min(loads))
        loads[rank] += files[name]["bytes"]
        if rank == ranks.rank:
            share.append(name)
    return share
