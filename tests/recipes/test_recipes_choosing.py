"""parallel.memory = "auto": what is chosen, kept, told and refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from rich.console import Console

from summerlm.core.config import read_settings
from summerlm.core.errors import DeviceMemoryError, UsageError
from summerlm.core.files import RunFolder
from summerlm.core.ranks import ALONE
from summerlm.core.record import read_rows
from summerlm.recipes import choosing, trying
from summerlm.recipes.choosing import KEPT, _sizes, choose, settle_memory
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings
from summerlm.recipes.trying import Trial

CPU = torch.device("cpu")


def auto(settings, **parallel):
    changed = settings.parallel.model_copy(update={"memory": "auto", **parallel})
    return settings.model_copy(update={"parallel": changed})


@pytest.mark.parametrize("key", ["micro_batch_rows=2", "recompute=full"])
def test_auto_leaves_nothing_to_set_by_hand(tiny_config, key):
    name = key.split("=")[0]
    with pytest.raises(UsageError, match=f"memory = 'auto' chooses {name}.*'none'"):
        read_settings(Settings, tiny_config, ["parallel.memory=auto", f"parallel.{key}"])


def test_without_auto_nothing_is_tried(tiny_settings):
    assert settle_memory(tiny_settings, None, ALONE, CPU, None) == (tiny_settings, None)


def test_sizes_are_halved_and_cut_evenly():
    assert _sizes(32, 32) == [32, 16, 8, 4]
    assert _sizes(5, 5) == [5, 3, 2, 1]
    assert _sizes(4, 12) == [4, 2, 1]
    assert _sizes(1, 12) == [1]


def test_the_fastest_is_taken(tiny_settings, monkeypatch):
    seconds = {8: 3.0, 4: 1.0, 2: 2.0, 1: 4.0}
    monkeypatch.setattr(Trial, "seconds_per_row", lambda self, rows, own, recompute: seconds[rows])
    found = choose(auto(tiny_settings), ALONE, CPU, None, {})
    assert (found.micro_batch_rows, found.recompute) == (4, None)
    assert "8: 3e+03 ms" in found.why


@pytest.mark.parametrize(("rows", "recompute"), [(4, None), (2, "selective"), (1, "full")], ids=str)
def test_recomputation_only_where_memory_needs_it(tiny_settings, monkeypatch, rows, recompute):
    """100 bytes are free; a row needs so many, by recomputation."""
    needs = {
        None: {None: 25, "selective": 15, "full": 10},
        "selective": {None: 101, "selective": 50, "full": 10},
        "full": {None: 400, "selective": 200, "full": 100},
    }[recompute]

    def need(self, size, own, what):
        return size * needs[what]

    monkeypatch.setattr(choosing, "_limit", lambda ranks, device: 100)
    monkeypatch.setattr(Trial, "predict", need)
    monkeypatch.setattr(Trial, "seconds_per_row", lambda self, size, own, what: 1 / size)
    found = choose(auto(tiny_settings), ALONE, CPU, None, {})
    assert (found.micro_batch_rows, found.recompute) == (rows, recompute)


def test_nothing_fits(tiny_settings, monkeypatch):
    monkeypatch.setattr(choosing, "free_memory", lambda device: 1000)
    with pytest.raises(DeviceMemoryError, match="one row of 32 needs"):
        choose(auto(tiny_settings), ALONE, CPU, None, {})


def test_a_gpu_takes_the_most_that_fit_after_a_correction(tiny_settings, monkeypatch):
    """The allocator sees half more than predicted: two thirds of the rows fit."""
    monkeypatch.setattr(Trial, "predict", None)
    device = SimpleNamespace(type="cuda")
    trial = Trial(auto(tiny_settings), ALONE, device, None)

    def predict(size, own, what):
        return int(10 * size * trial._factor.get(what, 1.0))

    monkeypatch.setattr(trial, "predict", predict)
    monkeypatch.setattr(trial, "_measure", lambda own, what, limit: 1.5)
    assert trial.largest(12, None, 60) == 4
    trial._factor.clear()
    monkeypatch.setattr(trial, "_measure", lambda own, what, limit: 1.0)
    assert trial.largest(12, None, 60) == 6


@pytest.mark.parametrize(("limit", "made"), [(10, [1]), (19, [1]), (20, [1, 2])], ids=str)
def test_a_gpu_does_not_try_what_is_predicted_not_to_fit(tiny_settings, monkeypatch, limit, made):
    trial, tried = Trial(auto(tiny_settings), ALONE, SimpleNamespace(type="cuda"), None), []
    monkeypatch.setattr(trial, "predict", lambda rows, own, what: 10 * rows)
    monkeypatch.setattr(trial, "_steps", lambda rows, *_: tried.append(rows))
    monkeypatch.setattr(trying, "peak_memory", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    assert trial.largest(12, None, limit) == limit // 10
    assert tried == made


def rows_of(folder):
    return [
        (row["step"], row["loss"], row["grad_norm"], row["batch_sha"])
        for row in read_rows(folder / "metrics.jsonl")
        if row["kind"] == "train"
    ]


def test_a_run_chooses_says_keeps_and_goes_on_with_it(tiny_settings, tmp_path, capsys):
    """Bit for bit the run that has the choice in its settings, through a stop, too."""
    settings = auto(tiny_settings)
    assert pretrain(settings, Console()) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run"
    kept = json.loads((folder / KEPT).read_text())
    rows = kept["micro_batch_rows"]
    assert f"parallel.memory: {rows} rows at once, no recomputation" in out
    assert f"{rows} at once" in out
    assert read_settings(Settings, folder / "config.toml") == settings

    run = settings.run.model_copy(update={"folder": tmp_path / "explicit"})
    explicit = settings.model_copy(
        update={
            "run": run,
            "parallel": tiny_settings.parallel.model_copy(update={"micro_batch_rows": rows}),
        }
    )
    assert pretrain(explicit, Console(quiet=True)) == 0
    assert rows_of(folder) == rows_of(tmp_path / "explicit")

    # what was kept holds, though a new trial would choose otherwise
    kept["micro_batch_rows"] = 3 if rows != 3 else 2
    (folder / KEPT).write_text(json.dumps(kept))
    for step in (8, 12):
        shutil.rmtree(folder / f"checkpoints/step-{step:08d}", ignore_errors=True)
    assert pretrain(settings, Console()) == 0
    out = capsys.readouterr().out
    assert f"{kept['micro_batch_rows']} rows at once" in out
    assert "as the run began" in out


@pytest.mark.parametrize("change", ["ranks", "compile", "device"])
def test_other_circumstances_make_another_choice(tiny_settings, tmp_path, monkeypatch, change):
    monkeypatch.setattr(Trial, "seconds_per_row", lambda self, rows, own, recompute: rows)
    settings = auto(tiny_settings)
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    found, _ = settle_memory(settings, folder, ALONE, CPU, None)
    assert found.parallel.micro_batch_rows == 1
    kept = json.loads((folder.path / KEPT).read_text())
    kept["micro_batch_rows"] = 7
    (folder.path / KEPT).write_text(json.dumps(kept))
    assert settle_memory(settings, folder, ALONE, CPU, None)[0].parallel.micro_batch_rows == 7
    kept["circumstances"][change] = "another"
    (folder.path / KEPT).write_text(json.dumps(kept))
    assert settle_memory(settings, folder, ALONE, CPU, None)[0].parallel.micro_batch_rows == 1


def _settle(ranks, settings):
    found, _ = settle_memory(settings, RunFolder(settings.run.folder), ranks, CPU, None)
    return found.parallel.micro_batch_rows, found.parallel.recompute


@pytest.mark.ranks
@pytest.mark.parametrize("shard_ranks", [1, 2], ids=["replicated", "sharded"])
def test_all_ranks_agree(tiny_settings, tmp_path, shard_ranks):
    (tmp_path / "run").mkdir()
    first, second = run_ranks(_settle, auto(tiny_settings, shard_ranks=shard_ranks))
    assert first == second
    kept = json.loads((tmp_path / "run" / KEPT).read_text())
    assert first == (kept["micro_batch_rows"], kept["recompute"])
    assert kept["circumstances"]["ranks"] == 2
