"""Files that are either whole or absent, and the folder of a run.

Flow: stations write through `write_atomically` and `publish_folder`; `recipes` open a
`RunFolder`, which one process at a time can hold.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import IO, Any

from summerlm.core.errors import FolderHeldError, SaveError, UsageError
from summerlm.core.failpoints import reach


def sync_folder(folder: Path) -> None:
    """Ask the disk to keep the names in a folder, as fsync does for a file's bytes.

    Args:
        folder: An existing folder.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones, never a part.

    Args:
        path: The file to make or replace; its folder is made where it is missing.
        data: The whole content.

    Raises:
        SaveError: If the disk refuses, for lack of room or any other reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise SaveError(f"{path}: can't be written: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity are refused as bugs of ours.

    Args:
        path: The file to make or replace.
        value: Anything that `json` can write.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    write_atomically(path, text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        The value in it.

    Raises:
        UsageError: If the file is missing or holds no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: can't be read as JSON: {error}") from None


def sha256_file(path: Path) -> str:
    """Hash a file's bytes.

    Args:
        path: The file.

    Returns:
        Its SHA-256 in hexadecimal.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_folder(draft: Path, final: Path) -> None:
    """Make a finished folder visible under its final name in one step.

    Files are synced by whoever wrote them; this syncs the draft's names, renames, and syncs
    the parent, in this order, so that no power loss can show a part under the final name.

    Args:
        draft: The folder as written, beside `final` on the same file system.
        final: The name to publish it by; must not exist.

    Raises:
        SaveError: If the name is taken or the disk refuses.
    """
    try:
        sync_folder(draft)
        reach("publish.folder_synced")
        if final.exists():
            raise FileExistsError(errno.EEXIST, "already exists")
        draft.rename(final)
        try:
            reach("publish.renamed")
            sync_folder(final.parent)
        except OSError:
            final.rename(draft)  # nobody was told of it, and power could still take it away
            raise
        reach("publish.parent_synced")
    except OSError as error:
        raise SaveError(f"{final}: can't be published: {error.strerror or error}") from error


class RunFolder:
    """The folder of one run, held by one process at a time.

    The hold is an advisory file lock, so the system drops it when the process dies, however it
    dies. A context manager: `with RunFolder(path) as run`.

    Args:
        path: The folder; made on entering.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunFolder":
        """Take the folder.

        Returns:
            The folder itself.

        Raises:
            FolderHeldError: If another process holds it; the message names that process.
            SaveError: If the folder can't be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise SaveError(f"{self.path}: can't be made: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise FolderHeldError(
                f"{self.path}: held by {holder}; let it end, or choose another folder"
            ) from None
        lock.seek(0)
        lock.truncate()
        world = int(os.environ.get("WORLD_SIZE", "1"))
        job = f", rank {os.environ['RANK']} of the {world} of its job" if world > 1 else ""
        lock.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n")
        lock.flush()
        self._lock = lock
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder back."""
        assert self._lock is not None
        self._lock.close()
        self._lock = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def settings(self) -> Path:
        """The resolved settings."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """The training record, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def incidents(self) -> Path:
        """What went wrong on the way, a JSON object a line."""
        return self.path / "incidents.jsonl"

    @property
    def samples(self) -> Path:
        """Completions drawn during training, a JSON object a line."""
        return self.path / "samples.jsonl"

    def write_json(self, name: str, value: Any) -> None:
        """Write one of the run's JSON files.

        Args:
            name: The file's name inside the folder.
            value: Its content.
        """
        write_json(self.path / name, value)
