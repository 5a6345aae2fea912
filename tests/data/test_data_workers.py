"""Worker processes that fail, die, are signalled or outlive the trainer."""

import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from data_streams import READING, assert_same, make_loader, make_order, make_source, take

from summerlm.core.errors import DataChangedError, SourceDownError, SummerError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


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


@pytest.mark.timeout(60)
def test_workers_do_not_wait_for_what_threads_hold_here():
    expected = take(make_loader(), 3)
    torch.randn(400, 400) @ torch.randn(400, 400)  # starts the pool of threads
    with READING:  # a forked worker would have it locked for ever
        loader = make_loader(workers=2)
        try:
            assert_same(take(loader, 3), expected)
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
def test_closing_waits_for_no_lock_that_a_worker_died_with():
    """Seen once in a hundred closings: killed while it asked whether to go on, it held the lock."""
    loader = make_loader(workers=1)
    next(loader)
    assert loader._parts._workers_done_event._cond.acquire(timeout=10)  # as the dead one would
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()


def test_loaders_may_follow_one_another():
    """Torch keeps a table of workers by the address of what it made, which comes again."""
    for _ in range(20):
        loader = make_loader(workers=1)
        next(loader)
        loader.close()


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
