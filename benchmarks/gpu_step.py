"""How fast is one preset's step on this machine, and what share of the peak is that?

    python benchmarks/gpu_step.py --config configs/summer-4b-next.toml --rows 4 --json FILE
    python benchmarks/gpu_step.py --config configs/summer-4b.toml --side original --repo PATH

Makes whole training steps of the preset's model on synthetic ids, in a process of its own, with the
largest micro-batch of those given that fits into memory; `section.key=value` overrides go at the
end. `--side original` makes them by the original's code, its MLP sized so that a block has as many
parameters.

MFU is matmul FLOPs, forward and backward, over the device's dense bf16 peak: ours counts causal
attention once and no look-up, torchtitan's counts every query as reading all keys.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peers_contest import OURS, Amounts, Contestant, Mode, compete
from peers_shape import peer_flops, shape_like
from pydantic import ConfigDict

from summerlm.core.config import Section, read_settings
from summerlm.core.errors import SummerError
from summerlm.core.figures import circumstances
from summerlm.core.files import write_json
from summerlm.core.hardware import peak_flops
from summerlm.model.config import ModelConfig
from summerlm.optim.config import OptimConfig
from summerlm.parallel.config import ParallelConfig
from summerlm.train.config import TrainConfig


class StepSettings(Section):
    """What of a preset a step is made of; its data and records are not read here."""

    model_config = ConfigDict(extra="ignore")

    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()


def main() -> None:
    arguments = parse()
    try:
        settings = read_settings(StepSettings, arguments.config, arguments.overrides)
    except SummerError as error:
        raise SystemExit(f"error: {error}") from None
    figures = {
        **circumstances(arguments.device),
        "toy": arguments.toy,
        **measure(arguments, settings),
    }
    if arguments.json:
        write_json(arguments.json, figures)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a preset's step; see the file's head.")
    add = parser.add_argument
    add("--config", type=Path, required=True)
    add("--side", choices=("ours", "original"), default="ours")
    add("--repo", help="the original's checkout")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--rows", type=int, default=4, help="rows of a step, in place of the preset's")
    add("--micro-rows", type=int, action="append", help="largest first; the first that fits")
    for name, value in vars(Amounts()).items():
        add(f"--{name}", type=int, default=value)
    add("--toy", action="store_true", help="mark the figures as not to be used")
    add("--json", type=Path, help="file that the figures are written to")
    add("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, settings: StepSettings) -> dict[str, Any]:
    """Make steps and count.

    Args:
        arguments: The command's.
        settings: The preset's.

    Returns:
        The figures.
    """
    model, device = settings.model, torch.device(arguments.device)
    shape = shape_like(model, arguments.rows)
    names = ("model", "optim", "train", "parallel")
    tables = {name: getattr(settings, name).model_dump(mode="json") for name in names}
    job = {
        "side": arguments.side,
        "repo": arguments.repo,
        "device": arguments.device,
        "shape": vars(shape),
        "tables": tables,
    }
    compiled = settings.parallel.compile
    modes = [
        Mode(compiled, "bfloat16", rows, OURS) for rows in arguments.micro_rows or [arguments.rows]
    ]
    amounts = Amounts(arguments.tried, arguments.warm, arguments.steps, arguments.slice)
    sides, _ = compete([(Contestant(arguments.side, job, shape.tokens), modes)], amounts)
    found = sides[arguments.side]
    found.setdefault("flops_per_token", peer_flops("original", shape))
    peak = peak_flops(device)
    rate = found["tokens_per_second"]
    shares = {"mfu": "flops_per_token", "mfu_torchtitan": "torchtitan_flops_per_token"}
    return {
        "shape": vars(shape),
        "optimizer": settings.optim.name,
        "peak_flops": peak,
        **found,
        **{
            share: None if peak is None or key not in found else rate * found[key] / peak
            for share, key in shares.items()
        },
        **planned(arguments, {**found, "context": model.context}),
    }


def planned(arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Ask the planner what memory this step needs.

    Args:
        arguments: The command's.
        found: What was measured.

    Returns:
        `planned_bytes`, and on a GPU the measured peak over it, `peak_over_plan`; or
        `planned_bytes` None and why.
    """
    if arguments.side != "ours":
        return {"planned_bytes": None, "planned_why": "the planner knows this project alone"}
    try:  # all settings of a run, and with them all that the package needs
        from summerlm.recipes.room import Room
        from summerlm.recipes.settings import Settings
        from summerlm.recipes.terms import Terms
    except ImportError as error:
        return {"planned_bytes": None, "planned_why": str(error)}
    context, rows = found["context"], found["mode"]["micro_rows"]
    same = [
        f"train.batch_tokens={arguments.rows * context}",
        f"data.lanes={arguments.rows}",
        f"train.precision={found['mode']['dtype']}",
        f"parallel.micro_batch_rows={rows}",
        f"run.device={arguments.device}",
    ]
    settings = read_settings(Settings, arguments.config, [*arguments.overrides, *same])
    planned_bytes = Room(settings, Terms()).footprint(rows, settings.parallel.recompute).total
    peak = found["peak_bytes"]
    over = {} if peak is None else {"peak_over_plan": peak / planned_bytes}
    return {"planned_bytes": planned_bytes, **over}


if __name__ == "__main__":
    main()
