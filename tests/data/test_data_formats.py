import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from summerlm.core.errors import DataChangedError, SourceDownError, UsageError
from summerlm.data.shards import rows as reasons
from summerlm.data.shards.formats import BATCH_ROWS, Column, open_parquet, open_text

TEXT = Column("text", dialogue=False)
TALK = Column("talk", dialogue=True)


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
    shard = open_parquet("a", write(tmp_path / "a", pa.array(texts).cast(kind), group), TEXT)
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
    path = write(tmp_path / "a", broken_utf8(b"one", b"\xff\xfe", b" ", b"nul \0", "né".encode()))
    rows = list(open_parquet("a", path, TEXT).read(0, 0, 5))
    assert rows == ["one", reasons.BAD_UTF8, reasons.EMPTY, "nul \0", "né"]


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
    path = write(tmp_path / "a", pa.array(talks, make_list(turn)), name="talk")  # type: ignore[operator]
    assert list(open_parquet("a", path, TALK).read(0, 0, 5)) == [
        "\nHUMAN: Hi\nGPT: Hello\n",
        reasons.NULL,
        reasons.EMPTY,
        reasons.NULL,
        reasons.WRONG_TYPE,
    ]


def test_only_the_text_column_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a", pa.array(["text"] * 50))
    other = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = other.dictionary_page_offset or other.data_page_offset
    data[start : start + other.total_compressed_size] = b"\xff" * other.total_compressed_size
    path.write_bytes(data)
    assert list(open_parquet("a", path, TEXT).read(0, 0, 50)) == ["text"] * 50


def test_a_stripe_of_a_large_group_takes_little_memory_and_no_thread(tmp_path: Path) -> None:
    noise = random.Random(0)
    texts = [noise.randbytes(5000).hex() for _ in range(6000)]  # 60 MB, 30 MB compressed
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a", 6000, use_dictionary=False, compression="zstd")
    program = """
import os, sys
import pyarrow as pa
from pathlib import Path
from summerlm.data.shards.formats import Column, open_parquet

threads = len(os.listdir("/proc/self/task"))
shard = open_parquet("a", Path(sys.argv[1]), Column("text", False))
assert len(list(shard.read(0, 5000, 5010))) == 10
pool = pa.default_memory_pool()
print(pool.max_memory(), pool.bytes_allocated(), len(os.listdir("/proc/self/task")) - threads)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, left, threads = map(int, out.split())
    assert peak < 25 << 20
    assert left < 1000
    assert threads == 0


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (Column("txt", False), "no column 'txt'; its columns are: text, talk, n"),
        (Column("n", False), "column 'n' is int64, not text"),
        (Column("talk", False), "set `conversations` instead of `column`"),
        (Column("text", True), "column 'text' is string, not a list of {from, value}"),
    ],
)
def test_the_wrong_column(tmp_path: Path, column: Column, message: str) -> None:
    talk = pa.array([[{"from": "a", "value": "b"}]])
    table = pa.table({"n": [1], "text": ["one"], "talk": talk})
    pq.write_table(table, tmp_path / "a")
    with pytest.raises(UsageError) as caught:
        open_parquet("a", tmp_path / "a", column)
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    data = write(tmp_path / "a", pa.array([f"row {n}" for n in range(500)])).read_bytes()
    (tmp_path / "a").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(SourceDownError, match="a: unreadable or damaged"):
        open_parquet("a", tmp_path / "a", TEXT)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a", pa.array([f"row {n}" for n in range(500)]), 500)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(SourceDownError, match="a: unreadable or damaged"):
        list(open_parquet("a", path, TEXT).read(0, 0, 500))


def test_other_rows_than_when_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a", pa.array(["one"] * 10), 5)
    shard = open_parquet("a", path, TEXT)
    write(path, pa.array(["one"] * 11), 5)
    with pytest.raises(DataChangedError, match="11 rows in 3 groups, had 10 in 2"):
        list(shard.read(0, 0, 5))
    path.unlink()
    with pytest.raises(SourceDownError, match=str(path)):
        list(shard.read(0, 0, 5))


@pytest.mark.parametrize("data", [b"  if x:\r\n\tpass\r", b"\xef\xbb\xbfmark", "é\0\n".encode()])
def test_a_text_file_is_one_row_unchanged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    shard = open_text("a.txt", tmp_path / "a.txt")
    assert shard.groups == (1,)
    (text,) = shard.read(0, 0, 1)
    assert isinstance(text, str)
    assert text.encode() == data


def test_a_text_file_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    assert list(open_text("a.py", tmp_path / "a.py").read(0, 0, 1)) == [reasons.BAD_UTF8]


def test_a_text_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    shard = open_text("a.txt", path)
    path.write_text("two")
    with pytest.raises(DataChangedError, match=str(path)):
        list(shard.read(0, 0, 1))
    path.unlink()
    with pytest.raises(SourceDownError, match=str(path)):
        list(shard.read(0, 0, 1))
