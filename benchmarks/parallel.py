"""What does it cost to train on two ranks instead of one process, to save, and to start again?

    python benchmarks/parallel.py --json benchmarks/results/parallel.json

Two gloo ranks of this machine, on the demo's model, source and settings (`configs/demo.toml`), with
steps of 4,096 tokens; overrides `section.key=value` go at the end. What is measured:
    speed    tokens/s of the loop of a run: data, messages, forward, backward, reduction, update.
             Every side makes steps of as many tokens, in slices that alternate, in processes that
             wait meanwhile:
                 one thread     a process alone that computes with one thread
                 two threads    a process alone that computes with two
                 apart          two processes alone, one thread each, half of a step's rows each,
                                at the same time and without a word to one another: what two cores
                                of this machine give at most
                 replicated     two ranks of one thread, each with a whole copy
                 sharded        two ranks of one thread, each with half of weights and optimizer
             Ratios are taken slice by slice. What communication costs is replicated / apart.
    wire     bytes that a rank sends in a step, as the kernel counts them for each of its TCP
             connections (TCP_INFO; headers and other processes left out): tensors, the host's
             messages, the job's store. Against the least: replicated, 2 (W - 1) / W of the
             gradients' bytes; sharded, (W - 1) / W of the weights in the dtype they travel in, and
             of the float32 gradients. What goes beyond that: FSDP by design gathers blocks
             again for the backward pass; gloo has no reduce-scatter of its own, so torch has it
             add up everything everywhere (NCCL has one); Muon's matrices go to their owners and
             back, counted where they are sent; the rest are sums of the norm and the like.
    save     seconds that a save of about 230 MB takes when the run waits for it, and those that the
             run stands still for one that is written meanwhile; and of a step without and beside.
    restart  seconds from the command to the next step of a run that has a checkpoint.

Figures compare only within one run of this file, on a machine that does nothing else. Linux only.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measuring import argument_parser, circumstances, measure_parts, show
from parallel_parts import FULL, PARTS, QUICK, Bench


def main() -> None:
    arguments = argument_parser("two ranks", "demo", PARTS).parse_args()
    figures = {**circumstances(), "quick": arguments.quick}
    amounts = QUICK if arguments.quick else FULL
    parts = [part for part in PARTS if part in (arguments.only or PARTS)]
    with tempfile.TemporaryDirectory(prefix="summerlm-bench-") as folder:
        own = (arguments.config, arguments.overrides, amounts, Path(folder))
        measure_parts(figures, parts, lambda: Bench(*own))
    show(figures, lines(figures), arguments.json)


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value, or spread of values, of each line of the table."""
    for name, rates in figures.get("speed", {}).items():
        yield f"{name}: tokens/s", rates
    yield from figures.get("ratios", {}).items()
    for layout, wire in figures.get("wire", {}).items():
        for kind, bytes_ in wire["sent"].items():
            yield f"{layout}: {kind} a rank sends in a step: kB", bytes_ / 1e3
        yield f"{layout}: least: kB", wire["least"] / 1e3
        for name, bytes_ in wire["beyond"].items():
            yield f"{layout}: beyond, {name.replace('_', ' ')}: kB", bytes_ / 1e3
        yield f"{layout}: tensors / least", wire["tensors / least"]
    for name, save in figures.get("save", {}).items():
        yield f"save on {name}: MB", save["bytes"]["median"] / 1e6
        for key, values in save.items():
            if key != "bytes":
                unit = "" if "/" in key else ": s"
                yield f"save on {name}, {key.replace('_', ' ')}{unit}", values
    for name, seconds in figures.get("restart", {}).items():
        yield f"restart to next step, {name}: s", seconds


if __name__ == "__main__":
    main()
