import email.utils
import hashlib
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from hub_server import HubServer

from summerlm.core.errors import (
    DamagedDataError,
    DataChangedError,
    SaveError,
    SourceDownError,
    UsageError,
)
from summerlm.data.config import SourceConfig
from summerlm.data.shards import retrying, transfer
from summerlm.data.shards.files import Listing, find_files
from summerlm.data.shards.retrying import Transient, retried
from summerlm.data.shards.transfer import File, Transfer

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.1)
    return tmp_path / "cache" / "files"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that are asked for, none of which lasts."""
    asked: list[float] = []
    monkeypatch.setattr("time.sleep", asked.append)
    return asked


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "hub" / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(DATA)
    (folder / "a.txt").write_bytes(DATA)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def listed(transfer: Transfer, **settings: object) -> list[File]:
    return find_files("s", SourceConfig(weight=1, **settings), None, transfer).files


def of_hub(hub: HubServer, transfer: Transfer, name: str = "a.bin") -> File:
    (file,) = listed(transfer, hub="owner/name", files=name)
    hub.requests.clear()
    return file


@pytest.mark.parametrize("name", ["a.bin", "a.txt"])
def test_ranges_and_whole_files(hub: HubServer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Transfer(2, 5)
    file = of_hub(hub, reader, name)
    assert reader.read(file, 100, 200) == DATA[100:200]
    assert reader.read(file, 0, len(DATA)) == DATA
    assert [r.range for r in hub.requests if "/cdn/" in r.path or name == "a.txt"] == [
        "bytes=100-199",
        None,
    ]
    monkeypatch.setattr(transfer, "PIECE_BYTES", 3000)
    path = reader.fetch(file)
    assert path.read_bytes() == DATA
    assert [r.range for r in hub.requests if "/cdn/" in r.path or name == "a.txt"][2:] == [
        "bytes=0-2999",
        "bytes=3000-5999",
        "bytes=6000-8999",
        "bytes=9000-10239",
    ]
    hub.requests.clear()
    assert reader.fetch(file) == path
    assert hub.requests == []
    with reader.open(file) as opened:
        opened.seek(-16, 2)
        assert opened.read() == DATA[-16:]


def test_the_token_goes_to_the_hub_alone(hub: HubServer, tmp_path: Path) -> None:
    reader = Transfer(2, 5)
    file = of_hub(hub, reader)
    reader.read(file, 0, 10)
    assert [(r.authorization, "/cdn/" in r.path) for r in hub.requests] == [
        ("Bearer hf_secret", False),
        (None, True),
    ]
    hub.requests.clear()
    listed(reader, path=f"{hub.cdn}/plain/owner/name/a.bin")
    assert [r.authorization for r in hub.requests] == [None]


FAULTS = [
    ("status", {"status": 429, "headers": {"Retry-After": "7"}}),
    ("status", {"status": 503}),
    ("status", {"status": 500}),
    ("status", {"status": 408}),
    ("cut", {}),
    ("reset", {}),
    ("stall", {"seconds": 20}),
    ("stall", {"seconds": 20, "after": 0}),
]


@pytest.mark.parametrize(("kind", "settings"), FAULTS)
def test_what_passes_is_tried_again(
    hub: HubServer, waits: list[float], kind: str, settings: dict[str, object]
) -> None:
    reader = Transfer(0.2, 20)
    file = of_hub(hub, reader)
    hub.script(kind, times=2, **settings)
    assert reader.read(file, 50, 5000) == DATA[50:5000]
    assert hub.applied == [kind] * 2
    asked = 7 if "headers" in settings else 0
    assert len(waits) == 2
    assert all(asked <= wait <= asked + 0.2 for wait in waits)
    (incident,) = reader.take_incidents()
    assert incident["attempts"] == 3
    assert file.url in incident["reason"]
    assert "\n" not in incident["reason"]
    assert reader.take_incidents() == []


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("status", {"status": 503}, "HTTP 503"),
        ("stall", {"seconds": 20}, "(no byte within 0.1 s|too slow)"),
        ("drip", {"seconds": 0.05}, "too slow to end"),
        ("cut", {}, ""),
    ],
)
def test_the_deadline_ends_it(
    hub: HubServer, kind: str, settings: dict[str, object], reason: str
) -> None:
    reader = Transfer(0.1, 0.5)
    file = of_hub(hub, reader)
    hub.script(kind, times=10_000, **settings)
    start = time.monotonic()
    with pytest.raises(
        SourceDownError, match=f"{file.url}: .*{reason}.*given up.*deadline_s = 0.5"
    ):
        reader.fetch(file)
    assert time.monotonic() - start < 1.2
    (incident,) = reader.take_incidents()
    assert "given up" in incident["reason"]


def test_a_store_that_asks_for_more_than_the_deadline_is_not_waited_for(hub: HubServer) -> None:
    reader = Transfer(1, 30)
    file = of_hub(hub, reader)
    hub.script("status", status=429, headers={"Retry-After": "3600"})
    start = time.monotonic()
    with pytest.raises(
        SourceDownError, match=r"HTTP 429, and asks to wait 3600 s; given up at attempt 1,"
    ):
        reader.read(file, 0, 10)
    assert time.monotonic() - start < 5


def test_waits_may_be_told_as_a_date_or_as_the_hub_does(hub: HubServer, waits: list[float]) -> None:
    reader = Transfer(1, 90)
    file = of_hub(hub, reader)
    past, soon = (email.utils.formatdate(time.time() + more, usegmt=True) for more in (-50, 50))
    for headers, least in (
        ({"Retry-After": soon}, 48),
        ({"Retry-After": past}, 0),
        ({"Retry-After": "tomorrow"}, 0),
        ({"RateLimit": '"resolvers";r=0;t=40'}, 40),
        ({"RateLimit": '"resolvers";r=9;t=40'}, 0),
    ):
        hub.script("status", status=429, headers=headers)
        reader.read(file, 0, 10)
        assert least <= waits.pop() <= least + 2.1


def test_pauses_grow_and_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    clock = [0.0]
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("time.sleep", sleep)

    def attempt(until: float) -> None:
        assert until == 600
        raise Transient("down")

    notes: list[dict[str, object]] = []
    with pytest.raises(
        SourceDownError, match=r"x: down; given up at attempt \d+, after \d+ of data.deadline_s"
    ):
        retried("x", attempt, 600, notes.append)
    assert 20 < len(pauses) < 120
    assert all(pause <= min(2**n, 30) for n, pause in enumerate(pauses))
    assert len({round(pause, 3) for pause in pauses}) > len(pauses) / 2
    assert 540 < sum(pauses) < 600
    assert notes == [
        {"reason": f"x: down; given up at attempt {len(pauses) + 1}", "attempts": len(pauses) + 1}
    ]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, SourceDownError, "log in with `hf auth login` or set HF_TOKEN"),
        (403, SourceDownError, "log in with `hf auth login` or set HF_TOKEN"),
        (404, DataChangedError, "a.bin: HTTP 404; the file is gone"),
        (410, DataChangedError, "a.bin: HTTP 410; the file is gone"),
        (416, DataChangedError, "shorter than the 10240 bytes that were pinned"),
        (400, SourceDownError, "HTTP 400"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(
    hub: HubServer, status: int, error: type[Exception], message: str
) -> None:
    reader = Transfer(1, 5)
    file = of_hub(hub, reader)
    hub.script("status", status=status, times=10)
    with pytest.raises(error, match=message):
        reader.read(file, 0, 10)
    assert hub.applied == ["status"]
    assert reader.take_incidents() == []


def test_a_server_without_ranges_is_named(hub: HubServer) -> None:
    reader = Transfer(1, 5)
    file = of_hub(hub, reader)
    hub.script("no-range", times=10)
    with pytest.raises(SourceDownError, match="the server sends no ranges"):
        reader.read(file, 1, 10)
    with pytest.raises(SourceDownError, match="the server sends no ranges"):
        reader.read(file, 0, 10)  # the first bytes would be right, and the whole file would come
    assert reader.read(file, 0, len(DATA)) == DATA


def test_a_short_answer_is_no_answer(hub: HubServer) -> None:
    reader = Transfer(1, 5)
    file = of_hub(hub, reader)
    hub.script("short")
    assert reader.read(file, 10, 1000) == DATA[10:1000]
    assert hub.applied == ["short"]


def test_another_file_under_the_address(hub: HubServer) -> None:
    reader = Transfer(1, 5)
    path = hub.folder / "owner/name/a.bin"
    (file,) = listed(reader, path=f"{hub.url}/plain/owner/name/a.bin")
    assert file.hash.startswith("etag:")
    path.write_bytes(DATA[:-1] + b"?")
    with pytest.raises(DataChangedError, match=r"a.bin: changed since it was pinned"):
        reader.read(file, 0, 10)
    path.write_bytes(DATA + b"?")
    untagged = replace(file, hash="sha256:" + "0" * 64)  # nothing to compare the tag with
    for stop in (10, len(DATA)):
        with pytest.raises(DataChangedError, match=r"has 10241 bytes, and had 10240"):
            reader.read(untagged, 0, stop)
    path.unlink()
    with pytest.raises(DataChangedError, match=r"a.bin: HTTP 404; the file is gone"):
        reader.fetch(file)


def test_a_pinned_hash_is_compared_with_the_hubs_tag(hub: HubServer) -> None:
    reader = Transfer(1, 5)
    for name, kind in (("a.bin", "sha256"), ("a.txt", "git")):
        file = of_hub(hub, reader, name)
        assert file.hash.startswith(f"{kind}:")
        digits = len(file.hash) - len(kind) - 1
        other = File(file.name, file.url, file.size, f"{kind}:{'0' * digits}")
        with pytest.raises(DataChangedError, match="changed since it was pinned"):
            reader.read(other, 0, 10)


def test_a_file_with_wrong_bytes_is_fetched_again_once(hub: HubServer, cache: Path) -> None:
    reader = Transfer(1, 5)
    file = of_hub(hub, reader)
    hub.script("flip")
    assert reader.fetch(file).read_bytes() == DATA
    assert "don't have the hash" in reader.take_incidents()[0]["reason"]
    (copy,) = cache.iterdir()
    copy.unlink()
    hub.script("flip", times=2)
    with pytest.raises(DamagedDataError, match=r"a.bin: its bytes don't have the hash sha256:"):
        reader.fetch(file)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("waits")
def test_a_cut_in_a_large_file_costs_one_piece(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 2000)
    reader = Transfer(1, 5)
    file = of_hub(hub, reader)
    hub.script("cut", chance=0.5, times=3)
    assert reader.fetch(file).read_bytes() == DATA
    assert len(hub.asked("/cdn/")) == 6 + 3


def _fetch(file: File, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    results.put(Transfer(2, 10).fetch(file).read_bytes() == DATA)  # type: ignore[attr-defined]


def test_many_processes_fetch_a_file_once(hub: HubServer, cache: Path) -> None:
    file = of_hub(hub, Transfer(1, 5))
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.SimpleQueue()
    processes = [context.Process(target=_fetch, args=(file, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get() for _ in processes] == [True] * 3
    for process in processes:
        process.join()
    assert len(hub.asked("/cdn/")) == 1
    assert len(list(cache.iterdir())) == 1


def test_many_threads_read_at_once(hub: HubServer) -> None:
    reader = Transfer(1, 20)
    file = of_hub(hub, reader)
    hub.script("status", status=503, chance=0.3, times=1000)
    wrong: list[int] = []

    def read(n: int) -> None:
        if reader.read(file, n, n + 100) != DATA[n : n + 100]:
            wrong.append(n)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(reader.take_incidents()) > 3


def test_travels_without_what_belongs_to_a_process(hub: HubServer) -> None:
    reader = Transfer(1, 5)
    file = of_hub(hub, reader)
    hub.script("cut")
    reader.read(file, 0, 200)
    there = pickle.loads(pickle.dumps(reader))
    assert (there.stall_timeout_s, there.deadline_s, there.incidents) == (1, 5, [])
    assert there.read(file, 0, 100) == DATA[:100]
    assert len(reader.take_incidents()) == 1


def test_local_files_are_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    file = File("a.bin", str(path), len(DATA), "sha256:")
    reader = Transfer(1, 5)
    assert reader.fetch(file) == path
    with reader.open(file) as opened:
        assert opened.read(10) == DATA[:10]
    path.write_bytes(DATA[:-1])
    with pytest.raises(DataChangedError, match=r"has 10239 bytes, and had 10240"):
        reader.open(file)
    path.unlink()
    with pytest.raises(SourceDownError, match="can't be read"):
        reader.open(file)


def test_a_cache_that_is_no_folder(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Transfer(1, 5)
    file = of_hub(hub, reader)
    monkeypatch.setenv("SUMMERLM_CACHE", str(hub.folder / "owner/name/a.bin"))
    with pytest.raises(SaveError, match="SUMMERLM_CACHE"):
        reader.fetch(file)


# object stores, by fsspec's own in memory


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    for number, name in enumerate(("b.bin", "a.bin", "deep/c.bin")):  # of one size, without tags
        system.pipe(f"/bucket/data/{name}", bytes([number]) + DATA[1:])
    system.pipe("/bucket/data/a.txt", b"text")
    system.pipe("/bucket/odd/100%20?.txt", b"odd")
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"path": "memory://bucket/data/a.bin"}, ["a.bin"]),
        ({"path": "memory://bucket/data"}, ["a.bin", "a.txt", "b.bin", "deep/c.bin"]),
        ({"path": "memory://bucket/data/*.bin"}, ["a.bin", "b.bin"]),
        ({"path": "memory://bucket/**/?.bin"}, ["data/a.bin", "data/b.bin", "data/deep/c.bin"]),
        ({"path": "memory://bucket/", "files": "d*/*.txt"}, ["data/a.txt"]),
        ({"path": "memory://bucket", "data_dir": "data/deep"}, ["data/deep/c.bin"]),
        ({"path": "memory://bucket/odd"}, ["100%20?.txt"]),
    ],
)
@pytest.mark.usefixtures("memory")
def test_files_of_an_object_store(settings: dict[str, object], names: list[str]) -> None:
    reader = Transfer(1, 5)
    files = listed(reader, **settings)
    assert [file.name for file in files] == names
    for file in files:
        if file.name.endswith("bin"):
            assert reader.read(file, 5, 50) == DATA[5:50]
            number = ["b.bin", "a.bin", "c.bin"].index(file.name.rpartition("/")[2])
            assert reader.fetch(file).read_bytes() == bytes([number]) + DATA[1:]
    known = Listing(None, [File(f.name, "", f.size, f.hash) for f in files])
    config = SourceConfig(weight=1, **settings)
    assert find_files("s", config, None, reader, known).files == files


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = type(memory).ls, [OSError(5, "slow down"), OSError(5, "slow down")]

    def ls(self: object, path: str, *args: object, **arguments: object) -> object:
        if path.endswith("deep") and fails:
            raise fails.pop()
        return real(self, path, *args, **arguments)

    monkeypatch.setattr(type(memory), "ls", ls)
    reader = Transfer(1, 5)
    files = listed(reader, path="memory://bucket/data")
    assert [file.name for file in files][-1] == "deep/c.bin"
    assert reader.take_incidents()[-1]["attempts"] == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://bucket/none.bin", "no such file or folder"),
        ("memory://bucket/data/*.pdf", r"no file matches '\*.pdf' below memory://bucket/data"),
        ("memory://bucket/none/*.pdf", "no such file or folder"),
        ("sftp://host/a.bin", "can't be read"),
        ("nonsense://a.bin", "can't be read .*nonsense"),
    ],
)
@pytest.mark.usefixtures("memory")
def test_what_an_object_store_lacks(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        listed(Transfer(1, 5), path=path)


def test_a_pinned_object_is_not_looked_for(memory: fsspec.AbstractFileSystem) -> None:
    reader = Transfer(1, 5)
    config = SourceConfig(weight=1, path="memory://bucket/data/*.bin")
    found = find_files("s", config, None, reader)
    memory.rm("/bucket/data/a.bin")
    assert find_files("s", config, None, reader, found) == found
    with pytest.raises(DataChangedError, match=r"a.bin: no such file; the file is gone"):
        reader.read(found.files[0], 0, 10)
    memory.pipe("/bucket/data/b.bin", DATA + b"more")
    with pytest.raises(DataChangedError, match=r"b.bin: has 10244 bytes, and had 10240"):
        reader.read(found.files[1], 0, 10)


def failing(
    monkeypatch: pytest.MonkeyPatch, system: fsspec.AbstractFileSystem, *errors: Exception
) -> None:
    """Let the store fail some times before it answers."""
    left, real = list(errors), type(system).cat_file

    def cat_file(*args: object, **arguments: object) -> bytes:
        if left:
            raise left.pop(0)
        return real(*args, **arguments)

    monkeypatch.setattr(type(system), "cat_file", cat_file)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset by peer"),
        TimeoutError(),
        OSError(5, "slow down"),
        type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})("x"),
    ],
)
def test_an_object_store_is_tried_again(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    reader = Transfer(1, 5)
    file = listed(reader, path="memory://bucket/data/a.bin")[0]
    failing(monkeypatch, memory, error, error)
    assert reader.read(file, 1, 10) == DATA[1:10]
    assert reader.take_incidents()[0]["attempts"] == 3


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("Access Denied"),
        type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})("none"),
        OSError("Forbidden: https://storage.googleapis.com/bucket"),
        type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": 401})("Invalid"),
    ],
)
def test_an_object_store_that_refuses(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    reader = Transfer(1, 5)
    file = listed(reader, path="memory://bucket/data/a.bin")[0]
    failing(monkeypatch, memory, *[error] * 5)
    with pytest.raises(SourceDownError, match=r"access denied .*FSSPEC_S3_ANON=true"):
        reader.read(file, 0, 10)
    assert reader.take_incidents() == []


def test_bugs_are_no_faults_of_a_store(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = listed(Transfer(1, 5), path="memory://bucket/data/a.bin")[0]
    failing(monkeypatch, memory, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        Transfer(1, 5).read(file, 0, 10)


@pytest.mark.parametrize(
    ("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")]
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as caught:
        listed(Transfer(1, 5), path=f"{scheme}://bucket/a.bin")
    assert f'pip install "summerlm[{extra}]"' in str(caught.value)


# plain web servers


def of_web(hub: HubServer, path: str, **settings: object) -> list[str]:
    reader = Transfer(1, 5)
    files = listed(reader, path=f"{hub.url}/plain/{path}", **settings)
    known = Listing(None, [replace(file, url="") for file in files])
    config = SourceConfig(weight=1, path=f"{hub.url}/plain/{path}", **settings)
    assert find_files("s", config, None, reader, known).files == files
    for file in files:
        path_there = hub.folder / "owner" / "name" / file.name.removeprefix("name/")
        assert reader.fetch(file).read_bytes() == path_there.read_bytes()
        assert file.size == path_there.stat().st_size
    return [file.name for file in files]


def test_files_of_a_web_server(hub: HubServer) -> None:
    folder = hub.folder / "owner/name"
    (folder / "deep er").mkdir()
    (folder / "deep er/é #1?.txt").write_bytes(b"odd name")
    every = ["a.bin", "a.txt", "deep er/é #1?.txt"]
    assert of_web(hub, "owner/name/") == every
    assert of_web(hub, "owner/name", files="*.txt") == ["a.txt"]
    assert of_web(hub, "owner/name/**/*.txt") == every[1:]
    assert of_web(hub, "owner", data_dir="name") == [f"name/{name}" for name in every]
    assert of_web(hub, "owner/name/a.txt?download=true") == ["a.txt"]
    with pytest.raises(UsageError, match="no such file or folder"):
        of_web(hub, "owner/none.txt")
    with pytest.raises(UsageError, match="no such file or folder"):
        of_web(hub, "owner/none/*.txt")
    hub.script("status", status=503, times=3)
    assert of_web(hub, "owner/name/") == every


@pytest.mark.slow
def test_s3_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server, with the real file system of s3://."""
    server_of = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    boto3 = pytest.importorskip("boto3", reason="needs boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = server_of.ThreadedMotoServer(port=0)
    server.start()
    try:
        _, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name in ("a.bin", "deep/b.bin"):
            client.put_object(Bucket="bucket", Key=f"data/{name}", Body=DATA)
        reader = Transfer(2, 10)
        files = listed(reader, path="s3://bucket/data/**/*.bin")
        assert [file.name for file in files] == ["a.bin", "deep/b.bin"]
        tag = hashlib.md5(DATA).hexdigest()
        assert files[0] == File("a.bin", "s3://bucket/data/a.bin", len(DATA), f"etag:{tag}")
        assert listed(reader, path="s3://bucket/data/a.bin") == files[:1]
        assert [f.name for f in listed(reader, path="s3://bucket/data")] == ["a.bin", "deep/b.bin"]
        assert reader.read(files[0], 5, 50) == DATA[5:50]
        assert reader.fetch(files[1]).read_bytes() == DATA
        with pytest.raises(UsageError, match="no such file or folder"):
            listed(reader, path="s3://bucket/none.bin")
        client.put_object(Bucket="bucket", Key="data/a.bin", Body=DATA[::-1])
        with pytest.raises(DataChangedError, match="changed since it was pinned"):
            Transfer(2, 10).read(files[0], 0, 10)
        client.delete_object(Bucket="bucket", Key="data/a.bin")
        with pytest.raises(DataChangedError, match="the file is gone"):
            Transfer(2, 10).read(files[0], 0, 10)
    finally:
        server.stop()
    start = time.monotonic()
    with pytest.raises(SourceDownError, match=r"s3://bucket/data/deep/b.bin: .* given up"):
        Transfer(1, 3).read(files[1], 0, 10)
    assert time.monotonic() - start < 5
