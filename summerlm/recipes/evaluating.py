"""Measuring a trained model on text.

Flow: the command `eval` prints what `evaluate` returns.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from summerlm.checkpoint.load import load
from summerlm.core.hardware import pick_device
from summerlm.data.config import DataConfig, SourceConfig
from summerlm.data.opening import open_sources
from summerlm.eval.text import measure
from summerlm.recipes.watching import EVAL_ROWS


def evaluate(run: Path, texts: Sequence[str], stride: int | None) -> dict[str, Any]:
    """Measure a model on whole documents.

    Args:
        run: A run folder or checkpoint.
        texts: Files, folders or globs of text, JSON lines or parquet.
        stride: Targets that each window scores; None = half the context.

    Returns:
        Documents, tokens, bytes, loss (nats a token), perplexity, bits per byte, the context and
        stride they were measured with, and the checkpoint's step.
    """
    loaded = load(run, pick_device("auto"))
    context = loaded.model.config.context
    score = measure(
        loaded.model,
        loaded.tokenizer,
        read_documents(texts),
        context=context,
        stride=stride,
        batch_rows=EVAL_ROWS,
        precision=None,
    )
    return {
        "checkpoint": str(loaded.folder),
        "step": loaded.state["step"],
        "documents": score.documents,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "context": context,
        "stride": stride or context // 2,
    }


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
