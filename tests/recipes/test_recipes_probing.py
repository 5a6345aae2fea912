"""Rows drawn from all over a source, and the estimate of its tokens from them."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from summerlm.data.config import DataConfig, SourceConfig
from summerlm.data.opening import open_sources
from summerlm.data.shards.rows import Dropped
from summerlm.recipes.data.probing import UNITS, draw, one_line, probe
from summerlm.tokenizer.tokenizer import Tokenizer


class Numbered:
    """A source whose rows say where they stand."""

    name = "numbered"

    def __init__(self, units):
        self.units = units

    def read(self, unit):
        return [f"{unit}.{row}" for row in range(self.units[unit])]


def drawn_rows(source, count):
    return [(part.unit, row) for part in draw(source, count) for row in part.rows]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 200))
def test_as_many_different_rows_as_asked_or_all(units, count):
    source = Numbered(units)
    rows = drawn_rows(source, count)
    assert len(rows) == len(set(rows)) == min(count, sum(units))
    assert all(row.startswith(f"{unit}.") for unit, row in rows)
    assert rows == drawn_rows(source, count)


def test_rows_come_from_all_over_the_source():
    source = Numbered([100] * 64)
    rows = drawn_rows(source, 160)
    units = {unit for unit, _ in rows}
    assert len(units) == UNITS
    assert min(units) < 16
    assert max(units) >= 48
    assert 20 < np.mean([int(row.split(".")[1]) for _, row in rows]) < 80


def write_parquet(path, texts, rows_a_group):
    table = pa.table({"text": texts})
    pq.write_table(table, path, row_group_size=rows_a_group, write_statistics=False)


def open_folder(folder, **settings):
    sources = {"own": SourceConfig(weight=1, path=str(folder), **settings)}
    (source,) = open_sources(DataConfig(sources=sources, held_out_fraction=0.1), lanes=2)
    return source


@pytest.fixture
def uneven(tmp_path):
    """Two files of groups of different sizes, with rows that give no text or that a rule drops."""
    texts = [f"{n} is a number that has {n} before it, " * (1 + n * n % 60) for n in range(240)]
    texts[5] = texts[17] = None
    texts[100] = " "
    write_parquet(tmp_path / "a.parquet", texts[:90], 40)
    write_parquet(tmp_path / "b.parquet", texts[90:], 7)
    return tmp_path


def test_a_sample_of_everything_is_exact(uneven, tiny_tokenizer):
    source, tokenizer = open_folder(uneven, min_characters=100), Tokenizer.load(tiny_tokenizer)
    rows = [row for unit in range(len(source.units)) for row in source.read(unit)]
    texts = [row for row in rows if isinstance(row, str) and len(row) >= 100]
    tokens = [2 + len(tokenizer.encode(text)) for text in texts]

    found = probe(source, tokenizer, 1000)
    assert found.rows == len(rows) == sum(source.units)
    assert Counter(found.tokens) == Counter(tokens)
    assert Counter(found.bytes) == Counter(len(text.encode()) for text in texts)
    assert found.source_tokens == pytest.approx(sum(tokens))
    assert found.source_documents == pytest.approx(len(texts))
    short = [row for row in rows if isinstance(row, str) and len(row) < 100]
    assert found.dropped == {"shorter than min_characters": len(short)}
    assert found.no_text == Counter(row.reason for row in rows if isinstance(row, Dropped))
    assert short


def test_a_small_sample_knows_the_size_of_what_it_did_not_read(tmp_path, tiny_tokenizer):
    # a few groups hold nearly all of the text: by rows alone the estimate is off by far
    for file in range(40):
        words = 9000 if file % 20 == 3 else 200
        texts = ["sun field bird " * words + str(row) for row in range(10)]
        write_parquet(tmp_path / f"{file:02d}.parquet", texts, 10)
    source, tokenizer = open_folder(tmp_path), Tokenizer.load(tiny_tokenizer)
    exact = probe(source, tokenizer, 1000).source_tokens
    assert probe(source, tokenizer, 40).source_tokens == pytest.approx(exact, rel=0.1)


def test_a_window_stands_for_a_long_text(tmp_path, tiny_tokenizer, monkeypatch):
    # text that is dearer at its end: a prefix would count too little
    texts = ["a small field " * n + "qxj " * 3 * n for n in range(100, 130)]
    write_parquet(tmp_path / "a.parquet", texts, 10)
    source, tokenizer = open_folder(tmp_path), Tokenizer.load(tiny_tokenizer)
    exact = probe(source, tokenizer, 99)
    monkeypatch.setattr("summerlm.recipes.data.probing.WINDOW", 400)
    guessed = probe(source, tokenizer, 99)
    assert guessed.source_tokens == pytest.approx(exact.source_tokens, rel=0.1)
    assert guessed.tokens != exact.tokens
    assert guessed.bytes == exact.bytes


def test_estimates_on_real_text(stand_in_data, tiny_tokenizer):
    config = SourceConfig(weight=1, path=str(stand_in_data / "hub/HuggingFaceFW/fineweb/**/*"))
    (source,) = open_sources(DataConfig(sources={"web": config}), lanes=48)
    rows = [row for unit in range(len(source.units)) for row in source.read(unit)]
    size = sum(len(row.encode()) for row in rows if isinstance(row, str))
    found = probe(source, Tokenizer.load(tiny_tokenizer), 64)
    guessed = found.source_tokens * sum(found.bytes) / sum(found.tokens)
    assert guessed == pytest.approx(size, rel=0.05)


def test_an_example_is_one_line_of_visible_characters():
    shown = one_line("a\nb\t\x1b[31m\u202e\xa0é", 99)
    assert shown == r"a\nb\t\x1b[31m\u202e\xa0é"
    assert shown.isprintable()
    assert one_line("x" * 200, 80) == "x" * 80
