"""Saves in flight: failures anywhere are seen by all at the next step, and the next save works."""

import errno
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import cut, empty_like, files_of, in_threads, make_flight, publish, same, whole
from ranks import run_ranks

from summerlm.checkpoint import writing
from summerlm.checkpoint.manifest import verify
from summerlm.checkpoint.snapshot import is_finite
from summerlm.checkpoint.store import Retention, Store
from summerlm.core.errors import NoCheckpointError
from summerlm.core.failpoints import POINTS, VARIABLE
from summerlm.train.saving import resume


def begin(flight, step, ranks):
    flight.start(step, None, lambda values: files_of(step))


def steps_until(flight, ranks, steps=200):
    """Poll as a loop does, a step at a time; gives the outcome and how many steps it took."""
    for count in range(1, steps):
        outcome = flight.poll(ranks.exchange(flight.report()))
        if outcome is not None:
            return outcome, count
        time.sleep(0.005)
    raise AssertionError("no outcome")


def settle(flight, ranks):
    while flight.step is not None:
        assert flight.poll(ranks.exchange(flight.report())) is None
        time.sleep(0.005)


def listed(store):
    return sorted(os.listdir(store.folder))


def test_a_save_returns_at_once_and_is_announced_when_it_is_there(tmp_path, monkeypatch):
    store = Store(tmp_path / "c", print)
    gate = threading.Event()
    write = writing.write_file

    def slowly(*args):
        gate.wait(10)
        return write(*args)

    monkeypatch.setattr(writing, "write_file", slowly)
    flight = make_flight(store, cut(whole(3)))
    flight.start(3, None, lambda _: files_of(3))
    for _ in range(5):
        assert flight.poll([flight.report()]) is None
        assert flight.step == 3
        assert store.steps() == []
    gate.set()
    while (outcome := flight.poll([flight.report()])) is None:
        assert flight.step == 3
    assert (outcome.step, outcome.error, flight.step) == (3, None, None)
    assert store.steps() == [3]
    sizes = sum(path.stat().st_size for path in store.path(3).iterdir())
    assert outcome.bytes == sizes - (store.path(3) / "MANIFEST.json").stat().st_size
    assert 0 < outcome.stall_s < outcome.seconds
    assert flight.poll([None]) is None
    assert flight.wait() is None


def test_an_update_waits_for_the_copy_and_the_wait_is_counted(tmp_path, monkeypatch):
    store, tables = Store(tmp_path / "c", print), cut(whole(3))
    gate, take = threading.Event(), writing.Snapshot.take
    monkeypatch.setattr(writing.Snapshot, "take", lambda self: (gate.wait(10), take(self)))
    flight = make_flight(store, tables)
    flight.release()  # nothing is in flight
    flight.start(3, None, lambda _: files_of(3))
    threading.Timer(0.3, gate.set).start()
    flight.release()
    assert gate.is_set()
    for table in tables.values():
        for part in table.values():
            part.tensor.zero_()
    while (outcome := flight.poll([flight.report()])) is None:
        flight.release()  # and does not wait again
    assert 0.25 < outcome.stall_s < 5
    found = empty_like(tables)
    resume(store, found)
    assert same(found, cut(whole(3)))


def test_a_copy_that_fails_lets_the_update_go_on(tmp_path, monkeypatch):
    def take(_):
        raise MemoryError("no room")

    flight = make_flight(Store(tmp_path / "c", print), cut(whole(3)))
    with monkeypatch.context() as patch:
        patch.setattr(writing.Snapshot, "take", take)
        flight.start(3, None, lambda _: files_of(3))
        flight.release()
        assert "no room" in flight.wait().error
    flight.start(4, None, lambda _: files_of(4))
    assert flight.wait().error is None


# points that a thread reaches, so that what is raised there is the disk's and not the loop's
THERE = ("publish.parent_synced", "publish.done")  # what comes after publishing can't fail a save
IN_THREADS = [p for p in POINTS if p.startswith(("write.", "publish.")) and p not in THERE]


def fail_and_go_on(ranks, folder, rank):
    """Save at every point in turn, failing there on a rank, then once more; gives what was said."""
    store = Store(folder, print)
    flight = make_flight(store, cut(whole(1), ranks.rank, ranks.world), ranks)
    said = {}
    for number, point in enumerate(points_of(rank), 1):
        os.environ[VARIABLE] = f"{point}@{rank}:enospc"
        begin(flight, 2 * number, ranks)
        failed, _ = steps_until(flight, ranks)
        settle(flight, ranks)
        os.environ[VARIABLE] = ""
        left = ranks.exchange(listed(store) if ranks.leads else None)[0]
        begin(flight, 2 * number + 1, ranks)
        again, _ = steps_until(flight, ranks)
        said[point] = (failed.error, left[number - 1 :], again.error)
    return said


def points_of(rank):
    return [p for p in IN_THREADS if rank == 0 or p.startswith("write.")]


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_drops_one_save_on_all_ranks(tmp_path, rank):
    store = Store(tmp_path / "c", print)
    said, other = run_ranks(fail_and_go_on, store.folder, rank)
    assert said == other
    assert list(said) == points_of(rank)
    for point, (failed, left, again) in said.items():
        assert f"can't be saved on rank {rank}: " in failed, point
        assert "No space left" in failed
        assert again is None
        assert left == [], point
    for step in store.steps():
        verify(store.path(step))
    assert store.steps() == [2 * n + 1 for n in range(1, len(said) + 1)]


def refuse_parents(monkeypatch, store, error=errno.EIO):
    """Let the disk refuse to sync the folder of checkpoints, once it holds a published step."""
    sync = os.fsync

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path == str(store.folder) and store.steps():
            raise OSError(error, os.strerror(error))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_rename_that_is_not_synced_is_taken_back(tmp_path, monkeypatch):
    store = Store(tmp_path / "c", print)
    with monkeypatch.context() as patch:
        refuse_parents(patch, store)
        with pytest.raises(Exception, match="Input/output error"):
            publish(store, 1)
    assert listed(store) == []
    publish(store, 1)
    verify(store.path(1))


@pytest.mark.parametrize("number", range(1, 12))
def test_an_fsync_that_fails_is_a_failed_save_and_no_more(tmp_path, monkeypatch, number):
    """Each fsync of a save in turn fails; nothing is announced, nothing is left, the next works."""
    store = Store(tmp_path / "c", print)
    flight = make_flight(store, cut(whole(1)))
    sync, count = os.fsync, 0

    def fsync(handle):
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.EIO, "Input/output error")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        flight.start(1, None, lambda _: files_of(1))
        outcome = flight.wait()
    if count < number:
        assert outcome.error is None
        assert count == 8  # 2 files of tensors, 2 others, the manifest, 3 folders
        return
    assert "Input/output error" in outcome.error
    assert listed(store) == []
    flight.start(1, None, lambda _: files_of(1))
    assert flight.wait().error is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("stem", "name"), [("model", "d.half"), ("optimizer", "a.weight/m")])
def test_what_is_not_finite_is_not_saved(tmp_path, value, stem, name):
    store = Store(tmp_path / "c", print)
    tables = cut(whole(1))
    flight = make_flight(store, tables)
    good = tables[stem][name].tensor[-1, -1].item()
    tables[stem][name].tensor[-1, -1] = value
    flight.start(1, None, lambda _: files_of(1))
    outcome = flight.wait()
    assert f"{stem} tensor {name} holds a value that is not finite" in outcome.error
    assert listed(store) == []
    tables[stem][name].tensor[-1, -1] = good
    flight.start(2, None, lambda _: files_of(2))
    assert flight.wait().error is None


def test_a_bug_in_the_thread_is_no_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_header", lambda *_: 1 / 0)
    flight = make_flight(Store(tmp_path / "c", print), cut(whole(1)))
    flight.start(1, None, lambda _: files_of(1))
    with pytest.raises(ZeroDivisionError):
        flight.wait()


def test_a_process_that_has_to_end_gives_up_between_two_chunks(tmp_path, monkeypatch):
    store = Store(tmp_path / "c", print)
    monkeypatch.setattr("summerlm.checkpoint.tensors.CHUNK", 64)
    tables = cut({"model": {"w": torch.zeros(1 << 20)}, "optimizer": {}})
    flight = make_flight(store, tables)
    flight.start(1, None, lambda _: files_of(1))
    began = time.monotonic()
    flight.close()
    assert time.monotonic() - began < 0.5  # whole, it takes longer: 65,536 chunks
    assert listed(store) == []


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"x")])
def test_a_file_that_was_lost_since_it_was_written_is_not_published(tmp_path, monkeypatch, harm):
    """What a rank wrote elsewhere must be what the leading rank finds."""
    store = Store(tmp_path / "c", print)
    flight = make_flight(store, cut(whole(1)))

    def reach(name):
        if name == "publish.begun":
            harm(next(store.folder.glob("tmp-*/model-*")))

    monkeypatch.setattr(writing, "reach", reach)
    flight.start(1, None, lambda _: files_of(1))
    assert "model-00000-of-00001.safetensors" in flight.wait().error
    assert listed(store) == []


def test_stale_reports_are_not_taken_for_news(tmp_path, monkeypatch):
    store = Store(tmp_path / "c", print)
    flight = make_flight(store, cut(whole(1)))
    flight.start(1, None, lambda _: files_of(1))
    while (old := flight.report()) is None:
        time.sleep(0.001)
    assert flight.wait().error is None
    asked = threading.Event()  # of the second save nothing is written before the old report came
    monkeypatch.setattr(writing, "reach", lambda name: name != "write.drafted" or asked.wait(9))
    flight.start(2, None, lambda _: files_of(2))
    assert flight.poll([old]) is None
    time.sleep(0.05)
    asked.set()
    outcome = flight.wait()
    assert (outcome.step, outcome.error) == (2, None)
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("place", [0, 31_999, 32_000, 99_999])
def test_every_value_of_a_large_tensor_is_looked_at(place):
    tensor = torch.full((100_000,), 3e38)
    assert is_finite(tensor)
    tensor[place] = float("nan")
    assert not is_finite(tensor)


def test_a_really_full_disk(tmp_path):
    """A limit on the size of files is met at any of them; the run goes on and saves later."""
    store = Store(tmp_path / "c", print)
    flight = make_flight(store, cut(whole(1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 10, 500, 3000, 5200):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            flight.start(1, None, lambda _: files_of(1))
            outcome = flight.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert "File too large" in outcome.error
            assert listed(store) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    flight.start(1, None, lambda _: files_of(1))
    assert flight.wait().error is None


def on_small_disk(ranks, folder):
    store = Store(folder / "c", print)
    tables = cut({"model": {"w": torch.randn(150_000)}, "optimizer": {}}, ranks.rank, ranks.world)
    flight = make_flight(store, tables, ranks)
    said = []
    for step in range(1, 6):
        begin(flight, step, ranks)
        said.append(flight.wait().error)
    return said


@pytest.mark.ranks
def test_a_small_disk_fills_up_and_training_goes_on(tmp_path):
    """600 KB a save on 2 MB: three fit, later ones fail on some rank and leave nothing half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m none {disk} 2>/dev/null"):
        pytest.skip("no tmpfs can be mounted here: it takes root")
    try:
        said, other = run_ranks(on_small_disk, disk)
        assert said == other
        assert [error is None for error in said] == [True, True, True, False, False]
        assert "No space left" in said[3]
        assert listed(Store(disk / "c", print)) == [f"step-0000000{n}" for n in (1, 2, 3)]
        store = Store(disk / "c", print)
        for step in store.steps():
            verify(store.path(step))
        assert store.prune(Retention(1)) == []
        assert run_ranks(on_small_disk_again, disk) == [None, None]
    finally:
        os.system(f"umount {disk}")


def on_small_disk_again(ranks, folder):
    tables = cut({"model": {"w": torch.randn(150_000)}, "optimizer": {}}, ranks.rank, ranks.world)
    flight = make_flight(Store(folder / "c", print), tables, ranks)
    begin(flight, 9, ranks)
    return flight.wait().error


def write_with_slow_rank(ranks, folder):
    if ranks.rank == 1:
        write = writing.write_file
        writing.write_file = lambda *args: (time.sleep(0.3), write(*args))[1]
    flight = make_flight(Store(folder, print), cut(whole(1), ranks.rank, 2), ranks)
    begin(flight, 1, ranks)
    early = flight.poll(ranks.exchange(flight.report()))
    outcome, steps = steps_until(flight, ranks)
    return early, outcome.error, steps > 10, outcome.seconds > 0.5


@pytest.mark.ranks
def test_a_slow_rank_is_waited_for_by_no_step(tmp_path):
    assert run_ranks(write_with_slow_rank, tmp_path / "c") == [(None, None, True, True)] * 2


def test_ranks_agree_on_what_they_load_and_what_is_set_aside(tmp_path):
    """NaN under valid hashes in one rank's rows: set aside by all, the one before taken by all."""
    lines = []
    store = Store(tmp_path / "c", lines.append)
    tables = cut(whole(1))
    publish(store, 1, tables)
    original = writing.Snapshot.check_finite
    writing.Snapshot.check_finite = lambda self: None
    try:
        tables["model"]["a.weight"].tensor[-1, 0] = float("nan")  # rank 1's rows only
        publish(store, 2, tables)
    finally:
        writing.Snapshot.check_finite = original
    verify(store.path(2))

    def load(ranks):
        found = empty_like(cut(whole(1), ranks.rank, 2))
        folder, state = resume(Store(store.folder, lines.append), found, ranks)
        return folder.name, state["step"], same(found, cut(whole(1), ranks.rank, 2))

    assert in_threads(2, load) == [("step-00000001", 1, True)] * 2
    assert len(lines) == 1
    assert "a.weight holds a value that is not finite; set aside" in lines[0]
    assert store.steps() == [1]


def swap(one, other):
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGE = {
    "swapped": lambda f: swap(f / "model-00000-of-00003.safetensors", f / "state.json"),
    "swapped between ranks": lambda f: swap(
        f / "model-00000-of-00003.safetensors", f / "model-00001-of-00003.safetensors"
    ),
    "missing": lambda f: (f / "optimizer-00002-of-00003.safetensors").unlink(),
    "extra": lambda f: shutil.copy(f / "state.json", f / "model-00003-of-00003.safetensors"),
    "another step's": lambda f: shutil.copy(
        f.parent / "step-00000001" / "model-00002-of-00003.safetensors", f
    ),
}


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_in_any_rank_s_file_is_found_by_whoever_reads_it(tmp_path, damage, readers):
    store = Store(tmp_path / "c", pytest.fail)
    for step in (1, 2):
        in_threads(3, lambda r, s=step: publish(store, s, cut(whole(s), r.rank, 3), r))
    DAMAGE[damage](store.path(2))
    lines = []

    def load(ranks):
        shards = ranks.world
        found = empty_like(cut(whole(1), ranks.rank, shards))
        folder, _ = resume(Store(store.folder, lines.append), found, ranks)
        return folder.name, same(found, cut(whole(1), ranks.rank, shards))

    assert in_threads(readers, load) == [("step-00000001", True)] * readers
    assert len(lines) == 1
    assert store.steps() == [1]


def test_all_damaged_stops_all_ranks_and_moves_nothing(tmp_path):
    store = Store(tmp_path / "c", pytest.fail)
    for step in (1, 2):
        in_threads(2, lambda r, s=step: publish(store, s, cut(whole(s), r.rank, 2), r))
    (store.path(1) / "model-00001-of-00002.safetensors").write_bytes(b"x")
    (store.path(2) / "MANIFEST.json").write_bytes(b"{}\nx\n")
    before = sorted(str(path) for path in store.folder.rglob("*"))

    def load(ranks):
        with pytest.raises(NoCheckpointError, match="every checkpoint is damaged") as error:
            resume(Store(store.folder, pytest.fail), empty_like(cut(whole(1))), ranks)
        return str(error.value)

    said = in_threads(2, load)
    assert said[0] == said[1]
    assert sorted(str(path) for path in store.folder.rglob("*")) == before
