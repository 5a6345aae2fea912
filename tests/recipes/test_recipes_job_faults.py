"""Jobs of several ranks that meet faults: each ends or goes on as it should, and says why."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs_train import (
    Training,
    at_step,
    in_data,
    in_forward,
    learning,
    losses,
    rows_of,
    run_job,
    same_bits,
    saved,
    shas,
    steps_of,
    term,
)

from summerlm.checkpoint.snapshot import Snapshot
from summerlm.checkpoint.store import Store
from summerlm.core.errors import SourceDownError
from summerlm.core.failpoints import POINTS, VARIABLE
from summerlm.core.ranks import Ranks
from summerlm.recipes import pretrain
from summerlm.train.step import Stepper

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
LONG = ("train.budget_tokens=15360", "checkpoint.every_steps=5", "checkpoint.keep_last=20")  # 60
SHARED = "parallel.shard_ranks=all"


@pytest.fixture
def start(tiny_config, tmp_path):
    """Run a job in a named folder; gives its exit codes, what it printed, and the folder."""

    def run(name, *overrides, **more):
        codes, words = run_job(tiny_config, tmp_path / name, *overrides, **more)
        return codes, words, tmp_path / name

    return run


@pytest.fixture(scope="module")
def runs_without_fault(tmp_path_factory):
    """Folders of uninterrupted runs, by what they were started with."""
    return tmp_path_factory.mktemp("whole"), {}


@pytest.fixture
def whole(tiny_config, runs_without_fault):
    """The run that nothing happens to, made once for all tests that ask for the same."""
    root, made = runs_without_fault

    def get(*overrides, world=2):
        key = (overrides, world)
        if key not in made:
            folder = root / str(len(made))
            codes, words = run_job(tiny_config, folder, *overrides, world=world)
            assert codes == [0] * world, words
            made[key] = folder
        return made[key]

    return get


def checkpoints(folder):
    return Store(folder / "checkpoints", pytest.fail).steps()


# ranks that are killed


@pytest.mark.parametrize("layout", ["sharded", "four"])
def test_kills_at_any_moment_and_line_leave_the_run_as_if_nothing_had_been(
    start, tiny_config, tmp_path, layout
):
    """Of four ranks the order of sums shows, which the first steps of a process decide."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    world, overrides = 4, (*LONG, "model.dropout=0.1")
    if layout == "sharded":
        world, overrides = 2, (*overrides, SHARED)
    _, _, whole = start("whole", *overrides, world=world)
    folder = tmp_path / "run"
    points = [p for p in POINTS if p.startswith(("save.", "write.", "publish."))]
    for _ in range(5):
        rank, point = draw.randrange(world), draw.choice(points)
        wish = f"{point}@{rank}#{draw.randint(1, 3)}:kill" if draw.random() < 0.5 else ""
        wish = re.sub(r"@\d", "@0", wish) if point.startswith("publish.") else wish
        print(f"kill of rank {rank}", wish)

        def arm(own, wish=wish):
            os.environ[VARIABLE] = wish

        with Training(tiny_config, folder, *overrides, world=world, fault=arm) as job:
            if not wish:
                len(steps_of(folder))
                time.sleep(0.3 + draw.random())
                job.kill(rank, signal.SIGKILL)
            codes, words, _ = job.end()
        if -signal.SIGKILL in codes:
            assert words.count("error") == 1, words
            assert " was killed" in words
        else:
            assert codes == [0] * world, words
    codes, words, _ = start("run", *overrides, world=world)
    assert codes == [0] * world, words
    assert learning(folder) == learning(whole)
    assert same_bits(saved(folder), saved(whole))


@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_a_killed_rank_is_started_again_and_ends_as_its_twin(whole, tiny_config, launcher):
    overrides = ("train.budget_tokens=20480", "checkpoint.every_steps=10", SHARED)
    twin = whole(*overrides)
    folder, bin = tiny_config.parent / "run", Path(sys.executable).parent
    command = [bin / "summerlm", "train", tiny_config, *overrides, "--nproc", "2"]
    command += ["--max-restarts", "1"]
    if launcher == "torchrun":
        command = [bin / "torchrun", "--nproc-per-node", "2", "--max-restarts", "1"]
        command += ["-m", "summerlm", "train", tiny_config, *overrides]
    log = (tiny_config.parent / "log.txt").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while len(steps_of(folder)) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        (victim,) = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/environ")
            if is_rank(path, parent=process.pid, rank=1)
        ]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(90) == 0
    finally:
        process.kill()
    words = Path(log.name).read_text()
    assert len(re.findall(rf"error: rank 1 \(process {victim} on \S+\) was killed\n", words)) == 1
    (resumed,) = rows_of(folder, "resume")
    assert 0 < resumed["resumed_from"] < 80
    assert learning(folder) == learning(twin)
    assert same_bits(saved(folder), saved(twin))
    killed = [r["reason"] for r in rows_of(folder, "incident", "incidents.jsonl") if "ranks" in r]
    ours = (
        rf"rank 1 \(process {victim}\) was killed by SIGKILL; starting the ranks again \(1 of 1\)"
    )
    assert re.fullmatch(rf"{ours} from step \d+", *killed) if launcher == "ours" else not killed


def is_rank(path, parent, rank):
    try:
        status = path.with_name("stat").read_text().rpartition(")")[2].split()
        return int(status[1]) == parent and f"\0RANK={rank}\0" in f"\0{path.read_text()}"
    except OSError:
        return False


# ranks that hang, fail, lose step, or are slow


QUICK = ("parallel.timeout_s=5", "data.deadline_s=2", "data.stall_timeout_s=0.1")


def delayed(items, seconds):
    for item in items:
        time.sleep(seconds.get(item.number, 0))
        yield item


@pytest.mark.parametrize(("where", "phase"), [("forward", "step"), ("hook", "hooks"), ("data", "")])
def test_a_rank_that_hangs_is_named_with_its_stack(start, where, phase):
    def fault(own):
        if where == "hook":
            at_step(7, lambda: time.sleep(60), rank=1)(own)
        elif where == "forward":
            in_forward(lambda *_: time.sleep(60), {7: ""}, 1)(own)
        else:
            in_data(lambda items: delayed(items, {8: 60}), 1)(own)

    began = time.monotonic()
    codes, words, folder = start("run", *QUICK, fault=fault, within_s=30)
    assert time.monotonic() - began < 15
    assert codes == [1, 1]
    assert len(re.findall(r"error: rank 1 \(process \d+ on \S+\)", words)) == 1, words
    assert words.count("error: ") == 1
    assert f"{phase}" in words
    assert len(re.findall(r"^rank \d \(process \d+ on \S+\):$", words, flags=re.M)) == 2, words
    assert "slow" in words or "jobs_train.py" in words or "test_recipes_job_faults" in words
    assert 4 in checkpoints(folder)


def failing(error, rank=1, step=7):
    def fail():
        raise error

    return at_step(step, fail, rank)


def test_a_bug_on_one_rank_ends_all_and_is_told_once(start, whole):
    began = time.monotonic()
    codes, words, folder = start("run", fault=failing(KeyError("of rank 1")))
    assert time.monotonic() - began < 30
    assert codes == [1, 1]
    assert words.count("KeyError: 'of rank 1'") == 1
    assert words.count("Traceback") == 1
    assert "error: " not in words
    assert 4 in checkpoints(folder)
    assert start("run")[0] == [0, 0]
    assert same_bits(saved(folder), saved(whole()))


def test_data_that_fail_on_one_rank_stop_all_after_a_save(start, whole):
    def down(items):
        yield from itertools.islice(items, 6)
        raise SourceDownError("the hub is down")

    codes, words, folder = start("run", SHARED, fault=in_data(down, 1))
    assert codes == [5, 5]
    assert words.count("error: the hub is down") == 1
    assert checkpoints(folder)[-1] == 6
    assert start("run", SHARED)[0] == [0, 0]
    assert learning(folder) == learning(whole(SHARED))
    assert same_bits(saved(folder), saved(whole(SHARED)))


@pytest.mark.parametrize("how", ["skips", "repeats"])
def test_a_rank_that_loses_step_is_found_before_it_spoils_a_weight(start, how):
    def astray(items):
        times = {6: 0 if how == "skips" else 2}
        for item in items:
            yield from [item] * times.get(item.number, 1)

    codes, words, folder = start("run", fault=in_data(astray, 1))
    assert codes == [1, 1]
    wrong = (6, "rank 0 at 6, rank 1 at 7") if how == "skips" else (7, "rank 0 at 7, rank 1 at 6")
    assert f"ranks have lost step with one another at {wrong[0]}: {wrong[1]}" in words
    assert words.count("Traceback") == 1
    assert max(steps_of(folder)) <= wrong[0] - 1


def test_a_sum_that_one_rank_leaves_out_ends_the_job_in_that_step(start):
    def fault(own):
        add, times = Ranks.sum, itertools.count(1)

        def dropped(self, tensor):
            return tensor if own == 1 and next(times) == 6 else add(self, tensor)

        Ranks.sum = dropped

    codes, words, folder = start("run", *QUICK, fault=fault)
    assert codes == [1, 1]
    assert max(steps_of(folder)) == 5
    assert re.search(r"stands in step 6, step, .* sum; others wait in .* step 7, exchange", words)
    assert words.count("error: ") == 1


@pytest.mark.parametrize("shards", [1, "all"])
@pytest.mark.parametrize("where", ["forward", "data"])
def test_a_slow_rank_is_named(start, where, shards):
    def slow(word, stepper, micro, objective, per_target):
        time.sleep(0.1)
        return objective, per_target

    every = range(1, 13)
    fault = in_forward(slow, dict.fromkeys(every, ""), 1)
    if where == "data":
        fault = in_data(lambda items: delayed(items, dict.fromkeys(every, 0.1)), 1)
    codes, words, folder = start("run", f"parallel.shard_ranks={shards}", fault=fault)
    assert codes == [0, 0], words
    rows = [steps_of(folder)[step] for step in range(3, 13)]
    named = [row["slowest_rank"] for row in rows]
    assert named.count(1) >= 9, [(r["slowest_rank"], r["slowest_excess_s"]) for r in rows]
    excess = sorted(row["slowest_excess_s"] for row in rows)
    assert 0.02 < excess[5] < 0.2


# spikes


def louder(word, stepper, micro, objective, per_target):
    """A batch whose loss is so many times what it should be."""
    return objective * float(word), per_target * float(word)


def test_a_spike_changes_nothing_over_a_resume_either(start):
    """The limits come from a window that the checkpoint holds."""
    setup = (*LONG, "train.on_spike=skip", "checkpoint.every_steps=1", "checkpoint.keep_last=60")
    spike = in_forward(louder, {45: "1000"}, 1)
    codes, words, whole = start("whole", *setup, fault=spike)
    assert codes == [0, 0], words
    steps = steps_of(whole)
    assert [step for step, row in steps.items() if not row["updated"]] == [45]
    assert same_bits(saved(whole, 44), saved(whole, 45))
    assert not same_bits(saved(whole, 45), saved(whole, 46))
    (incident,) = rows_of(whole, "incident", "incidents.jsonl")
    assert incident["step"] == 45
    assert "spike" in incident["reason"]

    def twice(own):
        spike(own)
        at_step(42, term())(own)

    assert start("run", *setup, fault=twice)[0] == [0, 0]
    codes, words, folder = start("run", *setup, fault=spike)
    assert codes == [0, 0], words
    assert learning(folder) == learning(whole)
    assert same_bits(saved(folder), saved(whole))
    assert saved_state(folder)["guard"] == saved_state(whole)["guard"]


def saved_state(folder):
    return json.loads(
        (Store(folder / "checkpoints", pytest.fail).latest() / "state.json").read_text()
    )


def test_a_spike_may_stop_the_run(start):
    setup = (*LONG, "train.on_spike=stop")
    codes, words, folder = start("run", *setup, fault=in_forward(louder, {40: "1000"}, 1))
    assert codes == [9, 9]
    assert words.count("error: step 40: a spike") == 1
    assert checkpoints(folder)[-1] == 35  # not of a step from which a restart would go past it
    assert [row["step"] for row in rows_of(folder, "incident", "incidents.jsonl")] == [40]


def spoilt(word, stepper, micro, objective, per_target):
    """Some rows of this rank are what no model can learn; rows that are left out do nothing."""
    factors = torch.ones(len(per_target))
    for row in map(int, word.split()):
        if (micro.targets[row] >= 0).any():
            factors[row] = 1000.0
    changed = per_target * factors[:, None]
    return objective * (changed.sum() / per_target.sum()).detach(), changed


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_run_goes_back_before_a_spike_and_leaves_its_documents_out(
    start, whole, tiny_text, layout
):
    setup = (*LONG, "train.on_spike=rollback")
    setup += (SHARED,) if layout == "sharded" else ()

    def fault(own):
        in_forward(spoilt, {43: "2"}, 1)(own)  # the step's row 5
        check, saves = Snapshot.check_finite, itertools.count(1)

        def slow(self):  # the save of step 40, that it goes back to, is still being written
            time.sleep(1 if next(saves) == 8 else 0)
            check(self)

        Snapshot.check_finite = slow

    codes, words, folder = start("run", *setup, fault=fault)
    assert codes == [0, 0], words
    table = json.loads((folder / "quarantine.json").read_text())
    assert table["rollbacks"] == 1
    assert [43, 5] in table["rows"]
    assert all(step > 43 or row == 5 for step, row in table["rows"])
    spiked, *_ = rows_of(folder, "incident", "incidents.jsonl")
    assert spiked["step"] == 43
    back = [row for row in rows_of(folder, "incident", "incidents.jsonl") if "documents" in row]
    assert [row["step"] for row in back] == [43]
    assert back[0]["rows"] == table["rows"]
    files = {Path(document["file"]).name for document in back[0]["documents"]}
    assert files
    assert files <= {path.name for path in tiny_text.iterdir()}
    assert [row["resumed_from"] for row in rows_of(folder, "resume")] == [40]
    assert all(row["updated"] for row in steps_of(folder).values())
    # as a run that has left the same rows out from its beginning, where no fault can show
    twin = folder.with_name("twin")
    twin.mkdir()
    (twin / "quarantine.json").write_text(json.dumps(table))
    codes, words, _ = start("twin", *setup)
    assert codes == [0, 0], words
    assert learning(folder) == learning(twin)
    assert same_bits(saved(folder), saved(twin))
    clean = whole(*setup)
    assert shas(clean) == shas(folder)
    assert losses(clean)[42] == losses(folder)[42]
    assert losses(clean)[43] != losses(folder)[43]


def test_a_step_whose_rows_are_all_left_out_is_passed_by(start):
    """A gradient alone that spikes tells of no row: all rows of its step are left out."""

    def steep(word, stepper, micro, objective, per_target):
        return objective * float(word), per_target

    def both(own):
        in_forward(steep, {43: "100000"}, own)(own)

    setup = (*LONG, "train.on_spike=rollback", "train.max_skipped_steps=1", "train.clip_norm=1")
    codes, words, folder = start("run", *setup, fault=both)
    assert codes == [0, 0], words
    table = json.loads((folder / "quarantine.json").read_text())
    assert table["rollbacks"] == 1
    assert [row for step, row in table["rows"] if step == 43] == list(range(8))
    steps = steps_of(folder)
    assert list(steps) == list(range(1, 61))
    gone = [step for step in steps if sum(s == step for s, _ in table["rows"]) == 8]
    assert [step for step, row in steps.items() if not row["updated"]] == gone
    assert (steps[43]["loss"], steps[43]["loss_by_source"]) == (None, {})
    assert "not finite" not in words
    state = saved_state(folder)["guard"]
    assert (state["in_a_row"], state["total"]) == (0, 0)
    assert len(state["losses"]) == 60 - len(gone)
    twin = folder.with_name("twin")
    twin.mkdir()
    (twin / "quarantine.json").write_text(json.dumps(table))
    start("twin", *setup)
    assert same_bits(saved(folder), saved(twin))


def hotter(factor, first):
    """From some step on the rate is so many times the schedule's."""

    def fault(own):
        call = Stepper.__call__

        def hot(self, batch, number, rate, **more):
            return call(self, batch, number, rate * (factor if number >= first else 1), **more)

        Stepper.__call__ = hot

    return fault


def test_a_run_that_diverges_goes_back_at_most_three_times(start):
    setup = (*LONG, "train.on_spike=rollback", "train.max_skipped_steps=20")
    codes, words, folder = start("run", *setup, fault=hotter(100, 42))
    print(words)
    assert codes == [9, 9]
    assert words.count("error: ") == 1
    assert "after going back 3 times" in words
    table = json.loads((folder / "quarantine.json").read_text())
    assert table["rollbacks"] == 3
    assert len(rows_of(folder, "resume")) >= 1
    assert 40 in checkpoints(folder)


@pytest.mark.parametrize("word", ["nan", "1000"])
def test_too_many_steps_that_change_nothing_stop_the_run(start, word):
    setup = (*LONG, "train.max_skipped_steps=3", "train.on_spike=skip")
    fault = in_forward(louder, dict.fromkeys(range(45, 70), word), 1)
    codes, words, folder = start("run", *setup, fault=fault)
    assert codes == [9, 9]
    assert words.count("error: ") == 1
    assert [s for s, row in steps_of(folder).items() if not row["updated"]] == [45, 46, 47, 48]
    assert checkpoints(folder)[-1] == 45


# what fails silently, and memory


@pytest.mark.parametrize(("world", "stem"), [(2, "model"), (4, "optimizer")])
def test_a_flipped_bit_is_found_at_the_next_save(start, whole, world, stem):
    def fault(own):
        opening = pretrain.open_run
        tables = []

        def watch(*args):
            run = opening(*args)
            tables.append(run.tables)
            return run

        def flip():
            (name,) = [n for n in tables[0][stem] if n.startswith("blocks.1.mlp.down.weight")]
            words = tables[0][stem][name].tensor.detach().view(torch.int32).view(-1)
            words[7] ^= 1

        pretrain.open_run = watch
        at_step(6, flip, rank=1)(own)

    codes, words, folder = start("run", world=world, fault=fault)
    assert codes == [1] * world
    assert words.count("error: ") == 1
    assert re.search(
        rf"error: step \d: replicas differ in .*{stem} blocks\.1\.mlp\.down\.weight", words
    )
    assert ("on rank 1 against" if world == 4 else "rank") in words
    assert checkpoints(folder) == [4]  # steps go on while it is written, but it is not published
    codes, words, _ = start("run", world=world)
    assert codes == [0] * world, words
    assert same_bits(saved(folder), saved(whole(world=world)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_memory_ends_all_with_a_word_of_it(start, whole, rank):
    def greedy(word, stepper, micro, objective, per_target):
        torch.empty(10**13)

    codes, words, folder = start("run", SHARED, fault=in_forward(greedy, {7: ""}, rank))
    assert codes == [8, 8]
    assert words.count("error: ") == 1
    assert re.search(r"error: out of memory: .*40000000000000 bytes.*micro_batch_rows", words)
    assert 4 in checkpoints(folder)
    assert start("run", SHARED)[0] == [0, 0]
    assert same_bits(saved(folder), saved(whole(SHARED)))
