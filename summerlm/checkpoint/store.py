"""Checkpoints on disk: published whole, verified before use, never overwritten.

Flow:
    1. `Store.publish` writes all files into `tmp-<step>-<id>`, hashing and syncing each;
    2. opens every file again, writes `MANIFEST.json` with sizes and SHA-256 and its own hash;
    3. syncs the folder, renames it to `step-<step>`, syncs the parent: now it exists;
    4. `Store.latest` takes the highest step that verifies and sets damaged ones aside, loudly;
    5. `Store.prune` keeps the last few that verify.

Nothing on the load path is a pickle: tensors are safetensors, everything else is JSON or TOML.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from summerlm.core.errors import NoCheckpointError, SaveError
from summerlm.core.files import publish_folder, sha256_file, sync_folder

FORMAT = 1  # of the manifest; a later one is refused by name
MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Contents:
    """What one checkpoint holds.

    Attributes:
        tensors: Tensor tables by file stem, for instance `model` and `optimizer`.
        values: JSON values by file stem, for instance `state`.
        files: Other small files by full name, for instance `tokenizer.json`.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]
    files: Mapping[str, bytes]


class DamagedError(Exception):
    """A checkpoint is not what its manifest says; the message names the file and the reason."""


class Store:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made with the first save.
        warn: Called with one line for each thing a person should know.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn
        self._good: dict[int, bool] = {}  # verdicts of this process

    def path(self, step: int) -> Path:
        """Name the folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """List the steps that have a published checkpoint, good or damaged, in order."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def publish(self, step: int, contents: Contents) -> Path:
        """Write a checkpoint and make it visible in one step.

        Args:
            step: The completed step it belongs to.
            contents: What it holds.

        Returns:
            The published folder.

        Raises:
            SaveError: If the step has a checkpoint already or the disk refuses; nothing half
                written is left.
        """
        draft = self.folder / f"tmp-{step:08d}-{uuid.uuid4().hex[:8]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            draft.mkdir()
            _write_contents(draft, contents)
            _write_manifest(draft, step)
            publish_folder(draft, self.path(step))
        except (OSError, SafetensorError) as error:
            raise SaveError(f"{self.path(step)}: can't be saved: {error}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._good[step] = True
        return self.path(step)

    def latest(self) -> Path | None:
        """Find the newest checkpoint that can be trusted and set newer, damaged ones aside.

        Returns:
            Its folder, or None where none was ever published.

        Raises:
            NoCheckpointError: If there are checkpoints and all of them are damaged; they are left
                as they are.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except DamagedError as error:
                damaged.append((step, str(error)))
                continue
            self._good[step] = True
            for bad, reason in damaged:
                aside = self.folder / f"damaged-{self.path(bad).name}-{uuid.uuid4().hex[:8]}"
                self.path(bad).rename(aside)
                self._warn(f"checkpoint {reason}; set aside as {aside.name}, taking step {step}")
            return self.path(step)
        if damaged:
            reasons = "; ".join(reason for _, reason in damaged)
            raise NoCheckpointError(f"{self.folder}: every checkpoint is damaged: {reasons}")
        return None

    def clear_drafts(self) -> None:
        """Remove what a killed process left unpublished or half deleted."""
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name.startswith(("tmp-", "del-")):
                    shutil.rmtree(entry, ignore_errors=True)

    def prune(self, keep_last: int, keep_steps: Collection[int] = ()) -> None:
        """Delete old checkpoints; only those that verify count as kept.

        Args:
            keep_last: How many of the newest good ones stay.
            keep_steps: Further steps that stay.
        """
        good = [step for step in self.steps() if self._is_good(step)]
        for step in good[:-keep_last]:
            if step not in keep_steps:
                doomed = self.folder / f"del-{self.path(step).name}-{uuid.uuid4().hex[:8]}"
                self.path(step).rename(doomed)  # first the name: half a folder is never found
                shutil.rmtree(doomed, ignore_errors=True)

    def branch_off(self, step: int) -> None:
        """Move the checkpoints past a step out of the way, so that a run can go on from it.

        Args:
            step: The last step that stays.
        """
        later = [s for s in self.steps() if s > step]
        if later:
            branch = self.folder / f"branch-after-{step:08d}-{uuid.uuid4().hex[:8]}"
            branch.mkdir()
            for s in later:
                self.path(s).rename(branch / self.path(s).name)
            sync_folder(self.folder)
            self._warn(f"checkpoints of steps {later[0]} to {later[-1]} moved to {branch.name}")

    def _is_good(self, step: int) -> bool:
        if step not in self._good:
            try:
                verify(self.path(step))
                self._good[step] = True
            except DamagedError as error:
                self._warn(f"checkpoint {error}")
                self._good[step] = False
        return self._good[step]


def verify(folder: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest, byte by byte.

    Args:
        folder: A published checkpoint.

    Returns:
        The manifest.

    Raises:
        DamagedError: If the manifest is missing or altered, or a file is missing, extra, of
            another size or of another hash.
    """
    manifest = _read_manifest(folder)
    expected = manifest["files"]
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if missing := sorted(expected.keys() - present):
        raise DamagedError(f"{folder / missing[0]}: is missing")
    if extra := sorted(present - expected.keys()):
        raise DamagedError(f"{folder / extra[0]}: does not belong here")
    for name, entry in expected.items():
        path = folder / name
        try:
            size, digest = path.stat().st_size, sha256_file(path)
        except OSError as error:
            raise DamagedError(f"{path}: can't be read: {error.strerror}") from None
        if size != entry["bytes"]:
            raise DamagedError(f"{path}: has {size} bytes, the manifest says {entry['bytes']}")
        if digest != entry["sha256"]:
            raise DamagedError(f"{path}: its SHA-256 differs from the manifest's")
    return manifest


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into memory.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        DamagedError: If the file can't be parsed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path}: {error}") from None


def _write_contents(draft: Path, contents: Contents) -> None:
    for stem, tensors in contents.tensors.items():
        path = draft / f"{stem}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != tensors.keys():
                raise OSError(f"{path.name} does not read back")
        _sync_file(path)
    plain = {
        f"{stem}.json": json.dumps(value, allow_nan=False).encode()
        for stem, value in contents.values.items()
    }
    for name, data in {**plain, **contents.files}.items():
        (draft / name).write_bytes(data)
        _sync_file(draft / name)


def _write_manifest(draft: Path, step: int) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(draft.iterdir())
    }
    body = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode()
    path = draft / MANIFEST
    path.write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
    _sync_file(path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        body, _, digest = path.read_bytes().rstrip(b"\n").rpartition(b"\n")
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}") from None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise DamagedError(f"{path}: was altered after it was written")
    manifest: dict[str, Any] = json.loads(body)
    if manifest["format"] != FORMAT:
        raise DamagedError(f"{path}: has format {manifest['format']}, this version reads {FORMAT}")
    if (match := _STEP.fullmatch(folder.name)) and int(match[1]) != manifest["step"]:
        raise DamagedError(f"{path}: belongs to step {manifest['step']}")
    return manifest


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
