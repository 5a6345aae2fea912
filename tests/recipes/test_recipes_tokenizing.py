"""A run tokenized once: the same training, through kills, stops, resumes and full disks."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.store import Store
from summerlm.core.config import read_settings
from summerlm.core.errors import (
    DamagedDataError,
    DataChangedError,
    FolderHeldError,
    SaveError,
    UsageError,
)
from summerlm.core.files import RunFolder
from summerlm.core.record import read_rows
from summerlm.data.loader import Loader, hash_steps, merge_states
from summerlm.data.sources import Source
from summerlm.data.tokens import writing
from summerlm.data.tokens.reading import Tokens, TokenSource, TokenSteps
from summerlm.recipes.data.batches import hash_run, open_loader
from summerlm.recipes.data.locking import lock_data, open_data, open_run_data
from summerlm.recipes.data.tokenizing import keep_held_out, tokenize
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings
from summerlm.recipes.watching import take_text
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.train.step import Stepper

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SHARD_BYTES = 2400  # four steps of 8 rows: 33 ids, a source and a checksum each


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def settings(tiny_config):
    """Give the tiny run's settings with overrides."""
    return lambda *overrides: read_settings(Settings, tiny_config, overrides)


@pytest.fixture
def written(settings, tmp_path):
    """The tiny run's twelve steps."""
    assert tokenize(settings(), tmp_path / "tokens", None, None, Console(quiet=True)) == 0
    return tmp_path / "tokens"


def write(settings, out, steps=None):
    return tokenize(settings, out, steps, None, Console(quiet=True))


def content(folder):
    """Every file by name, but for the hold."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def hashes(settings, steps=12, world=1, start=None):
    return list(hash_run(settings, steps, world, 0, start))


# reading


def test_the_hashes_are_those_of_the_stream_without_the_sources(settings, written):
    streamed = hashes(settings())
    assert [number for number, _ in streamed] == list(range(1, 13))
    cached = f"data.tokens={written}"
    gone = "run.folder=none yet"
    for world in (1, 2, 4):
        assert hashes(settings(cached, gone), world=world) == streamed
    with pytest.raises(UsageError, match=r"world size 3 must divide data\.lanes = 4"):
        hashes(settings(cached), world=3)
    assert len([name for name in content(written) if name.endswith(".rows")]) == 3


def steps_of(folder):
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    return {row["step"]: (row["loss"], row["batch_sha"], row["loss_by_source"]) for row in rows}


def checks_of(folder):
    kinds = ("held_out_loss", "held_out_loss_by_source", "bits_per_byte_by_source")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "validation"]
    return [[row[kind] for kind in kinds] for row in rows]


def weights_of(folder):
    return read_tensors(Store(folder / "checkpoints", pytest.fail).latest(), "model")


def assert_same_run(one, two):
    assert steps_of(one) == steps_of(two)
    assert checks_of(one) == checks_of(two)
    assert len(checks_of(one)) == 1
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (one, two)]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0]["tokens"] == 3072
    a, b = weights_of(one), weights_of(two)
    assert all(torch.equal(a[name], b[name]) for name in a)


def train(settings):
    return pretrain(settings, Console(quiet=True))


def test_training_is_the_same_when_the_sources_are_gone(settings, tiny_text, tmp_path):
    """Two sources, rules that drop and change, everything equal; then no source is there."""
    text = shutil.copytree(tiny_text, tmp_path / "copy")
    (text / "shouting.txt").write_text("mail me at ann@mail.org, bird\n" * 9)
    rules = ["data.sources.text.min_characters=100", "data.sources.text.rules=['emails']"]
    more = [f"data.sources.more.path={text}/*.txt", "data.sources.more.weight=0.5"]
    both = [*rules, *more, "data.sources.more.licence=MIT"]
    folders = [f"run.folder={tmp_path}/{name}" for name in ("streamed", "cached")]
    write(settings(*both), tmp_path / "tokens")
    train(settings(*both, folders[0]))
    shutil.rmtree(text)
    train(settings(*both, folders[1], f"data.tokens={tmp_path}/tokens"))
    assert_same_run(tmp_path / "streamed", tmp_path / "cached")
    locks = [(tmp_path / name / "data.lock.json").read_bytes() for name in ("streamed", "cached")]
    assert locks[0] == locks[1]
    ledger = json.loads((tmp_path / "cached" / "ledger.json").read_text())["sources"]
    assert set(ledger) == {"text", "more"}


def stop_after(monkeypatch, step):
    """Send this process SIGTERM as soon as a step is trained on."""
    former = Stepper.__call__

    def call(self, batch, number, rate, **kwargs):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return former(self, batch, number, rate, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", call)


@pytest.mark.parametrize("ways", ["sts", "tst", "ttt"])
def test_a_run_goes_over_from_one_to_the_other_and_back(
    ways, settings, written, tmp_path, monkeypatch
):
    """Stopped twice, within a shard and at its end, and each time read another way."""
    train(settings(f"run.folder={tmp_path}/twin"))
    folder = f"run.folder={tmp_path}/run"
    for way, stop in zip(ways, (3, 8, None), strict=True):
        tokens = [f"data.tokens={written}"] if way == "t" else []
        with monkeypatch.context() as patch:
            if stop is not None:
                stop_after(patch, stop)
            assert train(settings(folder, *tokens)) == 0
        done = max(steps_of(tmp_path / "run"))
        assert done == 12 if stop is None else stop <= done < 12
    assert_same_run(tmp_path / "twin", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000012"
    assert (
        hashes(settings("train.budget_tokens=9999"), 3, start=checkpoint)
        == (hashes(settings("train.budget_tokens=9999"), 15)[12:])
    )


def test_eight_ranks_go_on_as_three(settings, tmp_path):
    """From the tokens and from the stream, to the tokens and to the stream."""
    wide = ["train.batch_tokens=768", "data.lanes=24", "train.budget_tokens=9216"]
    streaming = settings(*wide)
    write(streaming, tmp_path / "tokens")
    reading = settings(*wide, f"data.tokens={tmp_path}/tokens")
    tokenizer = load_tokenizer(streaming.tokenizer.name)
    expected = hashes(streaming)

    def open_ranks(settings, world, state):
        sources = open_run_data(settings, training=False)
        options = {"workers": 0, "world": world}
        return [
            open_loader(settings, sources, tokenizer, state, rank=r, **options)
            for r in range(world)
        ]

    for before in (streaming, reading):
        ranks = open_ranks(before, 8, None)
        steps = [[next(rank) for rank in ranks] for _ in range(7)]
        state = json.loads(json.dumps(merge_states([step.state for step in steps[-1]])))
        for after, kind in ((streaming, Loader), (reading, TokenSteps)):
            ranks = open_ranks(after, 3, state)
            assert all(type(rank) is kind for rank in ranks)
            assert list(itertools.islice(hash_steps(ranks), 5)) == expected[7:]


@pytest.mark.parametrize("asked", [0, 60, 333, 407, 599, 600])
def test_fewer_held_out_texts_are_those_of_the_sources(settings, written, asked):
    tokens = open_run_data(
        settings(f"data.tokens={written}", f"validation.characters_per_source={asked}"),
        training=False,
    )
    (source,) = open_data(settings(), write=False)
    assert list(take_text(tokens[0], asked)) == list(take_text(source, asked))


class Texts:
    """A source's held-out texts."""

    def __init__(self, *texts):
        self.texts = texts

    def held_out(self):
        return iter(self.texts)


LENGTHS = st.lists(st.integers(1, 400) | st.just(10_000), max_size=40) | st.just([999] * 20)


@given(LENGTHS, st.integers(64, 2000), st.floats(0, 1))
def test_texts_kept_for_many_characters_serve_for_fewer(lengths, kept, share):
    """Also where each is cut shorter and one more is needed for it."""
    source = Texts(*(chr(97 + n % 26) * length for n, length in enumerate(lengths)))
    fewer = max(64, int(kept * share))
    tokens = TokenSource("text", {}, **keep_held_out(source, kept))
    for asked in (0, fewer, kept):
        assert list(take_text(tokens, asked)) == list(take_text(source, asked))


# what is refused


def test_too_little_is_told(settings, written):
    cached = f"data.tokens={written}"
    longer = settings(cached, "train.budget_tokens=3073")
    with pytest.raises(UsageError, match=r"holds 12 steps, the run makes 13; `summerlm data tok"):
        open_run_data(longer)
    assert not longer.run.folder.exists()
    assert hashes(longer) == hashes(settings())
    with pytest.raises(UsageError, match="holds 12 steps, step 13 is asked for"):
        hashes(longer, 13)
    with pytest.raises(UsageError, match=r"characters_per_source = 600, 601 are asked for"):
        open_run_data(settings(cached, "validation.characters_per_source=601"))
    with pytest.raises(UsageError, match=r"gone/MANIFEST\.json: No such file"):
        open_run_data(settings("data.tokens=gone"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=1", "run.seed was 0, is 1"),
        ("data.lanes=2", "data.lanes was 4, is 2"),
        ("data.sources.text.path=elsewhere", "data.sources.text.path was"),
        ("model.context=16", "model.context was 32, is 16"),
        ("train.batch_tokens=128", "train.batch_tokens was 256, is 128"),
        ("tokenizer.name=mistral-v3", "the tokenizer's fingerprint was"),
    ],
)
def test_another_order_is_refused_before_a_run_begins(settings, written, override, words):
    other = settings(f"data.tokens={written}", override, "model.vocabulary=32773")
    with pytest.raises(DataChangedError) as error:
        open_run_data(other)
    assert words in str(error.value)
    assert not other.run.folder.exists()
    with pytest.raises(DataChangedError) as error:
        write(other, written)
    assert words in str(error.value)


def test_a_run_s_lock_is_held_against_the_tokens(settings, written, tiny_text, tmp_path):
    text = shutil.copytree(tiny_text, tmp_path / "copy")
    (text / "07.txt").write_text("something else altogether\n")
    lock_data(settings(f"data.sources.text.path={text}/*.txt"), None)
    with pytest.raises(DataChangedError, match=r"file 07\.txt had"):
        train(settings(f"data.tokens={written}"))


def test_tokenizing_takes_the_data_that_the_run_has_pinned(settings, tiny_text, tmp_path):
    text = shutil.copytree(tiny_text, tmp_path / "copy")
    own = settings(f"data.sources.text.path={text}/*.txt")
    lock_data(own, None)
    (text / "07.txt").write_text("something else altogether\n")
    with pytest.raises(DataChangedError, match=r"file 07\.txt had"):
        write(own, tmp_path / "tokens")


def test_going_on_with_other_data_is_refused(settings, tiny_text, tmp_path):
    text = shutil.copytree(tiny_text, tmp_path / "copy")
    own = settings(f"data.sources.text.path={text}/*.txt")
    write(own, tmp_path / "tokens", 5)
    (text / "07.txt").write_text("something else altogether\n")
    with pytest.raises(DataChangedError, match=r"file 07\.txt had"):
        write(own, tmp_path / "tokens")


def test_damage_stops_training_and_tokenizing(settings, written):
    path = written / "000000005-000000008.rows"
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    cached = settings(f"data.tokens={written}", "train.budget_tokens=3072")
    with pytest.raises(DamagedDataError, match=rf"{path}: row 31 \(of step 8\) is damaged"):
        train(cached)
    assert max(steps_of(cached.run.folder)) == 7
    with pytest.raises(DamagedDataError, match=f"{path}: its SHA-256"):
        write(settings(), written)


# writing


def test_a_finished_folder_is_left_alone_and_a_longer_run_adds_to_it(settings, tmp_path):
    out, said = tmp_path / "tokens", []

    class Told(Console):
        def print(self, *words, **_):
            said.append(" ".join(map(str, words)))

    assert tokenize(settings(), out, 5, 0, Told()) == 0
    before = content(out)
    assert tokenize(settings(), out, 5, None, Told()) == 0
    assert content(out) == before
    assert said[-1] == f"{out}: holds 5 steps, verified; nothing to do"
    assert tokenize(settings(), out, None, 2, Told()) == 0
    assert before.items() - content(out).items() == {("MANIFEST.json", before["MANIFEST.json"])}
    assert hashes(settings(f"data.tokens={out}")) == hashes(settings())
    with RunFolder(out), pytest.raises(FolderHeldError, match="held by process"):
        write(settings(), out)


def test_workers_change_no_byte(settings, written, tmp_path):
    console = Console(quiet=True)
    assert tokenize(settings(), tmp_path / "other", None, 3, console) == 0
    assert content(tmp_path / "other") == content(written)


class Killed(BaseException):
    """What stands for a kill: nothing may catch it, and nothing is written after it."""


def test_a_kill_between_any_two_changes_of_the_disk_loses_nothing(
    settings, written, tmp_path, monkeypatch
):
    """Every change of names and every sync is the last one once."""
    expected, out = content(written), tmp_path / "out"
    calls = [(os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rename"), (os, "mkdir")]
    kills, after = 0, set()

    def dying(former):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return former(*args, **options)

        return call

    limit = 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        left = limit
        with monkeypatch.context() as patch:
            for module, name in calls:
                patch.setattr(module, name, dying(getattr(module, name)))
            try:
                write(settings(), out)
                break
            except Killed:
                kills += 1
        after.add(len(list(out.glob("*"))) if out.exists() else 0)
        assert write(settings(), out) == 0
        assert content(out) == expected
        limit += 1
    assert kills > 20
    assert len(after) > 5


def command(config, out, *options):
    code = (
        f"import summerlm.data.tokens.writing as w; w.SHARD_BYTES = {SHARD_BYTES}\n"
        "from summerlm.cli import main; main()"
    )
    return [sys.executable, "-c", code, "data", "tokenize", config, "--out", out, *options]


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_command_goes_on_to_the_same_bytes(kills, settings, tiny_config, tmp_path):
    """SIGKILL at random moments, then SIGTERM, and in the end what one undisturbed call makes."""
    budget = "train.budget_tokens=65536"  # 256 steps in 64 shards
    out, draw = tmp_path / "out", random.Random(4)
    numbers = [signal.SIGKILL] * kills + [signal.SIGTERM]
    for start, number in enumerate(numbers, 1):
        line = command(tiny_config, out, budget, "--workers", str(min(kills - 1, 1)))
        process = subprocess.Popen(line, stdout=subprocess.PIPE)
        enough = 48 * start // len(numbers)
        while len(list(out.glob("*.rows"))) < enough and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.random() / 20)
        process.send_signal(number)
        told = process.communicate(timeout=60)[0].decode()
        assert process.returncode == (0 if number == signal.SIGTERM else -number)
    assert "stopped; the same command goes on" in " ".join(told.split())
    assert 47 <= Tokens(out).manifest.steps / 4 < 64
    write(settings(budget), out)
    write(settings(budget), tmp_path / "twin")
    assert content(out) == content(tmp_path / "twin")
    assert len(content(out)) == 4 + 2 * 64


def test_a_full_disk_keeps_the_whole_shards(settings, written, tmp_path):
    """Files may grow to a size that the third shard's doesn't fit."""
    big = settings("train.budget_tokens=6144")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "tokens-of-a-full-disk"
    write(settings(), out, 4)
    before = content(out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"000000008\.rows: can't be written: File too large"):
            write(big, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(out) == before
    assert write(settings(), out) == 0
    assert content(out) == content(written)


def test_incidents_are_told_and_kept(settings, tmp_path, monkeypatch):
    met = [{"reason": "web: HTTP 429, tried again", "source": "text"}]
    monkeypatch.setattr(Source, "take_incidents", lambda _: [met.pop()] if met else [])
    write(settings("data.workers=0"), tmp_path / "tokens")
    (row,) = read_rows(tmp_path / "tokens" / "incidents.jsonl")
    assert row["reason"] == "web: HTTP 429, tried again"
    assert row["step"] == 1
