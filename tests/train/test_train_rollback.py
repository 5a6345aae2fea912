"""A run that meets one ruinous document: what each policy does about it, end to end."""

import json
import random
from pathlib import Path

import pytest
from rich.console import Console
from tiny import TINY

from summerlm.checkpoint.load import newest_good
from summerlm.core.config import read_settings
from summerlm.core.errors import DivergedError
from summerlm.core.record import read_rows
from summerlm.data.naming import follow
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.data.locking import open_data
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.registry import load_tokenizer

WORDS = ["the", "sun", "rises", "over", "a", "small", "field", "and", "every", "bird", "sings"]
NOISE = [chr(code) for code in range(33, 127)]
STEPS = 120
MET = 90  # the step that meets the document; the last checkpoint before it is of step 80


def open_order(settings):
    sources = open_data(settings, write=False)
    loader = open_loader(settings, sources, load_tokenizer(settings.tokenizer.name), None)
    loader.close()
    return loader.order


@pytest.fixture(scope="module")
def ruined(tmp_path_factory):
    """Settings of a run whose texts are all alike but one, and the name of that one's file."""
    root = tmp_path_factory.mktemp("ruined")
    (root / "text").mkdir()
    for number in range(500):
        first = random.Random(number).randrange(len(WORDS))
        text = " ".join((WORDS[first:] + WORDS[:first]) * 6)
        (root / "text" / f"{number:03}.txt").write_text(text)
    texts = [path.read_text() for path in (root / "text").iterdir()]
    learn_bpe([*texts, "".join(NOISE) * 3], 300).save(root / "tokenizer")
    config = root / "run.toml"
    config.write_text(
        TINY
        + f"""
[tokenizer]
name = "{root}/tokenizer"

[data.sources.text]
path = "{root}/text/*.txt"
weight = 1
licence = "CC0-1.0"
"""
    )

    def settings(folder: Path, *overrides: str) -> Settings:
        shape = ["data.lanes=2", "data.open_documents=1", f"train.budget_tokens={STEPS * 256}"]
        rare = ["checkpoint.every_steps=20", "validation.every_steps=1000"]
        return read_settings(Settings, config, [f"run.folder={folder}", *shape, *rare, *overrides])

    followed = follow(open_order(settings(root / "run")), {}, MET, [5], STEPS)
    file = followed.documents[-1].file  # one that begins in that row
    draw = random.Random(0)
    Path(root / "text" / file).write_text("".join(draw.choices(NOISE, k=400)))
    return settings, file


def train_rows(folder):
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]


def spikes_of(folder):
    rows = read_rows(folder / "incidents.jsonl")
    return [row for row in rows if "spike" in row["reason"] and "batch_sha" in row]


def test_rollback_leaves_out_the_document_and_nothing_else(ruined, tmp_path):
    settings, file = ruined
    run, twin = tmp_path / "run", tmp_path / "twin"
    asked = settings(run, "train.on_spike=rollback")
    assert pretrain(asked, Console(quiet=True)) == 0
    (incident,) = [row for row in read_rows(run / "incidents.jsonl") if "documents" in row]
    *neighbours, worst = [name["file"] for name in incident["documents"]]
    assert worst == file
    assert len(neighbours) <= 1, "what ends in the row where it begins"
    rows = train_rows(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step once"
    assert all(row["updated"] for row in rows)
    before, after = rows[incident["step"] - 3]["loss"], rows[-1]["loss"]
    assert after < before + 0.05, "as if the document weren't there"

    table = json.loads((run / "quarantine.json").read_text())
    assert table["rollbacks"] == 1
    begun = {row for step, row in table["rows"] if step == incident["step"]}
    expected = follow(open_order(asked), {}, incident["step"], begun, STEPS)
    assert [[*place] for place in expected.rows] == table["rows"]
    assert {row % 2 for _, row in table["rows"]} == {1}, "the other lane is left alone"
    assert table["rows"][-1][0] > incident["step"], "it goes on"

    twin.mkdir()  # a run that knew the table from its start
    (twin / "quarantine.json").write_text(json.dumps(table))
    assert pretrain(settings(twin, "train.on_spike=rollback"), Console(quiet=True)) == 0
    same = ("step", "loss", "grad_norm", "update_norm", "batch_sha", "tokens", "lr")
    assert [[row[key] for key in same] for row in train_rows(twin)] == [
        [row[key] for key in same] for row in rows
    ]
    assert not spikes_of(twin)


def test_the_data_order_is_that_of_a_run_without_quarantine(ruined, tmp_path):
    settings, _ = ruined
    one, two = tmp_path / "one", tmp_path / "two"
    assert pretrain(settings(one, "train.on_spike=rollback"), Console(quiet=True)) == 0
    assert pretrain(settings(two), Console(quiet=True)) == 0
    assert [row["batch_sha"] for row in train_rows(one)] == [
        row["batch_sha"] for row in train_rows(two)
    ]
    assert max(row["loss"] for row in train_rows(two)[MET - 1 :]) > 2, "it is learnt from"


def test_skip_changes_nothing_at_the_spikes_and_goes_on(ruined, tmp_path):
    settings, _ = ruined
    assert pretrain(settings(tmp_path / "run", "train.on_spike=skip"), Console(quiet=True)) == 0
    rows = train_rows(tmp_path / "run")
    skipped = [row["step"] for row in rows if not row["updated"]]
    assert [row["step"] for row in spikes_of(tmp_path / "run")] == skipped
    assert MET <= skipped[0] <= MET + 1
    assert 2 <= len(skipped) <= 4, "the document's steps"
    assert all(row["update_norm"] == 0 for row in rows if not row["updated"])
    assert rows[-1]["loss"] < rows[MET - 3]["loss"] + 0.05
    assert not (tmp_path / "run" / "quarantine.json").exists()


def test_stop_ends_the_run_after_the_step_is_on_record_and_at_every_start(ruined, tmp_path):
    """At a step that would be saved, too: a checkpoint of it would let a restart go past it."""
    settings, _ = ruined
    asked = settings(tmp_path / "run", "train.on_spike=stop", "checkpoint.every_steps=1")
    found = []
    for _ in range(2):
        with pytest.raises(DivergedError, match=r"a spike beyond a loss of .*on_spike = 'stop'"):
            pretrain(asked, Console(quiet=True))
        rows = train_rows(tmp_path / "run")
        found.append(rows[-1]["step"])
        assert [row["updated"] for row in rows] == [True] * (len(rows) - 1) + [False]
        assert newest_good(tmp_path / "run").name == f"step-{found[-1] - 1:08d}"
    assert MET <= found[0] == found[1] <= MET + 1
