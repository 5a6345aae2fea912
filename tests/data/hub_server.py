"""A hub on the loopback that misbehaves on order.

    with HubServer(folder) as server:              # folder/owner/name/..., as a mirror has it
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.script("status", status=429, headers={"Retry-After": "1"}, times=2)
        ...
        server.requests                            # what was asked, in order

It speaks what `huggingface_hub` and we call: `/api/datasets/O/N/revision/R`,
`/api/datasets/O/N/tree/R[/FOLDER]` with pages, and `/datasets/O/N/resolve/R/FILE`, which for LFS
files redirects to a second origin, as the hub does. `/plain/...` gives the folder as any web
server would, with pages of links.

Each look at a branch takes a commit of what then lies in the folder; commits stay readable,
like the hub's, until `server.squash()`.
"""

import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS = (".parquet", ".gz", ".zst", ".bin")
BRANCH = "main"


class Request(NamedTuple):
    time: float
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """What happens to the next `times` requests whose path holds `match`.

    Kinds: `status` (with `headers`), `cut` and `reset` after some bytes of the body, `stall` after
    some bytes, `drip` a byte every `seconds`, `flip` a byte of the body, `short` (whole answer of
    fewer bytes), `no-range` (the whole file instead of a range).
    """

    kind: str
    match: str = ""
    times: int = 1
    chance: float = 1.0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 100
    seconds: float = 1.0


class HubServer:
    def __init__(self, folder: Path, *, token: str | None = None, page: int = 1000) -> None:
        self.folder, self.token, self.page = Path(folder), token, page
        self.gated: set[str] = set()  # repositories that all may see and nobody may read
        self.requests: list[Request] = []
        self.applied: list[str] = []  # kinds of the faults that happened
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._dice, self._lock = random.Random(0), threading.Lock()
        self._origins = [self._origin(), self._origin()]

    def __enter__(self) -> "HubServer":
        for origin in self._origins:
            threading.Thread(target=origin.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for origin in self._origins:
            origin.shutdown()
            origin.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._origins[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._origins[1].server_port}"

    def script(self, kind: str, **settings: Any) -> None:
        """Order a fault; several wait for their requests side by side, the first that fits acts."""
        with self._lock:
            self._faults.append(Fault(kind, **settings))

    def behave(self) -> None:
        """Forget all faults that were ordered."""
        with self._lock:
            self._faults.clear()

    def asked(self, match: str) -> list[Request]:
        return [request for request in self.requests if match in request.path]

    def squash(self) -> None:
        """Make all commits but what now lies in the folder unreadable."""
        self.commits.clear()

    def commit(self, repository: str) -> str:
        """Take a commit of a repository's folder."""
        root = self.folder / repository
        files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha1()
        for name, data in files.items():
            digest.update(f"{name} {oid(data)}\n".encode())
        self.commits[repository, digest.hexdigest()] = files
        return digest.hexdigest()

    def fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.match in path and fault.times > 0 and self._dice.random() < fault.chance:
                    fault.times -= 1
                    self.applied.append(fault.kind)
                    return fault
        return None

    def _origin(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            server_state = hub

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass  # clients that went away

        return Server(("127.0.0.1", 0), Handler)


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_state
        headers = self.headers
        hub.requests.append(
            Request(
                time.monotonic(),
                self.command,
                self.path,
                headers.get("Range"),
                headers.get("Authorization"),
            )
        )
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        fault = None
        if not self._redirects(parts):
            fault = hub.fault(self.path)
        if fault and fault.kind == "status":
            return self._send(fault.status, b"busy", dict(fault.headers))
        if parts[0] == "plain":
            return self._plain("/".join(parts[1:]), fault)
        if parts[0] == "cdn":
            (data,) = [
                data
                for files in list(hub.commits.values())
                for data in files.values()
                if hashlib.sha256(data).hexdigest() == parts[1]
            ][:1] or [None]
            return self._bytes(data, {"ETag": '"a-tag-of-the-store"'}, fault)
        if parts[0] == "api":
            what = parts[4] if len(parts) > 4 else "revision"
            revision = parts[5] if len(parts) > 5 else BRANCH
            return self._api("/".join(parts[2:4]), what, revision, parts[6:], fault)
        return self._resolve("/".join(parts[1:3]), parts[4], "/".join(parts[5:]), fault)

    def _redirects(self, parts: list[str]) -> bool:
        return parts[0] == "datasets" and parts[-1].endswith(LFS)

    def _refused(self, repository: str) -> bool:
        """Answer for repositories that may not be read."""
        hub = self.server_state
        if repository in hub.gated and ("/resolve/" in self.path or "auth-check" in self.path):
            signed = "Authorization" in self.headers
            said = "Access is restricted and you are not in the authorized list."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": said}
            self._send(403 if signed else 401, b"", headers)
        elif not (hub.folder / repository).is_dir() or (
            hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"
        ):
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            return False
        return True

    def _api(
        self, repository: str, what: str, revision: str, below: list[str], fault: Fault | None
    ) -> None:
        hub = self.server_state
        if self._refused(repository):
            return None
        if what == "auth-check":
            return self._bytes(b"OK", {}, fault)
        commit = hub.commit(repository) if revision == BRANCH else revision
        if (repository, commit) not in hub.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = hub.commits[repository, commit]
        if what == "revision":
            gated = "manual" if repository in hub.gated else False
            info = {"id": repository, "sha": commit, "private": False, "gated": gated}
            return self._bytes(json.dumps(info | {"siblings": []}).encode(), {}, fault)
        folder = "/".join(below)  # one part with %2F, or several
        names = [name for name in files if not folder or name.startswith(folder + "/")]
        if not names:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        query = parse_qs(urlsplit(self.path).query)
        assert query["recursive"][0].lower() == "true"
        entries = [_entry(name, files[name]) for name in names]
        entries += [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            for path in sorted({name.rpartition("/")[0] for name in names} - {""})
        ]
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + hub.page < len(entries):
            address = urlsplit(self.path).path
            headers["Link"] = (
                f'<{hub.url}{address}?recursive=true&cursor={start + hub.page}>; rel="next"'
            )
        page = json.dumps(entries[start : start + hub.page]).encode()
        return self._bytes(page, headers, fault)

    def _resolve(self, repository: str, revision: str, name: str, fault: Fault | None) -> None:
        hub = self.server_state
        if self._refused(repository):
            return None
        commit = hub.commit(repository) if revision == BRANCH else revision
        files = hub.commits.get((repository, commit))
        if files is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        data = files.get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        known = {"X-Repo-Commit": commit}
        if not name.endswith(LFS):
            return self._bytes(data, known | {"ETag": f'"{oid(data)}"'}, fault)
        digest = hashlib.sha256(data).hexdigest()
        known |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        return self._send(
            302, b"moved", known | {"Location": f"{hub.cdn}/cdn/{digest}/{quote(name)}"}
        )

    def _plain(self, name: str, fault: Fault | None) -> None:
        path = self.server_state.folder / name
        if path.is_dir():
            links = [f"{p.name}/" if p.is_dir() else p.name for p in sorted(path.iterdir())]
            text = "".join(f'<a class="x" href="{quote(link)}">{link}</a>\n' for link in links)
            return self._bytes(f'<a href="../">up</a>{text}'.encode(), {}, fault)
        data = path.read_bytes() if path.is_file() else None
        return self._bytes(data, {"ETag": f'W/"{oid(data or b"")[:12]}"'}, fault)

    def _bytes(self, data: bytes | None, headers: dict[str, str], fault: Fault | None) -> None:
        """Send a file, or the range of it that was asked for."""
        if data is None:
            return self._send(404, b"no such file", {})
        total, status = len(data), 200
        if (asked := self.headers.get("Range")) and not (fault and fault.kind == "no-range"):
            first, last = asked.removeprefix("bytes=").split("-")
            if int(first) >= total:
                return self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            data = data[int(first) : int(last) + 1]
            status = 206
            last = int(first) + len(data) - 1
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{total}"}
        return self._send(status, data, headers, fault)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None
    ) -> None:
        kind = fault.kind if fault else ""
        if fault and kind == "flip":
            middle = min(fault.after, len(body) - 1)
            body = body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if kind == "short":
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.server_state
        if fault and kind in ("cut", "reset", "stall"):
            self.wfile.write(body[: fault.after])
            self.wfile.flush()
            self.close_connection = True
            if kind == "stall":
                hub.closing.wait(fault.seconds)
            if kind == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
        elif fault and kind == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if hub.closing.wait(fault.seconds):
                    break
        else:
            self.wfile.write(body)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "oid": oid(data), "size": len(data), "path": name}
    if name.endswith(LFS):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry
