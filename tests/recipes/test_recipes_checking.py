"""Sources tried before training: facts, problems, warnings, exit codes."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from summerlm.core.config import read_settings
from summerlm.recipes.data.checking import check_data
from summerlm.recipes.data.describing import show_check
from summerlm.recipes.data.locking import lock_data
from summerlm.recipes.settings import Settings


def write_texts(path, texts):
    pq.write_table(pa.table({"text": texts}), path)


@pytest.fixture
def folder(tmp_path):
    """A folder of one good parquet file."""
    (tmp_path / "own").mkdir()
    write_texts(tmp_path / "own" / "a.parquet", [f"{n} birds sing. " * (n + 20) for n in range(99)])
    return tmp_path / "own"


@pytest.fixture
def checked(tiny_config, folder):
    """Check the tiny run with a second source `own`, and settings changed."""

    def run(*overrides, documents=50, **own):
        own = {"path": str(folder), "weight": 1, "licence": "CC0-1.0"} | own
        given = [f"data.sources.own.{key}={json.dumps(value)}" for key, value in own.items()]
        settings = read_settings(Settings, tiny_config, [*given, *overrides])
        facts = check_data(settings, documents)
        assert json.loads(json.dumps(facts)) == facts
        return facts

    return run


def source(facts, name="own"):
    return next(source for source in facts["sources"] if source["name"] == name)


def test_nothing_wrong(checked, folder):
    facts = checked()
    own = source(facts)
    assert facts["ok"]
    assert (facts["exit_code"], facts["problems"], own["problems"]) == (0, [], [])
    assert (own["files"], own["formats"]) == (1, [".parquet"])
    assert own["bytes"] == (folder / "a.parquet").stat().st_size
    assert own["rows"] + own["held_out_rows"] == 99
    assert (own["rows_drawn"], own["documents"]) == (50, 50)
    assert "birds sing." in own["sample"]
    assert len(own["sample"]) == 80
    spread = own["tokens_per_document"]
    assert spread["mean"] < spread["longest"]
    per_byte = own["bytes_per_document"]["mean"] / own["tokens_per_document"]["mean"]
    assert own["bytes_per_token"] == pytest.approx(per_byte, rel=0.01)
    assert own["epochs"] == pytest.approx(own["budget_tokens"] / own["tokens"], rel=0.01)
    assert own["budget_tokens"] == 3072 / 2


def test_a_source_that_fails_hides_nothing_of_the_others(checked):
    facts = checked(path="gone/*.parquet")
    assert (facts["ok"], facts["exit_code"]) == (False, 2)
    (problem,) = source(facts)["problems"]
    assert "gone" in problem
    assert source(facts)["rows"] is None
    assert source(facts, "text")["rows"] > 30
    assert source(facts, "text")["problems"] == []


def test_a_source_has_all_its_problems(checked):
    budget = "train.budget_tokens=307200"
    facts = checked(budget, "data.sources.text.licence=none", licence="none", max_epochs=1)
    licence, epochs = source(facts)["problems"]
    assert "licence" in licence
    assert "max_epochs = 1" in epochs
    assert "licence" in source(facts, "text")["problems"][0]
    assert facts["exit_code"] == 2


def test_epochs_at_the_limit_are_a_warning(checked):
    tokens = source(checked(documents=999))["tokens"]
    for share, problems, warnings in ((0.8, 0, 0), (1.0, 0, 1), (1.2, 1, 0)):
        budget = f"train.budget_tokens={round(2 * tokens * share)}"
        own = source(checked(budget, documents=999, max_epochs=1))
        told = [line for line in own["warnings"] if "max_epochs" in line]
        assert (len(own["problems"]), len(told)) == (problems, warnings)


def test_data_other_than_the_lock_are_code_4(checked, tiny_config, folder, tmp_path):
    assert checked()["lock"] is None
    own = [f"data.sources.own.path={folder}", "data.sources.own.licence=CC0-1.0"]
    settings = read_settings(Settings, tiny_config, [*own, "data.sources.own.weight=1"])
    lock_data(settings, None)
    assert checked()["ok"]
    assert checked()["lock"] == str(tmp_path / "run" / "data.lock.json")
    facts = checked(licence="MIT")
    assert (facts["exit_code"], source(facts)["problems"]) == (
        4,
        ["not as in the run's lock: licence was CC0-1.0 and is MIT"],
    )
    write_texts(folder / "a.parquet", ["other birds sing. " * 30] * 99)
    facts = checked()
    assert facts["exit_code"] == 4
    assert "a.parquet" in source(facts)["problems"][0]
    assert source(facts, "text")["problems"] == []
    assert checked("data.sources.text=none")["problems"] == [
        "source text stands in the lock and is gone"
    ]


def test_a_source_that_can_not_be_read_is_code_5(checked, folder):
    data = bytearray((folder / "a.parquet").read_bytes())
    data[100:900] = bytes(800)
    (folder / "a.parquet").write_bytes(data)
    facts = checked("data.sources.text.licence=none")
    assert facts["exit_code"] == 5
    assert "a.parquet" in source(facts)["problems"][0]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["日本語を話す鳥が歌う。" * 30] * 400, "wasn't made for it"),
        (["a small bird sings"] * 380 + [None] * 20, "passed over: null or missing"),
        (["a small bird sings", *["a bird sings"] * 20], "rows for 4 lanes"),
    ],
)
def test_what_is_odd_is_a_warning(checked, folder, texts, words):
    write_texts(folder / "a.parquet", texts)
    facts = checked()
    assert facts["ok"]
    assert any(words in warning for warning in source(facts)["warnings"])


def test_epochs_without_limit_are_a_warning(checked):
    own = source(checked("train.budget_tokens=3072000"))
    assert any("beyond 4 epochs" in warning for warning in own["warnings"])


def test_a_very_long_document_is_a_warning(checked, monkeypatch):
    monkeypatch.setattr("summerlm.recipes.data.checking.LONG_TOKENS", 500)
    assert any("max_characters" in warning for warning in source(checked())["warnings"])


def test_rows_without_text_and_rules_are_told_apart(checked, folder):
    texts = [None] * 40 + [" "] * 40 + ["short"] * 80 + ["many birds mail ann@mail.org " * 9] * 80
    write_texts(folder / "a.parquet", texts)
    own = source(checked(documents=999, min_characters=10, rules=["emails"]))
    assert set(own["no_text"]) == {"null or missing", "empty or white space only"}
    assert own["dropped"].keys() == {"shorter than min_characters"}
    assert own["changed"] == {"emails": own["documents"]}
    assert (
        sum(own["no_text"].values()) + sum(own["dropped"].values()) + own["documents"]
        == (own["rows_drawn"])
    )


def test_a_vocabulary_of_another_size_is_a_problem_of_the_run(checked):
    facts = checked("model.vocabulary=301")
    assert (facts["exit_code"], len(facts["problems"])) == (2, 1)
    assert "301" in facts["problems"][0]


def test_the_sample_is_the_same_each_time(checked):
    assert checked() == checked()


def test_the_table_fits_and_says_all(checked):
    facts = checked("train.budget_tokens=307200", licence="none", max_epochs=1)
    console = Console(width=100, record=True, file=io.StringIO())
    show_check(facts, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert text.count("problem: ") == 2
    assert "2 problems; exit code 2" in text
    assert "own" in text
