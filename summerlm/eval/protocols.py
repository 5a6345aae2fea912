"""Every protocol that is called perplexity, on one text, side by side.

Flow:
    1. `plans` make a `Plan` each of a `Corpus`: the streams that a protocol reads, cut by
       `windows`, and what its sums are divided by;
    2. `_merged` takes windows of several protocols that begin at one place of one stream for
       one: a causal model says the same of a token whatever stands behind it;
    3. `_ask` scores each of them once, ranks sharing the batches, and adds up nats by unit;
    4. `_score_of` makes figures of the sums, each with a `bootstrap` interval.
docs/evaluation.md has each protocol's formula and source.

Shapes: U units (documents; blocks of the original's), T positions of a window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from summerlm.core.errors import SummerError, UsageError
from summerlm.core.progress import Progress, silent
from summerlm.core.ranks import ALONE, Ranks
from summerlm.eval.bootstrap import Estimate, Floats, bootstrap
from summerlm.eval.corpus import Corpus
from summerlm.eval.likelihood import pass_tokens
from summerlm.eval.plans import (
    COLUMNS,
    FIGURES,
    NATS,
    ORIGINAL_BATCH,
    PROTOCOLS,
    TOKENS,
    Plan,
    Streams,
    original_plan,
    raw_plan,
    rolling_plan,
    sliding_plan,
)
from summerlm.eval.results import Figure, TaskResult
from summerlm.eval.windows import score
from summerlm.generate.engine import LanguageModel
from summerlm.model.packed import scoring


@dataclass(frozen=True)
class ProtocolScore:
    """What one protocol says of a text.

    Attributes:
        protocol: Its name in `PROTOCOLS`.
        figures: Figures by their name in `FIGURES`; none where the text is too short for it.
        n: What was counted: tokens asked for, and of documents, blocks, words, bytes what applies.
        settings: `context`, and `stride` or `block`, in tokens; `read`, positions that the
            model read for this protocol and for none before it; `alone`, those that it would
            have read for this protocol alone.
        sums: What the figures are made of, by unit, in the order of the text: `nats`, and what
            they are divided by; with them two models can be compared document by document.
        notes: What a reader must know to compare it.
    """

    protocol: str
    figures: dict[str, Estimate]
    n: dict[str, int]
    settings: dict[str, int]
    sums: dict[str, list[float]]
    notes: tuple[str, ...] = ()


def measure_protocols(
    lm: LanguageModel,
    corpus: Corpus,
    *,
    stride: int | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = silent,
) -> dict[str, ProtocolScore]:
    """Measure a text under every protocol, in one pass over what they share.

    Args:
        lm: The model with its tokenizer; dropout is off meanwhile.
        corpus: The text.
        stride: Tokens that a window is asked for, where a protocol lets windows overlap; None =
            half the context for "sliding", and all of it for "raw", which then reads what
            "rolling" reads wherever that reads the text as it is.
        seed: Of the bootstrap.
        batch_tokens: Positions read at once, if a window isn't longer; None = as many as suit the
            device.
        precision: Autocast's dtype; None = the weights' own.
        ranks: Who shares the work: every rank calls this with the same text.
        progress: Told of the positions read.

    Returns:
        The score by protocol, in the order of `PROTOCOLS`, the same on all ranks.

    Raises:
        UsageError: If the stride doesn't fit the context, or there is no text.
        SummerError: If the model says NaN of a token.
    """
    context = lm.config.context
    if stride is not None and not 1 <= stride <= context:
        raise UsageError(f"stride {stride}: must be 1 to the context, {context}")
    if not any(corpus.documents):
        raise UsageError(f"nothing to measure: {len(corpus.documents)} documents hold no text")
    if batch_tokens is None:
        batch_tokens = pass_tokens(next(lm.model.parameters()).device)
    streams = Streams(lm.tokenizer)
    plans = [
        original_plan(corpus, streams, context),
        sliding_plan(corpus, streams, context, stride or max(1, context // 2)),
        rolling_plan(corpus, streams, context),
        raw_plan(corpus, streams, context, stride or context),
    ]
    merged = _merged(plans)
    sums = _ask(lm, streams, merged, plans, batch_tokens, precision, ranks, progress)
    return {
        plan.protocol: _score_of(plan, nats, corpus.notes, seed)
        for plan, nats in zip(plans, sums, strict=True)
    }


def result_of(
    task: str, scores: Mapping[str, ProtocolScore], documents: int, data: Mapping[str, Any]
) -> TaskResult:
    """Put what `measure_protocols` found into the form of every task's result.

    Args:
        task: The text's name.
        scores: What it found.
        documents: Documents of the text.
        data: Where the text is from; see `Items.origin`.

    Returns:
        A result with a part a protocol, named after it; their `data` also have the scores' `n`,
        `settings` and `sums`. Its own figures are those of all parts, as `rolling_bits_per_byte`.
    """
    parts = {
        name: TaskResult(
            task=f"{task}_{name}",
            protocol=PROTOCOLS[name],
            items=score.n.get("documents", score.n.get("blocks", 0)),
            few_shot=0,
            figures={
                figure: Figure(e.value, e.error, None, False, e.low, e.high)
                for figure, e in score.figures.items()
            },
            data={**data, "n": score.n, "settings": score.settings, "sums": score.sums},
            notes=score.notes,
        )
        for name, score in scores.items()
    }
    figures = {
        f"{name}_{figure}": value
        for name, part in parts.items()
        for figure, value in part.figures.items()
    }
    words = "perplexity, by protocol"
    return TaskResult(task, words, documents, 0, figures, parts=parts, data=dict(data))


@dataclass
class Reading:
    """A window that the model reads once, for all who ask.

    Attributes:
        stream: The stream's number.
        start: Its first position there.
        end: The end of its last one.
        asks: (plan, first, end, unit or units) of who asks.
    """

    stream: int
    start: int
    end: int
    asks: list[tuple[int, int, int, int | NDArray[np.int64]]] = field(default_factory=list)


def _merged(plans: Sequence[Plan]) -> list[Reading]:
    """Put windows of one beginning together, and note in each plan's settings what it costs."""
    found: dict[tuple[int, int], Reading] = {}
    for number, plan in enumerate(plans):
        read = alone = 0
        for stream, window, units in plan.asked:
            key = (stream, window.start)
            reading = found.setdefault(key, Reading(*key, window.start))
            read += max(0, window.end - reading.end)
            alone += window.end - window.start
            reading.end = max(reading.end, window.end)
            reading.asks.append((number, window.first, window.end, units))
        plan.settings |= {"read": read, "alone": alone}
    return list(found.values())


def _ask(
    lm: LanguageModel,
    streams: Streams,
    readings: list[Reading],
    plans: Sequence[Plan],
    batch_tokens: int,
    precision: torch.dtype | None,
    ranks: Ranks,
    progress: Progress,
) -> list[Floats]:
    """Score windows and add up nats by unit; gives (U,) of each plan."""
    model, device = lm.model, next(lm.model.parameters()).device
    sums = [np.zeros(len(plan.sizes)) for plan in plans]
    batches = _batches(readings, batch_tokens)
    total, done = sum(reading.end - reading.start for reading in readings), 0
    with scoring(model, precision):
        for turn in range(0, len(batches), ranks.world):
            own = turn + ranks.rank
            # where no batch is left a rank reads another's: a sharded model is read by all
            batch = batches[own if own < len(batches) else turn]
            found = score(model, [_row(reading, streams) for reading in batch], device)
            if own < len(batches):
                for reading, nats in zip(batch, found, strict=True):
                    _add(reading, nats.cpu().numpy(), sums)
            for several in batches[turn : turn + ranks.world]:
                done += sum(reading.end - reading.start for reading in several)
            progress("reading texts", done, total)
    whole = ranks.sum(torch.from_numpy(np.concatenate(sums)).to(device)).cpu().numpy()
    if np.isnan(whole).any():
        raise SummerError("the model says NaN of this text")
    return np.split(whole, np.cumsum([len(nats) for nats in sums])[:-1])


def _batches(readings: list[Reading], batch_tokens: int) -> list[list[Reading]]:
    """Put windows of about equal length together."""
    batches: list[list[Reading]] = []
    longest = 0
    for reading in sorted(readings, key=lambda reading: reading.start - reading.end):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = reading.end - reading.start
        batches[-1].append(reading)
    return batches


def _row(reading: Reading, streams: Streams) -> tuple[Tensor, Tensor]:
    """Give what a window reads, and from the first to the last that anybody asks it for."""
    ids = streams.ids[reading.stream]
    first = min(first for _, first, _, _ in reading.asks)
    read, asked = ids[reading.start : reading.end], ids[first + 1 : reading.end + 1]
    return read.long(), asked.long()


def _add(reading: Reading, nats: Floats, sums: list[Floats]) -> None:
    """Add a window's nats to the units of those who asked."""
    begin = min(first for _, first, _, _ in reading.asks)
    for plan, first, end, units in reading.asks:
        own = nats[first - begin : end - begin]
        if isinstance(units, int):
            sums[plan][units] += own.sum()
        else:
            np.add.at(sums[plan], units[first + 1 : end + 1], own)


def _score_of(plan: Plan, nats: Floats, notes: tuple[str, ...], seed: int) -> ProtocolScore:
    """Make a protocol's figures of the nats of its units, (U,)."""
    sums = plan.sizes.copy()
    sums[:, NATS] = nats
    totals = plan.sizes.sum(0).astype(int).tolist()
    counted = sorted({TOKENS, *(FIGURES[name].column for name in plan.figures)})
    n = {plan.unit: len(sums)} | {COLUMNS[column]: totals[column] for column in counted}
    names = plan.figures if totals[TOKENS] else ()
    figures = {name: bootstrap(sums, FIGURES[name].of, seed=seed) for name in names}
    if plan.protocol == "original" and figures:
        figures["perplexity"] = replace(figures["perplexity"], value=_mean_of_batches(sums))
    columns = {COLUMNS[column]: sums[:, column].tolist() for column in (NATS, *counted)}
    return ProtocolScore(plan.protocol, figures, n, plan.settings, columns, (*plan.notes, *notes))


def _mean_of_batches(sums: Floats) -> float:
    """Take the mean of each batch of blocks, then the mean of those, however full the last one."""
    means = sums[:, NATS] / sums[:, TOKENS]
    batches = [means[i : i + ORIGINAL_BATCH] for i in range(0, len(means), ORIGINAL_BATCH)]
    return float(np.exp(np.mean([batch.mean() for batch in batches])))
