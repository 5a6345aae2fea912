"""The benchmarks run at toy size and write what they promise; their figures mean nothing here."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parent.parent / "benchmarks"
PEER_PYTHON = os.environ.get("SUMMERLM_TEST_PEER_PYTHON", sys.executable)

TOY = """
[model]
vocabulary = 300
width = 32
layers = 2
heads = 4
kv_heads = 2
head_dim = 8
mlp_hidden = 48
context = 32

[data]
lanes = 4
workers = 1

[train]
batch_tokens = 256

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
