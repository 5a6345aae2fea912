"""The launcher: with stand-ins for the ranks, which say what they got, and with the command itself.

Launch files and the commands of docs/clusters.md are run dry here too.
"""

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from summerlm.core.config import read_settings
from summerlm.core.errors import PeerLostError, UsageError
from summerlm.core.record import read_rows
from summerlm.core.runtime import STOP_SIGNALS
from summerlm.recipes import launching
from summerlm.recipes.agent import FINAL
from summerlm.recipes.launching import check_nproc, exit_code, launch
from summerlm.recipes.settings import Settings

pytestmark = pytest.mark.ranks
BIN = Path(sys.executable).parent
FORK = multiprocessing.get_context("fork")

# ranks that need no torch: each notes its start, then ends with the code that PLAN has for this
# start and rank, or waits for a signal and ends as it is told
STAND_IN = """
import os, signal, sys, time

start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
plan = os.environ["PLAN"].split()[start].split(",")[rank]


def note(*words):
    with open("notes.txt", "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")


def receive(number, _):
    note("got", start, rank, signal.Signals(number).name)
    time.sleep(0.2)  # a save, before which no rank may be ended
    note("saved", start, rank)
    sys.exit(6 if plan == "fails" else 75 if number == signal.SIGUSR1 else 0)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])  # what came before is heard now
note("started", start, rank, os.environ["OMP_NUM_THREADS"], *sys.argv[1:])
if plan in ("wait", "fails"):
    time.sleep(60)
if plan.startswith("-"):
    os.kill(os.getpid(), -int(plan))
if plan != "0":
    while open("notes.txt").read().count(f"started {start}") < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
os._exit(int(plan))
"""


SETTINGS = """
run = { folder = "run", device = "cpu" }
model = { vocabulary = 300, width = 8, layers = 1, heads = 1, kv_heads = 1, head_dim = 8, mlp_hidden = 8, context = 8 }
train.batch_tokens = 96
data = { lanes = 12, sources.text = { path = "*.txt", weight = 1 } }
"""  # noqa: E501


class Launched:
    """A launcher in a fork of the test's process, with stand-ins for its ranks."""

    def __init__(self, folder: Path, plan: str, nproc: int = 2, max_restarts: int = 0) -> None:
        (folder / "summerlm").mkdir()
        (folder / "summerlm" / "__init__.py").touch()
        (folder / "summerlm" / "__main__.py").write_text(STAND_IN)
        (folder / "a.toml").write_text(SETTINGS)
        self.folder = folder
        self.process = FORK.Process(target=self._serve, args=(plan, nproc, max_restarts))
        self.process.start()

    def _serve(self, plan, nproc, max_restarts):
        os.chdir(self.folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ["PLAN"] = plan
        os.environ.pop("OMP_NUM_THREADS", None)
        try:
            settings = read_settings(Settings, Path("a.toml"))
            code = launch(settings, ["a.toml", "b.c=1"], nproc, max_restarts)
        except PeerLostError as error:
            code = 1
            print(error)
        sys.stdout.flush()
        os._exit(code)

    @property
    def notes(self) -> list[str]:
        path = self.folder / "notes.txt"
        return sorted(path.read_text().splitlines()) if path.exists() else []

    def await_notes(self, word: str, count: int) -> None:
        deadline = time.monotonic() + 20
        while sum(note.startswith(word) for note in self.notes) < count:
            assert time.monotonic() < deadline, (self.notes, self.end())
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """Wait for the end: the exit code, and all that was printed."""
        self.process.join(30)
        if self.process.exitcode is None:
            self.process.kill()
        return self.process.exitcode, (self.folder / "log.txt").read_text()


def test_ranks_get_the_commands_own_arguments_and_their_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(13)))
    job = Launched(tmp_path, "0,0,0", nproc=3)
    assert job.end() == (0, "")
    assert job.notes == [f"started 0 {rank} 4 train a.toml b.c=1" for rank in range(3)]


@pytest.mark.parametrize("code", [5, 75])
def test_the_ranks_exit_code_comes_through_without_a_word_of_torchruns(tmp_path, code):
    advice = "the same command goes on from the beginning\n" if code == 5 else ""
    assert Launched(tmp_path, f"{code},{code}").end() == (code, advice)


def test_ranks_that_all_were_killed_are_named_by_the_launcher(tmp_path):
    code, words = Launched(tmp_path, "-9,-9").end()
    assert code == 1
    assert re.fullmatch(r"rank 0 \(process \d+\) was killed by SIGKILL.*\n", words)
    assert not (tmp_path / "run").exists(), "of a run that hasn't begun nothing is recorded"


def test_a_killed_rank_is_on_record_with_its_signal_and_what_comes_next(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000040").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").touch()
    job = Launched(tmp_path, "1,-9 -6,1", max_restarts=1)
    code, words = job.end()
    assert code == 1
    lines = words.splitlines()
    assert [re.sub(r"\d\d+\)", "N)", line) for line in lines] == [
        "rank 1 (process N) was killed by SIGKILL; starting the ranks again (1 of 1) from step 40",
        "rank 0 (process N) was killed by SIGABRT; the same command goes on from step 40",
    ]
    rows = read_rows(tmp_path / "run" / "incidents.jsonl")
    assert rows == [
        {"kind": "incident", "reason": line, "ranks": [rank]}
        for line, rank in zip(lines, (1, 0), strict=True)
    ]


@pytest.mark.parametrize(
    ("nproc", "nodes", "shards", "words"),
    [
        (5, "1", 1, "the world size 5 must divide data.lanes = 12: 1, 2, 3, 4, 6, 12"),
        (4, "2", 1, "the world size 8 must divide data.lanes = 12"),
        (3, "1", 2, r"parallel.shard_ranks \(2\) must divide the number of ranks \(3\)"),
    ],
    ids=["lanes", "machines", "shards"],
)
def test_what_ranks_can_not_share_is_refused_before_they_start(
    tiny_settings, monkeypatch, tmp_path, nproc, nodes, shards, words
):
    monkeypatch.setenv("PET_NNODES", nodes)
    monkeypatch.setattr(launching, "get_rendezvous_handler", pytest.fail)
    (tmp_path / "a.toml").write_text(SETTINGS)
    settings = read_settings(Settings, tmp_path / "a.toml", [f"parallel.shard_ranks={shards}"])
    with pytest.raises(UsageError, match=words):
        launching.make_agent(settings, [], nproc, 0, str(tmp_path))


def test_failed_ranks_are_started_again_as_often_as_asked(tmp_path):
    job = Launched(tmp_path, "1,1 5,5 0,0", max_restarts=2)
    code, words = job.end()
    assert code == 0
    again = [f"starting the ranks again ({n} of 2) from the beginning" for n in (1, 2)]
    assert words.splitlines() == again
    assert sum(note.startswith("started") for note in job.notes) == 6


def test_what_would_fail_again_is_not_started_again(tmp_path):
    assert {2, 3, 4, 7, 9, 75, 130} == FINAL
    job = Launched(tmp_path, "3,3 0,0", max_restarts=1)
    assert job.end() == (3, "")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGUSR1, 75)]
)
def test_a_signal_reaches_all_ranks_which_save_and_are_not_started_again(tmp_path, number, code):
    job = Launched(tmp_path, "wait,wait 0,0", max_restarts=1)
    job.await_notes("started", 2)
    os.kill(job.process.pid, number)
    assert job.end() == (code, "")
    name = signal.Signals(number).name
    assert [n for n in job.notes if n.startswith("got")] == [f"got 0 {r} {name}" for r in (0, 1)]
    assert [n for n in job.notes if n.startswith("saved")] == ["saved 0 0", "saved 0 1"]


def test_what_fails_to_save_on_a_signal_is_not_started_again(tmp_path):
    job = Launched(tmp_path, "fails,fails 0,0", max_restarts=1)
    job.await_notes("started", 2)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == (6, "the same command goes on from the beginning\n")


def failed(*codes):
    names = {-9: "SIGKILL", -15: "SIGTERM", -10: "SIGUSR1"}
    return {
        rank: SimpleNamespace(exitcode=code, pid=100 + rank, signal_name=lambda c=code: names[c])
        for rank, code in enumerate(codes)
        if code
    }


@pytest.mark.parametrize(
    ("codes", "received", "told"),
    [
        ((0, 0), None, 0),
        ((0, 0), signal.SIGTERM, 0),
        ((0, 0), signal.SIGUSR1, 75),
        ((1, 5), None, 5),  # a cause with a code of its own
        ((1, -9), None, 1),
        ((75, -15), signal.SIGUSR1, 75),
        ((75, 6), signal.SIGUSR1, 6),  # it could not be saved
        ((-15, -15), signal.SIGTERM, 0),  # before they could listen
        ((-10, -10), signal.SIGUSR1, 75),
        ((-9, 0), signal.SIGTERM, 1),
        ((130, -15), signal.SIGINT, 130),
    ],
)
def test_many_exit_codes_are_one(codes, received, told):
    assert exit_code(failed(*codes), received) == told


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_nproc("auto", 2)
    check_nproc("cpu", 3)
    for device in ("auto", "cuda"):
        with pytest.raises(UsageError, match="--nproc 3: torch sees 2 GPUs"):
            check_nproc(device, 3)
    with pytest.raises(UsageError, match="at least one"):
        check_nproc("cpu", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_nproc("auto", 3)
    with pytest.raises(UsageError, match="torch sees 0 GPUs"):
        check_nproc("cuda", 1)


def test_torchruns_variables_make_one_job_of_several_machines(tiny_settings, monkeypatch, tmp_path):
    found = {}
    monkeypatch.setattr(
        launching, "get_rendezvous_handler", lambda parameters: found.update(vars(parameters))
    )
    names = {"NNODES": "2", "RDZV_BACKEND": "c10d", "RDZV_ENDPOINT": "first:29400", "RDZV_ID": "7"}
    for name, value in names.items():
        monkeypatch.setenv(f"PET_{name}", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = (
        launching.make_agent(tiny_settings, ["a.toml"], 2, 1, str(tmp_path)).get_worker_group().spec
    )
    assert (spec.local_world_size, spec.max_restarts) == (2, 1)
    assert (found["endpoint"], found["run_id"]) == ("first:29400", "7")
    assert (found["min_nodes"], found["max_nodes"], found["backend"]) == (2, 2, "c10d")


# the command itself


def children(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


class Run:
    """`summerlm train` on two ranks, by our launcher or torchrun itself, after some steps."""

    def __init__(self, config: Path, *arguments: str, torchrun: bool = False) -> None:
        command = [BIN / "summerlm", "train", config, *arguments, "--nproc", "2"]
        if torchrun:
            command = [BIN / "torchrun", "--nproc-per-node", "2", "-m", "summerlm", "train"]
            command += [config, *arguments]
        self.log = config.parent / "log.txt"
        metrics = config.parent / "run" / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not metrics.exists() or metrics.read_text().count('"train"') < 5:
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.ranks = children(self.process.pid)
        self.start = time.monotonic()

    def end(self) -> tuple[int, str]:
        try:
            code = self.process.wait(60)
        finally:
            self.process.kill()
        while any(os.path.exists(f"/proc/{rank}") for rank in self.ranks):
            assert time.monotonic() < self.start + 60, "ranks are left"
            time.sleep(0.05)
        self.seconds = time.monotonic() - self.start
        return code, self.log.read_text()


LONG = "train.budget_tokens=4000000"


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "rank", "twice"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_says_so_by_its_code(tiny_config, whom, number):
    run = Run(tiny_config, LONG)
    os.kill(run.ranks[1] if whom == "rank" else run.process.pid, number)
    if whom == "twice":
        time.sleep(0.05)
        os.kill(run.process.pid, number)
    code, words = run.end()
    name = signal.Signals(number).name
    step = re.search(rf"{name}: saved after step (\d+), leaving", words)
    assert step, words
    assert (tiny_config.parent / f"run/checkpoints/step-{int(step[1]):08d}").is_dir()
    assert code == (75 if number == signal.SIGUSR1 else 0)
    assert "error" not in words
    assert run.seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True], ids=["ours", "torchrun"])
def test_ranks_die_with_a_killed_launcher_and_free_the_folder(tiny_config, torchrun):
    run = Run(tiny_config, LONG, torchrun=torchrun)
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()
    assert run.seconds < 5, "the last rank is gone, and with it what holds the folder"
    again = Run(tiny_config, LONG)
    os.kill(again.process.pid, signal.SIGTERM)
    assert again.end()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [None, 2])
@pytest.mark.parametrize("moment", ["torch", "ranks"])
def test_an_early_interrupt_is_one_line_and_130(tiny_config, tmp_path, nproc, moment):
    """At any moment from the first large import on: of the launcher's or of the ranks'."""
    if moment == "ranks" and nproc is None:
        pytest.skip("a process alone has none")
    command = [BIN / "summerlm", "train", tiny_config, *(["--nproc", "2"] if nproc else [])]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    found = (lambda: children(process.pid)) if moment == "ranks" else (lambda: loads(process.pid))
    while not found():
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.startswith("interrupted before the run began")], lines
    assert len(lines) <= 2, lines  # the run may have said before what it was about to do


def loads(process):
    """Whether a process has begun to load torch's own library."""
    return "libtorch" in Path(f"/proc/{process}/maps").read_text()


@pytest.mark.slow
def test_a_killed_rank_is_named_and_its_run_goes_on_by_itself(tiny_config):
    run = Run(tiny_config, "train.budget_tokens=30000", "--max-restarts", "1")
    os.kill(run.ranks[1], signal.SIGKILL)
    code, words = run.end()
    assert code == 0, words
    assert words.count("error") == 1
    assert re.search(rf"error: rank \d \(process {run.ranks[1]} on \S+\) was killed\n", words)
    assert "starting the ranks again (1 of 1)" in words
    assert "closing signal" not in words, "torchrun's own log"


@pytest.mark.slow
def test_a_stopped_rank_ends_its_run_with_its_name_and_stack(tiny_config):
    run = Run(tiny_config, LONG, "parallel.timeout_s=5")
    time.sleep(1.5)
    os.kill(run.ranks[1], signal.SIGSTOP)
    code, words = run.end()
    assert code == 1, words
    name = rf"rank \d \(process {run.ranks[1]} on \S+\)"
    assert re.search(rf"error: {name} was stopped by a signal \(SIGSTOP\); last seen in ", words)
    assert len(re.findall(r"^rank \d \(process \d+ on \S+\):$", words, flags=re.M)) == 2
    assert run.seconds < 15


@pytest.mark.slow
def test_torchrun_does_not_start_again_what_was_asked_to_stop(tiny_config):
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--max-restarts", "2", "-m", "summerlm"]
    log = (tiny_config.parent / "log.txt").open("w")
    process = subprocess.Popen([*command, "train", tiny_config, LONG], stdout=log, stderr=log)
    metrics = tiny_config.parent / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < 5:
        time.sleep(0.05)
    for rank in children(process.pid):
        os.kill(rank, signal.SIGUSR1)
    assert process.wait(60) == 0
    words = (tiny_config.parent / "log.txt").read_text()
    assert "SIGUSR1: saved after step" in words
    assert "ending with 0, not 75" in words
    assert "resuming" not in words


def test_a_signal_after_the_ranks_end_spoils_no_exit_code(tiny_settings, monkeypatch):
    class Agent:
        received = None
        spec = SimpleNamespace(rdzv_handler=SimpleNamespace(shutdown=lambda: None))

        def listen(self):
            pass

        def run(self):
            return SimpleNamespace(failures={})

        def get_worker_group(self):
            return SimpleNamespace(spec=self.spec)

    monkeypatch.setattr("summerlm.recipes.launching.make_agent", lambda *_: Agent())
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    disabled = logging.root.manager.disable
    monkeypatch.setenv("SUMMERLM_LAUNCHER", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        assert launch(tiny_settings, [], 1, 0) == 0
        assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}
    finally:
        logging.disable(disabled)
        for number, handler in former.items():
            signal.signal(number, handler)
