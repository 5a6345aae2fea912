"""The lock of a run's data: what was pinned, as a file, and differences in plain words.

Flow: `recipes` write `data.lock.json` before the first step and hand it to `open_sources` ever
after, which refuses other data by the lines of `lock_differences`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from summerlm.core.errors import UsageError
from summerlm.core.files import read_json, write_atomically
from summerlm.data.config import DataConfig

VERSION = 1


class _File(BaseModel):
    name: str
    bytes: int
    hash: str
    rows: list[int]
    group_bytes: list[int]


class _Source(BaseModel):
    name: str
    revision: str | None
    files: list[_File]


_SOURCES = TypeAdapter(list[_Source])


def write_lock(path: Path, sources: Sequence[Mapping[str, Any]]) -> None:
    """Write a lock file, a line for each file of a source.

    Args:
        path: The file to make or replace.
        sources: `Source.lock` of each source.

    Raises:
        SaveError: If it can't be written.
    """
    blocks = []
    for source in sources:
        fields = [f"    {_json(key)}: {_json(source[key])}" for key in source if key != "files"]
        files = ",\n".join(f"      {_json(file)}" for file in source["files"])
        fields.append(f'    "files": [\n{files}\n    ]')
        blocks.append("  {\n" + ",\n".join(fields) + "\n  }")
    text = f'{{"version": {VERSION}, "sources": [\n' + ",\n".join(blocks) + "\n]}\n"
    write_atomically(path, text.encode())


def read_lock(path: Path) -> list[dict[str, Any]]:
    """Read a lock file.

    Args:
        path: The file.

    Returns:
        `Source.lock` of each source.

    Raises:
        UsageError: If it is missing, or no lock that this version reads.
    """
    lock = read_json(path)
    if not isinstance(lock, dict) or lock.get("version") != VERSION:
        raise UsageError(f"{path}: not a lock file of version {VERSION}; make it again")
    sources: list[dict[str, Any]] = lock.get("sources", [])
    if not _is_lock(sources):
        raise UsageError(f"{path}: damaged lock file; make it again")
    return sources


def require_licences(config: DataConfig) -> None:
    """Refuse sources whose licence nobody has looked up.

    Args:
        config: The settings of the data.

    Raises:
        UsageError: If a source has no licence.
    """
    missing = [name for name, source in config.sources.items() if not source.licence]
    if missing:
        raise UsageError(
            f"data.sources.{missing[0]}: no licence; look up what its texts may be used for and "
            f'write licence = "..."' + (f" (also {', '.join(missing[1:])})" if missing[1:] else "")
        )


def lock_differences(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Compare the locks of two sets of sources.

    Args:
        old: `Source.lock` of each source as recorded.
        new: The same of the sources as opened now.

    Returns:
        A line for each difference, naming source and file; empty if the data are the same.
    """
    before = {lock["name"]: lock for lock in old}
    after = {lock["name"]: lock for lock in new}
    lines = [f"source {name}: is gone" for name in before if name not in after]
    lines += [f"source {name}: is new" for name in after if name not in before]
    if not lines and list(before) != list(after):
        lines = [f"sources: the order was {', '.join(before)} and is {', '.join(after)}"]
    for name in before:
        if name in after:
            lines += [f"source {name}: {line}" for line in _differences(before[name], after[name])]
    return lines


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if key == "files" or old.get(key) == new.get(key):
            continue
        if key == "revision" and None in (old.get(key), new.get(key)):
            continue  # a mirror doesn't know its commit: the files' hashes must speak
        yield f"{key} {_value_difference(old.get(key), new.get(key))}"
    before = {file["name"]: file for file in old["files"]}
    after = {file["name"]: file for file in new["files"]}
    for name in sorted({*before, *after}):
        if name not in after:
            yield f"file {name} is gone"
        elif name not in before:
            yield f"file {name} is new"
        elif before[name] != after[name]:
            yield f"file {name} {_file_difference(before[name], after[name])}"


def _value_difference(old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        lost = [f"no longer has {value}" for value in old if value not in new]
        won = [f"has {value} as well" for value in new if value not in old]
        if lost or won:
            return ", ".join([*lost, *won])
    return f"was {old} and is {new}"


def _file_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    rows, now = sum(old.get("rows", ())), sum(new.get("rows", ()))
    if rows != now:
        return f"had {rows} rows and has {now}"
    if old["bytes"] != new["bytes"]:
        return f"had {old['bytes']} bytes and has {new['bytes']}"
    if old["hash"] != new["hash"]:
        return f"has other bytes: its hash was {old['hash'][:24]} and is {new['hash'][:24]}"
    return "has its rows in other groups"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_lock(sources: Any) -> bool:
    """Tell whether the sources of a lock have all that opening them takes from there."""
    try:
        _SOURCES.validate_python(sources, strict=True)
    except ValidationError:
        return False
    files = [file for source in sources for file in source["files"]]
    named = [sources, *(source["files"] for source in sources)]
    return all(len(file["rows"]) == len(file["group_bytes"]) for file in files) and all(
        len({entry["name"] for entry in entries}) == len(entries) for entries in named
    )
