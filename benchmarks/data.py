"""How fast does text become batches, and how does that compare with Hugging Face `datasets`?

    python benchmarks/data.py --mirror ../shared/data/hub --json benchmarks/results/data.json

`--config` names the settings whose mixture, context, lanes, workers and tokenizer are used;
overrides `section.key=value` go at the end. The comparison needs the package `datasets`, in this
Python (`pip install -e ".[bench]"`) or in another one that has `datasets` and `tokenizers`:
`--peer-python PATH`. Linux only: processes are bound to a core, and memory is read from /proc.

What is measured, each in processes of its own, with one thread of everything:
    start    seconds from starting a fresh Python to its first step, imports included: with an
             empty cache (`SUMMERLM_CACHE`) and no lock (cold; the system's own file cache stays
             warm), and with both (warm); and resumed, after many steps (late), and from a crafted
             state in which each lane stands at the end of the longest documents (deep).
    memory   peak resident memory of one process that deals all lanes, above what it held after
             imports and with the tokenizer loaded; and its speed from the first step on, while
             lanes x sources x `open_documents` documents are encoded and mostly not dealt yet.
    stages   tokens/s of one core for read (units to texts), tokenize (texts to ids) and pack (ids
             to rows) alone, for each source and for the mixture: 1 / sum(share / tokens/s).
    chain    tokens/s of one core for all of it, as the loader deals it without workers: batches,
             borders, hashes and states included.
    peer     the same mixture through `datasets` (data_peer.py says how) on the same core, in
             slices that alternate with the chain's; the fastest of several sizes of `map` batches.
             Corrected, its probabilities are weights / tokens of a mean document, which must be
             measured before: what a user can do about the shares, and the original didn't.
    workers  tokens/s of the loader with 1 and 2 workers on all cores.

Tokens are targets. A mixture is asked for in shares of tokens, so tokens/s are given twice: over
all tokens, and over **useful** ones: as many as the largest subset of the stream has whose shares
are the weights, sum(weights) x min over sources of tokens / weight. What a stream gives beyond that
is text that the mixture didn't ask for. It depends on the lengths of the documents at hand, and is
counted for all sides alike. The original threw away about half of its blocks as well: of a stream
that was dealt to n workers already, each took every n-th block. That was measured on the original's
code, not here; one ratio takes it in. Over all tokens, chain and peer also read different texts,
some of which take longer to encode; the corrected peer reads nearly what the chain reads.

Figures compare only within one run of this file, on a machine that does nothing else.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_parts import FULL, PARTS, QUICK, Bench
from measuring import argument_parser, circumstances, measure_parts, show


def main() -> None:
    arguments = parse()
    figures = {**circumstances(), "quick": arguments.quick}
    amounts = QUICK if arguments.quick else FULL
    parts = [part for part in PARTS if part in arguments.only]
    with tempfile.TemporaryDirectory(prefix="summerlm-bench-") as folder:
        peer = arguments.peer_python
        own = (arguments.config, arguments.overrides, amounts, peer, Path(folder))
        measure_parts(figures, parts, lambda: Bench(*own))
    show(figures, lines(figures), arguments.json)


def parse() -> argparse.Namespace:
    """Read the arguments, and refuse what would fail after everything else is measured.

    Returns:
        The arguments.

    Raises:
        SystemExit: If there is nothing to compare with.
    """
    parser = argument_parser("the data engine; peer brings the chain", "60m", PARTS)
    parser.add_argument("--mirror", type=Path, help="folder that holds owner/name/...")
    parser.add_argument("--peer-python", default=sys.executable, help="Python with `datasets`")
    arguments = parser.parse_args()
    arguments.only = arguments.only or PARTS
    if arguments.mirror:
        arguments.overrides.append(f"data.mirror={arguments.mirror.resolve()}")
    if "peer" in arguments.only and not has_datasets(arguments.peer_python):
        raise SystemExit(
            f"{arguments.peer_python} has no `datasets`: pip install -e '.[bench]', name another "
            "Python with --peer-python, or leave the peer out with --only"
        )
    return arguments


def has_datasets(python: str) -> bool:
    command = [python, "-c", "import datasets, tokenizers"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value, or spread of values, of each line of the table."""
    if "start" in figures:
        for kind, seconds in figures["start"]["seconds"].items():
            yield f"start to first step, {kind}: s", seconds["total"]
    if "memory" in figures:
        memory = figures["memory"]
        yield f"memory of {memory['lanes']} lanes: MB", memory["bytes"] / 1e6
        yield "memory of a lane: MB", memory["bytes_per_lane"] / 1e6
        yield f"first {memory['tokens']:,} tokens: tokens/s", memory["tokens_per_second"]
    for source, stages in figures.get("stages", {}).get("tokens_per_second", {}).items():
        for stage, rates in stages.items():
            yield f"{stage} alone, {source}: tokens/s", rates
    for side in ("chain", "peer", "corrected_peer"):
        if side in figures:
            name = side.replace("_", " ")
            yield f"{name}: tokens/s", figures[side]["tokens_per_second"]
            for source, share in figures[side]["shares"].items():
                yield f"{name}: share of {source}", share
            yield f"{name}: useful share", figures[side]["useful_share"]
            yield f"{name}: useful tokens/s", figures[side]["useful_tokens_per_second"]
    for name, ratio in figures.get("ratios", {}).items():
        yield f"chain / peer: {name}", ratio
    for workers, rates in figures.get("workers", {}).items():
        yield f"loader, workers = {workers}: tokens/s", rates["tokens_per_second"]


if __name__ == "__main__":
    main()
