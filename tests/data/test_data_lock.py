import json
from typing import Any

import pytest

from summerlm.data.lock import lock_differences

FILE = {"name": "a.parquet", "bytes": 10, "sha256": "1" * 64, "rows": [3, 2]}
BOOKS = {"name": "books", "revision": "main", "licence": "CC0", "held_out": 0.01, "files": [FILE]}
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
        (changed("files/0/rows", [3, 3]), "source code: file a.parquet had 5 rows and has 6"),
        (
            changed("files/0/rows", [2, 3]),
            "source code: file a.parquet has its rows in other groups",
        ),
        (changed("files/0/bytes", 11), "source code: file a.parquet had 10 bytes and has 11"),
        (
            changed("files/0/sha256", "2" * 64),
            "source code: file a.parquet has other bytes: sha256 was "
            + "1" * 12
            + " and is "
            + "2" * 12,
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
