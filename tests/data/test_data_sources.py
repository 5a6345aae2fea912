import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from summerlm.core.config import validate
from summerlm.core.errors import SummerError, UsageError
from summerlm.data.config import DataConfig
from summerlm.data.heldout import HeldOutRows
from summerlm.data.lock import lock_differences
from summerlm.data.opening import open_sources
from summerlm.data.shards.rows import EMPTY, NULL, Dropped
from summerlm.data.shards.stdlib import standard_library
from summerlm.data.sources import Source
from summerlm.data.units import UNIT_BYTES, UNITS_PER_LANE

REPOSITORY = Path(__file__).parents[2]
HUB = Path(os.environ.get("SUMMERLM_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "hub"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUMMERLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def settings(held_out: float = 0.0, **values: dict[str, Any]) -> DataConfig:
    tables = {name: {"weight": 1, **table} for name, table in values.items()}
    table = {"sources": tables, "held_out_fraction": held_out}
    return validate(DataConfig, table, "test")


def open_one(lanes: int = 1, held_out: float = 0.0, name: str = "s", **values: Any) -> Source:
    (source,) = open_sources(settings(held_out, **{name: values}), lanes)
    return source


def write_parquet(path: Path, rows: list[str | None], group: int) -> None:
    pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), path, group)


def training(source: Source) -> list[str]:
    texts = [source.read(unit) for unit in range(len(source.units))]
    assert [len(unit) for unit in texts] == list(source.units)
    return ["" if isinstance(row, Dropped) else row for unit in texts for row in unit]


FILES = st.lists(
    st.tuples(st.lists(st.sampled_from(["a ", None, " ", "ü"]), max_size=30), st.integers(1, 40)),
    min_size=1,
    max_size=3,
)


@examples(deadline=None)
@given(FILES, st.integers(1, 20), st.sampled_from([0.0, 0.01, 0.3]))
def test_every_row_is_trained_on_or_held_out(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[list[str | None], int]],
    lanes: int,
    fraction: float,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    counts = {f"{number}.parquet": len(rows) for number, (rows, _) in enumerate(files)}
    rule = HeldOutRows("s", fraction, counts)
    train: list[str] = []
    held: list[str] = []
    for number, (kinds, group) in enumerate(files):
        name = f"{number}.parquet"
        rows = [kind and kind.strip() and f"{kind}{number} {r}" for r, kind in enumerate(kinds)]
        write_parquet(folder / name, rows, group)
        for row, is_held in zip(rows, rule.mask(name, 0, len(rows)), strict=True):
            (held if is_held else train).append(row or "")
    if len(train) < lanes or not any(train):
        with pytest.raises(UsageError, match=f"{len(train)} training rows|no training row has a"):
            open_one(lanes, fraction, path=str(folder))
        return

    source = open_one(lanes, fraction, path=str(folder))
    assert training(source) == train
    assert list(source.held_out()) == list(filter(None, held))
    assert min(source.units) >= 1
    assert len(source.units) >= min(len(train), UNITS_PER_LANE * lanes)


def test_large_groups_are_striped(tmp_path: Path) -> None:
    rows = [f"{n:04}" * 2500 for n in range(3000)]  # 30 MB in two groups
    write_parquet(tmp_path / "a.parquet", rows, 2000)
    source = open_one(path=str(tmp_path / "a.parquet"))
    sizes = [sum(map(len, source.read(unit))) for unit in range(len(source.units))]
    assert len(sizes) == 5 + 3
    assert max(sizes) <= UNIT_BYTES
    assert training(source) == rows


def test_no_more_units_than_needed(tmp_path: Path) -> None:
    for number in range(8):
        write_parquet(tmp_path / f"{number}.parquet", ["text"] * 10, 5)
    assert len(open_one(4, path=str(tmp_path)).units) == 16
    assert len(open_one(5, path=str(tmp_path)).units) == 32
    assert len(open_one(60, path=str(tmp_path)).units) == 80


def test_too_few_rows_for_the_lanes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["text"] * 10, 10)
    assert open_one(10, path=str(tmp_path)).units == [1] * 10
    with pytest.raises(UsageError, match=r"source s: 10 training rows can't feed 11 lanes"):
        open_one(11, path=str(tmp_path))
    with pytest.raises(UsageError, match=r"source s: 9 training rows can't feed 10 lanes"):
        open_one(10, 1e-9, path=str(tmp_path))  # at least one row is held out


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    texts = [f" document {n}\r\n\n" for n in range(50)]
    for folder in ("parquet", "jsonl", "txt"):
        (tmp_path / folder).mkdir()
    write_parquet(tmp_path / "parquet" / "a.parquet", texts, 7)
    objects = (json.dumps({"text": text}) for text in texts)
    (tmp_path / "jsonl" / "a.jsonl").write_text("\n".join(objects))
    for number, text in enumerate(texts):
        (tmp_path / "txt" / f"{number:02}.py").write_bytes(text.encode())
    for folder in ("parquet", "jsonl", "txt"):
        assert training(open_one(3, path=str(tmp_path / folder))) == texts


def test_nothing_depends_on_where_and_when(tmp_path: Path) -> None:
    for folder, when in (("here", 1), ("there", 2_000_000_000)):
        (tmp_path / folder).mkdir()
        for number in range(5):
            path = tmp_path / folder / f"{number}.parquet"
            write_parquet(path, [f"{number} {row}" for row in range(40)], 9)
            os.utime(path, (when, when))
    here, there = (open_one(4, 0.1, path=str(tmp_path / f)) for f in ("here", "there"))
    assert here.units == there.units
    assert training(here) == training(there)
    assert list(here.held_out()) == list(there.held_out())
    assert here.lock() == there.lock() == json.loads(json.dumps(here.lock()))
    assert str(tmp_path) not in json.dumps(here.lock())
    other = open_one(4, 0.1, name="other", path=str(tmp_path / "here"))
    assert list(other.held_out()) != list(here.held_out())  # the name is part of the key


def test_the_lock_says_what_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "owner/name/data/a.parquet"
    path.parent.mkdir(parents=True)
    write_parquet(path, ["one", "two", "three"], 2)
    table = {"hub": "owner/name", "revision": "abc", "licence": "CC0", "column": "text"}
    table |= {"rules": ["emails"], "max_characters": 9, "files": "**/*.parquet"}
    config = settings(0.25, s=table).model_copy(update={"mirror": tmp_path})
    lock = open_sources(config, 1)[0].lock()
    (file,) = lock.pop("files")
    assert lock == {
        "name": "s",
        "origin": "owner/name",
        "branch": "abc",
        "data_dir": None,
        "glob": "**/*.parquet",
        "revision": None,  # a mirror doesn't know
        "licence": "CC0",
        "terms": None,
        "column": "text",
        "conversations": None,
        "template": "original",
        "where": [],
        "min_characters": None,
        "max_characters": 9,
        "rules": ["emails"],
        "evaluation_sets": None,
        "duplicates": None,
        "held_out": 0.25,
    }
    assert file == {
        "name": "data/a.parquet",
        "bytes": path.stat().st_size,
        "hash": f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}",
        "rows": [2, 1],
        "group_bytes": file["group_bytes"],
    }
    write_parquet(path, ["one", "two"], 2)
    assert lock_differences([{**lock, "files": [file]}], [open_sources(config, 1)[0].lock()]) == [
        "source s: file data/a.parquet had 3 rows and has 2"
    ]


def test_a_row_without_text_says_why_also_in_a_copy(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one", None, " ", None, "two"] * 4, 5)
    source = open_one(path=str(tmp_path))
    for opened in (source, pickle.loads(pickle.dumps(source))):
        for unit in (0, 1, 0):
            assert opened.read(unit) == ["one", NULL, EMPTY, NULL, "two"]


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one"] * 4, 4)
    source = open_one(path=str(tmp_path))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(SummerError, match=r"a\.parquet"):
        source.read(0)


def test_the_standard_library() -> None:
    source = open_one(24, 0.5, python_stdlib=True)  # its split is its own
    split = standard_library()
    assert len(training(source)) == len(split.train)
    assert list(source.held_out()) == [path.read_bytes().decode() for path in split.held_out]
    held_out = source.lock()["held_out"]
    assert len(held_out) == len(split.held_out)
    assert set(held_out) < {file["name"] for file in source.lock()["files"]}


BAD = {
    "empty folder": ({"path": "empty"}, "no file matches"),
    "no rows": ({"path": "none.parquet"}, "0 training rows can't feed 2 lanes"),
    "no text": ({"path": "nulls.parquet"}, "no training row has a text (5 null or missing)"),
    "mixed": ({"path": "mixed"}, "mixes parquet (a.parquet), text (b.txt); choose"),
    "packed": ({"path": "packed/*"}, "a.txt.zst: can't be read in this form; unpack it"),
    "column of a text": ({"path": "two.txt", "column": "text"}, "two.txt is read whole"),
    "missing column": ({"path": "nulls.parquet", "column": "txt"}, "no column 'txt'; its"),
    "not UTF-8": ({"path": "latin"}, "no training row has a text (2 not UTF-8)"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_a_source_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUMMERLM_HUB_MIRROR", raising=False)
    for folder in ("empty", "mixed", "packed", "latin"):
        Path(folder).mkdir()
    write_parquet(Path("none.parquet"), [], 1)
    write_parquet(Path("nulls.parquet"), [None] * 5, 2)
    write_parquet(Path("mixed/a.parquet"), ["one"], 2)
    Path("mixed/b.txt").write_text("two")
    Path("packed/a.txt.zst").write_text("three")
    Path("two.txt").write_text("two")
    Path("latin/a.txt").write_bytes(b"caf\xe9")
    Path("latin/b.txt").write_bytes(b"\xff")
    with pytest.raises(SummerError) as caught:
        open_one(2, **values)
    assert caught.value.exit_code == 2
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


STAND_IN = {
    "fineweb": ({"hub": "HuggingFaceFW/fineweb", "files": "sample/10BT/*.parquet"}, 4449),
    "stack": (
        {"hub": "bigcode/the-stack-dedup", "files": "data/python/*", "column": "content"},
        1619,
    ),
    "books": ({"hub": "common-pile/project_gutenberg_filtered"}, 207),
    "arxiv": ({"hub": "common-pile/arxiv_papers_filtered", "files": "*.json.gz"}, 1785),
    "orca": ({"hub": "Open-Orca/SlimOrca-Dedup", "conversations": "conversations"}, 11085),
}


@pytest.mark.skipif(not HUB.is_dir(), reason="the stand-in data are not here")
def test_the_stand_ins_in_the_hubs_layout() -> None:
    tables = {name: table for name, (table, _) in STAND_IN.items()}
    config = settings(0.01, **tables).model_copy(update={"mirror": HUB})
    opened = open_sources(config, 48)
    assert [source.name for source in opened] == list(STAND_IN)
    for source, (_, rows) in zip(opened, STAND_IN.values(), strict=True):
        train, held = training(source), list(source.held_out())
        assert len(train) + len(held) == rows
        assert len(source.units) >= 4 * 48
        assert all(train)
        assert 0.002 < len(held) / rows < 0.03
        if source.name == "orca":
            assert all(text.startswith(("\nHUMAN: ", "\nSYSTEM: ")) for text in train)
