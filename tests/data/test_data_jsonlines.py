import gzip
import json
import multiprocessing
import random
import resource
from pathlib import Path

import pyarrow as pa
import pytest

from summerlm.core.errors import (
    DamagedDataError,
    DataChangedError,
    SaveError,
    SourceDownError,
    UsageError,
)
from summerlm.data.config import SourceConfig
from summerlm.data.shards import jsonlines
from summerlm.data.shards import lines as lines_module
from summerlm.data.shards import rows as reasons
from summerlm.data.shards.files import find_files
from summerlm.data.shards.formats import open_shards
from summerlm.data.shards.jsonlines import GROUP_BYTES, GROUP_ROWS
from summerlm.data.shards.rows import Dropped
from summerlm.data.shards.shard import Shard
from summerlm.data.shards.transfer import Transfer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jsonlines"


def opened(path: Path, **settings: object) -> Shard:
    """The only shard of a source that reads one file."""
    config = SourceConfig(weight=1, path=str(path), **settings)
    transfer = Transfer(5, 10)
    (shard,) = open_shards("s", config, find_files("s", config, None, transfer).files, transfer)
    return shard


def rows(shard: Shard) -> list[str | Dropped]:
    return [row for g, count in enumerate(shard.groups) for row in shard.read(g, 0, count)]


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def packed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return pa.compress(data, "zstd", asbytes=True) if name.endswith(".zst") else data


@pytest.mark.parametrize("kind", ["jsonl", "json", "ndjson"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_line_is_a_row(tmp_path: Path, kind: str, packing: str) -> None:
    texts = [" one\r\n", "\u2028two\x85", "né \0", "<s>"]
    data = lines(*({"id": 1, "text": text} for text in texts))
    data = data[:-1]  # the last line may lack its end
    path = tmp_path / f"a.{kind}{packing}"
    half = len(data) // 2  # several members or frames in a file are one text
    path.write_bytes(packed(path.name, data[:half]) + packed(path.name, data[half:]))
    assert rows(opened(path)) == texts


def test_bad_rows_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "first"}\n\n  \r\n'
        b'{"text": null}\n{"other": 1}\n{"text": ""}\n{"text": 5}\n{"text": ["x"]}\n'
        b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n'
        b'{"text": "cut\n[1]\n"text"\n' + b"[" * 100_000 + b'\n{"text": ' + b"9" * 5000 + b"}\n"
    )
    assert rows(opened(path)) == [
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
    shard = opened(path, conversations="messages")
    assert rows(shard) == ["\nUSER: Hi\nASSISTANT: Hello", reasons.EMPTY, reasons.WRONG_TYPE]


def test_groups_close_by_text_and_by_rows(tmp_path: Path) -> None:
    big, small = GROUP_BYTES // 3 + 1, 10
    sizes = [big] * 7 + [small] * (GROUP_ROWS + 5) + [3 * GROUP_BYTES] + [small]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({"text": "x" * size} for size in sizes)))
    shard = opened(path)
    assert shard.groups == (3, 3, GROUP_ROWS, 7, 1)  # 7 = the 6 small ones left and the huge one
    assert [len(row) for row in rows(shard)] == sizes


def test_the_copy_is_made_once_per_content_and_column(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(lines({"text": "one", "title": "two"}))
    again.write_bytes(path.read_bytes())
    shard = opened(path)
    assert shard.file.size == path.stat().st_size
    with monkeypatch.context() as patch:
        patch.delattr(jsonlines, "rows_of")  # nothing may be read anew
        assert rows(opened(again)) == ["one"]
    assert rows(opened(path, column="title")) == ["two"]
    path.write_bytes(lines({"text": "six"}))
    assert rows(opened(path)) == ["six"]
    assert len(list(cache.iterdir())) == 3


def _open(path: Path, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    results.put(rows(opened(path)))  # type: ignore[attr-defined]


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
        opened(path)
    assert f"{path}: {message}" in str(caught.value)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("packing", "damage"),
    [
        *(("gz", damage) for damage in ("cut", "flip", "overwrite", "plain")),
        *(("zst", damage) for damage in ("cut", "overwrite", "plain")),  # it has no checksum
    ],
)
def test_a_damaged_file_is_named_and_leaves_no_copy(
    tmp_path: Path, cache: Path, damage: str, packing: str
) -> None:
    words = random.Random(0).choices(["one", "two", "three", "four"], k=50_000)
    text = lines({"text": "first"}, {"text": " ".join(words)})
    data = bytearray(packed(f"a.{packing}", text))
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flip":
        data[len(data) // 2] ^= 0x10
    elif damage == "overwrite":
        data[1000:1050] = b"\xff" * 50
    else:
        data[:2] = b"{}"
    path = tmp_path / f"a.json.{packing}"
    path.write_bytes(data)
    with pytest.raises(DamagedDataError, match=f"{path}: damaged"):
        opened(path)
    assert not list(cache.iterdir())


def test_a_damaged_copy_is_named(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}))
    opened(path)
    (copy,) = cache.iterdir()
    copy.write_bytes(copy.read_bytes()[:-3])
    with pytest.raises(SourceDownError, match="delete this copy") as caught:
        opened(path)
    assert type(caught.value) is SourceDownError  # no damage of the source, which may be skipped


def test_a_flipped_bit_in_the_copy_is_noticed(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    noise = random.Random(0)
    path.write_bytes(lines(*({"text": noise.randbytes(500).hex()} for _ in range(50))))
    shard = opened(path)
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
            opened(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(cache.iterdir())
    assert len(rows(opened(path))) == 500


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}))
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "a.jsonl"))
    with pytest.raises(SaveError, match="can't write the cache"):
        opened(tmp_path / "a.jsonl")


def test_conditions_and_their_keys(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines(
            {"text": "a", "meta": {"licence": "CC0"}},
            {"text": "b", "meta": {"licence": "all rights"}},
            {"text": "c"},
            {"text": "d", "meta": "CC0"},
        )
    )
    dropped = Dropped("where meta.licence in CC0, MIT")
    shard = opened(path, where=("meta.licence in CC0, MIT",))
    assert rows(shard) == ["a", dropped, dropped, dropped]
    assert rows(opened(path)) == ["a", "b", "c", "d"]  # a copy of its own
    with pytest.raises(UsageError, match=r"no key 'mata'; its keys are: meta, text"):
        opened(path, where=("mata.licence = CC0",))


def test_a_template_has_a_copy_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"messages": [{"role": "user", "content": "Hi"}]}))
    assert rows(opened(path, conversations="messages")) == ["\nUSER: Hi"]
    assert rows(opened(path, conversations="messages", template="chat")) == ['[["user", "Hi"]]']


def test_a_line_without_end_stays_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    long = lines({"text": "x" * 1000})
    edge = lines({"text": "y" * 87})
    assert len(edge) == 100  # with its end it is just too long
    path.write_bytes(lines({"text": "a"}) + long + edge + lines({"text": "z" * 86}) + long[:-1])
    too_long = reasons.TOO_LONG
    assert rows(opened(path)) == ["a", too_long, too_long, "z" * 86, too_long]


def test_a_document_of_50_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    text = "é word " * (50 * 2**20 // 8)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(lines({"text": "before"}, {"text": text}, {"text": "after"}))
    assert rows(opened(path)) == ["before", text, "after"]


def test_files_are_converted_in_parallel(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonlines.os, "sched_getaffinity", lambda pid: {0, 1})
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_bytes(lines({"text": f"row {number}"}))
    config = SourceConfig(weight=1, path=str(folder))
    transfer = Transfer(5, 10)
    files = find_files("s", config, None, transfer).files
    told: list[tuple[str, int, int]] = []
    shards = open_shards("s", config, files, transfer, None, lambda *args: told.append(args))
    assert [rows(shard) for shard in shards] == [["row 0"], ["row 1"], ["row 2"]]
    assert told == [("converting JSON lines", done, 3) for done in (1, 2, 3)]
    (folder / "1.jsonl").write_bytes(b"no objects")
    (folder / "2.jsonl").write_bytes(b"nor here")
    files = find_files("s", config, None, transfer).files
    with pytest.raises(UsageError, match=r"jsonl: holds no JSON object"):
        open_shards("s", config, files, transfer)


def test_pinned_sizes_need_no_look_at_the_copy(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}, {"text": "two"}))
    config = SourceConfig(weight=1, path=str(path))
    transfer = Transfer(5, 10)
    files = find_files("s", config, None, transfer).files
    sizes = {"a.jsonl": ((2,), (10,))}
    (shard,) = open_shards("s", config, files, transfer, sizes)
    (copy,) = cache.iterdir()
    assert rows(shard) == ["one", "two"]
    copy.write_bytes(b"no parquet")
    assert open_shards("s", config, files, transfer, sizes) == [shard]
    copy.unlink()
    assert rows(open_shards("s", config, files, transfer, sizes)[0]) == ["one", "two"]


def test_a_file_that_changes_while_it_is_copied(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}))
    config = SourceConfig(weight=1, path=str(path))
    transfer = Transfer(5, 10)
    files = find_files("s", config, None, transfer).files
    path.write_bytes(lines({"text": "two"}))
    with pytest.raises(DataChangedError, match=r"a.jsonl: changed since it was listed"):
        open_shards("s", config, files, transfer)
    assert not list(cache.iterdir())
