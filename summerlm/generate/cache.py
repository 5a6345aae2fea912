"""What a model remembers while it writes: keys and values of all earlier positions.

Flow: made by `engine` for one batch of rows; `Transformer.forward` reads and extends it, so that
each pass takes only the tokens that are new.

Shapes: B rows, K key/value heads, T new positions, S positions so far, E channels with biases.
"""

import torch
from torch import Tensor

from summerlm.model.kernels import Memory


class LayerCache(Memory):
    """Keys and values of one layer, in memory that is taken once.

    Args:
        capacity: Most positions of a row.
    """

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._kept: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember new keys and values, each (B, K, T, E); give all so far, (B, K, S, E) each."""
        if self._kept is None:  # only now are rows, dtype and device known
            B, K, _, E = k.shape
            shape = (B, K, self._capacity, E)
            self._kept = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        assert end <= self._capacity, "the cache is full"
        for kept, new in zip(self._kept, (k, v), strict=True):
            kept[:, :, self.length : end] = new
        self.length = end
        return self.kept()

    def kept(self) -> tuple[Tensor, Tensor]:
        """Give the keys and values so far, (B, K, S, E) each."""
        assert self._kept is not None, "nothing was read yet"
        k, v = self._kept
        return k[:, :, : self.length], v[:, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but some, (rows left,), int64."""
        assert self._kept is not None, "nothing was read yet"
        k, v = self._kept
        self._kept = k[rows], v[rows]


class SharedLayer(Memory):
    """One row's keys and values as the beginning of all rows that read on; they are not remembered.

    Args:
        k: Keys with their channels, (1, K, P, E).
        v: Values, (1, K, P, E).
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.length = k.shape[2]
        self._kept = k, v

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the beginning before each row's own, (B, K, T, E), or (B, K, T, C)."""
        E = k.shape[-1]  # without the channels where biases come as a matrix
        pairs = zip(self._kept, (k, v), strict=True)
        first, second = (
            torch.cat((kept[..., :E].expand(len(new), -1, -1, -1), new), 2) for kept, new in pairs
        )
        return first, second


class Cache(list[LayerCache]):
    """The memories of all layers, for rows of at most `capacity` tokens.

    Args:
        layers: How many blocks the model has.
        capacity: Most positions of a row.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(LayerCache(capacity) for _ in range(layers))

    def share(self) -> list[SharedLayer]:
        """Let any number of rows go on from the one row that was read."""
        return [SharedLayer(*layer.kept()) for layer in self]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but some, (rows left,), int64."""
        for layer in self:
            layer.keep(rows)
