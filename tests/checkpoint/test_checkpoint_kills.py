"""Kills and power losses at every line of the publishing protocol, on every rank."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import cut, empty_like, files_of, in_threads, make_flight, publish, same, whole
from ranks import run_ranks

from summerlm.checkpoint.manifest import verify
from summerlm.checkpoint.store import Retention, Store
from summerlm.core import failpoints
from summerlm.core.errors import UsageError
from summerlm.core.failpoints import POINTS, VARIABLE, reach
from summerlm.train.saving import resume

LEADING = [p for p in POINTS if p.startswith(("publish.", "prune."))]
EVERYWHERE = [p for p in POINTS if p.startswith(("save.", "write."))]

FEW = ("save.copied", "write.begun", "write.done", "save.announced")


def go_on(store, ranks, shards):
    """Resume as a run does; gives the step, having compared every bit on this rank."""
    store.clear_drafts() if ranks.leads else None
    tables = empty_like(cut(whole(0), ranks.rank % shards, shards))
    found = resume(store, tables, ranks)
    if found is None:
        return 0, tables
    step = found[1]["step"]
    assert same(tables, cut(whole(step), ranks.rank % shards, shards))
    return step, tables


def save_until_killed(ranks, folder, shards, wish, until, announcements):
    """Resume, then save step after step; at the second save here the failpoint is armed."""
    store = Store(folder, print)
    step, tables = go_on(store, ranks, shards)
    ranks.exchange(None)
    flight = make_flight(store, tables, ranks, keep=1)
    first = step + 1
    while step < until:
        step += 1
        for stem, table in cut(whole(step), ranks.rank % shards, shards).items():
            for name, part in table.items():
                tables[stem][name].tensor.copy_(part.tensor)
        os.environ[VARIABLE] = wish if step == first + 1 else ""
        flight.start(step, None, lambda _, s=step: files_of(s))
        while flight.step is not None:
            outcome = flight.poll(ranks.exchange(flight.report()))
        assert outcome.error is None
        if ranks.leads:
            with announcements.open("a") as file:
                file.write(f"{step}\n")
    return step


def check(folder, announcements, shards, world):
    """What was announced is there, whole; what is there beyond it, too."""
    announced = max((int(line) for line in announcements.read_text().split()), default=0)
    store = Store(folder, pytest.fail)
    steps = {step for step, _ in in_threads(world, lambda r: go_on(store, r, shards))}
    assert len(steps) == 1
    assert steps.pop() >= announced
    assert all(name.startswith("step-") for name in os.listdir(folder))
    for step in store.steps():
        verify(store.path(step))
    return announced


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("point", "rank"),
    [
        *((p, 0) for p in LEADING),
        *(
            pytest.param(p, rank, marks=() if p in FEW else pytest.mark.slow)
            for rank in (0, 1)
            for p in EVERYWHERE
        ),
    ],
)
def test_a_kill_at_any_line_loses_no_announced_step(tmp_path, point, rank):
    folder, announcements = tmp_path / "c", tmp_path / "announced"
    announcements.touch()
    wish = f"{point}@{rank}:kill"
    with pytest.raises(AssertionError) as lost:
        run_ranks(save_until_killed, folder, 2, wish, 5, announcements)
    assert "AssertionError" not in str(lost.value)  # of a rank: only the kill ended them
    assert check(folder, announcements, 1, 1) >= 1


@pytest.mark.ranks
@pytest.mark.slow
def test_kills_on_four_ranks_at_lines_drawn_at_random(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    folder, announcements = tmp_path / "c", tmp_path / "announced"
    announcements.touch()
    for _ in range(20):
        world = draw.choice([1, 2, 4])
        shards = draw.choice([s for s in (1, 2, 4) if world % s == 0])
        rank = draw.randrange(world)
        point = draw.choice(EVERYWHERE + (LEADING if rank == 0 else []))
        wish = f"{point}@{rank}:kill"
        with pytest.raises(AssertionError) as lost:
            run_ranks(save_until_killed, folder, shards, wish, 10**6, announcements, world=world)
        assert "AssertionError" not in str(lost.value)
        check(folder, announcements, shards, world)
    assert int(announcements.read_text().split()[-1]) >= 20


class Disk:
    """What a disk is sure to hold: bytes of files that were synced, names of folders that were.

    Watches fsync and rename; after a power loss only that is there. A rename whose parent was not
    synced may or may not be there.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.bytes, self.names, self.events = root, {}, {}, []
        sync, rename = os.fsync, os.rename

        def fsync(handle):
            sync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.events.append(("fsync", path))
            if path.is_dir():
                self.names[path] = {entry.name for entry in path.iterdir()}
            else:
                self.bytes[path] = path.read_bytes()

        def renamed(old, new, **_):
            rename(old, new)
            self.events.append(("rename", Path(new)))
            for table in (self.bytes, self.names):
                for path in [p for p in table if p.is_relative_to(old)]:
                    table[Path(new) / path.relative_to(old)] = table.pop(path)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", renamed)

    def after_power_loss(self, into):
        """Lay out what is sure to be left."""
        for path, data in self.bytes.items():
            inside = path.relative_to(self.root)
            folders = [self.root / parent for parent in inside.parents][::-1]
            known = (
                child.name in self.names.get(folder, ())
                for folder, child in zip(folders, [*folders[1:], path], strict=True)
            )
            if all(known):
                target = into / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)


def test_power_may_go_whenever_it_likes(tmp_path, monkeypatch):
    """At the moment of every announcement the step is among what a power loss leaves."""
    root = tmp_path / "run"
    root.mkdir()
    store = Store(root / "checkpoints", print)
    disk = Disk(root, monkeypatch)
    for step in (1, 2, 3):
        publish(store, step, keep=2)
        left = tmp_path / f"left-{step}"
        disk.after_power_loss(left)
        found = Store(left / "checkpoints", pytest.fail).latest()
        assert found.name == f"step-{step:08d}"
    kinds = [(kind, path.name) for kind, path in disk.events if "step-00000003" in str(path)]
    assert kinds == [("rename", "step-00000003")]
    last = disk.events.index(("rename", store.path(3)))
    before = [path for kind, path in disk.events[:last] if kind == "fsync"]
    assert before[-1].name.startswith("tmp-00000003-")  # the draft's names, after all its files
    assert before[-2].name == "checkpoints" or before[-2].name == "run"
    assert [p.name for p in before[-7:-2]][-1] == "MANIFEST.json"
    assert disk.events[last + 1] == ("fsync", store.folder)


HOOK = """
import sys
import torch, torch.distributed, safetensors, pyarrow.parquet
sys.path[:0] = sys.argv[2:]
from checkpoints import *
import summerlm
from summerlm.checkpoint.load import load, newest_good
from summerlm.checkpoint.reading import read_tensors
from summerlm.recipes.checkpoints import list_checkpoints, verify_checkpoints
from summerlm.train.saving import resume
from pathlib import Path
seen = []
armed = True
def hook(event, args):
    if armed and (event.startswith("pickle") or event in ("marshal.loads", "shelve.open")):
        seen.append((event, args))
sys.addaudithook(hook)
import pickle, collections
pickle.loads(pickle.dumps(collections.OrderedDict))
assert seen, "the hook hears"
seen.clear()
run = Path(sys.argv[1])
summerlm.load(run)
load(run, torch.device("cpu"))
folder = newest_good(run)
for stem in ("model", "optimizer"):
    parts = {n: Part.whole(t) for n, t in read_tensors(folder, stem).items()}
store = Store(run / "checkpoints", print)
assert store.newest_state() is not None
tables = {s: {n: Part.whole(t) for n, t in read_tensors(folder, s).items()}
          for s in ("model", "optimizer")}
assert resume(store, tables)[0] == folder
list_checkpoints(run)
assert verify_checkpoints(run)["exit_code"] == 0
armed = False
print(seen)
"""


def test_no_load_path_unpickles_anything(tiny_config, tmp_path):
    """An audit hook hears every class that a pickle would find, on every way of loading."""
    from rich.console import Console

    from summerlm.core.config import read_settings
    from summerlm.recipes.pretrain import pretrain
    from summerlm.recipes.settings import Settings

    overrides = [f"run.folder={tmp_path / 'run'}", "train.budget_tokens=1024"]
    pretrain(read_settings(Settings, tiny_config, overrides), Console(quiet=True))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", HOOK, str(tmp_path / "run"), str(here), str(here.parent)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def audited(ranks, folder):
    heard = []

    def hook(event, args):
        if event == "pickle.find_class":
            heard.append(args)

    sys.addaudithook(hook)
    tables = empty_like(cut(whole(1), ranks.rank, ranks.world))
    resume(Store(folder, print), tables, ranks)
    return heard, same(tables, cut(whole(1), ranks.rank, ranks.world))


@pytest.mark.ranks
def test_ranks_that_resume_tell_each_other_plain_values(tmp_path):
    publish(Store(tmp_path / "c", print), 1)
    assert run_ranks(audited, tmp_path / "c") == [([], True)] * 2


def test_a_kill_while_deleting_leaves_the_good_ones(tmp_path, monkeypatch):
    """Each removal of a deletion in turn is the last thing that happens."""
    source = Store(tmp_path / "source", print)
    for step in (1, 2, 3):
        publish(source, step)

    class KilledError(BaseException):
        pass

    for keep in (1, 2):
        for number in range(1, 40):
            folder = tmp_path / f"{keep}-{number}"
            shutil.copytree(source.folder, folder)
            store = Store(folder, pytest.fail)
            (folder / "tmp-00000004-abc").mkdir()
            left = number

            with monkeypatch.context() as patch:
                for name in ("unlink", "rmdir", "rename"):
                    act = getattr(os, name)

                    def counted(*args, act=act, **kwargs):
                        nonlocal left
                        left -= 1
                        if left == 0:
                            raise KilledError
                        return act(*args, **kwargs)

                    patch.setattr(os, name, counted)
                try:
                    store.prune(Retention(keep))
                    finished = True
                except KilledError:
                    finished = False
            fresh = Store(folder, pytest.fail)
            assert fresh.latest().name == "step-00000003"
            assert len(fresh.steps()) >= keep
            fresh.clear_drafts()
            assert all(name.startswith("step-") for name in os.listdir(folder))
            for step in fresh.steps():
                verify(fresh.path(step))
            if finished:
                break
        assert 5 < number < 39
        assert fresh.steps() == [1, 2, 3][-keep:]


def test_a_kill_while_branching_off_leaves_no_gap(tmp_path, monkeypatch):
    """Whatever is moved already, the newest left is one that the run has come by."""
    store = Store(tmp_path / "c", print)
    for step in (1, 2, 3, 4):
        publish(store, step)
    monkeypatch.setattr(failpoints, "_reached", {})
    for left in ([1, 2, 3], [1, 2], [1]):
        monkeypatch.setenv(VARIABLE, "branch.moved:raise")
        with pytest.raises(RuntimeError, match=r"branch\.moved"):
            store.branch_off(1)
        assert store.steps() == left
    monkeypatch.delenv(VARIABLE)
    assert store.branch_off(1) is None


def test_a_failpoint_is_reached_by_its_rank_at_its_time(monkeypatch):
    monkeypatch.setattr(failpoints, "_reached", {})
    monkeypatch.setenv("RANK", "1")
    reach("write.done")
    monkeypatch.setenv(VARIABLE, "write.done@0:raise")
    reach("write.done")
    monkeypatch.setenv(VARIABLE, "write.done@1#2:raise")
    reach("write.begun")
    reach("write.done")
    with pytest.raises(RuntimeError, match=r"failpoint write\.done"):
        reach("write.done")
    reach("write.done")
    monkeypatch.setenv(VARIABLE, "write.done:enospc")
    with pytest.raises(OSError, match="No space left"):
        reach("write.done")
    for wrong in ("write.dune:kill", "write.done:explode", "write.done", "write.done@x:kill"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(UsageError, match="SUMMERLM_FAILPOINT="):
            reach("save.asked")
    with pytest.raises(AssertionError):
        reach("no.such.point")


def test_every_failpoint_is_reached_somewhere():
    code = "".join(p.read_text() for p in Path(failpoints.__file__).parents[1].rglob("*.py"))
    reached = {name for name in POINTS if f'reach("{name}")' in code}
    assert reached == set(POINTS)


def test_files_that_are_no_tensors_are_named(tmp_path):
    """A crafted header is refused before anything is allocated for it."""
    import hashlib

    from summerlm.checkpoint.manifest import DamagedError
    from summerlm.checkpoint.reading import read_tensors

    path = publish(Store(tmp_path / "c", print), 1)
    name = "model-00000-of-00001.safetensors"
    pickled = (
        b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    )
    overlap = json.dumps(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")}
    ).encode()
    crafted = [b"", b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}", pickled]
    crafted += [len(overlap).to_bytes(8, "little") + overlap + b"\0" * 4]
    body, _ = (path / "MANIFEST.json").read_bytes().split(b"\n", 1)
    for data in crafted:
        (path / name).write_bytes(data)
        manifest = json.loads(body)
        manifest["files"][name] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        text = json.dumps(manifest).encode()
        digest = hashlib.sha256(text).hexdigest().encode()
        (path / "MANIFEST.json").write_bytes(text + b"\n" + digest + b"\n")
        verify(path)  # whoever crafts a file can craft a manifest
        with pytest.raises(DamagedError, match=r"model-00000-of-00001\.safetensors"):
            read_tensors(path, "model")
