"""Python's garbage collector, between steps instead of in the middle of one.

Flow: decorates `loop.train`. What a collection looks at grows with everything that is alive; on
many ranks each would stop at another moment, and all wait for the one that stands.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

STEPS = 100  # between two collections
_open: list[bool] = []  # of each generator that runs: whether collection was automatic before


def collects_between(steps: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """Let a generator of steps run without collections, but for one after every `STEPS`.

    Args:
        steps: Makes the generator.

    Returns:
        Makes the same one; the collector is as before when it ends or is closed.
    """

    @wraps(steps)
    def collected(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        with _by_hand():
            for number, step in enumerate(steps(*args, **kwargs), start=1):
                yield step
                if number % STEPS == 0:
                    gc.collect()

    return collected


@contextmanager
def _by_hand() -> Iterator[None]:
    """Switch automatic collection off; what lives by now is never looked at meanwhile."""
    # one that a traceback holds may end after the next has begun: the last to end restores
    _open.append(gc.isenabled() or any(_open))
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        automatic = _open.pop()
        if not _open:
            gc.unfreeze()
            if automatic:
                gc.enable()
