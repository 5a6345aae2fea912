"""The files of a store: one file, a folder or a glob under s3://, gs:// or https://.

Flow: `files` lists a source here; what `stores` tells of each file pins it.
"""

from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote, unquote

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards import stores
from summerlm.data.shards.globs import fits, pattern_of
from summerlm.data.shards.stores import Found
from summerlm.data.shards.threads import in_threads
from summerlm.data.shards.transfer import File, Transfer, in_words
from summerlm.data.shards.web import MISSING, Refused, check_scheme, is_web


def list_store(
    source: str,
    url: str,
    config: SourceConfig,
    transfer: Transfer,
    pinned: Sequence[File] | None,
) -> list[File]:
    """List the files of a source in a store.

    Args:
        source: The source's name, for messages.
        url: Its file, folder or glob.
        config: Its settings.
        transfer: Asks the store.
        pinned: What a lock knows: the store is not asked then. None = look.

    Returns:
        The files, sorted by name; never empty.

    Raises:
        UsageError: If there is no such place, the user may not read it, or no file matches.
        SourceDownError: If the store doesn't answer before the deadline.
    """
    check_scheme(source, url)
    folder, pattern = _split(source, url, config)
    if pinned is not None:
        if pattern is None and [file.name for file in pinned] == [_plain(url, _name(url))]:
            return [replace(pinned[0], url=url)]
        quoted = quote if is_web(url) else str
        return [replace(file, url=f"{folder}/{quoted(file.name)}") for file in pinned]
    try:
        if pattern is None:
            told = transfer.ask(url, lambda patience: stores.describe(url, patience))
            if told is not None:
                return [_pin(source, _plain(url, _name(url)), Found(url, told), transfer)]
            pattern = pattern_of(source, config)
        found = transfer.ask(folder, lambda patience: stores.find(folder, patience))
    except Refused as refusal:
        reason = "no such file or folder" if refusal.status == MISSING else in_words(refusal, url)
        raise UsageError(f"source {source}: {url}: {reason}") from None
    below = f"{folder}/"
    places = {_plain(url, f.url.removeprefix(below)): f for f in found if f.url.startswith(below)}
    chosen = sorted(name for name in places if fits(name, pattern))
    if not chosen:
        raise UsageError(f"source {source}: no file matches {pattern!r} below {folder}")
    pins = dict(in_threads(lambda name: _pin(source, name, places[name], transfer), chosen))
    return [pins[name] for name in chosen]


def _split(source: str, url: str, config: SourceConfig) -> tuple[str, str | None]:
    """Split an address into a folder and the glob below it; None = it may be a single file's."""
    scheme, _, path = url.partition("://")
    parts = path.split("/")
    magic = set("*[") if is_web(url) else set("*?[")  # in an address, `?` begins a query
    wild = next((i for i, part in enumerate(parts) if magic & set(part)), None)
    if wild is not None:
        if config.files or config.data_dir:
            raise UsageError(f"source {source}: `files` and `data_dir` go with a folder, not {url}")
        return f"{scheme}://{'/'.join(parts[:wild])}", "/".join(parts[wild:])
    if url.endswith("/") or config.files or config.data_dir:
        return url.rstrip("/"), pattern_of(source, config)
    return url, None


def _name(url: str) -> str:
    """Give the last part of an address, without its query."""
    return url.partition("?")[0].rpartition("/")[2] if is_web(url) else url.rpartition("/")[2]


def _plain(url: str, name: str) -> str:
    """Read a name as the store of `url` writes it."""
    return unquote(name) if is_web(url) else name


def _pin(source: str, name: str, found: Found, transfer: Transfer) -> File:
    """Pin a file by what the store tells of it; the links of a web page tell nothing yet."""
    told = found.told
    if told.size is None:
        answer = transfer.ask(found.url, lambda patience: stores.describe(found.url, patience))
        if answer is None or answer.size is None:
            raise SourceDownError(f"source {source}: {found.url}: the server tells no size of it")
        told = answer
    assert told.size is not None
    return File(name, found.url, told.size, f"etag:{told.tag or ''}")
