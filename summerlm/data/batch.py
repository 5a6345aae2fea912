"""A batch: the tensors that one step trains on, and its audit hash.

Flow: `loader` makes it from rows of T + 1 ids; `train` splits it and moves it to the device.

Shapes: B rows, T positions.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a position that carries no loss; torch's own default


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    Args:
        tokens: Inputs, (B, T), int64.
        targets: The id after each input, (B, T), int64; `IGNORE` where that is a BOS, for what
            document comes next can't be known.
        documents: How many documents began in the row before this position, (B, T), int64: the
            position attends only to positions of the same count.
        sources: Index of the source that fills each row, (B,), int64.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    sources: Tensor

    @classmethod
    def from_ids(cls, ids: np.ndarray, sources: np.ndarray, bos: int) -> "Batch":
        """Make a batch of packed rows.

        Args:
            ids: Rows of ids, (B, T + 1), any integer dtype; BOS stands where a document begins.
            sources: Index of the source of each row, (B,), any integer dtype.
            bos: The id of BOS.

        Returns:
            The batch, on the CPU.

        Example:
            >>> batch = Batch.from_ids(np.array([[7, 2, 1, 8, 2, 1]]), np.array([0]), bos=1)
            >>> batch.targets.tolist(), batch.documents.tolist()
            ([[2, -100, 8, 2, -100]], [[0, 0, 1, 1, 1]])
        """
        rows = torch.from_numpy(ids).long()  # (B, T + 1)
        begins = rows == bos
        return cls(
            tokens=rows[:, :-1].contiguous(),
            targets=rows.masked_fill(begins, IGNORE)[:, 1:].contiguous(),
            documents=(begins.cumsum(1) - begins[:, :1].long())[:, :-1].contiguous(),
            sources=torch.from_numpy(sources).long(),
        )

    def pin(self) -> "Batch":
        """Copy to page-locked memory, from which `to` copies without stopping the host."""
        return Batch(*(tensor.pin_memory() for tensor in self._tensors()))

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device; from pinned memory, without waiting for the copy."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def split(self, rows: int) -> list["Batch"]:
        """Cut into batches of at most so many rows, in order."""
        parts = (tensor.split(rows) for tensor in self._tensors())
        return [Batch(*tensors) for tensors in zip(*parts, strict=True)]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.targets, self.documents, self.sources


def batch_sha(ids: np.ndarray, documents: np.ndarray) -> str:
    """Hash what a step trains on.

    Args:
        ids: The rows in global order, (B, T + 1), any integer dtype.
        documents: Document counts of the inputs, (B, T), any integer dtype.

    Returns:
        The SHA-256 in hexadecimal, over the ids and then the documents, both as little-endian
        int32 in row order.
    """
    digest = hashlib.sha256(ids.astype("<i4").tobytes())
    digest.update(documents.astype("<i4").tobytes())
    return digest.hexdigest()
