"""Faults between a store and a row: the rows are those without faults, or the run is told why not.

Cases 30 to 35 of the list of faults, as far as files and rows go; what a run makes of them is
tested with the recipes.
"""

import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from summerlm.core.errors import DamagedDataError, DataChangedError, SourceDownError, UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards import parquet, retrying
from summerlm.data.shards.files import Listing, find_files
from summerlm.data.shards.formats import open_shards
from summerlm.data.shards.rows import Row
from summerlm.data.shards.shard import Shard
from summerlm.data.shards.transfer import Transfer

NOISE = random.Random(0)
TEXTS = [NOISE.randbytes(NOISE.randrange(20, 900)).hex() for _ in range(400)]
REPOSITORY = "owner/name"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SUMMERLM_HUB_MIRROR", raising=False)
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # JSON lines: no processes
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Two shards of a repository in each format; the text is the second column of three."""
    folder = tmp_path / "hub" / REPOSITORY
    for kind in ("parquet", "jsonl", "text", "talk"):
        (folder / kind).mkdir(parents=True)
    for number, texts in enumerate((TEXTS[:250], TEXTS[250:])):
        table = pa.table({"id": range(len(texts)), "text": texts, "url": texts[::-1]})
        pq.write_table(
            table,
            folder / f"parquet/{number}.parquet",
            50,
            write_page_checksum=True,
            use_dictionary=False,
        )
        talks = [[{"from": "human", "value": t}, {"from": "gpt", "value": t[::-1]}] for t in texts]
        pq.write_table(pa.table({"talk": talks}), folder / f"talk/{number}.parquet", 50)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"jsonl/{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for number, text in enumerate(TEXTS[:5]):
        (folder / f"text/{number}.txt").write_text(text)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def settings(kind: str) -> SourceConfig:
    more = {"conversations": "talk", "template": "chat"} if kind == "talk" else {}
    return SourceConfig(weight=1, hub=REPOSITORY, data_dir=kind, **more)


def opened(kind: str, transfer: Transfer) -> list[Shard]:
    config = settings(kind)
    return open_shards("s", config, find_files("s", config, None, transfer).files, transfer)


def rows(shards: list[Shard]) -> list[Row]:
    return [row for s in shards for g, count in enumerate(s.groups) for row in s.read(g, 0, count)]


def expected(kind: str) -> list[str]:
    if kind == "talk":
        return [json.dumps([["user", text], ["assistant", text[::-1]]]) for text in TEXTS]
    return TEXTS[:5] if kind == "text" else TEXTS


FAULTS = [
    ("status", {"status": 503}),
    ("cut", {"after": 50}),
    ("stall", {"after": 50, "seconds": 20, "times": 1}),
    pytest.param(
        "status",
        {"status": 429, "headers": {"Retry-After": "1"}, "times": 2},
        marks=pytest.mark.slow,
    ),
    pytest.param("reset", {"after": 50}, marks=pytest.mark.slow),
    pytest.param("short", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fault", "how"), FAULTS)
@pytest.mark.parametrize("kind", ["parquet", "ranges", "talk", "jsonl", "text"])
def test_rows_are_those_without_faults(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str, how: dict[str, object]
) -> None:
    if kind in ("ranges", "talk"):
        monkeypatch.setattr(parquet, "WHOLE_BYTES", 0)
    kind = "parquet" if kind == "ranges" else kind
    hub.script(fault, **{"chance": 0.5, "times": 5, **how})
    transfer = Transfer(0.2, 30)
    shards = opened(kind, transfer)
    assert rows(shards) == expected(kind)
    assert hub.applied
    incidents = transfer.take_incidents()
    assert incidents
    assert sum(incident["attempts"] - 1 for incident in incidents) == len(hub.applied)


@pytest.mark.parametrize("whole", [0, 64 << 20])
def test_a_group_costs_one_request(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", whole)
    for kind in ("parquet", "talk"):
        shards = opened(kind, Transfer(1, 5))
        hub.requests.clear()
        assert rows(shards) == expected(kind)
        groups = sum(len(shard.groups) for shard in shards)
        assert len(hub.asked("/cdn/")) == (len(shards) if whole else groups)


def test_footers_are_kept(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 0)
    monkeypatch.setattr(parquet, "TAIL_BYTES", 100)  # less than the footer
    first = opened("parquet", Transfer(1, 5))
    hub.requests.clear()
    assert opened("parquet", Transfer(1, 5)) is not first
    assert hub.asked("/cdn/") == []
    assert rows(opened("parquet", Transfer(1, 5))) == TEXTS


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("parquet", "stall"), ("parquet", "status"), ("jsonl", "drip"), ("text", "cut")],
)
def test_a_source_that_stays_down_ends_at_the_deadline(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 0)
    transfer = Transfer(0.1, 0.5)
    shards = opened(kind, transfer) if kind != "jsonl" else []
    config = settings(kind)
    files = find_files("s", config, None, transfer).files
    hub.script(fault, times=100_000, after=10, seconds=20 if fault == "stall" else 0.05)
    start = time.monotonic()
    with pytest.raises(SourceDownError, match=rf"{hub.url}.*{kind}/\d.*attempt"):
        rows(shards or open_shards("s", config, files[:1], transfer))
    assert time.monotonic() - start < 1.5
    hub.behave()
    assert rows(opened(kind, transfer)) == expected(kind)


@pytest.mark.parametrize("where", ["footer", "group"])
@pytest.mark.parametrize("whole", [0, 64 << 20])
def test_bytes_that_flip_on_the_way_are_read_again(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, where: str, whole: int
) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", whole)
    size = (hub.folder / REPOSITORY / "parquet/0.parquet").stat().st_size
    transfer = Transfer(1, 5)
    if where == "footer":  # in the magic number that ends the file
        hub.script("flip", match="0.parquet", after=size - 2)
    shards = opened("parquet", transfer)
    if where == "group":
        hub.script("flip", match="0.parquet", after=5000)
    assert rows(shards) == TEXTS
    assert hub.applied == ["flip"]
    if where == "group":
        (incident,) = transfer.take_incidents()
        assert "parquet/0.parquet" in incident["reason"]


@pytest.mark.parametrize("whole", [0, 64 << 20])
def test_bytes_that_are_damaged_at_the_source(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    """The group is named, others stay readable, and it is the same at every start."""
    monkeypatch.setattr(parquet, "WHOLE_BYTES", whole)
    path = hub.folder / REPOSITORY / "parquet/0.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 4
    path.write_bytes(data)
    for _ in range(2):
        transfer = Transfer(1, 5)
        first, second = opened("parquet", transfer)
        for group in range(5):
            if group != 2:
                assert list(first.read(group, 0, 50)) == TEXTS[50 * group : 50 * group + 50]
        with pytest.raises(
            DamagedDataError, match=r"http.*parquet/0.parquet: row group 2: damaged"
        ):
            list(first.read(2, 0, 50))
        assert "read anew" in transfer.take_incidents()[0]["reason"]
        assert rows([second]) == TEXTS[250:]


@pytest.mark.parametrize("keep", [0, 5000, -3])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_that_was_cut_at_the_source(hub: HubServer, kind: str, keep: int) -> None:
    (path, *_) = sorted((hub.folder / REPOSITORY / kind).iterdir())
    path.write_bytes(path.read_bytes()[:keep])
    error = UsageError if kind == "jsonl" and keep == 0 else DamagedDataError  # an empty file
    with pytest.raises(error, match=rf"http.*{kind}/0.*(damaged|no JSON object)"):
        opened(kind, Transfer(1, 5))


def test_a_copy_that_rots_in_the_cache_is_fetched_again(hub: HubServer, cache: Path) -> None:
    transfer = Transfer(1, 5)
    shards = opened("parquet", transfer)
    assert rows(shards) == TEXTS
    for copy in (cache / "files").iterdir():
        data = bytearray(copy.read_bytes())
        data[5000] ^= 4
        copy.write_bytes(data)
    assert rows(shards) == TEXTS
    assert len(transfer.take_incidents()) == len(shards)
    for footer in (cache / "footers").iterdir():
        footer.write_bytes(b"PAR1")
    assert rows(opened("parquet", transfer)) == TEXTS


def test_lines_that_rot_in_the_cache_are_fetched_again(hub: HubServer, cache: Path) -> None:
    opened("jsonl", Transfer(1, 5))
    for path in (cache / "jsonlines").iterdir():
        path.unlink()
    for copy in (cache / "files").iterdir():
        copy.write_bytes(copy.read_bytes()[:-10])
    transfer = Transfer(1, 5)
    assert rows(opened("jsonl", transfer)) == TEXTS
    assert all("read anew" in incident["reason"] for incident in transfer.take_incidents())


@pytest.mark.parametrize("whole", [0, 64 << 20])
@pytest.mark.parametrize("kind", ["parquet", "text"])
def test_a_shard_that_vanishes(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, kind: str, whole: int
) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", whole)
    shards = opened(kind, Transfer(1, 5))
    (hub.folder / REPOSITORY / kind).rename(hub.folder / "away")
    assert rows(shards) == expected(kind)  # a commit of the hub stays
    for path in (hub.folder / "away").iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    (hub.folder / "away").rename(hub.folder / REPOSITORY / kind)
    changed = opened(kind, Transfer(1, 5)) if kind == "text" else []
    hub.squash()
    for name in (hub.folder / REPOSITORY / kind).iterdir():
        name.unlink()
    if whole == 0 and kind == "parquet":
        with pytest.raises(DataChangedError, match=r"parquet/0.parquet: HTTP 404.*is gone"):
            rows(shards)
    elif kind == "parquet":
        assert rows(shards) == TEXTS  # fetched already
    else:
        with pytest.raises(DataChangedError, match=r"text/0.txt: HTTP 404.*is gone"):
            rows(changed)


@pytest.mark.parametrize("whole", [0, 64 << 20])
def test_other_rows_than_the_lock_knows(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(parquet, "WHOLE_BYTES", whole)
    transfer = Transfer(1, 5)
    config = settings("parquet")
    files = find_files("s", config, None, transfer).files
    hub.requests.clear()
    sizes = {"parquet/0.parquet": ((50,) * 5, (1,) * 5), "parquet/1.parquet": ((150,), (1,))}
    first, second = open_shards("s", config, files, transfer, sizes)
    assert hub.requests == []
    assert rows([first]) == TEXTS[:250]
    with pytest.raises(
        DataChangedError, match=r"1.parquet: has 150 rows in 3 groups, had 150 in 1"
    ):
        rows([second])


def test_a_repository_that_moves_on_changes_nothing(hub: HubServer) -> None:
    """A lock pins the commit; without it, the new commit's hashes differ from the lock's."""
    transfer = Transfer(1, 5)
    config = settings("parquet")
    before = find_files("s", config, None, transfer)
    path = hub.folder / REPOSITORY / "parquet/0.parquet"
    pq.write_table(pa.table({"text": ["other"]}), path)
    pinned = find_files("s", config, None, transfer, before)
    assert pinned == before
    assert rows(open_shards("s", config, pinned.files, transfer)) == TEXTS
    after = find_files("s", config, None, transfer)
    assert after.revision != before.revision
    assert [a.hash == b.hash for a, b in zip(after.files, before.files, strict=True)] == [
        False,
        True,
    ]
    again = find_files("s", config, hub.folder, transfer, Listing(None, before.files))
    assert [file.hash for file in again.files] == [file.hash for file in after.files]


@pytest.mark.slow
def test_processes_that_convert_tell_what_they_met(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    hub.script("status", match="/cdn/", times=2)
    transfer = Transfer(1, 20)
    assert rows(opened("jsonl", transfer)) == TEXTS
    incidents = transfer.take_incidents()
    assert sum(incident["attempts"] - 1 for incident in incidents) == 2
