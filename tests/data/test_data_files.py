import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from summerlm.core.errors import UsageError
from summerlm.data.config import SourceConfig
from summerlm.data.shards import files
from summerlm.data.shards.files import MIRROR_VARIABLE, find_files


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)


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


def names(path: str | Path, pattern: str | None = None) -> list[str]:
    found = find_files("s", SourceConfig(weight=1, path=str(path), files=pattern), None)
    assert all(p.read_text().endswith(name) for name, p in found)
    return [name for name, _ in found]


def test_files_folders_and_globs(tree: Path) -> None:
    every = ["Z.txt", "a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt", "sub/e.md"]
    assert names(tree) == every
    assert names(tree, "**/*.txt") == [name for name in every if name.endswith("txt")]
    assert names(tree, "sub/*") == ["sub/c.txt", "sub/e.md"]
    assert names(tree / "sub" / "c.txt") == ["c.txt"]
    assert names(tree / "*.txt") == ["Z.txt", "a.txt", "b.txt"]
    assert names(tree / "sub" / "**" / "*.txt") == ["c.txt", "deep/d.txt"]
    assert names(tree / ".hid" / "*.txt") == ["f.txt"]


def test_relative_paths_and_the_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    assert names("*.txt") == names("~/*.txt") == ["Z.txt", "a.txt", "b.txt"]
    assert names("sub") == names("~/sub") == ["c.txt", "deep/d.txt", "e.md"]


def test_a_bracket_in_a_folders_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "x.txt").write_text("x.txt")
    assert names(tmp_path / "a[1]") == ["x.txt"]


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
        ("a.txt", "*.txt", "`files` goes with a folder"),
        ("*.txt", "*.txt", "`files` goes with a folder"),
    ],
)
def test_nothing_to_read(tree: Path, path: str, pattern: str | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        names(tree / path, pattern)
    assert str(caught.value).startswith("source s: ")
    assert message in str(caught.value)


def test_the_setting_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SourceConfig(weight=1, hub="owner/name")
    with pytest.raises(UsageError, match=r"hf download owner/name .*data.mirror=DIR"):
        find_files("s", config, None)
    for folder in ("one", "two"):
        (tmp_path / folder / "owner/name/data").mkdir(parents=True)
        (tmp_path / folder / "owner/name/data/x.parquet").touch()
    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path / "one"))
    environment = [("data/x.parquet", tmp_path / "one/owner/name/data/x.parquet")]
    setting = [("data/x.parquet", tmp_path / "two/owner/name/data/x.parquet")]
    assert find_files("s", config, None) == environment
    assert find_files("s", config, tmp_path / "two") == setting
    with pytest.raises(UsageError, match=r"the mirror has no folder .*other/name"):
        find_files("s", SourceConfig(weight=1, hub="other/name"), tmp_path / "two")
