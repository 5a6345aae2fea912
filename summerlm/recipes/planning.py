"""What a configuration comes to before anything is trained: size, time, memory, money, saves, data.

Flow: the command `plan` prints what `plan` returns:
    1. size and FLOPs from the model itself (`plan.count`), steps and tokens from the settings;
    2. memory by part from a step that is traced without being computed (`tracing`), dealt over the
       devices that share the model, and the largest micro-batch that the hardware's memory holds;
    3. days and dollars at a stated utilisation, or at the one that `probing` measures here;
    4. the size of a checkpoint, how often to save, and what each source has to give.
`fit_budget` goes the other way, from dollars or days to settings. docs/planning.md tells formulas.
"""

from dataclasses import asdict
from typing import Any

from summerlm.core.errors import UsageError
from summerlm.core.hardware import describe, pick_device
from summerlm.parallel.float8 import check_float8
from summerlm.plan.cost import SAVE_BYTES_PER_S, lost_share, save_interval_s
from summerlm.plan.count import (
    flops_per_token,
    flops_per_token_full,
    parameters,
    parameters_without_embeddings,
)
from summerlm.plan.memory import Footprint
from summerlm.recipes.noting import notes
from summerlm.recipes.opening import open_tokenizer
from summerlm.recipes.probing import Probed, probe
from summerlm.recipes.room import Room
from summerlm.recipes.settings import Settings, derive
from summerlm.recipes.terms import Terms, check_hardware
from summerlm.train.config import compute_dtype


def plan(
    settings: Settings, terms: Terms | None = None, *, probing: bool = False
) -> dict[str, Any]:
    """Compute what a run consists of and what it takes.

    Args:
        settings: The run's settings.
        terms: What it is planned for; None = what is here.
        probing: Whether real steps are made here, which take the place of the stated MFU and of
            the predicted memory.

    Returns:
        Plain values. On the first level, whatever else is added: parameters before and after
        padding the vocabulary, FLOPs a token (forward and backward, causal attention counted once),
        context, steps, tokens; `days` and `dollars` are None without hardware, `dollars` also
        without a price. Tables: `basis` (what both rest on; None without days), `memory`, `fits`
        (with hardware), `probe`, `checkpoint`, `data`; `notes` are lines for people.

    Raises:
        UsageError: If the hardware is unknown or can't do what the settings ask for, or a figure
            makes no sense or has no effect.
    """
    terms = terms or Terms()
    terms.check(probing=probing)
    if (row := terms.find()) is not None:
        check_hardware(settings, row)
    derived, model = derive(settings), settings.model
    room = Room(settings, terms)
    fits = None if room.limit is None else room.largest(room.limit)
    rows = min(settings.parallel.micro_batch_rows or room.own, room.own)
    recompute = settings.parallel.recompute
    if settings.parallel.memory == "auto" and fits is not None:
        rows, recompute = fits["micro_batch_rows"] or 1, fits["recompute"]
    memory = room.footprint(rows, recompute)
    probed = probe_here(settings, terms, room, rows, recompute) if probing else None
    measured = None if probed is None else probed.flops
    devices = terms.devices(measured)
    flops = derived.tokens * flops_per_token(model)
    days = None if devices is None else devices.days(flops)
    facts: dict[str, Any] = {
        "parameters": parameters(model),
        "parameters_without_embeddings": parameters_without_embeddings(model),
        "parameters_padded": parameters(model, padded=True),
        "flops_per_token": flops_per_token(model),
        "flops_per_token_full_attention": flops_per_token_full(model),
        "context": model.context,
        "steps": derived.steps,
        "tokens": derived.tokens,
        "total_flops": flops,
        "tokens_per_second": None if days is None else derived.tokens / (days * 86_400),
        "days": days,
        "dollars": None if devices is None or days is None else devices.dollars(days),
        "basis": terms.basis(settings, measured),
        "memory": describe_memory(memory, rows, room.limit),
        "fits": fits,
        "probe": None if probed is None else describe_probe(probed, terms, memory.total),
    }
    facts["checkpoint"] = plan_saves(settings, terms, room.checkpoint_bytes, days)
    facts["data"] = plan_data(settings, terms.bytes_per_token)
    facts["notes"] = list(notes(settings, terms, room, memory, fits, probed))
    return facts


def probe_here(
    settings: Settings, terms: Terms, room: Room, rows: int, recompute: str | None
) -> Probed:
    """Make steps here, if this is the hardware that the run is planned for.

    Args:
        settings: The run's settings.
        terms: What it is planned for.
        room: Predicts memory.
        rows: Rows of the run's micro-batch.
        recompute: What the backward pass computes anew.

    Returns:
        What a step takes.

    Raises:
        UsageError: If other hardware is named than is here, or a setting asks for what isn't.
    """
    row = terms.find()
    if row is not None:
        here = describe(pick_device(settings.run.device)).get("accelerator", "a CPU")
        if row.match not in str(here).lower():
            raise UsageError(
                f"--probe measures this machine, which has {here} and no {row.name}: "
                "leave --hardware out, or --probe"
            )
    open_tokenizer(settings)  # a mistake is told before a process is started
    if settings.parallel.float8:
        device = pick_device(settings.run.device)
        check_float8(settings.model, device, compute_dtype(settings.train, device))
    changes = {"shard_ranks": 1, "memory": None, "recompute": recompute}
    alone = settings.parallel.model_copy(update=changes)
    settings = settings.model_copy(update={"parallel": alone})
    return probe(settings, rows, lambda size: room.footprint(size, recompute).total)


def describe_probe(probed: Probed, terms: Terms, predicted: int) -> dict[str, Any]:
    """Lay out what was measured.

    Args:
        probed: It.
        terms: What the run is planned for.
        predicted: Bytes of tensors that were predicted.

    Returns:
        Plain values; `mfu` is None where the peak of what is here isn't known.
    """
    row = terms.find()
    return {
        "step_seconds": probed.seconds,
        "tokens_per_second": probed.tokens / probed.seconds,
        "peak_bytes": probed.peak_bytes,
        "process_bytes": probed.base_bytes,
        "step_bytes": probed.peak_bytes - probed.base_bytes,
        "predicted_bytes": predicted,
        "micro_batches_tried": list(probed.rows_tried),
        "own_text": probed.own_text,
        "flops_per_second": probed.flops,
        "mfu": None if row is None else probed.flops / row.peak_flops,
    }


def describe_memory(memory: Footprint, rows: int, limit: int | None) -> dict[str, Any]:
    """Lay a footprint out for people and programs.

    Args:
        memory: The footprint.
        rows: Rows of its micro-batch.
        limit: Bytes that tensors may use, or None where that isn't planned for.

    Returns:
        Bytes by part, their sum, and the moment they are of.
    """
    parts = asdict(memory)
    return {
        "micro_batch_rows": rows,
        "highest_in": parts.pop("stretch"),
        **{f"{name}_bytes": value for name, value in parts.items()},
        "total_bytes": memory.total,
        "share_of_limit": None if limit is None else memory.total / limit,
    }


def plan_saves(settings: Settings, terms: Terms, size: int, days: float | None) -> dict[str, Any]:
    """Compute how large a checkpoint is and how often to save.

    Args:
        settings: The run's settings.
        terms: How many devices, and how often they fail.
        size: Bytes of a checkpoint.
        days: Of the whole run; None where that isn't known.

    Returns:
        Plain values; steps are None without `days`.
    """
    world = terms.world
    failure_s = terms.mtbf_hours * 3600 / world
    save_s = size / world / SAVE_BYTES_PER_S
    interval_s = save_interval_s(save_s, failure_s)
    every = None
    if days is not None:
        step_s = days * 86_400 / derive(settings).steps
        every = max(1, round(interval_s / step_s))
    return {
        "bytes": size,
        "save_seconds": save_s,
        "hours_between_failures": failure_s / 3600,
        "interval_seconds": interval_s,
        "every_steps": every,
        "lost_share": lost_share(save_s, interval_s, failure_s),
        "failures_in_the_run": None if days is None else days * 86_400 / failure_s,
    }


def plan_data(settings: Settings, bytes_per_token: float) -> dict[str, Any]:
    """Compute what each source has to give.

    Args:
        settings: The run's settings.
        bytes_per_token: UTF-8 bytes of text to a token.

    Returns:
        Tokens and bytes of text by source; weights are shares of tokens.
    """
    weights = {name: source.weight for name, source in settings.data.sources.items()}
    tokens, total = derive(settings).tokens, sum(weights.values())
    shares = {name: tokens * weight / total for name, weight in weights.items()}
    return {
        name: {"tokens": round(share), "text_bytes": round(share * bytes_per_token)}
        for name, share in shares.items()
    }
