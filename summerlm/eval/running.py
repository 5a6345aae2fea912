"""A task and a model -> figures, with what was chosen for every item.

Flow:
    1. `prepare` reads a task's rows and makes items with their examples of them;
    2. `answer` tells the likelihood of every continuation, or `LanguageModel.complete` writes;
       text goes to `measure_protocols`;
    3. `metrics` makes figures, for each part and for all, in a `TaskResult`.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from summerlm.core.errors import SummerError, UsageError
from summerlm.core.progress import Progress, silent
from summerlm.core.ranks import ALONE, Ranks
from summerlm.eval.corpus import Corpus
from summerlm.eval.definition import Task
from summerlm.eval.encoding import encode_pairs
from summerlm.eval.items import Where, read_items
from summerlm.eval.likelihood import Answer, answer
from summerlm.eval.metrics import (
    best_choice,
    find_answer,
    mean,
    perplexity,
    pooled,
    same_answer,
)
from summerlm.eval.preparing import Part, count_examples, prepare
from summerlm.eval.protocols import measure_protocols, result_of
from summerlm.eval.results import Figure, TaskResult
from summerlm.eval.templates import SEED
from summerlm.generate.engine import LanguageModel

PROTOCOLS = {
    "choice": "likelihood of each choice",
    "cloze": "likelihood of the ending",
    "generate": "greedy writing",
    "text": "perplexity, by protocol",
}
"""How each kind of task is measured, in the words of a table."""


def run_task(
    lm: LanguageModel,
    task: Task,
    where: Where,
    *,
    few_shot: int | None = None,
    seed: int = SEED,
    limit: int | None = None,
    stride: int | None = None,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = silent,
) -> TaskResult:
    """Measure a model in a task.

    Args:
        lm: The model with its tokenizer.
        task: The task.
        where: Where its rows are read from.
        few_shot: Examples in front of each item; None = the task's own number.
        seed: Of the examples that are drawn, and of a text's bootstrap.
        limit: Measure the first so many items of each part, or documents of a text; None = all.
        stride: Of a text's windows, in tokens; see `measure_protocols`.
        precision: Autocast's dtype; None = the weights' own.
        ranks: Who shares the work: every rank calls this with the same arguments.
        progress: Told how far it has come.

    Returns:
        The result, the same on all ranks.

    Raises:
        UsageError: If the rows can't be read or used, or examples are asked for where there are
            none.
        SummerError: If the model says NaN of an item or a text.
    """
    start = time.monotonic()
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: should be at least 1")
    if task.kind == "text":
        if few_shot:
            raise UsageError(f"task {task.name}: {few_shot} examples, and a text takes none")
        result = _measure_text(lm, task, where, seed, limit, stride, precision, ranks, progress)
    else:
        count = count_examples(task, few_shot)
        # the leading rank fetches what all then find in the cache
        parts = ranks.lead_first(
            lambda: [prepare(task, part, where, count, seed, limit) for part in task.part_names]
        )
        if task.kind == "generate":
            result = _write(lm, task, parts[0], count, precision)
        else:
            result = _compare(lm, task, parts, count, precision, ranks, progress)
    data = {**result.data, "seed": seed}
    return replace(result, data=data, seconds=time.monotonic() - start)


def _compare(
    lm: LanguageModel,
    task: Task,
    parts: Sequence[Part],
    count: int,
    precision: torch.dtype | None,
    ranks: Ranks,
    progress: Progress,
) -> TaskResult:
    """Measure choices or clozes by likelihood; ids of one part at a time are held."""
    longest = lm.config.context + 1
    results, total = [], sum(len(part.items) for part in parts)
    for part in parts:
        asks = encode_pairs(lm.tokenizer, part.pairs)
        answers = answer(lm.model, asks, precision=precision, ranks=ranks)
        cut = sum(len(ask.context) + len(ask.continuation) > longest for ask in asks)
        results.append(_judge(task, part, answers, count, cut))
        progress(f"measuring {task.name}", sum(result.items for result in results), total)
    return results[0] if len(parts) == 1 else _together(task, parts, results)


def _judge(
    task: Task, part: Part, answers: Sequence[Answer], count: int, truncated: int
) -> TaskResult:
    """Make the figures of a part."""
    rest = iter(answers)
    by_item = [[next(rest) for _ in item.pairs] for item in part.items]
    logprobs = [[found.logprob for found in one] for one in by_item]
    for number, values in enumerate(logprobs):
        if any(math.isnan(value) for value in values):
            raise SummerError(f"task {task.name}: the model says NaN of item {number}")
    chosen_norm: list[int] = []
    if task.kind == "cloze":
        right = [1] * len(part.items)
        chosen = [int(one[0].greedy) for one in by_item]
        made = {"acc": mean(chosen), "perplexity": perplexity([one[0] for one in logprobs])}
    else:
        right = [item.answer for item in part.items]
        chance = mean([1 / len(item.choices) for item in part.items]).value
        chosen = [best_choice(values) for values in logprobs]
        made = {"acc": mean([float(c == r) for c, r in zip(chosen, right, strict=True)], chance)}
        if "acc_norm" in task.metrics:
            chosen_norm = [
                best_choice(values, [len(choice) for choice in item.choices])
                for values, item in zip(logprobs, part.items, strict=True)
            ]
            hits = [float(c == r) for c, r in zip(chosen_norm, right, strict=True)]
            made["acc_norm"] = mean(hits, chance)
    return TaskResult(
        task=task.name_of(part.name),
        protocol=PROTOCOLS[task.kind],
        items=len(part.items),
        few_shot=count,
        figures={name: made[name] for name in task.metrics},
        chosen=chosen,
        chosen_norm=chosen_norm,
        answers=right,
        logprobs=logprobs,
        data={**part.rows.origin, "truncated": truncated},
    )


def _together(task: Task, parts: Sequence[Part], results: Sequence[TaskResult]) -> TaskResult:
    """Put parts together: figures weighted by items, of each group and of all."""
    by_name = {part.name: result for part, result in zip(parts, results, strict=True)}

    def merged(names: Sequence[str], metric: str) -> Figure:
        found = [by_name[name] for name in names]
        figures, sizes = [one.figures[metric] for one in found], [one.items for one in found]
        chances = [(figure.chance or 0) * size for figure, size in zip(figures, sizes, strict=True)]
        return pooled(figures, sizes, sum(chances) / sum(sizes))

    figures: dict[str, Figure] = {m: merged(task.part_names, m) for m in task.metrics}
    if len(task.parts) > 1:
        figures |= {
            f"{metric}_{group}": merged(names, metric)
            for metric in task.metrics
            for group, names in task.parts.items()
        }
    hashes = "".join(result.data["rows_sha256"] for result in results)
    data = {
        **results[0].data,
        "folder": results[0].data["folder"].replace(parts[0].name, "*"),
        "files": {name: h for result in results for name, h in result.data["files"].items()},
        "rows_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "truncated": sum(result.data["truncated"] for result in results),
        "limit": next((n for result in results if (n := result.data["limit"])), None),
    }
    return TaskResult(
        task=task.name,
        protocol=PROTOCOLS[task.kind],
        items=sum(result.items for result in results),
        few_shot=results[0].few_shot,
        figures=figures,
        parts=by_name,
        chosen=[index for result in results for index in result.chosen],
        chosen_norm=[index for result in results for index in result.chosen_norm],
        answers=[index for result in results for index in result.answers],
        data=data,
    )


def _write(
    lm: LanguageModel, task: Task, part: Part, count: int, precision: torch.dtype | None
) -> TaskResult:
    """Measure answers that the model writes."""
    how = task.generation
    assert how is not None
    contexts = [context for context, _ in part.pairs]
    prompts = [[lm.tokenizer.bos, *ids] for ids in lm.tokenizer.encode_batch(contexts)]
    written = lm.complete(prompts, max_tokens=how.max_tokens, stop=how.stop, precision=precision)
    keys = [item.choices[0] for item in part.items]
    figures = {}
    for name, extract in how.extract.items():
        hits = [
            float(same_answer(find_answer(text, extract), key, how))
            for text, key in zip(written, keys, strict=True)
        ]
        figures[f"exact_match_{name}"] = mean(hits)
    longest = lm.config.context - how.max_tokens
    return TaskResult(
        task=task.name,
        protocol=PROTOCOLS[task.kind],
        items=len(part.items),
        few_shot=count,
        figures=figures,
        written=written,
        data={**part.rows.origin, "truncated": sum(len(ids) > longest for ids in prompts)},
    )


def _measure_text(
    lm: LanguageModel,
    task: Task,
    where: Where,
    seed: int,
    limit: int | None,
    stride: int | None,
    precision: torch.dtype | None,
    ranks: Ranks,
    progress: Progress,
) -> TaskResult:
    """Measure a text under every protocol, each a part."""
    rows = ranks.lead_first(lambda: read_items(task, task.data.split, where))
    (column,) = task.data.columns
    assert task.layout is not None
    corpus = Corpus.of_rows(task.layout, [row[column] for row in rows])
    cut = limit is not None and limit < len(corpus.documents)
    if cut:
        corpus = replace(corpus, documents=corpus.documents[:limit], rows=corpus.rows[:limit])
    scores = measure_protocols(
        lm, corpus, stride=stride, seed=seed, precision=precision, ranks=ranks, progress=progress
    )
    origin = {**rows.origin, "limit": limit if cut else None}
    return result_of(task.name, scores, len(corpus.documents), origin)
