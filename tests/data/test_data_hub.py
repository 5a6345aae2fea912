"""The listing of a hub repository, against a server that `huggingface_hub` itself reads too."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards import retrying
from summerlm.data.shards.files import Listing, find_files
from summerlm.data.shards.transfer import File, Transfer

NAMES = [
    ".gitattributes",
    "README.md",
    "data/en/0.parquet",
    "data/en/1.parquet",
    "data/fr/notes.txt",
    "data/fr/é 100%+#0.parquet",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.1)
    for name in ("SUMMERLM_HUB_MIRROR", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in NAMES:
        path = tmp_path / "hub/owner/name" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {name}".encode())
    with HubServer(tmp_path / "hub", page=2) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def listed(
    pinned: Listing | None = None, transfer: Transfer | None = None, **settings: object
) -> Listing:
    config = SourceConfig(weight=1, **{"hub": "owner/name", **settings})
    return find_files("web", config, None, transfer or Transfer(0.3, 5), pinned)


def test_agrees_with_the_hubs_own_library(hub: HubServer) -> None:
    found = listed()
    api = HfApi(endpoint=hub.url)
    info = api.dataset_info("owner/name")
    assert found.revision == info.sha
    tree = api.list_repo_tree("owner/name", repo_type="dataset", revision=info.sha, recursive=True)
    theirs = {
        entry.path: (
            entry.size,
            f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}",
        )
        for entry in tree
        if hasattr(entry, "size") and not entry.path.startswith(".")
    }
    assert {file.name: (file.size, file.hash) for file in found.files} == theirs
    assert [file.name for file in found.files] == NAMES[1:]
    assert {request.authorization for request in hub.requests} == {None}  # nobody logged in


def test_every_file_is_read_under_its_commit(hub: HubServer) -> None:
    """Whatever its name; and what was pinned stays when the branch moves on."""
    found, reader = listed(), Transfer(0.3, 5)
    (hub.folder / "owner/name/data/en/0.parquet").write_bytes(b"other bytes")
    later = listed()
    assert later.revision != found.revision
    assert later.revision not in " ".join(file.url for file in found.files)
    changed = {file.hash for file in later.files} - {file.hash for file in found.files}
    assert changed == {f"sha256:{hashlib.sha256(b'other bytes').hexdigest()}"}
    for file in found.files:
        assert found.revision in file.url
        assert reader.fetch(file).read_bytes() == f"bytes of {file.name}".encode()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"data_dir": "data/en"}, NAMES[2:4]),
        ({"data_dir": "data/fr/", "files": "*.parquet"}, NAMES[5:]),
        ({"files": "data/**/*.parquet"}, [*NAMES[2:4], NAMES[5]]),
        ({"files": ".git*"}, NAMES[:1]),
    ],
)
def test_lists_what_a_mirror_lists(
    hub: HubServer, settings: dict[str, object], names: list[str]
) -> None:
    found = listed(**settings)
    assert [file.name for file in found.files] == names
    config = SourceConfig(weight=1, hub="owner/name", **settings)
    mirrored = find_files("web", config, hub.folder, Transfer(1, 1), found)
    assert mirrored.revision == found.revision
    for here, there in zip(mirrored.files, found.files, strict=True):
        assert (here.name, here.size, here.hash) == (there.name, there.size, there.hash)
        assert here.url == str(hub.folder / "owner/name" / here.name)


def test_what_is_pinned_is_not_asked_for(hub: HubServer) -> None:
    found = listed()
    known = Listing(found.revision, [File(f.name, "", f.size, f.hash) for f in found.files])
    hub.requests.clear()
    assert listed(known) == found
    assert hub.requests == []


def test_a_lock_made_from_a_mirror_holds_for_the_hub(hub: HubServer) -> None:
    config = SourceConfig(weight=1, hub="owner/name")
    mirrored = find_files("web", config, hub.folder, Transfer(1, 1))
    assert mirrored.revision is None
    found = listed(mirrored)
    assert found.revision is not None
    assert [(f.name, f.size, f.hash) for f in found.files] == [
        (f.name, f.size, f.hash) for f in mirrored.files
    ]


def test_revisions(hub: HubServer) -> None:
    found = listed()
    assert listed(revision=found.revision) == found
    with pytest.raises(UsageError, match=r"source web: .*owner/name has no revision 'v2'"):
        listed(revision="v2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hub": "owner/none"}, "the hub's data set owner/none doesn't exist, or may only be read"),
        ({"data_dir": "none"}, "owner/name has no folder 'none' at revision 'main'"),
        ({"files": "*.csv"}, r"no file matches '\*.csv' in owner/name"),
        ({"data_dir": "../x"}, "must stay below"),
    ],
)
def test_what_is_not_there(hub: HubServer, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"source web: .*{message}"):
        listed(**settings)


def test_a_repository_that_closes_while_it_is_read(hub: HubServer) -> None:
    found = listed()
    hub.gated.add("owner/name")
    with pytest.raises(SourceDownError, match=r"access denied .*accept the terms on the repos"):
        Transfer(0.3, 5).fetch(found.files[1])


def test_gated_and_private_repositories(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("owner/name")
    for token in (None, "hf_other"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UsageError) as caught:
            listed()
        assert "accept the terms on the repository's page" in str(caught.value)
        assert "`hf auth login` or set HF_TOKEN" in str(caught.value)
        assert f"{hub.url}/datasets/owner/name" in str(caught.value)
    hub.script("status", status=401, headers={"X-Error-Message": "Invalid credentials in header"})
    with pytest.raises(UsageError, match=r"doesn't accept your token; log in again"):
        listed()
    hub.gated.clear()
    hub.token = "hf_mine"
    with pytest.raises(UsageError, match=r"may only be read by its members.*set HF_TOKEN"):
        listed()
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert len(listed().files) == len(NAMES) - 1


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("status", {"status": 502}),
        ("stall", {"seconds": 20, "after": 10}),
        ("cut", {"after": 10}),
    ],
)
@pytest.mark.parametrize("match", ["/revision/", "/tree/"])
def test_faults_on_the_way(
    hub: HubServer, kind: str, settings: dict[str, object], match: str
) -> None:
    expected = listed()
    hub.script(kind, match=match, **settings)
    reader = Transfer(0.3, 20)
    assert listed(transfer=reader) == expected
    assert hub.applied == [kind]
    (incident,) = reader.take_incidents()
    assert match in incident["reason"]


@pytest.mark.parametrize("kind", ["stall", "drip", "status"])
def test_a_hub_that_is_down(hub: HubServer, kind: str) -> None:
    hub.script(kind, match="/tree/", seconds=20 if kind == "stall" else 0.1, times=1000)
    start = time.monotonic()
    with pytest.raises(SourceDownError, match="/tree/"):
        listed(transfer=Transfer(0.1, 0.5))
    assert time.monotonic() - start < 1.5


def test_something_else_answers(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/plain")
    path = hub.folder / "api/datasets/owner/name/revision"
    path.mkdir(parents=True)
    for answer in (b"<html>log in to this network</html>", b"[]", b"{}"):
        (path / "main").write_bytes(answer)
        with pytest.raises(SourceDownError, match="what answers there is not the hub"):
            listed()


def test_nothing_of_the_net_is_imported_before_it_is_needed() -> None:
    program = """
import sys
import summerlm.data.shards.formats, summerlm.data.shards.files
print(*(name for name in ("aiohttp", "fsspec", "huggingface_hub", "torch") if name in sys.modules))
"""
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert out.stdout.split() == []
