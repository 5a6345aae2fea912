"""Bytes that live while code runs, counted at its own tensors: what memory a step needs.

Flow: `recipes.tracing` runs a step inside a `Tally`, on tensors without values, and reads the
`Peak` of each of its stretches; `memory` extends them to a whole model.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """The moment of a stretch at which most bytes lived.

    Attributes:
        bytes: How many.
        by_kind: The same, by what they were made for.
    """

    bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)


class Tally(TorchDispatchMode):
    """Counts the bytes of every tensor that is made inside it, as long as its memory is held.

    Views count once, with the memory that they share. Works on tensors without values
    (`FakeTensorMode`, entered before) as on real ones.

    Args:
        kind: What is being made at first.
        stretch: Name of the first stretch.

    Attributes:
        now: Bytes that live.
        by_kind: The same, by kind.
        kind: What is being made at present.
        peaks: The highest moment of each stretch, by its name.
    """

    def __init__(self, kind: str, stretch: str) -> None:
        super().__init__()
        self.now = 0
        self.by_kind: dict[str, int] = defaultdict(int)
        self.kind = kind
        self.peaks: dict[str, Peak] = {}
        self._held: dict[int, tuple[int, str]] = {}  # by address of the storage: bytes, kind
        self.enter(stretch)

    def enter(self, stretch: str) -> None:
        """Begin a stretch, or go on with one of that name."""
        self._peak = self.peaks.setdefault(stretch, Peak())
        self._see()

    def turn_into(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors under another kind from now on, as a result that stays.

        Args:
            tensors: Made inside this tally; others are left alone.
            kind: What they are now.
        """
        for tensor in tensors:
            key = _key(tensor)
            if key in self._held:
                size, former = self._held[key]
                self._held[key] = (size, kind)
                self.by_kind[former] -= size
                self.by_kind[kind] += size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it has made."""
        result = func(*args, **(kwargs or {}))
        fresh = [leaf for leaf in _tensors(result) if _key(leaf) not in self._held]
        if fresh:
            given = {_key(leaf) for leaf in _tensors((args, kwargs))}  # views of what isn't ours
            for leaf in fresh:
                if _key(leaf) not in given:
                    self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:  # one of two views that an operation gave
            return
        self._held[key] = (size, self.kind)
        self.now += size
        self.by_kind[self.kind] += size
        weakref.finalize(storage, self._forget, key)
        self._see()

    def _forget(self, key: int) -> None:
        size, kind = self._held.pop(key)
        self.now -= size
        self.by_kind[kind] -= size

    def _see(self) -> None:
        if self.now >= self._peak.bytes:
            self._peak.bytes, self._peak.by_kind = self.now, dict(self.by_kind)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
