"""Tensors that lie over several ranks: the rows of each that one rank holds.

Flow: `parallel` makes the parts of a laid out model, `optim` steps them and makes parts of its own
state, `checkpoint` writes and fills them. A rank alone holds whole tensors, which are parts too.

Shapes: R rows of the whole tensor, of which a rank holds a range.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The rows of a tensor that this rank holds.

    Attributes:
        tensor: The rows, live and of plain torch storage, (rows held, ...); () for a scalar, which
            every rank holds whole. It may have no rows.
        start: Number of the first of them in the whole tensor; 0 for a scalar.
        shape: Shape of the whole tensor, (R, ...).
    """

    tensor: Tensor
    start: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Part":
        """Make the part of a rank that holds all rows.

        Args:
            tensor: The whole tensor, any shape.

        Returns:
            Its part.
        """
        return cls(tensor, 0, tuple(tensor.shape))

    def like(self, tensor: Tensor) -> "Part":
        """Make the part of another tensor of this shape, such as a moment of a weight.

        Args:
            tensor: Its rows on this rank, shaped as `tensor`.

        Returns:
            Its part.
        """
        return Part(tensor, self.start, self.shape)

    @property
    def stop(self) -> int:
        """Number of the row after the last one held; 1 for a scalar."""
        return self.start + (self.tensor.shape[0] if self.shape else 1)
