"""SummerLM's side of the benchmark `data.py`, in processes of its own.

The job is a JSON object in the first argument: `part`, `config`, `overrides` and what the part
needs. Answers are lines of JSON.
    stages  each stage alone, once through for each line read (`data_stages`);
    chain   the loader; each line read is a number of tokens to make at least;
    start   the first step of a fresh process, maybe after a state;
    craft   writes a state in which the open documents are the longest, a row before their ends;
    memory  peak memory over some steps; writes the state after them;
    peer    what the peer must know: files, columns, the tokenizer as a file.
"""

import heapq
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from data_stages import Stages

from summerlm.core.config import read_settings
from summerlm.core.files import read_json, write_json
from summerlm.data.config import SourceConfig
from summerlm.data.encoding import Encoder
from summerlm.data.lanes import DataOrder, walk
from summerlm.data.packing import Place
from summerlm.data.sources import Source
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.data.locking import open_data
from summerlm.recipes.settings import Settings, derive
from summerlm.tokenizer.registry import load_tokenizer
from summerlm.tokenizer.tokenizer import FILE_NAME

FEW_LANES = ["data.lanes=2", "data.open_documents=1"]


def main() -> None:
    job = json.loads(sys.argv[1])
    settings = read_settings(Settings, Path(job["config"]), job["overrides"])
    parts: dict[str, Callable[[Settings, dict[str, Any]], None]] = {
        "stages": stages,
        "chain": chain,
        "start": start,
        "craft": craft,
        "memory": memory,
        "peer": peer,
    }
    parts[job["part"]](settings, job)


def stages(settings: Settings, job: dict[str, Any]) -> None:
    sources = open_data(settings)
    tokenizer = load_tokenizer(settings.tokenizer.name)
    measured = [
        Stages(source, tokenizer, settings.model.context, job["tokens"]) for source in sources
    ]
    for _ in sys.stdin:
        report({stage.name: stage.once() for stage in measured})


def chain(settings: Settings, job: dict[str, Any]) -> None:
    """Deal units cut for the configured lanes through a few lanes of one open document each.

    All lanes would first fill lanes x sources x `open_documents` open documents, millions of
    tokens that are encoded and not dealt yet; a run amortises that, minutes don't. The work a
    token is the same.
    """
    sources = open_data(settings)
    few = read_settings(Settings, Path(job["config"]), [*job["overrides"], *FEW_LANES])
    tokenizer = load_tokenizer(settings.tokenizer.name)
    loader = open_loader(few, sources, tokenizer, None, workers=job["workers"])
    try:
        for line in sys.stdin:
            counts: Counter[str] = Counter()
            began = time.perf_counter()
            while counts.total() < int(line):
                counts.update(next(loader).tokens_by_source)
            report({"seconds": time.perf_counter() - began, "tokens": counts})
    finally:
        loader.close()


def start(settings: Settings, job: dict[str, Any]) -> None:
    seconds = {}
    began = time.perf_counter()
    sources = open_data(settings)
    seconds["sources"] = time.perf_counter() - began
    tokenizer = load_tokenizer(settings.tokenizer.name)
    seconds["tokenizer"] = time.perf_counter() - began - seconds["sources"]
    state = read_json(Path(job["state"])) if job["state"] else None
    loader = open_loader(settings, sources, tokenizer, state, workers=job["workers"])
    next(loader)
    seconds["step"] = time.perf_counter() - began - sum(seconds.values())
    report(seconds)
    loader.close()


def craft(settings: Settings, job: dict[str, Any]) -> None:
    sources, tokenizer = open_data(settings), load_tokenizer(settings.tokenizer.name)
    state = next(open_loader(settings, sources, tokenizer, None, workers=0)).state
    data, context = settings.data, settings.model.context
    order = DataOrder(
        sources,
        [source.weight for source in data.sources.values()],
        [source.max_epochs for source in data.sources.values()],
        tokenizer,
        settings.run.seed,
        data.lanes,
        derive(settings).rows,
        context,
        data.open_documents,
    )
    for lane, held in state["lanes"].items():
        held["places"] = [
            [
                [*place, max(Encoder(tokenizer, source.chat)(text).ids.size - 1 - context, 0)]
                for place, text in longest(source, int(lane), order)
            ]
            for source in sources
        ]
    write_json(Path(job["state"]), state)
    report({})


def longest(source: Source, lane: int, order: DataOrder) -> list[tuple[Place, str]]:
    """Find the longest documents that a lane meets in the first epoch, the longest first."""
    documents = walk(source, None, lane, order, (0, 0, 0))
    epoch = takewhile(lambda document: document.place[0] == 0, documents)
    found = heapq.nlargest(order.open_documents, epoch, key=lambda document: len(document.text))
    return [(document.place, document.text) for document in found]


def memory(settings: Settings, job: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(settings.tokenizer.name)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    baseline = peak_bytes()
    sources = open_data(settings)
    loader = open_loader(settings, sources, tokenizer, None, workers=0)
    began = time.perf_counter()
    tokens = 0
    for _ in range(job["steps"]):
        step = next(loader)
        tokens += sum(step.tokens_by_source.values())
    seconds = time.perf_counter() - began
    write_json(Path(job["state"]), step.state)
    report(
        {
            "baseline_bytes": baseline,
            "bytes": peak_bytes() - baseline,
            "lanes": settings.data.lanes,
            "bytes_per_lane": (peak_bytes() - baseline) // settings.data.lanes,
            "steps": job["steps"],
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
        }
    )


def peer(settings: Settings, job: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(settings.tokenizer.name)
    tokenizer.save(Path(job["tokenizer_folder"]))
    report(
        {
            "tokenizer": str(Path(job["tokenizer_folder"]) / FILE_NAME),
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
            "context": settings.model.context,
            "sources": [
                peer_source(source, settings.data.sources[source.name])
                for source in open_data(settings)
            ],
        }
    )


def peer_source(source: Source, config: SourceConfig) -> dict[str, Any]:
    files = [shard.file.url for shard in source.shards]
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
    endings = Path(files[0]).suffixes
    return {
        "name": source.name,
        "weight": config.weight,
        "kind": next((kinds[ending] for ending in endings if ending in kinds), "text"),
        "files": files,
        "column": config.conversations or config.column or "text",
        "dialogue": config.conversations is not None,
    }


def peak_bytes() -> int:
    """Read the most memory that this process has held."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def report(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
