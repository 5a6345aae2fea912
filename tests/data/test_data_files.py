import hashlib
import multiprocessing
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import SourceDownError, UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards import files, hashes
from summerlm.data.shards.files import MIRROR_VARIABLE, Listing, find_files
from summerlm.data.shards.globs import fits
from summerlm.data.shards.transfer import File, Transfer

TRANSFER = Transfer(1, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)
    monkeypatch.setenv("SUMMERLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def listed(mirror: Path | None = None, pinned: Listing | None = None, **settings: object):
    config = SourceConfig(weight=1, **settings)
    return find_files("s", config, mirror, TRANSFER, pinned)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in [
        "b.txt",
        "a.txt",
        "Z.txt",
        "sub/c.txt",
        "sub/deep/d.txt",
        "sub/e.md",
        ".hid/f.txt",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    return tmp_path


def names(path: str | Path, pattern: str | None = None, below: str | None = None) -> list[str]:
    found = listed(path=str(path), files=pattern, data_dir=below)
    assert found.revision is None
    for file in found.files:
        data = Path(file.url).read_bytes()
        assert data.decode().endswith(file.name)
        assert file.size == len(data)
        assert file.hash == f"sha256:{hashlib.sha256(data).hexdigest()}"
    return [file.name for file in found.files]


def test_files_folders_and_globs(tree: Path) -> None:
    every = ["Z.txt", "a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt", "sub/e.md"]
    assert names(tree) == every
    assert names(tree, "**/*.txt") == [name for name in every if name.endswith("txt")]
    assert names(tree, "sub/*") == ["sub/c.txt", "sub/e.md"]
    assert names(tree / "sub" / "c.txt") == ["c.txt"]
    assert names(tree / "*.txt") == ["Z.txt", "a.txt", "b.txt"]
    assert names(tree / "sub" / "**" / "*.txt") == ["c.txt", "deep/d.txt"]
    assert names(tree / ".hid" / "*.txt") == ["f.txt"]
    assert names(tree, below="sub") == ["sub/c.txt", "sub/deep/d.txt", "sub/e.md"]
    assert names(tree, "*.txt", "sub/") == ["sub/c.txt"]


def test_relative_paths_and_the_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    assert names("*.txt") == names("~/*.txt") == ["Z.txt", "a.txt", "b.txt"]
    assert names("sub") == names("~/sub") == ["c.txt", "deep/d.txt", "e.md"]


def test_a_bracket_in_a_folders_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "x.txt").write_text("x.txt")
    assert names(tmp_path / "a[1]") == ["x.txt"]


def test_a_folder_that_can_not_be_listed_is_no_empty_folder(tmp_path, monkeypatch) -> None:
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"{name}/a.txt")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(SourceDownError, match=r"closed: can't be listed \(Permission denied\)"):
        names(tmp_path)
    assert names(tmp_path, below="open") == ["open/a.txt"]
    assert names(tmp_path, "open/*") == ["open/a.txt"]


def test_links_in_a_circle_end(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a.txt")
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(tmp_path) == ["a.txt"]


def test_the_disks_order_is_not_seen(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, real = names(tree), files.glob.iglob
    for seed in range(5):

        def shuffled(*args: object, seed: int = seed, **kwargs: object) -> Iterator[str]:
            return iter(
                random.Random(seed).sample(found := list(real(*args, **kwargs)), len(found))
            )

        with monkeypatch.context() as patch:
            patch.setattr(files.glob, "iglob", shuffled)
            assert names(tree) == expected


@pytest.mark.parametrize(
    ("path", "pattern", "message"),
    [
        ("none.txt", None, "none.txt: no such file or folder"),
        ("*.pdf", None, "no file matches '*.pdf'"),
        ("none/*.txt", None, "no file matches '*.txt'"),
        ("", "*.pdf", "no file matches '*.pdf'"),
        ("", "../*", "must stay below"),
        ("", "/etc/*", "must stay below"),
        ("a.txt", "*.txt", "`files` and `data_dir` go with a folder"),
        ("*.txt", "*.txt", "`files` and `data_dir` go with a folder"),
    ],
)
def test_nothing_to_read(tree: Path, path: str, pattern: str | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        names(tree / path, pattern)
    assert str(caught.value).startswith("source s: ")
    assert message in str(caught.value)


def test_data_dir_is_no_glob(tree: Path) -> None:
    (tree / "s[u]b").mkdir()
    (tree / "s[u]b/x.txt").write_text("s[u]b/x.txt")
    assert names(tree, below="s[u]b") == ["s[u]b/x.txt"]
    with pytest.raises(UsageError, match="`data_dir` go with a folder"):
        names(tree / "a.txt", below="sub")
    with pytest.raises(UsageError, match="must stay below"):
        names(tree, below="../..")


def test_the_setting_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "owner/name/data").mkdir(parents=True)
        (tmp_path / folder / "owner/name/data/x.parquet").touch()
    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path / "one"))
    for mirror, folder in ((None, "one"), (tmp_path / "two", "two")):
        (file,) = listed(mirror, hub="owner/name").files
        assert file.name == "data/x.parquet"
        assert file.url == str(tmp_path / folder / "owner/name/data/x.parquet")
    with pytest.raises(UsageError, match=r"the mirror has no folder .*other/name"):
        listed(tmp_path / "two", hub="other/name")


def test_a_mirror_is_hashed_as_the_lock_is(tmp_path: Path) -> None:
    """Beside git itself, which names files of no LFS by these hashes."""
    folder = tmp_path / "owner/name"
    folder.mkdir(parents=True)
    for name, data in (("a.txt", b"one"), ("b.txt", b""), ("c.txt", b"two\r\n")):
        (folder / name).write_bytes(data)
    command = ["git", "hash-object", "--no-filters", "a.txt", "b.txt"]
    git = subprocess.check_output(command, cwd=folder, text=True).split()
    pins = [File("a.txt", "", 3, f"git:{git[0]}"), File("b.txt", "", 0, f"git:{git[1]}")]
    found = listed(tmp_path, Listing("commit", pins), hub="owner/name")
    assert found.revision == "commit"
    assert [file.hash for file in found.files[:2]] == [pin.hash for pin in pins]
    assert found.files[2].hash == f"sha256:{hashlib.sha256(b'two' + bytes([13, 10])).hexdigest()}"


def test_hashes_are_remembered_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    (tmp_path / "a.txt").write_text("a.txt")
    (tmp_path / "b.txt").write_text("b.txt")
    assert names(tmp_path) == ["a.txt", "b.txt"]
    hashed = []
    real = hashes.hash_file
    monkeypatch.setattr(
        hashes, "hash_file", lambda path, kind: hashed.append(path.name) or real(path, kind)
    )
    assert names(tmp_path) == ["a.txt", "b.txt"]
    assert hashed == []
    stat = (tmp_path / "a.txt").stat()
    (tmp_path / "a.txt").write_text("A.txt"[1:].rjust(5, "/"))
    os.utime(tmp_path / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` does
    with pytest.raises(AssertionError):
        names(tmp_path)  # other content
    assert hashed == ["a.txt"]
    (tmp_path / "a.txt").write_text("a.txt")
    assert names(tmp_path) == ["a.txt", "b.txt"]
    assert hashed == ["a.txt", "a.txt"]


def test_a_file_that_just_changed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the same time stamp."""
    path = tmp_path / "a.txt"
    path.write_text("one")
    (before,) = listed(path=str(path)).files
    monkeypatch.setattr(hashes, "hash_file", lambda path, kind: "sha256:anew")
    (after,) = listed(path=str(path)).files
    assert (before.hash, after.hash) == (
        f"sha256:{hashlib.sha256(b'one').hexdigest()}",
        "sha256:anew",
    )


def _listed_there(folder: Path) -> list[File]:
    return listed(path=str(folder)).files


def test_many_processes_may_remember_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(str(number))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_listed_there, [tmp_path] * 12)
    assert all(files == listed(path=str(tmp_path)).files for files in found)


parts = st.lists(st.sampled_from(["a", "b", ".a", "ab", "a.txt", ".git"]), min_size=1, max_size=4)
globs = st.lists(
    st.sampled_from(["*", "**", "a", "a*", "?", ".*", "[ab]", "*.txt", ".git"]),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=150)
@given(parts, globs)
def test_a_glob_means_on_the_hub_what_it_means_on_disk(
    parts: list[str], pattern: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        glob = "/".join(pattern)
        found = {
            name
            for name in files.glob.iglob(glob, root_dir=folder, recursive=True)
            if Path(folder, name).is_file()
        }
        assert fits("/".join(parts), glob) == ("/".join(parts) in found)


def test_plain_http_is_refused() -> None:
    with pytest.raises(UsageError, match=r"write https:// instead of http://"):
        listed(path="http://example.com/a.txt")
