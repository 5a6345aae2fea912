"""Lists of the rows that repeat an earlier document, and their file.

Flow: `duplicates.find_duplicates` makes them once; the data lock pins their `DropLists.sha256`;
`sources` passes the listed rows over.
"""

import hashlib
import io
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import DataChangedError
from summerlm.core.files import write_atomically


@dataclass(frozen=True)
class DropLists:
    """Rows that repeat an earlier document.

    Args:
        exact: Positions of exact copies by source, ascending, int64.
        near: The same of near-duplicates; no row stands in both.
    """

    exact: dict[str, NDArray[np.int64]]
    near: dict[str, NDArray[np.int64]]

    @property
    def sha256(self) -> str:
        """Hash of the content, hexadecimal; the same for the same lists in any file."""
        digest = hashlib.sha256()
        for lists in (self.exact, self.near):
            for source in sorted(lists):
                rows = lists[source].astype("<i8")
                digest.update(json.dumps([source, len(rows)]).encode() + rows.tobytes())
            digest.update(b"\n")
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the lists as one .npz file, which appears whole.

        Args:
            path: The file to make or replace.

        Raises:
            SaveError: If the disk refuses.
        """
        arrays: dict[str, NDArray[Any]] = {"sources": np.array(list(self.exact), np.str_)}
        for number, source in enumerate(self.exact):
            arrays |= {f"exact{number}": self.exact[source], f"near{number}": self.near[source]}
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        write_atomically(path, file.getvalue())

    @classmethod
    def load(cls, path: Path, sha256: str) -> "DropLists":
        """Read lists, and check that they are the pinned ones.

        Args:
            path: A file that `save` wrote.
            sha256: The `sha256` of the lists that were saved.

        Returns:
            The lists.

        Raises:
            DataChangedError: If the file is missing or damaged, or holds other lists.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                sources = file["sources"].tolist()
                lists = cls(
                    {source: file[f"exact{number}"] for number, source in enumerate(sources)},
                    {source: file[f"near{number}"] for number, source in enumerate(sources)},
                )
            if lists.sha256 != sha256:
                raise ValueError("its hash differs")
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataChangedError(
                f"{path}: not the lists of duplicates that were found ({reason}); remove it, and "
                "they are found again"
            ) from error
        return lists
