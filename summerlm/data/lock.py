"""What a run's data were and are: differences in plain words.

Flow: a run keeps `Source.lock` of every source; on a resume the loader compares them with the
opened sources' and refuses other data by these lines.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


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
        if key != "files" and old.get(key) != new.get(key):
            yield f"{key} was {old.get(key)} and is {new.get(key)}"
    before = {file["name"]: file for file in old["files"]}
    after = {file["name"]: file for file in new["files"]}
    for name in sorted({*before, *after}):
        if name not in after:
            yield f"file {name} is gone"
        elif name not in before:
            yield f"file {name} is new"
        elif before[name] != after[name]:
            yield f"file {name} {_file_difference(before[name], after[name])}"


def _file_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if sum(old["rows"]) != sum(new["rows"]):
        return f"had {sum(old['rows'])} rows and has {sum(new['rows'])}"
    if old["bytes"] != new["bytes"]:
        return f"had {old['bytes']} bytes and has {new['bytes']}"
    if old["sha256"] != new["sha256"]:
        return f"has other bytes: sha256 was {old['sha256'][:12]} and is {new['sha256'][:12]}"
    return "has its rows in other groups"
