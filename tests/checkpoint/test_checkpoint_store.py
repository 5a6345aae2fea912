"""Crash-consistency of checkpoints: real kills, real damage, a really full disk."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from checkpoints import cut, make_flight, publish, whole

from summerlm.checkpoint.manifest import DamagedError, verify
from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.store import Retention, Store
from summerlm.checkpoint.tensors import TensorLayout, check_header
from summerlm.core.errors import NoCheckpointError, SaveError

MODEL = "model-00000-of-00001.safetensors"
OPTIMIZER = "optimizer-00000-of-00001.safetensors"


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def store(tmp_path, warnings):
    return Store(tmp_path / "checkpoints", warnings.append)


def test_publish_and_read_back_bit_for_bit(store):
    path = publish(store, 7)
    assert path.name == "step-00000007"
    assert verify(path)["step"] == 7
    for stem, tensors in whole(7).items():
        found = read_tensors(path, stem)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert json.loads((path / "state.json").read_bytes()) == {"step": 7}
    assert sorted(os.listdir(store.folder)) == ["step-00000007"]


def test_a_step_is_never_overwritten(store):
    publish(store, 1)
    before = {p.name: p.read_bytes() for p in store.path(1).iterdir()}
    with pytest.raises(SaveError, match="already exists"):
        publish(store, 1, cut(whole(2)))
    assert {p.name: p.read_bytes() for p in store.path(1).iterdir()} == before


FILES = [MODEL, OPTIMIZER, "state.json", "config.toml", "MANIFEST.json"]


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def swap_step(path: Path, _: random.Random) -> None:
    shutil.copy(path.parent.parent / "step-00000001" / path.name, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, remove, swap_step])
def test_damage_is_named_and_the_one_before_taken(store, warnings, name, damage):
    for step in (1, 2):
        publish(store, step)
    if damage is swap_step and name in ("config.toml",):
        pytest.skip("the same bytes in every step")
    draw = random.Random(f"{name}{damage.__name__}")
    damage(store.path(2) / name, draw)
    found = Store(store.folder, warnings.append).latest()
    assert found == store.path(1)
    assert len(warnings) == 1
    assert name in warnings[0]
    aside = [entry for entry in os.listdir(store.folder) if entry.startswith("damaged-")]
    assert len(aside) == 1
    assert store.steps() == [1]


def test_every_single_flipped_bit_of_small_files_is_seen(store):
    path = publish(store, 1)
    for name in ("state.json", "MANIFEST.json"):
        data = (path / name).read_bytes()
        for position in range(0, len(data) * 8, 7):
            broken = bytearray(data)
            broken[position // 8] ^= 1 << position % 8
            (path / name).write_bytes(broken)
            with pytest.raises(DamagedError, match=name):
                verify(path)
        (path / name).write_bytes(data)
    verify(path)


def test_an_extra_file_is_seen(store):
    path = publish(store, 1)
    (path / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"extra\.safetensors"):
        verify(path)


def test_all_damaged_stops_and_deletes_nothing(store, warnings):
    for step in (1, 2):
        publish(store, step)
        (store.path(step) / "state.json").unlink()
    before = sorted(p.name for p in store.folder.rglob("*"))
    with pytest.raises(NoCheckpointError, match="every checkpoint is damaged") as error:
        Store(store.folder, warnings.append).latest()
    assert error.value.exit_code == 3
    assert sorted(p.name for p in store.folder.rglob("*")) == before


def test_none_is_none(store):
    assert store.latest() is None


def test_retention_counts_good_ones_only(store, warnings):
    for step in range(1, 6):
        publish(store, step)
    (store.path(5) / "state.json").unlink()
    fresh = Store(store.folder, warnings.append)
    (note,) = fresh.prune(Retention(2, steps=frozenset({1})))
    assert fresh.steps() == [1, 3, 4, 5]  # the damaged one is neither counted nor deleted
    assert "state.json" in note


def test_branching_moves_later_steps_away(store, warnings):
    for step in (2, 4, 6):
        publish(store, step)
    store.branch_off(3)
    assert store.steps() == [2]
    (branch,) = [p for p in store.folder.iterdir() if p.name.startswith("branch-")]
    assert sorted(os.listdir(branch)) == ["step-00000004", "step-00000006"]
    store.branch_off(3)
    assert len(warnings) == 1


def test_a_full_disk_leaves_the_former_and_no_draft(store):
    publish(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(SaveError, match="step-00000002: can't be saved"):
            publish(store, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert os.listdir(store.folder) == ["step-00000001"]
    assert store.latest() == store.path(1)
    publish(store, 2)
    assert store.latest() == store.path(2)


def write_on(folder, announcements):
    """Go on from the newest step, saving one after another, until killed."""
    store = Store(folder, print)
    store.clear_drafts()
    found = store.latest()
    step = int(found.name[5:]) if found else 0
    announcements.send(step)
    while True:
        step += 1
        publish(store, step, keep=2)
        announcements.send(step)


def test_kills_at_random_moments_never_lose_an_announced_step(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    folder = tmp_path / "checkpoints"
    announced = 0
    for _ in range(20):
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=write_on, args=(folder, there))
        process.start()
        there.close()
        assert here.recv() >= announced
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        try:
            while True:
                announced = here.recv()
        except EOFError:
            here.close()
        store = Store(folder, lambda line: pytest.fail(line))
        found = store.latest()
        step = int(found.name[5:]) if found else 0
        assert step >= announced
        if found:
            model = read_tensors(found, "model")
            assert torch.equal(model["a.weight"], whole(step)["model"]["a.weight"])
    assert announced > 0
    store.clear_drafts()
    assert all(name.startswith("step-") for name in os.listdir(folder))


def test_a_file_that_says_something_else_is_not_published(tmp_path):
    path = publish(Store(tmp_path / "c", print), 1) / MODEL
    tensors = {n: (t.dtype, tuple(t.shape)) for n, t in whole(1)["model"].items()}
    check_header(path, TensorLayout.of(tensors))
    wrong = (torch.float32, (3, 2))
    for other in ({**tensors, "x": wrong}, {**tensors, "a.weight": wrong}, {"a.weight": wrong}):
        with pytest.raises(OSError, match="does not read back"):
            check_header(path, TensorLayout.of(other))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="does not read back"):
        check_header(path, TensorLayout.of(tensors))


@pytest.mark.slow
def test_training_stands_still_for_a_tenth_of_a_save(tmp_path):
    """200 MB, in the best of five, against the best of five that are waited for."""
    table = {f"w{i}": torch.randn(1024, 1024) for i in range(48)}
    store, tables = Store(tmp_path / "c", print), cut({"model": table, "optimizer": {}})
    flight = make_flight(store, tables, keep=1)
    stalls, whole_saves = [], []
    for step in range(1, 11):
        began = time.monotonic()
        flight.start(step, None, lambda _: {"state.json": b"{}"})
        if step % 2:
            assert flight.wait().error is None
            whole_saves.append(time.monotonic() - began)
        else:
            time.sleep(0.3)  # as long as this model's gradients take at the least
            flight.release()
            while (outcome := flight.poll([flight.report()])) is None:
                time.sleep(0.01)
            stalls.append(outcome.stall_s)
    assert min(stalls) <= min(whole_saves) / 10, (stalls, whole_saves)
