"""A file of items -> its rows, whatever its form, and whether a row is what a task expects.

Flow: `items` reads every file through `rows_of_file`, checks each row by `check`, and keeps the
`fingerprint` of all.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from summerlm.core.errors import UsageError
from summerlm.data.shards.shard import nearest_first, reading
from summerlm.eval.definition import ColumnKind, Task
from summerlm.eval.templates import ItemError


def rows_of_file(name: str, path: Path) -> list[dict[str, Any]]:
    """Read a file: parquet, an Arrow stream, or JSON lines.

    Args:
        name: The file's name, which tells its form.
        path: Where its bytes lie; a copy in the cache folder has another name.

    Returns:
        The rows, values by column.

    Raises:
        UsageError: If a line is not a JSON object.
        DamagedDataError: If the file can't be decoded, for instance because it is cut.
        SourceDownError: If it can't be read.
    """
    with reading(name), path.open("rb") as opened:
        if name.endswith(".parquet"):
            return pq.read_table(opened, use_threads=False).to_pylist()
        if name.endswith(".arrow"):
            return pa.ipc.open_stream(opened).read_all().to_pylist()
        return list(_json_lines(name, opened.read().decode()))


def _json_lines(name: str, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.removesuffix("\n").split("\n")):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"{name}: row {number} is not a JSON object: {line[:60]!r}")
        yield row


def check(row: Mapping[str, Any], column: str, kind: ColumnKind) -> None:
    """Compare a value with what a task expects.

    Args:
        row: The row.
        column: The column, or a key below it after a dot.
        kind: What it must hold.

    Raises:
        ItemError: If it is not there, or holds something else.
    """
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            have = nearest_first(key, list(value)) if isinstance(value, Mapping) else "no columns"
            raise ItemError(f"no column {column!r}; there are: {have}")
        value = value[key]
    fits = {
        "text": isinstance(value, str),
        "texts": isinstance(value, list) and all(isinstance(text, str) for text in value),
        "integer": isinstance(value, int) and not isinstance(value, bool),
    }[kind]
    if not fits:
        wanted = {"text": "text", "texts": "a list of texts", "integer": "a whole number"}[kind]
        raise ItemError(f"column {column!r} is {str(value)[:60]!r}, not {wanted}")


def fingerprint(task: Task, rows: Iterable[Mapping[str, Any]]) -> str:
    """Hash what a task reads of its rows, whatever form of file they came in.

    Args:
        task: The task.
        rows: Its rows, in order.

    Returns:
        SHA-256 in hexadecimal.
    """
    columns = sorted({column.split(".")[0] for column in task.data.columns})
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row[column] for column in columns], sort_keys=True).encode())
    return digest.hexdigest()
