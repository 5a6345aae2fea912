import hashlib
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.data.heldout import HeldOutFiles, HeldOutRows

MASK = 2**64 - 1


def reference_hash(source: str, file: str, row: int) -> int:
    """splitmix64 in Python's own integers, one row at a time."""
    place, key = json.dumps([source, file]).encode(), b"summerlm held-out rows"
    state = int.from_bytes(hashlib.blake2b(place, digest_size=8, key=key).digest(), "little")
    state = (state + (row + 1) * 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


@settings(deadline=None)
@given(
    st.text(max_size=5),
    st.floats(0, 0.5),
    st.dictionaries(st.text(max_size=5), st.integers(0, 60), max_size=4),
)
def test_against_the_reference(source: str, fraction: float, rows: dict[str, int]) -> None:
    rule = HeldOutRows(source, fraction, rows)
    masks = {file: rule.mask(file, 0, count) for file, count in rows.items()}
    hashes = {(f, r): reference_hash(source, f, r) for f, n in rows.items() for r in range(n)}
    expected = {place for place, value in hashes.items() if value < fraction * 2**64}
    if fraction > 0 and not expected and len(hashes) >= 2:
        expected = {min(hashes, key=hashes.__getitem__)}
    assert {(f, r) for f, mask in masks.items() for r in np.flatnonzero(mask)} == expected
    for file, mask in masks.items():  # whatever the groups a file is read in
        half = len(mask) // 2
        assert (rule.mask(file, half, len(mask) - half) == mask[half:]).all()


def test_the_rows_of_today_are_held_out_forever() -> None:
    """Another choice would let models meet what earlier ones are measured on."""
    rule = HeldOutRows("books", 0.02, {"a.parquet": 500})
    pinned = [33, 84, 108, 178, 183, 249, 294, 296, 340, 365, 410, 469]
    assert np.flatnonzero(rule.mask("a.parquet", 0, 500)).tolist() == pinned


def test_the_share_comes_out() -> None:
    rows = {f"{n}.parquet": 100_000 for n in range(5)}
    rule = HeldOutRows("s", 0.01, rows)
    counts = [rule.mask(file, 0, n).sum() for file, n in rows.items()]
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in counts)
    assert len({rule.mask(file, 0, 1000).tobytes() for file in rows}) == 5


def test_a_row_held_out_stays_held_out_when_data_are_added_or_the_share_grows() -> None:
    few = HeldOutRows("s", 0.05, {"a": 300}).mask("a", 0, 300)
    more = HeldOutRows("s", 0.05, {"a": 300, "b": 300}).mask("a", 0, 300)
    larger = HeldOutRows("s", 0.2, {"a": 300}).mask("a", 0, 300)
    assert (few == more).all()
    assert (larger >= few).all()
    assert larger.sum() > few.sum()


def test_whole_files() -> None:
    rule = HeldOutFiles(frozenset(["b", "a"]))
    assert rule.mask("a", 0, 1).tolist() == [True]
    assert rule.mask("c", 0, 2).tolist() == [False, False]
    assert rule.describe() == ["a", "b"]
