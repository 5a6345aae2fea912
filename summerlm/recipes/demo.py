"""The demo: from this machine's Python library to a measured model, in minutes.

Flow:
    1. `learn_bpe` learns a BPE from the training files of the library;
    2. `plan_demo` times a few steps and turns minutes into a budget of tokens, once;
    3. `pretrain` trains the run;
    4. `measure_demo` scores the held-out files with the model, a 5-gram model and xz;
    5. prompts are completed, `summary.json` and `report.html` written.
"""

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

import summerlm
from summerlm.core.config import read_settings
from summerlm.core.console import facts_table
from summerlm.core.errors import UsageError
from summerlm.core.files import RunFolder, read_json, write_json
from summerlm.core.ranks import ALONE
from summerlm.core.record import read_rows
from summerlm.core.runtime import StopRequest
from summerlm.data.batch import IGNORE
from summerlm.data.opening import open_sources
from summerlm.data.shards.stdlib import standard_library
from summerlm.eval.compression import xz_bytes_after
from summerlm.eval.ngram import KneserNey
from summerlm.eval.text import measure
from summerlm.optim.schedule import rate_factor
from summerlm.plan.count import parameters
from summerlm.recipes.assembling import make_stepper
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.opening import is_finished, open_run
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.report import write_report
from summerlm.recipes.settings import Settings, derive, preset
from summerlm.recipes.watching import EVAL_ROWS
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.tokenizer import Tokenizer
from summerlm.train.config import compute_dtype

VOCABULARY = 4096
PROMPTS = ("def read", 'class Stack:\n    """', "    try:\n")
TIMED_STEPS = 16


def demo(folder: Path, minutes: float, console: Console) -> int:
    """Train, measure and show the demo.

    Args:
        folder: The run's folder; an unfinished demo there goes on.
        minutes: Minutes of training, the timing of the first steps included.
        console: Where a person reads along.

    Returns:
        The exit code: 0 when done, or when stopped and saved.
    """
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        console.print("learning a tokenizer from the Python standard library ...")
        learn_bpe(training_texts(), VOCABULARY).save(tokenizer)
    planned = plan_demo(folder, minutes, console)
    settings = demo_settings(folder, planned["budget_tokens"])
    code = pretrain(settings, console)
    if not is_finished(settings):
        return code  # stopped by a signal, and saved
    console.print("measuring the held-out files: model, 5-gram, xz ...")
    summary = measure_demo(settings, planned["warmup_seconds"])
    write_json(folder / "summary.json", summary)
    page = write_report(folder)
    shown = {key: value for key, value in summary.items() if key != "completions"}
    console.print(facts_table("demo", shown))
    for completion in summary["completions"]:
        console.rule(repr(completion["prompt"]), align="left")
        console.print(completion["prompt"] + completion["text"], markup=False, highlight=False)
    console.rule()
    console.print(f"{folder / 'summary.json'}\n{page}", soft_wrap=True)
    return 0


def training_texts() -> Iterator[str]:
    """Read the library's training files in their fixed order."""
    for path in standard_library().train:
        yield path.read_text(encoding="utf-8")


def demo_settings(folder: Path, budget_tokens: int) -> Settings:
    """Give the demo's settings for a folder and budget."""
    overrides = [
        f"run.folder={json.dumps(str(folder))}",  # a JSON string is one of TOML, too
        f"tokenizer.name={json.dumps(str(folder / 'tokenizer'))}",
        f"train.budget_tokens={budget_tokens}",
    ]
    return read_settings(Settings, preset("demo"), overrides)


def plan_demo(folder: Path, minutes: float, console: Console) -> dict[str, Any]:
    """Turn minutes into a budget of tokens, once for a folder.

    Args:
        folder: The demo's folder; what was decided stands in its `demo.json`.
        minutes: Minutes of training, the timing of the first steps included.
        console: Where a person reads along.

    Returns:
        `minutes`, `warmup_seconds` (of timing) and `budget_tokens`.

    Raises:
        UsageError: If the folder holds a demo of other minutes.
    """
    path = folder / "demo.json"
    if path.exists():
        planned: dict[str, Any] = read_json(path)
        if planned["minutes"] != minutes:
            raise UsageError(
                f"{folder}: holds a demo of {planned['minutes']:g} minutes; give another --folder, "
                f"or --minutes {planned['minutes']:g}"
            )
        return planned
    console.print("timing a few steps ...")
    settings = demo_settings(folder, budget_tokens=1_000_000)
    warmup, step = time_steps(settings)
    steps = max(20, math.floor((60 * minutes - warmup) / step))
    planned = {
        "minutes": minutes,
        "warmup_seconds": warmup,
        "budget_tokens": steps * settings.train.batch_tokens,
    }
    write_json(path, planned)
    return planned


def time_steps(settings: Settings) -> tuple[float, float]:
    """Time the first steps of a run in a scratch folder.

    Args:
        settings: The run's settings.

    Returns:
        Seconds of the whole trial, and seconds of one of its later steps.
    """
    with tempfile.TemporaryDirectory() as scratch, RunFolder(Path(scratch)) as held:
        start = time.monotonic()
        run = open_run(settings, held, ALONE, warn=lambda _: None, stop=StopRequest())
        stepper = make_stepper(settings, run.layout, run.optimizer, run.dtype, len(run.sources))
        loader = open_loader(settings, run.sources, run.tokenizer, None)
        ticks = [time.monotonic()]
        for item, _ in zip(loader, range(TIMED_STEPS), strict=False):
            rate = rate_factor(settings.optim, settings.train.batch_tokens, 10**9)
            batch = item.batch.to(run.device)
            count = int((batch.targets != IGNORE).sum())
            stepper(batch, item.number, rate, count=count).loss.item()
            ticks.append(time.monotonic())
        loader.close()
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    return ticks[-1] - start, statistics.median(steps[TIMED_STEPS // 2 :])


def measure_demo(settings: Settings, warmup_seconds: float) -> dict[str, Any]:
    """Measure a finished demo and its baselines on the held-out files.

    Args:
        settings: The demo's settings.
        warmup_seconds: What the timing took before the first step.

    Returns:
        The content of `summary.json`; `xz_bytes_after` and `KneserNey` learn from exactly the
        text that the model was trained on.
    """
    lm = summerlm.load(settings.run.folder)
    (source,) = open_sources(settings.data, settings.data.lanes)
    texts = list(source.held_out())
    size = sum(len(text.encode()) for text in texts)
    device = next(lm.model.parameters()).device
    score = measure(
        lm.model,
        lm.tokenizer,
        texts,
        context=settings.model.context,
        batch_rows=EVAL_ROWS,
        precision=compute_dtype(settings.train, device),
    )
    assert score.bytes == size, "bits per byte are over the whole files"
    seen = list(documents_seen(settings, lm.tokenizer))  # the baselines get what the model got
    ngram = KneserNey(order=5).fit(seen, lm.tokenizer.vocabulary)
    nats = sum(ngram.nats(lm.tokenizer.encode(text)) for text in texts)
    read = "".join(map(lm.tokenizer.decode, seen)).encode()
    packed = xz_bytes_after(read, "".join(texts).encode())
    steps = [row for row in read_rows(RunFolder(settings.run.folder).metrics) if "loss" in row]
    seconds = warmup_seconds + steps[-1]["elapsed_s"]
    tokens = steps[-1]["tokens"]
    return {
        "bits_per_byte": score.bits_per_byte,
        "baseline_5gram_bits_per_byte": nats / math.log(2) / size,
        "xz_bits_per_byte": 8 * packed / size,
        "held_out_files": len(texts),
        "held_out_bytes": size,
        "tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "parameters": parameters(settings.model),
        "completions": [
            {
                "prompt": prompt,
                "text": lm.generate(prompt, max_tokens=100, temperature=0.7, top_p=0.9),
            }
            for prompt in PROMPTS
        ],
    }


def documents_seen(settings: Settings, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Give the token ids that training saw, as documents, each once, for the 5-gram model.

    Training rows are dealt again and joined to the streams they were cut from, of which a lane
    takes rows in turn, so that the baseline sees the same tokens with unbroken contexts.

    Args:
        settings: The demo's settings.
        tokenizer: Its tokenizer.

    Yields:
        Ids of each document without BOS and EOS; open ones are cut where training stopped.
    """
    (source,) = open_sources(settings.data, settings.data.lanes)
    lanes, open_documents = settings.data.lanes, settings.data.open_documents
    streams: dict[tuple[int, int], list[int]] = {}
    loader = open_loader(settings, [source], tokenizer, None)
    steps = itertools.islice(loader, derive(settings).steps)
    for number, ids in enumerate(itertools.chain.from_iterable(step.ids for step in steps)):
        turn, lane = divmod(number, lanes)
        stream = streams.setdefault((lane, turn % open_documents), [])
        stream.extend(ids[:-1].tolist())  # the last id begins the next row
    loader.close()
    seen = set()
    for stream in streams.values():
        starts = [i for i, token in enumerate(stream) if token == tokenizer.bos]
        for first, end in itertools.pairwise([*starts, len(stream)]):
            document = tuple(t for t in stream[first + 1 : end] if t != tokenizer.eos)
            if document not in seen:
                seen.add(document)
                yield list(document)
