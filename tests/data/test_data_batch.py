"""Batches: what they say of their ids, how they are cut, and their hash."""

import hashlib
import struct

import numpy as np
import torch
from data_streams import BOS
from hypothesis import given
from hypothesis import strategies as st

from summerlm.data.batch import IGNORE, Batch, batch_sha


@given(st.lists(st.lists(st.sampled_from([BOS, 2, 3, 9]), min_size=6, max_size=6), min_size=1))
def test_a_batch_says_what_its_ids_say(rows):
    ids = np.array(rows, np.int32)
    batch = Batch.from_ids(ids, np.arange(len(rows)), BOS)
    for row, tokens, targets, documents in zip(
        rows, batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist(), strict=True
    ):
        assert tokens == row[:-1]
        assert targets == [IGNORE if i == BOS else i for i in row[1:]]
        assert documents == [row[1 : t + 1].count(BOS) for t in range(5)]
    assert batch.sources.tolist() == list(range(len(rows)))
    kinds = {t.dtype for t in (batch.tokens, batch.targets, batch.documents, batch.sources)}
    assert kinds == {torch.int64}


@given(st.integers(1, 9), st.integers(1, 10))
def test_a_split_batch_holds_the_same_rows(rows, size):
    batch = Batch.from_ids(np.arange(rows * 4).reshape(rows, 4), np.arange(rows), BOS)
    parts = batch.split(size)
    assert [len(part.sources) for part in parts[:-1]] == [size] * (len(parts) - 1)
    for name in ("tokens", "targets", "documents", "sources"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch.to("cpu"), name))


def test_the_hash_is_over_little_endian_int32_rows_then_borders():
    ids, documents = np.array([[1, 258, 3], [4, 5, 70000]]), np.array([[0, 1], [0, 0]])
    packed = struct.pack("<6i", 1, 258, 3, 4, 5, 70000) + struct.pack("<4i", 0, 1, 0, 0)
    assert batch_sha(ids, documents) == hashlib.sha256(packed).hexdigest()
    assert batch_sha(ids.astype(">i8"), documents.astype(np.uint8)) == batch_sha(ids, documents)
