"""One request over HTTP: a range of a file, its size and tag, a page, each answer judged.

Flow: `stores` and `hub` ask here, one attempt a call. fsspec gives the session and its thread;
the requests are our own because its file system hides what decides here: status, Retry-After,
tag and length of each answer, and a server that sends a whole file instead of a range.
"""

import email.utils
import html
import os
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.data.shards.retrying import Transient

PAGE_BYTES = 64 << 20  # longest answer that is no file

FORBIDDEN, MISSING, NO_RANGE = 403, 404, 416
_TRANSIENT = {408, 425, 429}  # and all from 500 on
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class Patience(NamedTuple):
    """How long one attempt may take."""

    stall_s: float  # without a byte
    until: float  # altogether, by `time.monotonic`

    @property
    def left_s(self) -> float:
        """Seconds that are left, more than 0."""
        return max(self.until - time.monotonic(), 1e-3)


class Told(NamedTuple):
    """What a store says of a file beside its bytes; None = it doesn't say."""

    size: int | None
    tag: str | None  # ETag without quotes, or what stands in for it


class Refused(Exception):  # noqa: N818 - its reader decides what it means
    """An answer that asking again won't change.

    Args:
        status: HTTP status, or the nearest to it.
        reason: What the store said, in a few words.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Answer(NamedTuple):
    """A good answer."""

    status: int
    headers: Mapping[str, str]
    told: Told
    body: bytes


def is_web(url: str) -> bool:
    """Tell whether a URL is spoken by HTTP."""
    return url.startswith(("https://", "http://"))


def endpoint() -> str:
    """Give the hub's address: `HF_ENDPOINT`, or the library's own."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def plain_tag(tag: str) -> str:
    """Strip a tag of its quotes and of the mark of a weak one."""
    return tag.removeprefix("W/").strip('"')


def read(url: str, start: int, stop: int, size: int, patience: Patience) -> tuple[bytes, Told]:
    """Read bytes `start` to `stop` of a file, as `stores.read` does.

    A file that is read whole is asked for without a range, which any server can answer.

    Args:
        url: The file.
        start: First byte.
        stop: One past the last byte.
        size: Bytes of the whole file.
        patience: How long to wait.

    Returns:
        Exactly these bytes, and what the server told of the file beside them.

    Raises:
        Transient: If it may work later.
        Refused: If the server won't give it.
        SourceDownError: If the server gives no ranges.
    """
    whole = (start, stop) == (0, size)
    headers = {} if whole else {"Range": f"bytes={start}-{stop - 1}"}
    answer = _ask("GET", url, headers, stop - start, patience)
    if answer.told.size not in (None, size):
        return b"", answer.told  # another file: nothing in it is of use
    if not whole:
        given = re.match(r"bytes (\d+)-(\d+)/", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or given is None or int(given[1]) != start:
            raise SourceDownError(
                f"{url}: the server sends no ranges of a file; download it and set `path` to it"
            )
    if len(answer.body) != stop - start:
        raise Transient(f"cut after {len(answer.body)} of {stop - start} bytes")
    return answer.body, answer.told


def describe(url: str, patience: Patience) -> Told:
    """Ask for a file's size and tag, as `stores.describe` does."""
    return _ask("HEAD", url, {}, 0, patience).told


def page(url: str, patience: Patience) -> Answer:
    """Read a page.

    Args:
        url: Its address.
        patience: How long to wait.

    Returns:
        The answer, with the whole body.

    Raises:
        Transient: If it may work later.
        Refused: If the server won't give it.
    """
    answer = _ask("GET", url, {}, PAGE_BYTES, patience)
    if len(answer.body) == PAGE_BYTES:
        raise Refused(413, f"a page of more than {PAGE_BYTES >> 20} MiB")
    return answer


def find(url: str, patience: Patience) -> list[str]:
    """List the files that a page links to below itself, and so on through pages of folders."""
    found, pages = set(), [url.rstrip("/") + "/"]
    seen = set(pages)
    for folder in pages:
        text = page(folder, patience).body.decode("utf-8", errors="replace")
        for link in re.findall(r'<a\s[^>]*?href="([^"#?]+)"', text, re.IGNORECASE):
            address = urljoin(folder, html.unescape(link))
            if not address.startswith(folder) or address in seen:
                continue
            seen.add(address)
            if address.endswith("/"):
                pages.append(address)
            else:
                found.add(address)
    return sorted(found)


def check_scheme(source: str, url: str) -> None:
    """Refuse plain HTTP to other machines: anyone on the way could change the text.

    Args:
        source: The source's name, for messages.
        url: What its settings ask for.

    Raises:
        UsageError: If it is plain HTTP to another machine.
    """
    if url.startswith("http://") and urlsplit(url).hostname not in _LOOPBACK:
        raise UsageError(f"source {source}: {url}: write https:// instead of http://")


def _ask(method: str, url: str, headers: dict[str, str], most: int, patience: Patience) -> Answer:
    """Send a request and read at most so many bytes of a good answer's body."""
    import aiohttp
    import yarl
    from fsspec import filesystem
    from fsspec.asyn import sync

    try:
        address = yarl.URL(url)
    except ValueError as error:
        raise UsageError(f"{url}: is no URL ({error})") from None
    system = filesystem("http", client_kwargs={"trust_env": True})  # proxies of the environment
    headers = {"Accept-Encoding": "identity", **headers, **_authorization(url)}
    stall = patience.stall_s
    timeout = aiohttp.ClientTimeout(connect=stall, sock_connect=stall, sock_read=stall)

    async def ask() -> Answer:
        session = await system.set_session()
        request = session.request(
            method, address, headers=headers, timeout=timeout, allow_redirects=True
        )
        async with request as response:
            told = _told(response, whole="Range" not in headers)
            if response.status >= 400:
                raise _refusal(response.status, response.headers)
            body = bytearray()
            while len(body) < most and (data := await response.content.readany()):
                body += data
            return Answer(response.status, response.headers.copy(), told, bytes(body[:most]))

    try:
        return sync(system.loop, ask, timeout=patience.left_s)
    except aiohttp.ClientConnectorCertificateError as error:
        raise SourceDownError(f"{url}: its certificate can't be trusted ({error})") from error
    except aiohttp.ServerTimeoutError as error:
        raise Transient(f"no byte within {stall:g} s") from error
    except TimeoutError as error:
        raise Transient("too slow to end before the deadline") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Transient((str(error) or type(error).__name__).splitlines()[0]) from error


def _authorization(url: str) -> dict[str, str]:
    """Give the hub's token to the hub alone; a redirect to another host drops it."""
    if not url.startswith(f"{endpoint()}/"):
        return {}
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _told(response: Any, whole: bool) -> Told:
    """Read size and tag of the file: the hub gives both before it redirects to where bytes lie."""
    linked = [r.headers for r in (*response.history, response) if "X-Linked-Etag" in r.headers]
    if linked:
        size, tag = linked[0].get("X-Linked-Size"), linked[0]["X-Linked-Etag"]
    else:
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        size = response.headers.get("Content-Length") if whole else None
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if total.isdecimal():
        size = total
    return Told(int(size) if size else None, plain_tag(tag) if tag else None)


def _refusal(status: int, headers: Mapping[str, str]) -> Exception:
    if status in _TRANSIENT or status >= 500:
        return Transient(f"HTTP {status}", _retry_after(headers))
    said = (headers.get("X-Error-Code"), headers.get("X-Error-Message"))
    return Refused(status, ", ".join(filter(None, (f"HTTP {status}", *said))))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read how long to wait: seconds, a date, or the hub's `RateLimit: "api";r=0;t=55`."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    if text:
        try:
            return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0)
        except ValueError:
            return None
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None
