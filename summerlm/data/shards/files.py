"""The settings of a source -> its files, pinned, in the order that every machine sees.

Flow: `opening` opens what `find_files` lists. Names are relative to the source's folder or
repository, so that moving the data changes nothing, and are sorted by code point, whatever the
disk's or store's order. A mirror of the hub lists what the hub itself would list.
"""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.core.progress import Progress, silent
from summerlm.data.config import SourceConfig
from summerlm.data.shards.globs import fits, pattern_of
from summerlm.data.shards.hashes import hash_file, remembered_hashes
from summerlm.data.shards.hub import file_url, list_repository
from summerlm.data.shards.remote import list_store
from summerlm.data.shards.transfer import File, Transfer

MIRROR_VARIABLE = "SUMMERLM_HUB_MIRROR"


@dataclass
class Listing:
    """The files of a source.

    Args:
        revision: The commit of a hub repository; None where it has none or a mirror hides it.
        files: The files, sorted by name; never empty.
    """

    revision: str | None
    files: list[File]

    @classmethod
    def of_pin(cls, pin: Mapping[str, Any]) -> "Listing":
        """Give back what a lock recorded, whose files lie nowhere yet."""
        files = [File(file["name"], "", file["bytes"], file["hash"]) for file in pin["files"]]
        return cls(pin["revision"], files)


def find_files(
    source: str,
    config: SourceConfig,
    mirror: Path | None,
    transfer: Transfer,
    pinned: Listing | None = None,
    progress: Progress = silent,
) -> Listing:
    """List the files of a source.

    Args:
        source: The source's name, for messages.
        config: Its settings, with `hub` or `path`.
        mirror: Folder that holds `owner/name/...`; None = the environment's, if that is set.
        transfer: Asks stores.
        pinned: What a lock knows. Remote files are then taken from it without asking; those of
            this machine are hashed as they are, in the lock's kind of hash. None = look.
        progress: Called while files are hashed.

    Returns:
        The files.

    Raises:
        UsageError: If there is no such place, or no file that matches.
        SourceDownError: If a file or store can't be read.
    """
    mirror = mirror or environments_mirror()
    if config.hub is not None and mirror is None:
        return _in_hub(source, config, transfer, pinned)
    if config.path is not None and "://" in config.path:
        known = pinned.files if pinned else None
        return Listing(None, list_store(source, config.path, config, transfer, known))
    try:
        return _here(source, config, mirror, pinned, progress)
    except OSError as error:
        place = error.filename or config.path or config.hub
        raise SourceDownError(f"source {source}: {place}: {error.strerror or error}") from error


def _here(
    source: str,
    config: SourceConfig,
    mirror: Path | None,
    pinned: Listing | None,
    progress: Progress,
) -> Listing:
    """List files of this machine."""
    if config.hub is not None:
        assert mirror is not None
        folder = mirror.expanduser() / config.hub
        if not folder.is_dir():
            raise UsageError(f"source {source}: the mirror has no folder {folder}")
        files = _in_folder(source, folder, config, pinned, progress)
        return Listing(pinned.revision if pinned else None, files)
    assert config.path is not None
    path = Path(os.path.abspath(Path(config.path).expanduser()))
    if path.is_dir():
        return Listing(None, _in_folder(source, path, config, pinned, progress))
    if config.files is not None or config.data_dir is not None:
        raise UsageError(
            f"source {source}: `files` and `data_dir` go with a folder, and {path} is none"
        )
    if path.is_file():
        return Listing(None, _hashed(path.parent, [path.name], pinned, progress))
    wild = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), None)
    if wild is None:
        raise UsageError(f"source {source}: {path}: no such file or folder")
    folder, pattern = Path(*path.parts[:wild]), str(Path(*path.parts[wild:]))
    return Listing(None, _hashed(folder, _matches(source, folder, pattern), pinned, progress))


def environments_mirror() -> Path | None:
    """Give the mirror that the environment names; None where it names none."""
    folder = os.environ.get(MIRROR_VARIABLE)
    return Path(folder) if folder else None


def _in_hub(
    source: str, config: SourceConfig, transfer: Transfer, pinned: Listing | None
) -> Listing:
    """List a repository of the hub; without asking it where a commit is pinned."""
    assert config.hub is not None
    if pinned is not None and pinned.revision is not None:
        return Listing(
            pinned.revision,
            [replace(f, url=file_url(config.hub, pinned.revision, f.name)) for f in pinned.files],
        )
    pattern = pattern_of(source, config)
    commit, files = list_repository(source, config.hub, config.revision, config.data_dir, transfer)
    found = [file for file in files if fits(file.name, pattern)]
    if not found:
        raise UsageError(f"source {source}: no file matches {pattern!r} in {config.hub}")
    kinds = _kinds(pinned)
    for index, file in enumerate(found):
        if file.hash.startswith("git:") and kinds.get(file.name) == "sha256":  # a mirror's lock
            found[index] = replace(file, hash=hash_file(transfer.fetch(file), "sha256"))
    return Listing(commit, sorted(found, key=lambda file: file.name))


def _kinds(pinned: Listing | None) -> dict[str, str]:
    """Give the kind of hash that a lock has for each file."""
    return {file.name: file.hash.partition(":")[0] for file in pinned.files} if pinned else {}


def _in_folder(
    source: str, folder: Path, config: SourceConfig, pinned: Listing | None, progress: Progress
) -> list[File]:
    names = _matches(source, folder, pattern_of(source, config))
    return _hashed(folder, names, pinned, progress)


def _matches(source: str, folder: Path, pattern: str) -> list[str]:
    """Match files below a folder; hidden ones only where the pattern spells out their dot."""
    found = _walk(source, folder, pattern.split("/"))
    names = [name for name in found if fits(name, pattern) and (folder / name).is_file()]
    if not names:
        raise UsageError(f"source {source}: no file matches {pattern!r} below {folder}")
    for name in names:
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UsageError(f"source {source}: {name!r} is no name in UTF-8; rename the file")
    return sorted(names)


def _walk(source: str, folder: Path, pattern: Sequence[str]) -> Iterator[str]:
    """Yield the files below a folder that a pattern may fit; an unlisted folder is an error."""

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        raise SourceDownError(
            f"source {source}: {error.filename}: can't be listed ({error.strerror}); grant access, "
            "or leave it out by `files`"
        ) from error

    seen = set()  # folders may be reached by links, also round in a circle
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.stat(root)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        below = Path(root).relative_to(folder)
        depth = len(below.parts)
        if "**" not in pattern[: depth + 1]:  # a part of the pattern for each folder
            wanted = pattern[depth] if depth < len(pattern) - 1 else ""
            folders[:] = [name for name in folders if fnmatchcase(name, wanted)]
        yield from ((below / name).as_posix() for name in files)


def _hashed(
    folder: Path, names: Sequence[str], pinned: Listing | None, progress: Progress
) -> list[File]:
    """Pin files of this machine, each by the kind of hash that the lock has for it."""
    kinds = _kinds(pinned)
    folder = Path(os.path.abspath(folder))
    wanted = [(name, "git" if kinds.get(name) == "git" else "sha256") for name in names]
    known = remembered_hashes(folder, wanted, progress)
    return [File(name, str(folder / name), *known[name]) for name in names]
