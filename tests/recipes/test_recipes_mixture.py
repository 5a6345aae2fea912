"""The shipped presets at toy width, on all five sources of the stand-in data."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from summerlm.checkpoint.store import Store, read_tensors
from summerlm.core.record import read_rows

ROOT = Path(__file__).parent.parent.parent
TOY = {
    "15m": ["model.width=32", "model.layers=2", "model.mlp_hidden=48", "model.head_dim=8"],
    "summer-4b": [
        *("model.width=32", "model.layers=2", "model.mlp_hidden=48", "model.head_dim=8"),
        *("model.heads=4", "model.kv_heads=4", "parallel.compile=false"),
    ],
}
SOURCES = ["web", "code", "books", "arxiv", "instructions"]


def steps_of(folder):
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    return {row["step"]: (row["loss"], row["batch_sha"]) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("preset", TOY)
def test_a_preset_stopped_half_way_ends_as_its_twin(preset, stand_in_data, tmp_path):
    overrides = [
        f"data.mirror={stand_in_data}/hub",
        *("model.context=256", "train.batch_tokens=6144", "data.lanes=24"),
        *("train.budget_tokens=98304", "checkpoint.every_steps=4"),
        *("parallel.micro_batch_rows=8", "validation.characters_per_source=4000"),
        *TOY[preset],
    ]

    def start(name):
        command = [sys.executable, "-m", "summerlm", "train", str(ROOT / f"configs/{preset}.toml")]
        command += [f"run.folder={tmp_path / name}", *overrides]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert start("twin").wait(timeout=250) == 0
    process = start("stopped")
    while len(steps_of(tmp_path / "stopped")) < 7 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    stopped = max(steps_of(tmp_path / "stopped"))
    assert 7 <= stopped < 16
    assert start("stopped").wait(timeout=250) == 0

    assert steps_of(tmp_path / "stopped") == steps_of(tmp_path / "twin")
    assert list(steps_of(tmp_path / "twin")) == list(range(1, 17))
    rows = read_rows(tmp_path / "stopped" / "metrics.jsonl")
    assert [row["resumed_from"] for row in rows if row["kind"] == "resume"] == [stopped]
    weights = [
        read_tensors(
            Store(tmp_path / name / "checkpoints", pytest.fail).latest() / "model.safetensors"
        )
        for name in ("twin", "stopped")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ledger = json.loads((tmp_path / "stopped" / "ledger.json").read_text())
    assert list(ledger["sources"]) == SOURCES
    assert ledger["tokens"] == 98304
    (check,) = [row for row in rows if row["kind"] == "validation"]
    assert list(check["bits_per_byte_by_source"]) == SOURCES
