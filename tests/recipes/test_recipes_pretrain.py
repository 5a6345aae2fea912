"""A run from settings to a folder: exact resume, extension, faults, exit codes."""

import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

import summerlm
from summerlm.checkpoint.manifest import verify
from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.snapshot import Snapshot
from summerlm.checkpoint.store import Store
from summerlm.core.config import read_settings
from summerlm.core.errors import (
    DataChangedError,
    DivergedError,
    NoCheckpointError,
    SaveError,
    UsageError,
    WorkerDiedError,
)
from summerlm.core.files import read_json
from summerlm.core.record import read_rows
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings
from summerlm.train.loop import train
from summerlm.train.saving import Saver
from summerlm.train.step import Stepper


@pytest.fixture
def start(tiny_config, tmp_path):
    """Train with overrides into a named folder; gives (exit code, folder)."""

    def run(folder, *overrides):
        path = tmp_path / folder
        settings = read_settings(Settings, tiny_config, [f"run.folder={path}", *overrides])
        return pretrain(settings, Console(quiet=True)), path

    return run


def steps_of(folder):
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    return {row["step"]: (row["loss"], row["batch_sha"], row["grad_norm"]) for row in rows}


def final_weights(folder):
    store = Store(folder / "checkpoints", pytest.fail)
    return read_tensors(store.latest(), "model")


def same_weights(one, two):
    a, b = final_weights(one), final_weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """Send a signal to this process when a step is done, as a scheduler would."""

    def interrupted(*args, **kwargs):
        for event in train(*args, **kwargs):
            if event.step == step:
                os.kill(os.getpid(), number)
            yield event

    monkeypatch.setattr("summerlm.recipes.pretrain.train", interrupted)


def fingerprint(folder):
    """Hash every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_folder_holds_what_it_says(start):
    code, folder = start("a", "samples.prompts=['the sun']", "samples.tokens=5")
    assert code == 0
    steps = steps_of(folder)
    assert list(steps) == list(range(1, 13))
    assert steps[12][0] < steps[1][0] - 0.5
    rows = read_rows(folder / "metrics.jsonl")
    assert all("loss" not in row for row in rows if row["kind"] != "train")
    assert [row["tokens"] for row in rows if row["kind"] == "train"][-1] == 3072
    checks = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in checks] == [12]
    assert 0 < checks[0]["bits_per_byte_by_source"]["text"] < 8
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["tokens"] == 3072 == sum(s["targets"] for s in ledger["sources"].values())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["data"]["text"]["files"]) == 40
    assert manifest["hardware"]["torch"] == torch.__version__
    (sample,) = read_rows(folder / "samples.jsonl")
    assert sample["prompt"] == "the sun"
    assert read_settings(Settings, folder / "config.toml").run.folder == folder


def test_checkpoints_kept_are_the_last_and_the_stable_one(start):
    _, folder = start("a")
    assert Store(folder / "checkpoints", pytest.fail).steps() == [6, 8, 12]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(start, monkeypatch, optimizer, stop):
    setup = ["model.dropout=0.1", f"optim.name={optimizer}", "model.alibi=true"]
    setup += ["optim.adam_lr=none"] if optimizer == "adamw" else []
    _, whole = start("whole", *setup)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        code, folder = start("parts", *setup)
    assert code == 0
    assert list(steps_of(folder)) == list(range(1, stop + 1))
    start("parts", *setup, "data.workers=2")
    assert steps_of(folder) == steps_of(whole)
    assert same_weights(folder, whole)
    resumed = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "resume"]
    assert [row["resumed_from"] for row in resumed] == [stop]
    ledgers = [json.loads((f / "ledger.json").read_text()) for f in (folder, whole)]
    assert ledgers[0] == ledgers[1]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_save_holds_its_step_however_slowly_it_is_copied(start, monkeypatch, optimizer):
    setup = ["checkpoint.keep_last=9", f"optim.name={optimizer}"]
    setup += ["optim.adam_lr=none"] if optimizer == "adamw" else []
    _, expected = start("expected", *setup)
    take = Snapshot.take
    monkeypatch.setattr(Snapshot, "take", lambda self: (time.sleep(0.2), take(self)))
    _, folder = start("slow", *setup)
    saves = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "save"]
    assert min(save["stall_s"] for save in saves) > 0.05
    stores = [Store(f / "checkpoints", pytest.fail) for f in (folder, expected)]
    assert stores[0].steps() == stores[1].steps()
    for step in stores[0].steps():
        for table in ("model", "optimizer"):
            found, wanted = (read_tensors(store.path(step), table) for store in stores)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_sigusr1_asks_to_be_queued_again(start, monkeypatch):
    stop_after(monkeypatch, 2, signal.SIGUSR1)
    assert start("a")[0] == 75


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 75)]
)
@pytest.mark.parametrize("where", ["opening.open_run_data", "watching.take_text"])
def test_a_signal_before_the_first_step_says_that_nothing_was_begun(
    tiny_settings, monkeypatch, where, number, code
):
    def interrupted(*_):
        os.kill(os.getpid(), number)
        pytest.fail("goes on")

    monkeypatch.setattr(f"summerlm.recipes.{where}", interrupted)
    console = Console(width=200, file=io.StringIO())
    assert pretrain(tiny_settings, console) == code
    words = console.file.getvalue().splitlines()
    begun = "the run began" if where.startswith("opening") else "a step was made"
    assert words[-1] == f"interrupted before {begun}: nothing to save"


def test_a_run_says_where_it_lies_and_what_it_does_while_it_is_silent(tiny_config):
    console = Console(width=200, file=io.StringIO())
    settings = read_settings(Settings, tiny_config, ["data.workers=1", "validation.every_steps=3"])
    assert pretrain(settings, console) == 0
    words = console.file.getvalue()
    assert words.startswith(f"{settings.run.folder}: opening the data and the model ...\n")
    assert "4 lanes, 1 worker a rank" in words
    order = ["reading held-out texts", "step      1", "step 3: measuring", "step 3: held-out loss"]
    places = [words.index(line) for line in order]
    assert places == sorted(places)
    assert words.count("measuring") == 1, "a measurement that takes no time is announced once"
    assert "note" not in {row["kind"] for row in read_rows(settings.run.folder / "metrics.jsonl")}


def test_rows_past_the_checkpoint_are_cut(start, monkeypatch):
    _, whole = start("whole")

    def crash(*args, **kwargs):
        for event in train(*args, **kwargs):
            yield event
            if event.step == 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("summerlm.recipes.pretrain.train", crash)
        with pytest.raises(KeyboardInterrupt):
            start("a")
    _, folder = start("a")  # from the checkpoint of step 6, the last stable one
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert steps_of(folder) == steps_of(whole)
    assert same_weights(folder, whole)


def test_a_finished_run_is_left_as_it_is(start):
    _, folder = start("a")
    before = fingerprint(folder)
    assert start("a")[0] == 0
    assert start("a", "data.workers=1", "checkpoint.every_steps=2")[0] == 0
    assert fingerprint(folder) == before
    with pytest.raises(UsageError, match=r"model\.width"):
        start("a", "model.width=64")
    assert fingerprint(folder) == before


def test_a_run_killed_right_after_its_last_save_lacks_nothing(start, monkeypatch):
    def finish_and_die(saver):
        finish(saver)
        raise KeyboardInterrupt

    _, uninterrupted = start("a")
    finish = Saver.finish
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "finish", finish_and_die)
        with pytest.raises(KeyboardInterrupt):
            start("b")
    code, folder = start("b")
    assert code == 0
    names = [{path.name for path in run.iterdir()} for run in (uninterrupted, folder)]
    assert names[0] == names[1]
    assert read_json(folder / "ledger.json") == read_json(uninterrupted / "ledger.json")


def test_a_larger_budget_goes_on_from_the_stable_phase(start):
    _, whole = start("whole", "train.budget_tokens=6144")
    _, folder = start("a")
    start("a", "train.budget_tokens=6144")
    assert steps_of(folder) == steps_of(whole)
    assert same_weights(folder, whole)
    branches = [p for p in (folder / "checkpoints").iterdir() if p.name.startswith("branch-")]
    assert len(branches) == 1
    verify(branches[0] / "step-00000012")


def test_steps_that_are_not_finite_are_skipped_recorded_and_stop_in_the_end(start, monkeypatch):
    original = Stepper._forward

    def poisoned(self, micro, bad):
        objective, per_target = original(self, micro)
        return (objective * float("nan") if bad() else objective), per_target

    calls = iter(range(100))
    monkeypatch.setattr(
        Stepper, "_forward", lambda self, micro: poisoned(self, micro, lambda: next(calls) == 4)
    )
    _, folder = start("a")
    (incident,) = read_rows(folder / "incidents.jsonl")
    assert incident["step"] == 5
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows if not row["updated"]] == [5]
    monkeypatch.setattr(
        Stepper, "_forward", lambda self, micro: poisoned(self, micro, lambda: True)
    )
    with pytest.raises(DivergedError):
        start("b", "train.max_skipped_steps=3")
    skipped = read_rows(folder.parent / "b" / "incidents.jsonl")
    assert len(skipped) == 4


def test_a_full_disk_during_a_run_is_reported_and_survived(start):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(SaveError, match=r"step-00000012: can't be saved"):
            start("a", "validation.characters_per_source=0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    folder = start("a", "validation.characters_per_source=0")[1]
    reasons = [row["reason"] for row in read_rows(folder / "incidents.jsonl")]
    assert ["File too large" in reason for reason in reasons] == [True, True, True]
    assert list(steps_of(folder)) == list(range(1, 13))


def test_a_failed_save_on_the_way_is_an_incident(start, monkeypatch):
    publish = Store.publish

    def refuse(self, draft, step):
        if step == 4:
            raise SaveError("disk full")
        return publish(self, draft, step)

    monkeypatch.setattr(Store, "publish", refuse)
    _, folder = start("a")
    (incident,) = read_rows(folder / "incidents.jsonl")
    assert "step 4 not saved" in incident["reason"]


def test_damaged_newest_checkpoint_is_passed_over(start, monkeypatch):
    _, whole = start("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        _, folder = start("a")
    weights = folder / "checkpoints" / "step-00000009" / "model-00000-of-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 16
    weights.write_bytes(data)
    start("a")
    assert steps_of(folder) == steps_of(whole)
    assert same_weights(folder, whole)


def test_all_checkpoints_damaged_stops_the_run(start, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        _, folder = start("a")
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        path.write_text("{")
    before = fingerprint(folder)
    before.pop(".lock")
    with pytest.raises(NoCheckpointError, match=r"state\.json"):
        start("a")
    after = fingerprint(folder)
    after.pop(".lock")
    assert after == before


def test_other_data_are_refused(start, monkeypatch, tmp_path, tiny_text):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_text.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    source = f"data.sources.text.path={copy}/*.txt"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        start("a", source)
    (copy / "07.txt").write_text("something else altogether\n")
    with pytest.raises(DataChangedError, match=r"07\.txt") as error:
        start("a", source)
    assert error.value.exit_code == 4


def test_another_tokenizer_is_refused(start, tmp_path, tiny_text):
    from summerlm.tokenizer.learn import learn_bpe

    with pytest.raises(UsageError, match=r"model\.vocabulary \(300\) must be 32773"):
        start("a", "tokenizer.name=mistral-v3")
    _, folder = start("b")
    other = learn_bpe(["other words make other merges " * 20, "and more " * 30], 280)
    (checkpoint,) = (folder / "checkpoints").glob("step-00000012")
    other.save(tmp_path / "other")
    state = json.loads((checkpoint / "state.json").read_text())
    from summerlm.checkpoint.load import check_tokenizer

    with pytest.raises(UsageError, match=r"set tokenizer\.name"):
        check_tokenizer(other, state, checkpoint)


def test_the_library_loads_what_was_trained(start):
    _, folder = start("a")
    lm = summerlm.load(folder)
    assert not lm.model.training
    text = lm.generate("the sun", max_tokens=8, temperature=0)
    assert text == lm.generate("the sun", max_tokens=8, temperature=0)
    ids = lm.tokenizer.encode("the sun rises")
    assert lm.logits(ids).shape == (len(ids), 300)
    trained = final_weights(folder)
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, trained[name])
    with pytest.raises(UsageError, match="neither a run folder nor a checkpoint"):
        summerlm.load(folder.parent)


@pytest.mark.slow
def test_compiled_blocks_train_the_same(start):
    _, plain = start("a", "train.budget_tokens=1024")
    _, compiled = start("b", "train.budget_tokens=1024", "parallel.compile=true")
    for step, (loss, sha, _) in steps_of(plain).items():
        assert steps_of(compiled)[step][1] == sha
        assert steps_of(compiled)[step][0] == pytest.approx(loss, rel=1e-5)


def test_sigterm_and_kill_of_a_real_process(tiny_config, start, tmp_path):
    """Started again after SIGTERM and after SIGKILL, a real process ends as its twin did."""
    overrides = ["train.budget_tokens=40960", "checkpoint.every_steps=10"]
    _, twin = start("twin", *overrides)
    folder = tmp_path / "real"
    command = [sys.executable, "-m", "summerlm", "train", str(tiny_config)]
    command += [f"run.folder={folder}", *overrides]
    for number, after in [(signal.SIGTERM, 25), (signal.SIGKILL, 70)]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(steps_of(folder)) < after and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(timeout=60)
        assert code == (0 if number is signal.SIGTERM else -signal.SIGKILL)
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=120).returncode == 0
    assert steps_of(folder) == steps_of(twin)
    assert same_weights(folder, twin)
    resumed = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "resume"]
    assert len(resumed) == 2
    assert resumed[1]["resumed_from"] % 10 == 0


def test_max_epochs_that_the_budget_exceeds_stop_before_step_one(start):
    with pytest.raises(UsageError, match=r"source text: about \d.* epochs.*max_epochs = 1"):
        start("run", "data.sources.text.max_epochs=1", "train.budget_tokens=100000")


def test_max_epochs_that_are_used_up_stop_a_run_and_save_it(start, tmp_path, monkeypatch):
    monkeypatch.setattr("summerlm.recipes.opening.check_epochs", lambda *_: [])
    with pytest.raises(UsageError, match=r"source text: max_epochs = 1 is used up"):
        start("run", "data.sources.text.max_epochs=1", "train.budget_tokens=100000")
    made = len(steps_of(tmp_path / "run"))
    assert made
    assert (tmp_path / "run" / "checkpoints" / f"step-{made:08d}").is_dir()
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger["tokens"] == made * 256
    assert ledger["sources"]["text"]["epochs"] == 1
    start("run", "data.sources.text.max_epochs=100", "train.budget_tokens=100000")
    _, twin = start("twin", "train.budget_tokens=100000")
    assert steps_of(tmp_path / "run") == steps_of(twin)


@pytest.mark.slow  # torch looks after its workers every five seconds
def test_a_killed_worker_stops_a_run_and_saves_it(start, tmp_path, monkeypatch):
    def killing(*args, **kwargs):
        for event in train(*args, **kwargs):
            if event.step == 1:
                for child in multiprocessing.active_children():
                    child.kill()
            yield event

    monkeypatch.setattr("summerlm.recipes.pretrain.train", killing)
    with pytest.raises(WorkerDiedError, match="a data worker died"):
        start("run", "data.workers=1", "data.prefetch_steps=1", "checkpoint.every_steps=100")
    made = len(steps_of(tmp_path / "run"))
    assert 0 < made < 12
    assert (tmp_path / "run" / "checkpoints" / f"step-{made:08d}").is_dir()
