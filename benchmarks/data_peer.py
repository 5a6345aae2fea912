r"""The data chain of the original SummerLM on Hugging Face `datasets`, written anew, to measure.

`data.py` starts this file with an interpreter that has `datasets` and `tokenizers`; it uses
nothing of SummerLM. The chain is what the original asked for, and where the original leaves a
choice or errs at its own cost, this takes what is best for the chain:

    1. each source is loaded as a stream (of parquet only the text's column is decoded) and
       repeats without end, its column renamed to `text`, a dialogue rendered as `\nROLE: text`;
    2. `interleave_datasets` draws documents, with the weights as probabilities;
    3. `map` strips each text and encodes it, `batch` documents at a time, with the same
       `tokenizers` object as SummerLM;
    4. BOS, ids and EOS of all documents are laid end to end and cut into blocks of T + 1 ids that
       share one id with the next, T targets each, nothing dropped (the original overlaps by two
       and drops tails). Blocks stay lists: no tensors, borders, hashes or states are made.

Every document carries the number of its source through the chain, to count tokens by source.

Protocol: the job is a JSON object in the first argument. Each line read is a number of tokens to
make at least; the answer is a JSON line: seconds, tokens and documents by source. A slice ends
where a batch of `map` ends, so that no work is done in one slice and counted in the next.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
from tokenizers import Tokenizer


def main() -> None:
    job = json.loads(sys.argv[1])
    tokenizer = Tokenizer.from_file(job["tokenizer"])
    tokenizer.encode_special_tokens = True  # text is text, as in SummerLM
    sources = [load(source, number) for number, source in enumerate(job["sources"])]
    total = sum(source["weight"] for source in job["sources"])
    mixture = datasets.interleave_datasets(
        sources,
        probabilities=[source["weight"] / total for source in job["sources"]],
        seed=0,
    )
    encoded = mixture.map(
        partial(encode, tokenizer=tokenizer),
        batched=True,
        batch_size=job["batch"],
        remove_columns=["text"],
    )
    chain = blocks(encoded, job["bos"], job["eos"], job["context"])
    names = [source["name"] for source in job["sources"]]
    print(json.dumps({"version": datasets.__version__}), flush=True)
    for line in sys.stdin:
        tokens: Counter[str] = Counter()
        documents: Counter[str] = Counter()
        began = time.perf_counter()
        for source, targets in chain:
            tokens[names[source]] += targets
            documents[names[source]] += 1
            if tokens.total() >= int(line) and documents.total() % job["batch"] == 0:
                break
        seconds = time.perf_counter() - began
        print(
            json.dumps({"seconds": seconds, "tokens": tokens, "documents": documents}), flush=True
        )
    os._exit(0)  # `datasets` sleeps for seconds when a stream is left early


def load(source: dict[str, Any], number: int) -> datasets.IterableDataset:
    """Open one source as an endless stream of `text` and `source`."""
    column = source["column"]
    options: dict[str, Any] = {}
    if source["kind"] == "parquet":
        options["columns"] = [column]
    elif source["kind"] == "text":
        options["sample_by"] = "document"
    stream = datasets.load_dataset(
        source["kind"], data_files=source["files"], split="train", streaming=True, **options
    ).select_columns([column])
    if source["dialogue"]:
        stream = stream.map(partial(render, column=column), remove_columns=[column])
    elif column != "text":
        stream = stream.rename_column(column, "text")
    return stream.map(partial(label, source=number)).repeat(None)


def render(row: dict[str, Any], column: str) -> dict[str, str]:
    return {"text": "".join(f"\n{turn['from'].upper()}: {turn['value']}" for turn in row[column])}


def label(row: dict[str, Any], source: int) -> dict[str, int]:
    return {"source": source}


def encode(batch: dict[str, list[Any]], tokenizer: Tokenizer) -> dict[str, list[Any]]:
    texts = [text.strip() for text in batch["text"]]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return {"ids": [encoding.ids for encoding in encodings]}


def blocks(
    documents: datasets.IterableDataset, bos: int, eos: int, context: int
) -> Iterator[tuple[int, int]]:
    """Lay documents end to end and cut blocks.

    Args:
        documents: Rows of `ids` and `source`.
        bos: Id that begins a document.
        eos: Id that ends it.
        context: T, targets of a block of T + 1 ids.

    Yields:
        After each document its source and the ids that it added; the blocks that it filled are
        made, as lists, and let go.
    """
    rest: list[int] = []
    for row in documents:
        ids = [*rest, bos, *row["ids"], eos]
        cut = [ids[i : i + context + 1] for i in range(0, len(ids) - context, context)]
        rest = ids[len(cut) * context :]
        yield row["source"], len(row["ids"]) + 2


if __name__ == "__main__":
    main()
