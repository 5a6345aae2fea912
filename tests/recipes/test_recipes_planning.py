"""The plan as a user gets it: contract, sums, budgets, errors."""

import json
import re

import pytest
from test_recipes_cli import ROOT, command  # noqa: F401

from summerlm.checkpoint.load import newest_good
from summerlm.core.config import read_settings
from summerlm.plan.count import flops_per_token, flops_per_token_full, parameters
from summerlm.recipes import planning
from summerlm.recipes.budgeting import fit_budget
from summerlm.recipes.planning import plan
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.probing import Probed
from summerlm.recipes.room import Room, largest
from summerlm.recipes.settings import Settings
from summerlm.recipes.terms import Terms

CONTRACT = {
    "parameters": int,
    "parameters_padded": int,
    "flops_per_token": int,
    "context": int,
    "steps": int,
    "tokens": int,
    "days": type(None),
    "dollars": type(None),
}


def test_contract_of_json(command, tiny_config):  # noqa: F811
    code, out, _ = command("plan", tiny_config, "--json", "-")
    assert code == 0
    facts = json.loads(out)
    assert {key: type(facts[key]) for key in CONTRACT} == CONTRACT
    memory = facts["memory"]
    parts = [v for k, v in memory.items() if k.endswith("_bytes") and k != "total_bytes"]
    assert memory["total_bytes"] == sum(parts) > 0
    for key in ("probe", "fits", "fit", "tokens_per_second", "basis"):
        value = facts[key]
        assert value is None


def test_a_person_reads_tables(command, tiny_config):  # noqa: F811
    code, out, _ = command("plan", tiny_config, "--hardware", "h100", "--count", 4, "--price", 2)
    assert code == 0
    for words in ("parameters without embeddings", "activations", "every steps", "text", "limit"):
        assert words in out
    assert "None" not in out
    assert "40 %" in out
    assert "longer than the run" in out, "twelve tiny steps"
    code, out, _ = command("plan", tiny_config)
    assert "unknown: needs --hardware or --probe" in out


def test_counting_attention_in_full_differs_by_8_percent():
    """The figure of issue 5, at 4096."""
    model = read_settings(Settings, ROOT / "configs/summer-4b.toml").model
    ratio = flops_per_token_full(model) / flops_per_token(model)
    assert ratio == pytest.approx(1.083, abs=0.001)
    # 6 for each parameter that multiplies, 12 for each score and channel
    everything = parameters(model, padded=True) - model.padded_vocabulary * 3072
    assert flops_per_token_full(model) == 6 * everything + 12 * 32 * 32 * 96 * 4096
    tied = model.model_copy(update={"tied_embeddings": True})
    assert flops_per_token_full(tied) == flops_per_token_full(model)


def test_a_checkpoint_is_as_large_as_planned(tiny_settings, tmp_path):
    from rich.console import Console

    assert pretrain(tiny_settings, Console(quiet=True)) == 0
    folder = newest_good(tmp_path / "run")
    tensors = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    size = plan(tiny_settings)["checkpoint"]["bytes"]
    assert size <= tensors <= size + 20_000  # headers


def test_data_by_weights(tiny_settings):
    source = tiny_settings.data.sources["text"]
    sources = {
        "a": source.model_copy(update={"weight": 3}),
        "b": source.model_copy(update={"weight": 1}),
    }
    data = tiny_settings.data.model_copy(update={"sources": sources})
    facts = plan(tiny_settings.model_copy(update={"data": data}), Terms(bytes_per_token=5))
    assert facts["data"]["a"] == {"tokens": 2304, "text_bytes": 11520}
    assert facts["data"]["b"]["tokens"] == 768


def test_saves_by_hand(tiny_settings):
    terms = Terms("h100", count=2, mfu=0.5, mtbf_hours=100)
    facts = plan(tiny_settings, terms)
    saves = facts["checkpoint"]
    assert saves["hours_between_failures"] == 50
    assert saves["save_seconds"] == pytest.approx(saves["bytes"] / 2 / 1e9)
    assert saves["interval_seconds"] == pytest.approx((2 * saves["save_seconds"] * 180_000) ** 0.5)
    seconds = 3072 * flops_per_token(tiny_settings.model) / (2 * 0.5 * 989e12)
    assert facts["days"] == pytest.approx(seconds / 86_400)
    assert saves["every_steps"] == pytest.approx(
        saves["interval_seconds"] / (seconds / 12), rel=1e-3
    )
    assert facts["tokens_per_second"] == pytest.approx(3072 / seconds)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_the_largest_that_fits_fits_and_no_larger_one(tiny_settings, rows):
    """The limit is what one size needs, to the byte: even cuts of 8 rows."""
    room = Room(tiny_settings, Terms("h100", count=1))
    need = room.footprint(rows, None).total
    assert room.largest(need)["micro_batch_rows"] == rows
    assert room.largest(need)["recompute"] is None
    less = room.largest(need - 1)
    assert less["micro_batch_rows"] < rows or less["recompute"] is not None


def test_all_rows_at_once_may_fit_where_fewer_do_not():
    """They need no sum of gradients: the one size that is not in order."""
    assert largest(8, 70, lambda rows: 60 if rows == 8 else 80) == 8
    assert largest(8, 50, lambda rows: 60 if rows == 8 else 10 * rows) == 4


def test_what_does_not_fit_is_recomputed_or_zero(tiny_settings):
    model = tiny_settings.model.model_copy(update={"layers": 12, "context": 256})
    train = tiny_settings.train.model_copy(update={"batch_tokens": 1024})
    settings = tiny_settings.model_copy(update={"model": model, "train": train})
    room = Room(settings, Terms("h100", count=1))
    full = room.footprint(1, "full").total
    assert full < room.footprint(1, "selective").total < room.footprint(1, None).total
    assert room.largest(full)["recompute"] == "full"
    assert room.largest(full)["micro_batch_rows"] == 1
    assert room.largest(full - 1)["micro_batch_rows"] == 0


def test_twice_the_shards_hold_half():
    config = ROOT / "configs/summer-4b.toml"

    def held(shards):
        overrides = [f"parallel.shard_ranks={shards}", "model.layers=4"]
        memory = Room(read_settings(Settings, config, overrides), Terms("h200", 8)).footprint(
            1, "selective"
        )
        return memory.weights, memory.gradients, memory.optimizer

    for few, many in zip(held(2), held(4), strict=True):
        assert many == pytest.approx(few / 2, rel=1e-3)


@pytest.mark.parametrize("budget", ["dollars=1000", "days=3"])
def test_a_budget_is_spent(command, budget):  # noqa: F811
    args = ("plan", ROOT / "configs/1b.toml", "--hardware", "h200", "--price", 2.31)
    code, out, err = command(*args, "--fit", budget, "--json", "-")
    assert code == 0, err
    facts = json.loads(out)
    name, amount = budget.split("=")
    assert facts[name] == pytest.approx(float(amount), rel=0.001)
    assert facts["fit"]["tokens_per_parameter"] == pytest.approx(20, rel=0.2)
    assert facts["fit"]["parameters"] == facts["parameters"]
    again = read_settings(Settings, ROOT / "configs/1b.toml", facts["fit"]["overrides"])
    assert parameters(again.model) == facts["parameters"]


def test_too_small_a_budget_names_one_that_is_enough(command):  # noqa: F811
    args = ("plan", ROOT / "configs/15m.toml", "--hardware", "mi300x", "--json", "-")
    code, _, err = command(*args, "--fit", "dollars=0.00001")
    enough = re.search(r"(dollars=\S+) is enough", err).group(1)
    code, out, err = command(*args, "--fit", enough)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["parameters"] == facts["fit"]["parameters"]
    assert "train.batch_tokens" in facts["notes"][-1]


def test_toml_is_the_overrides(tmp_path):
    path = ROOT / "configs/1b.toml"
    found = fit_budget(read_settings(Settings, path), Terms("h100", 8, price=2.0), "days=2")
    (tmp_path / "fitted.toml").write_text(f'extends = "{path}"\n{found["toml"]}\n')
    by_file = read_settings(Settings, tmp_path / "fitted.toml")
    assert by_file == read_settings(Settings, path, found["overrides"])


def test_auto_is_planned_with_the_recomputation_that_it_needs():
    """At 4.58B a row fits an H100 beside replicated weights with everything recomputed alone."""
    settings = read_settings(
        Settings,
        ROOT / "configs/summer-4b.toml",
        [
            "parallel.shard_ranks=1",
            "parallel.micro_batch_rows=none",
            "parallel.recompute=none",
            "parallel.memory=auto",
        ],
    )
    facts = plan(settings, Terms("h100", count=8))
    assert facts["fits"]["recompute"] == "full"
    assert 0 < facts["memory"]["share_of_limit"] <= 1
    assert not any("a step needs" in note for note in facts["notes"])


def test_a_probe_on_another_text_says_so(tiny_settings, monkeypatch):
    def findings(*_):
        return Probed(1.0, 100, 10, 256, (8,), 1e9, own_text=False)

    monkeypatch.setattr("summerlm.recipes.planning.probe", findings)
    facts = plan(tiny_settings, probing=True)
    assert "read Python's library" in " ".join(facts["notes"])
    assert facts["probe"]["own_text"] is False


def test_a_probe_of_a_sharded_run_says_that_it_is_of_one_process(tiny_settings, monkeypatch):
    tried = []

    def findings(settings, *_):
        tried.append(settings.parallel.shard_ranks)
        return Probed(1.0, 100, 10, 256, (8,), 1e9, own_text=True)

    monkeypatch.setattr(planning, "probe", findings)
    sharded = tiny_settings.parallel.model_copy(update={"shard_ranks": 2})
    facts = plan(tiny_settings.model_copy(update={"parallel": sharded}), probing=True)
    assert tried == [1]
    assert "one process with a whole model" in facts["notes"][-1]
    assert facts["probe"]["step_bytes"] == 90
    assert facts["probe"]["predicted_bytes"] == facts["memory"]["total_bytes"]
    assert facts["basis"]["mfu_from"] == "measured"
    assert "one process" not in " ".join(plan(tiny_settings, probing=True)["notes"])
