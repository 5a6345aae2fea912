import gzip
import json
import multiprocessing
import random
import resource
from pathlib import Path

import pytest

from summerlm.core.errors import SaveError, SourceDownError, UsageError
from summerlm.data.shards import jsonlines
from summerlm.data.shards import rows as reasons
from summerlm.data.shards.formats import Column, Shard
from summerlm.data.shards.jsonlines import GROUP_BYTES, GROUP_ROWS, open_json_lines
from summerlm.data.shards.rows import Dropped

TEXT = Column("text", dialogue=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jsonlines"


def rows(shard: Shard) -> list[str | Dropped]:
    return [row for g, count in enumerate(shard.groups) for row in shard.read(g, 0, count)]


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_every_line_is_a_row(tmp_path: Path, name: str) -> None:
    texts = [" one\r\n", "\u2028two\x85", "né \0", "<s>"]
    data = lines(*({"id": 1, "text": text} for text in texts))
    data = data[:-1]  # the last line may lack its end
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert rows(open_json_lines(name, path, TEXT)) == texts


def test_bad_rows_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "first"}\n\n  \r\n'
        b'{"text": null}\n{"other": 1}\n{"text": ""}\n{"text": 5}\n{"text": ["x"]}\n'
        b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n'
        b'{"text": "cut\n[1]\n"text"\n' + b"[" * 100_000 + b'\n{"text": ' + b"9" * 5000 + b"}\n"
    )
    assert rows(open_json_lines("a.jsonl", path, TEXT)) == [
        "first",
        reasons.NULL,
        reasons.NULL,
        reasons.EMPTY,
        reasons.WRONG_TYPE,
        reasons.WRONG_TYPE,
        reasons.BAD_UTF8,
        reasons.SURROGATE,
        "\U0001f600",
        reasons.NOT_JSON,
        reasons.NOT_JSON,
        reasons.NOT_JSON,
        reasons.NOT_JSON,
        reasons.NOT_JSON,
    ]


def test_dialogues(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_bytes(lines({"messages": turns}, {"messages": []}, {"messages": "Hi"}))
    shard = open_json_lines("a.jsonl", path, Column("messages", dialogue=True))
    assert rows(shard) == ["\nUSER: Hi\nASSISTANT: Hello", reasons.EMPTY, reasons.WRONG_TYPE]


def test_groups_close_by_text_and_by_rows(tmp_path: Path) -> None:
    big, small = GROUP_BYTES // 3 + 1, 10
    sizes = [big] * 7 + [small] * (GROUP_ROWS + 5) + [3 * GROUP_BYTES] + [small]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({"text": "x" * size} for size in sizes)))
    shard = open_json_lines("a.jsonl", path, TEXT)
    assert shard.groups == (3, 3, GROUP_ROWS, 7, 1)  # 7 = the 6 small ones left and the huge one
    assert [len(row) for row in rows(shard)] == sizes


def test_the_copy_is_made_once_per_content_and_column(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(lines({"text": "one", "title": "two"}))
    again.write_bytes(path.read_bytes())
    shard = open_json_lines("a.jsonl", path, TEXT)
    assert shard.size == path.stat().st_size
    with monkeypatch.context() as patch:
        patch.delattr(jsonlines, "_rows")  # nothing may be read anew
        assert rows(open_json_lines("b.jsonl", again, TEXT)) == ["one"]
    assert rows(open_json_lines("a.jsonl", path, Column("title", dialogue=False))) == ["two"]
    path.write_bytes(lines({"text": "six"}))
    assert rows(open_json_lines("a.jsonl", path, TEXT)) == ["six"]
    assert len(list(cache.iterdir())) == 3


def _open(path: Path, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    results.put(rows(open_json_lines(path.name, path, TEXT)))  # type: ignore[attr-defined]


def test_many_processes_at_once(tmp_path: Path, cache: Path) -> None:
    texts = [f"row {n} " * 50 for n in range(3000)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({"text": text} for text in texts)))
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=_open, args=(path, start, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get() for _ in processes] == [texts] * 4
    for process in processes:
        process.join()
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lines({"texts": "one", "id": 1}, {"url": "u"}), "no key 'text'; its keys are: texts, "),
        (b"", "holds no JSON object"),
        (b"plain words\nand more\n", "holds no JSON object"),
        (b'[\n{"text": "an array over lines"},\n2]\n', "holds no JSON object"),
    ],
)
def test_a_file_without_the_key(tmp_path: Path, cache: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        open_json_lines("a.json", path, TEXT)
    assert f"{path}: {message}" in str(caught.value)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flip", "overwrite", "plain"])
def test_a_damaged_gz_is_named_and_leaves_no_copy(tmp_path: Path, cache: Path, damage: str) -> None:
    words = random.Random(0).choices(["one", "two", "three", "four"], k=50_000)
    data = bytearray(gzip.compress(lines({"text": "first"}, {"text": " ".join(words)})))
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flip":
        data[len(data) // 2] ^= 0x10
    elif damage == "overwrite":
        data[1000:1050] = b"\xff" * 50
    else:
        data[:2] = b"{}"
    path = tmp_path / "a.json.gz"
    path.write_bytes(data)
    with pytest.raises(SourceDownError, match=f"{path}: unreadable or damaged"):
        open_json_lines("a.json.gz", path, TEXT)
    assert not list(cache.iterdir())


def test_a_damaged_copy_is_named(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}))
    open_json_lines("a.jsonl", path, TEXT)
    (copy,) = cache.iterdir()
    copy.write_bytes(copy.read_bytes()[:-3])
    with pytest.raises(SourceDownError, match="delete this copy"):
        open_json_lines("a.jsonl", path, TEXT)


def test_a_flipped_bit_in_the_copy_is_noticed(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    noise = random.Random(0)
    path.write_bytes(lines(*({"text": noise.randbytes(500).hex()} for _ in range(50))))
    shard = open_json_lines("a.jsonl", path, TEXT)
    (copy,) = cache.iterdir()
    data, expected = copy.read_bytes(), rows(shard)
    for offset in range(100, len(data) // 2, 997):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << noise.randrange(8)
        copy.write_bytes(flipped)
        with pytest.raises(SourceDownError, match="delete this copy"):
            rows(shard)
    copy.write_bytes(data)
    assert rows(shard) == expected


def test_a_full_disk(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    noise = random.Random(0)
    path.write_bytes(lines(*({"text": noise.randbytes(2000).hex()} for _ in range(500))))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SaveError, match="SUMMERLM_CACHE"):
            open_json_lines("a.jsonl", path, TEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(cache.iterdir())
    assert len(rows(open_json_lines("a.jsonl", path, TEXT))) == 500


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}))
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "a.jsonl"))
    with pytest.raises(SaveError, match="can't write the cache"):
        open_json_lines("a.jsonl", tmp_path / "a.jsonl", TEXT)
