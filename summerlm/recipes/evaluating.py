"""Measuring a trained model: texts under every protocol, tasks, and lm-eval's own tasks.

Flow:
    1. `eval_request` says what is `Wanted`, and where data lie;
    2. `evaluate` loads the model, measures, and gives plain facts: what `--json` writes;
    3. `eval_tables` lays them out, `comparing` puts those of several runs side by side.
The facts hold no times, so that the same evaluation gives the same file.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from summerlm import __version__
from summerlm.checkpoint.load import Loaded, load
from summerlm.core.errors import UsageError
from summerlm.core.hardware import describe, pick_device
from summerlm.core.progress import Progress, silent
from summerlm.core.ranks import ALONE, Ranks
from summerlm.core.runtime import keep_freed_memory
from summerlm.data.config import DataConfig, SourceConfig
from summerlm.data.opening import open_sources
from summerlm.eval.corpus import Corpus
from summerlm.eval.items import Where
from summerlm.eval.preparing import look
from summerlm.eval.protocols import measure_protocols, result_of
from summerlm.eval.results import TaskResult
from summerlm.eval.running import run_task
from summerlm.eval.task import expand
from summerlm.generate.engine import LanguageModel
from summerlm.plan.count import parameters
from summerlm.recipes.eval_request import FORMAT, Wanted, mirror_of


def evaluate(
    run: Path, wanted: Wanted, where: Where, progress: Progress = silent
) -> dict[str, Any]:
    """Measure a model.

    Args:
        run: A run folder or checkpoint.
        wanted: What and how.
        where: Where tasks' data lie.
        progress: Told how far it has come.

    Returns:
        `model`, `settings`, `versions`, `results` (each `TaskResult.facts`), `checkpoint`, `step`;
        with texts what `measure` says of them, too, and with lm-eval's tasks `lm_eval`.

    Raises:
        SummerError: If nothing is asked for, or something can't be had; tasks are looked up
            before the model is loaded.
    """
    if not (wanted.texts or wanted.names or wanted.harness):
        raise UsageError("nothing to measure: ask for --suite, --text or --lm-eval")
    _refuse_idle(wanted, where)
    run_harness = _find_harness() if wanted.harness else None
    device = pick_device("auto")
    if device.type == "cpu":
        keep_freed_memory()
    loaded = load(run, device)
    lm = LanguageModel(loaded.model, loaded.tokenizer)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "checkpoint": str(loaded.folder),
        "step": loaded.state["step"],
        "model": _describe_model(run, loaded),
        "settings": _describe_settings(lm, wanted, where),
        "versions": {"summerlm": __version__, **describe(device)},
        "results": [],
    }
    results: list[TaskResult] = []
    if wanted.texts:
        results.append(_measure_texts(lm, wanted, progress))
        facts |= _as_measure_says(results[0])
    results += evaluate_suite(lm, wanted, where, progress=progress)
    for result in results:
        found = result.facts()
        del found["seconds"]
        facts["results"].append(found)
    if run_harness is not None:
        facts["lm_eval"] = run_harness(
            lm,
            wanted.harness,
            mirror=mirror_of(where),
            few_shot=wanted.few_shot,
            limit=wanted.limit,
            seed=wanted.seed,
        )
    return facts


def _refuse_idle(wanted: Wanted, where: Where) -> None:
    """Refuse what would change nothing of what is measured."""
    tasks = expand(wanted.names)
    names = [task.name for task in tasks]
    for name in where.files:
        if name not in names:
            raise UsageError(
                f"data.files.{name}: no such task is measured; these are: {', '.join(names) or '-'}"
            )
    kinds = {"text"} if wanted.texts else set()
    kinds |= {"harness"} if wanted.harness else set()
    kinds |= {"text" if task.kind == "text" else "items" for task in tasks}
    if wanted.few_shot is not None and kinds == {"text"}:
        raise UsageError(f"--few-shot {wanted.few_shot}: texts take no examples")
    if wanted.stride is not None and "text" not in kinds:
        raise UsageError(f"--stride {wanted.stride}: only texts are read in windows, and none is")


def evaluate_suite(
    lm: LanguageModel,
    wanted: Wanted,
    where: Where,
    *,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = silent,
) -> list[TaskResult]:
    """Measure a model in tasks.

    Args:
        lm: The model with its tokenizer.
        wanted: Which tasks and how.
        where: Where their data lie.
        precision: Autocast's dtype; None = the weights' own.
        ranks: Who shares the work: every rank calls this with the same arguments.
        progress: Told how far it has come.

    Returns:
        A result a task, the same on all ranks.
    """
    results = []
    tasks = expand(wanted.names)
    shots = {task.name: None if task.kind == "text" else wanted.few_shot for task in tasks}
    where = replace(where, kept={} if where.kept is None else where.kept)
    for task in tasks:  # a set that is missing is told before others are measured
        ranks.lead_first(partial(look, task, where, shots[task.name], wanted.limit))
    for number, task in enumerate(tasks):
        progress("tasks", number, len(tasks))
        result = run_task(
            lm,
            task,
            where,
            few_shot=shots[task.name],
            seed=wanted.seed,
            limit=wanted.limit,
            stride=wanted.stride,
            precision=precision,
            ranks=ranks,
            progress=partial(_of_task, progress, task.name),
        )
        results.append(result)
    return results


def read_documents(texts: Sequence[str]) -> Iterator[str]:
    """Read every document of files on this machine, in a fixed order.

    Args:
        texts: Files, folders or globs; text files are one document each, JSON lines and parquet
            give their column `text`.

    Yields:
        Documents.

    Raises:
        UsageError: If something named holds no document.
    """
    for text in texts:
        sources = {"text": SourceConfig(weight=1, path=text)}
        (source,) = open_sources(DataConfig(sources=sources, held_out_fraction=0), lanes=1)
        for unit in range(len(source.units)):
            yield from (row for row in source.read(unit) if isinstance(row, str))


def _measure_texts(lm: LanguageModel, wanted: Wanted, progress: Progress) -> TaskResult:
    corpus = Corpus.of_documents(read_documents(wanted.texts))
    if wanted.limit is not None:
        corpus = replace(
            corpus, documents=corpus.documents[: wanted.limit], rows=corpus.rows[: wanted.limit]
        )
    digest = hashlib.sha256()
    for document in corpus.documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    data = {
        "origin": "file",
        "repository": None,
        "folder": " ".join(wanted.texts),
        "split": None,
        "revision": None,
        "rows_sha256": digest.hexdigest(),
        "seed": wanted.seed,
        "limit": wanted.limit,
    }
    stride = wanted.stride or max(1, lm.config.context // 2)
    scores = measure_protocols(lm, corpus, stride=stride, seed=wanted.seed, progress=progress)
    return result_of("text", scores, len(corpus.documents), data)


def _as_measure_says(result: TaskResult) -> dict[str, Any]:
    """Give what `eval.text.measure` would say: that is the protocol "raw"."""
    raw = result.parts["raw"]
    n, sums, settings = (raw.data[key] for key in ("n", "sums", "settings"))
    return {
        "documents": n["documents"],
        "tokens": n["tokens"],
        "bytes": n["bytes"],
        "loss": sum(sums["nats"]) / n["tokens"],
        "perplexity": raw.figures["perplexity"].value,
        "bits_per_byte": raw.figures["bits_per_byte"].value,
        "context": settings["context"],
        "stride": settings["stride"],
    }


def _of_task(progress: Progress, task: str, what: str, done: int, total: int) -> None:
    """Tell of a task's progress under its name."""
    progress(f"{task}, {what}", done, total)


def _describe_model(run: Path, loaded: Loaded) -> dict[str, Any]:
    folder = loaded.folder.resolve()
    in_run = folder.parent.name == "checkpoints"
    return {
        "run": str(run),
        "name": folder.parent.parent.name if in_run else folder.name,
        "step": loaded.state["step"],
        "tokens": loaded.state["tokens"],
        "parameters": parameters(loaded.model.config),
        "context": loaded.model.config.context,
        "vocabulary": loaded.model.config.vocabulary,
        "tokenizer": loaded.tokenizer.fingerprint,
    }


def _describe_settings(lm: LanguageModel, wanted: Wanted, where: Where) -> dict[str, Any]:
    return {
        "few_shot": wanted.few_shot,
        "seed": wanted.seed,
        "limit": wanted.limit,
        "stride": wanted.stride,
        "precision": str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        "mirror": None if (mirror := mirror_of(where)) is None else str(mirror),
        "bundle": where.bundle,
    }


def _find_harness() -> Callable[..., dict[str, Any]]:
    """Import what speaks to lm-eval; other uses don't need the extra."""
    try:
        from summerlm.eval.harness_tasks import evaluate_with_harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UsageError("--lm-eval needs lm-eval: pip install 'summerlm[eval]'") from None
    return evaluate_with_harness
