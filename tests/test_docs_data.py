"""docs/data.md is held to the code: its example runs, its tables are those of the code."""

import re
from pathlib import Path

import pytest
import typer
from test_docs import fenced_blocks, inline_code, options, table

from summerlm.cli_data import data
from summerlm.core import errors
from summerlm.core.config import read_settings
from summerlm.data.config import SourceConfig
from summerlm.data.rules.catalogue import GROUPS, RULES
from summerlm.data.shards import formats, rows, stores
from summerlm.recipes.data.checking import check_data
from summerlm.recipes.settings import Settings

ROOT = Path(__file__).parent.parent
PAGE = "docs/data.md"
TEXT = (ROOT / PAGE).read_text()
BLOCKS = [content for language, content in fenced_blocks(TEXT) if language == "toml"]


def test_five_lines_bring_one_s_own_text(tmp_path, tiny_text, tiny_tokenizer, monkeypatch):
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) == 5
    (tmp_path / "mine.toml").write_text(BLOCKS[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my-texts" / "deep").mkdir(parents=True)
    for text in tiny_text.iterdir():
        (tmp_path / "my-texts" / "deep" / text.name).write_bytes(text.read_bytes())
    monkeypatch.chdir(tmp_path)
    small = [f"tokenizer.name={tiny_tokenizer}", "model.vocabulary=300", "data.lanes=8"]
    facts = check_data(read_settings(Settings, Path("mine.toml"), small), 10)
    assert facts["ok"], facts
    assert [source["name"] for source in facts["sources"]] == ["mine"]
    assert facts["sources"][0]["files"] == 40


def test_own_text_gets_the_share_that_is_told(tmp_path):
    example = BLOCKS[0].replace('"*" = "none"\n', "").replace("weight = 1,", "weight = 25,")
    (tmp_path / "mine.toml").write_text(example.replace("configs/", f"{ROOT}/configs/"))
    sources = read_settings(Settings, tmp_path / "mine.toml").data.sources
    weights = {name: source.weight for name, source in sources.items()}
    assert weights["mine"] / sum(weights.values()) == 1 / 5


def test_the_example_of_a_source_is_valid(tmp_path):
    base = f'extends = "{ROOT}/configs/15m.toml"\n'
    (tmp_path / "papers.toml").write_text(base + BLOCKS[1])
    papers = read_settings(Settings, tmp_path / "papers.toml").data.sources["papers"]
    assert papers.where == ("metadata.license in Public Domain, CC0",)


def test_every_setting_of_a_source_is_told():
    told = set(re.findall(r"\w+", TEXT))
    assert set(SourceConfig.model_fields) <= told


def test_the_table_of_rules_is_the_catalogue():
    told = {name.strip("`"): what.replace("`", "") for name, what in table(PAGE, "Rules")}
    assert told == RULES
    assert list(told) == list(RULES)
    assert set(GROUPS) <= set(inline_code(TEXT))


def test_every_reason_without_text_is_told():
    reasons = [value.reason for value in vars(rows).values() if isinstance(value, rows.Dropped)]
    assert len(reasons) >= 7
    plain = " ".join(TEXT.split())
    assert [reason for reason in reasons if reason not in plain] == []


def test_every_command_and_option_is_told():
    command = typer.main.get_command(data)
    told = {row[0].strip("`"): row[0] for row in table(PAGE, "Commands")}
    names = {name.split()[2]: name for name in told}
    assert set(names) == set(command.commands)
    for name, words in names.items():
        known = {o for o in options(command.commands[name]) if o.startswith("--")} - {"--help"}
        assert set(re.findall(r"--[a-z]+", words)) == known


def test_exit_codes_are_those_of_the_errors():
    codes = {str(c.exit_code) for c in vars(errors).values() if hasattr(c, "exit_code")}
    for _, _, told in table(PAGE, "Faults"):
        number = re.match(r"\d+", told)
        assert told == "-" or number[0] in codes


def test_kinds_of_files_are_those_that_are_read():
    told = set(
        re.findall(r"`(\.\w+)`", " ".join(r[0] for r in table(PAGE, "Where text comes from")))
    )
    assert told == {".parquet", ".jsonl", ".json", ".ndjson", ".gz", ".zst"}
    assert {f".{name.split('.')[1]}" for name in formats._JSON_LINES} == told - {
        ".parquet",
        ".gz",
        ".zst",
    }
    assert set(stores.EXTRAS.values()) <= set(re.findall(r"summerlm\[(\w+)\]", TEXT))


@pytest.mark.parametrize("name", ["summer-4b", "summer-4b-original-data"])
def test_the_mixtures_are_those_of_the_configurations(name):
    sources = read_settings(Settings, ROOT / f"configs/{name}.toml").data.sources
    told = {row[0]: row for row in table(PAGE, "The mixtures") if len(row) == 5}
    assert set(sources) == set(told)
    for source, settings in sources.items():
        assert told[source][1] == f"{settings.weight:g} %"
        assert f"[{settings.hub}]" in TEXT
        if name == "summer-4b":
            assert f"[{settings.hub}]" in told[source][2]


def test_what_is_told_of_budgets_follows():
    settings = read_settings(Settings, ROOT / "configs/summer-4b.toml")
    tokens = settings.train.budget_tokens
    share = {name: source.weight / 100 * tokens for name, source in settings.data.sources.items()}
    assert tokens == 80e9
    assert (share["web"], share["books"], share["instructions"]) == (48e9, 8e9, 4e9)
    assert round(share["books"] / 4.9e9, 1) == 1.6
