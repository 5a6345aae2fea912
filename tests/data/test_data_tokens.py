"""Dealt steps, written and read: equal to the loader's, in order, verified row by row."""

import hashlib
import json
import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_streams import ByteTokenizer, make_loader, make_source, take
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import DamagedDataError, DataChangedError, SaveError, UsageError
from summerlm.data.config import DataConfig, SourceConfig
from summerlm.data.ledger import Counts
from summerlm.data.loader import hash_steps, merge_states
from summerlm.data.lock import write_lock
from summerlm.data.tokens.manifest import (
    HELD_OUT,
    LOCK,
    MANIFEST,
    Entry,
    Manifest,
    Shard,
    order_settings,
    read_manifest,
    require_order,
    verify_files,
    write_manifest,
)
from summerlm.data.tokens.reading import Tokens, TokenSteps
from summerlm.data.tokens.writing import sweep, write_shard

DATA = DataConfig(
    sources={name: SourceConfig(path=f"{name}.txt", weight=1, licence="CC0-1.0") for name in "abc"},
    lanes=12,
    open_documents=1,
)
FEW = settings(deadline=None, max_examples=25)


def write_folder(folder, loader, lengths, data=DATA, vocabulary=ByteTokenizer.vocabulary):
    """Write shards of so many steps each."""
    folder.mkdir()
    write_lock(
        folder / LOCK, [{"name": name, "revision": None, "files": []} for name in data.sources]
    )
    texts = {name: {"texts": ["so it goes"], "complete": True} for name in data.sources}
    (folder / HELD_OUT).write_text(json.dumps(texts))
    files = {name: Entry.of((folder / name).read_bytes()) for name in (LOCK, HELD_OUT)}
    manifest = Manifest(
        identity=loader.identity,
        data=order_settings(data),
        vocabulary=vocabulary,
        held_out_characters=10,
        versions={},
        files=files,
    )
    write_manifest(folder, manifest)
    for length in lengths:
        shard = Shard(manifest.steps + 1, manifest.steps + length)
        manifest = write_shard(folder, manifest, shard, loader)
    return manifest


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Seven steps of the default loader in shards of three steps."""
    folder = tmp_path_factory.mktemp("tokens") / "out"
    write_folder(folder, make_loader(), [3, 3, 1])
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def read(folder, **settings):
    return TokenSteps(Tokens(folder), ByteTokenizer.bos, **settings)


def steps_of(folder, count, **settings):
    return take(read(folder, **settings), count)


# what is read


def assert_same_batches(steps, others):
    assert [s.number for s in steps] == [s.number for s in others]
    assert [s.sha for s in steps] == [s.sha for s in others]
    assert [s.tokens_by_source for s in steps] == [s.tokens_by_source for s in others]
    for step, other in zip(steps, others, strict=True):
        assert step.ids.dtype == other.ids.dtype == np.int32
        assert np.array_equal(step.ids, other.ids)
        for name in ("tokens", "targets", "documents", "sources"):
            assert torch.equal(getattr(step.batch, name), getattr(other.batch, name))


@FEW
@given(
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 40),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.data(),
)
def test_every_rank_reads_its_stream(tmp_path_factory, lanes, turns, context, lengths, draw):
    shape = {"lanes": lanes, "rows": lanes * turns, "context": context, "open_documents": 2}
    folder = tmp_path_factory.mktemp("tokens") / "out"
    write_folder(folder, make_loader(**shape), lengths)
    world = draw.draw(st.sampled_from([w for w in range(1, lanes + 1) if lanes % w == 0]))
    total, streamed = sum(lengths), take(make_loader(**shape), sum(lengths))
    ranks = []
    for rank in range(world):
        steps = steps_of(folder, total, rank=rank, world=world)
        assert_same_batches(steps, take(make_loader(**shape, rank=rank, world=world), total))
        ranks.append(steps)
    for step, *parts in zip(streamed, *ranks, strict=True):
        for name, counts in step.source_counts.items():
            assert sum((part.source_counts[name] for part in parts), Counts()) == counts
    stop = draw.draw(st.integers(0, total - 1))
    if stop:
        state = merge_states([rank[stop - 1].state for rank in ranks])
        rest = steps_of(folder, total - stop, state=json.loads(json.dumps(state)))
        assert_same_batches(rest, streamed[stop:])


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_state_holds_the_lanes_before_its_shard(written, stop):
    state = steps_of(written, stop)[-1].state
    before = {1: 0, 2: 0, 3: 0, 4: 3, 5: 3, 6: 3, 7: 6}[stop]
    streamed = take(make_loader(), before)
    assert state["step"] == stop
    assert state["data"] == make_loader().identity
    assert state["lanes"] == (streamed[-1].state["lanes"] if before else {})
    state = {**state, "step": before}
    rest = take(make_loader(state=json.loads(json.dumps(state))), 9 - before)
    assert [s.sha for s in rest] == [s.sha for s in take(make_loader(), 9)[before:]]


def test_a_loader_refuses_lanes_of_an_earlier_step(written):
    state = steps_of(written, 5)[-1].state
    with pytest.raises(AssertionError):
        make_loader(state=state)
    with pytest.raises(AssertionError):
        make_loader(state=steps_of(written, 2)[-1].state)


def test_states_are_shared_with_nobody(written):
    steps = read(written)
    first, second = take(steps, 5)[-2:]
    first.state["lanes"]["0"]["rows"] = -1
    first.state["data"]["seed"] = -1
    assert second.state["lanes"]["0"]["rows"] == 3
    assert next(steps).state["data"]["seed"] == 1


def test_going_on_from_a_streamed_state_on_another_world(written):
    streamed = take(make_loader(), 7)
    states = [take(make_loader(rank=r, world=4), 5)[-1].state for r in range(4)]
    state = json.loads(json.dumps(merge_states(states)))
    ranks = [read(written, state=state, rank=r, world=3) for r in range(3)]
    assert take(hash_steps(ranks), 2) == [(s.number, s.sha) for s in streamed[5:]]


@pytest.mark.parametrize(("vocabulary", "kind"), [(260, "<u2"), (1 << 16, "<u2"), (65537, "<u4")])
def test_ids_take_the_smallest_type_that_holds_them(tmp_path, vocabulary, kind):
    manifest = write_folder(tmp_path / "out", make_loader(), [1], vocabulary=vocabulary)
    assert manifest.row_type["ids"].base == np.dtype(kind)
    assert manifest.row_type["source"] == np.dtype("u1")
    (rows,) = (tmp_path / "out").glob("*.rows")
    assert rows.stat().st_size == 12 * (41 * np.dtype(kind).itemsize + 1 + 8)
    assert steps_of(tmp_path / "out", 1)[0].sha == take(make_loader(), 1)[0].sha


def test_an_id_that_the_type_would_cut_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="cut"):
        write_folder(tmp_path / "out", make_loader(), [1], vocabulary=100)


def test_rows_lie_in_global_order_as_documented(written):
    """The format, read by hand."""
    kind = np.dtype([("ids", "<u2", (41,)), ("source", "u1"), ("check", "<u8")])
    rows = np.fromfile(written / "000000004-000000006.rows", kind)
    steps = take(make_loader(), 6)[3:]
    assert np.array_equal(rows["ids"], np.concatenate([step.ids for step in steps]))
    assert np.array_equal(rows["source"], np.concatenate([s.batch.sources for s in steps]))
    account = json.loads((written / "000000004-000000006.json").read_text())
    assert account["lanes"] == steps[-1].state["lanes"]
    assert [row[0][0] for row in account["counts"]] == [s.tokens_by_source["a"] for s in steps]


def test_the_folder_stands_for_its_sources(written):
    tokens = Tokens(written)
    assert [source.name for source in tokens] == ["a", "b", "c"]
    assert len(tokens) == 3
    assert [source.lock()["name"] for source in tokens[1:]] == ["b", "c"]
    assert list(tokens[0].held_out()) == ["so it goes"]
    few = iter(replace(tokens[0], complete=False).held_out())
    assert next(few) == "so it goes"
    with pytest.raises(UsageError, match=r"validation\.characters_per_source"):
        next(few)


def test_past_the_end_and_a_wrong_world_are_told(written):
    steps = read(written)
    take(steps, 7)
    for _ in range(2):
        with pytest.raises(UsageError, match="holds 7 steps, step 8 is asked for"):
            next(steps)
    with pytest.raises(UsageError, match=r"world size 5 must divide data\.lanes = 12"):
        read(written, world=5)
    steps.close()


# other data


def test_a_state_of_another_order_is_refused(written):
    state = take(make_loader(seed=2), 1)[0].state
    with pytest.raises(DataChangedError, match="seed was 2, is 1"):
        read(written, state=state)
    state = take(make_loader([make_source(name, [5] * 30) for name in "abc"]), 1)[0].state
    with pytest.raises(DataChangedError, match="source b: units"):
        read(written, state=state)


def require(folder, data=DATA, **changes):
    asked = {"seed": 1, "rows": 12, "context": 40, "tokenizer": "bytes"} | changes
    require_order(folder, read_manifest(folder), data, **asked)


def changed_source(**changes):
    source = DATA.sources["b"].model_copy(update=changes)
    return DATA.model_copy(update={"sources": {**DATA.sources, "b": source}})


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("run.seed was 1, is 2", {"seed": 2}),
        ("model.context was 40, is 41", {"context": 41}),
        ("train.batch_tokens was 480, is 960", {"rows": 24}),
        ("tokenizer's fingerprint was 'bytes', is 'other'", {"tokenizer": "other"}),
    ],
)
def test_other_settings_are_named(written, words, changes):
    with pytest.raises(DataChangedError) as error:
        require(written, **changes)
    assert words in str(error.value)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    ("key", "values", "data"),
    [
        ("data.lanes", (12, 6), DATA.model_copy(update={"lanes": 6})),
        ("data.open_documents", (1, 4), DATA.model_copy(update={"open_documents": 4})),
        ("data.held_out_fraction", (0.005, 0), DATA.model_copy(update={"held_out_fraction": 0})),
        ("data.evaluation_sets", ([], ["x"]), DATA.model_copy(update={"evaluation_sets": ("x",)})),
        *(
            (f"data.sources.b.{key}", (default, value), changed_source(**{key: value}))
            for key, default, value in [
                ("weight", 1.0, 2.0),
                ("path", "b.txt", "other.txt"),
                ("files", None, "*.md"),
                ("column", None, "body"),
                ("where", [], ("a > 1",)),
                ("min_characters", None, 5),
                ("rules", [], ("emails",)),
                ("on_damage", "stop", "skip"),
                ("max_epochs", None, 2),
                ("licence", "CC0-1.0", "MIT"),
            ]
        ),
    ],
)
def test_other_settings_of_the_data_are_named(written, key, values, data):
    with pytest.raises(DataChangedError) as error:
        require(written, data)
    was, now = (list(value) if isinstance(value, tuple) else value for value in values)
    assert f"{key} was {was!r}, is {now!r}" in str(error.value)


def test_other_sources_or_another_order_of_them_are_named(written):
    few = {name: DATA.sources[name] for name in "ab"}
    turned = {name: DATA.sources[name] for name in "bac"}
    for sources in (few, turned):
        with pytest.raises(
            DataChangedError, match=r"the order of data\.sources was \['a', 'b', 'c'"
        ):
            require(written, DATA.model_copy(update={"sources": sources}))


def test_how_data_are_read_may_differ(written, tmp_path):
    how = {"workers": 7, "prefetch_steps": 9, "mirror": tmp_path, "tokens": tmp_path}
    require(written, DATA.model_copy(update=how | {"stall_timeout_s": 1.0, "deadline_s": 2.0}))


# damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@FEW
@given(st.integers(0, 3 * 12 * (41 * 2 + 1 + 8) - 1))
def test_a_flipped_byte_is_never_trained_on(written, tmp_path_factory, place):
    folder = shutil.copytree(written, tmp_path_factory.mktemp("tokens") / "copy")
    path = folder / "000000004-000000006.rows"
    flip(path, place)
    row = place // 91
    step = 4 + row // 12
    steps = read(folder)
    assert len(take(steps, step - 1)) == step - 1
    for _ in range(2):
        with pytest.raises(DamagedDataError, match=f"{path}: row {row} ") as error:
            next(steps)
    assert error.value.exit_code == 5
    other = read(folder, rank=(row + 1) % 2, world=2)  # whose rows are whole
    assert len(take(other, 7)) == 7
    with pytest.raises(DamagedDataError, match=str(path)):
        verify_files(folder, read_manifest(folder), lambda *_: None)


def test_a_row_elsewhere_or_of_another_run_is_damage(written, copy, tmp_path):
    one, two = (copy / name for name in ("000000001-000000003.rows", "000000004-000000006.rows"))
    shutil.copy(written / two.name, one)
    with pytest.raises(DamagedDataError, match="row 0"):
        steps_of(copy, 1)
    write_folder(tmp_path / "other", make_loader(seed=2), [3, 3])
    shutil.copy(tmp_path / "other" / one.name, one)
    with pytest.raises(DamagedDataError, match="row 0"):
        steps_of(copy, 1)


@pytest.mark.parametrize("name", ["000000004-000000006.rows", "000000004-000000006.json", LOCK])
def test_a_missing_or_cut_file_is_found_at_once(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(DamagedDataError, match=f"{name}: has {len(data) - 1} bytes"):
        Tokens(copy)
    (copy / name).unlink()
    with pytest.raises(DamagedDataError, match=f"{name}: No such file"):
        Tokens(copy)


@pytest.mark.parametrize("name", [LOCK, HELD_OUT, "000000001-000000003.json"])
def test_an_altered_small_file_is_refused_when_it_is_read(copy, name):
    flip(copy / name, 20)
    with pytest.raises(DamagedDataError, match=f"{name}: its SHA-256"):
        steps_of(copy, 1)


def test_files_that_vanish_after_the_opening_are_told(copy):
    steps = read(copy)
    take(steps, 3)
    os.truncate(copy / "000000004-000000006.rows", 100)
    with pytest.raises(DamagedDataError, match=r"000000004-000000006\.rows: can't be read"):
        next(steps)
    (copy / "000000004-000000006.rows").unlink()
    with pytest.raises(DamagedDataError, match=r"000000004-000000006\.rows: can't be read"):
        next(steps)


def test_an_edited_manifest_is_refused(copy, tmp_path):
    path = copy / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"seed": 1', '"seed": 2'))
    with pytest.raises(DamagedDataError, match=r"MANIFEST\.json: was altered"):
        Tokens(copy)
    for broken in (text[:-20], "[]", "3", "{}"):
        path.write_text(broken)
        with pytest.raises(DamagedDataError, match=r"MANIFEST\.json: no manifest"):
            Tokens(copy)
    body = json.loads(text)["manifest"] | {"format": 2}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"manifest": body, "sha256": digest}))
    with pytest.raises(UsageError, match="has format 2, this version reads 1"):
        Tokens(copy)
    with pytest.raises(UsageError, match=r"tokenize"):
        Tokens(tmp_path)


# writing


def test_a_full_disk_leaves_the_shards_before(tmp_path):
    folder, loader = tmp_path / "out", make_loader()
    manifest = write_folder(folder, loader, [2])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(
            SaveError, match=r"000000003-000000007\.rows: can't be written: File too"
        ):
            write_shard(folder, manifest, Shard(3, 7), loader)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(steps_of(folder, 2)) == 2


def test_a_sweep_takes_what_no_manifest_lists_and_nothing_of_others(copy):
    before = sorted(path.name for path in copy.iterdir())
    ours = ["000000008-000000009.rows", "000000008-000000009.rows.draft", ".MANIFEST.json.a1b2_"]
    ours += ["000000008-000000009.json", ".000000008-000000009.json.xyz", ".held-out.json.q"]
    others = ["notes.txt", "1-2.rows", ".lock", "incidents.jsonl", "2024-01.json"]
    for name in [*ours, *others]:
        (copy / name).touch()
    sweep(copy, read_manifest(copy))
    assert sorted(path.name for path in copy.iterdir()) == sorted([*before, *others])
