"""The shipped presets at toy width, on all five sources of the stand-in data."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from summerlm.checkpoint.reading import read_tensors
from summerlm.checkpoint.store import Store
from summerlm.core.config import read_settings
from summerlm.core.record import read_rows
from summerlm.data.loader import hash_steps, merge_states
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.data.locking import open_data
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.registry import load_tokenizer

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
        read_tensors(Store(tmp_path / name / "checkpoints", pytest.fail).latest(), "model")
        for name in ("twin", "stopped")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ledger = json.loads((tmp_path / "stopped" / "ledger.json").read_text())
    assert list(ledger["sources"]) == SOURCES
    assert ledger["tokens"] == 98304
    (check,) = [row for row in rows if row["kind"] == "validation"]
    assert list(check["bits_per_byte_by_source"]) == SOURCES


@pytest.mark.slow
def test_60m_with_48_lanes_is_the_same_in_every_world_and_over_8_to_3(stand_in_data, tmp_path):
    """By the command, with real workers; 8 -> 3 by the joined states of eight ranks."""
    overrides = [f"data.mirror={stand_in_data}/hub", f"run.folder={tmp_path / 'run'}"]
    settings = read_settings(Settings, ROOT / "configs/60m.toml", overrides)
    assert settings.data.lanes == 48

    def hashes(world, workers, steps):
        command = [sys.executable, "-m", "summerlm", "data", "hash", str(ROOT / "configs/60m.toml")]
        command += [*overrides, "--steps", str(steps), "--world", str(world)]
        out = subprocess.check_output([*command, "--workers", str(workers)], text=True)
        return [tuple(line.split()) for line in out.splitlines()]

    alone = hashes(1, 2, 4)
    assert [number for number, _ in alone] == ["1", "2", "3", "4"]
    for world, workers in [(2, 1), (3, 1), (4, 1), (8, 1)]:
        assert hashes(world, workers, 2) == alone[:2]

    sources, tokenizer = open_data(settings, write=False), load_tokenizer(settings.tokenizer.name)

    def ranks(world, state):
        open_rank = partial(open_loader, settings, sources, tokenizer, state, workers=0)
        return [open_rank(rank=rank, world=world) for rank in range(world)]

    eight = ranks(8, None)
    state = merge_states([[next(rank), next(rank)][-1].state for rank in eight])
    three = islice(hash_steps(ranks(3, json.loads(json.dumps(state)))), 2)
    assert [(str(number), sha) for number, sha in three] == alone[2:]
