"""Crash-consistency of checkpoints: real kills, real damage, a really full disk."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from summerlm.checkpoint.state import restore
from summerlm.checkpoint.store import (
    Contents,
    DamagedError,
    Store,
    read_tensors,
    verify,
)
from summerlm.core.errors import NoCheckpointError, SaveError


def contents(step: int) -> Contents:
    draw = torch.Generator().manual_seed(step)
    table = {"a.weight": torch.randn(40, 30, generator=draw), "scalar": torch.tensor(float(step))}
    return Contents(
        tensors={"model": table, "optimizer": {"a.weight/m": torch.ones(40, 30)}},
        values={"state": {"step": step}},
        files={"config.toml": b"[model]\n"},
    )


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def store(tmp_path, warnings):
    return Store(tmp_path / "checkpoints", warnings.append)


def test_publish_and_read_back_bit_for_bit(store):
    path = store.publish(7, contents(7))
    assert path.name == "step-00000007"
    assert verify(path)["step"] == 7
    found = read_tensors(path / "model.safetensors")
    for name, tensor in contents(7).tensors["model"].items():
        assert torch.equal(found[name], tensor)
    assert json.loads((path / "state.json").read_bytes()) == {"step": 7}
    assert sorted(os.listdir(store.folder)) == ["step-00000007"]


def test_a_step_is_never_overwritten(store):
    store.publish(1, contents(1))
    before = {p.name: p.read_bytes() for p in store.path(1).iterdir()}
    with pytest.raises(SaveError, match="already exists"):
        store.publish(1, contents(2))
    assert {p.name: p.read_bytes() for p in store.path(1).iterdir()} == before


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.toml", "MANIFEST.json"]


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
        store.publish(step, contents(step))
    if damage is swap_step and name in ("config.toml", "optimizer.safetensors"):
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
    path = store.publish(1, contents(1))
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
    path = store.publish(1, contents(1))
    (path / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"extra\.safetensors"):
        verify(path)


def test_all_damaged_stops_and_deletes_nothing(store, warnings):
    for step in (1, 2):
        store.publish(step, contents(step))
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
        store.publish(step, contents(step))
    (store.path(5) / "state.json").unlink()
    fresh = Store(store.folder, warnings.append)
    fresh.prune(keep_last=2, keep_steps={1})
    assert fresh.steps() == [1, 3, 4, 5]  # the damaged one is neither counted nor deleted
    assert "state.json" in warnings[0]


def test_branching_moves_later_steps_away(store, warnings):
    for step in (2, 4, 6):
        store.publish(step, contents(step))
    store.branch_off(3)
    assert store.steps() == [2]
    (branch,) = [p for p in store.folder.iterdir() if p.name.startswith("branch-")]
    assert sorted(os.listdir(branch)) == ["step-00000004", "step-00000006"]
    store.branch_off(3)
    assert len(warnings) == 1


def test_a_full_disk_leaves_the_former_and_no_draft(store):
    store.publish(1, contents(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(SaveError, match="step-00000002: can't be saved"):
            store.publish(2, contents(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert os.listdir(store.folder) == ["step-00000001"]
    assert store.latest() == store.path(1)
    store.publish(2, contents(2))
    assert store.latest() == store.path(2)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint_store import contents
from summerlm.checkpoint.store import Store
store = Store(Path(sys.argv[1]), print)
store.clear_drafts()
found = store.latest()
step = int(found.name[5:]) if found else 0
print("start", step, flush=True)
while True:
    step += 1
    store.publish(step, contents(step))
    print(step, flush=True)
    store.prune(2)
"""


def test_kills_at_random_moments_never_lose_an_announced_step(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    folder = tmp_path / "checkpoints"
    announced = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        line = process.stdout.readline()
        assert line.startswith("start")
        assert int(line.split()[1]) >= announced
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        announced = max([announced, *(int(number) for number in lines)])
        store = Store(folder, lambda line: pytest.fail(line))
        found = store.latest()
        step = int(found.name[5:]) if found else 0
        assert step >= announced
        if found:
            model = read_tensors(found / "model.safetensors")
            assert torch.equal(model["a.weight"], contents(step).tensors["model"]["a.weight"])
    assert announced > 0
    store.clear_drafts()
    assert all(name.startswith("step-") for name in os.listdir(folder))


def table(**changes: Tensor) -> dict[str, Tensor]:
    return {"a": torch.zeros(2, 3), "b": torch.zeros(()), **changes}


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"a": torch.ones(2, 3)}, "has no tensor b"),
        (table(c=torch.ones(1)), "tensor c is not part"),
        (table(a=torch.ones(3, 2)), r"tensor a is \(3, 2\)"),
        (table(a=torch.ones(2, 3, dtype=torch.float64)), "float64"),
        (table(a=torch.tensor([[0, 1, 2], [0, float("nan"), 0]])), "not finite"),
        (table(b=torch.tensor(float("inf"))), "tensor b .* not finite"),
    ],
)
def test_restore_refuses_what_does_not_fit_and_copies_nothing(saved, words, tmp_path):
    into = table()
    with pytest.raises(DamagedError, match=words) as error:
        restore(into, saved, tmp_path / "model.safetensors")
    assert "model.safetensors" in str(error.value)
    assert all(not tensor.any() for tensor in into.values())


def test_restore_copies_in_place():
    into = table()
    restore(into, table(a=torch.ones(2, 3)), Path("x"))
    assert into["a"].eq(1).all()


def test_files_that_are_no_tensors_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    for data in (b"", b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            read_tensors(path)
