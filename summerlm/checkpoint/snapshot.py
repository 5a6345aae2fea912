"""A copy of the state that stands still while training goes on.

Flow: `writing` makes a `Snapshot` once, takes it at every save, and writes its bytes.
The buffers are laid out as the files are, so writing is copying bytes to the disk.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from summerlm.checkpoint.pieces import Plan, Tables
from summerlm.checkpoint.tensors import TensorLayout
from summerlm.core.parts import Part

# elements looked at in one go: below the number from which torch shares the work with its threads,
# which the training needs
LOOK = 32_000


class NotFiniteError(Exception):
    """A tensor that was to be saved holds NaN or infinity."""


class Snapshot:
    """Buffers for the pieces that one rank writes, allocated once.

    Args:
        tables: What this rank holds; the tensors are live.
        plan: Who writes what.
        rank: This rank.
    """

    def __init__(self, tables: Tables, plan: Plan, rank: int) -> None:
        self._sources: dict[str, dict[str, Tensor]] = {stem: {} for stem in tables}
        for piece in plan.written_by(rank):
            part: Part = tables[piece.stem][piece.name]
            assert (part.start, part.stop) == (piece.start, piece.stop), f"{piece} is not held"
            self._sources[piece.stem][piece.name] = part.tensor
        self.layouts: Mapping[str, TensorLayout] = {
            stem: TensorLayout.of({n: (t.dtype, tuple(t.shape)) for n, t in sources.items()})
            for stem, sources in self._sources.items()
        }
        tensors = [t for sources in self._sources.values() for t in sources.values()]
        self.queued = any(t.is_cuda for t in tensors)  # whether `take` returns before it is done
        self._device = next((t.device for t in tensors if t.is_cuda), torch.device("cpu"))
        self._buffers = {s: _allocate(lay.size, self.queued) for s, lay in self.layouts.items()}
        if self.queued:  # memory must be unpinned before it is freed; at exit the driver does it
            pinned = [b.data_ptr() for b in self._buffers.values() if b.numel()]
            weakref.finalize(self, _unpin, pinned).atexit = False
        self._copied: torch.cuda.Event | None = None

    def take(self) -> None:
        """Copy the state as it is now.

        On a GPU the copies are queued behind the work that makes the state and before whatever
        changes it next; the host doesn't wait.
        """
        with torch.no_grad():
            for stem, sources in self._sources.items():
                for name, tensor in sources.items():
                    copy_into(self.tensor(stem, name), tensor)
        if self.queued:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Wait until the copies are made; for the thread that writes them."""
        if self._copied is not None:
            torch.cuda.set_device(self._device)  # a thread begins on GPU 0
            self._copied.synchronize()

    def check_finite(self) -> None:
        """Look at every value that was copied.

        Raises:
            NotFiniteError: If one is NaN or infinite; the message names its tensor.
        """
        for stem, layout in self.layouts.items():
            for name, (dtype, _) in layout.tensors.items():
                if dtype.is_floating_point and not is_finite(self.tensor(stem, name)):
                    raise NotFiniteError(f"{stem} tensor {name} holds a value that is not finite")

    def blocks(self, stem: str) -> Iterator[bytes | memoryview]:
        """Give the content of a file.

        Args:
            stem: Which table.

        Yields:
            The header, then the bytes of all tensors.
        """
        yield self.layouts[stem].header()
        yield self._buffers[stem].numpy().data

    def tensor(self, stem: str, name: str) -> Tensor:
        """Give a tensor as it was copied.

        Args:
            stem: Its table.
            name: Its name.

        Returns:
            A view of the buffer, on the CPU.
        """
        layout = self.layouts[stem]
        (dtype, shape), start = layout.tensors[name], layout.offsets[name]
        size = dtype.itemsize * prod(shape)
        return self._buffers[stem][start : start + size].view(dtype).view(shape)


def copy_into(buffer: Tensor, tensor: Tensor) -> None:
    """Copy a tensor to the host; from a GPU the copy is only queued.

    Args:
        buffer: Where to, on the CPU, contiguous.
        tensor: What, of its shape and dtype.
    """
    if tensor.is_cuda:
        buffer.copy_(tensor, non_blocking=True)
    elif tensor.is_contiguous():
        # one thread copies at the memory's speed; torch would wait for all of its threads, which
        # the threads of other processes on the same cores make slow
        buffer.view(-1).view(torch.uint8).numpy()[:] = (
            tensor.detach().view(-1).view(torch.uint8).numpy()
        )
    else:
        buffer.copy_(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity, without help of other threads.

    Args:
        tensor: On the CPU, of a floating dtype, contiguous, any shape.

    Returns:
        True where all values are finite.
    """
    # NaN and infinity make the extremes NaN or infinite; nothing of the tensor's size is made
    for chunk in tensor.flatten().split(LOOK):
        if chunk.numel() and not all(bool(x.isfinite()) for x in chunk.aminmax()):
            return False
    return True


def _unpin(addresses: Sequence[int]) -> None:
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)


def _allocate(size: int, pinned: bool) -> Tensor:
    """Make a buffer whose memory is really there, so that the first copy is not slower."""
    buffer = torch.empty(size, dtype=torch.uint8).zero_()
    if pinned and size:
        # torch's own pinned memory comes in powers of two: up to twice as much as is needed
        failed = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(failed):
            raise MemoryError(f"not enough memory to pin {size} bytes for checkpoints")
    return buffer
