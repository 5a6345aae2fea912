"""The files of a data set repository on the hub, pinned to a commit.

Flow: `files` lists a repository here, once; its files are then read by `transfer` like any other.
The two pages of the hub's API are read by `web`, under the same retries and deadline as
everything else: the hub's own client has no timeout, and sleeps as long as a server asks. That
library still tells where the hub is and who the user is.

Source:
    https://huggingface.co/docs/hub/api, "Get dataset information" and the tree of a repository.
"""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urljoin

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.data.shards import web
from summerlm.data.shards.transfer import File, Transfer, in_words
from summerlm.data.shards.web import FORBIDDEN, MISSING, Refused, endpoint


def list_repository(
    source: str, repository: str, revision: str, folder: str | None, transfer: Transfer
) -> tuple[str, list[File]]:
    """List the files of a repository at a revision.

    Args:
        source: The source's name, for messages.
        repository: The data set, as `owner/name`.
        revision: Branch, tag or commit.
        folder: Only files below this folder; None = all.
        transfer: Asks the hub.

    Returns:
        The commit that the revision is now, and its files in any order.

    Raises:
        UsageError: If there is no such repository, revision or folder, or the user may not read
            it.
        SourceDownError: If the hub doesn't answer before the deadline.
    """
    api = f"{endpoint()}/api/datasets/{repository}"
    try:
        info, _ = _page(f"{api}/revision/{quote(revision, safe='')}", transfer)
        commit = info["sha"]
        if info.get("gated"):  # the list of files is for all, the files are not
            transfer.ask(api, lambda patience: web.page(f"{api}/auth-check", patience))
        below = "/" + quote(folder.strip("/")) if folder else ""
        entries = list(
            _entries(f"{api}/tree/{commit}{below}?recursive=true&expand=false", transfer)
        )
    except Refused as refusal:
        raise UsageError(
            f"source {source}: {_in_words(refusal, repository, revision, folder)}"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise SourceDownError(
            f"{api}: what answers there is not the hub ({error!r}); see HF_ENDPOINT and proxies"
        ) from error
    return commit, [
        File(entry["path"], file_url(repository, commit, entry["path"]), *_pin(entry))
        for entry in entries
        if entry["type"] == "file"
    ]


def file_url(repository: str, commit: str, name: str) -> str:
    """Give the address of a file's bytes.

    Args:
        repository: The data set, as `owner/name`.
        commit: The pinned commit.
        name: The file's path in the repository.

    Returns:
        Its URL on the hub.
    """
    return f"{endpoint()}/datasets/{repository}/resolve/{commit}/{quote(name)}"


def _entries(url: str | None, transfer: Transfer) -> Iterator[dict[str, Any]]:
    """Follow the pages of a tree."""
    while url:
        page, link = _page(url, transfer)
        yield from page
        following = re.search(r'<([^>]+)>;\s*rel="next"', link)
        url = urljoin(url, following[1]) if following else None


def _page(url: str, transfer: Transfer) -> tuple[Any, str]:
    """Read a page of the API, and its `Link` header."""
    answer = transfer.ask(url, lambda patience: web.page(url, patience))
    return json.loads(answer.body), answer.headers.get("Link", "")


def _pin(entry: dict[str, Any]) -> tuple[int, str]:
    """Give what pins a file: the sha256 of its bytes where the hub stores them apart from git."""
    if lfs := entry.get("lfs"):
        return lfs["size"], f"sha256:{lfs['oid']}"
    return entry["size"], f"git:{entry['oid']}"


def _in_words(refusal: Refused, repository: str, revision: str, folder: str | None) -> str:
    reason = str(refusal).lower()
    name = f"the hub's data set {repository}"
    if "revision" in reason:
        return f"{name} has no revision {revision!r}"
    if refusal.status == MISSING and folder and "entry" in reason:
        return f"{name} has no folder {folder!r} at revision {revision!r}"
    if "invalid credentials" in reason:
        return f"{name}: the hub doesn't accept your token; log in again with `hf auth login`"
    hidden = refusal.status == 401 and "gated" not in reason  # what the hub says of missing ones
    if refusal.status == MISSING or hidden:
        return (
            f"{name} doesn't exist, or may only be read by its members: check the name, or log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if refusal.status in (401, FORBIDDEN):
        return f"{name}: {in_words(refusal, endpoint())} ({endpoint()}/datasets/{repository})"
    return f"{name}: {refusal}"
