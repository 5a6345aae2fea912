"""What rules would do, on texts whose faults are planted."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from summerlm.core.config import read_settings
from summerlm.data.opening import open_sources
from summerlm.data.rules.catalogue import RULES
from summerlm.recipes.data.describing import show_report
from summerlm.recipes.data.judging import report_rules
from summerlm.recipes.settings import Settings

DRAW = random.Random(5)
WORDS = ["the", "river", "and", "a", "stone", "that", "have", "been", "with", "every", "cloud"]
SECRET = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "".join(DRAW.choices("ABCDEFGHIJKLMNopqrstuvwxyz0123456789+/", k=600))
    + "\n-----END RSA PRIVATE KEY-----"
)


def prose(number, words=200):
    draw = random.Random(number)
    return " ".join(f"{draw.choice(WORDS)} w{draw.randrange(10**6)}" for _ in range(words // 2))


QUESTION = (
    "Which of these rivers flows through the largest number of capital cities in Europe today?"
)


@pytest.fixture
def planted(tmp_path):
    """200 texts with planted faults; how many of each is known."""
    texts = [prose(number) for number in range(200)]
    for place in (3, 50, 120):
        texts[place] = texts[10]  # three exact copies
    for place in (60, 61):
        texts[place] = texts[20] + " and a last word"  # two near ones...
    for place in range(70, 77):
        texts[place] = f"{prose(place)} {QUESTION.upper()} {prose(place + 1000)}"
    for place in range(80, 85):
        texts[place] += " Write to ann@mail.org or bob@mail.org."
    texts[90] += SECRET
    for place in range(100, 111):
        texts[place] = f"a text too short, number {place}"
    texts[130] = None
    folder = tmp_path / "planted"
    folder.mkdir()
    for part in range(4):
        table = pa.table({"text": texts[part::4]})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=9)
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "Danube"}))
    return tmp_path


@pytest.fixture
def report(tiny_config, planted):
    def run(*overrides, documents=1000, **own):
        own = {"path": f"{planted}/planted", "weight": 1, "licence": "x", **own}
        given = [f"data.sources.own.{key}={json.dumps(value)}" for key, value in own.items()]
        base = ["data.sources.text=none", "data.held_out_fraction=0", "run.folder=/nonexistent"]
        settings = read_settings(Settings, tiny_config, [*base, *given, *overrides])
        facts = report_rules(settings, documents)
        assert json.loads(json.dumps(facts)) == facts
        return facts

    return run


def rules_of(facts):
    (source,) = facts["sources"]
    return {rule["rule"]: rule for rule in source["rules"]}


def test_every_planted_fault_is_counted_by_its_rule(report, planted):
    facts = report(f"data.evaluation_sets=['{planted}/quiz.jsonl']")
    found = rules_of(facts)
    assert list(found) == list(RULES)
    counts = {name: rule["documents"] for name, rule in found.items() if rule["documents"]}
    assert counts == {
        "gopher-words": 11,
        "gopher-stop-words": 11,
        "exact-duplicates": 4,  # three of texts[10], and one of the near copies of the other
        "near-duplicates": 1,
        "contamination": 7,
        "emails": 5,
        "secrets": 1,
    }
    assert found["emails"]["changes"] == 10
    (source,) = facts["sources"]
    assert (source["rows_drawn"], source["without_text"], source["documents"]) == (200, 1, 199)
    assert source["dropped"] == 0
    assert facts["notes"] == []
    assert list(facts["evaluation_sets"].values()) == [{"items": 1, "too_short": 0}]


def test_the_total_is_what_training_drops(report, planted, tiny_config):
    own = {"rules": ["gopher", "emails"], "max_characters": 2300}
    facts = report(**own)
    found = rules_of(facts)
    assert {name for name, rule in found.items() if rule["enabled"]} > {"gopher-words", "emails"}
    assert not found["secrets"]["enabled"]
    given = [f"data.sources.own.{key}={json.dumps(value)}" for key, value in own.items()]
    settings = read_settings(
        Settings,
        tiny_config,
        [
            f"data.sources.own.path={planted}/planted",
            *("data.sources.own.weight=1", "data.sources.text=none", "data.held_out_fraction=0"),
            *given,
        ],
    )
    (source,) = open_sources(settings.data, 4)
    rows = [row for unit in range(len(source.units)) for row in source.read(unit)]
    kept = [r for r in rows if isinstance(r, str) and isinstance(source.clean(r).text, str)]
    assert facts["sources"][0]["dropped"] == 199 - len(kept)
    assert found["longer than max_characters"]["documents"] > 0


def test_enabled_duplicates_count_in_the_total(report):
    assert report(rules=["exact-duplicates"])["sources"][0]["dropped"] == 4
    assert report(rules=["exact-duplicates", "near-duplicates"])["sources"][0]["dropped"] == 5


def test_examples_are_lines_and_show_no_secret(report, planted):
    found = rules_of(report(f"data.evaluation_sets=['{planted}/quiz.jsonl']"))
    for rule in found.values():
        assert len(rule["examples"]) == min(rule["documents"], 2)
        assert all(0 < len(e) <= 100 and e.isprintable() for e in rule["examples"])
    assert "<SECRET>" in found["secrets"]["examples"][0]
    assert SECRET[40:60] not in found["secrets"]["examples"][0]
    assert "@mail.org" not in str(found["emails"]["examples"])
    assert "which of these rivers" in found["contamination"]["examples"][0]
    assert "too short, number 1" in found["gopher-words"]["examples"][0]


def test_what_can_not_be_judged_is_a_note(report, monkeypatch):
    assert any("evaluation_sets" in note for note in report()["notes"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    facts = report()
    assert any("near-duplicates" in note for note in facts["notes"])
    assert rules_of(facts)["near-duplicates"]["documents"] == 0
    assert rules_of(facts)["exact-duplicates"]["documents"] == 4


def test_a_sample_ends_at_its_bytes(report, monkeypatch):
    monkeypatch.setattr("summerlm.recipes.data.judging.MOST_BYTES", 20_000)
    (source,) = report()["sources"]
    assert 5 < source["documents"] < 40


def test_the_print_fits(report, planted):
    facts = report(f"data.evaluation_sets=['{planted}/quiz.jsonl']", rules=["gopher-quality"])
    console = Console(width=100, record=True, file=io.StringIO())
    show_report(facts, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for words in ("* gopher-words", "  contamination", "1 items", "199 texts", "nothing: "):
        assert words in text
