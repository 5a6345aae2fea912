"""Jobs of several ranks, through the command itself: what many make is what one makes."""

import os
import random
import re
import signal
import time

import pytest
from jobs_train import (
    Training,
    at_step,
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

import summerlm
from summerlm.core.config import read_settings
from summerlm.recipes import pretrain
from summerlm.recipes.data.batches import hash_run
from summerlm.recipes.settings import Settings
from summerlm.train.saving import Saver

pytestmark = pytest.mark.ranks
ADAMW = ("optim.name=adamw", "optim.adam_lr=none")  # Muon's bf16 makes more of a rounding
LAYOUTS = {
    "one": (1, "parallel.shard_ranks=1"),
    "replicated": (2, "parallel.shard_ranks=1"),
    "sharded": (2, "parallel.shard_ranks=all"),
    "hybrid": (4, "parallel.shard_ranks=2"),
    "four": (4, "parallel.shard_ranks=1"),
}
WATCHED = (
    "samples.prompts=['the sun']",
    "samples.tokens=4",
    "samples.every_steps=3",
    "validation.every_steps=5",
    "validation.characters_per_source=6000",  # several batches a rank
)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Runs that nothing happened to, by layout and overrides, each made once."""
    made = {}

    def get(config, layout, *overrides):
        if (layout, overrides) not in made:
            folder = tmp_path_factory.mktemp("twin") / "run"
            world, shards = LAYOUTS[layout]
            codes, words = run_job(config, folder, shards, *overrides, world=world)
            assert set(codes) == {0}, words
            made[layout, overrides] = folder
        return made[layout, overrides]

    return get


def close(one, two, rel=1e-5):
    assert one.keys() == two.keys()
    return all(one[step] == pytest.approx(two[step], rel=rel) for step in one)


@pytest.mark.parametrize("layout", ["replicated", "sharded", "hybrid"])
def test_many_ranks_record_what_one_does(tiny_config, twins, layout):
    alone = twins(tiny_config, "one", *ADAMW, *WATCHED)
    many = twins(tiny_config, layout, *ADAMW, *WATCHED)
    assert shas(many) == shas(alone)
    assert close(losses(many), losses(alone))
    for name in ("grad_norm", "update_norm"):
        one, two = ({s: row[name] for s, row in steps_of(f).items()} for f in (many, alone))
        assert close(one, two, rel=1e-2)  # a sum of squares is not as forgiving as a loss
    checks = [rows_of(folder, "validation") for folder in (many, alone)]
    assert [row["step"] for row in checks[0]] == [5, 10, 12]
    for one, two in zip(*checks, strict=True):
        assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], rel=1e-5)
    row, other = steps_of(many)[3], steps_of(alone)[3]
    assert row.keys() == other.keys()
    assert row["slowest_rank"] in range(LAYOUTS[layout][0])
    assert other["slowest_rank"] is None
    *_, sample = rows_of(many, "sample", "samples.jsonl")
    said = summerlm.load(many).generate("the sun", max_tokens=4)
    assert sample["text"] == said
    ledgers = [(folder / "ledger.json").read_text() for folder in (many, alone)]
    assert ledgers[0] == ledgers[1]


def test_a_sharded_run_in_bfloat16_is_watched_too(tiny_config, twins):
    setup = (*ADAMW, "train.precision=bfloat16", "run.log_every_steps=2", *WATCHED)
    alone, sharded = (twins(tiny_config, layout, *setup) for layout in ("one", "sharded"))
    assert close(losses(sharded), losses(alone), rel=0.01)
    assert [row["step"] for row in rows_of(sharded, "sample", "samples.jsonl")] == [3, 6, 9, 12]
    one, two = (rows_of(folder, "validation")[-1] for folder in (alone, sharded))
    assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], rel=0.01)


def test_looking_at_a_sharded_model_changes_nothing(tiny_config, twins):
    setup = ("model.dropout=0.1", "run.log_every_steps=100")
    watched = twins(tiny_config, "sharded", *setup, *WATCHED)
    assert learning(watched) == learning(twins(tiny_config, "sharded", *setup))


def test_a_finished_run_is_left_as_it_is_by_any_number_of_ranks(tiny_config, twins):
    folder = twins(tiny_config, "one", *ADAMW, *WATCHED)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    codes, words = run_job(tiny_config, folder, *ADAMW, *WATCHED)
    assert codes == [0, 0]
    assert words.count("finished already") == 1
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    assert after == before


def test_lanes_that_ranks_can_not_share_are_refused_once(tiny_config, tmp_path):
    codes, words = run_job(tiny_config, tmp_path / "run", world=3)
    assert codes == [2, 2, 2]
    assert words.count("error") == 1
    assert re.search(r"error: .*\b3\b.*\b4\b|error: .*\b4\b.*\b3\b", words), words
    codes, words = run_job(tiny_config, tmp_path / "run", "parallel.shard_ranks=3")
    assert codes == [2, 2]
    assert words.count("error") == 1
    assert re.search(r"parallel\.shard_ranks.*\b3\b.*\b2\b", words), words


def test_a_killed_rank_is_named_and_its_run_ends_as_if_nothing_had_been(
    tiny_config, tmp_path, twins
):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    overrides = ("train.budget_tokens=7680", "checkpoint.every_steps=5", "model.dropout=0.1")
    world, shards = LAYOUTS["sharded"]
    command = (tiny_config, tmp_path / "run", shards, *overrides)
    whole = twins(tiny_config, "sharded", *overrides)
    rank = draw.randrange(world)
    with Training(*command, world=world) as job:
        job.await_step(draw.randint(1, 22))
        time.sleep(draw.random() * 0.02)
        job.kill(rank, signal.SIGKILL)
        codes, words, _ = job.end()
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    process = job.ranks[rank].pid
    assert re.findall(rf"error: rank {rank} \(process {process} on \S+\) was killed\n", words)
    assert words.count("error") == 1
    codes, words = run_job(*command, world=world)
    assert codes == [0, 0], words
    assert learning(tmp_path / "run") == learning(whole)
    assert same_bits(saved(tmp_path / "run"), saved(whole))


def test_a_run_goes_through_all_worlds(tiny_config, tmp_path, twins):
    """Four ranks, two that share, one, four in pairs: the data never differ, the losses hardly."""
    folder = tmp_path / "run"
    alone = twins(tiny_config, "one", *ADAMW, *WATCHED)
    longer = twins(tiny_config, "one", *ADAMW, "train.budget_tokens=3584")
    settings = read_settings(Settings, tiny_config, [f"run.folder={folder}"])
    for stop, layout in ((2, "four"), (5, "sharded"), (8, "one"), (9, "hybrid"), (0, "replicated")):
        world, shards = LAYOUTS[layout]
        fault = at_step(stop, term(), rank=world - 1)
        codes, words = run_job(
            tiny_config, folder, shards, *ADAMW, *WATCHED, world=world, fault=fault
        )
        assert set(codes) == {0}, words
        last = list(steps_of(folder))[-1]
        assert stop <= last <= stop + 1 or not stop
        ahead = dict(hash_run(settings, 2, 1, 0, folder / "checkpoints" / f"step-{last:08d}"))
        assert list(ahead) == [last + 1, last + 2]
        assert all(sha == shas(longer)[step] for step, sha in ahead.items())
    assert shas(folder) == shas(alone)
    assert close(losses(folder), losses(alone))
    assert rows_of(folder, "validation")[-1]["held_out_loss"] == pytest.approx(
        rows_of(alone, "validation")[-1]["held_out_loss"], rel=1e-5
    )
    assert (folder / "ledger.json").read_text() == (alone / "ledger.json").read_text()


def poison(word, stepper, micro, objective, per_target):
    """One rank's loss is NaN, or infinite, or finite with a gradient that isn't."""
    if word == "steep":  # infinite and nowhere NaN
        return objective + stepper.layout.model.head_weight.sum() * 1e38 * 1e6, per_target
    if word == "gradient":
        nothing = stepper.layout.model.head_weight.sum() * 0
        return objective + nothing.square().sqrt(), per_target  # 0, of infinite slope
    return objective * float(word), per_target * float(word)


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_what_is_not_finite_on_one_rank_changes_no_bit_on_any(tiny_config, tmp_path, layout):
    bad = {3: "nan", 5: "gradient", 7: "inf", 8: "nan", 10: "steep"}
    world, shards = LAYOUTS[layout]
    overrides = (shards, "checkpoint.every_steps=1", "checkpoint.keep_last=20")
    codes, words = run_job(
        tiny_config, tmp_path / "run", *overrides, world=world, fault=in_forward(poison, bad, 1)
    )
    assert codes == [0, 0], words
    steps = steps_of(tmp_path / "run")
    assert [step for step, row in steps.items() if not row["updated"]] == list(bad)
    assert (steps[3]["loss"], steps[7]["loss"]) == (None, None)
    assert steps[5]["loss"] > 0
    assert steps[10]["loss"] > 0
    for step in range(2, 13):
        before, after = (saved(tmp_path / "run", s) for s in (step - 1, step))
        assert same_bits(before, after) == (step in bad)
    incidents = rows_of(tmp_path / "run", "incident", "incidents.jsonl")
    assert [row["step"] for row in incidents] == list(bad)


def test_a_second_job_in_a_folder_is_refused(tiny_config, tmp_path):
    overrides = ("train.budget_tokens=4000000",)
    with Training(tiny_config, tmp_path / "run", *overrides) as first:
        first.await_step(1)
        first.log = first.log.rename(tmp_path / "first.log")
        codes, words = run_job(tiny_config, tmp_path / "run", *overrides)
        assert codes == [7, 7]
        assert words.count("error") == 1
        assert f"process {first.ranks[0].pid}" in words, words
        first.kill(0, signal.SIGTERM)
        assert first.end()[0] == [0, 0]


def asked(whom, number, notes):
    """Signals around step 8, which is saved; each rank notes which steps it made."""

    def fault(own):
        train, save = pretrain.train, Saver.save

        def noting(*args, **kwargs):
            for event in train(*args, **kwargs):
                if event.step == 8 and (whom == "all twice" or (whom == "one" and own == 1)):
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), number)
                with notes.with_suffix(f".{own}").open("a") as file:
                    file.write(f"{event.step}\n")
                yield event

        def saving(self, event):
            if whom == "in a save" and own == 1 and event.step == 8:
                os.kill(os.getpid(), number)
            save(self, event)

        pretrain.train, Saver.save = noting, saving

    return fault


@pytest.mark.parametrize("whom", ["one", "all twice", "in a save"])
def test_a_signal_to_any_rank_stops_all_after_the_same_step(tiny_config, tmp_path, whom):
    number = signal.SIGUSR1 if whom == "one" else signal.SIGTERM
    notes, folder = tmp_path / "notes", tmp_path / "run"
    codes, words = run_job(
        tiny_config, folder, "train.budget_tokens=4000000", fault=asked(whom, number, notes)
    )
    assert codes == [75 if whom == "one" else 0] * 2, words
    made = [notes.with_suffix(f".{rank}").read_text().split() for rank in (0, 1)]
    assert made[0] == made[1]
    last = int(made[0][-1])
    assert 8 <= last <= 9
    assert saved(folder, last)
    assert [row["step"] for row in rows_of(folder, "stop")] == [last]
    assert words.count("leaving") == 1
