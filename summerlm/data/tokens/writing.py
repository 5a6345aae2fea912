"""Steps -> shards: rows in global order, each whole on the disk before it counts.

Flow: the recipe `tokenizing` begins a folder or finds one begun, and hands the steps of a
`Loader` to `write_shard` until enough are written. A process that is killed leaves a draft and
perhaps files that no manifest lists: `sweep` removes them, and the steps are dealt again from
the state after the last shard that counts.

Shapes: B rows of T targets in a step.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import SaveError
from summerlm.core.files import sync_folder, write_atomically
from summerlm.data.ledger import Counts
from summerlm.data.loader import Step
from summerlm.data.tokens.manifest import Entry, Manifest, Shard, write_manifest

SHARD_BYTES = 256 << 20  # about the size of a shard's rows: as much work a kill can cost
_DRAFT = ".draft"
_SHARD = r"\d{9,}-\d{9,}"
_LEFT = re.compile(
    rf"{_SHARD}\.(rows|rows{_DRAFT}|json)|\.({_SHARD}|MANIFEST|held-out|data\.lock)\.json\..+"
)


def steps_per_shard(manifest: Manifest) -> int:
    """Tell how many steps a full shard holds."""
    return max(1, SHARD_BYTES // (manifest.identity["rows"] * manifest.row_type.itemsize))


def write_shard(folder: Path, manifest: Manifest, shard: Shard, steps: Iterable[Step]) -> Manifest:
    """Write the shard after the last, and only then list it.

    Args:
        folder: The folder.
        manifest: Its manifest.
        shard: The steps to write.
        steps: Gives them, of the whole batch, in order.

    Returns:
        The manifest that the folder now has.

    Raises:
        SaveError: If the disk refuses; the folder holds the steps before.
    """
    assert shard.first == manifest.steps + 1
    digest, size, counts = hashlib.sha256(), 0, []
    path, draft = folder / shard.rows, folder / (shard.rows + _DRAFT)
    try:
        with draft.open("wb") as file:
            for number, step in zip(range(shard.first, shard.last + 1), steps, strict=False):
                assert step.number == number
                data = _pack(manifest, step).tobytes()
                file.write(data)
                digest.update(data)
                size += len(data)
                counts.append([_plain(step.source_counts[n]) for n in manifest.identity["sources"]])
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        sync_folder(folder)
    except OSError as error:
        raise SaveError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
    assert number == shard.last, "a loader never ends"
    account = json.dumps({"lanes": step.state["lanes"], "counts": counts}).encode()
    files = {
        shard.rows: Entry(size, digest.hexdigest()),
        shard.account: Entry.of(account),
    }
    write_atomically(folder / shard.account, account)
    manifest = replace(
        manifest, files={**manifest.files, **files}, shards=(*manifest.shards, shard)
    )
    write_manifest(folder, manifest)
    return manifest


def sweep(folder: Path, manifest: Manifest) -> None:
    """Remove what a killed process left half done."""
    for path in folder.iterdir():
        if _LEFT.fullmatch(path.name) and path.name not in manifest.files:
            path.unlink()


def _pack(manifest: Manifest, step: Step) -> NDArray[np.void]:
    """Give a step's rows as they lie in the file, (B,)."""
    B = len(step.ids)
    assert manifest.identity["rows"] == B
    assert 0 <= step.ids.min() <= step.ids.max() < manifest.vocabulary, "an id would be cut"
    rows = np.zeros(B, manifest.row_type)
    rows["ids"], rows["source"] = step.ids, step.batch.sources.numpy()
    rows["check"] = manifest.checksums(rows, range((step.number - 1) * B, step.number * B))
    return rows


def _plain(counts: Counts) -> list[Any]:
    """Give counts as `Counts(*values)` takes them."""
    dropped, changed = (dict[str, Any](m) for m in (counts.dropped, counts.changed))
    return [counts.targets, counts.documents, counts.bytes, counts.epochs, dropped, changed]
