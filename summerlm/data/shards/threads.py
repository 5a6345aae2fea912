"""Work on many files at once that mostly waits: for a network, a disk or a hash.

Flow: `formats`, `hashes` and `remote` take what `in_threads` gives.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_threads(
    function: Callable[[A], B], items: Iterable[A], threads: int = 16
) -> Iterator[tuple[A, B]]:
    """Call a function for many items, several at a time.

    Args:
        function: What to call; what it raises ends the work.
        items: What to call it with.
        threads: How many calls at a time.

    Yields:
        Each item and its result, in the order in which they are done.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        jobs = {pool.submit(function, item): item for item in items}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    finally:
        pool.shutdown(cancel_futures=True)
