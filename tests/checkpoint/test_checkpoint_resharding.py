"""Any layout loads any other's checkpoint, to the bit, against tables that lie whole in memory."""

import json
import threading

import pytest
import torch
from checkpoints import cut, empty_like, in_threads, make_flight, publish, same, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from summerlm.checkpoint import writing
from summerlm.checkpoint.manifest import read_manifest, verify, write_manifest
from summerlm.checkpoint.pieces import plan_pieces
from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.store import Store
from summerlm.core.errors import NoCheckpointError
from summerlm.core.parts import Part
from summerlm.train.saving import resume

LAYOUTS = [(w, s) for w in (1, 2, 3, 4) for s in range(1, w + 1) if w % s == 0]
OF_PROCESSES = [(2, 1), (3, 3), (4, 2)]  # whose ranks are no threads: starting processes takes long


def save(ranks, folder, shards, step=1):
    publish(Store(folder, print), step, cut(whole(step), ranks.rank % shards, shards), ranks)


def load(ranks, folder, shards, step=1):
    expected = cut(whole(step), ranks.rank % shards, shards)
    tables = empty_like(expected)
    found, state = resume(Store(folder, print), tables, ranks)
    return same(tables, expected) and state == {"step": step} and found.name


@pytest.mark.ranks
def test_every_layout_loads_every_other_s_to_the_bit(tmp_path):
    for world, shards in LAYOUTS:
        folder = tmp_path / f"{world}-{shards}"
        if (world, shards) in OF_PROCESSES:
            run_ranks(save, folder, shards, world=world)
        else:
            in_threads(world, lambda r, f=folder, s=shards: save(r, f, s))
        verify(folder / "step-00000001")
        for stem, tensors in whole(1).items():
            read = read_tensors(folder / "step-00000001", stem)
            assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    for world, shards in LAYOUTS:
        for writers in LAYOUTS:
            folder = tmp_path / "{}-{}".format(*writers)
            names = in_threads(world, lambda r, f=folder, s=shards: load(r, f, s))
            assert names == ["step-00000001"] * world, (writers, world, shards)
    assert run_ranks(load, tmp_path / "3-3", 4, world=4) == ["step-00000001"] * 4
    assert run_ranks(load, tmp_path / "4-2", 1, world=3) == ["step-00000001"] * 3


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float16]


@st.composite
def tensors(draw):
    """Tensors of odd shapes, of no rows too, and scalars; any bits that are finite."""
    table = {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        tensor = torch.randint(0, 100, shape, generator=generator)
        table[f"t{number}"] = tensor.to(draw(st.sampled_from(DTYPES)))
    return {"model": table, "optimizer": {"only": torch.tensor(3.0)}}


@st.composite
def cuts(draw, rows):
    """Where the shards of a tensor end: anywhere, some may hold nothing; and how many replicas."""
    shards = draw(st.integers(1, 3))
    replicas = draw(st.integers(1, 2))
    ends = {
        name: sorted(draw(st.lists(st.integers(0, n), min_size=shards - 1, max_size=shards - 1)))
        for name, n in rows.items()
    }
    return shards, replicas, ends


def parts(tables, ends, shard):
    def part(name, tensor):
        if not tensor.shape:
            return Part.whole(tensor.clone())
        borders = [0, *ends[name], tensor.shape[0]]
        start, stop = borders[shard], borders[shard + 1]
        return Part(tensor[start:stop].clone(), start, tuple(tensor.shape))

    return {s: {n: part(n, t) for n, t in table.items()} for s, table in tables.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_rows_from_any_rows(tmp_path_factory, data):
    tables = data.draw(tensors())
    rows = {n: t.shape[0] for table in tables.values() for n, t in table.items() if t.shape}
    folder = tmp_path_factory.mktemp("any") / "checkpoints"
    shards, replicas, ends = data.draw(cuts(rows))

    def write(ranks):
        publish(Store(folder, print), 1, parts(tables, ends, ranks.rank % shards), ranks)

    in_threads(shards * replicas, write)
    shards, replicas, ends = data.draw(cuts(rows))

    def read(ranks):
        expected = parts(tables, ends, ranks.rank % shards)
        found = empty_like_any(expected)
        assert resume(Store(folder, print), found, ranks) is not None
        return same(found, expected)

    assert all(in_threads(shards * replicas, read))


def empty_like_any(tables):
    return {
        s: {n: p.like(torch.full_like(p.tensor, 101)) for n, p in table.items()}
        for s, table in tables.items()
    }


@pytest.mark.parametrize(("world", "shards"), LAYOUTS)
def test_every_piece_is_written_once_and_bytes_are_balanced(tmp_path, world, shards):
    rows = {f"w{i}": torch.randn(64 + i, 16) for i in range(24)}
    tables = {"model": rows, "optimizer": {f"{n}/m": t.clone() for n, t in rows.items()}}

    def write(ranks):
        publish(Store(tmp_path / "c", print), 1, cut(tables, ranks.rank % shards, shards), ranks)

    in_threads(world, write)
    manifest = read_manifest(tmp_path / "c" / "step-00000001")
    held = 0
    for table in manifest["tensors"].values():
        for facts in table.values():
            covered = sorted((start, stop) for _, start, stop in facts["pieces"])
            assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
            assert covered[-1][1] == facts["shape"][0]
            held += 4 * facts["shape"][0] * facts["shape"][1]
    sizes = {n: e["bytes"] for n, e in manifest["files"].items() if n.endswith(".safetensors")}
    by_rank = [sum(b for n, b in sizes.items() if f"-{r:05d}-of" in n) for r in range(world)]
    assert sum(by_rank) < held * 1.05 + 2000 * world  # nothing is written twice
    assert max(by_rank) <= 1.15 * held / world + 2000


def test_the_manifest_tells_what_it_belongs_to(tmp_path):
    path = publish(Store(tmp_path / "c", print), 5)
    manifest = json.loads((path / "MANIFEST.json").read_bytes().splitlines()[0])
    assert (manifest["format"], manifest["step"], manifest["world"]) == (2, 5, 1)
    assert manifest["identity"] == {"tokenizer": "t"}
    assert manifest["tensors"]["optimizer"]["a.weight/step"] == {
        "dtype": "float32",
        "shape": [],
        "pieces": [["optimizer-00000-of-00001.safetensors", 0, 1]],
    }


def gap(tables, rank):
    if rank == 1:
        part = tables["model"]["a.weight"]
        tables["model"]["a.weight"] = Part(part.tensor[1:], part.start + 1, part.shape)


def overlap(tables, rank):
    if rank == 1:
        part = tables["model"]["a.weight"]
        rows = torch.cat((part.tensor[:1], part.tensor))
        tables["model"]["a.weight"] = Part(rows, part.start - 1, part.shape)


def lack(tables, rank):
    if rank == 1:
        del tables["model"]["b.norm"]


def other_dtype(tables, rank):
    if rank == 1:
        part = tables["model"]["b.norm"]
        tables["model"]["b.norm"] = part.like(part.tensor.double())


@pytest.mark.parametrize("spoil", [gap, overlap, lack, other_dtype])
def test_tables_that_make_no_whole_are_refused(spoil):
    def plan(ranks):
        tables = cut(whole(1), ranks.rank, 2)
        spoil(tables, ranks.rank)
        plan_pieces(tables, ranks)

    with pytest.raises(AssertionError, match=r"a\.weight|other tensors|b\.norm"):
        in_threads(2, plan)


def test_files_are_read_by_safetensors_itself(tmp_path):
    from safetensors.torch import load_file

    path = publish(Store(tmp_path / "c", print), 1)
    found = load_file(path / "model-00000-of-00001.safetensors")
    expected = whole(1)["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_snapshot_doesn_t_see_later_steps(tmp_path, monkeypatch):
    store = Store(tmp_path / "c", print)
    tables = cut(whole(1))
    tables["model"]["e.turned"] = Part.whole(torch.arange(12.0).view(3, 4).t())  # not contiguous
    turned = tables["model"]["e.turned"].tensor.clone()
    flight = make_flight(store, tables)
    changed = threading.Event()  # the thread does nothing before the next step has changed all
    monkeypatch.setattr(writing, "reach", lambda name: name != "write.drafted" or changed.wait(9))
    flight.start(1, None, lambda _: {"state.json": b"{}"})
    flight.release()
    for table in tables.values():
        for part in table.values():
            part.tensor.fill_(9)
    changed.set()
    assert flight.wait().error is None
    read = read_tensors(store.path(1), "model")
    assert torch.equal(read.pop("e.turned"), turned)
    assert all(torch.equal(read[name], tensor) for name, tensor in whole(1)["model"].items())


@pytest.mark.parametrize("crime", ["elsewhere", "missing", "twice"])
def test_a_manifest_that_contradicts_itself_fills_nothing(tmp_path, crime):
    """Signed anew, as only malice would: what isn't hashed is not read, no row stays as it was."""
    store = Store(tmp_path / "run", lambda line: None)
    publish(store, 1)
    manifest = read_manifest(store.path(1))
    name, facts = next((n, f) for n, f in manifest["tensors"]["model"].items() if f["shape"])
    file, start, stop = facts["pieces"][0]
    facts["pieces"] = {
        "elsewhere": [["../other.safetensors", start, stop]],
        "missing": [[file, start + 1, stop]],
        "twice": [[file, start, stop], [file, start, stop]],
    }[crime]
    write_manifest(store.path(1), {k: v for k, v in manifest.items() if k != "format"})
    with pytest.raises(NoCheckpointError, match=name):
        resume(store, empty_like(cut(whole(1))))
