"""Work on many files at once that mostly waits: for a network, a disk or a hash.

Flow: `formats`, `hashes` and `remote` take what `in_threads` gives.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_threads(
    function: Callable[[A], B], items: Iterable[A], threads: int = 16
) -> Iterator[tuple[A, B]]:
    """Call a function for many items, several at a time.

    The threads are daemons: where the work is left early, for an error or a signal, nobody waits
    for those that are in the middle of a read.

    Args:
        function: What to call; what it raises ends the work.
        items: What to call it with.
        threads: How many calls at a time.

    Yields:
        Each item and its result, in the order in which they are done.
    """
    todo = deque(items)
    done: SimpleQueue[tuple[A, B | None, BaseException | None]] = SimpleQueue()

    def work() -> None:
        while todo:
            try:
                item = todo.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                done.put((item, function(item), None))
            except BaseException as error:
                done.put((item, None, error))

    count = len(todo)
    for _ in range(min(threads, count)):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(count):
            item, result, error = done.get()
            if error is not None:
                raise error
            yield item, result  # type: ignore[misc]
    finally:
        todo.clear()
