"""One file of tensors, written as a stream: safetensors' format, hashed on the way to the disk.

Flow: `snapshot` lays its buffer out as `TensorLayout` says; the thread that writes calls
`write_file` with the header and the buffer, and `check_header` on what then lies on the disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from summerlm.core.failpoints import reach

CHUNK = 1 << 20  # bytes hashed and written at a time: what a thread does without the interpreter
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorLayout:
    """Where each tensor of a file lies among the bytes after the header.

    Attributes:
        tensors: Dtype and shape of each, by name, in the order of their bytes.
        offsets: Their first bytes.
        size: Bytes of all.
    """

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    offsets: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> "TensorLayout":
        """Lay tensors out one behind the other, those of wide elements first, so all are aligned.

        Args:
            tensors: Dtype and shape of each, by name.

        Returns:
            The layout.
        """
        ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
        offsets, size = {}, 0
        for name, (dtype, shape) in ordered.items():
            offsets[name] = size
            size += dtype.itemsize * prod(shape)
        return cls(ordered, offsets, size)

    def header(self) -> bytes:
        """Make the bytes before the tensors': the length of a JSON object, and that object."""
        table = {
            name: {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [
                    self.offsets[name],
                    self.offsets[name] + dtype.itemsize * prod(shape),
                ],
            }
            for name, (dtype, shape) in self.tensors.items()
        }
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned in the file too
        return len(text).to_bytes(8, "little") + text


def write_file(
    path: Path, blocks: Iterable[bytes | memoryview], go_on: Callable[[], None]
) -> dict[str, Any]:
    """Write and sync a new file, hashing what is written.

    Args:
        path: The file; one of that name is replaced.
        blocks: Its content, in order.
        go_on: Called between two chunks; raises to end the writing.

    Returns:
        Its size and hash, as the manifest has them: `bytes` and `sha256`.

    Raises:
        OSError: If the disk refuses.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            view = memoryview(block)
            for start in range(0, len(view), CHUNK):
                go_on()
                chunk = view[start : start + CHUNK]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
                if size == 0:
                    reach("write.begun")
                size += len(view[start : start + CHUNK])
        reach("write.written")
        os.fsync(file.fileno())
    reach("write.synced")
    return {"bytes": size, "sha256": digest.hexdigest()}


def check_header(path: Path, layout: TensorLayout) -> None:
    """Open a file that was written, as its readers will, and compare what it says it holds.

    Args:
        path: The file.
        layout: What it should hold.

    Raises:
        OSError: If it can't be parsed or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()))
    except SafetensorError as error:
        raise OSError(f"{path.name} does not read back: {error}") from None
    if found != {name: (NAMES[dtype], shape) for name, (dtype, shape) in layout.tensors.items()}:
        raise OSError(f"{path.name} does not read back: its header has other tensors")
    reach("write.reopened")
