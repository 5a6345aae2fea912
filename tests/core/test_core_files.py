import os
import signal
import subprocess
import sys
import time

import pytest

from summerlm.core.errors import FolderHeldError, SaveError, UsageError
from summerlm.core.files import (
    RunFolder,
    publish_folder,
    read_json,
    sha256_file,
    write_atomically,
    write_json,
)


def test_write_replaces_whole_and_leaves_no_draft(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.txt"]
    assert oct(path.stat().st_mode & 0o777) == "0o644"


def test_a_refused_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=r"a\.txt: can't be written: No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_publish_never_overwrites(tmp_path):
    draft, final = tmp_path / "draft", tmp_path / "final"
    draft.mkdir()
    publish_folder(draft, final)
    assert final.is_dir()
    draft.mkdir()
    with pytest.raises(SaveError, match="already exists"):
        publish_folder(draft, final)


def test_json_refuses_nan_and_names_bad_files(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    (tmp_path / "half.json").write_text('{"a": ')
    for name in ("half.json", "gone.json"):
        with pytest.raises(UsageError, match=name):
            read_json(tmp_path / name)


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


HOLD = """
import sys, time
from pathlib import Path
from summerlm.core.files import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_rank_that_holds_a_folder_says_that_it_is_one_of_several(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    words = r"held by process \d+ on \S+, rank 0 of the 4 of its job; let it end, or"
    with RunFolder(tmp_path), pytest.raises(FolderHeldError, match=words), RunFolder(tmp_path):
        pass


def test_lock_names_its_holder_and_a_kill_frees_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderHeldError, match=f"process {process.pid} on"), RunFolder(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.05)
    with RunFolder(tmp_path):
        pass
