"""One attempt at a store: a range of a file, its size and tag, or the files below a folder.

Flow: `transfer` and `files` ask here, under their retries. `https://` is spoken by `web`, since
an answer's status, headers and length must be seen; `s3://`, `gs://` and the rest by fsspec's
file systems. What may pass is raised as `Transient`, a refusal as `Refused`.
"""

from typing import Any, NamedTuple

from summerlm.core.errors import UsageError
from summerlm.data.shards import web
from summerlm.data.shards.retrying import Transient
from summerlm.data.shards.web import FORBIDDEN, MISSING, Patience, Refused, Told, is_web

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of the package, by protocol

# whose errors are the network's, unless they say otherwise
_NETWORK = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "s3fs", "urllib3", "requests"}
_CREDENTIALS = ("NoCredentials", "PartialCredentials", "DefaultCredentials", "RefreshError")


class Found(NamedTuple):
    """A file in a listing."""

    url: str
    told: Told


def read(url: str, start: int, stop: int, size: int, patience: Patience) -> tuple[bytes, Told]:
    """Read bytes `start` to `stop` of a file.

    Args:
        url: The file.
        start: First byte.
        stop: One past the last byte.
        size: Bytes of the whole file.
        patience: How long to wait.

    Returns:
        Exactly these bytes, and what the store told of the file beside them.

    Raises:
        Transient: If it may work later.
        Refused: If the store won't give it.
    """
    if is_web(url):
        return web.read(url, start, stop, size, patience)
    data = _call(url, "cat_file", patience, start=start, end=stop)
    if len(data) != stop - start:
        raise Transient(f"cut after {len(data)} of {stop - start} bytes")
    return data, Told(None, None)


def describe(url: str, patience: Patience) -> Told | None:
    """Ask for a file's size and tag.

    Args:
        url: The file.
        patience: How long to wait.

    Returns:
        What the store tells; None where the URL is a folder's.

    Raises:
        Transient: If it may work later.
        Refused: If the store won't tell.
    """
    if is_web(url):
        return web.describe(url, patience)
    info = _call(url, "info", patience)
    return None if info["type"] == "directory" else _told(info)


def find(url: str, patience: Patience) -> list[Found]:
    """List all files below a folder, however deep.

    Args:
        url: The folder.
        patience: How long to wait.

    Returns:
        The files in any order; what is told of a web page's links is None.

    Raises:
        Transient: If it may work later.
        Refused: If the store won't tell.
    """
    if is_web(url):
        return [Found(link, Told(None, None)) for link in web.find(url, patience)]
    protocol = url.partition("://")[0]
    if protocol in EXTRAS:
        entries = list(_call(url, "find", patience, detail=True).values())
    else:  # their `find` would leave out, in silence, the folders that it can't list
        entries, folders = [], [url]
        for folder in folders:
            listing = _call(folder, "ls", patience, detail=True)
            entries += [entry for entry in listing if entry["type"] != "directory"]
            folders += [_url(protocol, e) for e in listing if e["type"] == "directory"]
    return [Found(_url(protocol, entry), _told(entry)) for entry in entries]


def _url(protocol: str, entry: dict[str, Any]) -> str:
    return f"{protocol}://{entry['name'].lstrip('/')}"


def _told(info: dict[str, Any]) -> Told:
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return Told(info["size"], web.plain_tag(tag) if tag else None)


def _call(url: str, method: str, patience: Patience, **arguments: Any) -> Any:
    """Call a method of the URL's file system with its path, within the time."""
    import fsspec
    from fsspec.asyn import sync

    protocol = url.partition("://")[0]
    try:
        options = _timeouts(protocol, patience.stall_s)
        system, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) and protocol in EXTRAS:
            extra = EXTRAS[protocol]
            raise UsageError(
                f'{url}: {protocol}:// needs one more package: pip install "summerlm[{extra}]"'
            ) from None
        raise UsageError(f"{url}: can't be read ({error})") from None
    try:
        if not system.async_impl:
            return getattr(system, method)(path, **arguments)
        function = getattr(system, f"_{method}")
        return sync(system.loop, function, path, timeout=patience.left_s, **arguments)
    except Exception as error:
        raise _translated(error) from error


def _timeouts(protocol: str, stall_s: float) -> dict[str, Any]:
    """Give the options by which a file system cuts silent connections."""
    if EXTRAS.get(protocol) == "s3":
        return {"config_kwargs": {"connect_timeout": stall_s, "read_timeout": stall_s}}
    if EXTRAS.get(protocol) == "gcs":
        from aiohttp import ClientTimeout

        return {"requests_timeout": ClientTimeout(sock_connect=stall_s, sock_read=stall_s)}
    return {}


def _translated(error: Exception) -> Exception:
    """Judge what a file system raised."""
    name, package = type(error).__name__, type(error).__module__.partition(".")[0]
    reason = (str(error) or name).splitlines()[0]
    if isinstance(error, FileNotFoundError):
        return Refused(MISSING, "no such file")
    denied = isinstance(error, PermissionError) or name.startswith(_CREDENTIALS)
    if denied or getattr(error, "code", 0) in (401, 403) or reason.startswith("Forbidden"):
        return Refused(FORBIDDEN, reason)
    if isinstance(error, TimeoutError):
        return Transient(str(error) or "no answer before the deadline")
    if isinstance(error, OSError | EOFError) or package in _NETWORK:
        return Transient(reason)
    return error
