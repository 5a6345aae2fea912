"""Items of tasks that stand in the training mixture: found, named, and left out of accuracies."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from summerlm.cli import main
from summerlm.core.config import dump_toml, read_settings
from summerlm.core.errors import UsageError
from summerlm.eval.items import Where, read_items
from summerlm.eval.task import load_task
from summerlm.recipes.contamination import clean_accuracy, find_contamination
from summerlm.recipes.evaluating import FORMAT
from summerlm.recipes.settings import Settings

# of each the number stands in every run of 13 words
QUESTIONS = [
    f"Which {n} planets turn around a star of {n} size that no telescope saw from {n} hills?"
    for n in ("one", "two", "three", "four", "five")
]
CHOICES = ["a small one", "a large one", "none"]


@pytest.fixture
def mirror(tmp_path):
    """Five questions of one task, and its examples' split, which isn't looked for."""
    folder = tmp_path / "mirror" / "allenai" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"q{n}",
            "question": question,
            "choices": {"text": CHOICES, "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
        for n, question in enumerate(QUESTIONS)
    ]
    rows.append(
        {**rows[0], "id": "q5", "question": "Why?", "choices": {"text": ["so"], "label": ["A"]}}
    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    return tmp_path / "mirror"


@pytest.fixture
def sources(tmp_path):
    """Two sources: one holds the second question, another the second and the fifth, recased."""
    words = " ".join(["the sun rises over a small field and every bird sings"] * 9)
    texts = {
        "web": [words, f"{words} {QUESTIONS[1]} {words}", words],
        "books": [f"{QUESTIONS[4].upper()} {words}", f"{words}\n{QUESTIONS[1]}", words, words],
    }
    for name, rows in texts.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return [
        f"data.sources.{name}.{setting}"
        for name in texts
        for setting in ("weight=1", f"path={tmp_path}/{name}.jsonl")
    ]


@pytest.fixture
def settings(tiny_config, sources, mirror):
    base = [
        "data.sources.*=none",
        f"data.mirror={mirror}",
        "data.lanes=1",
        "data.held_out_fraction=0.0",
    ]
    return read_settings(Settings, tiny_config, [*base, *sources])


def found(settings, mirror, documents=100, results=None):
    facts = find_contamination(settings, ["arc_easy"], documents, Where(mirror), results)
    (task,) = facts["tasks"]
    return task, facts["sources"]


def test_planted_items_are_found_and_named(settings, mirror):
    task, sources = found(settings, mirror)
    assert (task["items"], task["found"], task["share"]) == (6, 2, pytest.approx(2 / 6))
    assert task["too_short"] == 1  # "Why?" and its one choice
    assert task["by_source"] == {"web": 1, "books": 2}
    assert [(s["name"], s["rows_drawn"], s["documents_with_items"]) for s in sources] == [
        ("web", 3, 1),
        ("books", 4, 2),
    ]
    assert {(e["item"], e["source"], e["row"]) for e in task["examples"]} == {
        (1, "web", 1),
        (4, "books", 0),
    }
    for example in task["examples"]:
        assert len(example["words"].split()) == 13
        assert example["words"] in QUESTIONS[example["item"]].lower().replace("?", "")
    (name,) = task["evaluation_sets"]
    assert name == "hub:allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet"


def test_what_a_rule_drops_is_not_found_and_the_name_given_is_one_it_takes(settings, mirror):
    (name,) = found(settings, mirror)[0]["evaluation_sets"]
    dropping = {"rules": ["contamination"]}
    values = settings.model_dump(mode="json")
    for source in values["data"]["sources"].values():
        source |= dropping
    values["data"]["evaluation_sets"] = [name]
    clean = Settings.model_validate_json(json.dumps(values))
    task, sources = found(clean, mirror)
    assert task["found"] == 0
    assert [s["documents"] for s in sources] == [2, 2]


def test_rows_that_are_not_drawn_are_not_counted(settings, mirror):
    task, sources = found(settings, mirror, documents=1)
    assert [(s["rows"], s["rows_drawn"]) for s in sources] == [(3, 1), (4, 1)]
    assert task["found"] <= 2


def result_of(mirror, chosen, chosen_norm=()):
    rows = read_items(load_task("arc_easy"), "test", Where(mirror))
    return {
        "task": "arc_easy",
        "protocol": "choice",
        "items": len(chosen),
        "few_shot": 0,
        "figures": {},
        "notes": [],
        "chosen": chosen,
        "chosen_norm": list(chosen_norm),
        "answers": [0] * len(chosen),
        "parts": {},
        "data": rows.origin,
    }


def test_accuracy_leaves_out_what_was_found(settings, mirror):
    """Items 1 and 4 are found, and right; of the others one is."""
    results = {"results": [result_of(mirror, [0, 0, 1, 1, 0, 1], [1, 0, 1, 1, 0, 1])]}
    accuracy = found(settings, mirror, results=results)[0]["accuracy"]
    assert accuracy["acc"]["all"] == {
        "items": 6,
        "value": 0.5,
        "error": pytest.approx(0.2236, abs=1e-4),
    }
    assert (accuracy["acc"]["clean"]["items"], accuracy["acc"]["clean"]["value"]) == (4, 0.25)
    assert (accuracy["acc_norm"]["all"]["value"], accuracy["acc_norm"]["clean"]["value"]) == (
        1 / 3,
        0,
    )
    results = {"results": [result_of(mirror, [0, 0])]}  # a limit: the first two
    accuracy = found(settings, mirror, results=results)[0]["accuracy"]
    assert accuracy["acc"]["clean"] == {"items": 1, "value": 1.0, "error": None}


def test_items_are_numbered_over_the_parts_whole_rows():
    part = {"chosen": [0, 1], "chosen_norm": [], "answers": [0, 0]}
    result = {"parts": {"one": part, "two": part}}
    figures = clean_accuracy(result, [range(5), range(4)], found=[0, 6])  # 6: the second of two
    assert figures["acc"]["all"] == {
        "items": 4,
        "value": 0.5,
        "error": pytest.approx(0.2887, abs=1e-4),
    }
    assert figures["acc"]["clean"] == {"items": 2, "value": 0.5, "error": 0.5}


def test_results_of_other_rows_are_refused(settings, mirror):
    result = result_of(mirror, [0] * 6)
    other = {**result, "data": {**result["data"], "rows_sha256": "0"}}
    with pytest.raises(UsageError, match="the results of arc_easy are of other rows"):
        found(settings, mirror, results={"results": [other]})


def test_the_command_prints_what_was_found(settings, mirror, tmp_path, monkeypatch, capsys):
    config, results = tmp_path / "config.toml", tmp_path / "results.json"
    config.write_text(dump_toml(settings))
    facts = {"format": FORMAT, "model": {}, "results": [result_of(mirror, [0, 0, 1, 1, 0, 1])]}
    results.write_text(json.dumps(facts))
    monkeypatch.setattr("summerlm.cli.end_process", sys.exit)
    command = ["summerlm", "data", "contamination", str(config), "--suite", "arc_easy"]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(results)])
    with pytest.raises(SystemExit, match="0"):
        main()
    out = capsys.readouterr().out
    assert "source web: 3 rows drawn (all), 1 of 3 texts share a run of words with an item" in out
    assert "arc_easy: 2 of 6 items (33.33%): web 1, books 2, 1 too short to be found" in out
    assert "  item 4, books, books.jsonl, row 0: which five planets turn around" in out
    assert "acc: 0.5000 ± 0.2236 (6) of all items; 0.2500 ± 0.2500 (4) of clean items" in out
    assert 'data.evaluation_sets = ["hub:allenai/ai2_arc/ARC-Easy/test-00000' in out
