"""Rows' documents, against rows whose every id says which document it is of."""

import itertools
import json
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_streams import (
    BOS,
    EOS,
    FIRST,
    ByteTokenizer,
    MemorySource,
    make_loader,
    make_order,
    take,
)
from test_data_tokens import write_folder

from summerlm.core.config import validate
from summerlm.data.config import DataConfig, SourceConfig
from summerlm.data.naming import STEPS_AHEAD, deal_again, follow, name_document
from summerlm.data.opening import open_sources
from summerlm.data.shards.rows import Dropped
from summerlm.data.tokens.following import follow_tokens
from summerlm.data.tokens.reading import Tokens


class TellingTokenizer(ByteTokenizer):
    """A text "number:length" becomes so many ids of that number."""

    vocabulary = FIRST + 10_000

    def __init__(self):
        super().__init__()
        self.byte_lengths = np.ones(self.vocabulary, int)

    def encode(self, text):
        number, length = map(int, text.split(":"))
        return [FIRST + number] * length


def telling_sources(seed):
    """Two sources; document n of all is number n, and some rows have no text."""
    draw, number, sources = np.random.default_rng(seed), itertools.count(), []
    for name in ("a", "b"):
        units = [
            [f"{next(number)}:{draw.integers(1, 90)}" for _ in range(rows)]
            for rows in draw.integers(3, 12, 40)
        ]
        for unit in units:
            unit[draw.integers(len(unit))] = ""
        sources.append(MemorySource(name, units))
    return sources


def numbers_of(sources):
    """From a document's name to its number."""
    return {
        (source.name, *source.find(unit, row)): int(text.split(":")[0])
        for source in sources
        for unit, texts in enumerate(source.data)
        for row, text in enumerate(texts)
        if text
    }


def documents_in(ids):
    """The documents of which a target stands in a row, read off its ids."""
    found = []
    for before, target in itertools.pairwise(ids.tolist()):
        if target not in (BOS, EOS):
            found.append(target - FIRST)
        elif target == EOS:
            found.append(before - FIRST)
    return list(dict.fromkeys(found))


SHAPE = {"lanes": 4, "rows": 8, "context": 30, "seed": 5}


def deal(sources, steps, **shape):
    loader = make_loader(sources, [2, 1], TellingTokenizer(), **shape)
    dealt = take(loader, steps)
    loader.close()
    return loader.order, dealt


@pytest.mark.parametrize("open_documents", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_every_row_is_told_from_any_state(start, open_documents):
    sources = telling_sources(seed=1)
    shape = SHAPE | {"open_documents": open_documents}
    order, steps = deal(sources, 12, **shape)
    numbers = numbers_of(sources)
    for lane in range(4):
        rows = [row for step in steps[start:] for row in step.ids[lane::4]]
        state = (
            json.loads(json.dumps(steps[start - 1].state["lanes"][str(lane)])) if start else None
        )
        for ids, held in zip(rows, deal_again(order, lane, state), strict=False):
            names = [name_document(order, lane, key) for key in held.documents]
            assert [numbers[name.source, *name[1:]] for name in names] == documents_in(ids)


def expected(order, steps, step, rows, last_step):
    """Plain loops over all rows: what `follow` should find, by number."""
    found, wanted = set(), defaultdict(set)
    for row in rows:
        found.add((step, row))
        lane = row % order.lanes
        wanted[lane] |= set(documents_in(steps[step - 1].ids[row]))
    for lane, numbers in wanted.items():
        begun = {
            n: min(
                r
                for r in rows
                if r % order.lanes == lane and n in documents_in(steps[step - 1].ids[r])
            )
            for n in numbers
        }
        for number in range(step, last_step + 1):
            for row in range(lane, order.rows, order.lanes):
                here = documents_in(steps[number - 1].ids[row])
                if any(n in here and (number, row) >= (step, begun[n]) for n in numbers):
                    found.add((number, row))
    return sorted(found), sorted(set().union(*wanted.values()))


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("open_documents", [1, 2])
@pytest.mark.parametrize("rows", [[0], [5], [1, 5], [7, 2, 3], list(range(8))], ids=str)
def test_following_finds_what_plain_loops_find(rows, open_documents, behind):
    sources, step = telling_sources(seed=2), 4
    order, steps = deal(sources, 14, **SHAPE | {"open_documents": open_documents})
    before = step - 1 - behind
    lanes = steps[before - 1].state["lanes"] if before else {}
    followed = follow(order, lanes, step, rows, last_step=14)
    numbers = numbers_of(sources)
    places, documents = expected(order, steps, step, rows, 14)
    assert followed.rows == places
    assert sorted(numbers[name.source, *name[1:]] for name in followed.documents) == documents
    assert followed.open_ends == 0


@pytest.mark.parametrize("last_step", [3, 5, 500])
def test_following_ends_with_the_run_and_tells_of_open_ends(last_step):
    sources = [MemorySource("a", [["0:100000"], ["1:100000"]])]
    order = make_order(sources, tokenizer=TellingTokenizer(), **SHAPE | {"lanes": 2, "rows": 2})
    followed = follow(order, {}, 3, [1], last_step)
    until = min(last_step, 3 + STEPS_AHEAD)
    assert followed.rows == [(step, 1) for step in range(3, until + 1)]
    assert len(followed.documents) == 1
    assert followed.open_ends == 1


def test_nothing_is_read_beyond_the_end_of_the_documents():
    """A source that breaks further on, or has no more epochs, is nobody's concern here."""
    sources = [MemorySource("a", [["0:40", "1:40"], ["2:40"]])]
    order = make_order(
        sources, limits=[1], tokenizer=TellingTokenizer(), **SHAPE | {"lanes": 1, "rows": 1}
    )
    followed = follow(order, {}, 1, [0], last_step=100)
    assert [row for row, _ in followed.rows] == list(range(1, len(followed.rows) + 1))
    assert len(followed.rows) == 2


def write_tokens(folder, sources, lengths, **shape):
    data = DataConfig(
        sources={s.name: SourceConfig(path="x", weight=1, licence="CC0-1.0") for s in sources},
        lanes=shape["lanes"],
        open_documents=shape["open_documents"],
    )
    loader = make_loader(sources, [2, 1][: len(sources)], TellingTokenizer(), **shape)
    write_folder(folder, loader, lengths, data, TellingTokenizer.vocabulary)
    return loader.order, Tokens(folder)


@pytest.mark.parametrize("open_documents", [1, 3])
@pytest.mark.parametrize("rows", [[0], [5], [1, 5], [7, 2, 3], list(range(8))], ids=str)
def test_dealt_tokens_tell_the_same_rows(rows, open_documents, tmp_path):
    shape = SHAPE | {"open_documents": open_documents}
    order, tokens = write_tokens(tmp_path / "out", telling_sources(seed=3), [2, 20, 9], **shape)
    longer = ended = 0
    for step in range(1, 32):
        for last_step in (step, min(step + 1, 31), 31):
            named = follow(order, {}, step, rows, last_step)
            told = follow_tokens(tokens, BOS, step, rows, last_step)
            assert (told.rows, told.documents) == (named.rows, [])
            assert named.open_ends <= told.open_ends <= len(rows)
            longer += len(named.rows) > len(rows)
            ended += told.open_ends == 0 and last_step == 31
        assert told == follow_tokens(tokens, BOS, step, rows, last_step=999), "as far as they go"
    assert longer > 20
    assert ended > 10


def test_dealt_tokens_are_followed_so_far_and_no_further(tmp_path):
    sources = [MemorySource("a", [["0:3000"], ["1:3000"]])]
    shape = SHAPE | {"lanes": 2, "rows": 2, "open_documents": 1}
    _, tokens = write_tokens(tmp_path / "out", sources, [80], **shape)
    followed = follow_tokens(tokens, BOS, 3, [1], last_step=80)
    assert followed.rows == [(step, 1) for step in range(3, 3 + STEPS_AHEAD + 1)]
    assert followed.open_ends == 1


def test_a_document_of_a_file_is_named_by_file_group_and_row(tmp_path):
    """Held-out rows are between those of training, and a file has several groups and units."""
    for file in range(3):
        texts = [f"file {file} row {row} " + "x" * 40 for row in range(50)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{file}.parquet", 20)
    table = {"path": f"{tmp_path}/*.parquet", "weight": 1, "licence": "CC0-1.0", "column": "text"}
    config = validate(DataConfig, {"sources": {"web": table}, "held_out_fraction": 0.3}, "test")
    (source,) = open_sources(config, lanes=4)
    seen = set()
    for unit, count in enumerate(source.units):
        for row, text in enumerate(source.read(unit)):
            assert not isinstance(text, Dropped)
            file, group, line = source.find(unit, row)
            with pq.ParquetFile(tmp_path / file.rsplit("/", 1)[-1]) as opened:
                assert opened.read().column("text")[line].as_py() == text
                assert opened.read_row_group(group).column("text").to_pylist().count(text) == 1
            seen.add((file, line))
        assert row == count - 1
    assert len(seen) == sum(source.units) < 150
