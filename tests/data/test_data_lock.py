import json
from pathlib import Path
from typing import Any

import pytest

from summerlm.core.config import validate
from summerlm.core.errors import UsageError
from summerlm.data.config import DataConfig
from summerlm.data.lock import lock_differences, read_lock, require_licences, write_lock

FILE = {"name": "a.parquet", "bytes": 10, "hash": "sha256:" + "1" * 64, "rows": [3, 2]}
FILE["group_bytes"] = [30, 20]
BOOKS = {"name": "books", "revision": "main", "licence": "CC0", "held_out": 0.01, "files": [FILE]}
BOOKS["rules"] = ["a", "b"]
CODE = {**BOOKS, "name": "code"}


def changed(path: str, value: Any) -> list[dict[str, Any]]:
    locks = json.loads(json.dumps([BOOKS, CODE]))
    place: Any = locks[1]
    *parents, last = path.split("/")
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return locks


def test_equal_locks_also_after_json() -> None:
    assert lock_differences([BOOKS, CODE], json.loads(json.dumps([BOOKS, CODE]))) == []


@pytest.mark.parametrize(
    ("new", "line"),
    [
        (changed("revision", "v2"), "source code: revision was main and is v2"),
        (changed("held_out", 0.0), "source code: held_out was 0.01 and is 0.0"),
        (changed("column", "x"), "source code: column was None and is x"),
        (changed("rules", ["b", "c"]), "source code: rules no longer has a, has c as well"),
        (changed("rules", ["a", "b", "c"]), "source code: rules has c as well"),
        (changed("rules", ["b", "a"]), "source code: rules was ['a', 'b'] and is ['b', 'a']"),
        (changed("files/0/rows", [3, 3]), "source code: file a.parquet had 5 rows and has 6"),
        (
            changed("files/0/rows", [2, 3]),
            "source code: file a.parquet has its rows in other groups",
        ),
        (changed("files/0/bytes", 11), "source code: file a.parquet had 10 bytes and has 11"),
        (
            changed("files/0/hash", "sha256:" + "2" * 64),
            "source code: file a.parquet has other bytes: its hash was "
            f"sha256:{'1' * 17} and is sha256:{'2' * 17}",
        ),
        ([BOOKS], "source code: is gone"),
        ([BOOKS, CODE, {**BOOKS, "name": "talk"}], "source talk: is new"),
        ([CODE, BOOKS], "sources: the order was books, code and is code, books"),
    ],
)
def test_each_difference_is_one_line(new: list[dict[str, Any]], line: str) -> None:
    assert lock_differences([BOOKS, CODE], new) == [line]


def test_files_come_and_go() -> None:
    other = changed("files", [{**FILE, "name": "b.parquet"}])
    assert lock_differences([BOOKS, CODE], other) == [
        "source code: file a.parquet is gone",
        "source code: file b.parquet is new",
    ]


def test_an_unknown_commit_is_no_difference() -> None:
    assert lock_differences([{**BOOKS, "revision": None}], [BOOKS]) == []
    assert lock_differences([BOOKS], [{**BOOKS, "revision": None}]) == []


def test_a_lock_file_holds_what_was_written_a_line_a_file(tmp_path: Path) -> None:
    many = {**BOOKS, "licence": 'ü "x"', "files": [FILE, {**FILE, "name": "b.parquet"}]}
    path = tmp_path / "new" / "data.lock.json"
    write_lock(path, [many, CODE])
    assert read_lock(path) == [many, CODE]
    assert sum('"hash"' in line for line in path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "text", ["[]", '{"version": 2, "sources": []}', '{"version": 1, "sources": [{}]}', "{"]
)
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.lock.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"data\.lock\.json"):
        read_lock(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "books"),
        ("revision", 7),
        ("files", [FILE, FILE]),
        ("files/0/rows", 5),
        ("files/0/rows", ["a"]),
        ("files/0/group_bytes", [50]),
        ("files/0/hash", None),
    ],
)
def test_an_edited_lock_is_refused(tmp_path: Path, path: str, value: Any) -> None:
    write_lock(tmp_path / "data.lock.json", changed(path, value))
    with pytest.raises(UsageError, match=r"data\.lock\.json: damaged lock file"):
        read_lock(tmp_path / "data.lock.json")


def test_a_source_without_licence_is_refused() -> None:
    known = {"path": "a", "weight": 1, "licence": "CC0-1.0"}
    unknown = {"path": "b", "weight": 1}
    require_licences(validate(DataConfig, {"sources": {"a": known}}, "test"))
    config = validate(DataConfig, {"sources": {"a": known, "b": unknown, "c": unknown}}, "test")
    with pytest.raises(UsageError, match=r"sources\.b: no licence.*also c"):
        require_licences(config)
