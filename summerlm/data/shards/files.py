"""The settings of a source -> its files, pinned, in the order that every machine sees.

Flow: `opening` opens what `find_files` lists. Names are relative to the source's folder or
repository, so that moving the data changes nothing, and are sorted by code point, whatever the
disk's or store's order. A mirror of the hub lists what the hub itself would list.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.core.progress import Progress, silent
from summerlm.data.config import SourceConfig
from summerlm.data.shards import stores, web
from summerlm.data.shards.hashes import remembered_hashes
from summerlm.data.shards.hub import file_url, list_repository
from summerlm.data.shards.transfer import File, Transfer, in_words
from summerlm.data.shards.web import MISSING, Refused, Told, is_web

MIRROR_VARIABLE = "SUMMERLM_HUB_MIRROR"
EVERYTHING = "**/*"
THREADS = 16  # files asked about at once


@dataclass
class Listing:
    """The files of a source.

    Args:
        revision: The commit of a hub repository; None where it has none or a mirror hides it.
        files: The files, sorted by name; never empty.
    """

    revision: str | None
    files: list[File]


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
    if config.hub is not None:
        mirror = mirror or _environments_mirror()
        if mirror is None:
            return _in_hub(source, config, transfer, pinned)
        folder = mirror.expanduser() / config.hub
        if not folder.is_dir():
            raise UsageError(f"source {source}: the mirror has no folder {folder}")
        files = _in_folder(source, folder, config, pinned, progress)
        return Listing(pinned.revision if pinned else None, files)
    assert config.path is not None
    if "://" in config.path:
        web.check_scheme(source, config.path)
        return Listing(None, _in_store(source, config.path, config, transfer, pinned))
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


def fits(name: str, pattern: str) -> bool:
    """Tell whether a name matches a glob, as `glob.glob` of Python has it.

    Args:
        name: A path with `/`.
        pattern: The glob: `**` crosses folders, and a leading dot must be spelled out.

    Returns:
        Whether it matches.

    Example:
        >>> fits("data/en/0.parquet", "data/**/*.parquet"), fits("data/.0.parquet", "**/*")
        (True, False)
    """
    return _fits(name.split("/"), pattern.split("/"))


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not parts or not pattern:
        return not parts and not pattern
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        if len(pattern) == 1:
            return not any(part.startswith(".") for part in parts)
        return _fits(parts, pattern[1:]) or (not hidden and _fits(parts[1:], pattern))
    shown = not hidden or pattern[0].startswith(".")
    return shown and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _environments_mirror() -> Path | None:
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
    pattern = _pattern(source, config)
    commit, files = list_repository(source, config.hub, config.revision, config.data_dir, transfer)
    found = [file for file in files if fits(file.name, pattern)]
    return Listing(commit, _sorted(source, found, pattern, config.hub))


def _in_folder(
    source: str, folder: Path, config: SourceConfig, pinned: Listing | None, progress: Progress
) -> list[File]:
    names = _matches(source, folder, _pattern(source, config))
    return _hashed(folder, names, pinned, progress)


def _pattern(source: str, config: SourceConfig) -> str:
    """Give the glob below the folder or repository that the settings ask for."""
    for setting in (config.data_dir, config.files):
        if setting and (PurePosixPath(setting).is_absolute() or ".." in setting.split("/")):
            raise UsageError(f"source {source}: {setting!r} must stay below the source's folder")
    below = glob.escape(config.data_dir.strip("/")) + "/" if config.data_dir else ""
    return below + (config.files or EVERYTHING)


def _matches(source: str, folder: Path, pattern: str) -> list[str]:
    """Match files below a folder; hidden ones only where the pattern spells out their dot."""
    names = {
        Path(name).as_posix()
        for name in glob.iglob(pattern, root_dir=folder, recursive=True)
        if (folder / name).is_file()
    }
    if not names:
        raise UsageError(f"source {source}: no file matches {pattern!r} below {folder}")
    return sorted(names)


def _hashed(
    folder: Path, names: Sequence[str], pinned: Listing | None, progress: Progress
) -> list[File]:
    """Pin files of this machine, each by the kind of hash that the lock has for it."""
    kinds = {file.name: file.hash.partition(":")[0] for file in pinned.files} if pinned else {}
    folder = Path(os.path.abspath(folder))
    wanted = [(name, "git" if kinds.get(name) == "git" else "sha256") for name in names]
    known = remembered_hashes(folder, wanted, progress)
    return [File(name, str(folder / name), *known[name]) for name in names]


def _in_store(
    source: str, url: str, config: SourceConfig, transfer: Transfer, pinned: Listing | None
) -> list[File]:
    """List a file, a folder or a glob of a store; without asking it where files are pinned."""
    magic = "*[" if is_web(url) else "*?["  # in an address, `?` begins a query
    scheme, _, path = url.partition("://")
    parts = path.split("/")
    wild = next((i for i, part in enumerate(parts) if set(part) & set(magic)), None)
    folder, pattern = url.rstrip("/"), _pattern(source, config)
    single = wild is None and not (url.endswith("/") or config.files or config.data_dir)
    if wild is not None:
        if config.files or config.data_dir:
            raise UsageError(f"source {source}: `files` and `data_dir` go with a folder, not {url}")
        folder = f"{scheme}://{'/'.join(parts[:wild])}"
        pattern = "/".join(parts[wild:])
    try:
        if single and pinned is not None and [f.name for f in pinned.files] == [_last(url)]:
            return [replace(pinned.files[0], url=url)]
        if pinned is not None:
            return [replace(file, url=f"{folder}/{file.name}") for file in pinned.files]
        if single and (told := transfer.ask(url, lambda p: stores.describe(url, p))) is not None:
            return [_pinned_by(source, _last(url), url, told)]
        found = transfer.ask(folder, lambda patience: stores.find(folder, patience))
    except Refused as refusal:
        reason = "no such file or folder" if refusal.status == MISSING else in_words(refusal, url)
        raise UsageError(f"source {source}: {url}: {reason}") from None
    places = {unquote(f.url[len(folder) + 1 :]): f for f in found if f.url.startswith(folder + "/")}
    chosen = {name: place for name, place in places.items() if fits(name, pattern)}
    with ThreadPoolExecutor(THREADS) as threads:  # pages of links don't tell sizes
        files = list(
            threads.map(
                lambda item: _pinned_by(source, item[0], item[1].url, _told(item[1], transfer)),
                chosen.items(),
            )
        )
    return _sorted(source, files, pattern, folder)


def _told(found: stores.Found, transfer: Transfer) -> Told:
    if found.told.size is not None:
        return found.told
    told = transfer.ask(found.url, lambda patience: stores.describe(found.url, patience))
    return told or Told(None, None)


def _pinned_by(source: str, name: str, url: str, told: Told) -> File:
    if told.size is None:
        raise SourceDownError(f"source {source}: {url}: the server doesn't tell the file's size")
    return File(name, url, told.size, f"etag:{told.tag or ''}")


def _last(url: str) -> str:
    return unquote(url.partition("://")[2].partition("?")[0].rpartition("/")[2])


def _sorted(source: str, files: Iterable[File], pattern: str, place: str) -> list[File]:
    ordered = sorted(files, key=lambda file: file.name)
    if not ordered:
        raise UsageError(f"source {source}: no file matches {pattern!r} below {place}")
    return ordered
