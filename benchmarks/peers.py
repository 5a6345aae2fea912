"""How fast does this project train beside another codebase?

    python benchmarks/peers.py --peer nanogpt --repo PATH --json benchmarks/results/nanogpt.json
    python benchmarks/peers.py --peer original --repo PATH
    python benchmarks/peers.py --peer llama

Each side is a process of its own that makes whole training steps: forward, loss, backward,
clipping, update. Ours by the product's own layout, stepper and optimizer; the peer's by its own
code, from a checkout or, Hugging Face's Llama, from the installed package. Both have the same
layers, width, heads, context, rows and vocabulary, as many parameters in a block (within the
rounding of the MLP to 64), the same synthetic ids, and AdamW.

    search   tries each side's modes, compiled or not, float32 or bf16 autocast; then micro-batches
             in the best mode; then the environment as it is and as this product's command sets it.
    measure  has all winners alive; they make slices of steps in turn. Ratios are by turn.
    peak     big matmuls on this machine, float32 and bf16: what a share is a share of.

Against the original there are two recipes of ours: "modern", and "faithful", which does what the
original's README describes: RoPE and ALiBi, LayerScale, biases, dropout of 0.1. The original's code
has the dropout too; its ALiBi never acts.

Absolute rates compare only within one run of this file, on a machine that does nothing else.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers_contest import (
    ENVIRONMENTS,
    OURS,
    Amounts,
    Contestant,
    Mode,
    Search,
    compete,
    matmul_peak,
    variables,
)
from peers_shape import FILES, PEERS, Shape, our_model, peer_flops

from summerlm.core.figures import circumstances, spread
from summerlm.core.files import write_json

MODES = {
    f"{how}-{short}": (how == "compiled", dtype)
    for how in ("eager", "compiled")
    for short, dtype in (("float32", "float32"), ("bf16", "bfloat16"))
}
# least ratios on two CPU cores at the default shape, by peer and vocabulary
MARKS = {
    ("nanogpt", 4096): 1.5,
    ("nanogpt", 32773): 1.25,
    ("original", 4096): 4.0,
    ("original", 32773): 4.0,
}
TOY = ["--layers=2", "--width=32", "--heads=2", "--context=16", "--rows=4", "--vocabulary=300"]
TOY += ["--steps=4", "--tried=1", "--warm=1"]


def main() -> None:
    arguments = parse()
    amounts = Amounts(arguments.tried, arguments.warm, arguments.steps, arguments.slice)
    figures: dict[str, Any] = {
        **circumstances(arguments.device),
        "peer": arguments.peer,
        "toy": arguments.toy,
    }
    if arguments.repo:  # a place on one machine says nothing to others
        figures["command"] = figures["command"].replace(arguments.repo, "PATH")
    figures["matmul_peak"] = peaks(arguments)
    figures["vocabularies"] = {}
    for vocabulary in arguments.vocabulary:
        figures["vocabularies"][str(vocabulary)] = measure(arguments, vocabulary, amounts, figures)
        if arguments.json:  # what is measured is kept, whatever comes
            write_json(arguments.json, figures)
    for line in lines(figures):
        print(line)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a peer; see the file's head.")
    add = parser.add_argument
    add("--peer", choices=PEERS, required=True)
    add("--repo", help="the peer's checkout: nanogpt and original need it")
    add("--json", type=Path, help="file that the figures are written to")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    for name, value in {"layers": 6, "width": 256, "heads": 8, "context": 512, "rows": 8}.items():
        add(f"--{name}", type=int, default=value)
    add("--kv-heads", type=int, help="llama: key/value heads of both sides")
    add("--head-dim", type=int, help="channels of our heads; else the width over the heads")
    add("--vocabulary", type=int, action="append", help="may be given again; 4096 and 32773")
    add("--recipe", choices=("modern", "faithful"), action="append", help="of ours; again for both")
    add("--mode", choices=tuple(MODES), action="append", help="tried on both sides; all")
    add("--micro-rows", type=int, action="append", help="micro-batches tried, largest first")
    add("--fit", action="store_true", help="no search: the largest micro-batch that fits")
    words = f'tried: "default", or NAME=VALUE; default and {OURS}'
    add("--environment", action="append", help=words)
    for name, value in vars(Amounts()).items():
        add(f"--{name}", type=int, default=value)
    add("--toy", action="store_true", help="see that it runs; no figures to use")
    given = sys.argv[1:]
    return complete(parser.parse_args(TOY + given if "--toy" in given else given))


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fill what wasn't given, and refuse what can't be.

    Args:
        arguments: As they were parsed.

    Returns:
        The same.

    Raises:
        SystemExit: If the peer's code is missing, or arguments contradict each other.
    """
    if arguments.peer == "llama":
        if find_spec("transformers") is None:
            raise SystemExit("--peer llama: needs `pip install transformers`")
    elif arguments.repo is None:
        raise SystemExit(f"--peer {arguments.peer}: give its checkout with --repo PATH")
    elif not (Path(arguments.repo) / FILES[arguments.peer]).is_file():
        raise SystemExit(f"--repo {arguments.repo}: has no {FILES[arguments.peer]}")
    if arguments.peer != "llama" and arguments.kv_heads not in (None, arguments.heads):
        raise SystemExit(f"--kv-heads: {arguments.peer} has as many as --heads")
    if arguments.fit and not len(arguments.mode or []) == len(arguments.environment or []) == 1:
        raise SystemExit("--fit: goes with one --mode and one --environment")
    arguments.kv_heads = arguments.kv_heads or arguments.heads
    both = ["modern", "faithful"] if arguments.peer == "original" else ["modern"]
    arguments.recipe = arguments.recipe or both
    arguments.vocabulary = arguments.vocabulary or [4096, 32773]
    arguments.environment = arguments.environment or list(ENVIRONMENTS)
    for environment in arguments.environment:
        try:
            variables(environment)
        except ValueError as error:
            raise SystemExit(f"--environment: {error}") from None
    arguments.mode = arguments.mode or list(MODES)
    rows = arguments.rows
    halves = [rows >> n for n in range(rows.bit_length()) if rows % (1 << n) == 0]
    arguments.micro_rows = sorted(arguments.micro_rows or halves, reverse=True)
    return arguments


def peaks(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the matmul peak in the dtypes that are tried, FLOP/s."""
    size = 128 if arguments.toy else {"cpu": 2048, "cuda": 8192}[arguments.device]
    dtypes = sorted({MODES[name][1] for name in arguments.mode}, reverse=True)
    return {dtype: matmul_peak(arguments.device, dtype, size, 10) for dtype in dtypes}


def measure(
    arguments: argparse.Namespace, vocabulary: int, amounts: Amounts, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Search and compare at one vocabulary.

    Args:
        arguments: The command's.
        vocabulary: Ids.
        amounts: How much is measured.
        figures: With the matmul peak.

    Returns:
        Figures by side, what was tried, and ratios.
    """
    names = ("layers", "width", "heads", "kv_heads", "context", "rows")
    shape = Shape(**{name: getattr(arguments, name) for name in names}, vocabulary=vocabulary)
    print(f"vocabulary {vocabulary}: searching ...", file=sys.stderr, flush=True)
    chosen, tried = [], {}
    for contestant in contestants(arguments, shape):
        modes = [MODES[name] for name in arguments.mode]
        if arguments.fit:
            usable = [Mode(*modes[0], n, arguments.environment[0]) for n in arguments.micro_rows]
        else:
            search = Search(contestant, amounts)
            usable = [search.best(modes, arguments.micro_rows, arguments.environment)]
            tried[contestant.name] = search.tried
        chosen.append((contestant, usable))
    print(f"vocabulary {vocabulary}: measuring ...", file=sys.stderr, flush=True)
    sides, turns = compete(chosen, amounts)
    for side in sides.values():
        side.setdefault("flops_per_token", peer_flops(arguments.peer, shape))
        rate = side["tokens_per_second"] * side["flops_per_token"]
        side["share_of_matmul_peak"] = rate / figures["matmul_peak"][side["mode"]["dtype"]]
    peer = arguments.peer
    ratios = {
        name: spread([turn[peer] / turn[name] for turn in turns]) for name in sides if name != peer
    }
    mark = None if arguments.toy else mark_of(arguments, shape)
    return {"shape": vars(shape), "tried": tried, "sides": sides, "ratios": ratios, "mark": mark}


def contestants(arguments: argparse.Namespace, shape: Shape) -> Iterator[Contestant]:
    """Yield our side, once for each recipe, and the peer's."""
    common = {"device": arguments.device, "shape": vars(shape), "repo": arguments.repo}
    for recipe in arguments.recipe:
        model = our_model(arguments.peer, shape, recipe, arguments.head_dim)
        tables = {
            "model": model,
            "optim": {"name": "adamw", "peak_lr": 6e-4},
            "train": {},
            "parallel": {},
        }
        job = {**common, "side": "ours", "tables": tables}
        yield Contestant(f"ours, {recipe}", job, shape.tokens)
    yield Contestant(arguments.peer, {**common, "side": arguments.peer}, shape.tokens)


def mark_of(arguments: argparse.Namespace, shape: Shape) -> float | None:
    """Give the least ratio that is aimed at, or None where there is none for such a shape."""
    usual = Shape(6, 256, 8, 8, 512, 8, shape.vocabulary)
    if arguments.device != "cpu" or shape != usual:
        return None
    return MARKS.get((arguments.peer, shape.vocabulary))


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is printed."""
    peak = figures["matmul_peak"]
    yield figures["hardware"].get("accelerator") or figures["hardware"]["processor"]
    yield "matmul peak, GFLOP/s: " + ", ".join(f"{d} {f / 1e9:,.0f}" for d, f in peak.items())
    for vocabulary, found in figures["vocabularies"].items():
        yield f"vocabulary {vocabulary}, {found['shape']}"
        for name, side in found["sides"].items():
            yield (
                f"  {name}: {side['tokens_per_second']:,.0f} tokens/s, "
                f"{side['share_of_matmul_peak']:.1%} of the matmul peak, "
                f"{side['parameters']:,} parameters, {Mode(**side['mode'])}, "
                f"loss {side['first_loss']:.2f} -> {side['loss']:.2f}"
            )
        for name, ratio in found["ratios"].items():
            mark = found["mark"]
            met = "" if mark is None else f"; {mark:g} wanted"
            if mark is not None and name == "ours, modern":
                met += ": met" if ratio["median"] >= mark else ": missed"
            yield (
                f"  {name} / {figures['peer']}: {ratio['median']:.2f} "
                f"({ratio['lowest']:.2f} to {ratio['highest']:.2f}){met}"
            )


if __name__ == "__main__":
    main()
