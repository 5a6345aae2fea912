"""A profile of some steps: torch's trace, and a table of where their time went.

Flow: with `run.profile`, `pretrain` sends a run's steps through `profiled_run`, which records a few
of them once a start, when the first ones are over; `benching` does so with `record_steps` itself.
Marks are hung on the model for these steps alone (`marked`), others stand where the work is done;
`breakdown` makes the table. Nothing that is computed changes.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from summerlm.core.errors import SaveError
from summerlm.core.files import write_atomically, write_json
from summerlm.core.marks import part
from summerlm.core.record import Recorder
from summerlm.model.transformer import Transformer
from summerlm.recipes.breakdown import ATTENTION, BLOCK, PHASES, STEP, break_down
from summerlm.recipes.opening import Run
from summerlm.recipes.settings import derive
from summerlm.train.loop import Event

WARM_UP = 9  # steps of a start that are not profiled, where it has enough
STEPS = 5  # that are

OF_THE_MODEL = {"positions": "embedding", "embedding": "embedding", "final_norm": "final norm"}
OF_A_BLOCK = {
    "attention_norm": "attention: norm",
    "attention": ATTENTION,
    "attention.qkv": "attention: qkv",
    "attention.output": "attention: output",
    "mlp_norm": "MLP: norm",
    "mlp": "MLP: activation",
    "mlp.gate_up": "MLP: gate, up",
    "mlp.down": "MLP: down",
}


def profiled_run(steps: Iterator[Event], run: Run, recorder: Recorder) -> Iterator[Event]:
    """Profile some steps of a run, on the leading rank, into its folder.

    Steps 10 to 14 of this start, earlier ones where fewer are left. A run that is stopped before
    they are over leaves no profile.

    Args:
        steps: The run's steps.
        run: The run.
        recorder: Told where the profile is.

    Yields:
        The steps.
    """
    if not run.settings.run.profile or not run.ranks.leads:
        yield from steps
        return
    left = derive(run.settings).steps - (run.state["step"] if run.state else 0)
    count = min(STEPS, left)
    for _, event in zip(range(min(WARM_UP, left - count)), steps, strict=False):
        yield event
    folder, first = run.folder.path / "profile", None
    folder.mkdir(exist_ok=True)
    draft = folder / f".draft-{os.getpid()}.json.gz"
    compiled = run.settings.parallel.compile
    for event in record_steps(steps, count, run.layout.model, run.device, compiled, draft):
        first, last = first or event.step, event.step
        yield event
    try:
        _publish(draft, folder / f"steps-{first}-{last}", recorder, last)
    except (OSError, SaveError) as error:  # a full disk, say: no reason to end a run
        reason = f"no profile could be written: {error}"
        recorder.write("incident", line=f"warning: {reason}", step=last, reason=reason)
    yield from steps


def _publish(draft: Path, name: Path, recorder: Recorder, step: int) -> None:
    """Name a trace, write its table beside it, and say where."""
    trace = name.with_name(f"{name.name}.trace.json.gz")
    os.replace(draft, trace)
    found = break_down(trace)
    write_json(name.with_name(f"{name.name}.json"), found)
    text = io.StringIO()
    Console(file=text, width=100).print(show_parts(found, name.name))
    write_atomically(name.with_name(f"{name.name}.txt"), text.getvalue().encode())
    line = f"profile: {trace} (chrome://tracing, ui.perfetto.dev); table in {name}.txt"
    recorder.write("profile", line=line, step=step, trace=str(trace), seconds=found["seconds"])


def record_steps(
    steps: Iterator[Event],
    count: int,
    model: Transformer,
    device: torch.device,
    compiled: bool,
    trace: Path,
) -> Iterator[Event]:
    """Run some steps under torch's profiler.

    Args:
        steps: The loop; what happens between two of its steps is part of the one before.
        count: How many steps to take from it, at least 1.
        model: The model that they train.
        device: Where.
        compiled: Whether its blocks are compiled: then they are marked as a whole.
        trace: The file that is written when the last one is over.

    Yields:
        The steps.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with marked(model, compiled), profile(activities=activities) as profiler:
        for _ in range(count):
            with record_function(STEP):
                event = next(steps)
                with part("hooks"):
                    yield event
    profiler.export_chrome_trace(str(trace))


@contextmanager
def marked(model: Transformer, compiled: bool) -> Iterator[None]:
    """Mark the parts of a model for a while.

    Args:
        model: The model.
        compiled: Whether its blocks are compiled; marks inside would have them compiled anew.

    Yields:
        Nothing.
    """
    modules = {model.get_submodule(name): label for name, label in OF_THE_MODEL.items()}
    for block in model.blocks:
        modules[block] = BLOCK
        if not compiled:
            modules |= {block.get_submodule(name): label for name, label in OF_A_BLOCK.items()}
    handles = [handle for module, label in modules.items() for handle in _mark(module, label)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(module: nn.Module, label: str) -> list[Any]:
    """Mark what a module does, also where recomputation leaves it early by an exception."""
    open_marks: list[record_function] = []

    def begin(*_: object) -> None:
        open_marks.append(part(label))
        open_marks[-1].__enter__()

    def end(*_: object) -> None:
        open_marks.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, always_call=True),
    ]


def show_parts(found: Mapping[str, Any], title: str) -> Table:
    """Lay a step's parts out for a person.

    Args:
        found: What `break_down` returned.
        title: The table's heading.

    Returns:
        Milliseconds of a step and shares, with the sum below.
    """
    used = [phase for phase in PHASES if any(row.get(phase) for row in found["parts"])]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("part of a step, ms")
    for name in (*used, "in all", "share"):
        table.add_column(name, justify="right")
    for row in found["parts"]:
        cells = (f"{1e3 * row[phase]:.2f}" if row.get(phase) else "" for phase in used)
        share = f"{100 * row['share']:.1f} %"
        table.add_row(row["part"], *cells, f"{1e3 * row['seconds']:.2f}", share)
    table.add_section()
    empty = [""] * len(used)
    table.add_row("the step", *empty, f"{1e3 * found['seconds']:.2f}", "100.0 %")
    return table
