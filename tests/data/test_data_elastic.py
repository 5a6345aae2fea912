"""The whole stream, against a plain reference: any sources, lanes, worlds, workers, stops.

The reference (`data_streams.reference_rows`) knows no cursor, no state and no rank: it lays each
lane's documents end to end and cuts windows. What the loaders of all ranks give together, in
whatever world and after whatever stops, must be these rows in this order.
"""

import json
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from data_streams import (
    BOS,
    EOS,
    FIRST,
    clean,
    make_loader,
    make_order,
    make_source,
    reference_documents,
    reference_rows,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.data.loader import hash_steps, merge_states

LANES = [1, 2, 3, 4, 5, 6, 8, 9, 12]


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def runs(draw):
    """Sources, weights and shape of a run, and the worlds that make its steps in turn."""
    lanes = draw(st.sampled_from(LANES))
    count = draw(st.integers(1, 4))
    unit = st.integers(1, 6)
    sources = [
        make_source(
            name,
            draw(st.lists(unit, min_size=lanes, max_size=3 * lanes)),
            empty=draw(st.integers(4, 9)),
            longest=draw(st.sampled_from([2, 9, 80])),
        )
        for name in "abcd"[:count]
    ]
    for source in sources:
        for texts in source.data:
            if not any(isinstance(clean(text).text, str) for text in texts):
                texts[0] = "so that every lane has text"
    weights = draw(st.lists(st.floats(0.05, 20), min_size=count, max_size=count))
    shape = {
        "seed": draw(st.integers(0, 1 << 32)),
        "lanes": lanes,
        "rows": lanes * draw(st.integers(1, 3)),
        "context": draw(st.integers(2, 60)),
        "open_documents": draw(st.integers(1, 4)),
    }
    parts = st.tuples(st.sampled_from(divisors(lanes)), st.integers(1, 6))
    return sources, weights, shape, draw(st.lists(parts, min_size=1, max_size=4))


def expected(sources, weights, shape, steps):
    """All rows of the first steps in global order as (source, ids)."""
    order = make_order(sources, weights, **shape)
    J = order.rows // order.lanes
    lanes = [reference_rows(lane, order, steps * J) for lane in range(order.lanes)]
    return [lanes[lane][turn] for turn in range(steps * J) for lane in range(order.lanes)]


@settings(deadline=None, max_examples=25)
@given(runs())
def test_every_world_deals_the_reference_s_rows_over_any_stops(run):
    sources, weights, shape, parts = run
    wanted = expected(sources, weights, shape, sum(steps for _, steps in parts))
    state, at = None, 0
    for world, steps in parts:
        ranks = [
            make_loader(sources, weights, rank=r, world=world, state=state, **shape)
            for r in range(world)
        ]
        made = [take(rank, steps) for rank in ranks]
        for dealt in zip(*made, strict=True):
            for turn in range(shape["rows"] // shape["lanes"]):
                for lane in range(shape["lanes"]):
                    step = dealt[lane % world]
                    row = turn * (shape["lanes"] // world) + lane // world
                    source, ids = wanted[at]
                    assert step.ids[row].tolist() == ids
                    assert step.batch.sources[row] == source
                    at += 1
        state = json.loads(json.dumps(merge_states([rank[-1].state for rank in made])))
    assert at == len(wanted)


@settings(deadline=None, max_examples=12)
@given(runs())
def test_an_epoch_trains_on_every_text_once(run):
    """No token lost, none repeated: what all lanes give of a source before its second epoch."""
    sources, _, shape, _ = run
    weights = [1.0] * len(sources)  # a rare source would take long to end its epoch
    shape |= {"open_documents": 1, "context": shape["context"] + 20}
    lanes, streams = shape["lanes"], defaultdict(list)  # ids by lane and source
    for step in make_loader(sources, weights, **shape):
        for row, ids in enumerate(step.ids):
            streams[row % lanes, int(step.batch.sources[row])] += ids[:-1].tolist()
        places = [lane["places"] for lane in step.state["lanes"].values()]
        if all(place and place[0][0] >= 1 for lane in places for place in lane):
            break
    order = make_order(sources, weights, **shape)
    for index, source in enumerate(sources):
        seen = Counter()
        for lane in range(lanes):
            stream = streams[lane, index]
            ends = [at + 1 for at, i in enumerate(stream) if i == EOS]
            documents = [stream[a:b] for a, b in pairwise([0, *ends])]
            seen.update(map(text_of, documents[: len(reference_documents(source, lane, order, 1))]))
        kept = (clean(text).text for texts in source.data for text in texts)
        assert seen == Counter(text for text in kept if isinstance(text, str))


def text_of(ids):
    assert (ids[0], ids[-1]) == (BOS, EOS)
    return bytes(i - FIRST for i in ids[1:-1]).decode()


WIDE = [make_source("a", [5] * 60), make_source("b", [2] * 50), make_source("c", [9] * 24)]


@pytest.fixture(scope="module")
def alone():
    return [step.sha for step in take(make_loader(WIDE, lanes=24, rows=24), 9)]


@pytest.mark.parametrize(
    ("world", "workers", "prefetch"), [(1, 4, 8), (2, 3, 1), (3, 1, 5), (4, 2, 2), (8, 1, 1)]
)
def test_worlds_of_real_workers_with_any_prefetch(alone, world, workers, prefetch):
    shape = {"lanes": 24, "rows": 24, "workers": workers, "prefetch_steps": prefetch}
    loaders = [make_loader(WIDE, rank=r, world=world, **shape) for r in range(world)]
    try:
        dealt = [take(loader, 4) for loader in loaders]
    finally:
        for loader in loaders:
            loader.close()
    state = merge_states([steps[-1].state for steps in dealt])
    # from this world on in another one
    after = {8: 3, 3: 8}.get(world, 1)
    rest = [
        make_loader(WIDE, rank=r, world=after, lanes=24, rows=24, state=state) for r in range(after)
    ]
    assert [sha for _, sha in take(hash_steps(rest), 5)] == alone[4:]
    assert np.all([steps[-1].number == 4 for steps in dealt])
