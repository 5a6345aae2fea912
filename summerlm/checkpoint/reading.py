"""Rows of a checkpoint's tensors, whatever layout wrote them, into those of the layout at hand.

Flow: `fill` gives a resumed run its state and `load` its weights; `read_tensors` gives a whole
table. Only the rows that are needed are read. Files have been verified before.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from summerlm.checkpoint.manifest import MANIFEST, DamagedError, read_manifest
from summerlm.checkpoint.snapshot import is_finite
from summerlm.core.errors import NoCheckpointError
from summerlm.core.parts import Part


def fill(folder: Path, manifest: Mapping[str, Any], stem: str, parts: Mapping[str, Part]) -> None:
    """Copy a checkpoint's rows into the tensors of this rank, in place.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        stem: Which table.
        parts: What to fill: all tensors of the table, of each the rows that this rank holds.

    Raises:
        NoCheckpointError: If a name, shape or dtype is not the checkpoint's; nothing is copied.
        DamagedError: If a file can't be read as its manifest says, or a value is not finite; some
            tensors may be filled then.
    """
    table = manifest["tensors"].get(stem, {})
    check_fit(folder, stem, table, parts)
    wanted: dict[str, list[tuple[str, int, int, int]]] = defaultdict(list)
    check_pieces(folder, table, manifest["files"])
    for name, part in parts.items():
        for file, start, stop in table[name]["pieces"]:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                wanted[file].append((name, start, low, high))
    for file, rows in sorted(wanted.items()):
        path = folder / file
        try:
            with safe_open(path, framework="pt") as source, torch.no_grad():
                for name, start, low, high in rows:
                    into = _rows(parts[name], low, high)
                    saved = _read(source, name, parts[name], low - start, high - start)
                    if saved.shape != into.shape or saved.dtype != into.dtype:
                        raise DamagedError(f"{path}: {name} is not what the manifest says")
                    if saved.is_floating_point() and not is_finite(saved):
                        raise DamagedError(f"{path}: {name} holds a value that is not finite")
                    into.copy_(saved)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path}: {error}") from None


def _rows(part: Part, low: int, high: int) -> Tensor:
    """Give some of the rows that a rank holds, by their numbers in the whole tensor."""
    return part.tensor[low - part.start : high - part.start] if part.shape else part.tensor


def _read(source: Any, name: str, part: Part, low: int, high: int) -> Tensor:
    """Read some of the rows that a file holds, by their numbers in the file."""
    read: Tensor = source.get_slice(name)[low:high] if part.shape else source.get_tensor(name)
    return read.contiguous()


def check_pieces(folder: Path, table: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Hold a manifest's table of tensors against itself: all rows, each once, in files it hashes.

    Args:
        folder: The checkpoint, for the message.
        table: Its account of some tensors.
        files: Its files.

    Raises:
        DamagedError: If a piece lies in another file, or rows are missing or there twice.
    """
    for name, facts in table.items():
        reached = 0
        for file, start, stop in sorted(facts["pieces"], key=lambda piece: piece[1:]):
            if file not in files:
                raise DamagedError(
                    f"{folder / MANIFEST}: {name} lies in {file}, which isn't listed"
                )
            if start != reached or stop <= start:
                raise DamagedError(f"{folder / MANIFEST}: {name} has no whole row {reached}")
            reached = stop
        if reached != (facts["shape"] or [1])[0]:
            raise DamagedError(f"{folder / MANIFEST}: {name} ends at row {reached}")


def check_fit(folder: Path, stem: str, table: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Compare a checkpoint's tensors with those that are to be filled.

    Args:
        folder: The checkpoint, for the message.
        stem: Which table.
        table: The manifest's account of it.
        parts: What is to be filled.

    Raises:
        NoCheckpointError: If a name is missing or extra, or a shape or dtype differs.
    """
    place = f"{folder}: {stem}"
    if missing := sorted(parts.keys() - table.keys()):
        raise NoCheckpointError(f"{place} has no tensor {missing[0]}")
    if extra := sorted(table.keys() - parts.keys()):
        raise NoCheckpointError(f"{place} tensor {extra[0]} is not part of this run")
    for name, part in parts.items():
        saved = (table[name]["dtype"], tuple(table[name]["shape"]))
        wanted = (str(part.tensor.dtype).removeprefix("torch."), part.shape)
        if saved != wanted:
            raise NoCheckpointError(
                f"{place} tensor {name} is {saved[1]} {saved[0]}, "
                f"this run wants {wanted[1]} {wanted[0]}"
            )


def check_finite(path: Path) -> None:
    """Look at every value of a file of tensors, one tensor at a time.

    Args:
        path: The file.

    Raises:
        DamagedError: If it can't be parsed, or a value is not finite.
    """
    try:
        with safe_open(path, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118
                tensor = source.get_tensor(name)
                if tensor.is_floating_point() and not is_finite(tensor):
                    raise DamagedError(f"{path}: {name} holds a value that is not finite")
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path}: {error}") from None


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read a whole table of a checkpoint into memory.

    Args:
        folder: The checkpoint.
        stem: Which table: "model" or "optimizer".

    Returns:
        Tensors by name, on the CPU.

    Raises:
        DamagedError: If a file can't be read as its manifest says, or a value is not finite.
    """
    manifest = read_manifest(folder)
    parts = {
        name: Part.whole(torch.empty(facts["shape"], dtype=getattr(torch, facts["dtype"])))
        for name, facts in manifest["tensors"][stem].items()
    }
    fill(folder, manifest, stem, parts)
    return {name: part.tensor for name, part in parts.items()}
