"""Models side by side: which figures are matched, and how sure their differences are."""

import copy
import json
import math
import sys
from functools import partial

import numpy as np
import pytest
from rich.console import Console

from summerlm.cli import main
from summerlm.core.errors import UsageError
from summerlm.recipes import comparing
from summerlm.recipes.compare_tables import markdown, show
from summerlm.recipes.comparing import compare, read_facts


def figure(value, error=0.1, *, up=True, chance=None):
    return {
        "value": value,
        "error": error,
        "chance": chance,
        "higher_is_better": up,
        "low": None,
        "high": None,
    }


def result(task, figures, parts=None, **fields):
    data = {
        "origin": "mirror",
        "repository": None,
        "folder": "x",
        "split": "test",
        "revision": None,
        "rows_sha256": "r",
        "limit": None,
        "seed": 1,
    }
    return {
        "task": task,
        "protocol": "p",
        "items": 4,
        "few_shot": 0,
        "figures": figures,
        "parts": parts or {},
        "chosen": [],
        "chosen_norm": [],
        "answers": [],
        "logprobs": [],
        "notes": [],
        "data": data,
        **fields,
    }


def facts(name, chosen, nats):
    """A model's facts: four items of choice, a cloze of four, a text of three documents."""
    right = [0, 1, 1, 0]
    hits = [float(c == r) for c, r in zip(chosen, right, strict=True)]
    choice = result(
        "arc", {"acc": figure(sum(hits) / 4, 0.25, chance=0.5)}, chosen=chosen, answers=right
    )
    ends = [[-n] for n in [*nats, 1.0]]
    mean = sum(nats, 1.0) / 4
    cloze = result("lambada", {"perplexity": figure(math.exp(mean), up=False)}, logprobs=ends)
    sums = {"nats": nats, "bytes": [10.0, 20.0, 30.0]}
    bits = figure(sum(nats) / 60 / math.log(2), 0.05, up=False)
    part = result("text_raw", {"bits_per_byte": bits})
    settings = {"read": 1, "alone": 1, "context": 8, "stride": 4}
    part["data"] |= {"sums": sums, "n": {"bytes": 60}, "settings": settings}
    slides = copy.deepcopy(part) | {"figures": {}}
    text = result("text", {}, parts={"sliding": slides, "raw": part})
    model = {"name": name, "step": 1, "tokens": 2, "parameters": 3, "context": 8}
    return {"format": 1, "model": model, "results": [choice, cloze, text]}


A = facts("a", [1, 1, 0, 1], [10.0, 30.0, 20.0])
B = facts("b", [0, 1, 1, 1], [9.0, 29.0, 18.0])


def row_of(compared, task):
    (row,) = [row for row in compared["rows"] if row["task"] == task]
    return row


def test_errors_are_of_the_items_that_both_answered():
    compared = compare([A, B])
    assert [row["task"] for row in compared["rows"]] == ["arc", "lambada", "text"]
    row = row_of(compared, "arc")
    (difference,) = row["differences"]
    assert row["values"] == [0.25, 0.75]
    # the hits differ in two items of four
    expected = np.std([1, 0, 1, 0], ddof=1) / 2
    assert difference == {"value": 0.5, "error": expected, "paired": True, "but": []}


def test_errors_of_texts_are_of_documents_drawn_for_both():
    (difference,) = row_of(compare([A, B]), "text")["differences"]
    assert difference["value"] == pytest.approx(-4 / 60 / math.log(2))
    assert difference["paired"]
    # nats a byte are 0.1 and about 0.05 lower in two documents, as much in the third
    assert 0 < difference["error"] < 0.02 < math.hypot(0.05, 0.05)
    (same,) = row_of(compare([A, A]), "text")["differences"]
    assert same == {"value": 0, "error": 0, "paired": True, "but": []}


def test_errors_of_a_clozes_perplexity_are_of_its_endings():
    (difference,) = row_of(compare([A, B]), "lambada")["differences"]
    assert difference["paired"]
    assert difference["value"] < 0 < difference["error"]


@pytest.mark.parametrize(
    ("change", "name", "paired"),
    [
        (lambda r: r["data"].update(rows_sha256="other"), "items", False),
        (lambda r: r["data"].update(limit=2), "items", False),
        (lambda r: r.update(few_shot=5), "examples", False),
        (lambda r: r["data"].update(settings={"context": 16}), "context", True),
    ],
)
def test_what_differs_besides_the_model_is_told(change, name, paired):
    other = copy.deepcopy(B)
    change(other["results"][0])
    (difference,) = row_of(compare([A, other]), "arc")["differences"]
    assert difference["but"] == [name]
    assert difference["paired"] is paired
    if not paired:
        assert difference["error"] == pytest.approx(math.hypot(0.25, 0.25))


def test_other_examples_by_seed_only_where_there_are_examples():
    ours, theirs = copy.deepcopy(A), copy.deepcopy(B)
    theirs["results"][0]["data"]["seed"] = 2
    (difference,) = row_of(compare([ours, theirs]), "arc")["differences"]
    assert difference["but"] == []
    ours["results"][0]["few_shot"] = theirs["results"][0]["few_shot"] = 3
    (difference,) = row_of(compare([ours, theirs]), "arc")["differences"]
    assert difference["but"] == ["examples"]


def test_texts_of_other_blocks_are_not_paired():
    other = copy.deepcopy(B)
    sums = other["results"][2]["parts"]["raw"]["data"]["sums"]
    sums.update(nats=[1.0] * 7, bytes=[9.0] * 7)  # as another tokenizer's blocks
    (difference,) = row_of(compare([A, other]), "text")["differences"]
    assert not difference["paired"]


def test_figures_that_a_model_lacks_are_left_open():
    less = copy.deepcopy(B)
    less["results"] = less["results"][:1]
    compared = compare([A, less, B])
    assert row_of(compared, "text")["values"][1] is None
    assert row_of(compared, "text")["differences"][0] is None
    infinite = copy.deepcopy(B)
    infinite["results"][1]["figures"]["perplexity"] |= {"value": None, "error": None}
    assert row_of(compare([A, infinite]), "lambada")["differences"][0]["value"] is None
    assert "| - |" in markdown(compared) + markdown(compare([A, infinite]))
    assert "| perplexity | - | - | - | - |" in markdown(compare([infinite, infinite]))


def test_better_and_worse_are_told_by_the_figures_own_direction():
    better = facts("c", [0, 1, 1, 0], [1.0, 2.0, 3.0])
    text = markdown(compare([A, better]))
    (bits,) = [line for line in text.splitlines() if "bits per byte" in line]
    assert "better" in bits
    assert bits.split(" | ")[4].startswith("-")
    (bits,) = [line for line in markdown(compare([better, A])).splitlines() if "bits per" in line]
    assert "worse" in bits


def test_unpaired_errors_are_marked_and_the_table_fits(tmp_path):
    other = copy.deepcopy(B)
    other["results"][0]["data"]["rows_sha256"] = "other"
    compared = compare([A, other])
    for terminal in (True, False):
        path = tmp_path / str(terminal)
        with path.open("w") as file:
            console = partial(Console, file=file, color_system=None, width=80)
            show(compared, console(force_terminal=terminal))
        shown = path.read_text()
        assert "0.3536?" in shown
        assert "arc: A and B: other items" in shown
        assert max(map(len, shown.splitlines())) <= 80 or not terminal


def test_files_and_runs_are_compared_by_the_command(tmp_path, monkeypatch, capsys):
    paths = []
    for name, found in (("a", A), ("b", B)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(found))
    asked = []

    def measured(run, wanted, where, progress):
        asked.append((run.name, wanted.names, str(where.mirror)))
        return A

    monkeypatch.setattr(comparing, "evaluate", measured)
    out = tmp_path / "out.md"
    args = ["compare", str(paths[1]), "some-run", "data.mirror=m", "--suite", "arc, text"]
    monkeypatch.setattr(sys, "argv", ["summerlm", *args, "--json", "-", "--markdown", str(out)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    compared = json.loads(capsys.readouterr().out)
    assert asked == [("some-run", ["arc", "text"], "m")]
    assert compared == json.loads(json.dumps(compare([B, A])))
    assert out.read_text() == markdown(compare([B, A]))


@pytest.mark.parametrize("option", [["--suite", "arc"], ["--limit", "3"], ["data.mirror=m"]])
def test_options_that_files_leave_no_meaning_are_refused(tmp_path, monkeypatch, capsys, option):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(A))
    monkeypatch.setattr(sys, "argv", ["summerlm", "compare", str(path), str(path), *option])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "was measured already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "can't be read as JSON"),
        ("[]", "not a file that summerlm eval --json wrote"),
        ('{"format": 9, "model": {}, "results": []}', "has format 9"),
        ('{"format": 1, "model": {}, "results": [3]}', "result 0 has no figures"),
        ('{"format": 1, "model": {}, "results": [{"task": "x"}]}', "result 0 has no protocol"),
    ],
)
def test_other_files_are_refused(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_facts(path)


def test_a_part_that_lacks_something_is_refused(tmp_path):
    path, cut = tmp_path / "x.json", copy.deepcopy(A)
    path.write_text(json.dumps(A))
    assert read_facts(path) == A
    del cut["results"][2]["parts"]["raw"]["data"]
    path.write_text(json.dumps(cut))
    with pytest.raises(UsageError, match="result 2 has no data; measure"):
        read_facts(path)


def test_one_model_or_nothing_in_common_is_refused():
    with pytest.raises(UsageError, match="two"):
        compare([A])
    other = copy.deepcopy(B)
    for one in other["results"]:
        one["task"] += "x"
    with pytest.raises(UsageError, match="no task in common"):
        compare([A, other])
