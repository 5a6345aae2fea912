"""Settings of the data: which texts, how much of each, and how they are dealt."""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from summerlm.core.config import Section


class SourceConfig(Section):
    """One source of text: a hub repository, files of this machine, or the standard library."""

    weight: float = Field(gt=0)
    """This source's share of all training tokens, relative to the other sources' weights."""

    hub: str | None = None
    """Repository `owner/name` of the hub."""

    path: str | None = Field(default=None, min_length=1)
    """A file, a folder or a glob (`**` crosses folders) of this machine."""

    python_stdlib: bool = False
    """Read the standard library of the Python that runs, with its own held-out files."""

    files: str | None = Field(default=None, min_length=1)
    """Glob of the files to read below the repository or folder; none = all but hidden files."""

    revision: str = "main"
    """Revision of the hub repository, written into the lock."""

    column: str | None = Field(default=None, min_length=1)
    """Column or key that holds the text of a parquet or JSON row; none = `text`."""

    conversations: str | None = Field(default=None, min_length=1)
    """Column or key that holds a list of {from, value} or {role, content}, read as dialogue."""

    max_epochs: int | None = Field(default=None, ge=1)
    """How often training may read this source whole before it stops; none = without end."""

    licence: str | None = None
    """Licence of the texts, written into the lock."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.hub is not None) + (self.path is not None) + self.python_stdlib != 1:
            raise ValueError("set exactly one of hub, path, python_stdlib = true")
        if self.hub is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.hub):
            raise ValueError(f"hub = {self.hub!r}: write a repository as owner/name")
        if self.hub is None and self.revision != "main":
            raise ValueError("revision goes with hub")
        if self.column is not None and self.conversations is not None:
            raise ValueError("set column (plain text) or conversations (dialogue), not both")
        if self.python_stdlib and (self.files or self.column or self.conversations):
            raise ValueError("python_stdlib takes no files, column or conversations")
        return self


class DataConfig(Section):
    """Where text comes from and how it is dealt to the rows of a batch."""

    sources: dict[Annotated[str, Field(min_length=1)], SourceConfig] = Field(min_length=1)
    """The sources by name; the name is part of the data order."""

    lanes: int = Field(default=48, ge=1)
    """Streams that the rows of a batch are dealt from, fixed for a run; divides the rows."""

    open_documents: int = Field(default=4, ge=1)
    """Documents of a source that a lane takes rows from in turn, so that steps mix documents."""

    workers: int = Field(default=1, ge=0)
    """Processes a rank that read and tokenize; 0 = the training process itself."""

    prefetch_steps: int = Field(default=4, ge=1)
    """Steps whose batches are made ahead of training."""

    mirror: Path | None = None
    """Folder that holds `owner/name/...` in the hub's layout; none = SUMMERLM_HUB_MIRROR."""

    held_out_fraction: float = Field(default=0.005, ge=0, le=0.5)
    """Share of every source's rows that training never draws; 0 = none."""
