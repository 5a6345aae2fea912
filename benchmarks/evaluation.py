"""How fast are tasks scored, beside lm-eval's `hf` model class on the same items and weights?

    python benchmarks/evaluation.py --mirror ../shared/data/hub --peer-python PEER/bin/python \
        --run runs/demo --config configs/125m.toml --json benchmarks/results/evaluation.json

The models: runs, and settings that get random weights; by default `configs/demo.toml` and
`configs/125m.toml`. Each is written as a folder of Hugging Face's stock Llama or Qwen3
(`evaluation_models`). The peer needs `lm_eval`, `transformers` and `torch`, in this Python
(`pip install -e ".[eval]"`) or in another: `--peer-python PATH`.

Each side is a process of its own with all cores, float32, that gets the same contexts and
continuations as text and gives their log-likelihoods: encoding counts, starting doesn't.
    ours   `encode_pairs` and `answer`;
    peer   `HFLM.loglikelihood` of lm-eval, its cache of logits on, as it comes.
For each task both search their best size of a batch; then they work in turn, and ratios are by
turn. `agreement` says whether both give the same answers, `choices` and `choices_norm` by how many
items differ in what they choose, by likelihood and by likelihood a character.

Figures compare only within one run of this file, on a machine that does nothing else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation_models import export, make_model
from measuring import Child, circumstances, show, spread

from summerlm.core.errors import SummerError
from summerlm.core.files import write_json
from summerlm.eval.items import Where
from summerlm.eval.preparing import prepare
from summerlm.eval.task import load_task

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
TASKS = ("arc_easy", "arc_challenge", "lambada_openai")
BATCHES = {"ours": (512, 1024, 2048), "peer": (1, 2, 4, 16, 64)}  # tokens of a pass; requests
LARGE = 20_000_000  # parameters above which fewer items are scored
FEW = 40
MARK = 3.0  # least ratio over all tasks, on two cores


def main() -> None:
    arguments = parse()
    figures: dict[str, Any] = {**circumstances(), "quick": arguments.quick, "models": {}}
    try:
        for job in jobs(arguments):
            figures["models"][job["name"]] = measure(job, arguments)
            if arguments.json:  # what is measured is kept, whatever comes
                write_json(arguments.json, figures)
    except SummerError as error:
        raise SystemExit(f"error: {error}") from None
    show(figures, lines(figures), arguments.json)


def parse() -> argparse.Namespace:
    """Read the arguments, and refuse what would fail after everything else is measured.

    Returns:
        The arguments.

    Raises:
        SystemExit: If there is nothing to compare with.
    """
    parser = argparse.ArgumentParser(description="Measure tasks; see the file's head.")
    add = parser.add_argument
    add("--mirror", type=Path, help="folder that holds owner/name/...; else the hub is read")
    add("--run", type=Path, action="append", default=[], help="a run or checkpoint; again for more")
    add("--config", type=Path, action="append", default=[], help="settings; again for more")
    add("--task", action="append", choices=TASKS, help="measure this one alone; again for more")
    add("--limit", type=int, help=f"items of a task; else all, {FEW} for large models")
    add("--turns", type=int, default=5, help="how often both sides score a task")
    add("--peer-python", default=sys.executable, help="Python with `lm_eval`")
    add("--json", type=Path, help="file that the figures are written to")
    add("--quick", action="store_true", help="see that it runs; no figures to use")
    arguments = parser.parse_args()
    if not arguments.run and not arguments.config:
        arguments.config = [CONFIGS / "demo.toml", CONFIGS / "125m.toml"]
    if arguments.quick:
        arguments.turns, arguments.limit = 1, arguments.limit or 4
    command = [arguments.peer_python, "-c", "import lm_eval, torch, transformers"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise SystemExit(
            f"{arguments.peer_python} has no `lm_eval` with its `hf` models: "
            "pip install -e '.[eval]', or name another Python with --peer-python"
        )
    return arguments


def jobs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what makes each model."""
    for run in arguments.run:
        yield {"name": run.resolve().name, "run": str(run)}
    for config in arguments.config:
        yield {"name": config.stem, "config": str(config)}


def measure(job: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in all tasks.

    Args:
        job: What makes the model.
        arguments: The command's.

    Returns:
        Its figures.
    """
    lm = make_model(job)
    count = sum(parameter.numel() for parameter in lm.model.parameters())
    limit = arguments.limit or (FEW if count > LARGE else None)
    with tempfile.TemporaryDirectory(prefix="summerlm-bench-") as name:
        folder = Path(name)
        export(lm, folder / "model")
        items = {
            task: read(task, arguments.mirror, limit, folder) for task in arguments.task or TASKS
        }
        del lm
        our_side = [sys.executable, str(HERE / "evaluation_ours.py"), json.dumps(job)]
        peer_side = [arguments.peer_python, str(HERE / "evaluation_peer.py"), str(folder / "model")]
        with Child(our_side) as our_child, Child(peer_side) as peer_child:
            sides = {"ours": our_child, "peer": peer_child}
            about = {side: child.answer() for side, child in sides.items()}
            tasks = {task: contest(sides, i, arguments) for task, i in items.items()}
    turns = {side: [t[side]["seconds"]["all"] for t in tasks.values()] for side in sides}
    ours, peers = ([sum(turn) for turn in zip(*t, strict=True)] for t in turns.values())
    ratio = [theirs / own for own, theirs in zip(ours, peers, strict=True)]
    return {**job, "parameters": count, "sides": about, "tasks": tasks, "ratio": spread(ratio)}


def read(task: str, mirror: Path | None, limit: int | None, folder: Path) -> dict[str, Any]:
    """Write a task's contexts and continuations into a file for both sides.

    Args:
        task: Its name.
        mirror: Where rows are read from; None = the hub.
        limit: How many items; None = all.
        folder: Where the file goes.

    Returns:
        The file, and for each item the lengths of its choices in characters.
    """
    (part,) = load_task(task).part_names
    made = prepare(load_task(task), part, Where(mirror=mirror), 0, 0, limit)
    file = folder / f"{task}.json"
    file.write_text(json.dumps(made.pairs))
    lengths = [[len(continuation) - 1 for _, continuation in item.pairs] for item in made.items]
    return {"file": str(file), "lengths": lengths}


def contest(
    sides: Mapping[str, Child], items: Mapping[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Let both sides score a task in turn.

    Args:
        sides: Both.
        items: What `read` gave.
        arguments: The command's.

    Returns:
        Seconds by side at their best sizes of a batch, what others took, ratios, agreement.
    """
    tried: dict[str, dict[int, float]] = {}
    for side, child in sides.items():
        ask(child, items, BATCHES[side][0])  # warm: memory, files, kernels
        tried[side] = {b: ask(child, items, b)["seconds"] for b in BATCHES[side]}
    best = {side: min(found, key=found.__getitem__) for side, found in tried.items()}
    turns = [
        {side: ask(child, items, best[side]) for side, child in sides.items()}
        for _ in range(arguments.turns)
    ]
    result: dict[str, Any] = {
        side: {
            "batch": best[side],
            "tried": tried[side],
            "seconds": spread([turn[side]["seconds"] for turn in turns]),
        }
        for side in sides
    }
    ratios = [turn["peer"]["seconds"] / turn["ours"]["seconds"] for turn in turns]
    lengths = items["lengths"]
    return {
        "items": len(lengths),
        "asks": sum(map(len, lengths)),
        **result,
        "ratio": spread(ratios),
        "agreement": compare(turns[-1]["ours"]["answers"], turns[-1]["peer"]["answers"], lengths),
    }


def ask(child: Child, items: Mapping[str, Any], batch: int) -> dict[str, Any]:
    return child.answer(json.dumps({"file": items["file"], "batch": batch}))


def compare(
    ours: Sequence[tuple[float, bool]],
    theirs: Sequence[tuple[float, bool]],
    lengths: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Say how far answers differ.

    Args:
        ours: Log-likelihood and whether it is greedy, of each ask.
        theirs: The same.
        lengths: Characters of each choice, by item.

    Returns:
        The largest difference of log-likelihoods, relative, and how many asks and items differ.
    """
    pairs = list(zip(ours, theirs, strict=True))

    def choices(answers: Sequence[tuple[float, bool]], normed: bool) -> list[int]:
        rest = iter(answers)
        chosen = []
        for sizes in lengths:
            values = [next(rest)[0] / (size if normed else 1) for size in sizes]
            chosen.append(values.index(max(values)))
        return chosen

    def differ(normed: bool) -> int:
        both = zip(choices(ours, normed), choices(theirs, normed), strict=True)
        return sum(a != b for a, b in both)

    return {
        "largest_relative_difference": max(abs(a[0] - b[0]) / abs(b[0]) for a, b in pairs),
        "greedy": sum(a[1] != b[1] for a, b in pairs),
        "choices": differ(False),
        "choices_norm": differ(True),
    }


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value, or spread of values, of each line of the table."""
    for name, model in figures["models"].items():
        yield f"{name}: parameters", model["parameters"]
        for task, found in model["tasks"].items():
            yield f"{name}, {task}: asks", found["asks"]
            for side in ("ours", "peer"):
                yield f"{name}, {task}, {side}: s", found[side]["seconds"]
            yield f"{name}, {task}: peer / ours", found["ratio"]
            for what, value in found["agreement"].items():
                yield f"{name}, {task}, differences: {what}", value
        yield f"{name}, all tasks: peer / ours (mark: {MARK:g})", model["ratio"]


if __name__ == "__main__":
    main()
