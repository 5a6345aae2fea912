import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from summerlm.core.errors import DamagedDataError, DataChangedError, SourceDownError, UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards import rows as reasons
from summerlm.data.shards.files import find_files
from summerlm.data.shards.formats import open_shards
from summerlm.data.shards.parquet import BATCH_ROWS
from summerlm.data.shards.rows import Dropped
from summerlm.data.shards.shard import Shard
from summerlm.data.shards.transfer import Transfer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(path: Path, **settings: object) -> Shard:
    """The only shard of a source that reads one file."""
    config = SourceConfig(weight=1, path=str(path), **settings)
    transfer = Transfer(5, 10)
    (shard,) = open_shards("s", config, find_files("s", config, None, transfer).files, transfer)
    return shard


def write(path: Path, rows: pa.Array, group: int = 100, name: str = "text") -> Path:
    pq.write_table(pa.table({"id": pa.array(range(len(rows))), name: rows}), path, group)
    return path


def broken_utf8(*rows: bytes) -> pa.Array:
    raw = pa.array(rows, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


@pytest.mark.parametrize("group", [1, 7, BATCH_ROWS, 100])
@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_any_stripe_of_any_group(tmp_path: Path, group: int, kind: pa.DataType) -> None:
    texts = [f" row {n}\r\n" if n % 5 else None for n in range(75)]
    shard = opened(write(tmp_path / "a.parquet", pa.array(texts).cast(kind), group))
    assert sum(shard.groups) == 75
    assert max(shard.groups) == min(group, 75)
    first = 0
    for index, rows in enumerate(shard.groups):
        for start in range(0, rows, 3):
            for stop in {start + 1, min(start + BATCH_ROWS + 1, rows), rows}:
                expected = [text or reasons.NULL for text in texts[first + start : first + stop]]
                assert list(shard.read(index, start, stop)) == expected
        first += rows


def test_a_bad_row_costs_itself_only(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet", broken_utf8(b"one", b"\xff\xfe", b" ", b"nul \0", "né".encode())
    )
    read = list(opened(path).read(0, 0, 5))
    assert read == ["one", reasons.BAD_UTF8, reasons.EMPTY, "nul \0", "né"]


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("make_list", [pa.list_, pa.large_list])
def test_dialogues(tmp_path: Path, keys: tuple[str, str], make_list: object) -> None:
    turn = pa.struct([("weight", pa.float64()), *((key, pa.string()) for key in keys)])
    talks = [
        [{keys[0]: "human", keys[1]: "Hi"}, {keys[0]: "gpt", keys[1]: "Hello\n"}],
        None,
        [],
        [{keys[0]: "gpt", keys[1]: None}],
        [None],
    ]
    path = write(tmp_path / "a.parquet", pa.array(talks, make_list(turn)), name="talk")  # type: ignore[operator]
    assert list(opened(path, conversations="talk").read(0, 0, 5)) == [
        "\nHUMAN: Hi\nGPT: Hello\n",
        reasons.NULL,
        reasons.EMPTY,
        reasons.NULL,
        reasons.WRONG_TYPE,
    ]


def test_only_the_text_column_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["text"] * 50))
    other = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = other.dictionary_page_offset or other.data_page_offset
    data[start : start + other.total_compressed_size] = b"\xff" * other.total_compressed_size
    path.write_bytes(data)
    assert list(opened(path).read(0, 0, 50)) == ["text"] * 50


def test_a_stripe_of_a_large_group_takes_little_memory_and_no_thread(tmp_path: Path) -> None:
    noise = random.Random(0)
    texts = [noise.randbytes(5000).hex() for _ in range(6000)]  # 60 MB, 30 MB compressed
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet", 6000, use_dictionary=False, compression="zstd")
    program = """
import os, sys
import pyarrow as pa
from pathlib import Path
from summerlm.data.shards.files import File
from summerlm.data.shards.parquet import open_parquet
from summerlm.data.shards.selection import Selection
from summerlm.data.shards.transfer import Transfer

threads = len(os.listdir("/proc/self/task"))
file = File("a", sys.argv[1], os.path.getsize(sys.argv[1]), "sha256:")
shard = open_parquet(file, Selection("text"), Transfer(1, 1))
assert len(list(shard.read(0, 5000, 5010))) == 10
pool = pa.default_memory_pool()
print(pool.max_memory(), pool.bytes_allocated(), len(os.listdir("/proc/self/task")) - threads)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.parquet")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, left, threads = map(int, out.split())
    assert peak < 25 << 20
    assert left < 1000
    assert threads == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": "txt"}, "no column 'txt'; its columns are: text, talk, n"),
        ({"column": "n"}, "column 'n' is int64, not text"),
        ({"column": "talk"}, "set `conversations` instead of `column`"),
        ({"conversations": "text"}, "column 'text' is string, not a list of {from, value}"),
        ({"where": ("m >= 1",)}, "no column 'm'; its columns are: n, text, talk, deep"),
        ({"where": ("deep.b >= 1",)}, "no key 'b' in column 'deep'; its keys are: a"),
        ({"where": ("text.b = 1",)}, "no key 'b' in column 'text'; its keys are: none"),
        ({"where": ("text >= 1",)}, "where = 'text >= 1': text is string, which can't"),
        ({"where": ("n = one",)}, "where = 'n = one': n is int64, which can't"),
        ({"where": ("talk = one",)}, "which can't be compared so"),
    ],
)
def test_the_wrong_column(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    talk = pa.array([[{"from": "a", "value": "b"}]])
    table = pa.table({"n": [1], "text": ["one"], "talk": talk, "deep": [{"a": 1}]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / "a.parquet", **settings)
    assert str(caught.value).startswith(f"{tmp_path / 'a.parquet'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    data = write(tmp_path / "a.parquet", pa.array([f"row {n}" for n in range(500)])).read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DamagedDataError, match=r"a.parquet: footer: damaged"):
        opened(tmp_path / "a.parquet")


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array([f"row {n}" for n in range(500)]), 500)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"a.parquet: row group 0: damaged"):
        list(opened(path).read(0, 0, 500))


def test_other_rows_than_when_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["one"] * 10), 5)
    shard = opened(path)
    write(path, pa.array(["one"] * 10), 10)
    with pytest.raises(DataChangedError, match=r"a.parquet: has \d+ bytes, and had \d+ when"):
        list(shard.read(0, 0, 5))
    path.unlink()
    with pytest.raises(SourceDownError, match=str(path)):
        list(shard.read(0, 0, 5))


@pytest.mark.parametrize("data", [b"  if x:\r\n\tpass\r", b"\xef\xbb\xbfmark", "é\0\n".encode()])
def test_a_text_file_is_one_row_unchanged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    shard = opened(tmp_path / "a.txt")
    assert shard.groups == (1,)
    (text,) = shard.read(0, 0, 1)
    assert isinstance(text, str)
    assert text.encode() == data


def test_a_text_file_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    assert list(opened(tmp_path / "a.py").read(0, 0, 1)) == [reasons.BAD_UTF8]


def test_a_text_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    shard = opened(path)
    path.write_text("two")
    with pytest.raises(DataChangedError, match=str(path)):
        list(shard.read(0, 0, 1))
    path.unlink()
    with pytest.raises(SourceDownError, match=str(path)) as caught:
        list(shard.read(0, 0, 1))
    assert type(caught.value) is SourceDownError  # no damage, which may be skipped


def test_the_files_of_a_source_are_of_one_kind(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.array(["one"]))
    (tmp_path / "b.JSONL").write_text('{"text": "two"}')
    with pytest.raises(UsageError, match=r"mixes JSON lines \(b.JSONL\), parquet \(a.parquet\)"):
        opened(tmp_path)
    (tmp_path / "b.JSONL").rename(tmp_path / "b.txt.gz")
    with pytest.raises(UsageError, match=r"b.txt.gz: can't be read in this form"):
        opened(tmp_path)


@pytest.mark.parametrize("settings", [{"column": "x"}, {"where": ("x = 1",)}])
def test_a_text_file_has_no_columns(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UsageError, match=r"a.txt is read whole; it has no columns"):
        opened(tmp_path / "a.txt", **settings)


def test_rows_that_miss_a_condition_are_dropped(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b", "c", "d", None],
            "score": [0.9, 0.7, None, 0.8, 0.9],
            "meta": [{"lang": lang, "size": 1} for lang in ("en", "en", "en", "fr", "en")],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", 2)
    shard = opened(tmp_path / "a.parquet", where=("score >= 0.8", "meta.lang in en, de"))
    rows = [row for group, count in enumerate(shard.groups) for row in shard.read(group, 0, count)]
    assert rows == [
        "a",
        Dropped("where score >= 0.8"),
        Dropped("where score >= 0.8"),
        Dropped("where meta.lang in en, de"),
        reasons.NULL,
    ]


def test_bad_utf8_in_a_condition_costs_its_row_only(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "lang": broken_utf8(b"\xff", b"en")})
    pq.write_table(table, tmp_path / "a.parquet")
    shard = opened(tmp_path / "a.parquet", where=("lang = en",))
    assert list(shard.read(0, 0, 2)) == [Dropped("where lang = en"), "b"]


def test_a_dialogue_for_the_chat_template(tmp_path: Path) -> None:
    talks = [
        [{"from": "human", "value": "Hé"}, {"from": "gpt", "value": "Yo"}],
        [{"from": "narrator", "value": "Once"}],
    ]
    path = write(tmp_path / "a.parquet", pa.array(talks), name="talk")
    shard = opened(path, conversations="talk", template="chat")
    assert list(shard.read(0, 0, 2)) == [
        '[["user", "Hé"], ["assistant", "Yo"]]',
        reasons.WRONG_TYPE,
    ]


def test_pinned_sizes_are_believed_until_a_group_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.array(["one"] * 10), 5)
    config = SourceConfig(weight=1, path=str(path))
    transfer = Transfer(5, 10)
    files = find_files("s", config, None, transfer).files
    (fresh,) = open_shards("s", config, files, transfer)
    sizes = {"a.parquet": (fresh.groups, fresh.group_bytes)}
    data = path.read_bytes()
    path.unlink()
    assert open_shards("s", config, files, transfer, sizes) == [fresh]
    path.write_bytes(data)
    (shard,) = open_shards("s", config, files, transfer, {"a.parquet": ((5, 4), (1, 1))})
    with pytest.raises(DataChangedError, match=r"10 rows in 2 groups, had 9 in 2"):
        list(shard.read(0, 0, 5))


def test_a_column_that_changes_its_type_between_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.array(["one"]))
    write(tmp_path / "b.parquet", pa.array([1]))
    config = SourceConfig(weight=1, path=str(tmp_path))
    transfer = Transfer(5, 10)
    files = find_files("s", config, None, transfer).files
    with pytest.raises(UsageError, match=r"b.parquet: column 'text' is int64, not text"):
        open_shards("s", config, files, transfer)
    sizes = dict.fromkeys(("a.parquet", "b.parquet"), ((1,), (1,)))
    first, second = open_shards("s", config, files, transfer, sizes)
    assert list(first.read(0, 0, 1)) == ["one"]
    with pytest.raises(UsageError, match=r"b.parquet: column 'text' is int64, not text"):
        list(second.read(0, 0, 1))


def test_a_lost_disk_is_no_damage(tmp_path: Path) -> None:
    shard = opened(write(tmp_path / "a.parquet", pa.array(["one"])))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(SourceDownError) as caught:
        list(shard.read(0, 0, 1))
    assert not isinstance(caught.value, DamagedDataError)


def test_nothing_is_said_twice_when_a_group_turns_bad(tmp_path: Path) -> None:
    """Damage behind some good rows: they are given once, then the error."""
    noise = random.Random(0)
    texts = [noise.randbytes(3000).hex() for _ in range(200)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts}),
        path,
        use_dictionary=False,
        write_page_checksum=True,
        data_page_size=50_000,
        write_batch_size=8,
    )
    shard = opened(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    given: list[object] = []
    with pytest.raises(DamagedDataError, match=r"a.parquet: row group 0: damaged"):
        given += shard.read(0, 0, 200)
    assert 0 < len(given) < 200
    assert given == texts[: len(given)]
    (incident,) = shard.transfer.take_incidents()
    assert "row group 0: damaged" in incident["reason"]
