"""How fast a configuration trains, reads, saves and writes text here, measured on the run itself.

Flow: the command `bench` calls `bench`, which opens the configuration as a run in a folder of its
own beside the run's, removed afterwards, makes steps by the loop of a run, and asks a `Bench` for
    step        seconds of a step of the loop, data included, and what follows: tokens/s, MFU
    parts       where that time goes, from a profile of some steps
    data        tokens/s of the loader alone
    checkpoint  how long training stands still for a save, how long the save and a load take
    generation  tokens/s of reading a prompt and of writing on
`show` lays the figures out for people.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from summerlm.core.config import read_settings
from summerlm.core.console import format_value
from summerlm.core.errors import UsageError
from summerlm.core.failing import INTERRUPTED
from summerlm.core.figures import circumstances
from summerlm.core.files import RunFolder
from summerlm.core.hardware import device_type
from summerlm.core.ranks import Ranks, join
from summerlm.core.runtime import InterruptedWaitError, StopRequest
from summerlm.recipes.benching_parts import NEEDED, PARTS, Bench
from summerlm.recipes.opening import open_run
from summerlm.recipes.profiling import show_parts
from summerlm.recipes.settings import Settings

WAYS = {"causal": "causal attention counted once", "full": "counted in full, as torchtitan does"}


def bench(
    config: Path, overrides: Sequence[str], only: Sequence[str], console: Console
) -> dict[str, Any] | None:
    """Measure a configuration; every rank of a job calls this.

    Args:
        config: The settings file.
        overrides: Settings to change.
        only: Which of `PARTS`; none means all.
        console: Where a person reads along.

    Returns:
        Circumstances, `config`, `overrides`, `ranks`, and an object a part; None on ranks that
        don't lead.

    Raises:
        UsageError: If a part is unknown.
    """
    if wrong := set(only) - set(PARTS):
        raise UsageError(f"--only {min(wrong)}: known parts are {', '.join(PARTS)}")
    settings = read_settings(Settings, config, overrides)
    device, limit = device_type(settings.run.device), settings.parallel.timeout_s
    with (
        StopRequest() as stop,
        join(device, limit) as ranks,
        _folder_beside(settings.run.folder, ranks) as folder,
    ):
        settings = read_settings(Settings, config, [*overrides, *_changes(settings, folder)])
        run = open_run(settings, RunFolder(folder), ranks, lambda _: None, stop)
        measured = Bench(run, stop)
        try:
            figures = {
                **circumstances(device, "summerlm"),
                "config": str(config),
                "overrides": list(overrides),
                "ranks": ranks.world,
            }
            for name in (name for name in PARTS if name in (only or PARTS)):
                if ranks.leads:
                    console.print(f"measuring {name} ...", soft_wrap=True)
                figures[name] = getattr(measured, name)()
                if stop.received is not None:
                    raise InterruptedWaitError
        except InterruptedWaitError:
            raise SystemExit(INTERRUPTED) from None
        finally:
            measured.close()
    return figures if ranks.leads else None


def _changes(settings: Settings, folder: Path) -> list[str]:
    """List the settings without which a run is measured: nothing that hangs on steps."""
    limited = [name for name, source in settings.data.sources.items() if source.max_epochs]
    budget = max(settings.train.budget_tokens, NEEDED * settings.train.batch_tokens)
    return [
        f"run.folder={folder}",
        "run.tensorboard=false",
        "run.profile=false",
        "validation.characters_per_source=0",
        "samples.prompts=[]",
        "evaluation.tasks=[]",
        "evaluation.metric=none",
        "train.on_spike=none",
        "train.max_skipped_steps=1000000",
        f"train.budget_tokens={budget}",
        *(f"data.sources.{name}.max_epochs=none" for name in limited),
    ]


@contextmanager
def _folder_beside(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """Lend all ranks a folder on the disk of the run's, for its saves."""
    if not ranks.leads:
        yield Path(ranks.exchange("")[0])
        ranks.exchange("")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder.parent) as name:
        ranks.exchange(name)
        yield Path(name)
        ranks.exchange("")  # nobody uses it any more


def show(figures: Mapping[str, Any]) -> RenderableType:
    """Lay figures out for a person.

    Args:
        figures: What `bench` returned.

    Returns:
        What rich can print: a line a figure with the spread of its repeats, and a step's parts.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{figures['config']} on {name_of(figures['hardware'])}")
    for name in ("median", "lowest", "highest"):
        table.add_column(name, justify="right")
    for name, value in lines(figures):
        spread = value if isinstance(value, Mapping) else {"median": value}
        cells = (spread.get(key) for key in ("median", "lowest", "highest"))
        table.add_row(name, *("" if cell is None else format_value(cell) for cell in cells))
    if "parts" not in figures:
        return table
    return Group(table, "", show_parts(figures["parts"], "where the time goes, under the profiler"))


def name_of(hardware: Mapping[str, Any]) -> str:
    """Name what figures were taken on."""
    return str(hardware.get("accelerator") or hardware["processor"])


def lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name each figure with its unit.

    Args:
        figures: What `bench` returned, or as much of it as was measured.

    Yields:
        A name, and a number or the spread of its repeats.
    """
    if "step" in figures:
        step = figures["step"]
        yield "step: s", step["seconds"]
        yield f"step of {step['tokens']:,} tokens: tokens/s", step["tokens_per_second"]
        for way, name in WAYS.items():
            yield f"step: TFLOP/s, {name}", step["flops_per_second"][way] / 1e12
            if step["mfu"][way] is not None:
                yield f"step: MFU, {name}: %", 100 * step["mfu"][way]
        yield "step: wait for data: s", step["data_wait_s"]
        yield "step: memory at its peak: GB", step["memory_bytes"] / 1e9
    if "data" in figures:
        data = figures["data"]
        yield f"loader alone, workers = {data['workers']}: tokens/s", data["tokens_per_second"]
    if "checkpoint" in figures:
        saved = figures["checkpoint"]
        yield "checkpoint: MB", saved["bytes"] / 1e6
        yield "checkpoint: training stands still: s", saved["stall_s"]
        yield "checkpoint: until published: s", saved["seconds"]
        yield "checkpoint: load: s", saved["load_s"]
    if "generation" in figures:
        text = figures["generation"]
        read, written = text["prompt_tokens"], text["tokens"]
        yield f"reading a prompt of {read} tokens: tokens/s", text["prompt_tokens_per_second"]
        yield f"writing {written} tokens after it: tokens/s", text["tokens_per_second"]
