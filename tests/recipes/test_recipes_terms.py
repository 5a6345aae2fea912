"""What a plan rests on, what it refuses, and what it says beside its figures."""

import json
import sys
import threading

import pytest
from test_recipes_cli import ROOT, command  # noqa: F401

from summerlm import cli_plan
from summerlm.core.config import read_settings
from summerlm.recipes import room as room_module
from summerlm.recipes.planning import plan
from summerlm.recipes.room import Room
from summerlm.recipes.settings import Settings
from summerlm.recipes.terms import Terms


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--hardware", "h200"], ("h200", 8, 0.4, "default", None, None)),
        (["--hardware", "h200", "--price", "2"], ("h200", 8, 0.4, "default", 2, "stated")),
        (["--hardware", "mi300x"], ("mi300x", 8, 0.4, "default", 2.31, "table")),
        (["--hardware", "mi300x", "--mfu", ".3"], ("mi300x", 8, 0.3, "stated", 2.31, "table")),
        (["--hardware", "a100", "--count", "2"], ("a100", 2, 0.4, "default", None, None)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_days_say_what_they_rest_on(command, tiny_config, args, expected):  # noqa: F811
    code, out, err = command("plan", tiny_config, *args, "--json", "-")
    assert code == 0, err
    basis = json.loads(out)["basis"]
    names = ("hardware", "count", "mfu", "mfu_from", "price", "price_from")
    assert tuple(basis[name] for name in names) == pytest.approx(expected)
    assert "data sheet" in basis["source"]
    assert basis["flops_per_second"] == basis["mfu"] * basis["peak_flops_per_second"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mfu", "1.5"], "--mfu 1.5: should be above 0 and at most 1"),
        (["--mtbf-hours", "0"], "--mtbf-hours 0: should be above 0"),
        (["--price", "-1"], "--price -1: should be above 0"),
        (["--bytes-per-token", "nan"], "--bytes-per-token nan: should be above 0"),
        (["--hardware", "abacus"], "known: h200"),
        (["--fit", "dollars=9"], "--fit needs --hardware"),
        (["--fit", "dollars=9", "--hardware", "h200"], "--fit dollars needs --price"),
        (["--fit", "weeks=9", "--hardware", "h200"], "write dollars=1000 or days=3"),
        (["--fit", "days=soon", "--hardware", "h200"], "write dollars=1000 or days=3"),
        (["--fit", "days=1e-12", "--hardware", "h200"], "too small a budget"),
        (["--fit", "days=1", "--probe"], "take one"),
        (["--probe", "--hardware", "h200", "run.device=cpu"], "leave --hardware out"),
        (["--probe", "tokenizer.name=gone"], "gone"),
        (["--probe", "parallel.float8=true", "run.device=cpu"], "parallel.float8 = true"),
        (["parallel.attention=cudnn", "run.device=cpu"], "needs an NVIDIA GPU"),
        (["--hardware", "h200", "--count", "8", "parallel.shard_ranks=3"], "must divide"),
        (["--price", "inf", "--hardware", "h200"], "--price inf: should be finite"),
        (["--price", "0", "--hardware", "h200"], "leave it out to see no dollars"),
        (["--count", "4"], "--count needs --hardware"),
        (["--mfu", "0.3"], "--mfu needs --hardware"),
        (["--price", "3"], "--price needs --hardware or --probe"),
        (["--mfu", "0.3", "--probe", "--hardware", "h200"], "--mfu and --probe: take one"),
        (["--hardware", "a100", "parallel.float8=true"], "a100 has no fp8 products"),
        (
            ["--hardware", "h200", "parallel.float8=true", "train.precision=float32"],
            "contradicts train.precision",
        ),
        (["--hardware", "mi300x", "parallel.attention=cudnn"], "mi300x has no such one"),
        (["--hardware", "a100", "parallel.attention=flash3"], "a100 has no such one"),
        (["--fit", "days=1", "--fit", "dollars=9", "--hardware", "h200"], "take one"),
        (["--fit", "dollars=-5", "--hardware", "mi300x"], "number should be above 0"),
        (["--fit", "days=inf", "--hardware", "h200"], "above 0 and finite"),
        (["parallel.attention=flash3", "run.device=cpu"], "needs an NVIDIA GPU"),
        (["parallel.attention=cudnn", "--probe", "run.device=cpu"], "needs an NVIDIA GPU"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes(command, tiny_config, args, words):  # noqa: F811
    code, _, err = command("plan", tiny_config, *args)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_notes_say_what_would_go_wrong(tiny_settings):
    def said(terms, **parallel):
        changed = tiny_settings.parallel.model_copy(update=parallel)
        settings = tiny_settings.model_copy(update={"parallel": changed})
        return " ".join(plan(settings, terms)["notes"])

    assert "a step needs" not in said(Terms("h100", count=1))
    assert "don't divide data.lanes (4)" in said(Terms("h100", count=3))
    assert "blocks are compiled" in said(Terms("h100", count=1), compile=True)
    assert "float32: MFU is a share" in said(Terms("h100", count=1)), "the tiny run's precision"
    train = tiny_settings.train.model_copy(update={"precision": "auto"})
    tiny_settings = tiny_settings.model_copy(update={"train": train})
    assert said(Terms("h100", count=1)) == ""
    assert "what fp8 gains isn't in it" in said(Terms("h100", count=1), float8=True)
    big = read_settings(
        Settings,
        ROOT / "configs/summer-4b.toml",
        ["parallel.shard_ranks=1"],
    )
    facts = plan(big, Terms("h100", count=8))
    assert "a step needs" in facts["notes"][0]
    assert "parallel.micro_batch_rows=4 with parallel.recompute=full fits" in facts["notes"][0]
    assert facts["fits"]["recompute"] == "full"
    facts = plan(big, Terms("h100", count=4))  # two micro-batches add up
    assert facts["fits"]["micro_batch_rows"] == 0
    assert "with everything recomputed; parallel.shard_ranks=all would do" in facts["notes"][0]


@pytest.mark.parametrize("count", [2])
def test_where_nothing_fits_the_fewest_devices_are_named(tiny_settings, monkeypatch, count):
    """Memory is just what sharing over so many needs; one that is shared so already is told."""
    model = tiny_settings.model.model_copy(update={"layers": 16, "width": 128, "heads": 4})

    def made(shards):
        parallel = tiny_settings.parallel.model_copy(
            update={"shard_ranks": shards, "recompute": "full"}
        )
        return tiny_settings.model_copy(update={"parallel": parallel, "model": model})

    room = Room(made("all"), Terms("h100", count=count))
    need = room.footprint(1, "full").total
    assert need < Room(made("all"), Terms("h100", count=count // 2)).footprint(1, "full").total
    monkeypatch.setattr(room_module, "USABLE", (need + 1) / (79 * 2**30))
    note = plan(made(1), Terms("h100", count=1))["notes"][0]
    assert f"not one row fits, with everything recomputed; --count {count} with" in note
    note = plan(made(1), Terms("h100", count=count))["notes"][0]
    assert "recomputed; parallel.shard_ranks=all would do" in note
    monkeypatch.setattr(room_module, "USABLE", 1e-6)
    note = plan(made("all"), Terms("h100", count=count))["notes"][0]
    assert f"and a model shared over {count}, and sharing" in note
    assert "any number of devices that divides data.lanes (4) isn't enough" in note


def test_who_waits_at_a_terminal_is_told_why(monkeypatch, capsys):
    monkeypatch.setattr(cli_plan, "PATIENCE_S", 0.0)
    for terminal, told in ((True, "counting memory ...\n"), (False, "")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with cli_plan._interruptible("counting memory"):
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer):
                    thread.join(10)
        assert capsys.readouterr().err == told
