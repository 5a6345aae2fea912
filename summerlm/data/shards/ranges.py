"""A remote file that can be read in any order, a window of it in memory.

Flow: `transfer` opens one for a large parquet file; pyarrow reads from it in small steps, and
each step beyond a window is one request for the next.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

WINDOW_BYTES = 4 << 20  # most that is read ahead, and...
GAP_BYTES = 64 << 10  # ...most that is read in vain to join two stretches in a request


class RangeReader(io.RawIOBase):
    """A file read by ranges.

    Each stretch has a window of its own: columns of a row group are read in turns, and one
    window for all would be fetched again at every turn.

    Args:
        read: Gives the bytes from a first one to an end.
        size: Bytes of the file.
        parts: First byte and end of each stretch that will be read from its start to its end;
            outside them nothing is read ahead.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], size: int, parts: Sequence[tuple[int, int]] = ()
    ) -> None:
        super().__init__()
        self._read_range = read
        self._size = size
        self._position = 0
        self._parts = _joined(parts)
        self._starts = [start for start, _ in self._parts]
        self._windows: dict[int, tuple[int, bytes]] = {}  # by part: first byte, bytes

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer.

        Args:
            buffer: Where the bytes go.

        Returns:
            How many they are: as many as there is room for, up to the end of the file.
        """
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        done = 0
        while self._position < stop:
            data = self._next(stop)
            view[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def _next(self, stop: int) -> memoryview:
        """Give bytes from the position on, at least one and none from `stop` on."""
        position = self._position
        part = bisect_right(self._starts, position) - 1
        if part < 0 or position >= self._parts[part][1]:  # outside all parts
            return memoryview(self._read_range(position, stop))
        first, data = self._windows.get(part, (0, b""))
        if not first <= position < first + len(data):
            end = min(max(position + WINDOW_BYTES, stop), self._parts[part][1])
            first, data = position, self._read_range(position, end)
            self._windows[part] = first, data
        return memoryview(data)[position - first : stop - first]


def _joined(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join stretches that fit into one window together."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if joined and start - joined[-1][1] <= GAP_BYTES and stop - joined[-1][0] <= WINDOW_BYTES:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
