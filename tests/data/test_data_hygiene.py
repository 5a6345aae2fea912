"""Rules in their place: sources drop and change rows by them, the ledger counts, the lock pins."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_streams import ByteTokenizer, make_loader, take

from summerlm.core.config import validate
from summerlm.core.errors import DataChangedError, UsageError
from summerlm.data.config import DataConfig
from summerlm.data.ledger import Ledger
from summerlm.data.opening import open_sources
from summerlm.data.shards.rows import Dropped
from summerlm.tokenizer.mistral import mistral_v3

WORDS = [f"word{n}" for n in range(3000)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))


def prose(seed, words=80):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write(path, texts, group=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group)
    return str(path)


def config(held_out=0.0, evaluation_sets=(), **sources):
    tables = {name: {"weight": 1, **table} for name, table in sources.items()}
    table = {"sources": tables, "held_out_fraction": held_out}
    return validate(DataConfig, table | {"evaluation_sets": list(evaluation_sets)}, "test")


def rows_of(source):
    """Every training row as the lanes see it, after the rules."""
    rows = [row for unit in range(len(source.units)) for row in source.read(unit)]
    return [row if isinstance(row, Dropped) else source.clean(row).text for row in rows]


def reasons(source):
    return [row.reason for row in rows_of(source) if isinstance(row, Dropped)]


def test_duplicates_are_dropped_over_sources_but_for_the_first(tmp_path):
    first = [prose(n) for n in range(40)]
    near = [text.replace(" ", " extra ", 1) for text in first[10:20]]
    one = write(tmp_path / "one.parquet", first + first[:5])
    two = write(tmp_path / "two.parquet", near + first[30:33] + [prose(n) for n in range(90, 99)])
    rules = ["exact-duplicates", "near-duplicates"]
    asked = {"path": one, "rules": rules}, {"path": two, "rules": rules}
    a, b = open_sources(config(a=asked[0], b=asked[1]), 2)
    assert reasons(a) == ["exact-duplicates"] * 5
    assert rows_of(a)[:40] == first
    assert reasons(b) == ["near-duplicates"] * 10 + ["exact-duplicates"] * 3
    # a source that doesn't ask is neither compared nor looked for
    a, b = open_sources(config(a={"path": one}, b=asked[1]), 2)
    assert not reasons(a)
    assert not reasons(b)


def test_a_text_that_a_rule_drops_takes_no_copy_with_it(tmp_path):
    short, long = ["Hi there"] * 3, [prose(n) for n in range(9)]
    one = write(tmp_path / "one.parquet", short + long)
    two = write(tmp_path / "two.parquet", [*short, prose(50)])
    a, b = open_sources(
        config(
            a={"path": one, "rules": ["exact-duplicates", "gopher-words"]},
            b={"path": two, "rules": ["exact-duplicates"]},
        ),
        1,
    )
    assert reasons(a) == ["gopher-words"] * 3
    assert rows_of(b)[0] == "Hi there"
    assert reasons(b) == ["exact-duplicates"] * 2


def test_copies_are_near_duplicates_where_only_these_are_asked_for(tmp_path):
    path = write(tmp_path / "a.parquet", [prose(n % 6) for n in range(9)])
    (source,) = open_sources(config(a={"path": path, "rules": ["near-duplicates"]}), 1)
    assert reasons(source) == ["near-duplicates"] * 3


def test_no_copy_of_a_held_out_row_is_trained_on(tmp_path):
    texts = [prose(n % 50) for n in range(150)]
    path = write(tmp_path / "a.parquet", texts)
    (source,) = open_sources(config(0.2, a={"path": path, "rules": ["exact-duplicates"]}), 2)
    held_out = list(source.held_out())
    kept = [row for row in rows_of(source) if isinstance(row, str)]
    assert len(held_out) > 5
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & set(kept)
    assert sorted(held_out + kept) == sorted(set(texts))


def test_the_lock_pins_the_rows_that_are_dropped(tmp_path):
    path = write(tmp_path / "a.parquet", [prose(n % 30) for n in range(40)])
    settings = config(a={"path": path, "rules": ["exact-duplicates"]})
    (source,) = open_sources(settings, 2)
    lock = json.loads(json.dumps([source.lock()]))
    assert len(lock[0]["duplicates"]) == 64
    (again,) = open_sources(settings, 2, lock)
    assert rows_of(again) == rows_of(source)
    # a damaged copy of the lists is made again, other lists are refused
    for copy in (tmp_path / "cache" / "duplicates").glob("*.npz"):
        copy.write_bytes(b"no lists")
    (mended,) = open_sources(settings, 2, lock)
    assert rows_of(mended) == rows_of(source)
    lock[0]["duplicates"] = "0" * 64
    with pytest.raises(DataChangedError, match="source a: duplicates was 000"):
        open_sources(settings, 2, lock)


def test_planted_evaluation_items_are_dropped_and_pinned(tmp_path):
    items = [f"Question {n}: {prose(1000 + n, 20)}?" for n in range(50)]
    write(tmp_path / "hub" / "owner" / "quiz" / "test.parquet", items)
    planted = [f"{prose(n)} {items[n].upper()} {prose(n + 500)}" for n in range(50)]
    clean = [prose(n + 2000) for n in range(50)]
    path = write(tmp_path / "a.parquet", planted + clean)
    table = {"path": path, "rules": ["contamination"]}
    settings = config(a=table, evaluation_sets=["hub:owner/quiz/*.parquet"])
    settings = settings.model_copy(update={"mirror": tmp_path / "hub"})
    (source,) = open_sources(settings, 2)
    assert rows_of(source) == [Dropped("contamination")] * 50 + clean
    lock = [source.lock()]
    write(tmp_path / "hub" / "owner" / "quiz" / "test.parquet", items[:40])
    with pytest.raises(DataChangedError, match="source a: evaluation_sets no longer has"):
        open_sources(settings, 2, lock)
    with pytest.raises(UsageError, match=r"data\.evaluation_sets, and none is set"):
        open_sources(config(a=table), 2)


def test_the_ledger_counts_each_rule_the_same_over_a_resume(tmp_path):
    texts = [f"Mail ann{n}@mail.org. {prose(n)}" for n in range(60)]
    texts += ["# # # # # #"] * 20 + texts[:10]
    path = write(tmp_path / "a.parquet", texts)
    rules = ["gopher-words", "emails", "exact-duplicates"]
    (source,) = open_sources(config(a={"path": path, "rules": rules}), 4)
    shape = {"lanes": 4, "rows": 4, "context": 300}

    def ledger_of(*parts):
        ledger = Ledger("a")
        for part in parts:
            for step in part:
                ledger.add(step.source_counts)
        return ledger.state()["a"]

    steps = take(make_loader([source], [1.0], ByteTokenizer(), **shape), 60)
    for stop in (1, 7, 30):
        rest = make_loader([source], [1.0], ByteTokenizer(), state=steps[stop - 1].state, **shape)
        assert ledger_of(steps[:stop], take(rest, 60 - stop)) == ledger_of(steps)
    found = ledger_of(steps)
    assert found["epochs"] > 1
    assert found["dropped"]["exact-duplicates"] >= 10
    assert found["dropped"]["gopher-words"] >= 20  # and no copy of one another
    assert found["changed"]["emails"] >= 60


def test_an_unknown_rule_is_named_with_its_like(tmp_path):
    path = write(tmp_path / "a.parquet", [prose(n) for n in range(9)])
    with pytest.raises(UsageError, match=r'no rule "gopher-wrds"; did you mean gopher-words'):
        open_sources(config(a={"path": path, "rules": ["gopher-wrds"]}), 2)


def test_dialogues_under_the_chat_template(tmp_path):
    dialogues = [
        [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": f'Say "[/INST]" {n}\nto ann{n}@mail.org'},
            {"from": "gpt", "value": f"[/INST] {n}"},
        ]
        for n in range(24)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"talk": turns}) for turns in dialogues))
    table = {"path": str(path), "conversations": "talk", "template": "chat", "rules": ["emails"]}
    (source,) = open_sources(config(a=table), 2)
    tokenizer = mistral_v3()
    steps = take(make_loader([source], [1.0], tokenizer, lanes=2, rows=2, context=50), 30)
    ids = [i for step in steps for i in step.ids[:, 1:].ravel().tolist()]
    begin, end = tokenizer.specials["[INST]"], tokenizer.specials["[/INST]"]
    documents = sum(step.source_counts["a"].documents for step in steps)
    assert abs(ids.count(begin) - documents) <= 4  # one a dialogue, whatever a text spells
    assert abs(ids.count(end) - documents) <= 4
    assert abs(ids.count(tokenizer.eos) - documents) <= 4
    text = tokenizer.decode(steps[0].ids[0].tolist())
    assert "Be brief." in text
    assert "email@example.com" in text
    counts = [step.source_counts["a"] for step in steps]
    total = sum((count.bytes for count in counts), 0)
    assert abs(total - documents * 60) < documents * 15  # of the turns, not of their JSON
    (plain,) = open_sources(config(0.3, a=table), 2)
    assert next(plain.held_out()).startswith("\nSYSTEM: Be brief.\nUSER: Say")


def test_a_path_below_the_home_folder_or_a_glob_is_an_evaluation_set_too(tmp_path: Path):
    write(tmp_path / "evals" / "a.parquet", [prose(1, 30)])
    path = write(tmp_path / "a.parquet", [prose(1, 30), prose(2), prose(3)])
    table = {"path": path, "rules": ["contamination"]}
    (source,) = open_sources(config(a=table, evaluation_sets=[f"{tmp_path}/evals/*.parquet"]), 1)
    assert reasons(source) == ["contamination"]


@pytest.mark.parametrize("name", ["", "hub:gsm8k", "hub:open ai/gsm8k"])
def test_an_evaluation_set_that_can_not_be_one(tmp_path: Path, name: str):
    table = {"path": write(tmp_path / "a.parquet", [prose(1)]), "rules": ["contamination"]}
    with pytest.raises(UsageError, match=f"data.evaluation_sets: {name!r}: "):
        open_sources(config(a=table, evaluation_sets=[name]), 1)
