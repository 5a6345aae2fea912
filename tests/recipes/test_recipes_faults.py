"""Runs on a hub that misbehaves: the same batches, or a stop that loses nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from rich.console import Console

from summerlm.core.config import read_settings
from summerlm.core.errors import DataChangedError, SourceDownError, UsageError
from summerlm.core.record import read_rows
from summerlm.data.shards import parquet
from summerlm.recipes.data.locking import lock_data
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings
from summerlm.train.loop import train

FILES = 3


@pytest.fixture
def hub(tiny_text, tmp_path, monkeypatch):
    """A server of one repository, whose files are read by ranges as large ones are."""
    folder = tmp_path / "hub" / "owner" / "texts"
    folder.mkdir(parents=True)
    texts = [path.read_text() for path in sorted(tiny_text.iterdir())]
    for number in range(FILES):
        table = pa.table({"text": texts[number::FILES]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=3)
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 0)
    monkeypatch.setattr(parquet, "TAIL_BYTES", 64)
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SUMMERLM_HUB_MIRROR", raising=False)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def config(tiny_config):
    """Settings of a run on the hub's texts."""
    text = tiny_config.read_text()
    before, _, after = text.partition("[data.sources.text]")
    _, _, rest = after.partition("[run]")
    source = '[data.sources.text]\nhub = "owner/texts"\nweight = 1\nlicence = "CC0-1.0"\n'
    tiny_config.write_text(f"{before}{source}\n[run]{rest}")
    return tiny_config


@pytest.fixture
def start(config, tmp_path):
    """Train with overrides into a named folder; gives the folder."""

    def run(folder, *overrides):
        path = tmp_path / folder
        impatient = ("data.stall_timeout_s=0.3", "data.deadline_s=1.5", f"run.folder={path}")
        settings = read_settings(Settings, config, [*impatient, *overrides])
        assert pretrain(settings, Console(quiet=True)) == 0
        return path

    return run


def stop_after(monkeypatch, step):
    """Ask a run of this process to stop when a step is done."""

    def stopping(*args, **kwargs):
        for event in train(*args, **kwargs):
            if event.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield event

    monkeypatch.setattr("summerlm.recipes.pretrain.train", stopping)


def hashes(folder):
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    return {row["step"]: (row["loss"], row["batch_sha"]) for row in rows}


def incidents(folder):
    path = folder / "incidents.jsonl"
    return [row["reason"] for row in read_rows(path)] if path.exists() else []


def test_the_hub_and_its_mirror_give_the_same_run(hub, start, tmp_path):
    remote = start("remote")
    local = start("local", f"data.mirror={tmp_path / 'hub'}")
    assert hashes(remote) == hashes(local)
    assert len(hashes(remote)) == 12
    (pinned,) = json.loads((remote / "data.lock.json").read_text())["sources"]
    assert pinned["revision"] == hub.commit("owner/texts")


def test_a_run_may_move_to_a_mirror_and_back(hub, start, tmp_path, monkeypatch):
    """The mirror doesn't know the commit: the files' hashes tell that they are the same."""
    clean = hashes(start("clean"))
    mirror = f"data.mirror={tmp_path / 'hub'}"
    stop_after(monkeypatch, 4)
    start("run")
    stop_after(monkeypatch, 8)
    folder = start("run", mirror)
    assert len(hashes(folder)) == 8
    stop_after(monkeypatch, 0)
    assert hashes(start("run")) == clean


def test_faults_that_pass_change_no_batch(hub, start):
    clean = hashes(start("clean"))
    hub.script("status", status=429, headers={"Retry-After": "0"}, match=".parquet", times=3)
    for kind in ("status", "cut", "reset", "stall"):
        hub.script(kind, match=".parquet", times=3, chance=0.2)
    faulty = start("faulty", "data.deadline_s=20")
    assert len(hub.applied) >= 8
    assert hashes(faulty) == clean
    assert len(incidents(faulty)) >= 3
    assert all(".parquet" in line for line in incidents(faulty))


def fail_after(hub, requests, **fault):
    """Let the hub work for some requests of texts, and fail from then on."""
    seen = len(hub.asked("cdn"))

    def watch():
        while len(hub.asked("cdn")) < seen + requests and not hub.closing.is_set():
            time.sleep(0.005)
        hub.script(times=10**6, **fault)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize("fault", [{"kind": "stall"}, {"kind": "status", "status": 503}])
def test_a_hub_that_goes_down_is_waited_for_then_the_run_is_saved(hub, start, tmp_path, fault):
    settings = ("data.open_documents=1", "checkpoint.every_steps=100")
    clean = hashes(start("alone", *settings))
    fail_after(hub, 14, match=".parquet", **fault)
    began = time.monotonic()
    with pytest.raises(SourceDownError, match=r"\.parquet"):
        start("down", *settings)
    assert time.monotonic() - began < 30
    folder = tmp_path / "down"
    made = hashes(folder)
    assert 0 < len(made) < 12
    assert (folder / "checkpoints" / f"step-{len(made):08d}").is_dir()
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["tokens"] == len(made) * 256
    hub.behave()
    assert hashes(start("down", *settings)) == clean


def test_a_vanished_commit_stops_the_run_naming_the_shard(hub, start, tmp_path):
    folder = tmp_path / "run"
    fail_after(hub, 24, kind="status", match=".parquet", status=404)
    with pytest.raises(DataChangedError, match=r"\.parquet.*gone"):
        start("run", "data.open_documents=1")
    assert list((folder / "checkpoints").glob("step-*"))


def test_a_moved_branch_changes_nothing_for_a_run_that_has_its_lock(hub, start, tmp_path):
    clean = hashes(start("clean"))
    fail_after(hub, 14, kind="status", match=".parquet")
    with pytest.raises(SourceDownError):
        start("run")
    hub.behave()
    (tmp_path / "hub" / "owner" / "texts" / "9.parquet").write_bytes(
        (tmp_path / "hub" / "owner" / "texts" / "0.parquet").read_bytes()
    )
    assert hashes(start("run")) == clean
    assert hashes(start("anew")) != clean


@pytest.mark.parametrize(
    ("key", "value"), [("revision", "v2"), ("data_dir", "more"), ("files", "0.parquet")]
)
def test_a_lock_is_refused_for_files_that_it_was_not_made_of(hub, config, tmp_path, key, value):
    """Pinned files are read without a look at the hub, so what was asked for must be pinned."""
    run = f"run.folder={tmp_path / 'run'}"
    lock_data(read_settings(Settings, config, [run]), None)
    other = read_settings(Settings, config, [run, f"data.sources.text.{key}={value}"])
    with pytest.raises(DataChangedError, match=f"source text: .* was .* and is {value}"):
        lock_data(other, None)


def test_faults_at_the_opening_are_recorded_whoever_makes_the_batches(hub, start):
    hub.script("status", match="/tree/")
    (line,) = incidents(start("run", "data.workers=1", "data.deadline_s=20"))
    assert "/tree/" in line


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_opening_of_data(hub, config, tmp_path, number):
    """Nothing is made yet: it must not last until a store that is down is given up."""
    hub.script("status", match="/tree/", times=10**6)
    settings = read_settings(
        Settings, config, [f"run.folder={tmp_path / 'run'}", "data.deadline_s=50"]
    )
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    began = time.monotonic()
    code = pretrain(settings, Console(quiet=True))
    assert code == (0 if number is signal.SIGTERM else 75)
    assert time.monotonic() - began < 10


def test_a_damaged_part_stops_or_is_counted_as_the_source_says(hub, start, tmp_path, config):
    path = tmp_path / "hub" / "owner" / "texts" / "1.parquet"
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + column.total_compressed_size] = os.urandom(column.total_compressed_size)
    path.write_bytes(data)
    with pytest.raises(SourceDownError, match=r"1\.parquet: row group 1: damaged"):
        start("stop")
    text = config.read_text()
    config.write_text(text.replace('licence = "CC0-1.0"', 'licence = "c"\non_damage = "skip"'))
    skipped = start("skip", "train.budget_tokens=12288")
    dropped = json.loads((skipped / "ledger.json").read_text())["sources"]["text"]["dropped"]
    assert dropped["damaged part of a file"] >= 3
    assert any("1.parquet: row group 1" in line for line in incidents(skipped))


def test_a_signal_ends_the_wait_for_a_hub_that_is_down(hub, config, tmp_path):
    """A real process, its reads by ranges; SIGTERM while it waits: saved, exit 0, at once."""
    folder = tmp_path / "run"
    code = (
        "from summerlm.data.shards import parquet; "
        "parquet.WHOLE_BYTES = 0; parquet.TAIL_BYTES = 64; "
        "from summerlm.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "train", str(config), f"run.folder={folder}"]
    fail_after(hub, 24, kind="stall", match=".parquet")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while "stall" not in hub.applied and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert time.monotonic() - asked < 10
    made = hashes(folder)
    assert made
    assert (folder / "checkpoints" / f"step-{len(made):08d}").is_dir()


def test_a_source_without_licence_is_not_trained_on(hub, start, config):
    config.write_text(config.read_text().replace('licence = "CC0-1.0"\n', ""))
    with pytest.raises(UsageError, match=r"sources\.text: no licence"):
        start("run")
    assert not hub.requests
