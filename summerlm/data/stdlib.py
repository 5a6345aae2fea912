"""The standard library of the running Python as training text, with held-out files.

Flow: `sources` and the demo read `standard_library`. Left out, because they are not what people
write or would give the measurement away:
    - what is installed beside it: `site-packages`, `dist-packages`, `__pycache__`;
    - folders of tests: `test`, `tests`, `idle_test` (among them lib2to3's broken fixtures);
    - tables made by machines: `encodings` (one template for 120 code pages), `pydoc_data` (the
      manual's text), and `_sysconfigdata*` (how and where this Python was built).

About 6 % of the files, chosen by a hash of their path, are candidates for being held out. One
that shares a run of 200 characters with a file that stays is dropped altogether.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from summerlm.core.errors import UsageError

SHARED_RUN = 200  # characters in a row that count as the same text in two files
HELD_OUT_FRACTION = 0.06

_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_MACHINE_MADE = {"encodings", "pydoc_data"}
_KEY = b"summerlm held-out files"


class Split(NamedTuple):
    """Two lists of files that share no text, each in the order of their relative paths."""

    train: list[Path]
    held_out: list[Path]


def library_folder() -> Path:
    """Give the folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def standard_library() -> Split:
    """Split the standard library's source files.

    Returns:
        The files to train on and the held-out files, absolute.

    Raises:
        UsageError: If this Python comes without the sources of its library.
    """
    root = library_folder()
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if path.is_file() and not _left_out(path.relative_to(root))
    )
    texts = {name: _text(root / name) for name in names}
    # a file shorter than a shared run could lie whole in a training file and not be noticed
    candidates = [n for n in names if _is_candidate(n) and len(texts[n]) >= SHARED_RUN]
    train = sorted(set(names) - set(candidates))
    runs = RunIndex((texts[name] for name in train), SHARED_RUN)
    held_out = [name for name in candidates if runs.find(texts[name]) is None]
    if not train or not held_out:
        raise UsageError(
            f"{root} holds too few .py files to train on: this Python comes without the sources "
            "of its library; use another Python"
        )
    return Split([root / name for name in train], [root / name for name in held_out])


def shared_run(train_texts: Iterable[str], text: str, length: int = SHARED_RUN) -> str | None:
    """Find a run of characters that a text shares with any of the training texts.

    Args:
        train_texts: The texts to compare with.
        text: The text to look at.
        length: Characters of a run, at least 1.

    Returns:
        The first such run of `text`, `length` characters; None if there is none.

    Example:
        >>> shared_run(["to be or not to be"], "whether or not to", length=8)
        ' or not '
    """
    return RunIndex(train_texts, length).find(text)


class RunIndex:
    """Finds runs of characters that other texts share with the indexed ones, exactly.

    The indexed texts are cut into blocks of half a run, so that every run holds a block whole:
    it is enough to look up each position of the other text as a block's start and to compare
    what stands around the hits.

    Args:
        texts: The texts to index.
        length: Characters of a run, at least 1.
    """

    def __init__(self, texts: Iterable[str], length: int) -> None:
        assert length >= 1
        self._length = length
        self._block = size = (length + 1) // 2  # 2 * size - 1 <= length: no run misses every block
        self._reach = reach = length - size  # how far a run can go beyond a block
        # block -> what stands before and after it, each pair once; a dict keeps their order
        self._around: dict[str, dict[tuple[str, str], None]] = {}
        for text in texts:
            for start in range(0, len(text) - size + 1, size):
                stop = start + size
                around = text[max(start - reach, 0) : start], text[stop : stop + reach]
                self._around.setdefault(text[start:stop], {})[around] = None

    def find(self, text: str) -> str | None:
        """Give a run that `text` shares with any indexed text, or None where there is none."""
        for start in range(len(text) - self._block + 1):
            stop = start + self._block
            for before, after in self._around.get(text[start:stop], ()):
                here = text[max(start - self._reach, 0) : start]
                shared_before = _common_prefix(here[::-1], before[::-1])
                first = start - shared_before
                shared_after = _common_prefix(text[stop : stop + self._reach], after)
                if stop + shared_after - first >= self._length:
                    return text[first : first + self._length]
        return None


def _common_prefix(a: str, b: str) -> int:
    """Count the characters that two texts begin with alike."""
    most = min(len(a), len(b))
    return most if a[:most] == b[:most] else next(n for n in range(most) if a[n] != b[n])


def _left_out(path: Path) -> bool:
    """Judge a path relative to the library's folder."""
    folders = _INSTALLED | _TESTS | _MACHINE_MADE
    return not folders.isdisjoint(path.parts) or path.name.startswith("_sysconfigdata")


def _is_candidate(name: str) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=_KEY).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_FRACTION * 2**64


def _text(path: Path) -> str:
    """Read a file, with nothing where it is not UTF-8: training counts that as a fault."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""
