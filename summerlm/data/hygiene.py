"""What the rules of sources need beyond a text: evaluation sets, and rows that stand elsewhere too.

Flow: `sources` asks for the `Evaluation` sets that the rule `contamination` compares with, and for
the `DropLists` of the rules on duplicates. Those are found in one pass over all rows of the
sources that ask for it, in their order, held-out rows first, so that no text of a held-out row is
trained on; they are kept in the cache folder by what they were found in.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from summerlm.core.config import validate
from summerlm.core.errors import DataChangedError, UsageError
from summerlm.core.files import write_atomically
from summerlm.core.progress import Progress
from summerlm.data.config import DataConfig, SourceConfig
from summerlm.data.rules.contamination import ContaminationIndex, evaluation_texts
from summerlm.data.rules.droplists import DropLists
from summerlm.data.rules.duplicates import Document, find_duplicates
from summerlm.data.rules.pipeline import Cleaned
from summerlm.data.shards.cache import cached, making
from summerlm.data.shards.files import Listing, find_files
from summerlm.data.shards.rows import Row
from summerlm.data.shards.transfer import Transfer

EXACT, NEAR = "exact-duplicates", "near-duplicates"
VERSION = 1  # of how duplicates are found
_NOT_READ = ("revision", "licence", "terms")  # what a lock has beside the data themselves
_HUB = "hub:"


@dataclass(frozen=True)
class Evaluation:
    """The evaluation sets of a run.

    Args:
        index: Finds their runs of words.
        pins: For the lock, of each set: its name, revision and files.
    """

    index: ContaminationIndex
    pins: list[dict[str, Any]]


def open_evaluation(
    config: DataConfig, transfer: Transfer, pinned: Sequence[Mapping[str, Any]] | None = None
) -> Evaluation:
    """Read the evaluation sets.

    Args:
        config: The settings of the data.
        transfer: Reads files.
        pinned: `Evaluation.pins` as they were; None = take the sets as they are now.

    Returns:
        The evaluation sets.

    Raises:
        UsageError: If none is set, or one can't be found or read.
        SourceDownError: If one can't be fetched.
    """
    if not config.evaluation_sets:
        raise UsageError(
            "the rule contamination compares with data.evaluation_sets, and none is set"
        )
    known = {pin["name"]: pin for pin in pinned or ()}
    pins: list[dict[str, Any]] = []

    def items() -> Iterator[tuple[str, Sequence[str]]]:
        for name in config.evaluation_sets:
            what, former = f"evaluation set {name}", known.get(name)
            listing = find_files(
                what,
                _origin(name),
                config.mirror,
                transfer,
                None if former is None else Listing.of_pin(former),
            )
            revision = listing.revision if former is None else former["revision"]
            files = [file.pin() for file in listing.files]
            pins.append({"name": name, "revision": revision, "files": files})
            for file in listing.files:
                for texts in evaluation_texts(transfer.fetch(file)):
                    yield name, texts

    index = ContaminationIndex(items())
    return Evaluation(index, pins)


def _origin(name: str) -> SourceConfig:
    """Read `hub:owner/name[/glob]`, or a path or glob."""
    what = f"data.evaluation_sets: {name!r}"
    if not name.startswith(_HUB):
        return validate(SourceConfig, {"weight": 1, "path": name}, what)
    owner, _, rest = name.removeprefix(_HUB).partition("/")
    repository, _, files = rest.partition("/")
    if not owner or not repository:
        raise UsageError(f"{what}: write hub:owner/name or hub:owner/name/*")
    hub = f"{owner}/{repository}"
    return validate(SourceConfig, {"weight": 1, "hub": hub, "files": files or None}, what)


class Placed(NamedTuple):
    """A row and its place.

    Args:
        position: Number of the row, counted over all files of its source.
        row: The row.
    """

    position: int
    row: Row


class Screened(Protocol):
    """What is needed of a source whose duplicates are to be found."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def rules(self) -> Sequence[str]:
        """Names of its rules."""

    def clean(self, text: str) -> Cleaned:
        """Apply its rules on single texts."""

    def rows(self, *, held_out: bool) -> Iterator[Placed]:
        """Read the held-out rows, or all others, in order."""

    def lock(self) -> Mapping[str, Any]:
        """Say which data these are."""


def drop_lists(sources: Sequence[Screened], progress: Progress) -> DropLists | None:
    """Find the rows that stand in their source, or in one before, already.

    Args:
        sources: The sources of a run, in order; those without a rule on duplicates are not read.
        progress: Called while it lasts.

    Returns:
        The rows to drop; None if no source has such a rule.

    Raises:
        SourceDownError: If a file can't be read.
        SaveError: If the cache folder has no room.
    """
    asking = [source for source in sources if {EXACT, NEAR} & set(source.rules)]
    if not asking:
        return None
    pins = [{k: v for k, v in source.lock().items() if k not in _NOT_READ} for source in asking]
    path = cached("duplicates", VERSION, pins).with_suffix(".npz")
    seal = path.with_suffix(".sha256")
    with making(path):
        if seal.exists():
            with suppress(DataChangedError):  # a damaged copy is made again
                return DropLists.load(path, seal.read_text())
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = find_duplicates(_documents(asking, progress), path.parent, progress)
        lists.save(path)
        write_atomically(seal, lists.sha256.encode())
    return lists


def _documents(sources: Sequence[Screened], progress: Progress) -> Iterator[Document]:
    """Read all texts in the pinned order, the held-out ones first."""
    total = sum(sum(file["rows"]) for source in sources for file in source.lock()["files"])
    done = 0
    for held_out in (True, False):
        for source in sources:
            near = NEAR in source.rules
            for position, row in source.rows(held_out=held_out):
                done += 1
                if done % 1000 == 0:
                    progress("reading all texts for duplicates", done, total)
                # a text that a rule drops must not take its copy in another source with it
                if isinstance(row, str) and isinstance(source.clean(row).text, str):
                    yield Document(source.name, position, row, near)
