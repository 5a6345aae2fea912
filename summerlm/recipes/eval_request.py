"""What an evaluation is asked for: what is measured, and where its data lie.

Flow: the command `eval` makes a `Wanted`, and a `Where` by `where_of`; `evaluating` takes both.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from summerlm.core.config import Section, read_settings
from summerlm.data.shards.files import environments_mirror
from summerlm.eval.items import Where
from summerlm.eval.templates import SEED

FORMAT = 1  # of the facts that an evaluation gives


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and how.

    Attributes:
        texts: Files, folders or globs of text, JSON lines or parquet: one text together.
        names: Tasks and suites.
        harness: Tasks of lm-eval's own.
        few_shot: Examples in front of each item; None = each task's own number.
        seed: Of the examples that are drawn, and of texts' bootstrap.
        limit: Items of each task, or documents, that are measured; None = all.
        stride: Tokens that a window is asked for where windows overlap; None = of `texts` half the
            context, of tasks see `measure_protocols`.
    """

    texts: Sequence[str] = ()
    names: Sequence[str] = ()
    harness: Sequence[str] = ()
    few_shot: int | None = None
    seed: int = SEED
    limit: int | None = None
    stride: int | None = None


class Place(Section):
    """What an evaluation takes of a run's settings of data."""

    mirror: Path | None = None
    """See `DataConfig`."""

    files: dict[str, str] = Field(default_factory=dict)
    """Own files by task: see `Where.files`."""

    stall_timeout_s: float = 30
    """See `DataConfig`."""

    deadline_s: float = 120
    """See `DataConfig`."""


class Places(Section):
    """The settings that the command line of `eval` may change."""

    data: Place = Place()
    """Where data lie."""


def where_of(run: Path | None, overrides: Sequence[str], *, bundle: bool) -> Where:
    """Say where an evaluation's data lie: what is asked for, else what the run was trained with.

    Args:
        run: A run folder or checkpoint.
        overrides: Texts `data.mirror=...`; other keys are `Place`'s.
        bundle: Whether the installed package of items is read.

    Returns:
        The place; a mirror that is None means the environment's, or the hub.

    Raises:
        UsageError: If an override names anything else.
    """
    own: list[str] = []
    folder = run if run is None or (run / "config.toml").is_file() else run.parent.parent
    if folder is not None and (folder / "config.toml").is_file():
        data = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")).get("data", {})
        own = [f"data.{key}={data[key]!r}" for key in Place.model_fields if key in data]
    place = read_settings(Places, None, [*own, *overrides]).data
    return Where(
        mirror=place.mirror,
        bundle=bundle,
        files=place.files,
        stall_timeout_s=place.stall_timeout_s,
        deadline_s=place.deadline_s,
    )


def mirror_of(where: Where) -> Path | None:
    """Give the mirror that is read.

    Args:
        where: Where data lie.

    Returns:
        The one asked for, else the environment's; None = the hub is read.
    """
    return where.mirror or environments_mirror()
