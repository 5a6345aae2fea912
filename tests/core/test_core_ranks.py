import os
import pickle
import re
import signal
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from jobs import Job

from summerlm.core import liveness
from summerlm.core.errors import PeerLostError, SourceDownError, UsageError
from summerlm.core.roster import meet, process_state
from summerlm.core.runtime import die_with_launcher
from summerlm.core.signs import Sign, blame

pytestmark = pytest.mark.ranks
HANG_S = 1.5  # parallel.timeout_s of jobs that are to hang


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(liveness, "GRACE_S", 1.0)


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def steps(ranks, count):
    for step in range(1, count + 1):
        ranks.phase("data", step)
        ranks.phase("exchange", step)
        assert ranks.exchange(step) == [step] * ranks.world
        ranks.phase("step", step)
        total = ranks.sum(torch.tensor([float(ranks.rank)]))
        assert total.item() == sum(range(ranks.world))
    say("done", ranks.rank)


@pytest.mark.parametrize("world", [2, 3])
def test_a_job_that_goes_well_says_nothing(tmp_path, world):
    with Job(tmp_path, steps, 3, world=world) as job:
        codes, words, _ = job.end()
    assert codes == [0] * world
    assert sorted(words.split("\n")) == sorted(["", *(f"done {r}" for r in range(world))])


def test_starts_of_one_launcher_share_a_store_and_nothing_in_it(tmp_path):
    """Also where its count of restarts stays, as on machines that join a restart of another's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with Job(tmp_path, raises_down, store=store) as job:
        assert job.end()[0] == [5, 5]
    for world in (2, 3, 2):
        with Job(tmp_path, steps, 2, world=world, store=store) as job:
            assert job.end()[0] == [0] * world


def lingers(ranks):
    processes = ranks.exchange(os.getpid())
    if ranks.rank == 0:
        time.sleep(0.5)
        say("alive", os.path.exists(f"/proc/{processes[1]}/exe"))


def test_no_rank_ends_before_all_are_done(tmp_path):
    """A launcher takes a rank that ended with 75 for a failure, and ends the others."""
    with Job(tmp_path, lingers) as job:
        assert job.end()[:2] == ([0, 0], "alive True\n")


def test_a_process_number_that_was_given_out_again_is_another_process():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _, (me,) = meet(store, 0, 1, 5)
    assert process_state(me, me) == "R"
    assert process_state(replace(me, started=me.started + 1), me) == ""
    assert process_state(replace(me, space="another machine"), me) is None


# failures of one rank


def raises_down(ranks):
    steps(ranks, 2)
    if ranks.rank == ranks.world - 1:
        raise SourceDownError("the source is down")
    ranks.exchange("on")


def test_an_error_of_one_rank_ends_all_with_its_code_and_is_said_once(tmp_path):
    with Job(tmp_path, raises_down, world=3) as job:
        codes, words, seconds = job.end()
    assert codes == [5, 5, 5]
    assert words.count("error: the source is down") == 1
    assert words.count("error") == 1
    assert "Traceback" not in words
    assert seconds < 15


def raises_bug(ranks):
    if ranks.rank == 0:
        raise ValueError("a bug of ours")
    time.sleep(60)


def test_a_bug_of_one_rank_ends_all_with_one_traceback(tmp_path):
    with Job(tmp_path, raises_bug) as job:
        codes, words, seconds = job.end()
    assert codes == [1, 1]
    assert words.count("Traceback") == 1
    assert words.count("ValueError: a bug of ours") == 1
    assert seconds < 15


def raises_before_the_job(tmp_path):
    raise UsageError("no such setting")


def test_what_all_ranks_meet_before_they_join_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.join", lambda *_: raises_before_the_job(tmp_path))
    with Job(tmp_path, steps, 1, world=3) as job:
        codes, words, _ = job.end()
    assert codes == [2, 2, 2]
    assert words == "error: no such setting\n"


def test_ranks_that_do_not_come_are_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(PeerLostError, match=r"after 0 s ranks of the job are missing: 1, 2$"):
        meet(store, 0, 3, 0.1)


def agrees(ranks):
    def act():
        if ranks.rank == 1:
            raise SourceDownError("the source is down")

    ranks.agree(act)


def test_what_all_ranks_raise_is_said_once(tmp_path):
    with Job(tmp_path, agrees, world=3) as job:
        codes, words, _ = job.end()
    assert codes == [5, 5, 5]
    assert words.count("the source is down") == 1


# a rank that is killed


def exchanges_for_ever(ranks):
    say("begun", ranks.rank)
    while True:
        ranks.exchange(1)
        time.sleep(0.01)


def reduces_for_ever(ranks):
    say("begun", ranks.rank)
    while True:
        ranks.sum(torch.ones(1))


def computes_alone(ranks):
    say("begun", ranks.rank)
    time.sleep(60)


@pytest.mark.parametrize("act", [exchanges_for_ever, reduces_for_ever, computes_alone])
@pytest.mark.parametrize("killed", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_once(tmp_path, act, killed):
    with Job(tmp_path, act, world=3) as job:
        job.await_line("begun", 3)
        job.kill(killed, signal.SIGKILL)
        codes, words, seconds = job.end()
        name = f"rank {killed} (process {job.ranks[killed].pid} on {os.uname().nodename})"
    assert codes == [-9 if rank == killed else 1 for rank in range(3)]
    assert words.count(f"error: {name} was killed\n") == 1
    assert words.count("error") == 1
    assert "Traceback" not in words
    assert seconds < 10


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_where_rank_0_keeps_the_store(tmp_path, killed):
    with Job(tmp_path, exchanges_for_ever, store_of_rank_0=True) as job:
        job.await_line("begun", 2)
        job.kill(killed, signal.SIGKILL)
        codes, words, _ = job.end()
    assert codes == ([-9, 1] if killed == 0 else [1, -9])
    assert words.count(f"error: rank {killed} (process {job.ranks[killed].pid} ") == 1
    assert words.count("error") == 1


@pytest.mark.parametrize("act", [raises_down, steps])
def test_rank_0_may_keep_the_store(tmp_path, act):
    with Job(tmp_path, act, *([2] if act is steps else []), store_of_rank_0=True) as job:
        codes, words, _ = job.end()
    assert codes == ([0, 0] if act is steps else [5, 5])
    assert words.count("error") == (act is raises_down)


# a rank that hangs


def hangs(ranks, how):
    ranks.phase("data", 1)
    ranks.exchange(0)
    ranks.phase("data", 2)
    if ranks.rank == 1 and how == "data":
        time.sleep(60)
    ranks.phase("step", 2)
    if ranks.rank == 1:
        time.sleep(HANG_S / 2)  # a sign of life is given here
        if how == "step":
            time.sleep(60)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "lock":
            re.match(r"(a+)+b", "a" * 99)  # holds Python's lock: no thread of this rank can speak
    ranks.sum(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("data", r"stands in step 2, data, for \d s at test_core_ranks.py:\d+ hangs"),
        ("step", r"stands in step 2, step, for \d s at test_core_ranks.py:\d+ hangs"),
        ("stop", r"was stopped by a signal \(SIGSTOP\); last seen in step 2, step"),
        ("lock", r"gives no sign of life for \d s; last seen in step 2, step"),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_print_their_stacks(tmp_path, how, told):
    with Job(tmp_path, hangs, how, timeout_s=HANG_S) as job:
        codes, words, seconds = job.end()
        name = rf"rank 1 \(process {job.ranks[1].pid} on {os.uname().nodename}\)"
    error = rf"error: {name} {told}; others wait in all_reduce in step 2, step "
    assert re.search(error, words), words
    assert words.count("error: ") == 1
    assert words.count("in hangs\n") >= 2, "the stacks of both"
    assert codes[0] == 1
    assert codes[1] in ({-9} if how == "lock" else {1, -9} if how == "stop" else {1})
    assert seconds < 10


def takes_its_time(ranks):
    for step in range(1, 4):
        ranks.phase("step", step)
        print(f"{ranks.rank} begins {step}", flush=True)
        time.sleep(HANG_S / 2)
        ranks.sum(torch.ones(1))


@pytest.mark.slow
def test_a_job_that_was_paused_as_a_whole_goes_on(tmp_path):
    with Job(tmp_path, takes_its_time, timeout_s=HANG_S) as job:
        job.await_line("begins 2", 2)
        for rank in (0, 1):
            job.kill(rank, signal.SIGSTOP)
        time.sleep(HANG_S + 6)
        for rank in (0, 1):
            job.kill(rank, signal.SIGCONT)
        codes, words, _ = job.end()
    assert codes == [0, 0], words


@pytest.mark.slow
def test_a_job_that_hangs_leaves_what_torchs_flight_recorder_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "trace_"))
    with Job(tmp_path, hangs, "step", timeout_s=HANG_S) as job:
        assert job.end()[0] == [1, 1]
    traces = [pickle.loads((tmp_path / f"trace_{rank}").read_bytes()) for rank in (0, 1)]
    names = [[entry["profiling_name"] for entry in trace["entries"]] for trace in traces]
    assert names[0][: len(names[1])] == names[1]
    assert names[0][len(names[1]) :] == ["gloo:all_reduce"], "which rank 1 never came to"


def waits_for_data(ranks):
    ranks.phase("data", 1)
    if ranks.rank == 1:
        time.sleep(3 * HANG_S)
    ranks.phase("exchange", 1)
    ranks.exchange(0)


@pytest.mark.slow
def test_data_have_an_allowance_of_their_own(tmp_path):
    with Job(tmp_path, waits_for_data, timeout_s=HANG_S, data_allowance_s=10 * HANG_S) as job:
        assert job.end()[:2] == ([0, 0], "")
    with Job(
        tmp_path, waits_for_data, timeout_s=HANG_S / 2, data_allowance_s=HANG_S, attempt=1
    ) as job:
        codes, words, _ = job.end()
    assert codes == [1, 1]
    assert "stands in step 1, data" in words


def opens_slowly(ranks):
    ranks.lead_first(lambda: time.sleep(2 * HANG_S if ranks.leads else 0))


@pytest.mark.slow
def test_opening_has_no_limit(tmp_path):
    with Job(tmp_path, opens_slowly, timeout_s=HANG_S) as job:
        assert job.end()[:2] == ([0, 0], "")


# whom to blame, apart from processes

SIGN = Sign(step=5, place=2, phase="step", seconds=9, frame="a.py:1 f", waits=None, number=1)


def test_those_furthest_behind_are_to_blame():
    ahead = replace(SIGN, place=3, waits="all_gather_object")
    assert blame({0: ahead, 1: SIGN, 2: ahead}, {}, 8) == [1]
    assert blame({0: ahead, 1: SIGN, 2: replace(ahead, place=1)}, {}, 8) == [2]
    assert blame({0: ahead, 1: SIGN, 2: SIGN}, {}, 8) == [1, 2]


def test_who_waits_is_not_to_blame_where_others_do_not():
    waits = replace(SIGN, waits="all_reduce")
    assert blame({0: waits, 1: SIGN, 2: waits}, {}, 8) == [1]
    assert blame({0: waits, 1: waits}, {}, 8) == [0, 1]


def test_who_stands_where_most_do_is_not_to_blame():
    other = replace(SIGN, frame="b.py:2 g")
    assert blame({0: SIGN, 1: SIGN, 2: other}, {}, 8) == [2]
    assert blame({0: SIGN, 1: other}, {}, 8) == [0, 1]


def test_nobody_is_to_blame_who_has_time():
    ahead = replace(SIGN, place=3, seconds=100)
    late = replace(SIGN, phase="data")
    assert blame({0: ahead, 1: replace(SIGN, seconds=7)}, {}, 8) == []
    assert blame({0: ahead, 1: late}, {"data": 10}, 8) == []
    assert blame({0: ahead, 1: late}, {"data": None}, 8) == []
    assert blame({0: ahead, 1: late}, {"data": 5}, 8) == [1]


def test_a_rank_whose_torchrun_died_before_it_was_watched_leaves(monkeypatch):
    """As the kernel can't tell, a store that is shut does; one that is open is a launcher's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    # the kernel is to watch no parent of a test
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    die_with_launcher()
    with socket.socket() as shut:
        shut.bind(("127.0.0.1", 0))  # taken, and nobody listens
        monkeypatch.setenv("MASTER_PORT", str(shut.getsockname()[1]))
        with pytest.raises(SystemExit):
            die_with_launcher()
