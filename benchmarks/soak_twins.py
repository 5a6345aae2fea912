"""What is wrong with a run that was finished, held against its twin.

Flow: `soak.py` calls `compare` when a run is through its faults: everything that it ever recorded,
its ledger and its last checkpoint, against the uninterrupted run's.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from soak_runs import BATCH, TOLERANCE, Bed
from watched_job import Row

from summerlm.checkpoint.manifest import verify
from summerlm.checkpoint.reading import read_tensors
from summerlm.core.files import read_json
from summerlm.core.record import read_rows


@dataclass
class Findings:
    """What comparing found, over all runs.

    Attributes:
        problems: What is wrong, in words.
        lost_tokens: Of steps that aren't there, or whose batch was another.
        repeated_tokens: Of steps that are there more than once.
        wrong_losses: How many, of all that were ever recorded.
        deviation: Largest difference of a loss where the layout changed.
        weight_deviation: Largest difference of a final weight where the layout changed.
        compared_rows: Steps held against the twin's, each time that they were made.
        compared_runs: Runs held against their twins, by whether "bit for bit" or "within ...".
    """

    problems: list[str] = field(default_factory=list)
    lost_tokens: int = 0
    repeated_tokens: int = 0
    wrong_losses: int = 0
    deviation: float = 0.0
    weight_deviation: float = 0.0
    compared_rows: int = 0
    compared_runs: dict[str, int] = field(default_factory=dict)


def compare(
    bed: Bed, name: str, twin: str, made: Iterable[Row], moved: bool, found: Findings
) -> None:
    """Hold a finished run against its twin.

    Args:
        bed: Where both lie.
        name: The run.
        twin: Its twin.
        made: Rows of all steps that it ever made, also those that were lost with a kill.
        moved: Whether its layout changed on the way: then losses may differ within `TOLERANCE`.
        found: What is wrong is added.
    """
    kind = f"within {TOLERANCE:g}" if moved else "bit for bit"
    found.compared_runs[kind] = found.compared_runs.get(kind, 0) + 1
    wrongs = [
        *_compare_steps(bed, name, twin, found),
        *_compare_losses(bed, name, twin, made, moved, found),
        *_compare_files(bed, name, twin, moved, found),
    ]
    found.problems += [f"{name}: {wrong}" for wrong in wrongs]


def rows(bed: Bed, name: str, kind: str) -> list[Row]:
    """Read what a run's record holds of one kind."""
    return [row for row in read_rows(bed.folder / name / "metrics.jsonl") if row["kind"] == kind]


def _compare_steps(bed: Bed, name: str, twin: str, found: Findings) -> Iterable[str]:
    """Every step once, in order, with the twin's batch."""
    shas = {row["step"]: row["batch_sha"] for row in rows(bed, twin, "train")}
    kept = rows(bed, name, "train")
    steps = [row["step"] for row in kept]
    right = {row["step"] for row in kept if shas.get(row["step"]) == row["batch_sha"]}
    lost = sorted(shas.keys() - right)
    repeated = len(steps) - len(set(steps))
    found.lost_tokens += BATCH * len(lost)
    found.repeated_tokens += BATCH * repeated
    if lost:
        yield f"steps missing, or of another batch: {lost}"
    if repeated:
        yield f"{repeated} steps stand in the record twice"
    if steps != sorted(steps) or any(row["tokens"] != row["step"] * BATCH for row in kept):
        yield "the record's steps or tokens are out of order"


def _compare_losses(
    bed: Bed, name: str, twin: str, made: Iterable[Row], moved: bool, found: Findings
) -> Iterable[str]:
    """All that was computed, whether it stayed or was made again."""
    expected = {row["step"]: row for row in rows(bed, twin, "train")}
    exact = ("batch_sha", "tokens", "lr", "updated")
    exact += () if moved else ("loss", "grad_norm", "update_norm", "loss_by_source")
    for row in made:
        found.compared_rows += 1
        other = expected[row["step"]]
        differ = [key for key in exact if row[key] != other[key]]
        deviation = abs(row["loss"] - other["loss"])
        if moved:
            found.deviation = max(found.deviation, deviation)
        if differ or not deviation <= TOLERANCE:
            found.wrong_losses += 1
            yield f"step {row['step']} differs in {differ or ['loss']}, its loss by {deviation:.3g}"
    held_out = [
        {row["step"]: row["held_out_loss"] for row in rows(bed, run, "validation")}
        for run in (name, twin)
    ]
    if held_out[0].keys() != held_out[1].keys() or any(
        not abs(loss - held_out[1][step]) <= (TOLERANCE if moved else 0)
        for step, loss in held_out[0].items()
    ):
        yield f"held-out losses differ: {held_out}"


def _compare_files(bed: Bed, name: str, twin: str, moved: bool, found: Findings) -> Iterable[str]:
    """Ledger, state and tensors at the end."""
    ledgers = [bed.folder / run / "ledger.json" for run in (name, twin)]
    if not ledgers[0].exists():
        yield "it has no ledger"
    elif read_json(ledgers[0]) != read_json(ledgers[1]):
        yield "its ledger is another"
    ends = [bed.checkpoint(run, bed.steps) for run in (name, twin)]
    verify(ends[0])
    states = [_without(read_json(end / "state.json"), "guard" if moved else "") for end in ends]
    if states[0] != states[1]:
        differ = [key for key in states[0] if states[0][key] != states[1].get(key)]
        yield f"its last state differs in {differ}"
    for stem in ("model", "optimizer"):
        mine, others = (read_tensors(end, stem) for end in ends)
        if mine.keys() != others.keys():
            yield f"its {stem} has other tensors"
            continue
        differ = [key for key in mine if not torch.equal(mine[key], others[key])]
        if not moved and differ:
            yield f"its last {stem} differs in {differ}"
        if stem == "model":
            gaps = [float((mine[key] - others[key]).abs().max()) for key in differ]
            found.weight_deviation = max([found.weight_deviation, *gaps])


def _without(state: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Leave out what holds losses, which a moved run only has nearly."""
    return json.loads(json.dumps({name: value for name, value in state.items() if name != key}))
