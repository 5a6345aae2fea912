"""Settings of the data: which texts, how much of each, and how they are dealt."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from summerlm.core.config import Section

# settings of how data are read: a run may change them, for they leave what is read as it is
HOW = ("mirror", "tokens", "workers", "prefetch_steps", "stall_timeout_s", "deadline_s")
HOW_OF_A_SOURCE = ("max_epochs", "on_damage")


class SourceConfig(Section):
    """One source of text: a hub repository, files of any place, or the standard library."""

    weight: float = Field(gt=0)
    """This source's share of all training tokens, relative to the other sources' weights."""

    hub: str | None = None
    """Data set repository `owner/name` of the hub, or of the mirror."""

    path: str | None = Field(default=None, min_length=1)
    """File, folder or glob (`**` crosses folders) of this machine, or under s3://, gs://, https://."""

    python_stdlib: bool = False
    """Read the standard library of the Python that runs, with its own held-out files."""

    data_dir: str | None = Field(default=None, min_length=1)
    """Folder below the repository or folder to read from; none = all of it."""

    files: str | None = Field(default=None, min_length=1)
    """Glob of the files to read below repository, folder or `data_dir`; none = all but hidden."""

    revision: str = "main"
    """Branch, tag or commit of the hub repository; the lock pins its commit."""

    column: str | None = Field(default=None, min_length=1)
    """Column or key that holds the text of a parquet or JSON row; none = `text`."""

    conversations: str | None = Field(default=None, min_length=1)
    """Column or key that holds a list of {from, value} or {role, content}, read as dialogue."""

    template: Literal["original", "chat"] = "original"
    """How a dialogue is written: lines `ROLE: text`, or the tokenizer's chat template."""

    where: tuple[str, ...] = ()
    """Conditions that a row must meet, as `column >= 0.8` (or <=, >, <, =) or `column in A, B`."""

    min_characters: int | None = Field(default=None, ge=1)
    """Shortest text that is kept; none = any."""

    max_characters: int | None = Field(default=None, ge=1)
    """Longest text that is kept; none = any."""

    rules: tuple[str, ...] = ()
    """Names of the rules of docs/data.md that leave out or change texts."""

    on_damage: Literal["stop", "skip"] = "stop"
    """What a part of a file that can't be decoded does: stop the run, or be counted and skipped."""

    max_epochs: int | None = Field(default=None, ge=1)
    """How often training may read this source whole before it stops; none = without end."""

    licence: str | None = None
    """Licence of the texts, written into the lock; training refuses a source without."""

    terms: str | None = None
    """Terms that whoever reads the source accepts, written into the lock."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.hub is not None) + (self.path is not None) + self.python_stdlib != 1:
            raise ValueError("set exactly one of hub, path, python_stdlib = true")
        if self.hub is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.hub):
            raise ValueError(f"hub = {self.hub!r}: write a repository as owner/name")
        if self.hub is None and self.revision != "main":
            raise ValueError("revision goes with hub")
        if self.path is not None and self.path.startswith("hf://"):
            raise ValueError('write hub = "owner/name" for a repository of the hub')
        return self

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if self.column is not None and self.conversations is not None:
            raise ValueError("set column (plain text) or conversations (dialogue), not both")
        if self.template != "original" and self.conversations is None:
            raise ValueError("template goes with conversations")
        if self.python_stdlib and (
            self.data_dir or self.files or self.column or self.conversations or self.where
        ):
            raise ValueError("python_stdlib takes no data_dir, files, column, conversations, where")
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

    evaluation_sets: tuple[str, ...] = ()
    """What the rule `contamination` compares with: `hub:owner/name[/glob]`, files or globs."""

    tokens: Path | None = None
    """Folder that `summerlm data tokenize` wrote, to read instead of the sources."""

    stall_timeout_s: float = Field(default=30, gt=0)
    """Longest silence of a connection before it is cut and tried again, in seconds."""

    deadline_s: float = Field(default=600, gt=0)
    """Longest time that a read is tried again before the run saves and stops, in seconds."""
