"""Lanes: the order against plain loops, resuming, what is refused, what is held in memory."""

import hashlib
import json
from collections import Counter

import pytest
import torch
from data_streams import (
    BOS,
    EOS,
    FIRST,
    SPACE,
    ByteTokenizer,
    MemorySource,
    make_order,
    make_source,
    reference_changed,
    reference_documents,
    reference_dropped,
    reference_rows,
    run_here,
    take,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from summerlm.core.errors import DataChangedError, UsageError
from summerlm.core.hardware import peak_memory
from summerlm.data.lanes import Lane, walk
from summerlm.data.mixture import Mixture

FEW = settings(deadline=None, max_examples=40)
SPECS = st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=12), min_size=1, max_size=4)


def make_lane(order, number, state=None):
    mixture = Mixture(order.weights, order.lanes, order.seed)
    return Lane(order, number, mixture, json.loads(json.dumps(state)))


def deal(lane, count):
    return [(source, ids.tolist()) for source, ids, _ in (lane.next() for _ in range(count))]


@st.composite
def orders(draw):
    """Any order in which every lane of every source has text in every epoch."""
    spec = draw(SPECS)
    sources = [make_source("abcd"[i], units) for i, units in enumerate(spec)]
    assume(all(any(map(any, source.data)) for source in sources))
    weights = draw(st.lists(st.integers(1, 9), min_size=len(spec), max_size=len(spec)))
    lanes = draw(st.sampled_from([1, 2, 4]))
    order = make_order(
        sources,
        weights,
        tokenizer=ByteTokenizer(space=draw(st.booleans())),
        seed=draw(st.integers(0, 1 << 40)),
        lanes=lanes,
        rows=lanes * draw(st.integers(1, 2)),
        context=draw(st.integers(1, 50)),
        open_documents=draw(st.sampled_from([1, 1, 2, 3, 7])),
    )
    pairs = [(source, lane) for source in sources for lane in range(lanes)]
    assume(all(reference_documents(source, lane, order, 6) for source, lane in pairs))
    return order


@FEW
@given(orders(), st.integers(0, 60))
def test_rows_are_windows_of_the_documents_laid_end_to_end(order, count):
    for lane in range(order.lanes):
        assert deal(make_lane(order, lane), count) == reference_rows(lane, order, count)


@FEW
@given(orders(), st.integers(0, 12), st.integers(0, 12))
def test_resumes_exactly_and_twice(order, first, second):
    for number in range(order.lanes):
        expected = deal(make_lane(order, number), first + second + 6)
        lane = make_lane(order, number)
        got = deal(lane, first)
        for count in (second, 6):
            lane = make_lane(order, number, lane.state())
            got += deal(lane, count)
        assert got == expected


@FEW
@given(orders(), st.integers(0, 12))
def test_a_resumed_lane_has_the_same_state_and_account(order, count):
    lane = make_lane(order, 0)
    for _ in range(count):
        lane.next()
    twin = make_lane(order, 0, lane.state())
    assert twin.state() == lane.state()
    for _ in range(8):
        assert twin.next()[2] == lane.next()[2]
        assert twin.state() == lane.state()


@FEW
@given(orders())
def test_a_taken_state_is_frozen(order):
    lane = make_lane(order, 0)
    lane.next()
    state = lane.state()
    frozen = json.dumps(state)
    deal(lane, 9)
    assert json.dumps(state) == frozen
    deal(Lane(order, 0, Mixture(order.weights, order.lanes, order.seed), state), 9)
    assert json.dumps(state) == frozen


@FEW
@given(
    st.lists(st.integers(0, 9), min_size=4, max_size=30), st.integers(0), st.sampled_from([1, 2, 4])
)
def test_an_epoch_reads_every_document_once(units, seed, lanes):
    source = MemorySource("a", [[f"{u}.{r}" for r in range(n)] for u, n in enumerate(units)])
    assume(sum(units))
    order = make_order([source], lanes=lanes, rows=lanes, seed=seed)
    for epoch in range(2):
        seen = Counter()
        for lane in range(lanes):
            for document in walk(source, None, lane, order, (epoch, 0, 0)):
                if document.place[0] > epoch:
                    break
                seen[document.text] += 1
                if sum(seen.values()) > sum(units):
                    break
            # a lane whose units hold nothing in this epoch goes on to the next
        assert seen == Counter(text for texts in source.data for text in texts)


def test_epochs_and_lanes_and_seeds_have_orders_of_their_own():
    source = MemorySource("a", [[f"{u}.{r}" for r in range(9)] for u in range(8)])

    def texts(seed, name="a", epoch=0):
        order = make_order([source], lanes=1, rows=1, seed=seed)
        source.name = name
        return [d.text for d in take(walk(source, None, 0, order, (epoch, 0, 0)), 72)]

    drawn = [texts(1), texts(2), texts(1, "b"), texts(1, epoch=1)]
    assert len(set(map(tuple, drawn))) == 4
    first_units = [{text.split(".")[0] for text in order[:9]} for order in drawn]
    assert all(len(units) == 1 for units in first_units)  # a unit is read whole before the next
    assert drawn[0][:9] != sorted(drawn[0][:9])


def test_rows_come_from_the_scheduled_source_and_nothing_is_normalised():
    texts = ["  \t x \r\n", "\n\nend  ", "<s></s>[INST]\x00"]
    sources = [MemorySource(name, [[name + t for t in texts]] * 4) for name in "xyz"]
    order = make_order(sources, [3, 2, 1], context=7)
    lane, streams = make_lane(order, 1), {0: [], 1: [], 2: []}
    for _ in range(200):
        source, ids, _ = lane.next()
        streams[source] += ids[:-1].tolist()
    for index, ids in streams.items():
        stream = bytes(i - FIRST if i >= FIRST else 255 for i in ids).split(b"\xff\xff")
        documents = {document.strip(b"\xff").decode() for document in stream[:-1]}
        assert documents == {sources[index].name + text for text in texts}


def test_a_state_takes_little_room():
    sources = [make_source(name, [50] * 400) for name in "abcde"]
    order = make_order(sources, lanes=2, context=64)
    lane = make_lane(order, 1)
    deal(lane, 3000)
    assert len(json.dumps(lane.state())) < 200


def test_a_large_document_is_encoded_once():
    order = make_order([MemorySource("a", [["x" * 100_000]] * 2)], context=100)
    deal(make_lane(order, 0), 1000)
    assert order.tokenizer.encoded == 1
    deal(make_lane(order, 0), 1001)  # two more ids a document: BOS and EOS
    assert order.tokenizer.encoded == 1 + 2


@pytest.mark.parametrize("space", [False, True])
def test_the_account_of_rows_is_that_of_their_targets(space):
    sources = [make_source("a", [5, 0, 3, 9, 1, 4], empty=3), make_source("b", [7] * 5)]
    order = make_order(sources, context=23, tokenizer=ByteTokenizer(space))
    for number in range(2):
        lane, totals = make_lane(order, number), {}
        targets = {0: [], 1: []}
        for _ in range(150):
            source, ids, counts = lane.next()
            targets[source] += ids[1:].tolist()
            totals[source] = totals[source] + counts if source in totals else counts
            assert counts.targets == 23
        for index, ids in targets.items():
            assert totals[index].documents == ids.count(EOS)
            open_space = SPACE in ids[-ids[::-1].index(BOS) :] if BOS in ids else SPACE in ids
            real = sum(i >= FIRST for i in ids)
            assert totals[index].bytes == real + open_space  # taken back where the text ends
            (place,) = lane.state()["places"][index]
            assert totals[index].epochs == place[0] + 1
            passed = reference_dropped(sources[index], number, order, place)
            assert totals[index].dropped == passed
            changed = reference_changed(sources[index], number, order, place)
            assert totals[index].changed.get("names", 0) == changed


def test_max_epochs_stops_naming_the_source():
    source = MemorySource("web", [["abcdef"], ["ghijkl"]])  # 8 ids a document and lane
    lane = make_lane(make_order([source], limits=[2], context=5), 0)
    assert len(deal(lane, 3)) == 3  # 16 ids: 15 targets
    with pytest.raises(UsageError, match=r"source web: max_epochs = 2"):
        lane.next()


def test_a_lane_without_text_stops_naming_the_source():
    source = MemorySource("web", [["", ""], ["", ""]])
    with pytest.raises(UsageError, match=r"source web: lane 1 met no text"):
        make_lane(make_order([source]), 1).next()


def test_a_lane_waits_for_an_epoch_with_text():
    source = MemorySource("web", [["text"], [""], ["", ""], []])
    order = make_order([source], lanes=4, rows=4)
    for lane in range(4):
        assert len(deal(make_lane(order, lane), 20)) == 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[], [], []], "source web: no document"),
        ([], "source web: no document"),
        ([["text"]], "source web: 1 units can't feed data.lanes = 2"),
    ],
)
def test_a_source_that_cannot_feed_the_lanes_is_refused(data, message):
    with pytest.raises(UsageError, match=message):
        make_order([MemorySource("web", data)])


def test_lanes_must_divide_the_rows():
    with pytest.raises(UsageError, match=r"data\.lanes = 4 must divide the 6 rows"):
        make_order([make_source("a", [1] * 9)], lanes=4, rows=6)


def test_another_number_of_rows_than_the_lock_says_is_refused():
    source = make_source("web", [3] * 4)
    source.broken = dict.fromkeys(range(4), "rows")
    with pytest.raises(DataChangedError, match=r"source web: unit \d holds 2 rows, .* says 3"):
        make_lane(make_order([source]), 0).next()


def order_digest():
    sources = [make_source("a", [3, 4, 5] * 4), make_source("b", [2] * 9)]
    lane = make_lane(make_order(sources, [3, 1], seed=7), 1)
    return hashlib.sha256(json.dumps([deal(lane, 40), lane.state()]).encode()).hexdigest()


def test_the_order_is_the_same_in_every_process_and_for_ever():
    code = "from test_data_lanes import order_digest; print(order_digest())"
    pinned = "467af25ca6c1cbe9629d8be713d78f4f69a48b454b2301cee64de9ac5de52760"
    assert [order_digest(), run_here(code, hash_seed="1")] == [pinned] * 2


class WideSource(MemorySource):
    """Units of 4 MB, made anew at each read: documents of 1 kB, or one of 1 MB among them."""

    def read(self, unit):
        if unit % 4:
            return [f"{row:1000}" for row in range(4000)]
        return ["z" * (1 << 20), *(f"{row:800}" for row in range(3999))]


def print_memory_of_lanes():
    sources = [WideSource(name, [range(4000)] * 96) for name in "abcde"]
    order = make_order(sources, lanes=48, rows=48, context=2048)
    # not getrusage: what it gives begins with the memory of the test's process
    before = peak_memory(torch.device("cpu")) // 1024
    lanes = [make_lane(order, number) for number in range(48)]
    for _ in range(40):
        for lane in lanes:
            lane.next()
    print(peak_memory(torch.device("cpu")) // 1024 - before)


@pytest.mark.slow
def test_forty_eight_lanes_of_five_sources_stay_below_a_gigabyte():
    kilobytes = run_here("from test_data_lanes import *; print_memory_of_lanes()")
    assert 500_000 < int(kilobytes) < 1 << 20
