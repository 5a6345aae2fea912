"""The loader: batches, ranks, workers and resuming; processes that die, fail or are signalled."""

import copy
import hashlib
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_streams import (
    BOS,
    READING,
    ByteTokenizer,
    MemorySource,
    make_loader,
    make_order,
    make_source,
    reference_rows,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.config import validate
from summerlm.core.errors import DataChangedError, SourceDownError, SummerError, UsageError
from summerlm.data.batch import IGNORE, Batch, batch_sha
from summerlm.data.config import DataConfig
from summerlm.data.ledger import Ledger
from summerlm.data.loader import hash_steps, merge_states
from summerlm.data.sources import open_sources
from summerlm.tokenizer.mistral import mistral_v3

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DIVISORS = st.sampled_from([1, 2, 3, 4, 6, 12])
FEW = settings(deadline=None, max_examples=25)


def same(steps, others):
    """Whether two runs of steps are equal in all they hold."""
    assert [s.sha for s in steps] == [s.sha for s in others]
    assert [s.state for s in steps] == [s.state for s in others]
    assert [s.source_counts for s in steps] == [s.source_counts for s in others]
    for step, other in zip(steps, others, strict=True):
        assert step.number == other.number
        assert np.array_equal(step.ids, other.ids)
        for name in ("tokens", "targets", "documents", "sources"):
            assert torch.equal(getattr(step.batch, name), getattr(other.batch, name))


def round_trip(state):
    return json.loads(json.dumps(state))


# batches


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
    same(steps, whole)


@pytest.fixture(scope="module")
def alone():
    return take(make_loader(), 24)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_change_nothing_not_even_over_a_resume(workers, alone):
    first, second = make_loader(workers=workers, prefetch_steps=3), None
    try:
        steps = take(first, 9)
        second = make_loader(workers=4 - workers % 4, state=round_trip(steps[-1].state))
        same(steps + take(second, 15), alone)
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
    later.state["data"]["seed"] = later.state["lanes"]["0"]["places"][0][0] = -1
    follower = next(loader)
    loader.close()
    assert follower.state["data"]["seed"] == 1
    assert follower.state["lanes"]["0"]["places"][0][0] == 0
    same(take(make_loader(state=json.loads(frozen)), 1), take(make_loader(), 2)[1:])


def test_shares_are_shares_of_tokens_whatever_the_documents():
    sizes = {"web": 3000, "code": 8000, "books": 1_000_000, "papers": 60_000, "chat": 300}
    weights = [60.0, 20.0, 10.0, 5.0, 5.0]
    sources = [MemorySource(n, [["t" * (size - 2)] * 3] * 24) for n, size in sizes.items()]
    tokens = dict.fromkeys(sizes, 0)
    for step in make_loader(sources, weights, lanes=24, rows=24, context=512):
        for name, count in step.tokens_by_source.items():
            tokens[name] += count
        total = sum(tokens.values())
        assert total == step.number * 24 * 512
        if total >= 2_000_000:
            break
    for name, weight in zip(sizes, weights, strict=True):
        assert abs(tokens[name] / total - weight / 100) < 0.005


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
        same(take(first, 4) + take(second, 4), alone)
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
        assert abs(sums["share"] - weights[name] / sum(weights.values())) < 0.005
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


# what goes wrong in a worker


def faulty_loader(fault, workers):
    sources = [make_source("a", [2] * 40), make_source("b", [2] * 40)]
    sources[1].broken = {20: fault}
    return make_loader(sources, [1.0, 1.0], lanes=4, rows=4, workers=workers, prefetch_steps=3)


def take_until_error(loader):
    """The hashes of the steps before the loader raises, and what it raises."""
    shas = []
    try:
        for step in loader:
            shas.append(step.sha)
    except SummerError as error:
        return shas, error
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("down", SourceDownError, r"source b: unit \d+ can't be read"),
        ("rows", DataChangedError, r"source b: unit \d+ holds 1 rows, its lock says 2; restore .*"),
    ],
)
def test_an_error_arrives_as_itself_at_its_step(workers, fault, kind, message):
    expected_shas, expected = take_until_error(faulty_loader(fault, 0))
    shas, error = take_until_error(faulty_loader(fault, workers))
    assert len(shas) >= 2
    assert shas == expected_shas
    assert type(error) is kind
    assert str(error) == str(expected)
    assert re.fullmatch(message, str(error))


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_comes_again_to_who_asks_again(workers):
    loader = faulty_loader("down", workers)
    try:
        for _ in range(2):
            with pytest.raises(SourceDownError):
                take(loader, 1000)
    finally:
        loader.close()


def test_a_bug_keeps_its_traceback():
    loader = faulty_loader("bug", 2)
    try:
        with pytest.raises(ZeroDivisionError, match=r"in read"):
            list(loader)
    finally:
        loader.close()


@pytest.mark.slow  # torch looks after its workers every five seconds
def test_a_killed_worker_is_a_typed_error():
    loader = make_loader(workers=2, prefetch_steps=1)
    try:
        next(loader)
        loader._workers[0].kill()
        with pytest.raises(SummerError, match="a data worker died"):
            take(loader, 10)
    finally:
        loader.close()


# processes


@pytest.mark.timeout(60)
def test_workers_do_not_wait_for_what_threads_hold_here(alone):
    torch.randn(400, 400) @ torch.randn(400, 400)  # starts the pool of threads
    with READING:  # a forked worker would have it locked for ever
        loader = make_loader(workers=2)
        try:
            same(take(loader, 3), alone[:3])
        finally:
            loader.close()


def test_closing_ends_workers_at_once_even_in_the_midst_of_reading():
    source = make_source("a", [2] * 40)
    source.broken = dict.fromkeys(range(40), "stall")
    loader = make_loader([source], [1.0], workers=2)
    time.sleep(0.5)
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 2
    assert not any(worker.is_alive() for worker in loader._workers)
    with pytest.raises(StopIteration):
        next(loader)


def run_trainer(code):
    """Start a process, in a group of its own, that prints its workers' ids and then runs code."""
    head = (
        "import os, signal, sys, time\n"
        "from data_streams import make_loader\n"
        "if __name__ == '__main__':\n"
        "    loader = make_loader(workers=2)\n"
        "    next(loader)\n"
        "    print(*[worker.pid for worker in loader._workers], flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", head + code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, [int(pid) for pid in process.stdout.readline().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_workers_die_with_a_killed_trainer():
    process, workers = run_trainer("    time.sleep(60)\n")
    assert len(workers) == 2
    assert all(map(alive, workers))
    process.kill()
    wait_until_gone(workers)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_trainer_that_fails_leaves_at_once():
    start = time.monotonic()
    process, workers = run_trainer("    started = time.monotonic()\n    raise SystemExit(3)\n")
    leaving = time.monotonic()
    assert process.wait(30) == 3
    assert time.monotonic() - leaving < 4, time.monotonic() - start
    wait_until_gone(workers)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_signals_to_the_whole_group_are_the_trainers_to_decide_on():
    process, workers = run_trainer(
        "    got = []\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):\n"
        "        signal.signal(number, lambda number, _: got.append(number))\n"
        "    print('ready', flush=True)\n"
        "    while len(got) < 3:\n"
        "        time.sleep(0.01)\n"
        "    time.sleep(0.3)\n"
        "    print([next(loader).number for _ in range(20)][-1], sorted(got), flush=True)\n"
        "    loader.close()\n"
    )
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)
    out, errors = process.communicate(timeout=30)
    assert out == "21 [2, 10, 15]\n", errors
    assert process.returncode == 0
    wait_until_gone(workers)


def test_all_that_goes_to_a_worker_survives_pickling():
    order = make_order([make_source("a", [3] * 4)])
    twin = pickle.loads(pickle.dumps(order))
    assert twin.identity() == order.identity() == copy.deepcopy(order).identity()
