"""The commands on a run's checkpoints, on real runs: list, verify, prune, roll back."""

import json
import os
import re
import shutil
import sys

import pytest
from rich.console import Console

from summerlm.checkpoint.store import Store
from summerlm.cli import main
from summerlm.core.config import read_settings
from summerlm.core.errors import UsageError
from summerlm.core.files import RunFolder
from summerlm.core.record import read_rows
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.learn import learn_bpe

COMMANDS = (["list"], ["verify"], ["prune"], ["rollback", "--to-step", 4])


def step_folders(run):
    return sorted(os.listdir(run / "checkpoints"))


@pytest.fixture
def train(tiny_config, tmp_path):
    def start(*overrides):
        settings = read_settings(Settings, tiny_config, list(overrides))
        return pretrain(settings, Console(quiet=True))

    return start


@pytest.fixture
def run(train, tmp_path):
    """A finished run of 12 steps with checkpoints of 4, 6 (its stable phase's end), 8 and 12."""
    train("checkpoint.keep_last=9")
    return tmp_path / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*args, columns=160):
        # what the process does when it ends is another test's; here it lives on
        monkeypatch.setattr("summerlm.cli.end_process", sys.exit)
        monkeypatch.setattr(sys, "argv", ["summerlm", "checkpoint", *map(str, args)])
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_list_tells_what_is_there(run, command):
    (run / "checkpoints" / "tmp-00000009-abc").mkdir()
    (run / "checkpoints" / "step-00000008" / "MANIFEST.json").write_text("{}\nx\n")
    code, out, _ = command("list", run, "--json", "-")
    assert code == 0
    facts = json.loads(out)
    assert [row["step"] for row in facts["checkpoints"]] == [4, 6, 8, 12]
    assert [row["ranks"] for row in facts["checkpoints"]] == [1, 1, None, 1]
    assert "was altered" in facts["checkpoints"][2]["error"]
    files = (run / "checkpoints" / "step-00000004").iterdir()
    size = sum(path.stat().st_size for path in files if path.name != "MANIFEST.json")
    assert facts["checkpoints"][0]["bytes"] == size
    assert facts["aside"] == [
        {"name": "tmp-00000009-abc", "bytes": 0, "what": "a save that was cut short"}
    ]
    code, out, _ = command("list", run)
    assert code == 0
    lines = out.splitlines()
    assert lines[-3:] == [
        f"`summerlm checkpoint verify {run}` reads their files as well",
        "beside: tmp-00000009-abc, a save that was cut short: 0 bytes",
        f"`summerlm checkpoint prune {run} --leftovers` deletes what lies beside",
    ]


def test_verify_names_each_file_and_ends_with_3(run, command):
    code, out, _ = command("verify", run)
    assert code == 0
    assert sum(line.startswith("whole ") for line in out.splitlines()) == 4 * 7
    assert out.endswith("\n28 files of 4 checkpoints: all whole\n")
    assert "step-00000012/optimizer-00000-of-00001.safetensors" in out
    broken = run / "checkpoints" / "step-00000006" / "model-00000-of-00001.safetensors"
    data = bytearray(broken.read_bytes())
    data[-3] ^= 4
    broken.write_bytes(data)
    (run / "checkpoints" / "step-00000004" / "state.json").unlink()
    (run / "checkpoints" / "step-00000004" / "more.txt").write_text("x")
    code, out, _ = command("verify", run, "--json", "-")
    assert code == 3
    facts = json.loads(out)
    bad = {(row["checkpoint"], row["file"]): row["error"] for row in facts["files"] if row["error"]}
    assert set(bad) == {
        ("step-00000006", broken.name),
        ("step-00000004", "state.json"),
        ("step-00000004", "more.txt"),
    }
    assert "SHA-256" in bad["step-00000006", broken.name]
    end = command("verify", run)[1].splitlines()[-2:]
    assert end == [
        "3 of 29 files of 4 checkpoints damaged, in step-00000004, step-00000006",
        "the newest whole one is step-00000012",
    ]
    code, out, _ = command("verify", run / "checkpoints" / "step-00000012")
    assert (code, out.splitlines()[-1]) == (0, "7 files of a checkpoint: all whole")
    code, out, _ = command("verify", run / "checkpoints" / "step-00000006")
    assert code == 3
    assert str(broken) in out


def test_verify_names_a_value_that_is_not_finite(train, tmp_path, command, monkeypatch):
    """Under valid hashes: what wrote it didn't look."""
    from summerlm.checkpoint.snapshot import Snapshot

    take = Snapshot.take

    def poisoned(self):
        take(self)
        self.tensor("optimizer", "blocks.0.attention.output.weight/momentum")[0, 0] = float("nan")

    monkeypatch.setattr(Snapshot, "take", poisoned)
    monkeypatch.setattr(Snapshot, "check_finite", lambda self: None)
    train()
    code, out, _ = command("verify", tmp_path / "run" / "checkpoints" / "step-00000012")
    assert code == 3
    assert "blocks.0.attention.output.weight/momentum holds a value that is not finite" in out


def test_prune_keeps_what_the_run_would(run, command):
    (run / "checkpoints" / "tmp-00000009-abc").mkdir()
    (run / "checkpoints" / "step-00000012" / "state.json").unlink()
    code, out, _ = command("prune", run, "--keep-last", 1)
    assert code == 0
    # 12 is damaged: 8 is the last that counts; 6 is where a larger budget would go on
    assert step_folders(run) == ["step-00000006", "step-00000008", "step-00000012"]
    lines = out.splitlines()
    assert "state.json: is missing" in lines[0]
    assert re.fullmatch(r"deleted step 4: \d\d\d,\d\d\d bytes", lines[1])
    assert lines[2:] == [
        "deleted tmp-00000009-abc, a save that was cut short: 0 bytes",
        lines[1].removeprefix("deleted step 4: ") + " freed",
        "kept: steps 6, 8",
        "damaged, and not counted: step 12",
    ]
    code, out, _ = command("prune", run)
    assert "nothing to delete" in out


def test_leftovers_are_deleted_when_asked_and_said_by_name(run, train, command):
    (run / "checkpoints" / "step-00000012" / "state.json").unlink()
    train("checkpoint.keep_last=9")  # sets it aside, and makes it again
    code, out, _ = command("rollback", run, "--to-step", 8)
    assert code == 0
    moved, go_on, delete = out.splitlines()
    assert re.fullmatch(r"the checkpoint of step 12 moved to branch-after-00000008-\w{8}", moved)
    assert go_on == (f"`summerlm train {run}/config.toml run.folder={run}` goes on after step 8")
    assert delete == f"`summerlm checkpoint prune {run} --leftovers` deletes what was moved"
    _, out, _ = command("prune", run, "--keep-last", 9)
    assert re.search(r"^left beside, to be deleted by --leftovers: [\d,]{7} bytes$", out, re.M)
    before = step_folders(run)
    sizes = {name: size_of(run / "checkpoints" / name) for name in before}
    code, out, _ = command("prune", run, "--keep-last", 9, "--leftovers")
    assert code == 0
    branch, damaged, freed, kept = out.splitlines()
    assert branch.startswith("deleted branch-after-00000008-")
    assert damaged.startswith("deleted damaged-step-00000012-")
    gone = [name for name in before if not name.startswith("step-")]
    assert freed == f"{sum(sizes[name] for name in gone):,} bytes freed"
    assert kept == "kept: steps 4, 6, 8"
    assert step_folders(run) == [name for name in before if name.startswith("step-")]
    assert len(gone) == 2
    assert train("checkpoint.keep_last=9") == 0
    assert Store(run / "checkpoints", pytest.fail).steps() == [4, 6, 8, 12]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_that_is_rolled_back_goes_on_from_there(run, train, command):
    before = {
        row["step"]: row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"
    }
    code, out, _ = command("rollback", run, "--to-step", 6)
    assert code == 0
    assert "checkpoints of steps 8 to 12 moved to branch-after-00000006-" in out
    (branch,) = (run / "checkpoints").glob("branch-after-*")
    assert sorted(os.listdir(branch)) == ["step-00000008", "step-00000012"]
    assert command("verify", branch / "step-00000012")[0] == 0
    assert sum(row["kind"] == "train" for row in read_rows(run / "metrics.jsonl")) == 12
    assert train("checkpoint.keep_last=9") == 0
    after = {row["step"]: row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"}
    assert [after[step]["loss"] for step in after] == [before[step]["loss"] for step in before]
    resumed = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "resume"]
    assert [row["resumed_from"] for row in resumed] == [6]
    assert Store(run / "checkpoints", pytest.fail).steps() == [4, 6, 8, 12]
    assert "nothing to move" in command("rollback", run, "--to-step", 12)[1]


def test_a_rollback_to_what_is_not_there_or_damaged_moves_nothing(run, command):
    before = step_folders(run)
    code, _, err = command("rollback", run, "--to-step", 5)
    assert code == 2
    assert "there are steps 4, 6, 8, 12" in err
    (run / "checkpoints" / "step-00000006" / "state.json").write_text("{}")
    code, _, err = command("rollback", run, "--to-step", 6)
    assert code == 3
    assert "state.json" in err
    assert "nothing is moved; there are steps 4, 6, 8, 12" in err
    assert step_folders(run) == before


def test_what_changes_a_run_in_progress_is_refused(run, command):
    before = step_folders(run)
    with RunFolder(run):
        for name, *arguments in COMMANDS:
            code, _, err = command(name, run, *arguments)
            assert code == (7 if name in ("prune", "rollback") else 0), name
            assert (f"held by process {os.getpid()}" in err) == (code == 7)
    assert step_folders(run) == before


def test_what_is_no_run_is_refused_and_not_made(tmp_path, command):
    for name, *arguments in COMMANDS:
        code, _, err = command(name, tmp_path / "nothing", *arguments)
        assert code == 2
        assert "not a run folder" in err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", [[], *([name] for name, *_ in COMMANDS)])
def test_the_help_fits_a_small_terminal(command, name):
    code, out, _ = command(*name, "--help", columns=80)
    assert code == 0
    assert len(out.splitlines()) <= 25
    assert max(map(len, out.splitlines())) <= 80


def test_a_run_of_an_older_format_is_refused_and_left_as_it_is(run, train, command):
    import hashlib

    for folder in (run / "checkpoints").glob("step-*"):
        body = (folder / "MANIFEST.json").read_bytes().split(b"\n")[0]
        old = json.dumps({**json.loads(body), "format": 1}).encode()
        digest = hashlib.sha256(old).hexdigest().encode()
        (folder / "MANIFEST.json").write_bytes(old + b"\n" + digest + b"\n")
    before = step_folders(run)
    with pytest.raises(Exception, match=r"has format 1, this version reads 2") as error:
        train("checkpoint.keep_last=9", "train.budget_tokens=6144")
    assert error.value.exit_code == 3
    assert step_folders(run) == before
    assert command("verify", run)[0] == 3


def test_another_tokenizer_is_refused_before_anything_is_moved(train, tmp_path, tiny_tokenizer):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer, folder)
    train(f"tokenizer.name={folder}")
    before = step_folders(tmp_path / "run")
    text = "quite other words make quite other merges, and many of them, one after another "
    other = learn_bpe([text * 9, *(chr(97 + i) * 40 + chr(98 + i) * 9 for i in range(24))], 300)
    assert other.vocabulary == 300
    other.save(folder)
    with pytest.raises(UsageError, match=r"was trained with tokenizer"):
        train(f"tokenizer.name={folder}", "train.budget_tokens=6144")
    assert step_folders(tmp_path / "run") == before
