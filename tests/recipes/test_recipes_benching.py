"""`summerlm bench`: what it measures, what it leaves behind, and what it refuses."""

import io
import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from ranks import run_ranks
from rich.console import Console

from summerlm.core.config import read_settings
from summerlm.core.errors import UsageError
from summerlm.core.hardware import ACCELERATORS
from summerlm.plan.count import flops_per_token, flops_per_token_full
from summerlm.recipes import benching, benching_parts
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings
from summerlm.train.step import Stepper

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer steps; the number that is published stands in the code."""
    assert benching_parts.MEASURED >= 20
    for name, value in {"WARM_UP": 1, "MEASURED": 3, "DATA_SECONDS": 0.0, "WRITTEN": 6}.items():
        monkeypatch.setattr(benching_parts, name, value)


@pytest.fixture
def measure(tiny_config):
    """Measure parts of the tiny run."""

    def run(*only, overrides=()):
        return benching.bench(tiny_config, overrides, only, QUIET)

    return run


def assert_spread(found, repeats):
    assert found.keys() == {"median", "lowest", "highest", "all"}
    assert len(found["all"]) == repeats
    assert 0 <= found["lowest"] <= found["median"] <= found["highest"]


def test_everything_is_measured_and_nothing_is_left(measure, tiny_config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = measure(overrides=["optim.peak_lr=0.02"])
    assert sorted(tmp_path.rglob("*")) == before  # no run folder, no checkpoint, no trace
    assert {"date", "command", "commit", "hardware", "versions"} <= found.keys()
    assert found["config"] == str(tiny_config)
    assert (found["overrides"], found["ranks"]) == (["optim.peak_lr=0.02"], 1)
    json.dumps(found, allow_nan=False)

    step, settings = found["step"], read_settings(Settings, tiny_config)
    assert_spread(step["seconds"], 3)
    assert step["tokens"] == 256
    assert step["tokens_per_second"] == 256 / step["seconds"]["median"]
    ways = {"causal": flops_per_token, "full": flops_per_token_full}
    for way, count in ways.items():
        flops = step["tokens_per_second"] * count(settings.model)
        assert step["flops_per_second"][way] == pytest.approx(flops)
    assert step["mfu"] == {"causal": None, "full": None}  # nobody knows this CPU's peak
    assert step["memory_bytes"] > 1e8
    assert_spread(step["data_wait_s"], 3)

    parts = found["parts"]
    assert parts["steps"] == 5
    assert sum(row["seconds"] for row in parts["parts"]) == pytest.approx(parts["seconds"])

    data, saved, text = (found[name] for name in ("data", "checkpoint", "generation"))
    assert data["tokens_per_second"] == pytest.approx(data["tokens"] / data["seconds"])
    assert data["tokens"] >= 3 * 256
    assert saved["bytes"] > 100_000
    for name in ("stall_s", "seconds", "load_s"):
        assert_spread(saved[name], 3)
    assert saved["stall_s"]["median"] < saved["seconds"]["median"]
    assert text["tokens"] == 5  # and one drawn from the prompt
    for name in ("prompt_tokens_per_second", "tokens_per_second"):
        assert_spread(text[name], 3)


def test_a_known_peak_gives_a_share_of_it(measure, monkeypatch):
    monkeypatch.setattr(benching_parts, "peak_flops", lambda device: ACCELERATORS[0].peak_flops)
    step = measure("step")["step"]
    assert step["mfu"]["causal"] == step["flops_per_second"]["causal"] / 989e12
    assert step["mfu"]["full"] > step["mfu"]["causal"] > 0


def test_a_slow_step_is_a_slow_figure(measure, monkeypatch):
    call = Stepper.__call__

    def slow(self, *args, **kwargs):
        time.sleep(0.3)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", slow)
    found = measure("step", "parts")
    assert found.keys() & set(benching.PARTS) == {"step", "parts"}
    assert found["step"]["seconds"]["lowest"] > 0.3
    assert found["step"]["tokens_per_second"] < 256 / 0.3
    other = {row["part"]: row["seconds"] for row in found["parts"]["parts"]}["other"]
    assert other > 0.3  # it is in no part


def test_steps_are_made_beside_a_save(measure, monkeypatch):
    call, made = Stepper.__call__, []

    def counted(self, *args, **kwargs):
        made.append(1)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", counted)
    measure("checkpoint")
    assert len(made) >= 2 * benching_parts.REPEATS  # one before each, at least one beside it


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_not_touched(measure, tiny_config, tmp_path):
    assert pretrain(read_settings(Settings, tiny_config), QUIET) == 0
    files = files_of(tmp_path / "run")
    measure("checkpoint")
    assert files_of(tmp_path / "run") == files


def test_an_unknown_part_is_refused(measure):
    with pytest.raises(UsageError, match="--only speed: known parts are step, parts, data"):
        measure("speed")


def test_a_request_to_stop_leaves_nothing(measure, monkeypatch, tmp_path):
    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    monkeypatch.setattr(benching_parts.Bench, "data", interrupted)
    with pytest.raises(SystemExit) as left:
        measure("data", "checkpoint")
    assert left.value.code == 130
    assert not list(tmp_path.glob("bench-*"))


def test_a_person_reads_each_figure_with_its_unit(measure):
    found = measure()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(benching.show(found))
    text = console.export_text()
    for name, _ in benching.lines(found):
        assert name in text
    assert "tokens/s" in text
    assert "the step" in text


def on_ranks(ranks, config):
    benching.join = lambda *_: nullcontext(ranks)  # it has joined
    return benching.bench(config, ["parallel.shard_ranks=all"], [], QUIET)


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_measure_together(tiny_config, tmp_path):
    found, none = run_ranks(on_ranks, tiny_config)
    assert none is None
    assert found["ranks"] == 2
    assert found.keys() >= set(benching.PARTS)
    assert found["checkpoint"]["bytes"] > 100_000
    assert not list(tmp_path.glob("bench-*"))


def test_a_source_that_may_be_read_once_is_read_as_often_as_it_takes(tiny_config):
    once = ["data.sources.text.max_epochs=1"]
    changes = benching._changes(read_settings(Settings, tiny_config, once), Path("folder"))
    changed = read_settings(Settings, tiny_config, [*once, *changes])
    assert changed.data.sources["text"].max_epochs is None
    assert changed.train.budget_tokens == benching_parts.NEEDED * changed.train.batch_tokens
