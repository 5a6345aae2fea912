import io
import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.data.shards import ranges
from summerlm.data.shards.ranges import RangeReader

DATA = random.Random(0).randbytes(2000)
spots = st.integers(0, len(DATA))
parts = st.lists(st.tuples(spots, spots).map(sorted).map(tuple), max_size=4)


@settings(deadline=None)
@given(parts, st.lists(st.tuples(spots, st.integers(0, 700)), max_size=20))
def test_reads_what_a_plain_file_reads(
    parts: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    asked = []

    def read(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(DATA)
        asked.append((start, stop))
        return DATA[start:stop]

    edges = sorted({edge for part in parts for edge in part})  # parts don't overlap
    apart = list(itertools.pairwise(edges))[::2]
    plain, reader = io.BytesIO(DATA), RangeReader(read, len(DATA), apart)
    for position, count in reads:
        assert reader.seek(position) == plain.seek(position)
        assert reader.read(count) == plain.read(count)
        assert reader.tell() == plain.tell()
    reader.seek(-7, io.SEEK_END)
    assert reader.read() == DATA[-7:]


def test_columns_read_in_turns_cost_a_request_a_window(monkeypatch) -> None:
    monkeypatch.setattr(ranges, "WINDOW_BYTES", 400)
    monkeypatch.setattr(ranges, "GAP_BYTES", 10)
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return DATA[start:stop]

    reader = RangeReader(read, len(DATA), [(100, 900), (1000, 1500)])
    for step in range(0, 800, 50):
        for start, end in ((100, 900), (1000, 1500)):
            reader.seek(start + step)
            count = max(min(50, end - start - step), 0)
            assert reader.read(count) == DATA[start + step : start + step + count]
    assert sorted(asked) == [(100, 500), (500, 900), (1000, 1400), (1400, 1500)]

    asked.clear()  # neighbours that fit into a window are one request, in vain bytes and all
    reader = RangeReader(read, len(DATA), [(310, 400), (100, 300), (700, 800)])
    for start, stop in ((100, 300), (310, 400), (700, 800)):
        reader.seek(start)
        assert reader.read(stop - start) == DATA[start:stop]
    assert asked == [(100, 400), (700, 800)]
