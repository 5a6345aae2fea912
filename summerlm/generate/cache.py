"""What a model remembers while it writes: keys and values of all earlier positions.

Flow: made by `engine` for one batch of rows; `Transformer.forward` reads and extends it, so that
each pass takes only the tokens that are new.

Shapes: B rows, K key/value heads, T new positions, S positions so far, E channels with biases.
"""

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
        return self._kept[0][:, :, :end], self._kept[1][:, :, :end]


class Cache(list[LayerCache]):
    """The memories of all layers, for rows of at most `capacity` tokens.

    Args:
        layers: How many blocks the model has.
        capacity: Most positions of a row.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(LayerCache(capacity) for _ in range(layers))
