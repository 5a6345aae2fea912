"""The benchmarks run at toy size and write what they promise; their figures mean nothing here."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import TINY

from summerlm.checkpoint.reading import read_tensors
from summerlm.core.config import read_settings
from summerlm.core.files import read_json
from summerlm.core.record import JsonLines, cut_rows
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings

FOLDER = Path(__file__).parent.parent / "benchmarks"
PEER_PYTHON = os.environ.get("SUMMERLM_TEST_PEER_PYTHON", sys.executable)

TOY = (
    TINY
    + """
[tokenizer]
name = "{tokenizer}"

[data.sources.web]
hub = "toy/web"
files = "data/*.parquet"
column = "content"
weight = 60
licence = "none needed"

[data.sources.books]
hub = "toy/books"
weight = 30
licence = "none needed"

[data.sources.talk]
hub = "toy/talk"
conversations = "conversations"
weight = 10
licence = "none needed"
"""
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory, tiny_tokenizer):
    """A configuration file and a mirror: short parquet texts, long JSON lines, dialogues."""
    folder = tmp_path_factory.mktemp("toy")
    draw = random.Random(0)

    def text(words):
        return " ".join(draw.choices(["the", "sun", "rises", "over", "fields"], k=words))

    (folder / "toy/web/data").mkdir(parents=True)
    (folder / "toy/books").mkdir()
    (folder / "toy/talk").mkdir()
    web = pa.table({"content": [text(60) for _ in range(80)], "id": list(range(80))})
    pq.write_table(web, folder / "toy/web/data/0.parquet", row_group_size=20)
    books = [json.dumps({"text": text(2000), "id": i}) + "\n" for i in range(60)]
    (folder / "toy/books/0.jsonl").write_text("".join(books))
    turns = [[{"from": "human", "value": text(5)}, {"from": "gpt", "value": text(9)}]] * 60
    pq.write_table(pa.table({"conversations": turns}), folder / "toy/talk/0.parquet")
    (folder / "toy.toml").write_text(TOY.format(tokenizer=tiny_tokenizer))
    return folder


def run_data(toy, tmp_path, *options, check=True):
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, FOLDER / "data.py", "--quick", "--json", out),
            *("--config", toy / "toy.toml", "--mirror", toy, *options),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def only(*parts):
    return [option for part in parts for option in ("--only", part)]


def assert_spread(values):
    assert 0 < values["lowest"] <= values["median"] <= values["highest"]
    assert {values["lowest"], values["highest"]} == {min(values["all"]), max(values["all"])}


def test_data_writes_its_figures_and_a_table(toy, tmp_path):
    figures, table = run_data(toy, tmp_path, *only("memory", "stages", "chain"))
    assert {"date", "command", "commit", "hardware", "versions"} <= figures.keys()
    assert figures["quick"] is True
    assert figures["memory"]["lanes"] == 4
    assert figures["memory"]["bytes"] > 0
    assert figures["memory"]["bytes_per_lane"] == figures["memory"]["bytes"] // 4
    assert figures["stages"]["sample_tokens"]["web"] >= 2000
    stages = figures["stages"]["tokens_per_second"]
    assert stages.keys() == {"web", "books", "talk", "mixture"}
    for stage in ("read", "tokenize", "pack"):
        assert_spread(stages["mixture"][stage])
        each = (stages[name][stage]["all"][0] for name in ("web", "books", "talk"))
        seconds = sum(share / rate for share, rate in zip((0.6, 0.3, 0.1), each, strict=True))
        assert stages["mixture"][stage]["all"][0] == pytest.approx(1 / seconds)
    assert_chain(figures["chain"], useful_at_least=0.9)
    assert "peer" not in figures
    assert "tokenize alone, books: tokens/s" in table


def assert_chain(figures, useful_at_least):
    assert_spread(figures["tokens_per_second"])
    assert sum(figures["shares"].values()) == pytest.approx(1)
    weights = {"web": 0.6, "books": 0.3, "talk": 0.1}
    kept = min(figures["shares"][name] / weights[name] for name in weights)
    assert figures["useful_share"] == pytest.approx(kept)
    assert figures["useful_share"] >= useful_at_least
    both = [figures[key]["median"] for key in ("tokens_per_second", "useful_tokens_per_second")]
    assert both[1] == pytest.approx(both[0] * kept)


@pytest.mark.slow
def test_data_starts_and_workers(toy, tmp_path):
    figures, _ = run_data(toy, tmp_path, *only("start", "workers"))
    seconds = figures["start"]["seconds"]
    assert seconds.keys() == {"cold", "warm", "late", "deep"}
    for parts in seconds.values():
        whole = sum(parts[key]["median"] for key in ("imports", "sources", "tokenizer", "step"))
        assert parts["total"]["median"] == pytest.approx(whole)
    assert figures["workers"].keys() == {"1", "2"}
    for chain in figures["workers"].values():
        assert_chain(chain, useful_at_least=0.8)


@pytest.mark.slow
def test_data_compares_with_datasets(toy, tmp_path):
    command = [PEER_PYTHON, "-c", "import datasets, tokenizers"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(
            f"{PEER_PYTHON} has no `datasets`; set SUMMERLM_TEST_PEER_PYTHON to one that has"
        )
    figures, table = run_data(toy, tmp_path, *only("peer"), "--peer-python", PEER_PYTHON)
    chain, peer, corrected = (figures[key] for key in ("chain", "peer", "corrected_peer"))
    assert_chain(chain, useful_at_least=0.8)
    assert_chain(peer, useful_at_least=0)
    assert peer["useful_share"] < 0.5  # its weights choose documents, and books are long
    assert_chain(corrected, useful_at_least=peer["useful_share"])
    assert str(peer["map_batch"]) in peer["tried"]
    for side, ratio in ((peer, "all tokens"), (corrected, "all tokens, corrected")):
        rates = [each["tokens_per_second"]["median"] for each in (chain, side)]
        assert figures["ratios"][ratio] == pytest.approx(rates[0] / rates[1])
    lost = figures["ratios"]["useful tokens, half of blocks lost"]
    assert lost == pytest.approx(2 * figures["ratios"]["useful tokens"])
    assert "chain / peer: useful tokens" in table


def test_data_asks_for_datasets_before_it_measures(toy, tmp_path):
    nothing = tmp_path / "python"
    nothing.write_text("#!/bin/sh\nexit 1\n")
    nothing.chmod(0o755)
    done = run_data(toy, tmp_path, "--peer-python", nothing, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--peer-python" in done.stderr


def test_data_names_a_wrong_setting(toy, tmp_path):
    done = run_data(toy, tmp_path, *only("chain"), "data.lane=2", check=False)
    assert done.returncode == 1
    assert "no setting data.lane" in done.stderr
    assert "Traceback" not in done.stderr


@given(
    tokens=st.lists(st.integers(0, 10**9), min_size=1, max_size=5).filter(any),
    data=st.data(),
)
def test_the_useful_share_is_the_largest_that_keeps_the_weights(tokens, data):
    sys.path.insert(0, str(FOLDER))
    try:
        from data_parts import useful_share
    finally:
        sys.path.pop(0)
    size = len(tokens)
    weights = data.draw(st.lists(st.integers(1, 100), min_size=size, max_size=size))
    useful = useful_share(dict(enumerate(tokens)), dict(enumerate(weights)))
    kept = [useful * sum(tokens) * weight / sum(weights) for weight in weights]
    room = [have - need for have, need in zip(tokens, kept, strict=True)]
    assert min(room) == pytest.approx(0, abs=1e-6 * max(tokens) + 1e-9)  # one source is used up
    assert all(left >= -1e-6 * max(tokens) for left in room)  # and none is overdrawn


# the soak, and what costs two ranks have


@pytest.fixture(scope="module")
def soak_parts():
    """The modules of the soak."""
    sys.path.insert(0, str(FOLDER))
    try:
        import soak_faults
        import soak_runs
        import soak_twins
        import watched_job
    finally:
        sys.path.pop(0)
    return SimpleNamespace(
        faults=soak_faults, runs=soak_runs, twins=soak_twins, job=watched_job, steps=6
    )


@pytest.fixture(scope="module")
def trained(soak_parts, toy, tmp_path_factory):
    """The folder of a run of six steps that went well."""
    folder, batch = tmp_path_factory.mktemp("trained"), soak_parts.runs.BATCH
    overrides = [f"data.mirror={toy}", "data.workers=0", f"run.folder={folder}"]
    overrides += [f"train.batch_tokens={batch}", f"train.budget_tokens={batch * soak_parts.steps}"]
    overrides += ["validation.every_steps=3", "validation.characters_per_source=200"]
    settings = read_settings(Settings, toy / "toy.toml", overrides)
    assert pretrain(settings, Console(quiet=True)) == 0
    return folder


@pytest.fixture
def finished(soak_parts, trained, tmp_path):
    """Two of it, one the other's twin."""
    for name in ("one", "two"):
        shutil.copytree(trained, tmp_path / name)
    return soak_parts.runs.Bed(tmp_path, soak_parts.steps)


def found_by(soak_parts, bed, moved=False):
    found = soak_parts.twins.Findings()
    made = soak_parts.twins.rows(bed, "one", "train")
    soak_parts.twins.compare(bed, "one", "two", made, moved, found)
    return found


def rewrite(bed, change):
    """Change the rows of the first run's record."""
    path = bed.folder / "one" / "metrics.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def altered(step, **fields):
    def change(rows):
        return [row | fields if row.get("step") == step and "loss" in row else row for row in rows]

    return change


def without(step):
    return lambda rows: [row for row in rows if row.get("step") != step]


def doubled(step):
    return lambda rows: [row for row in rows for _ in range(1 + (row.get("step") == step))]


@pytest.mark.parametrize("moved", [False, True])
def test_the_soak_finds_nothing_wrong_where_nothing_is(soak_parts, finished, moved):
    found = found_by(soak_parts, finished, moved)
    assert found.problems == []
    assert (found.compared_rows, found.wrong_losses, found.lost_tokens) == (6, 0, 0)


@pytest.mark.parametrize(
    ("change", "lost", "repeated", "wrong"),
    [
        (without(4), 512, 0, 0),
        (doubled(4), 0, 512, 0),
        (altered(4, batch_sha="x"), 512, 0, 1),
        (altered(4, loss=5.0), 0, 0, 1),
        (altered(4, loss=float("nan")), 0, 0, 1),
        (altered(4, grad_norm=5.0), 0, 0, 1),
        (altered(4, tokens=1), 0, 0, 1),
        (lambda rows: rows[::-1], 0, 0, 0),
        (lambda rows: [row | {"held_out_loss": 1.0} for row in rows], 0, 0, 0),
    ],
    ids=["missing", "twice", "batch", "loss", "nan", "norm", "tokens", "order", "held-out"],
)
def test_the_soak_finds_a_wrong_record(soak_parts, finished, change, lost, repeated, wrong):
    rewrite(finished, change)
    found = found_by(soak_parts, finished)
    assert found.problems
    assert (found.lost_tokens, found.repeated_tokens, found.wrong_losses) == (lost, repeated, wrong)


def test_losses_of_a_moved_run_may_differ_a_little(soak_parts, finished):
    rows = soak_parts.twins.rows(finished, "one", "train")
    rewrite(finished, altered(4, loss=rows[3]["loss"] + 9e-6))
    assert found_by(soak_parts, finished).wrong_losses == 1
    found = found_by(soak_parts, finished, moved=True)
    assert (found.problems, found.deviation) == ([], pytest.approx(9e-6))
    rewrite(finished, altered(4, loss=rows[3]["loss"] + 2e-5))
    assert found_by(soak_parts, finished, moved=True).wrong_losses == 1


@pytest.mark.parametrize("name", ["ledger.json", "state.json", "model", "optimizer"])
def test_the_soak_finds_wrong_files(soak_parts, finished, monkeypatch, name):
    if name == "ledger.json":
        (finished.folder / "one" / name).unlink()
    elif name == "state.json":

        def read(path):
            wrong = {"tokens": 1} if path.name == name and "one" in path.parts else {}
            return read_json(path) | wrong

        monkeypatch.setattr(soak_parts.twins, "read_json", read)
    else:

        def tensors(folder, stem):
            found = read_tensors(folder, stem)
            if stem == name and "one" in folder.parts:
                next(iter(found.values())).view(-1).view(torch.int32)[0] ^= 1
            return found

        monkeypatch.setattr(soak_parts.twins, "read_tensors", tensors)
    assert len(found_by(soak_parts, finished).problems) == 1


def test_a_watched_record_gives_each_row_once_over_cuts(soak_parts, tmp_path):
    path, resumed = tmp_path / "metrics.jsonl", {"kind": "resume", "step": 2}
    JsonLines(path, lambda kind: True).write("train", {"step": 1}, None)
    tail, sink = soak_parts.job.Tail(path), JsonLines(path, lambda kind: True)
    assert tail.read() == []
    for step in (2, 3):
        sink.write("train", {"step": step}, None)
    with path.open("a") as file:
        file.write('{"kind": "tr')
        file.flush()
        assert [row["step"] for row in tail.read()] == [2, 3]
    for _ in range(3):  # each time the same words, and each time they are news
        cut_rows(path, 2)
        JsonLines(path, lambda kind: True).write("resume", {"step": 2}, None)
        assert tail.read() == [resumed]
        assert tail.read() == []
    cut_rows(path, 1)
    assert tail.read() == []
    JsonLines(path, lambda kind: True).write("train", {"step": 2}, None)
    assert tail.read() == [{"kind": "train", "step": 2}]


def lives(pid):
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_nothing_of_a_watched_job_is_left(soak_parts, tmp_path):
    words = ["sh", "-c", "setsid sh -c 'trap \"\" TERM; sleep 60' & sleep 60 & wait"]
    with soak_parts.job.Job(words, tmp_path, tmp_path / "log.txt", {}) as job:
        assert job.wait(lambda: len(job.processes()) >= 4, 10)
        found = job.processes()
    assert job.code == -signal.SIGKILL
    deadline = time.monotonic() + 10  # a busy kernel takes a moment to end what was killed
    while left := [pid for pid in found if lives(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak_hurts_runs_and_says_what_came_of_it(tmp_path):
    out = tmp_path / "figures.json"
    options = ["--minutes", "0.3", "--nproc", "2", "--steps", "40", "--seed", "3", "--json", out]
    done = subprocess.run(
        [sys.executable, FOLDER / "soak.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 3;" in done.stdout
    figures = json.loads(out.read_text())
    assert figures["problems"] == []
    assert figures["lost_tokens"] == figures["repeated_tokens"] == figures["wrong_losses"] == 0
    assert figures["runs"]["finished"] >= 1
    assert sum(figures["faults"].values()) >= 1
    assert figures["steps"] == figures["steps_compared"] >= 40
    assert {"date", "command", "commit", "hardware", "versions", "seed"} <= figures.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parallel_measures_two_ranks(tmp_path):
    out = tmp_path / "figures.json"
    toy = ["model.vocabulary=512", "model.width=64", "model.mlp_hidden=96", "model.layers=2"]
    toy += ["train.batch_tokens=2048", "model.heads=2", "model.kv_heads=2"]
    done = subprocess.run(
        [sys.executable, FOLDER / "parallel.py", "--quick", "--json", out, *toy],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["speed"].keys() == {
        *("one thread", "two threads", "apart", "replicated", "sharded")
    }
    for values in (*figures["speed"].values(), *figures["restart"].values()):
        assert_spread(values)
    pair = [figures["speed"][name]["all"][0] for name in ("replicated", "apart")]
    assert figures["ratios"]["replicated / apart"]["all"][0] == pytest.approx(pair[0] / pair[1])
    for layout, wire in figures["wire"].items():
        # all that is sent is accounted for: sums of the norm and the like are small
        assert 0 <= wire["beyond"]["rest"] < 20e3, layout
        assert wire["tensors / least"] == pytest.approx(wire["sent"]["tensors"] / wire["least"])
    assert figures["wire"]["replicated"]["beyond"]["muon"] == 0
    assert figures["wire"]["sharded"]["beyond"]["muon"] > 0
    for save in figures["save"].values():
        assert 0 < save["stall"]["median"] < save["asynchronous"]["median"]
        assert save["bytes"]["median"] > 0
    assert "sharded / apart" in done.stdout


@pytest.mark.slow
def test_plan_holds_probes_against_runs(tmp_path):
    out = tmp_path / "plan.json"
    options = ["--steps", "5", "--turns", "1", "--cases", "adamw", "--json", out]
    run = subprocess.run(
        [sys.executable, FOLDER / "plan.py", *options], capture_output=True, text=True, check=True
    )
    (found,) = json.loads(out.read_text())["cases"].values()
    (real,), (before, after) = found["runs"], found["probes"]
    mean = (before["step_seconds"] + after["step_seconds"]) / 2
    assert found["time_error"] == pytest.approx(mean / real["step_seconds"] - 1)
    assert abs(found["memory_error"]) < 0.1
    assert f"adamw        step time {found['time_error']:+.1%}" in run.stdout
