"""Every source of a run tried before training: is it there, what is in it, how long does it last.

Flow: the command `data check` calls `check_data`, and prints what it returns by `show_check`.
    1. `SourceCheck` tries each source by itself, so that one that fails hides nothing of others;
    2. rows drawn from all over it (`probe`) say what its texts and tokens are like;
    3. what would stop training is a problem and has an exit code, what is only odd is a warning.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from summerlm.core.errors import DataChangedError, SummerError, UsageError
from summerlm.core.progress import Progress, progress_bar
from summerlm.data.config import SourceConfig
from summerlm.data.lock import lock_differences, read_lock
from summerlm.data.mixture import rotation
from summerlm.data.opening import open_source
from summerlm.data.rules.catalogue import OF_THE_WHOLE
from summerlm.data.shards.transfer import Transfer
from summerlm.data.sources import Source
from summerlm.recipes.data.forecast import TOLERANCE, judge_epochs, predicted_epochs, source_budget
from summerlm.recipes.data.locking import lock_path
from summerlm.recipes.data.probing import Probe, probe
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import Tokenizer

MANY_EPOCHS = 4  # from here on repeated text teaches less and less (arXiv:2305.16264)
LONG_TOKENS = 1_000_000  # of a document
FEW_BYTES = 2.0  # a token, where the tokenizer was hardly made for such text
FEW_ROWS = 16  # a lane
NO_TEXT = 0.01  # of the rows
PATIENCE_S = 30.0  # with a source that doesn't answer; training waits for data.deadline_s


def check_data(settings: Settings, documents: int) -> dict[str, Any]:
    """Try every source of a run.

    Args:
        settings: The run's settings.
        documents: Rows to draw of each source.

    Returns:
        JSON values: `ok`, `exit_code` (the gravest problem's, or 0), `problems` of the run as a
        whole, and `sources`, of which each has its facts, `problems` and `warnings`; a fact that
        isn't known is None.

    Raises:
        UsageError: If the tokenizer or the lock can't be read.
    """
    tokenizer = load_tokenizer(settings.tokenizer.name)
    path = lock_path(settings)
    lock = read_lock(path) if path.exists() else None
    problems = list(_run_problems(settings, tokenizer, lock))
    codes = [problem.exit_code for problem in problems]
    sources = []
    with progress_bar() as progress:
        for name in settings.data.sources:
            check = SourceCheck(settings, name, tokenizer, documents)
            sources.append(check.run(lock, progress))
            codes += check.codes
    return {
        "ok": not codes,
        "exit_code": max(codes, default=0),
        "tokenizer": settings.tokenizer.name,
        "lock": None if lock is None else str(path),
        "problems": [str(problem) for problem in problems],
        "sources": sources,
    }


def _run_problems(
    settings: Settings, tokenizer: Tokenizer, lock: Sequence[Mapping[str, Any]] | None
) -> Iterator[SummerError]:
    """Find what is wrong with the data as a whole."""
    if tokenizer.vocabulary != settings.model.vocabulary:
        yield UsageError(
            f"model.vocabulary is {settings.model.vocabulary}, the tokenizer "
            f"{settings.tokenizer.name} has {tokenizer.vocabulary} entries"
        )
    try:
        rotation(settings.data.lanes)
    except UsageError as error:
        yield error
    for entry in lock or ():
        if entry["name"] not in settings.data.sources:
            yield DataChangedError(f"source {entry['name']} stands in the lock and is gone")


class SourceCheck:
    """Tries one source.

    Args:
        settings: The run's settings.
        name: The source.
        tokenizer: The run's tokenizer.
        documents: Rows to draw.

    Attributes:
        codes: Exit code of each problem found.
    """

    def __init__(self, settings: Settings, name: str, tokenizer: Tokenizer, documents: int) -> None:
        self._settings, self._name = settings, name
        self._tokenizer, self._documents = tokenizer, documents
        self._config = settings.data.sources[name]
        self._problems: list[str] = []
        self._warnings: list[str] = []
        self.codes: list[int] = []
        self._transfer = Transfer(
            settings.data.stall_timeout_s, min(settings.data.deadline_s, PATIENCE_S)
        )

    def run(self, lock: Sequence[Mapping[str, Any]] | None, progress: Progress) -> dict[str, Any]:
        """Try the source.

        Args:
            lock: The run's lock; None where there is none.
            progress: Called while it lasts.

        Returns:
            What `check_data` tells of a source.
        """
        facts = settings_facts(self._settings, self._name)
        if not self._config.licence:
            self._complain(
                UsageError("no licence; look up what its texts may be used for, and set it")
            )
        try:
            source = self._open(lock, progress)
            facts |= file_facts(source)
            found = probe(source, self._tokenizer, self._documents, progress)
            facts |= text_facts(self._settings, source, found)
            self._judge(facts, found, source)
        except SummerError as error:
            self._complain(error)
        told = "".join(self._problems)
        self._warnings += [
            incident["reason"]
            for incident in self._transfer.take_incidents()
            if incident["reason"].partition(";")[0] not in told
        ]
        return {**facts, "problems": self._problems, "warnings": self._warnings}

    def _open(self, lock: Sequence[Mapping[str, Any]] | None, progress: Progress) -> Source:
        """Open the source by its lock; settings that differ from it are a problem, no stop."""
        data = self._settings.data
        entry = next((entry for entry in lock or () if entry["name"] == self._name), None)
        if lock is not None and entry is None:
            self._complain(DataChangedError("new: the run's lock doesn't have it"))
        source = open_source(self._name, data, data.lanes, self._transfer, entry, progress)
        if entry is not None:
            same = {"duplicates": None}  # known after a pass over all sources only
            for line in lock_differences([{**entry, **same}], [{**source.lock(), **same}]):
                change = line.removeprefix(f"source {self._name}: ")
                self._complain(DataChangedError(f"not as in the run's lock: {change}"))
        return source

    def _judge(self, facts: Mapping[str, Any], found: Probe, source: Source) -> None:
        """Say what is wrong with texts and tokens."""
        warn = self._warnings.append
        if not found.tokens:
            self._complain(UsageError(f"none of {found.rows} rows drawn has a text that is kept"))
            return
        if line := judge_epochs(self._name, facts["epochs"], self._config.max_epochs):
            if facts["epochs"] > (self._config.max_epochs or 0) * (1 + TOLERANCE):
                self._complain(UsageError(line))
            else:
                warn(line)
        if facts["epochs"] > MANY_EPOCHS:
            warn(
                f"read {facts['epochs']:.1f} times; beyond {MANY_EPOCHS} epochs repeated text "
                "teaches less and less"
            )
        if (longest := facts["tokens_per_document"]["longest"]) > LONG_TOKENS:
            rows = longest / self._settings.model.context
            warn(f"a document of {longest:,} tokens fills {rows:,.0f} rows; see max_characters")
        if facts["bytes_per_token"] < FEW_BYTES:
            warn(f"{facts['bytes_per_token']:.2f} bytes a token: the tokenizer wasn't made for it")
        if (lost := sum(found.no_text.values())) > NO_TEXT * found.rows:
            reasons = ", ".join(f"{reason} {count}" for reason, count in found.no_text.items())
            warn(f"{lost} of {found.rows} rows drawn have no text and are passed over: {reasons}")
        lanes = self._settings.data.lanes
        if facts["rows"] < FEW_ROWS * lanes and lanes > 1:
            warn(f"{facts['rows']} rows for {lanes} lanes: some lanes begin the next epoch earlier")
        if asked := [rule for rule in source.rules if rule in OF_THE_WHOLE]:
            warn(f"{' and '.join(asked)} not looked for here: tokens and epochs are counted before")

    def _complain(self, error: SummerError) -> None:
        self._problems.append(str(error).removeprefix(f"source {self._name}: "))
        self.codes.append(error.exit_code)


def settings_facts(settings: Settings, name: str) -> dict[str, Any]:
    """Tell what is known of a source before it is opened, and leave the rest open.

    Args:
        settings: The run's settings.
        name: The source.

    Returns:
        All keys of a source's facts.
    """
    config = settings.data.sources[name]
    unknown = (
        *("revision", "files", "bytes", "formats", "rows", "held_out_rows", "rows_drawn"),
        *("documents", "sample", "no_text", "dropped", "changed"),
        *("tokens_per_document", "bytes_per_document", "bytes_per_token", "tokens", "epochs"),
    )
    return {
        "name": name,
        "origin": origin(config),
        "licence": config.licence,
        "terms": config.terms,
        "column": config.conversations or config.column or "text",
        "max_epochs": config.max_epochs,
        "budget_tokens": round(source_budget(settings, name)),
        **dict.fromkeys(unknown),
    }


def origin(config: SourceConfig) -> str:
    """Say where a source's files come from, for people."""
    if config.python_stdlib:
        return "the standard library of this Python"
    place = f"hub {config.hub}" if config.hub else str(config.path)
    parts = [part for part in (place, config.data_dir, config.files) if part]
    return "/".join(parts)


def file_facts(source: Source) -> dict[str, Any]:
    """Tell what is known of an opened source.

    Args:
        source: The source.

    Returns:
        Revision, files, bytes, formats, rows and held-out rows.
    """
    rows = sum(source.units)
    names = [PurePosixPath(shard.file.name) for shard in source.shards]
    return {
        "revision": source.lock()["revision"],
        "files": len(names),
        "bytes": sum(shard.file.size for shard in source.shards),
        "formats": sorted({_ending(name) for name in names}),
        "rows": rows,
        "held_out_rows": sum(sum(shard.groups) for shard in source.shards) - rows,
    }


def text_facts(settings: Settings, source: Source, found: Probe) -> dict[str, Any]:
    """Tell what the drawn rows of a source came to.

    Args:
        settings: The run's settings.
        source: The source.
        found: What was drawn.

    Returns:
        Counts and reasons of the rows drawn, tokens and bytes a document, and what follows for
        the whole source and its epochs.
    """
    facts: dict[str, Any] = {
        "rows_drawn": found.rows,
        "documents": len(found.tokens),
        "no_text": dict(found.no_text.most_common()),
        "dropped": dict(found.dropped.most_common()),
        "changed": dict(found.changed.most_common()),
    }
    if found.tokens:
        facts |= {
            "sample": found.example,
            "tokens_per_document": _spread([round(count) for count in found.tokens]),
            "bytes_per_document": _spread(found.bytes),
            "bytes_per_token": sum(found.bytes) / sum(found.tokens),
            "tokens": round(found.source_tokens),
            "epochs": predicted_epochs(settings, source.name, found.source_tokens),
        }
    return facts


def _ending(name: PurePosixPath) -> str:
    compressed = name.suffix in (".gz", ".zst")
    return "".join(name.suffixes[-2 if compressed else -1 :]) or "none"


def _spread(counts: Sequence[int]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(counts),
        "median": statistics.median(counts),
        "longest": max(counts),
    }
