"""The loader: rows in global order, ranks, workers and resuming; states that are refused."""

import json
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
from data_streams import (
    ByteTokenizer,
    MemorySource,
    assert_same,
    make_loader,
    make_order,
    make_source,
    reference_rows,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.config import validate
from summerlm.core.errors import DataChangedError, UsageError
from summerlm.data.batch import batch_sha
from summerlm.data.config import DataConfig
from summerlm.data.ledger import Ledger
from summerlm.data.loader import hash_steps, merge_states
from summerlm.data.opening import open_sources
from summerlm.tokenizer.mistral import mistral_v3

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DIVISORS = st.sampled_from([1, 2, 3, 4, 6, 12])
FEW = settings(deadline=None, max_examples=25)


def round_trip(state):
    return json.loads(json.dumps(state))


# order


@pytest.mark.parametrize(("lanes", "rows"), [(1, 3), (4, 4), (4, 12), (12, 12)])
def test_lane_l_deals_rows_l_of_every_turn(lanes, rows):
    sources = [make_source("a", [5] * 30), make_source("b", [1] * 40)]
    order = make_order(sources, [2, 1], lanes=lanes, rows=rows, context=11)
    loader = make_loader(sources, [2, 1], lanes=lanes, rows=rows, context=11)
    turns = rows // lanes
    expected = {lane: reference_rows(lane, order, 3 * turns) for lane in range(lanes)}
    for t, step in enumerate(take(loader, 3)):
        assert step.number == t + 1
        for row in range(rows):
            j, lane = divmod(row, lanes)
            source, ids = expected[lane][t * turns + j]
            assert step.ids[row].tolist() == ids
            assert step.batch.sources[row] == source
        counts = np.bincount(step.batch.sources, minlength=2) * 11
        assert step.tokens_by_source == {"a": counts[0], "b": counts[1]}
        assert step.sha == batch_sha(step.ids, step.batch.documents.numpy())


@FEW
@given(DIVISORS, DIVISORS, st.integers(0, 5), st.integers(0, 1 << 32), st.sampled_from([12, 24]))
def test_the_world_changes_nothing_not_even_over_a_resume(before, after, stop, seed, rows):
    settings = {"seed": seed, "rows": rows, "context": 17}
    alone = take(make_loader(**settings), stop + 3)
    ranks = [make_loader(rank=r, world=before, **settings) for r in range(before)]
    assert take(hash_steps(ranks), stop) == [(s.number, s.sha) for s in alone[:stop]]
    ranks = [make_loader(rank=r, world=before, **settings) for r in range(before)]
    steps = [take(rank, stop) for rank in ranks]
    state = None
    if stop:
        state = round_trip(merge_states([rank[-1].state for rank in steps]))
        assert state == alone[stop - 1].state
        for name in "abc":
            total = sum(rank[-1].source_counts[name].targets for rank in steps)
            assert total == alone[stop - 1].tokens_by_source[name]
    ranks = [make_loader(rank=r, world=after, state=state, **settings) for r in range(after)]
    assert take(hash_steps(ranks), 3) == [(s.number, s.sha) for s in alone[stop:]]


@FEW
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1 << 32))
def test_resumes_exactly_and_twice(first, second, seed):
    whole = take(make_loader(seed=seed), first + second + 3)
    steps = take(make_loader(seed=seed), first)
    for count in (second, 3):
        steps += take(make_loader(seed=seed, state=round_trip(steps[-1].state)), count)
    assert_same(steps, whole)


@pytest.fixture(scope="module")
def alone():
    return take(make_loader(), 24)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_change_nothing_not_even_over_a_resume(workers, alone):
    first, second = make_loader(workers=workers, prefetch_steps=3), None
    try:
        steps = take(first, 9)
        second = make_loader(workers=4 - workers % 4, state=round_trip(steps[-1].state))
        assert_same(steps + take(second, 15), alone)
    finally:
        first.close()
        second.close()


def test_ranks_with_workers_hash_to_the_global_batch(alone):
    ranks = [make_loader(rank=r, world=3, workers=2) for r in range(3)]
    try:
        assert take(hash_steps(ranks), 12) == [(s.number, s.sha) for s in alone[:12]]
    finally:
        for rank in ranks:
            rank.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_taken_state_is_frozen_and_not_ahead(workers):
    loader = make_loader(workers=workers, prefetch_steps=4)
    first = next(loader)
    frozen = json.dumps(first.state)
    later = next(loader)
    assert json.dumps(first.state) == frozen
    later.state["data"]["seed"] = -1
    later.state["lanes"]["0"]["places"].clear()
    follower = next(loader)
    loader.close()
    assert follower.state["data"]["seed"] == 1
    assert len(follower.state["lanes"]["0"]["places"]) == 3
    assert_same(take(make_loader(state=json.loads(frozen)), 1), take(make_loader(), 2)[1:])


def test_shares_are_shares_of_tokens_whatever_the_documents():
    sizes = {"web": 3000, "code": 8000, "books": 300_000, "papers": 60_000, "chat": 300}
    weights = [60.0, 20.0, 10.0, 5.0, 5.0]
    sources = [MemorySource(n, [["t" * (size - 2)] * 3] * 48) for n, size in sizes.items()]
    tokens = dict.fromkeys(sizes, 0)
    for step in make_loader(sources, weights, lanes=48, rows=48, context=512):
        for name, count in step.tokens_by_source.items():
            tokens[name] += count
        total = sum(tokens.values())
        assert total == step.number * 48 * 512
        if total >= 10_000_000:
            break
    for name, weight in zip(sizes, weights, strict=True):
        assert abs(tokens[name] / total - weight / 100) < 0.001


# the stand-ins of the five sources

ROOT = Path(__file__).parents[2]
MIRROR = Path(os.environ.get("SUMMERLM_TEST_DATA", ROOT.parent / "shared" / "data")) / "hub"


@pytest.fixture(scope="module")
def open_five(tmp_path_factory):
    """A function that opens a loader over the stand-ins of `summer-4b.toml`, and the weights."""
    if not MIRROR.is_dir():
        pytest.skip(f"no stand-in data: {MIRROR} is missing; set SUMMERLM_TEST_DATA")
    settings = tomllib.loads((ROOT / "configs" / "summer-4b.toml").read_text())["data"]
    settings |= {"mirror": str(MIRROR), "lanes": 24}
    config = validate(DataConfig, settings, "summer-4b.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUMMERLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        sources = open_sources(config, lanes=24)
    weights = {name: source.weight for name, source in config.sources.items()}
    tokenizer = mistral_v3()

    def open_loader(**settings):
        shape = {"lanes": 24, "rows": 24, "context": 256}
        return make_loader(sources, list(weights.values()), tokenizer, **shape | settings)

    return open_loader, weights


def test_five_sources_are_the_same_with_workers_and_over_a_resume(open_five):
    open_loader, _ = open_five
    alone = take(open_loader(), 8)
    first = open_loader(workers=2)
    second = open_loader(workers=1, state=round_trip(alone[3].state))
    try:
        assert_same(take(first, 4) + take(second, 4), alone)
    finally:
        first.close()
        second.close()


@pytest.mark.slow
def test_shares_of_the_five_sources(open_five):
    open_loader, weights = open_five
    ledger = Ledger(weights)
    for step in take(open_loader(), 2_000_000 // (24 * 256)):
        ledger.add(step.source_counts)
    for name, sums in ledger.report()["sources"].items():
        assert abs(sums["share"] - weights[name] / sum(weights.values())) < 0.001
        assert 1.5 < sums["bytes"] / sums["targets"] < 6


# refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed was 1, is 2"),
        ({"lanes": 6}, "lanes was 12, is 6"),
        ({"rows": 24}, "rows was 12, is 24"),
        ({"context": 41}, "context was 40, is 41"),
        ({"weights": [5.0, 3.0, 1.0]}, "weights was .*2.0.* is .*1.0"),
        ({"tokenizer": ByteTokenizer(fingerprint="other")}, "tokenizer was bytes, is other"),
        ({"files": "new"}, "source b: files was .* is "),
        ({"units": 41}, "source b: units was "),
        ({"name": "d"}, "sources was .*'b'.* is .*'d'"),
    ],
)
def test_a_state_of_other_data_is_refused_with_the_difference(change, message):
    state = round_trip(next(make_loader()).state)
    second = MemorySource(
        change.pop("name", "b"),
        make_source("b", [1] * change.pop("units", 40)).data,
        change.pop("files", "pinned"),
    )
    sources = [make_source("a", [5] * 30), second, make_source("c", [9] * 13)]
    with pytest.raises(DataChangedError, match=message):
        make_loader(sources, state=state, **change)


def test_wrong_divisions_are_refused_naming_both():
    with pytest.raises(UsageError, match=r"world size 5 must divide data\.lanes = 12"):
        make_loader(world=5)
    with pytest.raises(UsageError, match=r"data\.lanes = 12 must divide the 20 rows"):
        make_loader(rows=20)
    with pytest.raises(UsageError, match=r"data\.lanes = 7 can't be dealt evenly"):
        make_loader(lanes=7, rows=7, workers=2)


def test_states_of_different_steps_are_not_merged():
    first, second = take(make_loader(), 2)
    with pytest.raises(AssertionError):
        merge_states([first.state, second.state])
    with pytest.raises(AssertionError):
        merge_states([first.state, first.state])
