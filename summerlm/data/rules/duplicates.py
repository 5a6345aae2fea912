"""Which documents repeat an earlier one, exactly or nearly: lists made once, before training.

Flow:
    1. `find_duplicates` takes all documents once, in the pinned order of sources and rows, and
       writes a hash of each text, and where asked a MinHash signature, to disk;
    2. exact copies are found by sorting the hashes;
    3. the signatures are looked through band by band: documents with equal bands are candidates,
       and one that is like an earlier candidate that stays is dropped;
    4. the resulting `DropLists` are part of the pinned data, so that any run, on any number of
       ranks and after any resume, leaves out the same rows.

The earliest document stays. What is found is a function of the documents and their order.

Near means: of the two sets of runs of `GRAM` words (`normalised_words`, so case and punctuation
don't count) at least `LIKENESS` are common to both, as estimated from `SLOTS` minima. The
estimate is off by 0.04 (one standard deviation at 0.7), so that pairs from 0.6 to 0.8 may be
judged either way; at 0.8 more than 99 % are found, at 0.5 less than 1 in 10^5.

Limits:
    - a text of less than `GRAM` words is compared exactly only;
    - likeness is of whole texts: a paragraph inside a book, or half an article, isn't found;
    - of the documents of a bucket at most `BUCKET_KEPT` are compared with later ones;
    - a chain drops its later links: C like B, B like A, even if C is not much like A;
    - memory: 50 bytes a document, whatever its length, and the words of one document at a time;
      on disk 29 bytes a document and 480 more where `near` is asked.

The signatures are those of rensa's R-MinHash at its algorithm version 2 (rensa 0.5): another
version of the algorithm gives other lists, and is refused.

Source:
    Broder 1997, On the resemblance and containment of documents; Leskovec, Rajaraman and Ullman
    2014, Mining of Massive Datasets, section 3.4 (bands). Signatures: Dahlgaard, Knudsen and
    Thorup 2017, arXiv:1704.04370. datasketch has the older MinHash at a fiftieth of the speed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import SaveError, UsageError
from summerlm.core.progress import Progress, silent
from summerlm.data.rules.droplists import DropLists
from summerlm.data.rules.words import normalised_words

GRAM = 5  # words of a run
BANDS, BAND_SLOTS = 20, 6  # two documents with an equal band are compared
SLOTS = BANDS * BAND_SLOTS
LIKENESS = 0.7  # estimated share of common runs from which a document is dropped
BUCKET_KEPT = 64

_SEED = 1
_ALGORITHM = 2  # of rensa's R-MinHash
_CHUNK = 1 << 18  # signatures read at once
_BASE = np.uint64(0x9E3779B97F4A7C15)

# what is written of each document
_RECORD = np.dtype([("hash", "<u8", 2), ("source", "<u4"), ("position", "<i8"), ("near", "?")])


class Document(NamedTuple):
    """One row of a source."""

    source: str
    position: int  # of the row in its source
    text: str
    near: bool  # whether it is compared by likeness too, as an earlier or a later document


def find_duplicates(
    documents: Iterable[Document], scratch: Path | None = None, progress: Progress = silent
) -> DropLists:
    """List the documents that repeat an earlier one.

    Args:
        documents: All documents in the pinned order; each is looked at once.
        scratch: Where a temporary folder is made; None = the system's place for these.
        progress: Called while the likeness of documents is looked for.

    Returns:
        The lists, with an entry for every source that was met.

    Raises:
        UsageError: If likeness is asked and rensa is missing or of another algorithm.
        SaveError: If the disk is full.

    Example:
        >>> texts = ["To be", "or not", "To be"]
        >>> lists = find_duplicates(Document("play", n, t, False) for n, t in enumerate(texts))
        >>> lists.exact, lists.near
        ({'play': array([2])}, {'play': array([], dtype=int64)})
    """
    sources: dict[str, int] = {}
    with _saving(), TemporaryDirectory(prefix="duplicates-", dir=scratch) as folder:
        record_path, signature_path = Path(folder, "records"), Path(folder, "signatures")
        with record_path.open("wb") as record_file, signature_path.open("wb") as signature_file:
            for source, position, text, near in documents:
                signature = _signature(text) if near else None
                number = sources.setdefault(source, len(sources))
                record = (_text_hash(text), number, position, signature is not None)
                record_file.write(np.array(record, _RECORD).tobytes())
                if signature is not None:
                    signature_file.write(signature.tobytes())
        if not sources:
            return DropLists({}, {})
        records = np.memmap(record_path, _RECORD, "r")
        exact = _repeats(records["hash"])
        compared = np.flatnonzero(records["near"])
        near_repeats = np.zeros(len(records), bool)
        if compared.size:
            signatures = np.memmap(signature_path, "<u4", "r").reshape(-1, SLOTS)
            near_repeats[compared] = _near_repeats(signatures, ~exact[compared], progress)
        lists = [_by_source(records[mask], sources) for mask in (exact, near_repeats)]
    return DropLists(*lists)


@contextmanager
def _saving() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{error.filename or 'temporary files'}: can't hold what duplicates are found by "
            f"({error.strerror or error}); make room or set SUMMERLM_CACHE to another folder"
        ) from error


def _by_source(
    records: NDArray[np.void], sources: Mapping[str, int]
) -> dict[str, NDArray[np.int64]]:
    """Give the positions of some records, ascending, by source."""
    return {
        name: np.sort(records["position"][records["source"] == number])
        for name, number in sources.items()
    }


def _text_hash(text: str) -> NDArray[np.uint64]:
    """Hash a text's bytes, (2,)."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


def _signature(text: str) -> NDArray[np.uint32] | None:
    """Sketch a text's set of runs, (SLOTS,); None if it is too short for one."""
    words = normalised_words(text)
    if len(words) < GRAM:
        return None
    sketch = _min_hash()
    from_each = (islice(words, start, None) for start in range(GRAM))
    sketch.update(map(" ".join, zip(*from_each, strict=False)))
    return np.array(sketch.digest(), "<u4")


def _min_hash() -> Any:
    """Make an empty sketch; an optional dependency, so imported here."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise UsageError(
            "the rule near-duplicates needs rensa: pip install 'summerlm[dedup]'"
        ) from None
    if RMinHash.ALGORITHM_VERSION != _ALGORITHM:
        raise UsageError(
            f"rensa's R-MinHash is at algorithm version {RMinHash.ALGORITHM_VERSION}, the rule "
            f"near-duplicates is made with {_ALGORITHM}: pip install 'summerlm[dedup]'"
        )
    return RMinHash(num_perm=SLOTS, seed=_SEED)


def _repeats(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mark the hashes that occurred before: (documents, 2) -> (documents,)."""
    order = np.lexsort((hashes[:, 0], hashes[:, 1]))  # stable: equal ones in their own order
    same = np.ones(len(hashes) - 1, bool)
    for half in hashes.T:
        in_order = half[order]
        same &= in_order[1:] == in_order[:-1]
    repeats = np.zeros(len(hashes), bool)
    repeats[order[1:]] = same
    return repeats


def _near_repeats(
    signatures: NDArray[np.uint32], staying: NDArray[np.bool_], progress: Progress
) -> NDArray[np.bool_]:
    """Mark the documents that are like an earlier one.

    Args:
        signatures: Those of all documents, (documents, SLOTS).
        staying: Which of these take part, (documents,).
        progress: Called after each band.

    Returns:
        Those that take part and repeat an earlier one, (documents,).
    """
    took_part, staying = staying, staying.copy()
    for band in range(BANDS):
        rows = np.flatnonzero(staying)
        keys = _band_keys(signatures, rows, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = np.concatenate([[False], keys[1:] == keys[:-1], [False]])  # as the one before
        starts = np.flatnonzero(~same[:-1] & same[1:])
        stops = np.flatnonzero(same[:-1] & ~same[1:]) + 1
        for start, stop in zip(starts, stops, strict=True):
            members = rows[order[start:stop]]  # ascending
            staying[members] = _thin(signatures, members)
        progress("looking for near-duplicates", band + 1, BANDS)
    return took_part & ~staying


def _band_keys(
    signatures: NDArray[np.uint32], rows: NDArray[np.int64], band: int
) -> NDArray[np.uint64]:
    """Hash one band of some signatures, (rows,); equal bands have equal keys."""
    keys = np.zeros(len(rows), np.uint64)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        for slot in range(band * BAND_SLOTS, (band + 1) * BAND_SLOTS):
            keys[start : start + _CHUNK] *= _BASE
            keys[start : start + _CHUNK] += signatures[part, slot]
    return keys


def _thin(signatures: NDArray[np.uint32], members: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Compare the documents of a bucket in their order.

    Args:
        signatures: Those of all documents, (documents, SLOTS).
        members: Which of these are in the bucket, (members,), ascending.

    Returns:
        Which members are like none before, (members,).
    """
    stay = np.ones(len(members), bool)
    kept = signatures[members[:1]]  # (at most BUCKET_KEPT, SLOTS)
    for place, member in enumerate(members[1:], 1):
        if (kept == signatures[member]).sum(axis=1).max() >= LIKENESS * SLOTS:
            stay[place] = False
        elif len(kept) < BUCKET_KEPT:
            kept = np.concatenate([kept, signatures[[member]]])
    return stay
