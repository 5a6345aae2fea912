"""In-memory sources, a byte tokenizer and a plain reference of a lane, for the order's tests."""

import itertools
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from summerlm.core.errors import SourceDownError
from summerlm.data.lanes import DataOrder
from summerlm.data.loader import Loader
from summerlm.data.mixture import Mixture
from summerlm.data.permutation import Permutation
from summerlm.data.rules.pipeline import Cleaned
from summerlm.data.shards.rows import EMPTY, Dropped

BOS, EOS, SPACE, FIRST = 1, 2, 3, 4
READING = threading.Lock()  # like those of a library that reads


class ByteTokenizer:
    """One id a byte; with `space` a text begins with an id of one byte that it doesn't have."""

    bos, eos, vocabulary = BOS, EOS, FIRST + 256

    def __init__(self, space=False, fingerprint="bytes"):
        self.space, self.fingerprint = space, fingerprint
        self.byte_lengths = np.array([0, 0, 0, 1] + [1] * 256)
        self.encoded = 0

    def encode(self, text):
        self.encoded += 1
        return [SPACE] * self.space + [FIRST + byte for byte in text.encode()]

    def encode_array(self, text):
        return np.array(self.encode(text), np.int32)


def clean(text):
    """Drop shouting and hide a name: rules enough for the tests of the order."""
    if not text:
        return Cleaned(EMPTY, {})
    if text.isupper():
        return Cleaned(Dropped("shouting"), {})
    return Cleaned(
        text.replace("Ann", "###"), {"names": text.count("Ann")} if "Ann" in text else {}
    )


@dataclass
class MemorySource:
    """Texts by unit, held in memory."""

    name: str
    data: list
    files: str = "pinned"
    broken: dict = field(default_factory=dict)  # unit -> "down" | "rows" | "stall" | "bug"
    chat: bool = False

    @cached_property
    def units(self):
        return [len(texts) for texts in self.data]

    def read(self, unit):
        with READING:
            fault = self.broken.get(unit)
        if fault == "down":
            raise SourceDownError(f"source {self.name}: unit {unit} can't be read")
        if fault == "stall":
            time.sleep(100)
        if fault == "bug":
            raise ZeroDivisionError("a bug of ours")
        texts = self.data[unit][: -1 if fault == "rows" else None]
        return [text or EMPTY for text in texts]

    def clean(self, text):
        return clean(text)

    def find(self, unit, row):
        return f"{self.name}.txt", unit, sum(self.units[:unit]) + row

    def take_incidents(self):
        return []

    def lock(self):
        return {"name": self.name, "files": self.files}


def make_source(name, units, *, empty=7, longest=9):
    """A source of units with these row counts; every `empty`-th row or so holds no text."""

    def text(unit, row):
        dice = random.Random(f"{name}{unit}.{row}")
        if dice.randrange(empty) == 0:
            return ""
        text = f"{name}{unit}.{row}é|" * dice.randrange(1, longest)
        return {1: text.upper(), 2: text + "Ann"}.get(dice.randrange(6), text)

    return MemorySource(name, [[text(u, r) for r in range(n)] for u, n in enumerate(units)])


def make_order(sources, weights=None, *, limits=None, tokenizer=None, **settings):
    settings = {"seed": 1, "lanes": 2, "rows": 4, "context": 16} | settings
    return DataOrder(
        sources,
        weights or [1.0] * len(sources),
        limits or [None] * len(sources),
        tokenizer or ByteTokenizer(),
        **settings,
    )


def make_loader(sources=None, weights=None, tokenizer=None, **settings):
    """A loader of 12 rows and 12 lanes over three sources, but for what `settings` say."""
    if sources is None:
        sources = [
            make_source("a", [5] * 30),
            make_source("b", [1] * 40),
            make_source("c", [9] * 13),
        ]
    shape = {"seed": 1, "lanes": 12, "rows": 12, "context": 40, "workers": 0, "prefetch_steps": 2}
    settings = shape | settings
    return Loader(sources, weights or [5.0, 3.0, 2.0], tokenizer or ByteTokenizer(), **settings)


def take(steps, count):
    return list(itertools.islice(steps, count))


def assert_same(steps, others):
    """Two runs of steps are equal in all they hold."""
    assert [s.sha for s in steps] == [s.sha for s in others]
    assert [s.state for s in steps] == [s.state for s in others]
    assert [s.source_counts for s in steps] == [s.source_counts for s in others]
    for step, other in zip(steps, others, strict=True):
        assert step.number == other.number
        assert np.array_equal(step.ids, other.ids)
        for name in ("tokens", "targets", "documents", "sources"):
            assert torch.equal(getattr(step.batch, name), getattr(other.batch, name))


def reference_reading(source, lane, order, epochs):
    """All rows of a lane's first epochs in order, as (place, text): plain loops, no cursor."""
    for epoch in range(epochs):
        units = Permutation(len(source.units), "units", order.seed, source.name, epoch)
        own = units(np.arange(lane, len(source.units), order.lanes)).tolist()
        for ordinal, unit in enumerate(own):
            if rows := source.units[unit]:
                shuffle = Permutation(rows, "rows", order.seed, source.name, epoch, unit)
                for row, index in enumerate(shuffle(np.arange(rows))):
                    yield (epoch, ordinal, row), source.data[unit][index]


def reference_documents(source, lane, order, epochs):
    """The texts of a lane's first epochs in order, as the source's rules leave them."""
    cleaned = (clean(text).text for _, text in reference_reading(source, lane, order, epochs))
    return [text for text in cleaned if not isinstance(text, Dropped)]


def reference_dropped(source, lane, order, place):
    """Why and how often a lane passes over rows before a place."""
    rows = reference_reading(source, lane, order, place[0] + 1)
    cleaned = (clean(text).text for where, text in rows if where < tuple(place[:3]))
    return Counter(text.reason for text in cleaned if isinstance(text, Dropped))


def reference_changed(source, lane, order, place):
    """What rules change in a lane's documents up to a place."""
    rows = reference_reading(source, lane, order, place[0] + 1)
    read = (clean(text) for where, text in rows if where <= tuple(place[:3]))
    return sum(cleaned.changes.get("names", 0) for cleaned in read)


def reference_rows(lane, order, count):
    """The lane's first rows as (source, ids): windows of T + 1 ids that overlap by one.

    Of each source some documents are open, and each takes the lane's next one when it ends.
    """
    mixture, T = Mixture(order.weights, order.lanes, order.seed), order.context
    documents = [reference_endless(source, lane, order) for source in order.sources]
    streams = [[[] for _ in range(order.open_documents)] for _ in order.sources]
    dealt = [0] * len(order.sources)
    rows = []
    for row in range(count):
        source = mixture.source(lane, row)
        turn, which = divmod(dealt[source], order.open_documents)
        stream, start = streams[source][which], turn * T
        while len(stream) < start + T + 1:
            stream += [BOS, *order.tokenizer.encode(next(documents[source])), EOS]
        rows.append((source, stream[start : start + T + 1]))
        dealt[source] += 1
    return rows


def reference_endless(source, lane, order):
    """The lane's texts of one source without end."""
    for epoch in itertools.count():
        known = reference_documents(source, lane, order, epoch)
        yield from reference_documents(source, lane, order, epoch + 1)[len(known) :]


def run_here(code, hash_seed="0"):
    """Run code in a fresh process that can import these files, and give what it prints."""
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
    folder = Path(__file__).parent
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, cwd=folder, env=environment, text=True).strip()
